"""Model families, found by scanning this folder."""

from pe_swap.families.base import (
    FAMILIES,
    SWAPPED_PREFIX,
    Family,
    Stack,
    base_model_of,
    family_for,
    family_name,
    known_loss_type,
)
from pe_swap.families.composite import COMPOSITES, Composite, composite_of, described

FAMILIES.scan(__name__, __path__)

__all__ = [
    "COMPOSITES",
    "FAMILIES",
    "SWAPPED_PREFIX",
    "Composite",
    "Family",
    "Stack",
    "base_model_of",
    "composite_of",
    "described",
    "family_for",
    "family_name",
    "known_loss_type",
]
