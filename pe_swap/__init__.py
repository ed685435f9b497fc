"""Swap the positional scheme of a Hugging Face Transformers model: exactly, reversibly, saved and reloaded like any other.

Beside the names below, every scheme's options class is found here: `pe_swap.AlibiOptions`, `pe_swap.RopeOptions`, ...
"""

from typing import Literal, overload

from pe_swap import errors
from pe_swap.checks import check_positional
from pe_swap.families import FAMILIES
from pe_swap.patching.install import positional_parameters
from pe_swap.saving.class_names import register_auto_classes
from pe_swap.saving.relative_key_bert import load_relative_key_bert
from pe_swap.schemes import OPTIONS, SCHEMES, Scheme, SchemeOptions
from pe_swap.schemes.base import on_a_grid
from pe_swap.swap import restore_positional, swap_positional
from pe_swap.version import __version__


@overload
def list_schemes(with_description: Literal[False] = False, *, axes: int = 1) -> list[str]: ...
@overload
def list_schemes(with_description: Literal[True], *, axes: int = 1) -> dict[str, str]: ...
def list_schemes(with_description: bool = False, *, axes: int = 1) -> list[str] | dict[str, str]:
    """Return the names of all positional schemes, sorted.

    Args:
        with_description: return a mapping from each name to one line that says what the scheme is.
        axes: how many numbers a position is: 1 for texts, 2 for images, which not every scheme takes.

    Raises:
        OptionError: another number of axes.
    """
    if axes not in (1, 2):
        raise errors.OptionError(f"axes is {axes!r}; it must be 1 (texts) or 2 (images).")
    names = SCHEMES.names() if axes == 1 else sorted(on_a_grid())
    return {name: SCHEMES[name].summary for name in names} if with_description else names


def list_families() -> list[str]:
    """Return the model families that can be swapped, by their `config.model_type`."""
    return FAMILIES.names()


def __getattr__(name: str) -> type[SchemeOptions]:
    """Return a scheme's options class; the classes are found by scanning, so that none is listed here."""
    if name in OPTIONS:
        return OPTIONS[name]
    raise AttributeError(f"module 'pe_swap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *OPTIONS})


register_auto_classes()

__all__ = [
    "Scheme",
    "SchemeOptions",
    "__version__",
    "check_positional",
    "errors",
    "list_families",
    "list_schemes",
    "load_relative_key_bert",
    "positional_parameters",
    "restore_positional",
    "swap_positional",
]
