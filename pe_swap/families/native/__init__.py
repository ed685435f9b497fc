"""The kinds of native positions: how a model's own positions are measured, taken out, put back, and stood in for."""

from pe_swap.families.native.base import NativePositions
from pe_swap.families.native.bias import Bias
from pe_swap.families.native.rotary import Rotary, SineTable
from pe_swap.families.native.table import Table

__all__ = ["Bias", "NativePositions", "Rotary", "SineTable", "Table"]
