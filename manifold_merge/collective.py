"""A Fréchet mean whose anchors are spread over processes: federated rounds, one model per rank.

No process sees the anchors of another. What travels at each iteration is the iterate, one weighted
sum of logarithms, and a few numbers for each batch element: their sizes do not depend on how many
anchors or processes there are. To start, one point of each process comes together in the first.

The iterate and the numbers that decide about steps are those of the first process, so that machines
that round differently still take the same steps and end with the same mean, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import accurate, has_logmap, weighted_sum
from manifold_merge.anchors import checked_points, checked_weights
from manifold_merge.distributed import Team
from manifold_merge.fisher import FisherEuclidean
from manifold_merge.fisher_mean import _check_metrics
from manifold_merge.lora import LoRAQuotient
from manifold_merge.quotient import QuotientManifold
from manifold_merge.sharded import is_sharded
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.solver_dispatch import checked_solver, default_iterations
from manifold_merge.solvers import Problem, _State, weighted_median

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["collective_mean"]

SOLVERS = ("auto", "closed_form", "karcher")


def collective_mean(
    manifold: geoopt.Manifold,
    points: Tensor | Sequence[Tensor],
    weights: Sequence[float] | Tensor | None,
    process_group: ProcessGroup,
    *,
    solver: Any = "auto",
    p: int = 2,
    metrics: Any = None,
    rank: int | None = None,
    start: Tensor | None = None,
    starts: str = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    gauge_check: bool = False,
    generator: torch.Generator | None = None,
) -> FrechetSolution:
    """What ``frechet_mean(..., process_group=...)`` solves: the mean of all processes' anchors.

    Args:
        manifold: As for ``frechet_mean``; the same in every process.
        points: The anchors of this process, at least one.
        weights: Of these anchors; normalised over the anchors of all processes.
        process_group: The processes.
        solver: ``"auto"``, ``"karcher"``, or ``"closed_form"`` where the mean is a weighted sum.
        p: 2 for the mean, 1 for the median.
        metrics: ``FisherEuclidean`` metrics of the anchors here, on ``geoopt.Euclidean`` with p=2.
        rank: Rank of the mean on manifolds of low-rank products.
        start: Where to start; that of the first process counts.
        starts: ``"auto"`` or ``"anchors"``.
        tolerance: As for ``frechet_mean``.
        max_iterations: As for ``frechet_mean``.
        gauge_check: As for ``frechet_mean``.
        generator: As for ``frechet_mean``.

    Returns:
        The same mean in every process; ``weights`` are the shares of the anchors here.

    Raises:
        ValueError: In every process, if points, weights or options of any of them do not fit; the
            message numbers the process.
        RuntimeError: Another process ended before.
    """
    team = Team(process_group)

    def checked() -> tuple[list[Tensor], Tensor, str]:
        if is_sharded(points) or any(map(is_sharded, points)):
            raise ValueError(
                "points: DTensors are spread over processes already; leave process_group= out, or "
                "put them together with full_tensor()"
            )
        anchors = checked_points(manifold, points)
        name = _solver(manifold, "auto" if metrics is not None else solver, p)
        if starts not in ("auto", "anchors"):
            raise ValueError(f"starts must be 'auto' or 'anchors'; got {starts!r}")
        if metrics is not None:
            diagonal = all(isinstance(metric, FisherEuclidean) for metric in metrics)
            if not (diagonal and p == 2 and solver in ("auto", "closed_form")):
                raise ValueError(
                    "metrics: with process_group= they are FisherEuclidean metrics, p=2 and solver "
                    "'auto' or 'closed_form'; gather anchors and metrics in one process"
                )
            _check_metrics(manifold, anchors, metrics)
            for i, (metric, x) in enumerate(zip(metrics, anchors, strict=True)):
                if not _fits(metric.fisher.shape, x.shape):
                    raise ValueError(
                        f"metrics[{i}]: Fisher information of shape {tuple(metric.fisher.shape)} "
                        f"does not fit an anchor of shape {tuple(x.shape)}; collect it from that "
                        "anchor"
                    )
            if start is not None:
                raise ValueError("start: means with metrics= need none; leave it out")
        if gauge_check and not isinstance(manifold, QuotientManifold):
            raise ValueError(f"gauge_check: {manifold} is not a quotient manifold, it has no gauge")
        # Weighted sums of flat spaces have a mean with some negative weights too.
        signed = name == "closed_form" and metrics is None
        return (
            anchors,
            checked_weights(weights, len(anchors), like=anchors[0], negative=signed),
            name,
        )

    anchors, w, name = team.agree(checked)
    ndim = int(manifold.ndim)
    low_rank = isinstance(manifold, LoRAQuotient)
    first = anchors[0]
    batch = first.shape[: first.ndim - ndim]
    team.same(
        {
            "manifold": str(manifold),
            "manifold (parameters)": _parameters(manifold),
            "points (dtype)": str(first.dtype),
            "points (batch shape)": tuple(batch),
            # Ranks of adapters may differ.
            "points (shape)": tuple(first.shape[len(batch) : first.ndim - low_rank]),
            "weights (given)": weights is not None,
            "metrics (given)": metrics is not None,
            "weights (dimensions)": w.ndim,
            "solver": name,
            "p": p,
            "rank": rank,
            "start (given)": start is not None,
            "starts": starts,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "gauge_check": gauge_check,
        }
    )
    dtype = first.dtype
    space: Any = accurate(manifold)
    if isinstance(manifold, QuotientManifold) and first.device.type != "mps":
        anchors = [x.double() for x in anchors]  # as in the core of a mean in one process
        w = w.double()
    width = max([rank or 0, *team.collect(max(x.shape[-1] for x in anchors))])
    if low_rank:
        anchors = [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in anchors]

    def prepared() -> Tensor:
        limit = min(manifold.out_features, manifold.in_features) if low_rank else 0
        if rank is not None and not low_rank:
            raise ValueError(
                f"rank: with process_group= it can be chosen on a LoRAQuotient only, not on "
                f"{manifold}; leave it out"
            )
        if rank is not None and not 1 <= rank <= limit:
            raise ValueError(f"rank: expected 1 <= rank <= {limit} = min(m, n), got {rank}")
        if any(x.shape != anchors[0].shape for x in anchors) or anchors[0].shape[-1] != width:
            raise ValueError(
                f"points: on {manifold} all anchors need one shape with process_group=; got "
                f"{sorted({tuple(x.shape) for x in anchors})}, and {width} columns elsewhere"
            )
        if start is not None:
            wanted = (*anchors[0].shape[:-1], rank or width) if low_rank else anchors[0].shape
            if tuple(start.shape) != tuple(wanted):
                raise ValueError(f"start: expected shape {tuple(wanted)}, got {tuple(start.shape)}")
        spread = w.reshape((*w.shape, *(1,) * (len(batch) + 1 - w.ndim)))
        if not _fits(spread.shape[1:], batch):
            raise ValueError(
                f"weights: shape {tuple(w.shape)} does not fit anchors of batch shape "
                f"{tuple(batch)}; give ({len(anchors)},) or {(len(anchors), *batch)}"
            )
        if not batch.numel():
            raise ValueError(f"points: the batch of shape {tuple(batch)} is empty; skip this call")
        return spread.expand(len(anchors), *batch).reshape(len(anchors), -1)

    flat_weights = team.agree(prepared)
    (sums,) = team.total(flat_weights.sum(0))
    if not bool((sums > 0).all()):
        raise ValueError(
            f"weights: their sum over all processes must be positive, got {sums.amin():.6g}; a sum "
            "without normalisation is not a mean"
        )
    shares = flat_weights / sums
    own = w / sums[0] if w.ndim == 1 else shares.reshape(len(shares), *batch)
    if metrics is not None:
        return dataclasses.replace(
            _fisher_mean(team, anchors, metrics, shares.reshape(len(shares), *batch)), weights=own
        )
    point = anchors[0].shape[len(batch) :]
    present = shares.flatten(1).any(1)  # an anchor without weight takes no part
    kept = [x.reshape(-1, *point) for x, here in zip(anchors, present, strict=True) if here]
    problem = _CollectiveProblem(
        space,
        torch.stack(kept) if kept else anchors[0].new_empty(0, shares.shape[1], *point),
        shares[present],
        p,
        rank,
        torch.finfo(dtype).eps ** (2 / 3) if tolerance is None else tolerance,
        default_iterations(name) if max_iterations is None else max_iterations,
        team,
    )
    if name == "closed_form":
        result = problem.closed_form()
    else:
        if start is None:
            begin = problem.starts(starts)
        else:
            given = team.broadcast(start.detach().to(anchors[0]))
            begin = [given.reshape(-1, *given.shape[len(batch) :])]
        result = problem.best_of(begin, problem.karcher)
    team.agree(lambda: None)  # raises what was held back after the last sum
    result = dataclasses.replace(
        result,
        point=result.point.reshape(*batch, *result.point.shape[1:]).to(dtype),
        objective=result.objective.reshape(batch),
        gradient_norm=result.gradient_norm.reshape(batch),
        iterations=result.iterations.reshape(batch),
        status=result.status.reshape(batch),
        weights=own,
        solver=name,
    )
    if gauge_check:
        quotient: Any = manifold
        moved = team.agree(
            lambda: [
                quotient.random_representative(x, generator=generator, condition=100.0).to(dtype)
                for x in anchors
            ]
        )
        other = collective_mean(
            manifold, moved, weights, process_group, solver=solver, p=p,
            rank=rank, start=start, starts=starts, tolerance=tolerance,
            max_iterations=max_iterations,
        )  # fmt: skip
        residual = quotient.relative_difference(result.point, other.point)
        result = dataclasses.replace(result, gauge_residual=residual)
    return result


def _fisher_mean(
    team: Team, anchors: list[Tensor], metrics: Sequence[FisherEuclidean], shares: Tensor
) -> FrechetSolution:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ, both sums over all processes (arXiv:2111.09832)."""
    dims = tuple(range(-metrics[0].ndim, 0))
    scaled = [
        (share.reshape(*share.shape, *(1,) * len(dims)) * metric.fisher.to(x)).expand_as(x)
        for share, metric, x in zip(shares, metrics, anchors, strict=True)
    ]
    pulls = [f * x for f, x in zip(scaled, anchors, strict=True)]
    weight, pull = team.total(torch.stack(scaled).sum(0), torch.stack(pulls).sum(0))
    mean = team.broadcast(pull / weight)
    steps = [f * (x - mean) for f, x in zip(scaled, anchors, strict=True)]
    squares = [u * (x - mean) for u, x in zip(steps, anchors, strict=True)]
    squared, residual = team.total(torch.stack(squares).sum(0), torch.stack(steps).sum(0))
    # A sum over no dimension is one over all of them.
    objective, raised = (x.sum(dims) if dims else x for x in (squared, residual**2 / weight))
    nothing = torch.zeros(objective.shape, dtype=torch.long, device=mean.device)
    return FrechetSolution(
        point=mean,
        objective=objective,
        gradient_norm=raised.sqrt(),
        iterations=nothing,
        status=torch.full_like(nothing, Status.CONVERGED),
        weights=shares,
        solver="closed_form",
    )


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, wanted) == wanted
    except RuntimeError:
        return False


def _parameters(manifold: geoopt.Manifold) -> dict[str, Any]:
    """Curvature, scale and the like, which the name of a manifold does not say."""
    found: dict[str, Any] = {}
    for name, x in manifold.state_dict().items():
        values = x.detach().cpu().contiguous()
        few = values.numel() <= 8
        found[name] = (
            values.tolist() if few else hashlib.sha256(repr(values.tolist()).encode()).hexdigest()
        )
    return found


def _solver(manifold: geoopt.Manifold, solver: Any, p: int) -> str:
    """Which of the solvers runs."""
    if p not in (1, 2):
        raise ValueError(f"p must be 2 (mean) or 1 (median); got {p!r}")
    checked_solver(solver, manifold)
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(
            f"solver={solver!r}: with process_group= the solvers are {', '.join(SOLVERS)}; others "
            "need all anchors in one process"
        )
    flat = isinstance(manifold, geoopt.Euclidean)
    if solver == "closed_form" and not (flat and p == 2):
        raise ValueError(
            "solver='closed_form': with process_group= it is for means that are weighted sums "
            f"(p=2 on geoopt.Euclidean), got p={p} on {manifold}; use 'karcher'"
        )
    if flat and p == 2 and solver == "auto":
        return "closed_form"
    if not has_logmap(accurate(manifold)):
        raise NotImplementedError(
            f"{manifold} has no logmap, whose weighted sum is what processes exchange; gather the "
            "anchors in one process"
        )
    return "closed_form" if solver == "closed_form" else "karcher"


@dataclasses.dataclass
class _CollectiveProblem(Problem):
    """A problem whose anchors here, maybe none, are some of all."""

    team: Team

    def _sizes(self) -> Tensor:
        sizes = self.weights[:0]
        with self.team.may_fail():
            if len(self.points):
                sizes = super()._sizes()
        return sizes

    def evaluate(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        guess: Tensor | None = None,
        precise: bool = True,
    ) -> _State:
        """Objective and descent direction at the first process's ``x``, ``(L', *point)``."""
        state = super().evaluate(self.team.broadcast(x), rows, guess, precise)
        # Equal numbers mean equal decisions, whatever each machine's rounding.
        names = ("objective", "gradient_norm", "scale", "stiffness")
        numbers = self.team.broadcast(torch.stack([getattr(state, name) for name in names]))
        return dataclasses.replace(state, **dict(zip(names, numbers, strict=True)))

    def _dist2_logs(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        guess: Tensor | None = None,
        precise: bool = True,
    ) -> tuple[Tensor, Tensor]:
        count = len(self.points)
        if count:
            with self.team.may_fail():
                return super()._dist2_logs(x, rows, guess, precise)
        return x.new_zeros(count, len(x)), x.new_zeros(count, *x.shape)

    def _total(self, *sums: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.team.total(*sums))

    def _middle(self, weights: Tensor, values: Tensor) -> Tensor:
        parts = self.team.collect((weights.cpu(), values.cpu()))
        everyone = [torch.cat(x).to(values.device) for x in zip(*parts, strict=True)]
        return weighted_median(*everyone)

    def _greatest(self, values: Tensor) -> Tensor:
        own = values.amax(0) if len(values) else values.new_zeros(values.shape[1:])
        return self.team.greatest(own)

    def _norm(self, x: Tensor, direction: Tensor) -> Tensor:
        with self.team.may_fail():
            return super()._norm(x, direction)
        return direction.new_zeros(len(direction))

    def _moved(self, step: Callable[..., Tensor], x: Tensor, direction: Tensor) -> Tensor:
        with self.team.may_fail():
            return super()._moved(step, x, direction)
        return x

    def _squares(self, state: _State) -> tuple[Tensor, Tensor]:
        if len(self.points):
            with self.team.may_fail():
                return super()._squares(state)
        nothing = state.objective.new_zeros(len(self.points), len(state.objective))
        return nothing, nothing

    def _paths(self, state: _State) -> dict[str, int]:
        if not hasattr(self.manifold, "log_path"):
            return {}
        own: dict[str, int] = {}
        with self.team.may_fail():
            if len(self.points):
                own = super()._paths(state)
        counts = [own.get(name, 0) for name in self.manifold.path_names.values()]
        (total,) = self.team.total(torch.tensor(counts, dtype=torch.float64))
        names = self.manifold.path_names.values()
        return {name: int(count) for name, count in zip(names, total, strict=True)}

    def closed_form(self) -> FrechetSolution:
        """The weighted sum."""
        own = self.points.new_zeros(self.points.shape[1:])
        if len(self.points):
            own = weighted_sum(self.weights, self.points)
        (mean,) = self._total(own)
        count = torch.zeros(len(mean), dtype=torch.long, device=mean.device)
        return self.solution(self.evaluate(mean), count, torch.full_like(count, Status.CONVERGED))

    def starts(self, which: str) -> list[Tensor]:
        """Starting points; the same in every process."""
        symmetric = self._symmetric_start()
        same_shape = symmetric is None or symmetric.shape[1:] == self.points.shape[2:]
        if which == "anchors" and not same_shape:
            raise ValueError(
                "starts='anchors': the anchors do not have the rank of the mean; leave out `rank`"
            )
        if which == "auto" and symmetric is not None:
            return [symmetric]
        if which == "auto":
            best: Tensor | None = None
            least: Tensor | None = None
            for x in self._anchors():
                objective = self.evaluate(x).objective
                if best is None or least is None:
                    best, least = x, objective
                    continue
                closer = objective < least
                best = torch.where(closer.reshape(-1, *(1,) * (x.ndim - 1)), x, best)
                least = torch.where(closer, objective, least)
            assert best is not None
            return [best]
        return [*([] if symmetric is None else [symmetric]), *self._anchors()]

    def _anchors(self) -> list[Tensor]:
        """All anchors, process by process."""
        counts = self.team.collect(len(self.points))
        empty = torch.empty(self.points.shape[1:], dtype=self.points.dtype).to(self.points)
        return [
            self.team.broadcast(self.points[i] if source == self.team.rank else empty, source)
            for source, count in enumerate(counts)
            for i in range(count)
        ]

    def _symmetric_start(self) -> Tensor | None:
        """The manifold's own start for one point of each process, where it has one."""
        if isinstance(self.manifold, geoopt.Euclidean):
            own = self.points.new_zeros(self.points.shape[1:])
            if len(self.points):
                own = weighted_sum(self.weights, self.points)
            return self._total(own)[0]
        if not hasattr(self.manifold, "start_mean"):
            return None
        totals = self.weights.sum(0)
        shares = torch.where(totals > 0, self.weights / torch.where(totals > 0, totals, 1.0), 0.0)

        def here() -> Tensor | None:
            if len(self.points) < 2:
                return (
                    self.points[0]
                    if len(self.points)
                    else self.points.new_zeros(self.points.shape[1:])
                )
            shares[:, totals <= 0] = 1 / len(shares)
            own: Tensor | None = self.manifold.start_mean(self.points, shares, None)
            return own

        start = self.team.agree(here)
        if any(self.team.collect(start is None)):
            return None
        assert start is not None
        gathered, weights = self.team.gather(start), self.team.gather(totals)

        def together() -> Tensor | None:
            if gathered is None or weights is None:
                return None
            used = [i for i, w in enumerate(weights) if bool(w.any())]
            points = torch.stack([gathered[i] for i in used])
            joint: Tensor | None = self.manifold.start_mean(
                points, torch.stack([weights[i] for i in used]), self.rank
            )
            return None if joint is None or not bool(joint.isfinite().all()) else joint

        joint = self.team.agree(together)
        shape = self.team.collect(None if joint is None else tuple(joint.shape))[0]
        if shape is None:
            return None
        return self.team.broadcast(self.points.new_empty(shape) if joint is None else joint)
