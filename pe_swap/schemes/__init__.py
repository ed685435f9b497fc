"""Positional schemes, one file each, found by scanning this folder."""

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import SchemeOptions, build_options

SCHEMES.scan(__name__, __path__)

__all__ = ["SCHEMES", "Geometry", "Scheme", "SchemeOptions", "build_options"]
