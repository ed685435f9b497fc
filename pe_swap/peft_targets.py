"""Default target modules of peft's methods for swapped families: those of the family itself.

peft looks them up by `model_type` in tables of its own, one a method, and a swapped model has a `model_type` of its own. Its rows
are added to peft's tables as its Auto classes are to transformers': nothing that is there is changed.
"""

from __future__ import annotations

import sys
from typing import Any

from pe_swap.adapters import ADAPTERS, SWAPPED_PREFIX

TABLE_PREFIX = "TRANSFORMERS_MODELS_TO_"
"""What the names of peft's tables begin with, in `peft.utils.constants`."""


def register_peft_targets() -> None:
    """Add the swapped families to peft's tables, where peft has been imported and has them not yet.

    peft asks a model for `config.to_dict()` right before each look-up, which is when this is called; so that neither import has to
    come first, and peft is imported by nobody who does not use it.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith(TABLE_PREFIX) and isinstance(table, dict):
            _add_rows(table)


def _add_rows(table: dict[str, Any]) -> None:
    """Add to one table a row for every swapped family whose own row it has."""
    for family in ADAPTERS.names():
        if family in table:
            table.setdefault(SWAPPED_PREFIX + family, table[family])
