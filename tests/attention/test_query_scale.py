"""Queries scaled by how many keys they see: on any scheme, under caches and padding, and nothing up to the trained length."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import pe_swap
from pe_swap.errors import OptionError, UnsupportedBackendError
from pe_swap.schemes import SCHEMES, build_options
from tests.references import length_scale as reference
from tests.support.models import MATRIX_FAMILIES, build, disturb, logits, token_ids, with_cache
from tests.support.schemes import build as build_scheme

SCALED = [
    ("none", {"temperature": "log", "temperature_coefficient": 0.7}),
    ("none", {"logit_scale": "log_n"}),
    ("rope", {"logit_scale": "log_n"}),
    ("t5", {"logit_scale": "log_n"}),
    ("shaw", {"logit_scale": "log_n"}),
    ("deberta", {"logit_scale": "log_n", "scale": "paper"}),
]
every_scaled = pytest.mark.parametrize(("name", "options"), SCALED)
pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")


def swapped(family: str, name: str, options: dict[str, object], backend: str = "sdpa") -> PreTrainedModel:
    """A model trained at 8 positions, so that 20 are beyond it."""
    length = {"max_position_embeddings": 8}
    model = pe_swap.swap_positional(build(family, backend, **length), name, **options)
    disturb(model)
    return model


@pytest.mark.parametrize("name", SCHEMES.names())
def test_every_scheme_takes_it_and_checks_it(name: str) -> None:
    options = SCHEMES[name].Options
    assert build_options(options, {"logit_scale": "log_n"}).to_dict()["logit_scale"] == "log_n"
    assert "logit_scale" not in build_options(options, {}).to_dict()
    with pytest.raises(OptionError, match=rf"{name}: option 'logit_scale' is 'log_m'; it must be one of None, 'log_n'"):
        options(logit_scale="log_m")


def test_factor_is_the_sources() -> None:
    seen = [1, 2, 31, 32, 33, 1024, 100_000]
    ours = build_scheme("alibi", logit_scale="log_n").query_scale(torch.tensor([seen]), layer=0)
    torch.testing.assert_close(ours, torch.tensor([[reference.log_n(n, 32) for n in seen]]))


@every_scaled
@pytest.mark.parametrize("family", MATRIX_FAMILIES)
def test_it_changes_nothing_up_to_the_trained_length_and_something_beyond(
    name: str, options: dict[str, object], family: str
) -> None:
    plain = {key: value for key, value in options.items() if key in ("scale", "qk_norm")}
    ours, other = swapped(family, name, options), swapped(family, name, plain)
    short, long = token_ids(2, 8), token_ids(2, 20)
    torch.testing.assert_close(logits(ours, short), logits(other, short), atol=1e-6, rtol=1e-6)
    assert (logits(ours, long) - logits(other, long)).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_only_queries_that_see_more_than_in_training_are_scaled(backend: str) -> None:
    """A decoder's logits up to the trained length cannot tell what comes after."""
    ids = token_ids(1, 12)
    ours = swapped("gpt2", "none", {"logit_scale": "log_n"}, backend)
    plain = swapped("gpt2", "none", {}, backend)
    difference = (logits(ours, ids) - logits(plain, ids)).abs().amax(dim=(0, 2))
    assert difference[:8].max() < 1e-5
    assert difference[8:].min() > 1e-4


@every_scaled
@pytest.mark.parametrize("family", MATRIX_FAMILIES)
def test_eager_equals_sdpa_and_padded_equals_unpadded(name: str, options: dict[str, object], family: str) -> None:
    rows = [token_ids(1, 20, seed=5), token_ids(1, 13, seed=6)]
    for side in ("left", "right"):
        found = []
        for backend in ("eager", "sdpa"):
            model = swapped(family, name, options, backend)
            padded, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
            for index, row in enumerate(rows):
                where = slice(20 - row.shape[1], 20) if side == "left" else slice(0, row.shape[1])
                padded[index, where], mask[index, where] = row[0], 1
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
            together = logits(model, padded, attention_mask=mask, position_ids=position_ids)
            found.append(together[mask.bool()])
            for index, row in enumerate(rows):
                alone = logits(model, row)[0]
                torch.testing.assert_close(together[index][mask[index].bool()], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


@every_scaled
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cached_in_chunks_equals_uncached(name: str, options: dict[str, object], backend: str) -> None:
    model, ids = swapped("gpt2", name, options, backend), token_ids(2, 24)
    whole = logits(model, ids, use_cache=False)
    for past in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=29)):
        parts, start = [], 0
        for length in (11, 6, 1, 1, 5):
            with torch.no_grad():
                parts.append(model(ids[:, start : start + length], **with_cache(model, past)).logits)
            start += length
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


def test_it_comes_back_from_a_folder(tmp_path: object) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = swapped("gpt2", "rope", {"logit_scale": "log_n"}), token_ids(1, 20)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_backends_without_a_mask_to_count_on_refuse() -> None:
    model = build("gpt2")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        UnsupportedBackendError, match=r"'flex_attention', but the scheme scales each query by the number of its keys"
    ):
        pe_swap.swap_positional(model, "rope", logit_scale="log_n")
