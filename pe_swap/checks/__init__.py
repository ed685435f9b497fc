"""The claims of schemes, measured on the model in hand."""

from pe_swap.checks.positional import check_positional
from pe_swap.checks.report import Check, PositionalReport

__all__ = ["Check", "PositionalReport", "check_positional"]
