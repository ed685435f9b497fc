"""DroPE's recipe on no positions: normalised queries and keys, and a temperature beyond the trained length."""

import pytest
import torch

from pe_swap.errors import OptionError
from tests.references import length_scale as reference
from tests.support.schemes import at_positions, build


def test_hooks_are_those_asked_for() -> None:
    assert build("none").hooks == frozenset()
    assert build("none", qk_norm=True).hooks == {"transform_query_key"}
    assert build("none", temperature="log").hooks == {"query_scale"}
    assert build("none", logit_scale="log_n", qk_norm=True).hooks == {"transform_query_key", "query_scale"}


@pytest.mark.parametrize("coefficient", [0.1, 0.4])
def test_temperature_is_the_papers_and_one_up_to_the_trained_length(coefficient: float) -> None:
    scheme = build("none", temperature="log", temperature_coefficient=coefficient)
    seen = [1, 31, 32, 33, 64, 4096]
    expected = torch.tensor([[reference.drope_temperature(n, 32, coefficient) for n in seen]])
    torch.testing.assert_close(scheme.query_scale(torch.tensor([seen]), layer=0), expected)
    assert expected[0, :3].tolist() == [1, 1, 1]


def test_norm_is_of_each_head_and_has_gains_of_its_layer_and_role() -> None:
    scheme = build("none", qk_norm=True)
    torch.nn.init.normal_(scheme.query_gains["1"])
    x, ids = torch.randn(2, 12, 5, 64) * 7, torch.arange(5)[None]
    unit = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    key = at_positions(scheme, x, ids, role="key", layer=1)
    torch.testing.assert_close(key.double(), unit, atol=1e-5, rtol=0)
    query = at_positions(scheme, x, ids, role="query", layer=1)
    torch.testing.assert_close(query.double(), unit * scheme.query_gains["1"].double(), atol=2e-5, rtol=0)
    assert torch.equal(at_positions(scheme, x, ids, role="query", layer=0), key)
    narrow = at_positions(scheme, x.bfloat16(), ids, role="key", layer=1)
    assert torch.equal(narrow, at_positions(scheme, x.bfloat16().float(), ids, role="key", layer=1).bfloat16())


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"none: option 'temperature' is 'ln'; it must be one of None, 'log'"):
        build("none", temperature="ln")
    with pytest.raises(OptionError, match=r"'logit_scale' is 'log_n'; it must be None beside temperature='log'"):
        build("none", temperature="log", logit_scale="log_n")
    with pytest.raises(OptionError, match=r"'qk_norm' is 1; it must be True or False"):
        build("none", qk_norm=1)
