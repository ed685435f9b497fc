"""What was found on one model: properties, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One property, measured.

    Attributes:
        name: the property.
        passed: whether it holds; None where the scheme does not claim it and the line is for information.
        difference: relative difference of hidden states, `|a - b| / |b|` (Euclidean norms), or None where none was measured.
        detail: what was compared, or why it was not.
        part: what was checked, where a model has several parts (`encoder`, `decoder`, `text`); else empty.
    """

    name: str
    passed: bool | None
    difference: float | None
    detail: str
    part: str = ""

    @property
    def label(self) -> str:
        """The part and the property, as the report shows them."""
        return f"{self.part}: {self.name}" if self.part else self.name


@dataclass(frozen=True)
class PositionalReport:
    """What `check_positional` found; `print` shows it as a table.

    Attributes:
        title: the model and its schemes.
        tolerance: the largest relative difference that counts as rounding, the square root of the dtype's machine epsilon. In float64
            that of float32: angles are computed in float32, and so are norms in many families.
        checks: one entry a property.
    """

    title: str
    tolerance: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every claimed property holds."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        """Return the report as lines of text."""
        mark = {True: "ok  ", False: "FAIL", None: "-   "}
        lines = [f"{self.title}: {'all claims hold' if self.passed else 'NOT AS CLAIMED'} (rounding: {self.tolerance:.1e})"]
        width = max(22, *(len(check.label) for check in self.checks))
        for check in self.checks:
            measured = "" if check.difference is None else f"{check.difference:.1e}"
            lines.append(f"  {mark[check.passed]} {check.label:<{width}} {measured:>8}  {check.detail}")
        return "\n".join(lines)
