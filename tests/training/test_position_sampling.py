"""Positions drawn in training: sorted, in range, across skips, and the same after a kill."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import pe_swap
from pe_swap.commands.finetune import finetune
from pe_swap.errors import ConfigError
from pe_swap.runs.config import PositionSampling
from pe_swap.training.position_sampling import SAMPLERS, pose, randomized, with_sampled_positions
from tests.support.finetuning import KilledError, config, killed_after, weights
from tests.support.models import build, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(("length", "max_length"), [(1, 1), (2, 2), (9, 9), (9, 40), (8, 9)])
def test_ids_rise_within_range(name: str, length: int, max_length: int) -> None:
    for _ in range(50):
        ids = SAMPLERS[name](length, max_length)
        assert ids.shape == (length,)
        assert ids.dtype == torch.int64
        assert (ids.diff() > 0).all()
        assert 0 <= int(ids[0]) <= int(ids[-1]) < max_length


def test_randomized_reaches_every_position() -> None:
    assert set(torch.cat([randomized(4, 12) for _ in range(200)]).tolist()) == set(range(12))


def test_pose_skips_once_after_a_first_part_and_reaches_every_distance() -> None:
    drawn = [pose(6, 20) for _ in range(2000)]
    first_parts, last = set(), set()
    for ids in drawn:
        skips = (ids.diff() > 1).nonzero().flatten().tolist()
        assert len(skips) <= 1
        first_parts.update(skip + 1 for skip in skips)
        last.add(int(ids[-1]))
        assert ids[0] == 0
    assert first_parts == {1, 2, 3}  # to (length + 1) // 2
    assert last == set(range(5, 20))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_row_is_never_read_as_packed_sequences(name: str) -> None:
    model = pe_swap.swap_positional(build("gpt2"), "rope")
    rows = token_ids(2, 13)
    batch = with_sampled_positions({"input_ids": rows}, PositionSampling(name=name, max_length=64))
    assert (batch["position_ids"].diff() > 1).any(dim=-1).all(), "every row has a skip under this seed"
    assert not torch.equal(batch["position_ids"][0], batch["position_ids"][1])
    changed = batch["input_ids"].clone()
    changed[:, 0] = (changed[:, 0] + 1) % 80 + 5
    with torch.no_grad():
        given = {key: batch[key] for key in ("position_ids", "attention_mask")}
        difference = model(batch["input_ids"], use_cache=False, **given).logits - model(changed, use_cache=False, **given).logits
        alone = {"position_ids": batch["position_ids"]}
        cut = model(batch["input_ids"], use_cache=False, **alone).logits - model(changed, use_cache=False, **alone).logits
    assert difference[:, -1].abs().amax(-1).min() > 1e-4  # the last token sees the first, across the skip
    assert not cut[:, -1].any()  # what transformers makes of the ids alone


@pytest.mark.parametrize(("name", "scheme"), list(zip(sorted(SAMPLERS), itertools.cycle(["rope", "sinusoidal"]), strict=False)))
def test_a_killed_run_resumes_to_the_same_numbers_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    train = config(tmp_path).train.model_dump() | {"positions": {"name": name, "max_length": 100}}
    changes: dict[str, Any] = {"train": train, "scheme": {"name": scheme}}
    whole = finetune(config(tmp_path, out=str(tmp_path / "whole"), **changes))
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path, **changes))
    resumed = finetune(config(tmp_path, resume=True, **changes))
    assert resumed["training"]["log"] == whole["training"]["log"]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    plain = finetune(config(tmp_path, out=str(tmp_path / "plain"), scheme={"name": scheme}))
    assert plain["training"]["log"] != whole["training"]["log"]


@pytest.mark.parametrize(
    ("scheme", "max_length", "text"),
    [
        ({"name": "t5"}, 100, r"train.positions is 'pose', but the model has 't5', which counts keys and reads no position ids"),
        *(
            ({"name": name}, 100, rf"the scheme '{name}' reads position ids and measures distances in slots")
            for name in ("fire", "xpos", "rerope", "self_extend")
        ),
        ({"name": "none", "qk_norm": True}, 100, r"the model has 'none', which counts keys"),
        ({"name": "rope"}, 15, r"train.positions.max_length is 15, below data.block_size 16"),
        ({"name": "learned", "max_length": 64}, 65, r"max_length is 65, but the model's positions end at 64. Use at most 64"),
    ],
)
def test_refusals(tmp_path: Path, scheme: dict[str, Any], max_length: int, text: str) -> None:
    train = config(tmp_path).train.model_dump() | {"positions": {"name": "pose", "max_length": max_length}}
    with pytest.raises(ConfigError, match=text):
        finetune(config(tmp_path, train=train, scheme=scheme))


def test_the_section_names_what_is_wrong(tmp_path: Path) -> None:
    from pe_swap.runs.command_line import parse
    from pe_swap.runs.config import FinetuneConfig

    given = ["--train.positions.name", "pose", "--train.positions.max_length", "4096"]
    assert parse(FinetuneConfig, given, description="").train.positions == PositionSampling(name="pose", max_length=4096)
    with pytest.raises(ConfigError, match=r"Unknown key 'train.positions.max_len'. Did you mean 'max_length'"):
        parse(FinetuneConfig, [*given, "--train.positions.max_len", "3"], description="")
    with pytest.raises(ConfigError, match=r"'train.positions.name' is 'random'"):
        parse(FinetuneConfig, ["--train.positions.name", "random", *given[2:]], description="")
