"""The order of the package's rooms."""

from __future__ import annotations

FLOORS = (
    {"version", "errors"},
    {"registry"},
    {"schemes"},
    {"families", "attention", "assignment"},
    {"patching", "plans"},
    {"saving"},
    {"swap"},
    {"checks"},
    {"__init__"},
    {"runs"},
    {"evaluation"},
    {"training"},
    {"commands"},
    {"__main__"},
)
"""From the ground up. A room imports from itself and from the floors below it, never from its own floor."""
