"""Two processes on a CPU (gloo): DDP, FSDP and DeepSpeed's ZeRO-3 train a swapped model as one process does."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pe_swap.patching.install import positional_parameters
from tests.support import distributed_run
from tests.support.models import swapped
from tests.support.processes import ROOT, environment

ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def in_one_process(folder: Path) -> dict[str, Tensor]:
    """Return the weights after the same steps on all rows at once."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = distributed_run.optimizer_of(model)
    distributed_run.take_steps(model, optimizer, distributed_run.batch(), distributed_run.STEPS, Tensor.backward)
    return model.state_dict()


ZERO3 = pytest.param(
    "zero3",
    "fire",
    TORCHRUN,
    marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"),
)
"""With fire, whose parameters are scalars in the paper: neither DeepSpeed nor FSDP takes a tensor without dimensions."""


@pytest.mark.parametrize(
    ("kind", "case", "launcher"), [("ddp", "t5", ACCELERATE), ("fsdp", "t5", TORCHRUN), ("fsdp-unit", "fire", TORCHRUN), ZERO3]
)
def test_two_processes_train_as_one(kind: str, case: str, launcher: list[str], tmp_path: Path) -> None:
    start = swapped("gpt2", case)
    start.save_pretrained(tmp_path / "start")
    expected = in_one_process(tmp_path / "start")
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.support.distributed_run",
        str(tmp_path / "start"),
        str(tmp_path / "out"),
        kind,
    ]
    variables = environment(ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    if kind.startswith("fsdp"):
        assert len(list((tmp_path / "out" / "state").glob("*.distcp"))) == 2
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    moved = {name: float((trained[name] - parameter).detach().abs().max()) for name, parameter in positional_parameters(start)}
    assert max(moved.values()) > 1e-4, moved  # of fire a few have almost no gradient: a softmax ignores what all scores share
