"""A registry: names and what is registered under them, filled by importing the files of a folder."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from pe_swap.errors import UnknownNameError

T = TypeVar("T")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string where no name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


class Registry(Generic[T]):
    """A mapping from a name to what one file registers under it.

    The decorator in that file is the only place that states the name. `scan` imports every file of the folder once.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under `name`.

        Raises:
            UnknownNameError: another entry already has the name.
        """

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise UnknownNameError(
                    f"The {self._kind} name '{name}' is registered twice: {self._entries[name]!r} and {entry!r}. "
                    "Rename one of them."
                )
            self._entries[name] = entry
            return entry

        return decorate

    def scan(self, package: str, folder: Iterable[str]) -> None:
        """Import every module in `folder`, so that each registers itself."""
        for module in pkgutil.iter_modules(folder):
            importlib.import_module(f"{package}.{module.name}")

    def __getitem__(self, name: str) -> T:
        """Return the entry called `name`.

        Raises:
            UnknownNameError: no entry has that name; the message proposes the nearest name and lists all.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise UnknownNameError(
                f"Unknown {self._kind} {name!r}.{did_you_mean(name, self._entries)} "
                f"Available: {', '.join(sorted(self._entries))}."
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether `name` is registered."""
        return name in self._entries

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        return sorted(self._entries)
