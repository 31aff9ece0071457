"""What the laws of the contract suite found: measurements, results, and the report.

Users import :mod:`manifold_merge.checks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["CheckReport", "ContractViolation", "LawResult", "Measurement", "claim", "crash"]


@dataclass(frozen=True)
class Measurement:
    """One number that a law measured, and the bound it must keep.

    Attributes:
        what: The identity or the property, in words and symbols.
        value: What was measured.
        bound: What it is compared with.
        sense: Whether the value must be at most (``"<="``) or at least (``">="``) the bound.
        required: False for a number that is only reported.
    """

    what: str
    value: float
    bound: float
    sense: Literal["<=", ">="] = "<="
    required: bool = True

    @property
    def ok(self) -> bool:
        """Whether the bound is kept; NaN never keeps it."""
        kept = self.value <= self.bound if self.sense == "<=" else self.value >= self.bound
        return kept or not self.required

    @property
    def is_claim(self) -> bool:
        """Whether it is a statement, false or not, of which ``what`` says how it is broken."""
        return self.bound == 0 and self.sense == "<="

    @property
    def severity(self) -> float:
        """How near to (below 1) or how far beyond (above 1) the bound the value lies."""
        if math.isnan(self.value):
            return math.inf
        small, large = (self.value, self.bound) if self.sense == "<=" else (self.bound, self.value)
        if large <= 0:
            return math.inf if small > large else 0.0
        return small / large

    def __str__(self) -> str:
        if self.is_claim:
            return "" if self.value == 0 else self.what
        note = "" if self.required else " (reported only)"
        return f"{self.what}: {self.value:.3g} (must be {self.sense} {self.bound:.3g}){note}"


@dataclass(frozen=True)
class LawResult:
    """What one law found.

    Attributes:
        name: Name of the law, as in ``skip=``.
        status: ``"passed"``, ``"failed"`` or ``"skipped"``.
        reason: Why the law was skipped, wholly or in part; empty otherwise.
        measurements: All numbers measured.
        remedy: What to do about a failure.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    reason: str
    measurements: tuple[Measurement, ...]
    remedy: str

    @property
    def worst(self) -> Measurement | None:
        """The required measurement closest to, or furthest beyond, its bound."""
        required = [m for m in self.measurements if m.required]
        return max(required, key=lambda m: m.severity, default=None)

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements that break their bound."""
        return tuple(m for m in self.measurements if not m.ok)


@dataclass(frozen=True)
class CheckReport:
    """The outcome of all laws on one manifold; prints as a table.

    Attributes:
        subject: The manifold, point shape, batch shape and precision that were checked.
        results: One result for each law, in the order in which they ran.
    """

    subject: str
    results: tuple[LawResult, ...]

    @property
    def ok(self) -> bool:
        """Whether no law failed."""
        return not self.failed

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the laws that hold."""
        return tuple(r.name for r in self.results if r.status == "passed")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the laws that are broken."""
        return tuple(r.name for r in self.results if r.status == "failed")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the laws that did not run."""
        return tuple(r.name for r in self.results if r.status == "skipped")

    def __getitem__(self, name: str) -> LawResult:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"no law named {name!r} was run; laws run: {[r.name for r in self.results]}")

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.results), default=0)
        lines = [self.subject]
        for r in self.results:
            worst = "" if r.worst is None else str(r.worst)
            lines.append(f"  {r.name:<{width}}  {r.status:<7}  {r.reason or worst}")
        return "\n".join(lines)

    def explain(self) -> str:
        """Every broken law with all its broken measurements and the remedy."""
        lines = [f"{self.subject} breaks {len(self.failed)} of {len(self.results)} laws:"]
        for r in self.results:
            if r.status == "failed":
                lines.append(f"* {r.name}")
                lines += [f"    {m}" for m in r.failures]
                lines.append(f"    Remedy: {r.remedy}")
        lines.append("A law that cannot hold by design is left out with skip=('name', ...).")
        return "\n".join(lines)


class ContractViolation(AssertionError):
    """A manifold breaks laws of its contract.

    Attributes:
        report: The full :class:`CheckReport`, laws that hold included.
    """

    def __init__(self, report: CheckReport) -> None:
        super().__init__(report.explain())
        self.report = report


def claim(what: str, holds: bool) -> Measurement:
    """Measure a statement that is true or false; ``what`` says what is wrong if it is false."""
    return Measurement(what, 0.0 if holds else math.inf, 0.0)


def crash(what: str, error: Exception) -> Measurement:
    """Record an exception as a broken statement, with the first line of its message."""
    line = (str(error).strip().splitlines() or [""])[0]
    return claim(f"{what} raised {type(error).__name__}: {line}", False)
