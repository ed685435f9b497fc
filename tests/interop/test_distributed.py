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
    TORCHRUN,
    {"zero3": "fire"},
    id="zero3",
    marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"),
)
"""With fire, whose parameters are scalars in the paper: neither DeepSpeed nor FSDP takes a tensor without dimensions."""

OURS = pytest.param(ACCELERATE, {"ddp": "t5", "fsdp": "t5", "fsdp-unit": "fire"}, id="ddp-fsdp")
"""In one launch, as most of its time goes into starting two processes."""


@pytest.mark.parametrize(("launcher", "cases"), [OURS, ZERO3])
def test_two_processes_train_as_one(launcher: list[str], cases: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, *launcher, "-m", "tests.support.distributed_run"]
    for kind, case in cases.items():
        swapped("gpt2", case).save_pretrained(tmp_path / kind / "start")
        command += [str(tmp_path / kind / "start"), str(tmp_path / kind), kind]
    variables = environment(ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for kind, case in cases.items():
        assert_trained_as_in_one_process(tmp_path / kind, kind, case)


def assert_trained_as_in_one_process(folder: Path, kind: str, case: str) -> None:
    expected = in_one_process(folder / "start")
    if kind.startswith("fsdp"):
        assert len(list((folder / "state").glob("*.distcp"))) == 2
    trained = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            trained[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{kind}, {name}: {text}"
        )
    start = positional_parameters(swapped("gpt2", case))
    moved = {name: float((trained[name] - parameter).detach().abs().max()) for name, parameter in start}
    assert max(moved.values()) > 1e-4, moved  # of fire a few have almost no gradient: a softmax ignores what all scores share
