"""A closed-form start for the functional distance: least squares, module by module.

In the order in which the model calls its modules, each merged update W is the solution of

    min over W of rank R  Σᵢ wᵢ E|base(x) + W x - yᵢ|² + λ |W - W₀|²

where x is the module's input in the *merged* model, with all modules before it already merged, and
yᵢ is the module's output in anchor i on the same example. So each module corrects the errors of
those before it. RegMean (Jin et al., arXiv:2212.09849) is the case in which x is taken from the
anchors, so that yᵢ = base(x) + Wᵢ x. With G = Σ wᵢ E x xᵀ + λ and C = Σ wᵢ E (yᵢ - base(x)) xᵀ +
λ W₀, the solution of full rank is M = C G⁻¹, and that of rank R is M truncated in the metric of G
(reduced-rank regression; Izenman, 1975): U Uᵀ M with the leading eigenvectors U of M G Mᵀ.

Nothing about the model is assumed but that examples do not influence each other. Each forward pass
carries every example twice, once as the merged model sees it and once as its anchor does, so that
inputs and outputs meet in one hook. All passes stop at each module, the update is solved, and all
go on: the whole model costs one forward pass over the doubled examples.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from manifold_merge.adapted_model import AdaptedModel, Factors, Updates
from manifold_merge.examples import Batch, Example
from manifold_merge.functional import by_length
from manifold_merge.statistics_modules import gradient_rows, input_rows

__all__ = ["sequential_start"]

logger = logging.getLogger(__name__)

# Solved with all examples; more of them than this change the solution by little.
MOST_EXAMPLES = 256
BATCH_SIZE = 32
# Activations of all of them are in memory at the same time.
MOST_TOKENS = 2**16
# λ, relative to the mean eigenvalue of G.
DAMPING = 0.03


@torch.no_grad()
def sequential_start(
    adapted: AdaptedModel,
    anchors: Sequence[Updates],
    examples: Sequence[Sequence[Example]],
    weights: Sequence[float],
    merged: Updates,
    *,
    rank: int | None = None,
    damping: float = DAMPING,
    most_examples: int = MOST_EXAMPLES,
) -> dict[str, Factors]:
    """Solve for each module of a merged adapter by least squares on its own inputs.

    Args:
        adapted: The hooked model, entered.
        anchors: The adapters that were merged.
        examples: Inputs of each.
        weights: Weights of the anchors.
        merged: W₀, towards which the solution is damped; its modules are the ones solved.
        rank: R; that of each module of ``merged`` if ``None``.
        damping: λ, relative to the mean eigenvalue of G.
        most_examples: Use only that many examples of each anchor, and of long texts fewer.

    Returns:
        B ``(m, R)`` and A ``(R, n)`` of each module of ``merged``; of modules without input rows
        (3d convolutions), those of ``merged``.

    Raises:
        ValueError: The model mixes examples, or calls its modules in an order that depends on them.
    """
    solver = _Solver(adapted, anchors, weights, merged, rank, damping)
    passes = []
    for i, own in enumerate(examples):
        if weights[i]:
            chosen = _within(own[:most_examples], MOST_TOKENS // len(examples))
            solver.sizes[i] = sum(1 if isinstance(x, Tensor) else len(x) for x in chosen)
            passes += [(i, batch) for batch in by_length(chosen, BATCH_SIZE)]
    with adapted.intercepted(solver.intercept, merged.replaced):
        _LockStep([solver.forward_pass(i, batch) for i, batch in passes]).run(solver)
    return {name: solver.solved.get(name, pair) for name, pair in merged.factors.items()}


class _Solver:
    """Collects moments of one module at a time, and solves for its update."""

    def __init__(
        self,
        adapted: AdaptedModel,
        anchors: Sequence[Updates],
        weights: Sequence[float],
        merged: Updates,
        rank: int | None,
        damping: float,
    ) -> None:
        self.adapted, self.anchors, self.weights, self.merged = adapted, anchors, weights, merged
        self.rank, self.damping = rank, damping
        self.sizes: dict[int, int] = {}
        self.solved: dict[str, Factors] = {}
        self.moments: _Moments | None = None
        self.local = threading.local()

    def forward_pass(self, anchor: int, examples: Sequence[Example]) -> Callable[[_Pass], None]:
        """A forward pass over the examples, each of them twice."""

        def forward(parking: _Pass) -> None:
            batch = self.adapted.collate(examples)
            mask = None if batch.mask is None else torch.cat((batch.mask, batch.mask))
            self.local.anchor, self.local.count = anchor, len(examples)
            self.local.mask, self.local.parking = batch.mask, parking
            with torch.no_grad():  # each thread has a mode of its own
                self.adapted.forward(Batch(torch.cat((batch.inputs, batch.inputs)), mask))

        return forward

    def intercept(self, name: str, module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        """Give the first half the merged update, and the second half the anchor's."""
        half = len(value) // 2
        if len(value) % (2 * self.local.count) or len(output) != len(value):
            raise ValueError(
                f"module {name!r} is called with {len(value)} rows for {2 * self.local.count} "
                "examples, so that they cannot be told apart; use start='merged'"
            )
        anchor = self.anchors[self.local.anchor]
        theirs = self.adapted.update(name, module, value[half:], output[half:], anchor)
        if name in self.merged.factors and name not in self.solved and _has_rows(module):
            bias = Updates({}, self.merged.biases)
            plain = self.adapted.update(name, module, value[:half], output[:half], bias)
            if self.moments is None:
                self.moments = _Moments(name, module)
            elif self.moments.name != name:
                raise ValueError(
                    f"the model calls {self.moments.name!r} for some examples where it calls "
                    f"{name!r} for others; use start='merged'"
                )
            anchor_weight = self.weights[self.local.anchor] / self.sizes[self.local.anchor]
            x = input_rows(module, value[:half], self.local.mask)
            target = gradient_rows(module, theirs - plain, self.local.mask)
            self.moments.add(x, target, anchor_weight)
            self.local.parking.park()
        factors = {name: self.solved.get(name) or self.merged.factors[name]} if (
            name in self.merged.factors
        ) else {}  # fmt: skip
        current = Updates(factors, self.merged.biases)
        ours = self.adapted.update(name, module, value[:half], output[:half], current)
        return torch.cat((ours, theirs))

    def solve(self) -> None:
        """Solve for the module at which all passes are parked."""
        moments = self.moments
        assert moments is not None
        b, a = self.merged.factors[moments.name]
        limit = min(self.rank or b.shape[1], b.shape[0], a.shape[1])
        left, right = moments.solve(_wide(b) @ _wide(a), limit, self.damping)
        self.solved[moments.name] = left.to(b), right.to(a)
        self.moments = None


def _within(examples: Sequence[Example], tokens: int) -> list[Example]:
    """As many examples as have at most that many tokens together, and at least one."""
    total = 0
    chosen: list[Example] = []
    for example in examples:
        total += 1 if isinstance(example, Tensor) else len(example)
        if chosen and total > tokens:
            break
        chosen.append(example)
    return chosen


def _has_rows(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv3d)


def _wide(x: Tensor) -> Tensor:
    """In float64, which Apple's devices lack."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class _Moments:
    """G and C of one module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.features = module.num_embeddings if isinstance(module, nn.Embedding) else None
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, x: Tensor, target: Tensor, weight: float) -> None:
        """Add rows x ``(N, n)``, or indices ``(N,)``, and targets ``(N, m)``."""
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        if self.features is not None:
            gram = _wide(torch.bincount(x.flatten(), minlength=self.features))
            wide = _wide(target)
            cross = wide.new_zeros(self.features, target.shape[1])
            cross = cross.index_add_(0, x.flatten().to(wide.device), wide).mT
        else:
            x = x.to(target.dtype)
            gram, cross = _wide(x.mT @ x), _wide(target.mT @ x)
        self.gram = weight * gram + (0.0 if self.gram is None else self.gram)
        self.cross = weight * cross + (0.0 if self.cross is None else self.cross)

    def solve(self, towards: Tensor, rank: int, damping: float) -> Factors:
        """Truncate the damped least-squares solution in the metric of G."""
        assert self.gram is not None
        assert self.cross is not None
        gram, cross = self.gram, self.cross
        diagonal = gram.ndim == 1
        size = damping * float((gram if diagonal else gram.diagonal()).mean())
        size = size or 1.0  # no input but zero: keep W₀
        cross = cross + size * towards.to(cross)
        if diagonal:
            full = cross / (gram + size)
        else:
            gram.diagonal().add_(size)
            root = torch.linalg.cholesky(gram)
            full = torch.cholesky_solve(cross.mT, root).mT
            if full.shape[0] > full.shape[1]:
                return _truncate_right(full, root, rank)
        _, vectors = torch.linalg.eigh(full @ cross.mT)
        left = vectors[:, -rank:].flip(-1)
        return left, left.mT @ full


def _truncate_right(full: Tensor, root: Tensor, rank: int) -> Factors:
    """The same truncation by the smaller side: right singular vectors of M L, with G = L Lᵀ."""
    scaled = full @ root
    _, vectors = torch.linalg.eigh(scaled.mT @ scaled)
    right = vectors[:, -rank:].flip(-1)
    return scaled @ right, torch.linalg.solve_triangular(root.mT, right, upper=True).mT


class _Cancelled(BaseException):
    """Ends a parked pass after another one has failed."""


class _Pass:
    """A forward pass in a thread of its own, which runs only while it is told to."""

    def __init__(self, body: Callable[[_Pass], None]) -> None:
        self.finished = False
        self.error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, args=(body,), daemon=True)
        self._thread.start()

    def _main(self, body: Callable[[_Pass], None]) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                body(self)
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.finished = True
            self._stopped.release()

    def park(self) -> None:
        """Called by the pass: wait until it is told to go on."""
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def advance(self) -> None:
        """Called from outside: run until the pass parks or ends."""
        self._go.release()
        self._stopped.acquire()

    def cancel(self) -> None:
        """End the pass where it is parked."""
        if not self.finished:
            self._cancelled = True
            self.advance()
        self._thread.join()


class _LockStep:
    """Runs passes from one stop to the next, one pass at a time and always in the same order."""

    def __init__(self, bodies: Sequence[Callable[[_Pass], None]]) -> None:
        self.passes = [_Pass(body) for body in bodies]

    def run(self, solver: _Solver) -> None:
        try:
            while not all(each.finished for each in self.passes):
                for each in self.passes:
                    if not each.finished:
                        each.advance()
                    if each.error is not None:
                        raise each.error
                if solver.moments is not None:
                    if any(each.finished for each in self.passes):
                        raise ValueError(
                            f"the model does not call {solver.moments.name!r} for all examples; "
                            "use start='merged'"
                        )
                    logger.info("sequential start: %s", solver.moments.name)
                    solver.solve()
        finally:
            for each in self.passes:
                each.cancel()
