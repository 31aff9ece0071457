"""Second moments of what flows through a model: the metrics of calibrated merging.

For a linear layer y = W x, the expected change of the output under a change dW of the weight is
E|dW x|² = tr(dW G dWᵀ) with the input Gram G = E[x xᵀ] (Jin et al., arXiv:2212.09849, "RegMean").
The Fisher information adds the output side: F ≈ G ⊗ E[g gᵀ] with g the gradient of the loss with
respect to y (K-FAC; Martens and Grosse, arXiv:1503.05671; with weight sharing, Eschenhagen et al.,
arXiv:2311.00636, "expand"), or is kept as its diagonal (Matena and Raffel, arXiv:2111.09832).

:func:`collect_statistics` makes one pass over a few unlabelled batches and returns
:class:`Statistics`, a small file that travels beside an adapter in place of the data.

**What a file can leak.** A Gram of fewer tokens than features spans exactly the layer's inputs,
and that of an embedding tells which words occurred how often. Sums over many texts hide single
texts, but that is no guarantee of privacy: publish statistics only of texts that you could publish.

Padding, other types of layers than linear, shared inputs and low-rank storage are why this file has
its own hooks: curvlinops' K-FAC operators (the oracle in our tests) count padding tokens, and know
linear and 2d-convolutional layers only.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_merge.statistics_file import STATISTICS_NAME, Statistics
from manifold_merge.statistics_fisher import (
    LIKELIHOODS,
    default_output,
    example_loss,
    fisher_modules,
    squared_gradients,
)
from manifold_merge.statistics_gram import DiagonalSum, Gram, GramSum, gram_sum
from manifold_merge.statistics_modules import (
    attention_mask,
    gradient_rows,
    gram_features,
    input_rows,
    is_embedding,
    select_modules,
)

__all__ = ["STATISTICS_NAME", "Gram", "Statistics", "collect_statistics"]

logger = logging.getLogger(__name__)

KINDS = ("input_gram", "kfac", "diagonal")

Kind = Literal["input_gram", "kfac", "diagonal"]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    modules: Iterable[str] | None = None,
    *,
    kind: Kind = "input_gram",
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
    mask: Callable[[Any], Tensor | None] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[[Any, Any], Tensor] | None = None,
    likelihood: Literal["categorical", "gaussian"] = "categorical",
    labels: Literal["sampled", "given"] = "sampled",
    draws: int = 1,
    output_rank: int | None = None,
    seed: int = 0,
    model_name: str | None = None,
) -> Statistics:
    """Collect statistics in one pass over the batches; the model is left as it was.

    Args:
        model: Any module; a model wrapped by PEFT is measured with its active adapter, under the
            base model's names.
        batches: A mapping is passed as keyword arguments, without ``"labels"``; of a list or tuple
            the first item is the input and the second the labels; anything else is the input.
        modules: Names or ends of names. Default: what PEFT adapts, else every linear,
            convolutional (1d, 2d) and embedding layer.
        kind: ``"input_gram"`` needs forward passes only. ``"kfac"`` adds output-gradient Grams
            and ``"diagonal"`` gives the diagonal Fisher; both add one backward pass.
        rank: Store Grams much wider than ``rank`` as low rank plus exact diagonal, sketched on
            the way, which also costs less time. ``None`` stores every Gram exactly.
        dtype: Type in which batches are added up. Products within a batch have the model's type,
            at least float32.
        mask: Function from the batch to a ``(batch, seq)`` mask of the tokens that count, or
            ``None``. Default: the batch's ``attention_mask``. It applies to inputs of shape
            ``(batch, seq, d)``, or ``(batch * seq, d)``.
        forward: Function (model, batch) to the model's result, if calling is not enough.
        output: Function (result, batch) to the tensor whose likelihood is differentiated. Default:
            the result if it is a tensor, its ``logits``, or the mean of its ``last_hidden_state``
            over the tokens that count.
        likelihood: ``"categorical"`` for logits ``(batch, ..., classes)``; ``"gaussian"`` for
            features, whose Fisher is the curvature of the squared distance between outputs.
        labels: ``"sampled"`` draws labels from the model: the true Fisher, with no labels needed.
            ``"given"`` takes the batch's: the empirical Fisher.
        draws: Labels drawn for each example, each at the price of one backward pass. Gradients of
            one drawn label are noisy; their Gram settles with examples times draws.
        output_rank: Like ``rank``, for the Grams of output gradients; ``rank`` if ``None``.
        seed: Of the drawn labels.
        model_name: Stored with the statistics. Default: the model's ``name_or_path``.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: An option is unknown, there are no batches, a module is unknown, unsupported or
            never called, or activations are not finite; names it and says what to do.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(),
        ...                             torch.nn.Linear(4, 2))
        >>> x = torch.randn(8, 3)
        >>> statistics = collect_statistics(model, [x[:5], x[5:]], kind="kfac")
        >>> statistics.names
        ('0', '2')
        >>> torch.allclose(statistics.gram("0").dense(), (x.T @ x / 8).double(), atol=1e-6)
        True
        >>> statistics.output_gram("2").dense().shape
        torch.Size([2, 2])
    """
    for argument, option, known in (
        ("kind", kind, KINDS),
        ("likelihood", likelihood, LIKELIHOODS),
        ("labels", labels, ("sampled", "given")),
    ):
        if option not in known:
            raise ValueError(f"{argument} is {option!r}, expected one of {', '.join(known)}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1, or None for exact Grams")
    if output_rank is not None and output_rank < 1:
        raise ValueError(f"output_rank is {output_rank}, expected at least 1, or None")
    if draws < 1 or (draws > 1 and labels == "given"):
        raise ValueError(
            f"draws is {draws}, expected 1 or more, and 1 with labels='given': those are not drawn"
        )
    chosen = select_modules(model, modules)
    watcher = _Watcher(chosen, kind, (rank, output_rank or rank), dtype, draws)
    if kind == "diagonal":
        watcher.modules = fisher_modules(model, chosen, everything=modules is None)
    generator = torch.Generator().manual_seed(seed)
    examples = 0
    with _quiet(model), watcher.hooks(), torch.set_grad_enabled(kind != "input_gram"):
        for batch in batches:
            kept = watcher.mask = attention_mask(batch, mask)
            result = (forward or _call)(model, batch)
            examples += _examples(batch)
            if kind != "input_gram":
                value = output(result, batch) if output else default_output(result, kept)
                given = _labels(batch) if labels == "given" else None
                for left in range(draws, 0, -1):
                    loss = example_loss(value, kept, likelihood, given, generator)
                    loss.backward(retain_graph=left > 1)
                    watcher.end_draw()
            watcher.end_batch(examples)
    if examples == 0:
        raise ValueError("batches is empty; give at least one batch")
    options: dict[str, Any] = {"rank": rank, "normalisation": "mean over tokens"}
    if kind != "input_gram":
        options |= {"likelihood": likelihood, "labels": labels, "draws": draws, "seed": seed}
    stated = getattr(getattr(model, "config", None), "name_or_path", None)
    return watcher.result(examples, model_name or str(stated or type(model).__name__), options)


class _Watcher:
    """The hooks of one pass and what they have added up."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        kind: str,
        ranks: tuple[int | None, int | None],
        dtype: torch.dtype,
        draws: int,
    ) -> None:
        self.modules = dict(modules)
        self.kind, self.dtype, self.draws = kind, dtype, draws
        self.rank, self.output_rank = ranks
        self.mask: Tensor | None = None
        self.inputs: dict[str, GramSum] = {}
        self.outputs: dict[str, GramSum] = {}
        self.diagonals: dict[str, Tensor] = {}
        self.owners: dict[str, str] = {}
        self._called: set[str] = set()
        self._live: list[tuple[weakref.ref[Tensor], str]] = []
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(
                    f"module {name!r} was called without a positional tensor; leave it out of "
                    "`modules`"
                )
            self._called.add(name)
            value = args[0].detach()
            if self.kind != "diagonal":
                self._add_input(name, module, args[0], value)
            if self.kind == "input_gram":
                return None
            if not result.requires_grad:
                # Nothing before this layer is differentiated, so that parameters may stay frozen.
                result = result.detach().requires_grad_()
            result.register_hook(lambda gradient: self._add_output(name, module, value, gradient))
            return result

        return hook

    def _add_input(self, name: str, module: nn.Module, tensor: Tensor, value: Tensor) -> None:
        # Query, key and value are handed the very same tensor: it is counted once, while it lives.
        self._live = [(ref, owner) for ref, owner in self._live if ref() is not None]
        owner = next((owner for ref, owner in self._live if ref() is tensor), None)
        features = gram_features(module)
        if owner is not None and self.inputs[owner].features != features:
            owner = None  # an embedding's indices, or a convolution with another kernel
        if self.owners.setdefault(name, owner or name) != (owner or name):
            raise ValueError(
                f"module {name!r} shares its input with {owner or 'no other module'!r} now but "
                f"with {self.owners[name]!r} in an earlier call; collect it in a pass of its own "
                "with modules=[...]"
            )
        if owner is not None and not is_embedding(module):
            return
        if name not in self.inputs:
            device = value.device
            self.inputs[name] = (
                DiagonalSum(features, self.dtype, device)
                if is_embedding(module)
                else gram_sum(features, self.rank, self.dtype, device)
            )
        self._live.append((weakref.ref(tensor), name))
        self.inputs[name].add(input_rows(module, value, self.mask))

    def _add_output(self, name: str, module: nn.Module, value: Tensor, gradient: Tensor) -> None:
        gradient = gradient.detach()
        if self.kind == "diagonal":
            self._calls.setdefault(name, []).append((value, gradient))
            return
        rows = gradient_rows(module, gradient, self.mask)
        if name not in self.outputs:
            self.outputs[name] = gram_sum(rows.shape[-1], self.output_rank, self.dtype, rows.device)
        self.outputs[name].add(rows)

    def end_batch(self, examples: int) -> None:
        self._live.clear()
        for total in self.outputs.values():
            total.count = examples * self.draws

    def end_draw(self) -> None:
        for name, calls in self._calls.items():
            for part, squares in squared_gradients(self.modules[name], calls, self.mask).items():
                key = f"{name}.{part}"
                if key not in self.diagonals:
                    self.diagonals[key] = torch.zeros_like(squares, dtype=self.dtype)
                self.diagonals[key] += squares
        self._calls.clear()

    def result(self, examples: int, model_name: str, options: Mapping[str, Any]) -> Statistics:
        reached = set(self.outputs) if self.kind == "kfac" else self._called
        idle = sorted(set(self.modules) - reached)
        if idle:
            raise ValueError(
                f"module {idle[0]!r}{f' and {len(idle) - 1} more' if len(idle) > 1 else ''} took "
                "no part in the forward pass (or no gradient reached it); leave it out of `modules`"
            )
        for side, sums in (("input", self.inputs), ("output gradient", self.outputs)):
            for name, total in sums.items():
                if total.count == 0:
                    raise ValueError(f"every token of module {name!r} is masked; check mask=")
                if not bool(total.sum.isfinite().all()):
                    raise ValueError(
                        f"the {side} of module {name!r} is not finite; run the model in float32 "
                        "and check its inputs"
                    )
        for key, squares in self.diagonals.items():
            if not bool(squares.isfinite().all()):
                raise ValueError(f"the gradient of {key!r} is not finite; run the model in float32")
        grams = {name: _on_cpu(total.result()) for name, total in self.inputs.items()}
        energy = min((gram.energy for gram in grams.values()), default=1.0)
        if energy < 1:
            logger.info(
                "rank %s: the least explained Gram keeps %.3f of its trace and all of its diagonal",
                self.rank,
                energy,
            )
        return Statistics(
            kind=self.kind,
            input_grams=grams,
            owners=dict(sorted(self.owners.items())),
            output_grams={n: _on_cpu(s.result()) for n, s in sorted(self.outputs.items())},
            diagonals={
                k: (d / (examples * self.draws)).cpu() for k, d in sorted(self.diagonals.items())
            },
            examples=examples,
            model_name=model_name,
            options=options,
        )


def _on_cpu(gram: Gram) -> Gram:
    parts = {n: getattr(gram, n) for n in ("matrix", "factor", "remainder", "mean")}
    return replace(gram, **{n: t.cpu() for n, t in parts.items() if t is not None})


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _examples(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    first = batch if isinstance(batch, Tensor) else next(v for v in values if isinstance(v, Tensor))
    return int(first.shape[0])


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        return batch[1]
    raise ValueError(
        "labels='given' needs batches with 'labels', or pairs (input, labels); use "
        "labels='sampled' where there are none"
    )


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters, and back."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)
