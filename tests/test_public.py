"""What `import pe_swap` gives: every scheme by name, with its options class, without a list that someone has to keep."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import pe_swap
from pe_swap.schemes import SCHEMES


@pytest.mark.parametrize("name", SCHEMES.names())
def test_every_scheme_s_options_are_found_at_the_top(name: str) -> None:
    options = SCHEMES[name].Options
    assert getattr(pe_swap, options.__name__) is options
    assert options.__name__ in dir(pe_swap)
    assert issubclass(options, pe_swap.SchemeOptions)
    assert issubclass(SCHEMES[name], pe_swap.Scheme)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pe_swap' has no attribute 'AlibiOption'"):
        _ = pe_swap.AlibiOption


def test_schemes_are_listed_with_one_line_each() -> None:
    described = pe_swap.list_schemes(with_description=True)
    assert list(described) == pe_swap.list_schemes() == SCHEMES.names()
    assert described["alibi"] == SCHEMES["alibi"].summary
    assert all(described.values())


def test_the_version_is_the_installed_one() -> None:
    assert pe_swap.__version__ == version("pe-swap")


def test_an_import_loads_no_model_of_transformers() -> None:
    program = (
        "import sys, pe_swap;"
        "print([name for name in sys.modules if name.startswith('transformers.models.') and '.modeling_' in name])"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['transformers.models.auto.modeling_auto']"  # names of classes, and no model
