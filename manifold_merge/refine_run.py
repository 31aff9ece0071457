"""One descent of the functional distance over the LoRA quotient."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_merge._version import __version__
from manifold_merge.adapted_model import AdaptedModel, Factors, Updates, balanced_factors
from manifold_merge.examples import Example, Sampler
from manifold_merge.functional import FunctionalDistance, by_length
from manifold_merge.lora import LoRAQuotient
from manifold_merge.refine_state import RefineState
from manifold_merge.sequential import sequential_start

__all__ = ["Descent"]

logger = logging.getLogger(__name__)

# The first steps are shorter, until the optimiser's second moment has settled.
WARM_UP = 10
# Examples of each anchor that its spread is measured on.
SPREAD_EXAMPLES = 256
# Where the wanted rank is above that of the start, new directions begin with this fraction of its
# least singular value: too little to change the model, enough to move from.
SEED_SIZE = 1e-2


class Descent:
    """One descent: its fixed ingredients, and the state that a checkpoint holds."""

    def __init__(
        self,
        adapted: AdaptedModel,
        updates: Sequence[Updates],
        examples: Sequence[Sequence[Example]],
        weights: Sequence[float],
        options: Mapping[str, Any],
    ) -> None:
        self.adapted = adapted
        self.merged, self.anchors = updates[0], list(updates[1:])
        self.like = next(b for b, _ in self.merged.factors.values())
        self.weights = weights
        self.options = options
        self.distance = FunctionalDistance(adapted, self.anchors, options["features"])
        self.held: list[list[list[Example]]] = []
        self.used: list[list[Example]] = []
        self.samplers: list[Sampler] = []
        for own in examples:
            # Chance depends on the examples and not on their anchor's place among the others, so
            # that the order of the adapters does not matter.
            seed = f"{options['seed']}/{_digest(own)}"
            used, held = _split(own, options["held_back"], seed)
            self.used.append(used)
            self.held.append(by_length(held or used[:SPREAD_EXAMPLES], 32))
            self.samplers.append(Sampler(used, options["batch_size"], options["variation"], seed))
        self.fingerprint = _fingerprint(updates, examples, weights, options)

    def prepare(self, checkpoint: Path | None) -> None:
        """Measure the anchors, and begin with the start or a checkpoint."""
        for i, used in enumerate(self.used):
            self.distance.measure_spread(i, by_length(used[:SPREAD_EXAMPLES], 32))
        idle = self.adapted.idle(self.merged.factors)
        if idle:
            logger.warning(
                "module %r%s takes no part in the features and is kept as it was merged",
                idle[0],
                f" and {len(idle) - 1} more" if len(idle) > 1 else "",
            )
        if checkpoint is not None and checkpoint.exists():
            self.state = RefineState.load(checkpoint, self.fingerprint, self.adapted.device)
            self._make_optimizer()
            self.state.restore(self.optimizer)
            logger.info("resumed after step %d", self.state.step)
            return
        before = self.evaluate(self.merged)
        rank = self.options["rank"]
        factors = {n: f for n, f in self.merged.factors.items() if n not in idle}
        if self.options["start"] == "sequential":
            factors = sequential_start(
                self.adapted, self.anchors, self.used, self.weights,
                dataclasses.replace(self.merged, factors=factors), rank=rank,
            )  # fmt: skip
        points = {}
        generator = torch.Generator().manual_seed(self.options["seed"])
        for name, (b, a) in factors.items():
            wanted = min(rank or self.merged.factors[name][0].shape[1], b.shape[0], a.shape[1])
            points[name] = _at_rank(b, a, wanted, generator)
        self.state = RefineState.begin(points, self.fingerprint, self.like)
        self._make_optimizer()
        started = self.evaluate(self.updates())
        self.state.before, self.state.started = before, started
        self.state.keep_best(_average(started, self.weights), started)

    def _make_optimizer(self) -> None:
        groups = []
        for stack in self.state.stacks:
            manifold = LoRAQuotient(
                stack.out_features, stack.in_features, self.options["metric"], "chordal"
            )
            stack.parameter = geoopt.ManifoldParameter(stack.point, manifold=manifold)
            size = _root_mean_square(self.anchors, stack.names)
            groups.append({"params": [stack.parameter], "unit": size})
        self.optimizer = geoopt.optim.RiemannianAdam(groups, lr=0.0)

    def updates(self) -> Updates:
        """The current point, differentiable."""
        current = dict(self.merged.factors)
        for stack in self.state.stacks:
            current.update(stack.factors())
        return dataclasses.replace(self.merged, factors=current)

    def evaluate(self, updates: Updates) -> tuple[float, ...]:
        """Distance from each anchor on held-back examples."""
        return tuple(self.distance.mean(i, batches, updates) for i, batches in enumerate(self.held))

    def run(self, checkpoint: Path | None, progress: Callable[[int, int], None] | None) -> None:
        """Take the remaining steps."""
        state, options = self.state, self.options
        steps = options["steps"]
        while state.step < steps and not self._stop():
            state.running += self._step(state.step)
            state.step += 1
            if progress is not None:
                progress(state.step, steps)
            if state.step % options["evaluate_every"] and state.step < steps:
                continue
            held = self.evaluate(self.updates())
            average = _average(held, self.weights)
            since = state.step - (state.history[-1][0] if state.history else 0)
            state.history.append((state.step, state.running / since, average))
            state.running = 0.0
            logger.info("step %d: training %.4f, held back %.4f", *state.history[-1])
            if average < state.best_value or not options["held_back"]:
                state.keep_best(average, held)
            if checkpoint is not None:
                state.save(checkpoint, self.optimizer)

    def _stop(self) -> bool:
        if not self.options["held_back"]:
            return False
        worse = [entry for entry in self.state.history if entry[0] > self.state.best_step]
        return len(worse) >= self.options["patience"]

    def _step(self, step: int) -> float:
        rate = self.options["learning_rate"] * _schedule(step, self.options["steps"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["unit"]
        self.optimizer.zero_grad()
        total = 0.0
        for i, weight in enumerate(self.weights):
            if not weight:
                continue
            # One anchor at a time: its activations are freed before the next one's are made.
            loss = weight * self.distance(i, self.samplers[i].batch(step), self.updates())
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ValueError(
                f"learning_rate={self.options['learning_rate']}: the descent diverged at step "
                f"{step}; lower it, or run the model in float32"
            )
        self.optimizer.step()
        return total

    def best(self) -> dict[str, Factors]:
        """Factors of the best point seen on held-back examples, in balanced form."""
        modules = dict(self.merged.factors)
        for stack in self.state.stacks:
            modules.update(stack.factors(self.state.best[stack.key]))
        for name, (b, a) in modules.items():
            b, a = balanced_factors(b.detach(), a.detach())
            modules[name] = b.clone(), a.clone()
        return modules


def _split(
    examples: Sequence[Example], held_back: float, seed: str
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to hold back, drawn at random but always the same."""
    count = int(held_back) if held_back >= 1 else math.ceil(held_back * len(examples))
    if count >= len(examples):
        raise ValueError(
            f"held_back={held_back} leaves none of {len(examples)} examples to train on; give more "
            "examples, or hold back fewer"
        )
    order = list(range(len(examples)))
    random.Random(f"{seed}/split").shuffle(order)
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def _fingerprint(
    updates: Sequence[Updates],
    examples: Sequence[Sequence[Example]],
    weights: Sequence[float],
    options: Mapping[str, Any],
) -> str:
    """What a run depends on, so that a checkpoint is not resumed with anything else."""
    digest = hashlib.sha256(json.dumps([__version__, options, list(weights)]).encode())
    for source in updates:
        for name, pair in sorted(source.factors.items()):
            digest.update(name.encode())
            for tensor in pair:
                digest.update(tensor.cpu().double().numpy().tobytes())
    for own in examples:
        digest.update(_digest(own).encode())
    return digest.hexdigest()


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        data = example.cpu().tolist() if isinstance(example, Tensor) else example
        digest.update(json.dumps(data).encode())
    return digest.hexdigest()


def _at_rank(b: Tensor, a: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Balanced factors of the given rank: truncated, or completed by small random directions."""
    b, a = balanced_factors(b.cpu().double(), a.cpu().double())
    b, a = b[:, :rank], a[:rank]
    values = b.square().sum(0)
    present = values > values.max() * 1e-10
    kept = int(present.sum())
    missing = rank - kept
    if not missing:
        return b, a
    least = float(values[present].min()) if kept else 1.0
    size = math.sqrt(SEED_SIZE * least)

    def completed(frame: Tensor) -> Tensor:
        noise = torch.randn(frame.shape[0], missing, generator=generator, dtype=frame.dtype)
        q, _ = torch.linalg.qr(torch.cat((frame, noise), 1))
        return torch.cat((frame, size * q[:, kept:]), 1)

    return completed(b[:, :kept]), completed(a[:kept].mT).mT


def _root_mean_square(anchors: Sequence[Updates], names: Sequence[str]) -> float:
    """Of the Frobenius norms of updates."""
    pairs = [u.factors[name] for u in anchors for name in names if name in u.factors]
    squares = [float(((b.mT @ b) * (a @ a.mT)).sum()) for b, a in pairs]
    return math.sqrt(max(0.0, sum(squares)) / max(1, len(squares))) or 1.0


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _average(distances: Sequence[float], weights: Sequence[float]) -> float:
    return sum(w * d for w, d in zip(weights, distances, strict=True))
