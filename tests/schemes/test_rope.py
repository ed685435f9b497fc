"""RoPE against the paper and the functions of GPT-NeoX, GPT-J and RoFormer."""

import pytest
import torch
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention

from pe_swap.errors import OptionError, UnsupportedModelError
from pe_swap.schemes.rotary import LARGE, rotation_by, turn
from pe_swap.schemes.sinusoids import inverse_frequencies
from pe_swap.training.planes import strongest_planes
from tests.references import rope as reference
from tests.support import models
from tests.support.schemes import at_positions, build, geometry

IDS = torch.tensor([[0, 1, 2, 9, 30], [4, 5, 6, 7, 8]])


def rotate(x: torch.Tensor, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return at_positions(build("rope", sizes=geometry(head_dim=x.shape[-1]), **options), x, ids, role="query", layer=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("base", "fraction"), [(10000, 1.0), (500.0, 0.5), (10000, 0.25)])
def test_is_the_papers(layout: str, base: float, fraction: float) -> None:
    x = torch.randn(2, 12, 5, 16)
    expected = reference.rotated_all(x, IDS, base, layout, int(16 * fraction))
    ours = rotate(x, IDS, base=base, layout=layout, fraction=fraction)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def test_hand_numbers() -> None:
    # head_dim 4, theta = 1, 0.01; position 1: (1, 0) in a plane becomes (cos theta, sin theta)
    x, one = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4), torch.tensor([[1]])
    c, s = 0.54030231, 0.84147098
    torch.testing.assert_close(rotate(x, one).flatten(), torch.tensor([c, 0, s, 0]))
    torch.testing.assert_close(rotate(x, one, layout="interleaved").flatten(), torch.tensor([c, s, 0, 0]))


def test_golden_frequencies() -> None:
    golden = torch.tensor([1, 0.7498942, 0.1, 0.01, 0.001, 1.333522e-4])
    torch.testing.assert_close(inverse_frequencies(64, 1e4)[[0, 1, 8, 16, 24, 31]].float(), golden, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_difference_alone(layout: str) -> None:
    x, y = torch.randn(1, 12, 6, 64), torch.randn(1, 12, 6, 64)
    ids = torch.arange(6)[None]
    near = rotate(x, ids, layout=layout) @ rotate(y, ids, layout=layout).transpose(-1, -2)
    far = rotate(x, ids + 1000, layout=layout) @ rotate(y, ids + 1000, layout=layout).transpose(-1, -2)
    torch.testing.assert_close(near, far, atol=5e-3, rtol=0)  # angles near 1,000 are 6e-5 apart in float32; norms are 8


def test_half_is_neoxs() -> None:
    x = torch.randn(2, 12, 5, 64)
    angles = IDS[..., None].float() * (1.0 / 10000 ** (torch.arange(0, 64, 2).float() / 64))
    emb = torch.cat((angles, angles), dim=-1)
    theirs, _ = neox.apply_rotary_pos_emb(x, x, emb.cos(), emb.sin())
    torch.testing.assert_close(rotate(x, IDS), theirs, atol=1e-5, rtol=0)


def test_interleaved_is_gptjs_and_roformers() -> None:
    x = torch.randn(2, 12, 5, 64)
    table = gptj.create_sinusoidal_positions(32, 64)[IDS]
    sin, cos = table.chunk(2, dim=-1)
    ours = rotate(x, IDS, layout="interleaved")
    theirs = gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    theirs, _ = RoFormerSelfAttention.apply_rotary_position_embeddings(table[:, None], x, x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_bf16_is_rounded_once_at_position_4095() -> None:
    x, ids = torch.randn(1, 12, 3, 64).bfloat16(), torch.tensor([[1995, 2001, 4095]])
    narrow = rotate(x, ids)
    assert torch.equal(narrow, rotate(x.float(), ids).bfloat16())
    exact = reference.rotated_all(x, ids, 10000, "half", 64)
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=4e-3)  # bf16 keeps 8 bits; angles 5e-4, |x| < 5


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_turned_the_same_with_and_without_a_gradient(layout: str, dtype: torch.dtype) -> None:
    query = torch.randn(2, 300, 4, 32, dtype=dtype).transpose(1, 2)
    before, rotation = query.clone(), rotation_by(torch.randn(2, 1, 300, 16), layout)
    assert query.numel() >= LARGE
    with torch.profiler.profile() as profile:
        found = turn(query, rotation, layout)
    assert "aten::roll" not in (names := {event.key for event in profile.key_averages()})
    assert ("aten::addcmul_" if layout == "half" else "aten::view_as_complex") in names
    assert torch.equal(found, turn(query.clone().requires_grad_(), rotation, layout))
    assert torch.equal(query, before)
    for row in range(300):  # too small to be worth it
        alone = tuple(part[:, :, row : row + 1] for part in rotation)
        assert torch.equal(found[:, :, row : row + 1], turn(query[:, :, row : row + 1], alone, layout))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_memory_that_lies_in_any_way_is_turned_the_same(layout: str) -> None:
    """A plane is read as one complex number only where its two dimensions lie side by side, at an even place."""
    x, rotation = torch.randn(2, 3, 5, 8), rotation_by(torch.randn(1, 1, 5, 4), layout)
    expected = turn(x, rotation, layout)
    odd_place = torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape)
    odd_width = torch.cat((x, torch.zeros(2, 3, 5, 1)), dim=-1)[..., :8]
    apart = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    for other in (odd_place, odd_width, apart):
        before = other.clone()
        assert torch.equal(turn(other, rotation, layout), expected)
        assert torch.equal(other, before)
    assert turn(x[:0], rotation, layout).shape == (0, 3, 5, 8)


def test_strided_views_and_unturned_dimensions() -> None:
    x = torch.randn(2, 5, 12, 64).transpose(1, 2)
    assert torch.equal(rotate(x, IDS), rotate(x.contiguous(), IDS))
    assert torch.equal(rotate(x, IDS, fraction=0.25)[..., 16:], x[..., 16:])


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"head_dim 15 x fraction 1.0 gives 15 rotary dimensions; they must be an even integer"):
        build("rope", sizes=geometry(head_dim=15))
    with pytest.raises(OptionError, match=r"head_dim 64 x fraction 0.1 gives 6.4"):
        build("rope", fraction=0.1)
    with pytest.raises(OptionError, match=r"rope: unknown option 'theta'"):
        build("rope", theta=3)
    with pytest.raises(OptionError, match=r"'base' is -1; it must be a number above 1"):
        build("rope", base=-1)
    with pytest.raises(OptionError, match=r"'fraction' is 1.5"):
        build("rope", fraction=1.5)


# --- Some planes alone ---


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("planes", "share", "kept"),
    [
        ("high", 0.25, [0, 1]),
        ("low", 0.5, [4, 5, 6, 7]),
        ("uniform", 0.5, [0, 2, 4, 6]),
        ((3, 1), None, [1, 3]),
        ("high", 0.01, [0]),
    ],
)
def test_some_planes_turn_and_the_others_stay(planes: object, share: float | None, kept: list[int], layout: str) -> None:
    x = torch.randn(2, 12, 5, 16)
    whole = rotate(x, IDS, layout=layout)
    found = rotate(x, IDS, layout=layout, planes=planes, planes_share=share)
    dimensions = [[k, k + 8] if layout == "half" else [2 * k, 2 * k + 1] for k in range(8)]
    for plane, both in enumerate(dimensions):
        assert torch.equal(found[..., both], whole[..., both] if plane in kept else x[..., both])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planes": "fast", "planes_share": 0.5}, "one of"),
        ({"planes": "high"}, "planes_share"),
        ({"planes": (0, 1), "planes_share": 0.5}, "planes_share"),
        ({"planes": (0, 0)}, "different indices"),
        ({"planes": ()}, "different indices"),
        ({"planes": (0, 8)}, "indices below 8"),
    ],
    ids=str,
)
def test_planes_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rotate(torch.randn(1, 12, 5, 16), IDS[:1], **options)


def test_the_strongest_planes_are_those_of_the_longest_queries_and_keys() -> None:
    model = models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            query, key = (part.weight.unflatten(0, (-1, 2, 4)) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj))
            query[:, :, 1] *= 30  # of 4 planes in every head, plane 1 has the longest queries
            query[:, :, 2] *= 10  # and plane 2 the longest products of queries and keys
            key[:, :, 2] *= 10
    before = models.logits(model, models.token_ids(1, 9))
    assert strongest_planes(model, models.token_ids(2, 20), 0.5) == (1, 2)
    assert strongest_planes(model, models.token_ids(2, 20), 0.25) == (2,)
    assert torch.equal(models.logits(model, models.token_ids(1, 9)), before)
    for other in (models.build("gpt2"), models.swapped("llama", "alibi"), models.swapped("llama", "rope")):
        with pytest.raises(UnsupportedModelError, match="has no planes to choose from"):
            strongest_planes(other, models.token_ids(2, 20), 0.5)
