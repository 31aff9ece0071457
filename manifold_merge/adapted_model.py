"""A base model to whose modules the updates of several adapters are added in turn, by hooks.

The base model is used as it is: hooks add B A x to the outputs of the adapted modules, for any kind
that adapters have (linear, transformers' ``Conv1D``, convolutions, embeddings), so that all
adapters share one copy of the weights, and gradients with respect to factors flow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manifold_merge.adapters import Adapter
from manifold_merge.examples import Batch, Example, collate
from manifold_merge.statistics_modules import is_conv1d

__all__ = ["AdaptedModel", "Factors", "Source", "Updates", "balanced_factors"]

Factors = tuple[Tensor, Tensor]
Source = str | os.PathLike[str] | Adapter | Mapping[str, Factors]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def balanced_factors(B: Tensor, A: Tensor) -> Factors:
    """The representative (U √S, √S Vᵀ) of the product W = B A = U S Vᵀ.

    It depends on the product alone, up to signs, which are fixed too: computations that start here
    do not depend on the gauge in which an adapter was stored.

    Args:
        B: ``(m, r)``.
        A: ``(r, n)``.

    Returns:
        Factors of the same shapes and type, computed in float64; columns sorted by size.
    """
    # Not every device has float64.
    qb, rb = torch.linalg.qr(B.cpu().double())
    qa, ra = torch.linalg.qr(A.cpu().double().mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    left, right = qb @ u, qa @ vt.mT
    largest = left.abs().argmax(0, keepdim=True)
    sign = torch.where(left.gather(0, largest) < 0, -1.0, 1.0).double()
    root = s.sqrt()
    width = B.shape[1] - len(root)  # a rank above the sizes: the rest is zero
    pad = functional.pad
    balanced = pad(left * sign * root, (0, width)), pad(right * sign * root, (0, width)).mT
    return balanced[0].contiguous().to(B), balanced[1].contiguous().to(A)


@dataclasses.dataclass(frozen=True)
class Updates:
    """What an adapter does to the base model.

    Attributes:
        factors: B ``(m, r)`` and A ``(r, n)`` by module name, in balanced form.
        biases: What is added to outputs, ``(m,)``, by module name.
        replaced: Tensors of the base model that are replaced, by name.
    """

    factors: Mapping[str, Factors]
    biases: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    replaced: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(
        cls,
        source: Source,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Updates:
        """Read an adapter folder, an opened adapter, or a mapping of factors."""
        if isinstance(source, Mapping):
            factors = {
                name: (b.detach().cpu().double(), a.detach().cpu().double())
                for name, (b, a) in source.items()
            }
            biases: dict[str, Tensor] = {}
            replaced: dict[str, Tensor] = {}
        else:
            adapter = source if isinstance(source, Adapter) else Adapter(source)
            factors = {name: adapter.factors(name, torch.float64) for name in adapter.modules}
            biases, replaced = {}, {}
            for name, extra in adapter.extras.items():
                value = adapter.extra(name, dtype=dtype, device=device)
                if extra.replaces_base:
                    replaced[name] = value
                else:
                    biases[name.removesuffix(".lora_B.bias")] = value
        balanced = {name: balanced_factors(*pair) for name, pair in factors.items()}
        return cls(
            {name: (b.to(device, dtype), a.to(device, dtype)) for name, (b, a) in balanced.items()},
            biases,
            replaced,
        )


class AdaptedModel:
    """A base model to whose modules the updates of one adapter at a time are added.

    Use it as a context, in which the model is frozen, in evaluation mode and hooked.

    Args:
        model: The base model, without adapters.
        sources: All updates that will be applied; their modules and shapes are checked.
        pad: Token that fills up short sequences.

    Raises:
        ValueError: A module is missing in the model, has another shape or a kind without updates;
            names it and says what to do.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> updates = Updates.read({"0": (torch.ones(4, 1), torch.ones(1, 3))})
        >>> x = torch.randn(5, 3)
        >>> with torch.no_grad(), AdaptedModel(model, [updates]) as adapted:
        ...     plain = adapted(Batch(x, None), Updates({}))
        ...     moved = adapted(Batch(x, None), updates)
        >>> torch.equal(plain, model(x)), torch.equal(plain, moved)
        (True, False)
    """

    def __init__(self, model: nn.Module, sources: Sequence[Updates], *, pad: int = 0) -> None:
        if hasattr(model, "peft_config"):
            raise ValueError(
                "model has adapters of PEFT in it; give the base model, loaded without them"
            )
        self.model = model
        self.pad = pad
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found = dict(model.named_modules())
        self.modules: dict[str, nn.Module] = {}
        for updates in sources:
            for name, pair in updates.factors.items():
                if name not in found:
                    raise ValueError(_missing(name, model, found))
                _check_module(name, found[name], found, pair)
                self.modules[name] = found[name]
        self.called: set[str] = set()
        self.current = Updates({})
        self.intercept: Callable[[str, nn.Module, Tensor, Tensor], Tensor] | None = None
        self._parameters = dict(model.named_parameters()) | dict(model.named_buffers())
        # The features of a transformers model with a head are those of its body: a head may have
        # as many outputs as there are words, and differs from anchor to anchor.
        body = getattr(model, "base_model", model)
        self.body = body if isinstance(body, nn.Module) else model
        self._forward = inspect.signature(self.body.forward).parameters
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> AdaptedModel:
        training = [(module, module.training) for module in self.model.modules()]
        trainable = [p for p in self.model.parameters() if p.requires_grad]

        def restore() -> None:
            for module, flag in training:
                module.training = flag
            for parameter in trainable:
                parameter.requires_grad_(True)

        self._stack.callback(restore)
        self.model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        for name, module in self.modules.items():
            self._stack.callback(module.register_forward_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, batch: Batch, updates: Updates) -> Tensor:
        """Run the model with updates; returns its last hidden state, output or logits.

        Returns:
            ``(batch, seq, d)`` or ``(batch, d)``, as the model has it.
        """
        return self.states(batch, updates)[-1]

    def states(self, batch: Batch, updates: Updates, *, layers: bool = False) -> list[Tensor]:
        """Run the model with updates; returns the output of each layer, or only the last one.

        Raises:
            ValueError: Layers are asked for, and the model is none of transformers' that tells.
        """
        transformer = hasattr(self.body, "config")  # other models would choke on the option
        options = {"output_hidden_states": True} if layers and transformer else {}
        before, self.current = self.current, updates
        try:
            with self._replace(updates.replaced):
                result = self.forward(batch, **options)
        finally:
            self.current = before
        if not layers:
            return [_hidden(result)]
        between = getattr(result, "hidden_states", None)
        if not between:
            raise ValueError(
                f"features: {type(self.model).__name__} does not return the states of its layers; "
                "leave 'layers' out"
            )
        # The first is the embedding, and the last is the output, before or after a final norm.
        return [*between[1:-1], _hidden(result)]

    @contextlib.contextmanager
    def intercepted(
        self,
        intercept: Callable[[str, nn.Module, Tensor, Tensor], Tensor],
        replaced: Mapping[str, Tensor],
    ) -> Iterator[None]:
        """Let a function of (name, module, input, plain output) give the modules' outputs."""
        self.intercept = intercept
        try:
            with self._replace(replaced):
                yield
        finally:
            self.intercept = None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Put examples side by side on the model's device."""
        return collate(examples, self.device, self.pad)

    def idle(self, names: Iterable[str]) -> list[str]:
        """Modules that took no part in the forward passes so far, so that features tell nothing.

        Raises:
            ValueError: None of them took part.
        """
        names = list(names)
        idle = [name for name in names if name not in self.called]
        if names and len(idle) == len(names):
            raise ValueError(
                f"module {idle[0]!r} and all other adapted ones took no part in the forward pass; "
                "load the model with the class that the adapters were trained with"
            )
        return idle

    def forward(self, batch: Batch, **options: Any) -> Any:
        """Run the model with the hooks as they are; returns what its body returns."""
        if batch.mask is None or "input_ids" not in self._forward:
            return self.body(batch.inputs, **options)
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(self.model).__name__} is an encoder with a decoder, which needs inputs of "
                "its own; wrap it in a module whose forward takes input_ids and attention_mask and "
                "returns the features as one tensor"
            )
        options["input_ids"] = batch.inputs
        if "attention_mask" in self._forward:
            options["attention_mask"] = batch.mask.long()
        elif not bool(batch.mask.all()):
            raise ValueError(
                f"{type(self.model).__name__} takes no attention_mask, so that texts of one batch "
                "must have one length; use batch_size=1, or texts of one length"
            )
        if "use_cache" in self._forward:
            options["use_cache"] = False
        return self.body(**options)

    @contextlib.contextmanager
    def _replace(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        # Heads that this model lacks have no bearing on its features.
        present = {n: t for n, t in tensors.items() if n in self._parameters}
        saved = {name: self._parameters[name].data for name in present}
        try:
            for name, tensor in present.items():
                if tensor.shape != saved[name].shape:
                    raise ValueError(
                        f"an adapter replaces {name!r} by a tensor of shape {tuple(tensor.shape)}, "
                        f"but it is {tuple(saved[name].shape)} in the model; resize the model first"
                    )
                self._parameters[name].data = tensor.to(saved[name])
            yield
        finally:
            for name, value in saved.items():
                self._parameters[name].data = value

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.called.add(name)
            if self.intercept is not None:
                return self.intercept(name, module, args[0], output)
            return self.update(name, module, args[0], output, self.current)

        return hook

    @staticmethod
    def update(
        name: str, module: nn.Module, value: Tensor, output: Tensor, updates: Updates
    ) -> Tensor:
        """The output of a module with its update added."""
        if name in updates.factors:
            output = output + _apply(module, value, *updates.factors[name]).to(output.dtype)
        if name in updates.biases:
            shape = [-1] + [1] * (_spatial(module))
            output = output + updates.biases[name].reshape(shape).to(output.dtype)
        return output


def _spatial(module: nn.Module) -> int:
    return len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else 0


def _apply(module: nn.Module, value: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """B A x, in the type of the factors."""
    if isinstance(module, nn.Embedding):
        update = functional.linear(functional.embedding(value, A.mT), B)
        scale = getattr(module, "embed_scale", None)  # Gemma's embeddings are scaled
        return update if scale is None else update * scale
    value = value.to(A.dtype)
    if isinstance(module, _CONVOLUTIONS):
        # The layer's own code knows its padding, stride and dilation.
        inner = module._conv_forward(value, A.reshape(-1, *module.weight.shape[1:]), None)
        channel = inner.ndim - 1 - _spatial(module)
        return functional.linear(inner.movedim(channel, -1), B).movedim(-1, channel)
    return functional.linear(functional.linear(value, A), B)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Sizes (m, n) of a module's weight as a matrix; None if it does not tell."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, _CONVOLUTIONS):
        return module.weight.shape[0], module.weight[0].numel()
    if is_conv1d(module):
        n, m = getattr(module, "weight").shape  # noqa: B009 (a type that is not imported)
        return m, n
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def _check_module(
    name: str, module: nn.Module, found: Mapping[str, nn.Module], pair: Factors
) -> None:
    parent = found.get(name.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"module {name!r} belongs to a torch.nn.MultiheadAttention, which reads its weights "
            "without calling its layers; merge this adapter without data"
        )
    expected = _shape(module)
    if expected is None:
        raise ValueError(
            f"module {name!r} is a {type(module).__name__}, which no adapter updates; the model is "
            "of another class than the adapters were trained with"
        )
    if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
        raise ValueError(
            f"module {name!r} is a convolution with {module.groups} groups, whose weight is not "
            "one matrix; merge this adapter without data"
        )
    got = pair[0].shape[0], pair[1].shape[1]
    if got != expected:
        raise ValueError(
            f"module {name!r} is {expected[0]} x {expected[1]} in the model but {got[0]} x "
            f"{got[1]} in an adapter; load the base model that the adapters were trained on"
        )


def _missing(name: str, model: nn.Module, found: Mapping[str, nn.Module]) -> str:
    last = name.rpartition(".")[2]
    like = next((n for n in found if n.endswith(last)), next(iter(found), ""))
    return (
        f"module {name!r} of an adapter is not in {type(model).__name__}, whose modules are named "
        f"like {like!r}; load the model with the class that the adapters were trained with"
    )


def _hidden(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    for name in ("last_hidden_state", "hidden_states", "logits"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
        if value:
            last: Tensor = value[-1]
            return last
    if isinstance(result, (tuple, list)) and isinstance(result[0], Tensor):
        return result[0]
    raise ValueError(
        f"the model returns a {type(result).__name__} without last_hidden_state, hidden_states or "
        "logits; wrap it in a module that returns the features as one tensor"
    )
