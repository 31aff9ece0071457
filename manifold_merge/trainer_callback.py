"""Fréchet means in the training loop of Hugging Face's ``Trainer``.

This module needs ``transformers``, which ``manifold-merge[peft]`` installs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from manifold_merge.averaged_model import FrechetAveragedModel
from manifold_merge.lora_groups import param_groups
from manifold_merge.optim import Anchor, FrechetMean

__all__ = ["FrechetAverageCallback", "FrechetPullCallback"]


class FrechetPullCallback(TrainerCallback):
    """Pull the trained model toward anchors after every step of the Trainer's own optimiser.

    The pull has no state but its rate, so that a Trainer resumed from a checkpoint goes on as if it
    had not stopped.

    Args:
        anchors: Models or state dicts of teammates; see :class:`~manifold_merge.optim.FrechetMean`.
        weights: One for each anchor.
        lr: Fraction of the way at each step.
        decay: Let the pull fall with the Trainer's own learning-rate schedule, from ``lr`` at the
            schedule's maximum down to zero.
        metric: Metric of the LoRA pairs.
        distance: Distance of the LoRA pairs.

    Example:
        >>> import transformers
        >>> callback = FrechetPullCallback([torch.nn.Linear(2, 2)], lr=0.1)
        >>> isinstance(callback, transformers.TrainerCallback)  # Trainer(..., callbacks=[callback])
        True
    """

    def __init__(
        self,
        anchors: Sequence[Anchor],
        weights: Sequence[float] | None = None,
        lr: float = 0.1,
        *,
        decay: bool = False,
        metric: str = "mixed",
        distance: str = "chordal",
    ) -> None:
        self.anchors, self.weights, self.lr, self.decay = anchors, weights, lr, decay
        self.metric, self.distance = metric, distance
        #: The optimiser, once training has begun.
        self.optimizer: FrechetMean | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Find the parameters of the model and match the anchors."""
        assert model is not None
        groups = param_groups(model, metric=self.metric, distance=self.distance)
        self.optimizer = FrechetMean(groups, self.anchors, self.weights, self.lr)

    def on_step_end(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Make one step toward the anchors."""
        assert self.optimizer is not None
        if self.decay:
            peak = max(group["initial_lr"] for group in lr_scheduler.optimizer.param_groups)
            fraction = max(lr_scheduler.get_last_lr()) / peak
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * fraction
        self.optimizer.step()


class FrechetAverageCallback(TrainerCallback):
    """Keep a running Fréchet mean of the trained model.

    The average is written into every checkpoint folder as ``frechet_average.pt`` (parameters that
    were trained, buffers and the count), and read back when the Trainer resumes.

    Args:
        every: Update the average after so many optimiser steps.
        start: First optimiser step that counts.
        options: Those of :class:`~manifold_merge.averaged_model.FrechetAveragedModel`, for example
            ``multi_avg_fn`` or ``geometry``.

    Raises:
        ValueError: If ``every`` is below 1.

    Example:
        >>> callback = FrechetAverageCallback(every=10, geometry="invariant")
        >>> callback.averaged is None  # until training begins; then callback.averaged.module
        True
    """

    FILE = "frechet_average.pt"

    def __init__(self, every: int = 1, start: int = 0, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"every: at least 1 step, got {every}")
        self.every, self.start, self.options = every, start, options
        #: The averaged model, once training has begun.
        self.averaged: FrechetAveragedModel | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Copy the model, or take the average of the checkpoint that training resumes from."""
        assert model is not None
        self.averaged = FrechetAveragedModel(model, **self.options)
        if state.global_step == 0:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            folder = Path(get_last_checkpoint(args.output_dir) or args.output_dir)
        file = folder / self.FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: training resumes at step {state.global_step}, but that checkpoint holds "
                "no Fréchet average; start anew, or add the callback from the first step on"
            )
        saved = torch.load(file, map_location="cpu", weights_only=True)
        self.averaged.load_state_dict(saved, strict=False)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Take the model into the average."""
        assert self.averaged is not None
        assert model is not None
        if state.global_step > self.start and state.global_step % self.every == 0:
            self.averaged.update_parameters(model)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what has been averaged into the checkpoint folder."""
        assert self.averaged is not None
        trained = {
            f"module.{name}"
            for name, p in self.averaged.module.named_parameters()
            if p.requires_grad
        }
        fixed = {f"module.{name}" for name, _ in self.averaged.module.named_parameters()} - trained
        saved = {k: v for k, v in self.averaged.state_dict().items() if k not in fixed}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(saved, folder / self.FILE)
