"""KERPLE's kernels against the paper, and what keeps them trainable."""

import pytest
import torch

from pe_swap.errors import OptionError
from tests.references import kerple as reference
from tests.support.schemes import build, geometry

DISTANCE = torch.arange(-30, 31)


def pairs(scheme: torch.nn.Module, q_len: int, kv_len: int, layer: int = 0) -> torch.Tensor:
    distance = (torch.arange(kv_len)[None] - torch.arange(q_len)[:, None]).flatten()
    return scheme.relative_bias(distance, layer=layer).view(-1, q_len, kv_len)


@pytest.mark.parametrize("variant", ["log", "power"])
@pytest.mark.parametrize("kernels", ["shared", "per_layer"])
def test_is_the_papers(variant: str, kernels: str) -> None:
    scheme = build("kerple", variant=variant, kernels=kernels, start="random")
    for layer in (0, 2):
        scale, power = scheme.kernel(layer)
        expected = reference.bias(variant, scale.double().tolist(), power.double().tolist(), 9, 40)
        torch.testing.assert_close(pairs(scheme, 9, 40, layer).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(pairs(scheme, 3, 9, 0), pairs(scheme, 3, 9, 2)) == (kernels == "shared")


def test_the_papers_start_fills_its_ranges() -> None:
    scheme = build("kerple", sizes=geometry(num_heads=1000), start="random")
    scale, power = scheme.kernel(0)
    assert 0 < scale.min() < 0.1 < 0.9 < scale.max() < 1
    assert 0 < power.min() < 0.2 < 1.8 < power.max() < 2


@pytest.mark.parametrize(("variant", "at_1024"), [("log", 0.01 * 6.240276), ("power", 0.01 * 32.0)])
def test_a_flat_start_is_nearly_flat(variant: str, at_1024: float) -> None:
    scheme = build("kerple", variant=variant, start="flat")
    bias = scheme.relative_bias(torch.tensor([0, -1, -1024]), layer=0)
    assert torch.equal(bias[:, 0], torch.zeros(12))
    torch.testing.assert_close(-bias[:, 2], torch.full((12,), at_1024), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", ["log", "power"])
def test_starts_in_the_middle_of_the_papers_ranges(variant: str) -> None:
    scale, power = build("kerple", variant=variant).kernel(1)
    torch.testing.assert_close(scale, torch.full((12,), 0.5))
    torch.testing.assert_close(power, torch.ones(12))


@pytest.mark.parametrize(("is_causal", "start"), [(True, "middle"), (False, "flat")])
def test_an_encoder_starts_flat_unless_told(is_causal: bool, start: str) -> None:
    scheme = build("kerple", sizes=geometry(is_causal=is_causal))
    assert scheme.options.start == start
    told = build("kerple", sizes=geometry(is_causal=is_causal), start=start)
    distance = torch.arange(-9, 1)
    assert torch.equal(scheme.relative_bias(distance, layer=0), told.relative_bias(distance, layer=0))


@pytest.mark.parametrize("variant", ["log", "power"])
def test_kernels_stay_in_their_ranges_and_gradients_finite_wherever_parameters_go(variant: str) -> None:
    for value in (-30.0, 0.0, 30.0):
        scheme = build("kerple", variant=variant)
        for parameter in scheme.parameters():
            torch.nn.init.constant_(parameter, value)
        scale, power = scheme.kernel(0)
        assert (scale > 0).all()
        assert (power > 0).all()
        assert variant == "log" or (power <= 2).all()
        bias = scheme.relative_bias(DISTANCE, layer=0)
        assert (bias <= 0).all()
        bias.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in scheme.parameters())


@pytest.mark.parametrize("variant", ["log", "power"])
def test_gradients_are_those_of_the_formula(variant: str) -> None:
    scheme = build("kerple", variant=variant, start="random").double()
    scheme.kernel = lambda layer: (scale, power)  # differentiated by a and p themselves
    scale, power = torch.rand(12, requires_grad=True), (2 * torch.rand(12)).requires_grad_()
    scheme.relative_bias(DISTANCE, layer=0).sum().backward()
    steps = DISTANCE.abs()[DISTANCE != 0].double()[None]
    a, p = scale.detach().double()[:, None], power.detach().double()[:, None]
    if variant == "log":
        by_scale, by_power = -p * steps / (1 + a * steps), -(1 + a * steps).log()
    else:
        by_scale, by_power = -(steps**p), -a * steps**p * steps.log()
    torch.testing.assert_close(scale.grad.double(), by_scale.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(power.grad.double(), by_power.sum(1), rtol=1e-4, atol=1e-4)


def test_parameters_are_of_the_layers_served() -> None:
    assert {name for name, _ in build("kerple").named_parameters()} == {"raw_scales.shared", "raw_powers.shared"}
    assert len(list(build("kerple", kernels="per_layer").parameters())) == 6


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"kerple: option 'variant' is 'logarithm'; it must be one of 'log', 'power'"):
        build("kerple", variant="logarithm")
    with pytest.raises(OptionError, match=r"'kernels' is 'each'"):
        build("kerple", kernels="each")
    with pytest.raises(OptionError, match=r"'start' is 0"):
        build("kerple", start=0)
