"""The kinds of native positions: how a model's own positions are measured, taken out, put back, and stood in for."""

from pe_swap.families.native.base import NativePositions
from pe_swap.families.native.bias import AddedBias, Alibi, Bias
from pe_swap.families.native.rotary import Rotary, SineTable
from pe_swap.families.native.table import Table

__all__ = ["AddedBias", "Alibi", "Bias", "NativePositions", "Rotary", "SineTable", "Table"]
