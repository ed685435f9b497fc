"""Positions of two dimensions: every scheme of a grid in every family of images, and what their sources say of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, PreTrainedModel
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.pixtral import modeling_pixtral
from transformers.models.pixtral.modeling_pixtral import PixtralVisionConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

import pe_swap
from pe_swap.errors import OptionError, UnsupportedModelError
from pe_swap.families import FAMILIES, base_model_of
from pe_swap.families.native import PatchLayout
from pe_swap.families.native.grid import METHOD
from pe_swap.patching.install import holders_of
from pe_swap.patching.layer_cache import parameters_of
from pe_swap.schemes import SCHEMES, Geometry, Native, Scheme, build_options
from pe_swap.schemes.per_axis import built, resolved
from pe_swap.schemes.positions import Positions, slots_from
from tests.support.families import ROUNDING, auto_class, config_of, difference, images, noise_of, options_on_a_grid, tiny
from tests.support.models import disturb

FAMILY_NAMES = [name for name in FAMILIES.names() if FAMILIES[name].takes_images]
GRIDS = [name for name in FAMILY_NAMES if FAMILIES[name].stacks_of(config_of(name))[0].native.kind == "grid"]
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder"),
    pytest.mark.skipif(
        not FAMILY_NAMES, reason="this transformers is older than the families of images, whose files it has otherwise"
    ),
]


def states(model: PreTrainedModel, pixels: Tensor, **kwargs: Any) -> Tensor:
    """Return the states of all tokens of images, `[batch, tokens, hidden_size]`."""
    if "noise" in parameters_of(base_model_of(model)):
        kwargs["noise"] = noise_of(pixels)
    with torch.no_grad():
        found: Tensor = base_model_of(model)(pixel_values=pixels, **kwargs).last_hidden_state
    return found


def layer_states(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, ...]:
    """Return the states before every layer, and after the last."""
    with torch.no_grad():
        found: tuple[Tensor, ...] = base_model_of(model)(pixels, output_hidden_states=True).hidden_states
    return found


def on_a_grid(name: str, sides: tuple[int, int], head_dim: int = 8, **options: Any) -> Scheme:
    """Return a scheme of one layer and 2 heads, trained with a grid, its parameters at random."""
    torch.manual_seed(0)
    geometry = Geometry(2 * head_dim, 2, head_dim, 1, False, sides[0] * sides[1], sides=sides)
    given = build_options(SCHEMES[name].Options, options)
    scheme = built(SCHEMES[name], resolved(given, SCHEMES[name].on_a_grid, geometry, Native()), geometry, (0,))
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.normal_()
    return scheme


# --- what every scheme keeps in every family -----------------------------------------------------------------------------------


MORE: list[tuple[str, dict[str, Any]]] = [
    ("alibi", {"trainable": True}),
    ("learned", {"extend": "bicubic_antialiased"}),
    ("none", {"qk_norm": True}),
    ("rope", {"coordinates": "centered", "logit_scale": "log_n"}),
    ("rope", {"frequencies": "alternating", "fraction": 0.5, "rope_type": "linear", "factor": 2.0}),
    ("rope", {"frequencies": "mixed", "fraction": 0.5, "layout": "half"}),
    ("shaw", {"variant": "key_query", "value": True}),
    ("t5", {"table": "joint"}),
]
"""Further forms, in one family."""


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_scheme_of_a_grid_keeps_its_claims(family: str) -> None:
    model, pixels, other = tiny(family), images(2), images(2, height=36, width=29)
    before = states(model, pixels)
    forms = [(name, options_on_a_grid(family, name)) for name in pe_swap.list_schemes(axes=2)]
    for scheme, options in forms + (MORE if family == "vit" else []):
        pe_swap.swap_positional(model, scheme, **options)
        disturb(model)
        expected, larger = states(model, pixels), states(model, other)
        patches = holders_of(model)[0].patches
        assert larger.shape[1] == patches.prefix + int(9 * 7 * (patches.kept or 1)), scheme
        if scheme != FAMILIES[family].stacks_of(model.config)[-1].native.own_scheme:
            assert difference(expected, before) > 1e-3, scheme
        assert torch.equal(states(copy.deepcopy(model), pixels), expected), scheme
        assert difference(states(model, other[1:])[0], larger[1]) <= ROUNDING, scheme
        model.config._attn_implementation = "eager"
        assert difference(states(model, pixels), expected) <= ROUNDING, scheme
        assert difference(states(model, other), larger) <= ROUNDING, scheme
        model.config._attn_implementation = "sdpa"
    pe_swap.restore_positional(model)
    assert torch.equal(states(model, pixels), before)


@pytest.mark.parametrize("family", GRIDS)
def test_learned_is_the_family_s_own_table_at_every_size(family: str) -> None:
    model = tiny(family)
    given = {METHOD: True} if METHOD in parameters_of(base_model_of(model)) else {}
    sizes = ((24, 24), (32, 32), (16, 20), (36, 29))
    expected = [states(model, images(2, *size), **given) for size in sizes]
    names = list(model.state_dict())
    pe_swap.swap_positional(model, "learned")
    for size, own in zip(sizes, expected, strict=True):
        assert torch.equal(states(model, images(2, *size)), own), size
    assert holders_of(model)[0].scheme_at(0).keeps_function
    pe_swap.restore_positional(model)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "biased", [("use_relative_position_bias",), ("use_shared_relative_position_bias",), ("both",)], ids="".join
)
def test_t5_is_beit_s_own_bias_at_every_size(biased: tuple[str], tmp_path: Path) -> None:
    """Its tables are of pairs of row and column distances; BEiT resamples them for another grid, and so does the scheme."""
    names = ("use_relative_position_bias", "use_shared_relative_position_bias")
    model = tiny("beit", **{name: biased[0] in (name, "both") for name in names})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_()
    sizes = ((24, 24), (32, 32), (16, 20), (36, 29))
    expected = [states(model, images(2, *size)) for size in sizes]
    assert difference(states(pe_swap.swap_positional(model, "t5", table="per_axis"), images(2)), expected[0]) > 1e-3
    pe_swap.swap_positional(model, "t5")
    for size, own in zip(sizes, expected, strict=True):
        assert difference(states(model, images(2, *size)), own) <= ROUNDING, size
    assert holders_of(model)[0].scheme_at(0).keeps_function
    assert model.config.pe_swap["schemes"][0]["options"] == {"start": "model", "table": "joint"}
    disturb(model)
    before = states(model, images(2))
    model.save_pretrained(tmp_path)
    assert torch.equal(states(auto_class("beit").from_pretrained(tmp_path).eval(), images(2)), before)
    pe_swap.restore_positional(model)
    assert torch.equal(states(model, images(2)), expected[0])


def test_t5_is_beit_s_own_bias_where_the_trained_grid_is_no_square() -> None:
    model = tiny("beit", image_size=[24, 32])
    with torch.no_grad():
        model.beit.layers[0].relative_position_bias.relative_position_bias_table.normal_()
    expected = states(model, images(2, 24, 32))
    assert difference(states(pe_swap.swap_positional(model, "t5"), images(2, 24, 32)), expected) <= ROUNDING


def test_sizes_of_two_numbers() -> None:
    """Images and patches that are no squares, which ViT itself takes at its trained size alone."""
    model = tiny("vit", image_size=[24, 32], patch_size=[4, 8])
    expected = states(model, images(2, 24, 32))
    pe_swap.swap_positional(model, "learned")
    assert torch.equal(states(model, images(2, 24, 32)), expected)
    assert states(model, images(2, 36, 40)).shape[1] == 1 + 9 * 5
    assert model.config.pe_swap["trained_length"] == 1 + 6 * 4


@pytest.mark.parametrize("family", ["vit", "siglip_vision_model"])
def test_attention_probabilities_are_returned(family: str) -> None:
    model = tiny(family, attn_implementation="eager")
    with torch.no_grad():
        own, found = (
            swap(model)(images(1), output_attentions=True).attentions
            for swap in (lambda model: model, lambda model: pe_swap.swap_positional(model, "alibi"))
        )
    assert len(found) == 3
    for before, after in zip(own, found, strict=True):
        assert after.shape == before.shape
        torch.testing.assert_close(after.sum(-1), torch.ones(after.shape[:-1]))
        assert difference(after, before) > 1e-3


@pytest.mark.parametrize("scheme", ["rope", "t5", "shaw"])
def test_patches_that_change_places_keep_their_positions(scheme: str) -> None:
    """ViTMAE puts the patches that stay in the order of a noise: the states are those of the patches, in that order."""
    model, pixels = pe_swap.swap_positional(tiny("vit_mae", mask_ratio=0.0), scheme), images(2)
    disturb(model)
    in_order, noise = torch.arange(36.0).expand(2, -1), noise_of(pixels)
    with torch.no_grad():
        expected, found = (model(pixels, noise=given).last_hidden_state for given in (in_order, noise))
    for row, order in enumerate(noise.argsort(1)):
        assert difference(found[row, 1:], expected[row, 1 + order]) <= ROUNDING
    assert difference(found, expected) > 1e-3


def test_patches_that_go_at_random_are_those_of_the_unswapped_model() -> None:
    model, found = tiny("vit_mae"), []
    for swap in (lambda model: model, lambda model: pe_swap.swap_positional(model, "learned")):
        torch.manual_seed(5)
        with torch.no_grad():
            found.append(swap(model)(images(2)).last_hidden_state)
    assert torch.equal(*found)


def test_layers_that_are_not_named_keep_their_own_positions_or_none() -> None:
    pixels = images(2)
    for family in ("dinov3_vit", "beit"):
        own = layer_states(tiny(family), pixels)
        found = layer_states(pe_swap.swap_positional(tiny(family), "alibi", layers=[2]), pixels)
        assert all(torch.equal(a, b) for a, b in zip(found[:3], own[:3], strict=True)), family
        assert difference(found[3], own[3]) > 1e-3
    model = pe_swap.swap_positional(tiny("dinov3_vit"), "rope", base=50.0, layers=[1])  # turned by the family, with another base
    config = config_of("dinov3_vit", rope_theta=50.0)
    other = tiny("dinov3_vit")
    other.rope_embeddings = type(other.rope_embeddings)(config).eval()  # in training it stretches coordinates at random
    own, found = layer_states(tiny("dinov3_vit"), pixels), layer_states(model, pixels)
    rotation = other.rope_embeddings(pixels)
    assert torch.equal(found[1], own[1])
    assert torch.equal(found[2], other.model.layer[1](own[1], position_embeddings=rotation))


@pytest.mark.parametrize(("scheme", "options"), [("t5", {}), ("shaw", {}), ("learned", {}), ("rope", {"frequencies": "mixed"})])
def test_gradients_are_those_of_eager_attention_and_reach_every_parameter(scheme: str, options: dict[str, Any]) -> None:
    model = pe_swap.swap_positional(tiny("vit"), scheme, **options)
    disturb(model)
    found = []
    for implementation in ("sdpa", "eager"):
        model.config._attn_implementation = implementation
        model.zero_grad()
        model.vit(images(2)).last_hidden_state.pow(3).sum().backward()  # of all tokens: the class token has no bias
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if ".schemes." in name})
    assert found[0]
    for name, gradient in found[0].items():
        assert gradient.any(), name
        assert difference(gradient, found[1][name]) <= 1e-4, name


def test_the_check_holds_what_it_says() -> None:
    assert pe_swap.check_positional(pe_swap.swap_positional(tiny("vit_mae"), "rope")).passed
    model = tiny("dinov2_with_registers")
    for scheme in ("rope", "t5", "shaw", "learned", "sinusoidal", "none"):
        report = pe_swap.check_positional(pe_swap.swap_positional(model, scheme))
        assert report.passed, report
    text = str(report)
    assert "own scheme = unswapped  0.0e+00" in text
    assert "9 x 7 patches, trained with 6 x 6" in text


def test_keep_mean_adds_the_mean_of_the_patches_rows_to_patches_alone() -> None:
    model = tiny("deit")
    table = model.deit.embeddings.position_embeddings.detach()
    constant = torch.cat((table[:, :2], table[:, 2:].mean(1, keepdim=True).expand(-1, 36, -1)), dim=1)
    reference = tiny("deit")
    reference.deit.embeddings.position_embeddings.data = constant
    pe_swap.swap_positional(model, "none", keep_mean=True)
    assert difference(states(model, images(2)), states(reference, images(2))) <= ROUNDING


def test_a_loaded_model_is_swapped_again_and_refuses_what_needs_its_table(tmp_path: Path) -> None:
    for family in ("dinov2", "clip_vision_model"):
        model = pe_swap.swap_positional(tiny(family), "rope")
        model.save_pretrained(tmp_path / family)
        loaded = auto_class(family).from_pretrained(tmp_path / family).eval()
        for scheme in ("t5", "rope"):
            pe_swap.swap_positional(loaded, scheme)
        assert torch.equal(states(loaded, images(2)), states(model, images(2)))
        with pytest.raises(pe_swap.errors.SwapStateError, match="was loaded already swapped"):
            pe_swap.restore_positional(loaded)
        with pytest.raises(pe_swap.errors.SwapStateError, match="was loaded already swapped"):
            pe_swap.swap_positional(loaded, "learned")


# --- the mathematics -----------------------------------------------------------------------------------------------------------


def turned(scheme: Scheme, x: Tensor, prefix: int, sides: tuple[int, int]) -> Tensor:
    """Return vectors turned by the rows and columns of their tokens."""
    prepared = scheme.prepare_grid(PatchLayout(prefix, (1, 1), sides).position_ids(sides, CPU), sides)
    return scheme.transform_query_key(x, prepared, role="query", layer=0)


def test_the_axial_rotation_by_default_is_rope_vit_s() -> None:
    """Planes are neighbouring dimensions read as complex numbers, half of them for each axis, with a base of 100 (arXiv:2403.13298)."""
    sides, prefix = (5, 7), 1
    x = torch.randn(1, 2, prefix + 35, 16)
    inv_freq = 100.0 ** (-torch.arange(0, 16, 4, dtype=torch.float64) / 16)
    row, column = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    angles = torch.cat([side.double().flatten()[:, None] * inv_freq for side in (row, column)], dim=-1)
    as_complex = torch.view_as_complex(x[:, :, prefix:].double().unflatten(-1, (8, 2)))
    expected = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    found = turned(on_a_grid("rope", sides, head_dim=16), x, prefix, sides)
    torch.testing.assert_close(found[:, :, prefix:].double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(found[:, :, :prefix], x[:, :, :prefix])


def test_the_axial_rotation_is_qwen2_vl_s() -> None:
    sides = (5, 7)
    scheme = on_a_grid("rope", sides, head_dim=16, base=10000.0, layout="half")
    x = torch.randn(1, 2, 35, 16)
    config = Qwen2VLVisionConfig(embed_dim=32, num_heads=2)
    config.num_attention_heads = 2
    rotation = modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding(config)
    cosine, sine = rotation(x, PatchLayout(0, (1, 1), sides).position_ids(sides, CPU)[0])
    expected, _ = modeling_qwen2_vl.apply_rotary_pos_emb_vision(x[0].transpose(0, 1), x[0].transpose(0, 1), cosine, sine)
    torch.testing.assert_close(turned(scheme, x, 0, sides)[0].transpose(0, 1), expected)


def test_the_rotation_by_alternating_frequencies_is_pixtral_s() -> None:
    sides = (5, 7)
    scheme = on_a_grid("rope", sides, head_dim=16, base=10000.0, frequencies="alternating")
    x = torch.randn(1, 2, 35, 16)
    rotation = modeling_pixtral.PixtralVisionRotaryEmbedding(PixtralVisionConfig(hidden_size=32, num_attention_heads=2))
    cosine, sine = rotation(x, PatchLayout(0, (1, 1), sides).position_ids(sides, CPU)[0])
    expected, _ = modeling_pixtral.apply_rotary_pos_emb(x, x, cosine, sine, unsqueeze_dim=0)
    found = turned(scheme, x, 0, sides)
    torch.testing.assert_close(found, expected)
    axial = turned(on_a_grid("rope", sides, head_dim=16, base=10000.0, layout="half"), x, 0, sides)
    assert difference(found, axial) > 0.1, "columns turn by other frequencies"


def test_the_rotation_by_centered_coordinates_is_dinov3_s() -> None:
    sides, prefix = (5, 7), 4
    scheme = on_a_grid("rope", (6, 6), head_dim=16, coordinates="centered", layout="half")
    x = torch.randn(2, 2, prefix + 35, 16)
    config = DINOv3ViTConfig(hidden_size=32, num_attention_heads=2, patch_size=4)
    cosine, sine = modeling_dinov3_vit.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(2, 3, 20, 28))
    expected, _ = modeling_dinov3_vit.apply_rotary_pos_emb(x, x, cosine, sine)
    torch.testing.assert_close(turned(scheme, x, prefix, sides), expected)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_mixed_frequencies_start_as_the_axial_rotation_and_turn_by_both_axes(layout: str) -> None:
    """RoPE-Mixed (arXiv:2403.13298): the angle of plane p in head h is `row * f[0, h, p] + column * f[1, h, p]`."""
    sides, prefix = (3, 4), 1
    x = torch.randn(1, 2, prefix + 12, 8)
    axial = turned(on_a_grid("rope", sides, layout=layout), x, prefix, sides)
    scheme = on_a_grid("rope", sides, layout=layout, frequencies="mixed")
    scheme.reset_parameters()
    torch.testing.assert_close(turned(scheme, x, prefix, sides), axial)
    frequencies = torch.randn(2, 2, 4)
    with torch.no_grad():
        scheme.mixed_frequencies["0"].copy_(frequencies)
    found = turned(scheme, x, prefix, sides)
    assert torch.equal(found[:, :, :prefix], x[:, :, :prefix])
    planes = (lambda y: y.unflatten(-1, (4, 2))) if layout == "interleaved" else (lambda y: y.unflatten(-1, (2, 4)).mT)
    numbers = torch.view_as_complex(planes(x)[:, :, prefix:].contiguous())
    rows, columns = torch.arange(12) // 4, torch.arange(12) % 4
    angles = rows[None, :, None] * frequencies[0][:, None] + columns[None, :, None] * frequencies[1][:, None]
    expected = numbers * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(torch.view_as_complex(planes(found)[:, :, prefix:].contiguous()), expected)


def test_interleaved_axes_have_a_half_of_the_head_each() -> None:
    """RoPE-Axial (arXiv:2403.13298): each half of a head is turned as by a rope of one dimension."""
    sides = (3, 4)
    x = torch.randn(1, 2, 12, 16)
    found = turned(on_a_grid("rope", sides, head_dim=16, layout="interleaved"), x, 0, sides)
    one = SCHEMES["rope"](
        build_options(SCHEMES["rope"].Options, {"base": 100.0, "layout": "interleaved"}).resolve(
            geometry := Geometry(16, 2, 8, 1, False, 12), Native()
        ),
        geometry,
        (0,),
    )
    for axis, places in enumerate((torch.arange(12) // 4, torch.arange(12) % 4)):
        half = slice(8 * axis, 8 * axis + 8)
        expected = one.transform_query_key(x[..., half], one.prepare_positions(places[None]), role="key", layer=0)
        torch.testing.assert_close(found[..., half], expected)


def test_the_sinusoids_are_mae_s() -> None:
    scheme = on_a_grid("sinusoidal", (6, 6), scale=1.0, layout="split")
    torch.testing.assert_close(scheme.encode_grid((5, 7), CPU)[0], build_2d_sinusoidal_position_embedding(5, 7, 16))


@pytest.mark.parametrize("name", [name for name in pe_swap.list_schemes(axes=2) if SCHEMES[name].on_a_grid == "summed"])
def test_a_bias_is_the_sum_over_axes_and_is_none_for_what_stands_nowhere(name: str) -> None:
    sides, prefix = (3, 5), 2
    scheme = on_a_grid(name, (6, 6))
    ids = PatchLayout(prefix, (1, 1), sides).position_ids(sides, CPU)
    query, key, slots = torch.randn(1, 2, 17, 8), torch.randn(1, 2, 17, 8), slots_from(0, 17, CPU)
    whole = Positions(slots, slots, ids, ids, sides=sides)
    bias = scheme.score_bias(query, key, whole, scaling=0.5, layer=0)
    assert not bias[:, :, :prefix].any()
    assert not bias[..., :prefix].any()
    rows, columns = ids[0, prefix:].T
    expected = torch.zeros(2, 15, 15)
    for part, places in zip(scheme.of_axes(), (rows, columns), strict=True):
        if "relative_bias" in part.hooks:
            distance = (places[None, :] - places[:, None]).flatten()
            expected += part.relative_bias(distance, layer=0).view(2, 15, 15)
        else:
            along = Positions(places, places, places[None], places[None])
            expected += part.score_bias(query[:, :, prefix:], key[:, :, prefix:], along, scaling=0.5, layer=0)[0]
    torch.testing.assert_close(bias[0, :, prefix:, prefix:], expected)
    assert bias[:, :, prefix:, prefix:].any()
    block = scheme.score_bias(query[:, :, 4:9], key, whole.block(4, 9), scaling=0.5, layer=0)
    torch.testing.assert_close(block, bias[:, :, 4:9])


@pytest.mark.parametrize("scheme", ["alibi", "kerple", "sandwich", "t5", "shaw", "rope"])
def test_a_bias_of_the_absolute_distance_cannot_tell_an_image_from_its_mirror(scheme: str) -> None:
    model = pe_swap.swap_positional(tiny("vit"), scheme)
    disturb(model)
    image = images(1, height=6, width=6).repeat_interleave(4, -1).repeat_interleave(4, -2)  # patches that are their own mirrors
    change = difference(states(model, image.flip(-1))[:, 0], states(model, image)[:, 0])
    if SCHEMES[scheme].tells_direction:
        assert change > 1e-4
    else:
        assert change <= ROUNDING


# --- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "options", "error", "text"),
    [
        ("xpos", {}, UnsupportedModelError, "The scheme 'xpos' is defined along one axis"),
        ("deberta", {}, UnsupportedModelError, r"Choose one of list_schemes\(axes=2\): fire, hope, learned"),
        ("rope", {"rope_type": "yarn", "factor": 2.0}, OptionError, "rope_type 'yarn' depends on the length of a row of tokens"),
        ("rope", {"fraction": 0.25}, OptionError, "gives 2 rotary dimensions; they must be a multiple of 4"),
        ("rope", {"sliding_window": 4}, OptionError, "'sliding_window' is 4, but a window counts the tokens of a row"),
        ("rope", {"trained_length": 99}, OptionError, "trained_length is 99, but the positions of this ViT"),
        ("rope", {"axes": 2}, OptionError, "axes is 2"),
        ("t5", {"table": "joint", "num_buckets": 32}, OptionError, "'num_buckets' is 32; it must be None beside table='joint'"),
        (
            "t5",
            {"table": "joint", "start": "model"},
            OptionError,
            "'start' is 'model'; it must be 'zero', as this model has no bias of",
        ),
        ("learned", {"max_length": 40}, OptionError, "'max_length' is 40, but this model's positions are a grid"),
        ("learned", {"extend": "tile"}, OptionError, "'extend' is 'tile'; it must be 'interpolate', 'bicubic'"),
    ],
)
def test_what_a_model_of_images_does_not_take(scheme: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = tiny("vit")
    before, config = states(model, images(1)), model.config.to_dict()
    with pytest.raises(error, match=text):
        pe_swap.swap_positional(model, scheme, **options)
    assert torch.equal(states(model, images(1)), before)
    assert model.config.to_dict() == config
    assert isinstance(model.vit.embeddings.position_embeddings, nn.Parameter)


@pytest.mark.parametrize(
    ("scheme", "options", "text"),
    [
        ("rope", {"axes": 2}, "axes is 2, but the positions of this BertForMaskedLM have 1"),
        ("rope", {"frequencies": "mixed"}, "'frequencies' is 'mixed', and this model's tokens stand in one row"),
        ("rope", {"coordinates": "centered"}, "'coordinates' is 'centered', and this model's tokens stand in one row"),
        ("t5", {"table": "joint"}, "'table' is 'joint', and this model's tokens stand in one row"),
    ],
)
def test_what_a_model_of_texts_does_not_take(scheme: str, options: dict[str, Any], text: str) -> None:
    model = tiny("bert")
    with pytest.raises(OptionError, match=text):
        pe_swap.swap_positional(model, scheme, **options)
    assert not hasattr(model.config, "pe_swap")


def test_schemes_are_listed_by_axes() -> None:
    assert set(pe_swap.list_schemes(axes=2)) < set(pe_swap.list_schemes(axes=1)) == set(pe_swap.list_schemes())
    with pytest.raises(OptionError, match=r"axes is 3; it must be 1 \(texts\) or 2 \(images\)"):
        pe_swap.list_schemes(axes=3)


def test_a_grid_that_is_not_that_of_the_tokens_is_refused() -> None:
    model = tiny("vit")
    model.config.image_size = 32
    with pytest.raises(pe_swap.errors.FamilyError, match=r"has positions for 36 patches, and .* say 8 x 8"):
        pe_swap.swap_positional(model, "rope")
    model = pe_swap.swap_positional(tiny("vit"), "rope")
    with pytest.raises(UnsupportedModelError, match="was called without the rows and columns of its patches"):
        model.vit.layers[0](torch.zeros(1, 37, 96), None)
    handle = model.vit.embeddings.register_forward_hook(lambda module, args, output: output[:, :20])  # tokens are dropped
    with pytest.raises(UnsupportedModelError, match="was called with 20 tokens, but the image has 37"):
        model(images(1))
    handle.remove()
    model = pe_swap.swap_positional(tiny("beit"), "rope")
    with pytest.raises(UnsupportedModelError, match="attention_mask is given"):
        model.beit(images(1), attention_mask=torch.ones(1, 37))
    with pytest.raises(OptionError, match="'scale' is 'match', but there is no table to match"):
        pe_swap.swap_positional(tiny("dinov3_vit"), "sinusoidal")


def test_vectors_reach_the_patches_of_a_model_that_adds_none_of_its_own() -> None:
    model, pixels = tiny("dinov3_vit"), images(2, height=36, width=28)
    tokens = model.embeddings(pixels)
    pe_swap.swap_positional(model, "sinusoidal", scale=0.5)
    vectors = holders_of(model)[0].scheme_at(0).encode_grid((9, 7), CPU)
    expected = torch.cat((tokens[:, :4], tokens[:, 4:] + vectors), dim=1)  # class and registers first
    assert torch.equal(model.embeddings(pixels), expected)
    pe_swap.restore_positional(model)
    assert torch.equal(model.embeddings(pixels), tokens)
    assert not model.embeddings._forward_hooks
