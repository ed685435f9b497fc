"""The kinds of native positions: how a model's own positions are measured, taken out, put back, and stood in for."""

from pe_swap.families.native.base import NativePositions
from pe_swap.families.native.bias import AddedBias, Alibi, Bias, GridBias
from pe_swap.families.native.grid import Grid, Patches, PatchLayout
from pe_swap.families.native.grid_rotary import GridRotary
from pe_swap.families.native.rotary import Rotary, SineTable
from pe_swap.families.native.table import Table

__all__ = [
    "AddedBias",
    "Alibi",
    "Bias",
    "Grid",
    "GridBias",
    "GridRotary",
    "NativePositions",
    "PatchLayout",
    "Patches",
    "Rotary",
    "SineTable",
    "Table",
]
