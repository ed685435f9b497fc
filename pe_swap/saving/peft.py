"""PEFT's default target modules for swapped families.

PEFT looks a model's `model_type` up in tables of families. A swapped model has a `model_type` of its own and the modules of its
family, so it gets the family's entries. PEFT's classes are not touched, and it is not imported here: whoever asks a configuration
for its content on PEFT's behalf has imported it.
"""

from __future__ import annotations

import sys

from pe_swap.families import COMPOSITES, FAMILIES, SWAPPED_PREFIX


def name_families() -> None:
    """Give every swapped family its family's entry in each of PEFT's tables, where PEFT has been imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for family in (*FAMILIES.names(), *COMPOSITES.names()):
                if family in table:
                    table.setdefault(SWAPPED_PREFIX + family, table[family])
