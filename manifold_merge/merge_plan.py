"""A checked request to merge adapters, and how each group of modules is merged."""

from __future__ import annotations

import builtins
import dataclasses
import fnmatch
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_merge._version import __version__
from manifold_merge.adapter_sets import (
    ModuleGroup,
    group_modules,
)
from manifold_merge.adapters import Adapter
from manifold_merge.distributed import from_first, in_turn
from manifold_merge.frechet import frechet_mean, normalized_weights
from manifold_merge.lift import lifted_mean
from manifold_merge.lora import DISTANCES, LoRAQuotient
from manifold_merge.lora_metrics import METRICS
from manifold_merge.merge_extras import (
    check_weights,
    least_cosine,
    mean_of_extras,
    weighted_sum,
)
from manifold_merge.merge_fisher import AdapterMetrics, Errors, has_statistics
from manifold_merge.merge_result import Tally
from manifold_merge.rank_choice import RankChoice, choose_rank, parse_auto, truncation_losses
from manifold_merge.solution import FrechetSolution
from manifold_merge.statistics import Statistics
from manifold_merge.transforms import Transform, parse_transform, with_norm

__all__ = ["DEFAULT_BUDGET", "GEOMETRIES", "MergePlan"]

logger = logging.getLogger(__name__)

GEOMETRIES = ("auto", "lifted", *METRICS, "polar", "fisher")
# In the model "shared + own part", a cosine of one half says that half of the energy of an update
# is shared. From there on adapters are taken for variants of one task. Measured on MiniLM adapters:
# up to .06 between tasks, .10 to .21 between seeds of one task, above .33 for noisy copies.
CLOSE_COSINE = 0.5
# Bytes of factors that are worked on at a time.
DEFAULT_BUDGET = 256 * 2**20

Path_ = str | os.PathLike[str]
Factors = tuple[Tensor, Tensor]


@dataclasses.dataclass
class MergePlan:
    """A checked request, and how each group of modules is merged."""

    adapters: list[Adapter]
    weights: list[float]
    layer_weights: dict[str, list[float]]
    geometry: str
    distance: str | None
    rank: int | str | None
    scale: float | str
    transform: str | Transform | None
    p: int
    sum: bool
    missing: str
    extras: str
    device: torch.device
    gauge_check: bool
    max_bytes: int
    statistics: Sequence[Path_ | Statistics] | None
    metric_options: dict[str, Any]
    metrics: AdapterMetrics | None = None
    closeness: float = float("nan")
    reason: str = ""
    rank_choice: RankChoice | None = None
    rank_reason: str = ""

    @classmethod
    def make(cls, adapters: list[Adapter], **options: Any) -> MergePlan:
        """Check the options of ``merge_adapters``, before any file is read."""
        count = len(adapters)
        if not count:
            raise ValueError("adapters is empty; give at least one folder")
        geometry, distance, rank = (options[k] for k in ("geometry", "distance", "rank"))
        if geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}; got {geometry!r}")
        if distance is not None and distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
        if geometry in ("lifted", "fisher") and distance is not None:
            raise ValueError(
                f"distance={distance!r}: geometry={geometry!r} brings its own distance; leave it "
                "out"
            )
        known = rank is None or rank == "full" or parse_auto(rank) is not None
        if not (known or (isinstance(rank, int) and rank >= 1)):
            raise ValueError(f"rank: expected a positive integer, 'full' or 'auto', got {rank!r}")
        if options["p"] not in (1, 2):
            raise ValueError(f"p must be 2 (mean) or 1 (median); got {options['p']!r}")
        scale, transform = options["scale"], options["transform"]
        if isinstance(transform, str):
            parse_transform(transform)
        if scale != "norm" and (isinstance(scale, str) or not math.isfinite(float(scale))):
            raise ValueError(f"scale: expected a finite number or 'norm', got {scale!r}")
        weights = options.pop("weights")
        options["layer_weights"] = dict(options["layer_weights"] or {})
        chordal = options["sum"] or distance == "chordal"
        for what, given in [("weights", weights), *options["layer_weights"].items()]:
            if given is not None:
                check_weights(what, given, count, chordal=chordal, sum=options["sum"])
        if options["sum"]:
            if distance not in (None, "chordal") or geometry in ("lifted", "polar", "fisher"):
                raise ValueError(
                    "sum=True: a sum is the solution of the chordal geometry only; leave "
                    "geometry and distance out, or give distance='chordal'"
                )
            if transform is not None or scale == "norm":
                raise ValueError("sum=True: a sum has neither transform= nor scale='norm'")
            if options["p"] == 1:
                raise ValueError("sum=True and p=1 contradict each other: a median is not a sum")
        device = options.pop("device")
        wants_cuda = device is not None and torch.device(device).type == "cuda"
        if wants_cuda and not torch.cuda.is_available():
            raise ValueError(f"device={device!r}: no CUDA device is available here")
        return cls(
            adapters,
            [1.0] * count if weights is None else [float(w) for w in weights],
            device=torch.device(device or "cpu"),
            **options,
        )

    # --- the decision ----------------------------------------------------------------------------

    def decide(self) -> None:
        """Measure closeness and settle geometry and distance."""
        self.closeness = (
            least_cosine(self.adapters, self.weights, self._points)
            if len(self.adapters) > 1
            else 1.0
        )
        close = self.closeness >= CLOSE_COSINE
        said = f"least pairwise cosine {self.closeness:.2f}"
        calibrated = self.statistics is not None or all(map(has_statistics, self.adapters))
        if self.sum:
            self.geometry, self.distance = "embedded", "chordal"
            self.reason = "sum"
        elif self.geometry == "auto":
            if calibrated and self.distance is None:
                self.geometry = "fisher"
                # Least squares: no other geometry, rank or scale has a lower predicted error.
                self.reason = "statistics of every adapter: least predicted error of outputs"
            elif len(self.adapters) == 1 and self.distance is None:
                self.geometry, self.distance = "embedded", "chordal"  # it is its own mean
                self.reason = "there is one adapter"
            elif close or self.distance is not None:
                self.geometry = "mixed"
                self.reason = f"{said}: variants of one task" if close else "distance was given"
            else:
                self.geometry = "lifted"
                self.reason = f"{said}: far apart, as adapters of different tasks are"
            if self.p == 1 and self.geometry == "lifted":
                self.geometry, self.reason = "embedded", f"{said}, median"
        else:
            self.reason = "given"
        if self.p == 1 and self.geometry == "lifted":
            raise ValueError("p=1: geometry='lifted' has a mean only; use geometry='embedded'")
        if self.geometry == "fisher":
            options = {**self.metric_options, "device": self.device}
            self.metrics = AdapterMetrics.load(self.adapters, self.statistics, **options)
        elif self.distance is None and self.geometry != "lifted":
            # The median needs many iterations, which only chords make cheap.
            self.distance = "exact" if close and self.p == 2 else "chordal"
            if self.reason == "given":
                self.reason = f"geometry was given; {said}"
        logger.info("geometry %s (%s)", self.geometry, self.reason)

    # --- the rank --------------------------------------------------------------------------------

    def decide_rank(self, progress: Callable[[int], None]) -> None:
        """Settle ``rank="auto"``, from the unconstrained merge of every module."""
        tolerance = parse_auto(self.rank)
        if tolerance is None:
            return
        if self.passes == 1:
            # Such distances are between products of one rank, so there is nothing to choose.
            self.rank = None
            self.rank_reason = f"{self.distance} distances are between products of equal rank"
        else:
            losses: dict[str, list[float]] = {}
            for (_, names, _), found in in_turn(self._pieces(), self._losses_of_piece):
                losses |= found
                progress(len(names))
            choice = choose_rank(losses, tolerance, calibrated=self.metrics is not None)
            self.rank_choice = from_first(choice)
            self.rank, self.rank_reason = self.rank_choice.rank, self.rank_choice.reason
        logger.info("rank %s (%s)", self._rank_name, self.rank_reason)

    @property
    def passes(self) -> int:
        """How often each module is merged."""
        chosen = parse_auto(self.rank) is not None and self.distance not in ("exact", "aligned")
        return 2 if chosen else 1

    def _losses_of_piece(
        self, piece: tuple[ModuleGroup, list[str], list[float]]
    ) -> dict[str, list[float]]:
        losses: dict[str, list[float]] = {}
        self._merge_chunk(*piece, losses)
        for adapter in self.adapters:
            adapter.release()
        if self.metrics is not None:
            self.metrics.take_errors()  # they are those of the merge at the rank chosen
        return losses

    @property
    def _rank_name(self) -> int | str:
        full = self.geometry in ("lifted", "fisher")
        return self.rank or ("full" if full else "greatest of inputs")

    @property
    def _reasons(self) -> dict[str, str]:
        """Why this rank and this scale."""
        defaults = {
            "fisher": (
                "no lower rank has a lower predicted error",
                "least squares have none to tune",
            ),
            "lifted": ("each adapter keeps its directions", "the mean keeps their norm"),
        }
        rank, scale = defaults.get(self.geometry, ("that of the inputs", "a mean has none"))
        return {
            "rank_chosen_because": self.rank_reason or ("given" if self.rank else rank),
            "scale_chosen_because": "given" if self.scale != 1 else scale,
        }

    # --- modules ---------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[ModuleGroup, list[str], list[float]]]:
        """Groups, names of some of their modules, and the weights of those."""
        for group in group_modules(self.adapters):
            for names, weights in self._chunks(group):
                yield group, names, weights

    def merge_modules(
        self, tally: Tally, progress: Callable[[int], None]
    ) -> Iterator[tuple[str, Factors]]:
        """Merged factors of all modules, in order; of none on any process but the first."""
        for (group, names, _), (solution, errors) in in_turn(self._pieces(), self._merge_piece):
            tally.add(solution)
            if self.metrics is not None:
                self.metrics.add_errors(errors)
            b, a = self._manifold(group.out_features, group.in_features).unpack(solution.point)
            for i, name in enumerate(names):
                yield name, (b[i] if self._factor == 1 else b[i] * self._factor, a[i])
            progress(len(names))

    def _merge_piece(
        self, piece: tuple[ModuleGroup, list[str], list[float]]
    ) -> tuple[FrechetSolution, Errors]:
        solution = self._merge_chunk(*piece)
        for adapter in self.adapters:
            adapter.release()
        return solution, {} if self.metrics is None else self.metrics.take_errors()

    @property
    def _predicted(self) -> dict[str, Any]:
        """Predicted output errors, once modules have been merged."""
        errors = [] if self.metrics is None else self.metrics.output_errors
        return {"output_errors": errors} if any(errors) else {}

    @property
    def _factor(self) -> float:
        return 1.0 if isinstance(self.scale, str) else self.scale

    def _chunks(self, group: ModuleGroup) -> Iterator[tuple[list[str], list[float]]]:
        """Modules of one group that fit into the budget and share their weights."""
        # Stored factors, their float64 copies, Gram matrices and the result.
        width = builtins.sum(group.ranks)
        bytes_each = 24 * (group.out_features + group.in_features) * width + 64 * width**2
        limit = max(1, self.max_bytes // max(bytes_each, 1))
        by_weights: dict[tuple[float, ...], list[str]] = {}
        for name in group.names:
            by_weights.setdefault(tuple(self._weights_of(name)), []).append(name)
        for weights, names in by_weights.items():
            for i in range(0, len(names), limit):
                yield names[i : i + limit], list(weights)

    def _weights_of(self, name: str) -> list[float]:
        for pattern, weights in self.layer_weights.items():
            if fnmatch.fnmatchcase(name, pattern):
                return [float(w) for w in weights]
        return self.weights

    def _merge_chunk(
        self,
        group: ModuleGroup,
        names: list[str],
        weights: list[float],
        losses: dict[str, list[float]] | None = None,
    ) -> FrechetSolution:
        """The merge of some modules; into ``losses`` goes what each rank below full would lose."""
        m, n = group.out_features, group.in_features
        present = [i for i, r in enumerate(group.ranks) if r]
        manifold = self._manifold(m, n)
        who = [[i] for i in present]
        points = [self._points(self.adapters[i], group, names, manifold) for i in present]
        used = [weights[i] for i in present]
        absent = [w for i, w in enumerate(weights) if i not in present]
        if absent and self.missing == "zero":
            points.append(torch.zeros_like(points[0]))
            used.append(builtins.sum(absent))
            who.append([i for i in range(len(weights)) if i not in present])
        limit = min(m, n, builtins.sum(group.ranks))  # a mean lies in the span of its anchors
        rank: int | None = None if isinstance(self.rank, str) else self.rank
        if isinstance(self.rank, str):  # full, or about to be chosen
            rank = limit
        rank = None if rank is None else min(rank, limit)
        fisher: Callable[[list[Tensor]], FrechetSolution] | None = None
        if self.metrics is not None:
            fisher = functools.partial(
                self.metrics.mean, manifold, weights=used, names=names, who=who, rank=rank,
                p=self.p, adapter_weights=weights, losses=losses,
            )  # fmt: skip
        if losses is None:
            return self._solve(manifold, points, used, rank, fisher)
        solution = self._solve(manifold, points, used, rank, fisher, check=False)
        if self.metrics is None:
            b, a = manifold.unpack(solution.point)
            losses.update(zip(names, truncation_losses((b, a.mT)).tolist(), strict=True))
        return solution

    def _solve(
        self,
        manifold: Any,
        points: list[Tensor],
        weights: list[float],
        rank: int | None,
        fisher: Callable[[list[Tensor]], FrechetSolution] | None,
        *,
        check: bool = True,
    ) -> FrechetSolution:
        def solve(anchors: list[Tensor]) -> FrechetSolution:
            given = anchors
            w = torch.tensor(weights, dtype=torch.float64)
            if self.transform is not None:
                named = isinstance(self.transform, str)
                change = parse_transform(self.transform) if named else self.transform  # type: ignore[arg-type]
                anchors = change(manifold, anchors, w)  # type: ignore[operator]
            solution = mean(anchors)
            if self.scale == "norm":
                point = with_norm(manifold, solution.point, given, w)
                solution = dataclasses.replace(solution, point=point)
            return solution

        def mean(anchors: list[Tensor]) -> FrechetSolution:
            if fisher is not None:
                return fisher(anchors)
            if self.sum:
                return weighted_sum(manifold, anchors, weights, rank)
            if self.geometry == "lifted":
                return lifted_mean(manifold, anchors, weights, rank=rank)
            return frechet_mean(manifold, anchors, weights, p=self.p, rank=rank)

        if not any(weights) and not self.sum:
            weights[:] = [1.0] * len(weights)  # all weight lies on adapters without this module
            points[:] = [torch.zeros_like(x) for x in points]
        solution = solve(points)
        if self.gauge_check and check:
            generator = torch.Generator(device=points[0].device).manual_seed(0)
            moved = [
                manifold.random_representative(x, generator=generator, condition=100.0)
                for x in points
            ]
            residual = manifold.relative_difference(solution.point, solve(moved).point)
            solution = dataclasses.replace(solution, gauge_residual=residual)
        return solution

    def _manifold(self, m: int, n: int) -> Any:
        if self.geometry == "polar":
            from manifold_merge.polar import PolarLoRAQuotient

            return PolarLoRAQuotient(m, n, distance=self.distance or "chordal")
        if self.geometry in ("lifted", "fisher"):
            return LoRAQuotient(m, n)
        return LoRAQuotient(m, n, metric=self.geometry, distance=self.distance or "chordal")

    def _points(
        self, adapter: Adapter, group: ModuleGroup, names: Sequence[str], manifold: Any
    ) -> Tensor:
        stored = [adapter.modules[name].dtype for name in names]
        dtype = functools.reduce(torch.promote_types, stored, torch.float32)
        dtype = torch.float32 if self.device.type == "mps" else dtype  # which has no float64
        m, rank = group.out_features, adapter.modules[names[0]].rank
        stacked = torch.empty(
            len(names), m + group.in_features, rank, dtype=dtype, device=self.device
        )
        for name, x in zip(names, stacked, strict=True):
            adapter.read_factors(name, (x[:m], x[m:].mT))
        if isinstance(manifold, LoRAQuotient):  # its points are these stacks
            return stacked
        points: Tensor = manifold.pack(stacked[:, :m], stacked[:, m:].mT)
        return points

    # --- extras and the card ---------------------------------------------------------------------

    def merge_extras(self) -> dict[str, Tensor]:
        """Biases and fully trained modules by name."""
        if self.extras == "drop":
            return {}
        return mean_of_extras(
            self.adapters, self._weights_of, missing=self.missing, sum=self.sum, p=self.p,
            scale=self._factor, device=self.device,
        )  # fmt: skip

    @property
    def recipe(self) -> dict[str, Any]:
        """All options, and what was decided."""
        shown = self.weights
        if not self.sum:
            like = torch.zeros(1, dtype=torch.float64)
            shown = normalized_weights(
                self.weights, len(self.weights), like=like, negative=True
            ).tolist()
        return {
            "manifold_merge": __version__,
            "adapters": [a.path.resolve().name for a in self.adapters],
            "weights": shown,
            "layer_weights": self.layer_weights,
            "geometry": self.geometry,
            "distance": self.distance,
            "chosen_because": self.reason,
            "closeness": self.closeness,
            "rank": self._rank_name,
            **self._reasons,
            **({} if self.rank_choice is None else {"rank_choice": self.rank_choice.recipe}),
            **({} if self.metrics is None else {"statistics": self.metrics.recipe}),
            **self._predicted,
            "scale": self.scale,
            **({} if self.transform is None else {"transform": str(self.transform)}),
            "p": self.p,
            "sum": self.sum,
            "missing": self.missing,
            "extras": self.extras,
        }
