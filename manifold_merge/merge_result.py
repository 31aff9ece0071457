"""What an adapter merge returns, and the certificates that are added up on the way."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from manifold_merge.solution import FrechetSolution

__all__ = ["AdapterMerge", "Tally"]


@dataclasses.dataclass(frozen=True)
class AdapterMerge:
    """What a merge produced.

    Attributes:
        recipe: The exact recipe: inputs, weights, geometry, distance, rank, scale, and why
            geometry, rank and scale were chosen.
        closeness: Least cosine between the updates of two adapters.
        modules: Merged factors by module name, B ``(m, R)`` and A ``(R, n)``; empty if the result
            was written to a folder.
        extras: Merged biases and fully trained modules by name.
        modules_merged: How many modules were merged.
        status: How many modules ended in which :class:`~manifold_merge.frechet.Status`.
        paths: How many logarithms were found in which way; empty for closed forms.
        gauge_residual: Largest relative change of a module under random gauges, if asked for.
        output: The folder that was written.
    """

    recipe: dict[str, Any]
    closeness: float
    modules: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor]
    modules_merged: int
    status: dict[str, int]
    paths: dict[str, int]
    gauge_residual: float | None
    output: Path | None

    def __repr__(self) -> str:
        """One line; tensors and the whole recipe are left to the attributes."""
        rows = [
            ("geometry", f"{self.recipe['geometry']} ({self.recipe['chosen_because']})"),
            ("closeness", f"{self.closeness:.2f}"),
            ("modules", str(self.modules_merged)),
            ("status", ", ".join(f"{v} {k}" for k, v in self.status.items())),
        ]
        if "rank_choice" in self.recipe:
            rows.insert(
                1, ("rank", f"{self.recipe['rank']} ({self.recipe['rank_chosen_because']})")
            )
        if self.extras:
            rows.append(("extras", str(len(self.extras))))
        if self.paths:
            rows.append(("logarithms", ", ".join(f"{v} {k}" for k, v in self.paths.items())))
        if self.gauge_residual is not None:
            rows.append(("gauge residual", f"{self.gauge_residual:.2e}"))
        rows.append(("output", "in memory" if self.output is None else str(self.output)))
        return "AdapterMerge(" + "; ".join(f"{k}: {v}" for k, v in rows) + ")"


@dataclasses.dataclass
class Tally:
    """Certificates of all modules, added up."""

    status: Counter[int] = dataclasses.field(default_factory=Counter)
    paths: Counter[str] = dataclasses.field(default_factory=Counter)
    gauge_residual: float | None = None

    def add(self, solution: FrechetSolution) -> None:
        """Count the outcomes of one chunk of modules."""
        self.status.update(solution.status.flatten().tolist())
        self.paths.update(solution.paths)
        if solution.gauge_residual is not None:
            worst = float(solution.gauge_residual.max())
            self.gauge_residual = max(self.gauge_residual or 0.0, worst)
