"""Concatenation: what the start keeps, and what it is."""

import pytest
import torch

from pe_swap.errors import OptionError, PositionRangeError
from pe_swap.schemes import Native
from pe_swap.schemes.concat import Concat, ConcatOptions
from tests.references import absolute as reference
from tests.support.schemes import build, geometry


def build_learned(table: torch.Tensor, **options: object) -> Concat:
    """Return a concat with a learned table; its option `table` has the name of an argument of `build`."""
    native = Native(table=table)
    scheme = Concat(ConcatOptions(table="learned", **options).resolve(geometry(), native), geometry(), (0, 1, 2))
    scheme.start_from(native)
    return scheme


def test_a_learned_table_starts_as_the_sum_exactly() -> None:
    table, tokens = torch.randn(32, 768), torch.randn(2, 32, 768)
    assert torch.equal(build_learned(table).embed(tokens, torch.arange(32)[None]), tokens + table)


def test_a_narrow_learned_table_starts_at_the_best_rank() -> None:
    table, tokens = torch.randn(32, 768), torch.zeros(1, 32, 768)
    ours = build_learned(table, dim=5).embed(tokens, torch.arange(32)[None])[0].detach()
    spectrum = torch.linalg.svdvals(table.double())
    # Eckart and Young: no matrix of rank 5 is nearer than the root of the squares of the singular values left out
    assert float((ours.double() - table).norm()) == pytest.approx(float(spectrum[5:].norm()), rel=1e-5)


def test_sinusoidal_start_is_near_a_smooth_table() -> None:
    places = torch.arange(32)
    table = 0.1 * reference.sinusoidal(places.tolist(), 768, 50.0, "interleaved").float()
    positions_only = build("concat", table).embed(torch.zeros(1, 32, 768), places[None])[0].detach()
    assert float((positions_only - table).norm() / table.norm()) < 0.2


def test_the_token_path_starts_as_the_identity() -> None:
    scheme, tokens = build("concat"), torch.randn(2, 9, 768)
    assert torch.equal(scheme.embed(tokens, torch.arange(9)[None]), tokens)


def test_concatenation_is_a_sum_of_two_maps() -> None:
    scheme, tokens, ids = build("concat", dim=10), torch.randn(2, 9, 768), torch.arange(9)[None]
    for parameter in scheme.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    vectors = reference.sinusoidal(list(range(9)), 10, 10000.0, "interleaved")
    expected = tokens.double() @ scheme.token_weight.double().T + vectors @ scheme.position_weight.double().T
    torch.testing.assert_close(scheme.embed(tokens, ids).double(), expected, atol=1e-5, rtol=0)


def test_gradients_and_dtype() -> None:
    scheme = build_learned(torch.randn(32, 768), dim=6)
    out = scheme.embed(torch.randn(1, 32, 768).bfloat16(), torch.arange(32)[None])
    assert out.dtype == torch.bfloat16
    (out.float() * torch.randn(1, 32, 768)).sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in scheme.parameters())


def test_limits_and_wrong_options() -> None:
    assert build("concat").max_length is None
    with pytest.raises(PositionRangeError, match=r"Position 40 is beyond the 32"):
        build_learned(torch.randn(32, 768)).embed(torch.zeros(1, 1, 768), torch.tensor([[40]]))
    with pytest.raises(OptionError, match=r"concat: option 'dim' is 0"):
        build("concat", dim=0)
    with pytest.raises(OptionError, match=r"unknown option 'dims'. Did you mean 'dim'"):
        build("concat", dims=3)


def test_says_whether_it_keeps_the_models_function() -> None:
    table = torch.randn(32, 768)
    assert build_learned(table).keeps_function
    assert not build_learned(table, dim=5).keeps_function
    assert not build("concat", table).keeps_function
    assert not build("concat").keeps_function


def test_is_as_wide_as_the_tokens() -> None:
    scheme, tokens = build("concat", sizes=geometry(input_size=128)), torch.randn(1, 9, 128)
    assert scheme.options.dim == 128
    assert torch.equal(scheme.embed(tokens, torch.arange(9)[None]), tokens)
