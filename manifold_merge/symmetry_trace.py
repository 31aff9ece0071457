"""Follow a network's forward pass and label the axes of every tensor in it.

The pass is run for real, operation by operation, below autograd: control flow that depends on data
is followed as it happens, and nothing has to be exported or compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import manifold_merge.symmetry_rules_index
import manifold_merge.symmetry_rules_linear  # noqa: F401  (both modules register their rules)
from manifold_merge.symmetry_axes import Families
from manifold_merge.symmetry_combine import combine
from manifold_merge.symmetry_labels import MOST_DEPENDENT, Label
from manifold_merge.symmetry_rules import INDEXED, RULES, Call, Rule, pointwise

__all__ = ["Trace", "exact", "tensors_of", "trace"]

logger = logging.getLogger(__name__)

INPUT = "an axis of the model's inputs"
OUTPUT = "an axis of the model's outputs"
CONSTANT = "meets a constant of the model"
UNUSED = "not used on the example inputs"

# Results whose integer values still are positions in the same family.
_KEEPS_POSITIONS = {
    *("clone", "contiguous", "_to_copy", "detach", "alias", "view", "_unsafe_view", "reshape"),
    *("squeeze", "unsqueeze", "permute", "t", "transpose", "expand", "repeat", "select", "slice"),
    *("unbind", "split", "split_with_sizes", "embedding", "index", "index_select", "gather"),
    *("scatter", "scatter_add", "index_add", "flatten", "unflatten", "_reshape_alias"),
}
_VIEWS = {
    *("detach", "alias", "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "permute", "t"),
    *("transpose", "expand", "select", "slice", "unbind", "split", "split_with_sizes", "chunk"),
}
_UNIFORM = {"zeros", "ones", "full", "empty", "empty_strided", "empty_like", "zeros_like"}
_UNIFORM |= {"ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty"}
_UNIFORM |= {"new_empty_strided", "scalar_tensor"}
_ZERO = {"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided"}


@dataclass
class Trace:
    """What a forward pass says about the axes of a model's tensors.

    Args:
        families: The store of nodes.
        labels: The label of each tensor of the state dict, by its first name.
        aliases: Other names of tensors that are shared, and their first names.
        shapes: Shapes of the labelled tensors.
        unused: Tensors of which some part took no part in the computation.
    """

    families: Families
    labels: dict[str, Label]
    aliases: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    unused: list[str]


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, dictionaries and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dataclass_fields__"):
            found += [
                t for key in leaf.__dataclass_fields__ for t in tensors_of(getattr(leaf, key))
            ]
    return found


class _Exact(TorchDispatchMode):
    """Keeps float64 where a model rounds to a shorter type, as many norms and softmaxes do."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("dtype")
        rounds = func.overloadpacket.__name__ == "_to_copy" and target is not None
        if rounds and target.is_floating_point and args[0].dtype is torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def exact() -> Iterator[None]:
    """Run a model in float64 throughout, and attention by its definition, without fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    backend = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    try:
        with backend, torch.no_grad(), _Exact():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(
    model: nn.Module,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    output: Callable[[Any], Any] | None = None,
) -> Trace:
    """Run the model once and label its parameters and buffers."""
    families = Families()
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    labels: dict[str, Label] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        elif tensor.is_floating_point():
            first[id(tensor)] = name
            tensors[name] = tensor
            labels[name] = _free_label(families, tensor.shape)
    mode = _Labelling(families)
    for name, tensor in tensors.items():
        mode.remember(tensor, labels[name])
    for tensor in tensors_of((inputs, options)):
        mode.remember(tensor, Label.fresh(families, tensor.shape, INPUT))
    with exact(), _Leaks(mode), mode:
        result = model(*inputs, **options)
    for tensor in tensors_of(result if output is None else output(result)):
        mode.touched.update(mode.label(tensor).nodes())
        mode.label(tensor).settle(INDEXED)
        mode.label(tensor).freeze(None, OUTPUT).freeze_codomain(OUTPUT)
    touched = {families.find(leaf) for node in mode.touched for leaf in families.leaves(node)}
    unused = []
    for name, tensor in tensors.items():
        nodes = labels[name].nodes() if 0 not in tensor.shape else []
        leaves = {families.find(leaf) for node in nodes for leaf in families.leaves(node)}
        idle = [leaf for leaf in leaves - touched if families.reason(leaf) is None]
        if id(tensor) not in mode.used or idle:
            unused.append(name)
        for leaf in idle:
            families.freeze(leaf, UNUSED)
            families.fix_frame(leaf)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Trace(families, {k: v.resolved() for k, v in labels.items()}, aliases, shapes, unused)


def _free_label(families: Families, shape: Sequence[int]) -> Label:
    """New nodes; those of the later axes may depend on the index of the first."""
    label = Label.fresh(families, shape)
    if not shape or not 1 < shape[0] <= MOST_DEPENDENT:
        return label
    factors = label.factors
    for number, factor in enumerate(factors[1:], start=1):
        nodes = factor.nodes.repeat(shape[0], axis=0)
        for where in range(1, shape[0]):
            nodes[where] = families.new(factor.size)
        factors[number] = type(factor)(factor.size, nodes)
    return label.with_factors(factors)


class _Labelling(TorchDispatchMode):
    """Labels the result of every operation."""

    def __init__(self, families: Families) -> None:
        super().__init__()
        self.families = families
        self.used: set[int] = set()
        self.touched: set[int] = set()
        self._labels = WeakTensorKeyDictionary()
        self._storages: dict[tuple[Any, ...], tuple[Tensor, Label]] = {}

    def remember(self, tensor: Tensor, label: Label) -> None:
        self._labels[tensor] = label
        self._storages[_place(tensor)] = (tensor, label)

    def label(self, tensor: Tensor) -> Label:
        self.used.add(id(tensor))
        known = self._labels.get(tensor)
        if known is not None:
            return known
        # ``parameter.data`` is a new tensor over the same numbers.
        same = self._storages.get(_place(tensor))
        if same is not None:
            self.used.add(id(same[0]))
            return same[1]
        label = Label.fresh(self.families, tensor.shape, CONSTANT)
        self._labels[tensor] = label
        return label

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket.__name__
        mutated = func._schema.is_mutable
        name = packet[:-1] if packet.endswith("_") and not packet.endswith("__") else packet
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        arguments = self._arguments(func, args, kwargs)
        tensors = tensors_of((list(args), kwargs))
        call = Call(name, arguments, [tuple(each.shape) for each in outputs], self.families)
        labels = self._labelled(call, func, tensors)
        for tensor, label in zip(outputs, labels, strict=True):
            if mutated and (old := self._labels.get(tensor)) is not None:
                names = range(len(old.axes))
                combine(old, names, label, names, names)
            self._labels[tensor] = label
        return result

    def _arguments(self, func: Any, args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for number, argument in enumerate(func._schema.arguments):
            if number < len(args):
                value = args[number]
            else:
                value = kwargs.get(argument.name, argument.default_value)
            arguments[argument.name] = self._with_labels(value)
        return arguments

    def _with_labels(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.label(value)
        if isinstance(value, list | tuple):
            return [self._with_labels(each) for each in value]
        return value

    def _labelled(self, call: Call, func: Any, tensors: list[Tensor]) -> list[Label]:
        if call.name in _UNIFORM:
            labels = [_free_label(self.families, shape) for shape in call.shapes]
            for label in labels:
                if call.name not in _ZERO:
                    label.fix_frames()
            return labels
        if not tensors:
            return [Label.fresh(self.families, shape, CONSTANT) for shape in call.shapes]
        if call.name not in _VIEWS:
            for label in call.labels:
                label.settle(INDEXED)
                self.touched.update(label.nodes())
        if call.name not in _KEEPS_POSITIONS:
            for label in call.labels:
                label.freeze_codomain(f"its positions are used as numbers ({call.name})")
        masked = (
            call.name != "embedding"
            and "indices" in call.arguments
            and any(t.dtype is torch.bool for t in tensors[1:])
        )
        found = RULES.get(call.name)
        if found is None and torch.Tag.pointwise in func.tags:
            found = pointwise
        if found is not None and not masked:
            try:
                return self._by_rule(found, call)
            except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
                # Ties that were made so far are only too many; the axes are frozen below.
                logger.debug("the rule for %s does not fit this call", call.name, exc_info=True)
        if all(self._is_constant(label) for label in call.labels):
            return [Label.fresh(self.families, shape, CONSTANT) for shape in call.shapes]
        reason = f"the operation {call.name} is not understood"
        for label in call.labels:
            label.freeze(None, reason).freeze_codomain(reason)
        return [Label.fresh(self.families, shape, reason) for shape in call.shapes]

    def _by_rule(self, rule: Rule, call: Call) -> list[Label]:
        result = rule(call)
        labels = result if isinstance(result, list) else [result]
        for label, shape in zip(labels, call.shapes, strict=True):
            if label.shape != shape and 0 not in shape:
                raise AssertionError(f"{call.name}: labelled {label.shape}, computed {shape}")
        return labels

    def _is_constant(self, label: Label) -> bool:
        leaves = [leaf for node in label.nodes() for leaf in self.families.leaves(node)]
        return label.codomain is None and all(
            self.families.reason(leaf) == CONSTANT for leaf in leaves
        )


class _Leaks(TorchFunctionMode):
    """Freezes tensors whose numbers leave PyTorch, where nobody can follow them."""

    _NAMES = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "item"})

    def __init__(self, labelling: _Labelling) -> None:
        super().__init__()
        self._labelling = labelling

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.one_hot and args[1:] and args[1] > 0:
            # PyTorch first reads the numbers to check them, which is no use of their values.
            zeros = torch.zeros((*args[0].shape, args[1]), dtype=torch.long, device=args[0].device)
            return zeros.scatter_(-1, args[0].unsqueeze(-1), 1)
        if getattr(func, "__name__", "") in self._NAMES and isinstance(args[0], Tensor):
            reason = "its numbers leave PyTorch"
            self._labelling.label(args[0]).settle(reason)
            self._labelling.label(args[0]).freeze(None, reason).freeze_codomain(reason)
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
