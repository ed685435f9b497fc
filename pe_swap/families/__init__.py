"""Model families, one file each, found by scanning this folder."""

from pe_swap.families.base import ADAPTERS, SWAPPED_PREFIX, Adapter, adapter_for, family_of, known_loss_type

ADAPTERS.scan(__name__, __path__)

__all__ = ["ADAPTERS", "SWAPPED_PREFIX", "Adapter", "adapter_for", "family_of", "known_loss_type"]
