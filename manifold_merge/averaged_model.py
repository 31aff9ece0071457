"""A drop-in for ``torch.optim.swa_utils.AveragedModel`` that averages LoRA pairs as products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from manifold_merge.accurate import accurate
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_groups import as_matrices, lora_pairs
from manifold_merge.optim import frechet_step
from manifold_merge.sharded import refuse_sharded

__all__ = ["FrechetAveragedModel"]


class FrechetAveragedModel(AveragedModel):
    """A running Fréchet mean of a model during training.

    ``AveragedModel`` averages the factors B and A of a LoRA pair separately, so that the average of
    B A is lost, and depends on the gauge. Here each pair moves along the geodesic of its
    :class:`~manifold_merge.lora.LoRAQuotient` toward the new model, and each
    ``geoopt.ManifoldParameter`` on its own manifold. All else is as in torch: the constructor,
    ``update_parameters``, ``n_averaged``, ``module``, ``state_dict``, ``update_bn``.

    The fraction of the geodesic is what ``avg_fn`` or ``multi_avg_fn`` does to numbers: 1/(n + 1)
    by default, which makes the inductive mean, or 1 - decay with torch's
    ``get_ema_multi_avg_fn(decay)``.

    With FSDP2, make this first and call ``fully_shard`` on ``module`` after: sharded parameters
    are averaged part by part. LoRA pairs have to be whole.

    Args:
        model: The model; its copy becomes ``module``.
        device: Where the average is kept.
        avg_fn: As in torch, ``avg_fn(averaged, current, num_averaged)``; an affine combination.
        multi_avg_fn: As in torch, for lists of tensors in place.
        use_buffers: Average buffers too; else they are copied.
        geometry: Metric of the LoRA pairs, ``"mixed"``, ``"invariant"`` or ``"embedded"``.
        distance: ``"chordal"`` (a few small products at each update), ``"aligned"`` or ``"exact"``
            (a search at each update).

    Raises:
        ValueError: If the geometry is unknown, or the averaging function is no affine combination.

    Source: Izmailov et al., arXiv:1803.05407, for the Euclidean case; the inductive mean: Sturm
    (2003).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> averaged = FrechetAveragedModel(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     averaged.update_parameters(model)
        >>> int(averaged.n_averaged)
        5
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[Any, Any, Tensor | int], None] | None = None,
        use_buffers: bool = False,
        *,
        geometry: str = "mixed",
        distance: str = "chordal",
    ) -> None:
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        LoRAQuotient(1, 1, geometry, distance)  # tells a wrong name now, not at the first update
        self.geometry, self.distance = geometry, distance

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one more model into the average.

        Args:
            model: A model of the same structure; float16 and bfloat16 parameters are averaged with
                float32 arithmetic.
        """
        moved = self._moved(model) if int(self.n_averaged) > 0 else []
        super().update_parameters(model)
        # torch has averaged the factors separately; overwrite those with the points they make.
        for parameter, value in moved:
            parameter.copy_(value.reshape(parameter.shape))

    def _moved(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Parameters of the average and their new values, for all that are not Euclidean."""
        fraction = self._fraction()
        averaged = dict(self.module.named_parameters())
        current = dict(zip(averaged, model.parameters(), strict=True))
        out: list[tuple[Tensor, Tensor]] = []
        batches: dict[Any, list[tuple[str, str]]] = {}
        for name_b, name_a in lora_pairs(averaged):
            b, a = averaged[name_b], averaged[name_a]
            for name, factor in ((name_b, b), (name_a, a)):
                refuse_sharded(name, factor, "LoRAQuotient")
            batches.setdefault((b.shape, a.shape, b.dtype, b.device), []).append((name_b, name_a))
        for names in batches.values():
            b, a = as_matrices(averaged[names[0][0]], averaged[names[0][1]])
            manifold = LoRAQuotient(b.shape[0], a.shape[1], self.geometry, self.distance)
            x, y = (
                torch.stack([_pack(manifold, source[i], source[j], b) for i, j in names])
                for source in (averaged, current)
            )
            new, _ = frechet_step(manifold, x, y[None], None, fraction)
            new_b, new_a = manifold.unpack(new)
            for i, (name_b, name_a) in enumerate(names):
                out += [(averaged[name_b], new_b[i]), (averaged[name_a], new_a[i])]
        for (name, parameter), now in zip(averaged.items(), model.parameters(), strict=True):
            own = getattr(now, "manifold", None)
            if isinstance(own, geoopt.Manifold) and not isinstance(own, geoopt.Euclidean):
                refuse_sharded(name, parameter, own)
                x, y = (_wide(p, parameter)[None] for p in (parameter, now))
                out.append((parameter, frechet_step(accurate(own), x, y[None], None, fraction)[0]))
        return out

    def _fraction(self) -> float:
        """What the averaging function makes of the numbers 0 and 1: the fraction of the way."""
        from_zero, from_one = (self._average(start) for start in (0.0, 1.0))
        if abs(from_one - 1) > 1e-12 or not 0 <= from_zero <= 1:
            raise ValueError(
                "avg_fn must be a combination (1 - t) averaged + t current, 0 <= t <= 1; "
                f"it takes (0, 1) to {from_zero} and (1, 1) to {from_one}"
            )
        return from_zero

    def _average(self, start: float) -> float:
        averaged, one = (torch.tensor(v, dtype=torch.float64) for v in (start, 1.0))
        count = self.n_averaged.cpu()
        if self.multi_avg_fn is not None:
            self.multi_avg_fn([averaged], [one], count)
            return float(averaged)
        if self.avg_fn is not None:
            return float(self.avg_fn(averaged, one, count))
        return float(averaged + (one - averaged) / (count + 1))


def _wide(x: Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return x.detach().to(like.device, dtype).as_subclass(Tensor)


def _pack(manifold: LoRAQuotient, b: Tensor, a: Tensor, like: Tensor) -> Tensor:
    return manifold.pack(*(_wide(p, like) for p in as_matrices(b, a)))
