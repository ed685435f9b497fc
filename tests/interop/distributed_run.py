"""What two processes do with a saved swapped model: `accelerate launch ... distributed_run.py FOLDER OUT KIND`.

KIND is `ddp` or `fsdp`. Both take the same three steps on the same eight rows, four a process, and the first process saves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pe_swap  # noqa: F401  # its Auto classes
from tests.models import token_ids

STEPS, ROWS, LENGTH = 3, 8, 40
LEARNING_RATE = 0.05


def batch() -> Tensor:
    """Return all rows, `[rows, length]`."""
    return token_ids(ROWS, LENGTH)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return plain gradient descent: its state cannot hide a wrong gradient, as Adam's normalisation can."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)


def step(model: torch.nn.Module, optimizer: Any, rows: Tensor, backward: Any) -> None:
    """Take one step on the mean loss of `rows`."""
    optimizer.zero_grad()
    backward(model(rows, labels=rows).loss)
    optimizer.step()


def accelerator_of(kind: str) -> Accelerator:
    """Return the accelerator of a kind."""
    if kind == "ddp":
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type="SHARDED_STATE_DICT", reshard_after_forward=True,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def main(folder: Path, out: Path, kind: str) -> None:
    """Train, save whole and in shards, go on, load the shards again, and go on anew: the same end."""
    torch.set_num_threads(1)
    accelerator = accelerator_of(kind)
    assert accelerator.num_processes == 2
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    share = ROWS // accelerator.num_processes
    rows = batch()[accelerator.process_index * share :][:share]
    for _ in range(STEPS - 1):
        step(model, optimizer, rows, accelerator.backward)
    accelerator.save_state(str(out / f"{kind}-state"))
    ends = []
    for _ in range(2):
        step(model, optimizer, rows, accelerator.backward)
        ends.append({name: value.clone() for name, value in accelerator.get_state_dict(model).items()})
        if len(ends) == 1:
            accelerator.load_state(str(out / f"{kind}-state"))
    if accelerator.is_main_process:
        assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    accelerator.unwrap_model(model).save_pretrained(out / kind, state_dict=ends[0], is_main_process=accelerator.is_main_process)
    print(f"{type(model).__name__} {accelerator.distributed_type}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
