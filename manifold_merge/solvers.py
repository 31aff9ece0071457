"""Solvers of the Fréchet problem on a flat batch: closed forms and Karcher's iteration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import geoopt
import torch
from torch import Tensor

from manifold_merge.accurate import (
    dist2_logmap,
    has_logmap,
    inner,
    norm,
    unit_length,
    weighted_sum,
)
from manifold_merge.quotient import QuotientManifold
from manifold_merge.solution import FrechetSolution, Status

__all__ = ["Problem", "closed_form_of"]

MAX_HALVINGS = 12
# Relative gradient norm down to which rough logarithms serve.
ROUGH = 1e-3
# A point, or None where the solver chooses.
Start = TypeVar("Start", Tensor, Tensor | None)


def closed_form_of(manifold: geoopt.Manifold) -> Callable[..., Tensor] | None:
    """The function (points, weights, rank) -> mean, where the manifold has one."""
    if isinstance(manifold, geoopt.Euclidean):
        return lambda points, weights, rank: weighted_sum(weights, points)
    if isinstance(manifold, QuotientManifold) and manifold.has_closed_form_mean:
        return manifold.closed_form_mean
    return None


def _spread(weights: Tensor, points: Tensor) -> Tensor:
    """Append dimensions of size 1 until ``weights`` broadcasts against ``points``."""
    return weights.reshape((*weights.shape, *(1,) * (points.ndim - weights.ndim)))


@dataclasses.dataclass
class _State:
    """One iterate of some batch elements: point, objective, gradient norm and step direction."""

    point: Tensor
    objective: Tensor
    gradient_norm: Tensor
    direction: Tensor
    scale: Tensor  # root mean squared distance of the anchors: the yardstick of the tolerance
    logs: Tensor  # (L, k, *point), the logarithms that the direction was made of
    stiffness: Tensor  # the gradient of the cost is -stiffness * direction
    floor: Tensor  # a gradient that rounding explains

    def rows(self, index: Tensor) -> _State:
        return _State(*(value[index] for value in vars(self).values()))

    def put(self, index: Tensor, other: _State) -> None:
        for name, value in vars(other).items():
            getattr(self, name)[index] = value


@dataclasses.dataclass
class Problem:
    """Anchors ``(k, L, *point)`` with weights ``(k, L)``: L means solved side by side."""

    manifold: Any
    points: Tensor
    weights: Tensor
    p: int
    rank: int | None
    tolerance: float
    max_iterations: int

    @functools.cached_property
    def floor(self) -> Tensor:
        """Gradient norms that are round-off, ``(L,)``: copies of one point have a mean too."""
        if not self.tolerance:
            return torch.zeros_like(self.weights[0])
        return self._rounding(self._greatest(self._sizes()))

    @functools.cached_property
    def resolution(self) -> Tensor:
        """Distances that are round-off, ``(L,)``, whatever a minority of the anchors may be."""
        return self._rounding(self._middle(self.weights, self._sizes()))

    def _sizes(self) -> Tensor:
        tangent = self.manifold.proju(self.points, self.points)
        return norm(self.manifold, self.points, tangent).nan_to_num(0.0)

    def _rounding(self, size: Tensor) -> Tensor:
        return 100 * torch.finfo(size.dtype).eps * (size + unit_length(self.manifold))

    def _reach(self, weights: Tensor, distances: Tensor, rows: Tensor | None = None) -> Tensor:
        """Distances within which an anchor is taken to be at the iterate, ``(L,)``.

        They are relative to those of the anchors with half of the weight: an outlier, however far
        away, must not make the others look as if they were one point.
        """
        nothing = self.resolution if rows is None else self.resolution[rows]
        return nothing + 1e-9 * self._middle(weights, distances)

    def evaluate(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        guess: Tensor | None = None,
        precise: bool = True,
    ) -> _State:
        """Objective and descent direction at ``x``, ``(L', *point)``, of the elements ``rows``."""
        weights = self.weights if rows is None else self.weights[:, rows]
        floor = self.floor if rows is None else self.floor[rows]
        squared, logs = self._dist2_logs(x, rows, guess, precise)
        spread = (weights.abs() * squared.clamp(min=0)).sum(0)
        if self.p == 2:
            direction, objective, spread = self._total(
                weighted_sum(weights, logs), (weights * squared).sum(0), spread
            )
            scale = spread.sqrt()
            size, one = self._norm(x, direction), torch.ones_like(objective)
            return _State(x, objective, size, direction, scale, logs.movedim(0, 1), one, floor)
        distances = squared.clamp(min=0).sqrt()
        pull, here = _median_pull(weights, distances, self._reach(weights, distances, rows))
        # An anchor at x balances any pull up to its own weight (Kuhn 1973).
        direction, balanced, total, objective, spread = self._total(
            weighted_sum(pull, logs), (weights * here).sum(0), pull.sum(0),
            (weights * distances).sum(0), spread,
        )  # fmt: skip
        scale = spread.sqrt()
        excess = (self._norm(x, direction) - balanced).clamp(min=0)
        direction = direction / _spread(torch.where(total > 0, total, 1.0), direction)
        # The median's gradient has no unit; scaling makes it comparable with that of the mean.
        logs = logs.movedim(0, 1)
        return _State(x, objective, excess * scale, direction, scale, logs, total, floor)

    # The anchors may be spread over processes: whatever is summed over them goes through the first
    # two of these, and what one process does to the iterate, where others wait, through the others.

    def _total(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sums over all anchors, from those over the anchors here."""
        return sums

    def _middle(self, weights: Tensor, values: Tensor) -> Tensor:
        """Weighted median over all anchors, ``(...)``, of values of the anchors here."""
        return weighted_median(weights, values)

    def _greatest(self, values: Tensor) -> Tensor:
        """Maximum over all anchors, ``(...)``, of values of the anchors here, ``(k, ...)``."""
        return values.amax(0)

    def _norm(self, x: Tensor, direction: Tensor) -> Tensor:
        return norm(self.manifold, x, direction)

    def _moved(self, step: Callable[..., Tensor], x: Tensor, direction: Tensor) -> Tensor:
        return step(x, direction)

    def cost(self, state: _State) -> Tensor:
        """½ Σ wᵢ dᵢ² or Σ wᵢ dᵢ, whose gradient is ``-stiffness * direction``."""
        return 0.5 * state.objective if self.p == 2 else state.objective

    def _dist2_logs(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        guess: Tensor | None = None,
        precise: bool = True,
    ) -> tuple[Tensor, Tensor]:
        points = self.points if rows is None else self.points[:, rows]
        if isinstance(self.manifold, QuotientManifold):
            stacked = x.expand(len(points), *x.shape)
            return self.manifold.dist2_logmap(stacked, points, guess=guess, precise=precise)
        return dist2_logmap(self.manifold, x[None], points)

    def starts(self, which: str) -> list[Tensor]:
        """Starting points; the set is the same for any order of the anchors."""
        symmetric = None
        if hasattr(self.manifold, "start_mean"):
            symmetric = self.manifold.start_mean(self.points, self.weights, self.rank)
        same_shape = symmetric is None or symmetric.shape == self.points[0].shape
        if which == "anchors" and not same_shape:
            raise ValueError(
                "starts='anchors': the anchors do not have the rank of the mean; leave out `rank`"
            )
        if symmetric is not None and not bool(symmetric.isfinite().all()):
            symmetric = None  # opposite points of a sphere, for one, have no mean direction
        anchors = list(self.points) if which == "anchors" or symmetric is None else []
        if symmetric is None and which == "auto":
            best = torch.stack([self.evaluate(x).objective for x in anchors]).argmin(0)
            return [self.points[best, torch.arange(len(best), device=best.device)]]
        return [*([] if symmetric is None else [symmetric]), *anchors]

    def closed_form(self) -> FrechetSolution:
        """The mean by its formula, or the median by Weiszfeld steps that use the formula."""
        form = closed_form_of(self.manifold)
        assert form is not None
        mean = form(self.points, self.weights, self.rank)
        count = torch.zeros(self.weights.shape[1], dtype=torch.long, device=self.points.device)
        status = torch.full_like(count, Status.CONVERGED)
        if self.p == 1:  # each Weiszfeld step is a weighted mean, in closed form
            status = torch.full_like(count, Status.MAX_ITERATIONS)
            for _ in range(self.max_iterations):
                squared, _ = self._dist2_logs(mean)
                distances = squared.clamp(min=0).sqrt()
                pull, _ = _median_pull(
                    self.weights, distances, self._reach(self.weights, distances)
                )
                total = pull.sum(0)
                # At an anchor that outweighs the others' pull, a step without it would lead away.
                status = torch.where(self.stationary(self.evaluate(mean)), Status.CONVERGED, status)
                running = (status == Status.MAX_ITERATIONS) & (total > 0)
                new = form(self.points, pull / torch.where(total > 0, total, 1.0), self.rank)
                # The length of the step over that which the anchors, all on one side, would cause.
                still = self.manifold.dist(mean, new) * total <= self.tolerance
                mean = torch.where(_spread(running, mean), new, mean)
                count = count + running
                status = torch.where(still | (total <= 0), Status.CONVERGED, status)
                if bool((status == Status.CONVERGED).all()):
                    break
        return self.solution(self.evaluate(mean), count, status)

    def best_of(
        self, starts: Sequence[Start], run: Callable[[Start], FrechetSolution]
    ) -> FrechetSolution:
        """Iterate from each start; each element keeps its least objective."""
        best = run(starts[0])
        for x in starts[1:]:
            other = run(x)
            take = other.objective < best.objective
            best = dataclasses.replace(
                best,
                point=torch.where(_spread(take, best.point), other.point, best.point),
                objective=torch.where(take, other.objective, best.objective),
                gradient_norm=torch.where(take, other.gradient_norm, best.gradient_norm),
                iterations=torch.where(take, other.iterations, best.iterations),
                status=torch.where(take, other.status, best.status),
            )
        return best

    def karcher(self, x: Tensor) -> FrechetSolution:
        """Karcher's iteration x ← exp_x(t Σ wᵢ log_x xᵢ), t halved until the objective decreases.

        Logarithms that have to be searched for are searched roughly while the iterate is far from
        the mean, and start from those of the previous iterate.
        """
        rough = self.p == 2 and isinstance(self.manifold, QuotientManifold)
        state = self.evaluate(x.clone(), precise=not rough)
        count = torch.zeros(len(x), dtype=torch.long, device=x.device)
        precise = torch.full_like(count, not rough, dtype=torch.bool)
        status = torch.full_like(count, Status.MAX_ITERATIONS)
        for iteration in range(self.max_iterations + 1):
            running = status == Status.MAX_ITERATIONS
            ready = state.gradient_norm <= ROUGH * state.scale
            if rough and iteration < self.max_iterations:
                refine = (running & ready & ~precise).nonzero()[:, 0]
            else:
                refine = (running & ~precise).nonzero()[:, 0]
            if len(refine):
                self._refine(state, refine)
                precise[refine] = True
            status[running & precise & self.stationary(state)] = Status.CONVERGED
            rows = (status == Status.MAX_ITERATIONS).nonzero()[:, 0]
            if not len(rows) or iteration == self.max_iterations:
                break
            for part in (rows[precise[rows]], rows[~precise[rows]]):
                if not len(part):
                    continue
                exactly = bool(precise[part[0]])
                moved = self._descend(state, part, exactly)
                count[part] += 1
                if exactly:
                    status[part[~moved]] = Status.STALLED
                else:  # rough logarithms may stall by their own error: look again, exactly
                    self._refine(state, part[~moved])
                    precise[part[~moved]] = True
        return self.solution(state, count, status)

    def _refine(self, state: _State, rows: Tensor) -> None:
        if len(rows):
            now = state.rows(rows)
            state.put(rows, self.evaluate(now.point, rows, guess=now.logs.movedim(1, 0)))

    def stationary(self, state: _State) -> Tensor:
        """Which elements have converged."""
        return state.gradient_norm <= self.tolerance * state.scale + state.floor

    def _descend(self, state: _State, rows: Tensor, precise: bool) -> Tensor:
        """One step of the elements ``rows``, in place; returns which of them moved."""
        # A logarithm that is no gradient inverts the retraction, not the exponential.
        is_gradient = getattr(self.manifold, "log_is_gradient", True)
        step = self.manifold.expmap if is_gradient else self.manifold.retr
        moved = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        length = 1.0
        for _ in range(MAX_HALVINGS):
            waiting = (~moved).nonzero()[:, 0]
            if not len(waiting):
                break
            index = rows[waiting]
            now = state.rows(index)
            # The point moved by the step, so its logarithms are shorter by it to first order.
            guess = (now.logs - length * now.direction[:, None]).movedim(1, 0)
            point = self._moved(step, now.point, length * now.direction)
            trial = self.evaluate(point, index, guess, precise)
            better = trial.gradient_norm < now.gradient_norm
            if is_gradient:
                # Distances that were searched for are known to some 10 digits. Within that, near
                # the bottom of a quadratic, a smaller gradient is the better witness.
                digits = torch.finfo(now.objective.dtype).eps ** 0.6 if precise else ROUGH**2
                rounding = digits * now.objective.abs()
                better = (trial.objective < now.objective - rounding) | (
                    (trial.objective <= now.objective + rounding) & better
                )
            state.put(index[better], trial.rows(better))
            moved[waiting[better]] = True
            length /= 2
        return moved

    def solution(self, state: _State, count: Tensor, status: Tensor) -> FrechetSolution:
        """The certificate of an iterate."""
        status = torch.where(self._beyond_cut(state), Status.STALLED, status)
        return FrechetSolution(
            point=state.point,
            objective=state.objective,
            gradient_norm=state.gradient_norm,
            iterations=count,
            status=status,
            weights=self.weights,
            solver="",
            paths=self._paths(state),
        )

    def _paths(self, state: _State) -> dict[str, int]:
        """How many logarithms were found in which way."""
        if not hasattr(self.manifold, "log_path"):
            return {}
        stacked = state.point.expand(len(self.points), *state.point.shape)
        codes = self.manifold.log_path(stacked, self.points)
        return {name: int((codes == c).sum()) for c, name in self.manifold.path_names.items()}

    def _beyond_cut(self, state: _State) -> Tensor:
        """Where an anchor is so far from the iterate that no logarithm is as long as its distance.

        An antipode has no logarithm; a vanishing sum of logarithms then says nothing.
        """
        if isinstance(self.manifold, QuotientManifold) or not has_logmap(self.manifold):
            return torch.zeros_like(state.objective, dtype=torch.bool)
        squared, length = self._squares(state)
        beyond = (squared - length).abs() > 1e-3 * self._greatest(squared)
        return self._greatest(beyond.to(squared.dtype)) > 0

    def _squares(self, state: _State) -> tuple[Tensor, Tensor]:
        """Squared distances of the anchors here, and of their logarithms, ``(k, L)``."""
        squared = self._dist2_logs(state.point)[0]
        return squared, inner(self.manifold, state.point[None], state.logs.movedim(1, 0))


def _median_pull(weights: Tensor, distances: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Weiszfeld's weights wᵢ/dᵢ, and which anchors are at the iterate itself and left out."""
    here = distances <= reach
    tiny = torch.finfo(distances.dtype).tiny
    return torch.where(here, 0.0, weights / distances.clamp(min=tiny)), here


def weighted_median(weights: Tensor, values: Tensor) -> Tensor:
    """The least value ``(...)`` that is not exceeded by half of the weight, of ``(k, ...)``."""
    order = values.argsort(0)
    below = weights.gather(0, order).cumsum(0)
    first = (2 * below >= below[-1:]).to(torch.uint8).argmax(0, keepdim=True)
    return values.gather(0, order).gather(0, first)[0]
