"""The families as text: what `python -m pe_swap families` prints."""

from __future__ import annotations

from pe_swap.families import COMPOSITES, FAMILIES, Stack
from pe_swap.families.base import as_configured, encoder

COUNTED = {"slots": "every token", "mask": "what the mask lets through", "tokens": "tokens that are not padding"}


def attention_of(stack: Stack) -> str:
    """Return in words where a stack's attention looks."""
    if stack.is_causal is as_configured:
        return "both sides; causal with `is_decoder=True`"
    return "both sides" if stack.is_causal is encoder else "causal"


def counted(stack: Stack) -> str:
    """Return in words what a stack's position ids count."""
    return COUNTED[stack.counts] if stack.patches is None else "rows and columns of patches"


def rows() -> list[tuple[str, str, str, str, str, str]]:
    """Return a row per stack of every family: name, part, kind, place, what position ids count, attention."""
    return [
        (name, stack.name, stack.native.kind, stack.native.holder_path, counted(stack), attention_of(stack))
        for name in FAMILIES.names()
        for stack in FAMILIES[name].stacks
    ]


def families_table() -> str:
    """Return the families as a table of the README, those alike in one row each by name."""
    lines = [
        "| family | part | positions | holder of the schemes | position ids count | attention |",
        "|---|---|---|---|---|---|",
    ]
    for name, part, kind, place, counted, attention in rows():
        lines.append(f"| `{name}` | {part} | {kind} | `{place}` | {counted} | {attention} |")
    return "\n".join(lines)


def composites_table() -> str:
    """Return the models that are made of models as a table of the README."""
    lines = ["| composite | part | where | a swap without `part=` is for it |", "|---|---|---|---|"]
    for name in COMPOSITES.names():
        for part in COMPOSITES[name].parts:
            for_it = ("yes; no bias" if part.looks_both_ways else "yes") if part.is_default else "no"
            lines.append(f"| `{name}` | `{part.name}` | `{part.path}` | {for_it} |")
    return "\n".join(lines)


def families_text() -> str:
    """Return the families as lines of plain text."""
    return "\n".join(f"{name:<20} {part:<8} {kind:<7} {attention}" for name, part, kind, _, _, attention in rows())
