"""Sandwich against products of sinusoidal vectors, in both published forms."""

import pytest
import torch

from pe_swap.errors import OptionError
from tests.references import sandwich as reference
from tests.support.schemes import build, geometry


@pytest.mark.parametrize(("convention", "first"), [("nemo", 1), ("attention_gym", 0)])
@pytest.mark.parametrize("width", [128, 10])
@pytest.mark.parametrize("heads", [12, 8])
def test_is_the_papers_up_to_a_constant_a_head(convention: str, first: int, width: int, heads: int) -> None:
    scheme = build("sandwich", sizes=geometry(num_heads=heads), convention=convention, width=width)
    distance = torch.arange(50)[None] - torch.arange(50)[:, None]
    ours = scheme.relative_bias(distance.flatten(), layer=0).view(heads, 50, 50)
    expected = reference.bias(heads, 50, 50, width, first)
    expected = expected - expected[:, :1, :1]
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(ours[0, 0, 0], torch.tensor(0.0))


def test_hand_numbers() -> None:
    # width 2, distance 1: one frequency, 1 from k = 0 and 1e-4 from k = 1; with 8 heads, head h divides by h
    sizes = geometry(num_heads=8)
    one = torch.tensor([1])
    gym = build("sandwich", sizes=sizes, width=2, convention="attention_gym").relative_bias(one, layer=0)[:, 0]
    torch.testing.assert_close(gym, (0.54030231 - 1) / torch.arange(1, 9))
    nemo = build("sandwich", sizes=sizes, width=2).relative_bias(torch.tensor([10_000]), layer=0)[:, 0]
    torch.testing.assert_close(nemo, (0.54030231 - 1) / torch.arange(1, 9))


def test_far_distances_keep_their_digits() -> None:
    scheme = build("sandwich")
    far = torch.tensor([-1_000_003, 1_000_003])
    exact = sum(torch.cos(far.double() / 10_000 ** (2 * k / 128)) - 1 for k in range(1, 65)) / (8 / 12)
    found = scheme.relative_bias(far, layer=0)[0]
    torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)
    assert found[0] == found[1]


def test_penalises_distance_and_most_in_the_first_heads() -> None:
    bias = build("sandwich").relative_bias(torch.tensor([-1, -10, -100, -1000]), layer=0)
    assert (bias.diff(dim=1) < 0).all()
    assert (bias.diff(dim=0) > 0).all()
    assert not list(build("sandwich").parameters())


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"sandwich: option 'convention' is 'paper'; it must be one of 'nemo', 'attention_gym'"):
        build("sandwich", convention="paper")
    with pytest.raises(OptionError, match=r"'width' is 7; it must be even"):
        build("sandwich", width=7)
    with pytest.raises(OptionError, match=r"'width' is 0; it must be an integer from 2"):
        build("sandwich", width=0)
