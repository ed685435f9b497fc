"""What two processes do with saved swapped models: `accelerate launch ... distributed_run.py FOLDER OUT KIND [FOLDER OUT KIND ...]`.

Every KIND is `ddp`, through Accelerate; `fsdp`, through PyTorch's `fully_shard`, as Accelerate turns FSDP off on a CPU without a word;
`fsdp-unit`, where the module of the schemes is a unit of its own; or `zero3`, through DeepSpeed. All take the same steps on the same
rows, save their state on the way, go on, go back to what they saved and go on anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

import pe_swap  # noqa: F401  # its Auto classes
from tests.support.models import token_ids

STEPS, ROWS, LENGTH = 3, 8, 40


def batch() -> Tensor:
    """Return the rows of all processes, `[rows, length]`."""
    return token_ids(ROWS, LENGTH)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return gradient descent with momentum: a state to save, and no normalisation that could hide a wrong gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def take_steps(model: nn.Module, optimizer: Any, rows: Tensor, steps: int, backward: Callable[[Tensor], None]) -> None:
    """Take steps on the mean loss of `rows`."""
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model(rows, labels=rows, use_cache=False).loss)
        optimizer.step()


def share_of(rank: int) -> Tensor:
    """Return the rows of one of two processes."""
    return batch()[rank * ROWS // 2 : (rank + 1) * ROWS // 2]


def run_ddp(model: PreTrainedModel, folder: Path) -> list[dict[str, Tensor]]:
    """Train under Accelerate's DDP; return the weights at the end, and at the end from the saved state on."""
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    rows, ends = share_of(accelerator.process_index), []
    take_steps(wrapped, optimizer, rows, STEPS - 1, accelerator.backward)
    accelerator.save_state(str(folder))
    for _ in range(2):
        take_steps(wrapped, optimizer, rows, 1, accelerator.backward)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        accelerator.load_state(str(folder))
    return ends


def run_fsdp(model: PreTrainedModel, folder: Path, *, own_unit: bool = False) -> list[dict[str, Tensor]]:
    """As `run_ddp`, with every parameter in two shards; each process writes and reads its own.

    Args:
        model: the model.
        folder: for the state.
        own_unit: shard the module of the schemes by itself, and not with the root.
    """
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*model.transformer.h, *([model.transformer.wpe] if own_unit else []), model):
        fully_shard(unit, mesh=mesh)
    sharded = {name for name, parameter in model.named_parameters() if parameter.to_local().numel() < parameter.numel()}
    assert any(".wpe.schemes." in name for name in sharded)
    optimizer = optimizer_of(model)
    whole = StateDictOptions(full_state_dict=True)
    rows, ends = share_of(distributed.get_rank()), []
    take_steps(model, optimizer, rows, STEPS - 1, Tensor.backward)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    distributed_checkpoint.save(state, checkpoint_id=folder)
    for _ in range(2):
        take_steps(model, optimizer, rows, 1, Tensor.backward)
        ends.append({name: value.clone() for name, value in get_model_state_dict(model, options=whole).items()})
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        distributed_checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return ends


def run_zero3(model: PreTrainedModel, folder: Path) -> list[dict[str, Tensor]]:
    """As `run_fsdp`, through DeepSpeed's ZeRO-3, which gathers a weight when a module reads it."""
    import deepspeed

    rank = int(os.environ["RANK"])
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # its default clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "a parameter is not partitioned"

    def one_step() -> None:
        engine.backward(engine(share_of(rank), labels=share_of(rank), use_cache=False).loss)
        engine.step()

    for _ in range(STEPS - 1):
        one_step()
    engine.save_checkpoint(str(folder))
    ends = []
    for _ in range(2):
        one_step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            ends.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        engine.load_checkpoint(str(folder))
    return ends


RUNS: dict[str, Callable[[PreTrainedModel, Path], list[dict[str, Tensor]]]] = {
    "ddp": run_ddp,
    "fsdp": run_fsdp,
    "fsdp-unit": partial(run_fsdp, own_unit=True),
    "zero3": run_zero3,
}


def main(source: Path, out: Path, kind: str) -> None:
    """Train, and let the first process save the model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    ends = RUNS[kind](model, out / "state")
    if distributed.get_rank() == 0:
        assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items()), "the reloaded state went elsewhere"
        model.save_pretrained(out / "model", state_dict=ends[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    for source, out, kind in zip(given[::3], given[1::3], given[2::3], strict=True):
        main(Path(source), Path(out), kind)
    distributed.destroy_process_group()
