"""Names of attention implementations, and what each can honour."""

from collections.abc import Iterable

from pe_swap.attention.backends import BINDING_ATTRIBUTE, is_ours, library_name, name_for


def require_honoured(implementation: str | None, hooks: Iterable[str]) -> None:
    """Refuse an implementation that cannot honour a hook; see `name_for`."""
    name_for(implementation, hooks)


__all__ = ["BINDING_ATTRIBUTE", "is_ours", "library_name", "name_for", "require_honoured"]
