"""Statistics beside adapters as metrics of their modules, for ``merge_adapters``."""

from __future__ import annotations

import builtins
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_merge.adapters import Adapter
from manifold_merge.fisher import KroneckerFisher
from manifold_merge.fisher_factor import MetricFactor
from manifold_merge.fisher_low_rank import low_rank_objective
from manifold_merge.fisher_mean import mean_with_metrics
from manifold_merge.frechet import normalized_weights
from manifold_merge.lora import LoRAQuotient
from manifold_merge.rank_choice import truncation_losses
from manifold_merge.solution import FrechetSolution
from manifold_merge.statistics import STATISTICS_NAME, Statistics

__all__ = ["NORMALISATIONS", "AdapterMetrics", "has_statistics"]

NORMALISATIONS = ("none", "trace", "task")

# Relative gradient norm at which means without a closed form end. The error of the objective goes
# with its square, a thousandth here; a third of it gave the same merges on validation texts.
TOLERANCE = 3e-2
# Modules whose Grams are kept, as query, key, value and gate, up share theirs.
CACHED_MODULES = 8

Source = str | os.PathLike[str] | Statistics
Pair = tuple[Tensor, Tensor]
# For each adapter, the sum of squared relative errors and the number of modules in it.
Errors = dict[int, tuple[float, int]]


def has_statistics(adapter: Adapter) -> bool:
    """Whether ``merge_statistics.safetensors`` lies beside the adapter."""
    return (adapter.path / STATISTICS_NAME).is_file()


@dataclasses.dataclass
class AdapterMetrics:
    """Metrics of the modules of k adapters.

    Attributes:
        statistics: One for each adapter.
        names: What to call each adapter in messages.
        damping: λ in G + λ (tr G / n) I.
        shrinkage: σ in (1 - σ) G + σ diag(G).
        normalisation: ``"none"``; ``"trace"``, each Gram divided by its mean eigenvalue; or
            ``"task"``, each metric divided by the squared length of its own adapter's update.
        device: Where to compute.
        adapts: The modules that each adapter adapts, whose statistics must be there.
    """

    statistics: list[Statistics]
    names: list[str]
    damping: float = 1e-2
    shrinkage: float = 0.0
    normalisation: str = "none"
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    adapts: dict[int, frozenset[str]] = dataclasses.field(default_factory=dict, repr=False)
    _errors: Errors = dataclasses.field(default_factory=dict, repr=False)
    _counted: Errors = dataclasses.field(default_factory=dict, repr=False)
    _sides: dict[tuple[int, str, str], MetricFactor] = dataclasses.field(
        default_factory=dict, repr=False
    )

    @classmethod
    def load(
        cls, adapters: Sequence[Adapter], given: Sequence[Source] | None, **options: Any
    ) -> AdapterMetrics:
        """Read the statistics of each adapter, by default those beside it.

        Raises:
            FileNotFoundError: An adapter has no statistics.
            ValueError: There are not as many as adapters, one is damaged or of another kind, or
                an option is unknown.
        """
        if options.get("normalisation", "none") not in NORMALISATIONS:
            raise ValueError(
                f"normalisation must be one of {', '.join(NORMALISATIONS)}; got "
                f"{options['normalisation']!r}"
            )
        if given is not None and len(given) != len(adapters):
            raise ValueError(
                f"statistics: expected {len(adapters)}, one for each adapter; got {len(given)}"
            )
        found = []
        for i, adapter in enumerate(adapters):
            source: Source = adapter.path if given is None else given[i]
            if given is None and not has_statistics(adapter):
                raise FileNotFoundError(
                    f"{adapter.path} has no {STATISTICS_NAME}; make it with `manifold-merge "
                    f"calibrate {adapter.path} --base-model ... --data texts.jsonl`"
                )
            one = source if isinstance(source, Statistics) else Statistics.load(source)
            if one.kind == "diagonal":
                raise ValueError(
                    f"statistics of {adapter.path}: a diagonal Fisher of whole weights does not "
                    "keep updates low-rank; collect kind='input_gram' or 'kfac' for adapters"
                )
            found.append(one)
        kinds = {one.kind for one in found}
        if len(kinds) > 1:
            each = ", ".join(f"{a.path} {s.kind}" for a, s in zip(adapters, found, strict=True))
            raise ValueError(
                f"statistics are of different kinds ({each}); calibrate all adapters with one "
                "--kind"
            )
        adapts = {i: frozenset(adapter.modules) for i, adapter in enumerate(adapters)}
        return cls(found, [str(a.path) for a in adapters], adapts=adapts, **options)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides the metric, for the record."""
        return {
            "kind": self.statistics[0].kind,
            "examples": [one.examples for one in self.statistics],
            "damping": self.damping,
            "shrinkage": self.shrinkage,
            "normalisation": self.normalisation,
        }

    # --- metrics of one module -------------------------------------------------------------------

    def key(self, name: str) -> tuple[str, ...]:
        """Modules with the same key have the same metrics in all adapters."""
        kfac = self.statistics[0].kind == "kfac"
        return (name,) if kfac else tuple(one.owners.get(name, "") for one in self.statistics)

    def metrics(
        self, name: str, who: Sequence[Sequence[int]], weights: Sequence[float], m: int, n: int
    ) -> list[KroneckerFisher]:
        """One metric for each anchor of a module.

        Args:
            name: The module.
            who: For each anchor the adapters that it stands for: several where some lack the
                module, an update of zero whose metric is the mean of theirs.
            weights: One for each adapter.
            m: Rows of the update.
            n: Columns of the update.

        Raises:
            ValueError: No adapter has statistics of the module, or they are of another size.
        """
        having = [i for i, one in enumerate(self.statistics) if name in one.owners]
        if not having:
            raise ValueError(
                f"module {name!r}: no statistics; calibrate again with the adapter that has it"
            )
        metrics = []
        for group in who:
            # An adapter that was not calibrated there is taken to see what the others see.
            chosen = [i for i in group if i in having] or having
            for i in group:
                if name in self.adapts.get(i, ()) and i not in having:
                    raise ValueError(
                        f"module {name!r}: the statistics of {self.names[i]} lack it; calibrate "
                        "that adapter again"
                    )
            shares = torch.tensor([weights[i] for i in chosen], dtype=torch.float64)
            if not bool(shares.sum() > 0):
                shares = torch.ones_like(shares)
            shares = shares / shares.sum()
            sides: dict[str, MetricFactor | None] = {}
            for side, size in (("input", n), ("output", m)):
                factors = [self._side(i, side, name) for i in chosen]
                if factors[0] is None:
                    sides[f"{side}_gram"] = None
                    continue
                for factor, i in zip(factors, chosen, strict=True):
                    assert factor is not None
                    if factor.features != size:
                        raise ValueError(
                            f"module {name!r}: the {side} Gram of {self.names[i]} has size "
                            f"{factor.features}, the module {size}; calibrate with this base model"
                        )
                single = len(factors) == 1
                sides[f"{side}_gram"] = factors[0] if single else MetricFactor.sum(factors, shares)  # type: ignore[arg-type]
            metrics.append(KroneckerFisher(m, n, **sides))  # type: ignore[arg-type]
        return metrics

    def _side(self, i: int, side: str, name: str) -> MetricFactor | None:
        one = self.statistics[i]
        if side == "output" and one.kind != "kfac":
            return None
        key = (i, side, one.owners[name] if side == "input" else name)
        if key not in self._sides:
            gram = one.gram(name) if side == "input" else one.output_gram(name)
            try:
                factor = MetricFactor(gram, damping=self.damping, shrinkage=self.shrinkage)
            except ValueError as error:
                what = str(error).removeprefix("gram: ")
                raise ValueError(f"{self.names[i]}, {side} Gram of {name!r}: {what}") from error
            factor = factor.to(self.device)
            if self.normalisation == "trace":
                factor = factor.scaled(factor.features / factor.trace())
            self._sides[key] = factor
        return self._sides[key]

    # --- means -----------------------------------------------------------------------------------

    def mean(
        self,
        manifold: LoRAQuotient,
        points: Sequence[Tensor],
        weights: Sequence[float],
        names: Sequence[str],
        who: Sequence[Sequence[int]],
        *,
        adapter_weights: Sequence[float],
        rank: int | None,
        p: int = 2,
        losses: dict[str, list[float]] | None = None,
    ) -> FrechetSolution:
        """The mean of a chunk of modules, those with one metric solved together.

        Args:
            manifold: Says the sizes.
            points: One for each anchor, ``(b, m + n, r_i)``.
            weights: One for each anchor.
            names: The b modules.
            who: For each anchor the adapters that it stands for.
            adapter_weights: One for each adapter.
            rank: Rank of the mean.
            p: 2 for the mean, 1 for the median.
            losses: Filled with what cutting the mean of each module to each rank would lose.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(self.key(name), []).append(row)
        limit = min(manifold.out_features, manifold.in_features)
        rank = min(builtins.sum(x.shape[-1] for x in points), limit) if rank is None else rank
        parts: list[tuple[list[int], FrechetSolution]] = []
        for rows in groups.values():
            m, n = manifold.out_features, manifold.in_features
            metrics = self.metrics(names[rows[0]], who, adapter_weights, m, n)
            work = [x[rows].to(next(metrics[0].buffers()).dtype) for x in points]
            w = normalized_weights(weights, len(work), like=work[0])
            w = w[:, None].expand(-1, len(rows))
            if self.normalisation == "task":
                w = self._by_task(manifold, work, metrics, w)
            solution = mean_with_metrics(
                manifold, work, w, metrics, p=p, rank=rank, tolerance=TOLERANCE
            )
            parts.append((rows, solution))
            if losses is not None:
                pair = LoRAQuotient._split(manifold, solution.point)
                cut = truncation_losses(pair, w, metrics).tolist()
                losses.update(zip((names[row] for row in rows), cut, strict=True))
            self._tally(manifold, work, metrics, who, solution)
            if len(self._sides) > CACHED_MODULES * len(self.statistics):
                self._sides.clear()  # dense Grams are the largest part of the memory
        return _joined(parts, len(names), points[0].dtype)

    def _tally(
        self,
        manifold: LoRAQuotient,
        points: Sequence[Tensor],
        metrics: Sequence[KroneckerFisher],
        who: Sequence[Sequence[int]],
        solution: FrechetSolution,
    ) -> None:
        """Add the squared relative errors of modules that adapters have to their sums."""
        mean = LoRAQuotient._split(manifold, solution.point)
        one = torch.ones_like(solution.objective)[None]
        for x, metric, group in zip(points, metrics, who, strict=True):
            pair = LoRAQuotient._split(manifold, x)
            own = low_rank_objective((0 * pair[0], pair[1]), [pair], [metric], one)
            live = own > 0
            if len(group) != 1 or not bool(live.any()):
                continue
            error = low_rank_objective(mean, [pair], [metric], one)
            total, count = self._errors.get(group[0], (0.0, 0))
            total += float((error[live] / own[live]).sum())
            self._errors[group[0]] = (total, count + int(live.sum()))

    def take_errors(self) -> Errors:
        """Sums of squared relative errors since the last call, which start again from zero."""
        errors, self._errors = self._errors, {}
        return errors

    def add_errors(self, errors: Errors) -> None:
        """Count the errors of a chunk of modules."""
        for i, (more, number) in errors.items():
            total, count = self._counted.get(i, (0.0, 0))
            self._counted[i] = (total + more, count + number)

    @property
    def output_errors(self) -> list[float | None]:
        """Predicted error of each adapter's layer outputs, relative to leaving the adapter out.

        Root mean square over the modules merged so far, in the damped metric, before any scale.
        """
        sums = [self._counted.get(i) for i in range(len(self.statistics))]
        return [None if found is None else (found[0] / found[1]) ** 0.5 for found in sums]

    @staticmethod
    def _by_task(
        manifold: LoRAQuotient,
        points: Sequence[Tensor],
        metrics: Sequence[KroneckerFisher],
        weights: Tensor,
    ) -> Tensor:
        pairs = [LoRAQuotient._split(manifold, x) for x in points]
        lengths = [
            low_rank_objective((0 * b, a), [(b, a)], [metric], torch.ones_like(weights[:1]))
            for (b, a), metric in zip(pairs, metrics, strict=True)
        ]
        size = torch.stack(lengths)
        typical = size.sum(0) / (size > 0).sum(0).clamp(min=1)
        # An update of zero has no length of its own: it is measured by the typical one.
        size = torch.where(size > 0, size, typical)
        shares = weights / torch.where(size > 0, size, 1.0)
        return shares / shares.sum(0)


def _joined(
    parts: Sequence[tuple[list[int], FrechetSolution]], count: int, dtype: torch.dtype
) -> FrechetSolution:
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    assert len(order) == count
    solutions = [solution for _, solution in parts]

    def gather(field: str) -> Tensor:
        return torch.cat([getattr(s, field) for s in solutions])[order]

    return FrechetSolution(
        point=gather("point").to(dtype),
        objective=gather("objective"),
        gradient_norm=gather("gradient_norm"),
        iterations=gather("iterations"),
        status=gather("status"),
        weights=torch.cat([s.weights for s in solutions], 1)[:, order],
        solver=solutions[0].solver,
    )
