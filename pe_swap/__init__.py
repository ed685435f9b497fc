"""Swap the positional scheme of a Hugging Face Transformers model: exactly, reversibly, saved and reloaded like any other."""

from pe_swap import errors
from pe_swap.checks import check_positional
from pe_swap.families import FAMILIES
from pe_swap.saving.class_names import register_auto_classes
from pe_swap.saving.relative_key_bert import load_relative_key_bert
from pe_swap.schemes import SCHEMES
from pe_swap.swap import restore_positional, swap_positional


def list_schemes() -> list[str]:
    """Return the names of all positional schemes."""
    return SCHEMES.names()


def list_families() -> list[str]:
    """Return the model families that can be swapped, by their `config.model_type`."""
    return FAMILIES.names()


register_auto_classes()

__all__ = [
    "check_positional",
    "errors",
    "list_families",
    "list_schemes",
    "load_relative_key_bert",
    "restore_positional",
    "swap_positional",
]
