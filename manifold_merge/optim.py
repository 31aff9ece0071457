"""The Fréchet mean as a ``torch.optim.Optimizer``: average models, or pull them together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from manifold_merge.accurate import accurate
from manifold_merge.anchors import refuse_names
from manifold_merge.frechet import normalized_weights
from manifold_merge.linalg import all_finite
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_groups import as_matrices, clean_name
from manifold_merge.sharded import local_part, refuse_sharded, total_over_mesh
from manifold_merge.solvers import Problem

__all__ = ["FrechetMean", "frechet_step"]

Anchor = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


@dataclasses.dataclass
class _Point:
    """Parameters that together are one point, and how to read and write them."""

    manifold: Any  # None: Euclidean
    params: list[Tensor]
    anchors: list[list[Tensor]]  # for each anchor, tensors parallel to ``params``
    label: str

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The point in a dtype that has enough digits."""
        parts = (local_part(t.detach(), p) for t, p in zip(tensors, self.params, strict=True))
        wide = [
            t.to(self.params[0].device, torch.promote_types(t.dtype, torch.float32)) for t in parts
        ]
        if len(wide) == 1:
            return wide[0].as_subclass(Tensor)
        if isinstance(self.manifold, LoRAQuotient):
            wide = list(as_matrices(*wide))
        return self.manifold.pack(*(t.as_subclass(Tensor) for t in wide))

    def write(self, x: Tensor) -> None:
        """Store a point in the parameters, in their dtype and shape."""
        parts = (x,) if len(self.params) == 1 else self.manifold.unpack(x)
        for p, part in zip(self.params, parts, strict=True):
            local = local_part(p.detach(), p)
            local.copy_(part.reshape(local.shape))

    def key(self, x: Tensor, anchors: Tensor) -> tuple[Any, ...]:
        """Points with one key are moved together as a batch."""
        m = self.manifold
        if isinstance(m, LoRAQuotient):
            kind: Any = (m.out_features, m.in_features, m.metric, m.distance)
        else:
            kind = id(m)
        return kind, x.shape, anchors.shape, x.dtype, x.device


class FrechetMean(torch.optim.Optimizer):
    """Move parameters along geodesics toward the Fréchet mean of anchors.

    One ``step()`` is one iteration x ← exp_x(lr Σ wᵢ log_x xᵢ) for each point, on the manifold that
    the point lives on. Gradients are neither needed nor touched, so that it works next to any other
    optimiser, gradient scaler or gradient accumulation.

    Args:
        params: Tensors, ``(name, tensor)`` pairs (``model.named_parameters()``), or groups. A group
            ``{"params": [B, A], "manifold": LoRAQuotient(m, n)}`` is one point made of several
            parameters; :func:`manifold_merge.param_groups` writes such groups for the LoRA pairs of
            a model. A ``geoopt.ManifoldParameter`` brings its manifold along. All other parameters
            are Euclidean. Of DTensors, as FSDP2 makes them, each process moves its part; they are
            Euclidean only. float16 and bfloat16 parameters are moved with float32 arithmetic.
        anchors: What to average: modules (their parameters at each step, so that anchors may
            train along), state dicts, or sequences of tensors in the order of the parameters. For
            modules and state dicts the parameters need names. A group may bring its own
            ``"anchors"``, a list with a list of tensors for each anchor.
        weights: One for each anchor, not negative; normalised. A group may have its own.
        lr: Fraction of the way along the geodesic, from 0 (nothing moves, bit for bit) to 1. A
            learning-rate scheduler anneals the pull.

    Raises:
        ValueError: If an anchor lacks a parameter or has another shape (the message names both), a
            weight is negative or all are zero, or lr is negative.

    Example:
        Average finished models. Start anywhere, for instance at the first:

        >>> import copy, torch
        >>> from manifold_merge import param_groups
        >>> models = [torch.nn.Linear(3, 2) for _ in range(4)]
        >>> mean = copy.deepcopy(models[0])
        >>> optimizer = FrechetMean(param_groups(mean), anchors=models)
        >>> objective = optimizer.step()  # Euclidean parameters are there after one step
        >>> bool(torch.allclose(mean.bias, sum(m.bias for m in models) / 4))
        True

        A proximal pull toward teammates during training, after each step of the usual optimiser:

        >>> model, teammates = models[0], models[1:]
        >>> adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> pull = FrechetMean(param_groups(model), anchors=teammates, lr=0.05)
        >>> for _ in range(3):
        ...     adam.zero_grad()
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     _ = adam.step(), pull.step()

        For a running average of one training run see
        :class:`~manifold_merge.averaged_model.FrechetAveragedModel`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        anchors: Sequence[Anchor] | None = None,
        weights: Sequence[float] | Tensor | None = None,
        lr: float | Tensor = 1.0,
    ) -> None:
        if float(lr) < 0:
            raise ValueError(f"lr: the fraction of the way must be >= 0, got {float(lr)}")
        single = isinstance(anchors, Mapping | nn.Module) and not isinstance(anchors, nn.ModuleList)
        if single or not (anchors is None or hasattr(anchors, "__len__")):
            raise ValueError(f"anchors: expected a list, got a {type(anchors).__name__}")
        if anchors is not None and not len(anchors):
            raise ValueError("anchors: at least one is needed, got none")
        self._sources = None if anchors is None else list(anchors)
        self._points: list[list[_Point]] = []
        self._used = 0
        refuse_names(weights)
        if weights is not None:
            weights = torch.as_tensor(weights, dtype=torch.float64).tolist()
        #: Σ wᵢ d²(x, xᵢ), summed over all points, before the last step.
        self.objective: Tensor | None = None
        super().__init__(params, {"lr": lr, "weights": weights, "manifold": None})

    # --- groups ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a ``"manifold"`` and ``"anchors"`` of their own if they have any.

        Args:
            param_group: See ``params``; missing options are those of the optimiser.

        Raises:
            ValueError: See the class.
        """
        group = dict(param_group)
        given = group.pop("anchors", None)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            self._points.append(self._resolve(added, given))
        except Exception:
            self.param_groups.pop()
            raise
        self._used += len(added["params"])

    def _resolve(self, group: dict[str, Any], given: Any) -> list[_Point]:
        params, names = group["params"], group.get("param_names")
        count = len(params)
        manifold = group["manifold"]
        anchors = self._tensors(params, names, given, manifold)
        if anchors:
            normalized_weights(
                group["weights"], len(anchors), like=torch.zeros((), dtype=torch.float64)
            )
        joint = manifold is not None and count > 1 and hasattr(manifold, "pack")
        label = f"group {len(self.param_groups) - 1}"
        if joint:
            points = [_Point(manifold, params, anchors, names[0] if names else label)]
        else:
            points = []
            for i, p in enumerate(params):
                own = getattr(p, "manifold", None) if manifold is None else manifold
                if isinstance(own, geoopt.Euclidean):
                    own = None
                name = names[i] if names else f"{label}, parameter {i}"
                points.append(_Point(own, [p], [[a[i]] for a in anchors], name))
        for point in points:
            if point.manifold is None:
                continue
            for p in point.params:
                refuse_sharded(point.label, p, point.manifold)
            point.manifold = accurate(point.manifold)
            x = point.pack(point.params)
            ok, reason = point.manifold._check_shape(tuple(x.shape), "x")
            if not ok:
                raise ValueError(f"{point.label}: no point of {point.manifold}: {reason}")
        return points

    def _tensors(
        self, params: list[Tensor], names: Any, given: Any, manifold: Any
    ) -> list[list[Tensor]]:
        """The tensors of each anchor, parallel to ``params``; checked."""
        if given is None and self._sources is None:
            return []
        sources = self._sources if given is None else given
        assert sources is not None
        out = []
        for k, source in enumerate(sources):
            if isinstance(source, nn.Module | Mapping):
                if names is None:
                    raise ValueError(
                        f"anchors[{k}]: a {type(source).__name__} is matched by names, but the "
                        "parameters have none; pass model.named_parameters() or param_groups(model)"
                    )
                found = _by_name(source)
                missing = [n for n in names if clean_name(n) not in found]
                if missing:
                    raise ValueError(
                        f"anchors[{k}]: {len(missing)} of {len(names)} parameters are missing, "
                        f"first {missing[0]!r}; it has {', '.join(list(found)[:3])}, ..."
                    )
                tensors = [found[clean_name(n)] for n in names]
            else:
                first = 0 if given is not None else self._used
                tensors = list(source)[first : first + len(params)]
                if len(tensors) < len(params):
                    raise ValueError(
                        f"anchors[{k}]: one tensor for each parameter is expected; it has "
                        f"{len(source)}, and the parameters are {first + len(params)} or more"
                    )
            for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
                same_rank = p.shape == t.shape
                if not same_rank and not _ranks_differ(p, t, manifold):
                    name = names[i] if names else f"parameter {i}"
                    raise ValueError(
                        f"anchors[{k}]: {name} has shape {tuple(t.shape)}, the parameter "
                        f"{tuple(p.shape)}"
                    )
            out.append(tensors)
        return out

    # --- steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one Fréchet iteration toward the anchors.

        Args:
            closure: Evaluates the model and returns its loss, as for any torch optimiser.

        Returns:
            The objective before the step, a scalar tensor; the closure's loss if there is one, and
            then the objective is in the attribute ``objective``.

        Raises:
            RuntimeError: If there are no anchors.
            ValueError: If a parameter on a manifold is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values: list[Tensor] = []
        batches: dict[Any, list[tuple[_Point, Tensor, Tensor]]] = {}
        # Reduced precision is for the model: a mean needs the digits.
        with _without_autocast(self.param_groups):
            for group, points in zip(self.param_groups, self._points, strict=True):
                lr, weights = float(group["lr"]), group["weights"]
                for point in points:
                    if not point.anchors:
                        raise RuntimeError(
                            f"{point.label} has no anchors: pass anchors=[...] to FrechetMean, or "
                            "give the parameter group a key 'anchors'"
                        )
                    if point.manifold is None:
                        values.append(_euclidean_step(point, weights, lr))
                        continue
                    x = point.pack(point.params)
                    if not all_finite(x):
                        bad = int((~x.isfinite()).sum())
                        raise ValueError(
                            f"{point.label}: {bad} entries are NaN or infinite, the training "
                            "diverged; lower a learning rate and go on from a checkpoint"
                        )
                    anchors = _stack([point.pack(anchor) for anchor in point.anchors])
                    shared = (lr, None if weights is None else tuple(weights))
                    entry = (point, x, anchors.to(x.dtype))
                    batches.setdefault((shared, point.key(x, anchors)), []).append(entry)
            for ((lr, weights), _), entries in batches.items():
                x = torch.stack([entry[1] for entry in entries])
                anchors = torch.stack([entry[2] for entry in entries], 1)
                new, objective = frechet_step(entries[0][0].manifold, x, anchors, weights, lr)
                values.append(objective.sum())
                if lr != 0:
                    for entry, row in zip(entries, new, strict=True):
                        entry[0].write(row)
        device = values[0].device if values else None
        self.objective = sum((v.to(device) for v in values), torch.zeros((), device=device))
        return self.objective if closure is None else loss

    # --- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Options of all groups; manifolds and anchors belong to the program and are left out."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop("manifold", None)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the options of all groups; manifolds and anchors stay.

        Args:
            state_dict: From :meth:`state_dict` of an optimiser with the same groups.
        """
        manifolds = [group["manifold"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, manifold in zip(self.param_groups, manifolds, strict=True):
            group["manifold"] = manifold


@torch.no_grad()
def frechet_step(
    manifold: geoopt.Manifold,
    x: Tensor,
    anchors: Tensor,
    weights: Sequence[float] | Tensor | None,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """One Fréchet iteration x ← exp_x(lr Σ wᵢ log_x xᵢ) on a flat batch.

    Args:
        manifold: Any geoopt manifold with ``logmap``.
        x: Points, ``(L, *point)``.
        anchors: ``(k, L, *point)``.
        weights: ``(k,)``; normalised.
        lr: Fraction of the way.

    Returns:
        The new points ``(L, *point)``, and the objective at the old ones, ``(L,)``.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> frechet_step(geoopt.Sphere(), x, y[None], None, 0.5)[0]
        tensor([[0.7071, 0.7071]])
    """
    space = accurate(manifold)
    w = normalized_weights(weights, len(anchors), like=x)[:, None].expand(len(anchors), len(x))
    problem = Problem(space, anchors, w, 2, None, 0.0, 1)
    state = problem.evaluate(x)
    # A logarithm that is no gradient inverts the retraction, not the exponential.
    step = space.expmap if getattr(space, "log_is_gradient", True) else space.retr
    moved = step(x, lr * state.direction)
    if lr and getattr(space, "distance", "exact") != "exact":
        moved = _descending(problem, state, step, lr, moved)
    return moved, state.objective


def _descending(problem: Problem, state: Any, step: Any, lr: float, moved: Tensor) -> Tensor:
    """Shorten steps that raise the objective.

    An approximate logarithm need not lead to its anchor: where a factor is nearly rank-deficient,
    the step is long and its end is far away. It points downhill all the same.
    """
    x, kept = state.point, moved.clone()
    slack = 1 + 1e-3  # rounding of the objective is no reason to shorten
    for _ in range(40):
        finite = kept.flatten(1).isfinite().all(1)
        here = torch.where(finite[(..., *(None,) * (x.ndim - 1))], kept, x)
        distances = problem.manifold.dist(here[None], problem.points)
        objective = (problem.weights * distances.square()).sum(0)
        bad = ~finite | ~(objective <= slack * state.objective + state.objective.new_tensor(1e-30))
        if not bool(bad.any()):
            return kept
        lr /= 2
        kept[bad] = step(x[bad], lr * state.direction[bad])
    return torch.where(bad[(..., *(None,) * (x.ndim - 1))], x, kept)


def _euclidean_step(point: _Point, weights: Any, lr: float) -> Tensor:
    x = point.pack(point.params)
    anchors = torch.stack([point.pack(anchor).to(x.dtype) for anchor in point.anchors])
    w = normalized_weights(weights, len(anchors), like=x)
    difference = anchors - x
    if lr != 0:
        point.write(x + lr * torch.tensordot(w, difference, 1))
    squared = total_over_mesh(difference.square().flatten(1).sum(1), point.params[0])
    return (w * squared).sum()


def _stack(points: list[Tensor]) -> Tensor:
    """Stack points; low-rank pairs of lower rank get zero columns."""
    width = max(x.shape[-1] for x in points)
    return torch.stack([nn.functional.pad(x, (0, width - x.shape[-1])) for x in points])


def _ranks_differ(parameter: Tensor, anchor: Tensor, manifold: Any) -> bool:
    """Whether shapes differ in the rank of a low-rank pair at most, which is no error."""
    if not isinstance(manifold, LoRAQuotient) or parameter.ndim != 2 or anchor.ndim != 2:
        return False
    return any(parameter.shape[i] == anchor.shape[i] for i in (0, 1))


def _by_name(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    items = source.named_parameters() if isinstance(source, nn.Module) else source.items()
    return {clean_name(name): tensor for name, tensor in items}


@contextlib.contextmanager
def _without_autocast(groups: list[dict[str, Any]]) -> Iterator[None]:
    kinds = {p.device.type for group in groups for p in group["params"]}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(device_type=kind, enabled=False))
        yield
