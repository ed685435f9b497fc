"""Two processes on a CPU (gloo): DDP and FSDP train a swapped model as one process does."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.parametrize(("kind", "launcher"), [("ddp", ACCELERATE), ("fsdp", TORCHRUN)])
def test_two_processes_train_as_one(kind: str, launcher: list[str], tmp_path: Path) -> None:
    start = swapped("gpt2", "t5")
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
    variables = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    if kind == "fsdp":
        assert len(list((tmp_path / "out" / "state").glob("*.distcp"))) == 2
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for name, parameter in positional_parameters(start):
        assert (trained[name] - parameter).abs().max() > 1e-4
