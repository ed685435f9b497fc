"""ALiBi against the paper, the authors' numbers, and transformers' BLOOM and MPT."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.alibi import geometric_slopes, press_slopes
from tests.references import alibi as reference
from tests.support.schemes import build, geometry

# 12 heads: the 8 slopes 2^-1 .. 2^-8, then 2^-(1/2), 2^-(3/2), 2^-(5/2), 2^-(7/2) of 16 heads.
TWELVE = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.70710678, 0.35355339, 0.1767767, 0.08838835]


def test_slopes_of_12_heads() -> None:
    torch.testing.assert_close(torch.tensor(press_slopes(12)), torch.tensor(TWELVE))


def test_last_slopes_of_20_and_25_heads() -> None:
    tail = [0.84089642, 0.59460356, 0.42044821, 0.29730178, 0.2102241, 0.14865089, 0.10511205, 0.07432544, 0.05255603]
    torch.testing.assert_close(torch.tensor(press_slopes(20)[16:]), torch.tensor(tail[:4]))
    torch.testing.assert_close(torch.tensor(press_slopes(25)[16:]), torch.tensor(tail))


@pytest.mark.parametrize("num_heads", [1, 4, 6, 8, 12, 16, 20, 25])
def test_bias_is_the_papers(num_heads: int) -> None:
    scheme = build("alibi", sizes=geometry(num_heads=num_heads))
    distance = torch.arange(7)[None, :] - torch.arange(5)[:, None]
    ours = scheme.relative_bias(distance.flatten(), layer=0).view(num_heads, 5, 7)
    torch.testing.assert_close(ours.double(), reference.bias(num_heads, 5, 7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_heads", [12, 20, 25])
def test_rows_equal_blooms_up_to_a_constant(num_heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), num_heads, torch.float32).view(num_heads, 9)
    ours = build("alibi", sizes=geometry(num_heads=num_heads)).relative_bias(torch.arange(-8, 1), layer=0)
    torch.testing.assert_close(ours, theirs - theirs[:, -1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_heads", [8, 12, 16, 20, 25])
def test_equals_mpts(num_heads: int) -> None:
    theirs = build_mpt_alibi_tensor(num_heads, 9).view(num_heads, 9)
    ours = build("alibi", sizes=geometry(num_heads=num_heads)).relative_bias(torch.arange(-8, 1), layer=0)
    torch.testing.assert_close(ours, theirs)


def test_geometric_is_the_other_convention() -> None:
    torch.testing.assert_close(torch.tensor(geometric_slopes(12)[:2]), torch.tensor([2 ** (-2 / 3), 2 ** (-4 / 3)]))
    assert geometric_slopes(16) == press_slopes(16)


def test_trainable_slopes_get_gradients() -> None:
    scheme = build("alibi", trainable=True)
    scheme.relative_bias(torch.arange(-3, 2), layer=0).sum().backward()
    torch.testing.assert_close(scheme.slopes.grad, torch.full((12,), -7.0))  # 3 + 2 + 1 + 0 + 1


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"alibi: unknown option 'slope'\. Did you mean 'slopes'\?"):
        build("alibi", slope="press")
    with pytest.raises(OptionError, match=r"'slopes' is 'pres'; it must be one of 'press', 'geometric'. Did you mean 'press'"):
        build("alibi", slopes="pres")
    with pytest.raises(OptionError, match=r"'trainable' is 1; it must be True or False"):
        build("alibi", trainable=1)
