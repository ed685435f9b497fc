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

FAMILIES.scan(__name__, __path__)

__all__ = ["FAMILIES", "SWAPPED_PREFIX", "Family", "Stack", "base_model_of", "family_for", "family_name", "known_loss_type"]
