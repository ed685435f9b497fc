"""Positional schemes, one file each, found by scanning this folder."""

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import SchemeOptions, build_options

SCHEMES.scan(__name__, __path__)

OPTIONS: dict[str, type[SchemeOptions]] = {SCHEMES[name].Options.__name__: SCHEMES[name].Options for name in SCHEMES.names()}
"""Every scheme's options class, by its name."""

__all__ = ["OPTIONS", "SCHEMES", "Geometry", "Native", "Scheme", "SchemeOptions", "build_options"]
