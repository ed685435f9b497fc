"""HoPE: which planes turn, and that they turn as RoPE's do."""

import math

import pytest
import torch

from pe_swap.errors import OptionError
from tests.references import rope as reference
from tests.support.schemes import at_positions, build, geometry

IDS = torch.tensor([[0, 1, 9, 30, 500], [4, 5, 6, 7, 8]])


def rotate(x: torch.Tensor, ids: torch.Tensor, trained_length: int = 100, **options: object) -> torch.Tensor:
    sizes = geometry(head_dim=x.shape[-1], trained_length=trained_length)
    return at_positions(build("hope", sizes=sizes, **options), x, ids, role="query", layer=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("trained_length", "base"), [(100, 10_000.0), (1024, 500.0), (512, 10_000.0)])
def test_is_the_papers(layout: str, trained_length: int, base: float) -> None:
    x = torch.randn(2, 3, 5, 64)
    found = rotate(x, IDS, trained_length, layout=layout, base=base)
    thetas = [base ** (-2 * k / 64) for k in range(32)]
    turning = [theta if 2 * math.pi / theta <= trained_length else 0.0 for theta in thetas]
    assert 0.0 in turning
    for row in range(2):
        for place, position in enumerate(IDS[row].tolist()):
            expected = reference.rotated_by(x[row, 1, place], [position * theta for theta in turning], layout)
            torch.testing.assert_close(found[row, 1, place].double(), expected, atol=2e-4, rtol=0)


def test_golden_number_of_planes() -> None:
    # head_dim 64, base 10,000: 2 pi 10,000 ** (k / 32) <= 1,024 for k up to 17.7
    assert (build("hope", sizes=geometry(trained_length=1024)).inv_freq(IDS) > 0).sum() == 18
    assert (build("hope", sizes=geometry(trained_length=512)).inv_freq(IDS) > 0).sum() == 16
    assert (build("hope", longest_period=7).inv_freq(IDS) > 0).sum() == 1


def test_slow_planes_stand_still_bit_for_bit_and_fast_ones_are_ropes() -> None:
    x = torch.randn(2, 3, 5, 64)
    found, ropes = rotate(x, IDS, 1024), at_positions(build("rope"), x, IDS, role="query", layer=0)
    still = torch.cat((torch.arange(18, 32), torch.arange(50, 64)))
    turning = torch.cat((torch.arange(18), torch.arange(32, 50)))
    assert torch.equal(found[..., still], x[..., still])
    assert torch.equal(found[..., turning], ropes[..., turning])


def test_the_trained_length_is_written_out() -> None:
    assert build("hope", sizes=geometry(trained_length=77)).options.to_dict()["longest_period"] == 77
    assert build("hope", sizes=geometry(trained_length=3)).options.to_dict()["longest_period"] == 7


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"hope: option 'longest_period' is 6; it must be at least 2 pi"):
        build("hope", longest_period=6)
    with pytest.raises(OptionError, match=r"hope: head_dim 15 x fraction 1.0 gives 15 rotary dimensions; they must be an even"):
        build("hope", sizes=geometry(head_dim=15))
    with pytest.raises(OptionError, match=r"'layout' is 'halves'; it must be one of 'half', 'interleaved'. Did you mean 'half'"):
        build("hope", layout="halves")
