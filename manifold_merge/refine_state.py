"""The state of a refinement, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["RefineState", "Stack"]

Factors = tuple[Tensor, Tensor]

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass
class Stack:
    """Modules of one shape and rank as one batch of points.

    Attributes:
        names: The modules.
        point: Their points [B; Aᵀ], ``(len(names), m + n, r)``.
        out_features: m.
        in_features: n.
        parameter: What the optimiser moves, once there is one.
    """

    names: list[str]
    point: Tensor
    out_features: int
    parameter: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Columns n of the updates."""
        return self.point.shape[-2] - self.out_features

    @property
    def key(self) -> str:
        """Name in a checkpoint."""
        return f"{self.out_features}x{self.in_features}x{self.point.shape[-1]}"

    def factors(self, point: Tensor | None = None) -> dict[str, Factors]:
        """B ``(m, r)`` and A ``(r, n)`` of each module, at the current point or the given one."""
        if point is None:
            point = self.point if self.parameter is None else self.parameter
        m = self.out_features
        return {
            name: (x[:m], x[m:].mT) for name, x in zip(self.names, point.unbind(0), strict=True)
        }


@dataclasses.dataclass
class RefineState:
    """Everything that changes in the course of a descent.

    Attributes:
        stacks: The points.
        fingerprint: Of all that does not change.
        best: The best points so far, by :attr:`Stack.key`.
        before: Distances of the merged adapter.
        started: Distances of the start.
        best_distances: Distances of the best points.
        best_value: Their weighted mean.
        best_step: When they were found.
        step: Steps taken.
        running: Sum of the training losses since the last evaluation.
        history: (step, mean training loss, held-back distance) of each evaluation.
    """

    stacks: list[Stack]
    fingerprint: str
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    before: tuple[float, ...] = ()
    started: tuple[float, ...] = ()
    best_distances: tuple[float, ...] = ()
    best_value: float = float("inf")
    best_step: int = 0
    step: int = 0
    running: float = 0.0
    history: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    moments: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, points: Mapping[str, Factors], fingerprint: str, like: Tensor) -> RefineState:
        """Stack factors of equal shapes, of the type and on the device of ``like``."""
        groups: dict[tuple[int, int, int], list[str]] = {}
        for name, (b, a) in sorted(points.items()):
            groups.setdefault((b.shape[0], a.shape[1], b.shape[1]), []).append(name)
        stacks = []
        for (m, _, _), names in groups.items():
            point = torch.stack([torch.cat((points[n][0], points[n][1].mT)) for n in names])
            stacks.append(Stack(names, point.to(like).contiguous(), m))
        return cls(stacks, fingerprint)

    def keep_best(self, value: float, distances: Sequence[float]) -> None:
        """Remember the current points."""
        self.best = {
            s.key: (s.point if s.parameter is None else s.parameter).detach().clone()
            for s in self.stacks
        }
        self.best_value, self.best_distances = value, tuple(distances)
        self.best_step = self.step

    def save(self, file: Path, optimizer: torch.optim.Optimizer) -> None:
        """Write the state; the file is the old one or the new one, never half of it."""
        tensors = {}
        for stack, group in zip(self.stacks, optimizer.param_groups, strict=True):
            parameter = group["params"][0]
            tensors[f"{stack.key}/point"] = parameter.detach()
            tensors[f"{stack.key}/best"] = self.best[stack.key]
            for name in _MOMENTS:
                if optimizer.state[parameter]:
                    tensors[f"{stack.key}/{name}"] = optimizer.state[parameter][name]
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("stacks", "best", "moments")
        }
        plain["names"] = {stack.key: stack.names for stack in self.stacks}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        kept = {
            k: torch.Tensor(t).as_subclass(Tensor).cpu().contiguous() for k, t in tensors.items()
        }
        save_file(kept, partial, metadata={"refine": json.dumps(plain)})
        os.replace(partial, file)

    @classmethod
    def load(cls, file: Path, fingerprint: str, device: torch.device) -> RefineState:
        """Read a state.

        Raises:
            ValueError: The file is no checkpoint, or that of another run.
        """
        try:
            with safe_open(file, framework="pt", device=str(device)) as handle:
                plain: dict[str, Any] = json.loads((handle.metadata() or {})["refine"])
                tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"checkpoint {file} is damaged or none of a refinement ({error}); remove it"
            ) from error
        if plain["fingerprint"] != fingerprint:
            raise ValueError(
                f"checkpoint {file} belongs to a run with other adapters, data or options; give "
                "the same ones, or pass overwrite=True (--overwrite) without resume to begin anew"
            )
        names: dict[str, list[str]] = plain.pop("names")
        stacks = []
        for key, members in names.items():
            stacks.append(Stack(members, tensors[f"{key}/point"], int(key.split("x")[0])))
        plain["history"] = [tuple(entry) for entry in plain["history"]]
        for name in ("before", "started", "best_distances"):
            plain[name] = tuple(plain[name])
        best = {key: tensors[f"{key}/best"] for key in names}
        moments = {k: t for k, t in tensors.items() if k.endswith(_MOMENTS)}
        return cls(stacks, best=best, moments=moments, **plain)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimiser of the same stacks its moments back."""
        for stack, group in zip(self.stacks, optimizer.param_groups, strict=True):
            if f"{stack.key}/exp_avg" in self.moments:
                state = optimizer.state[group["params"][0]]
                state["step"] = self.step
                for name in _MOMENTS:
                    state[name] = self.moments[f"{stack.key}/{name}"]
        self.moments = {}
