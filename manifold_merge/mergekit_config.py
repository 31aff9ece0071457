"""mergekit's YAML, read: which models, which method, and what is said about each tensor.

The schema is that of mergekit 0.1 (Goddard et al., arXiv:2403.13257). What is not understood, or
has no counterpart here, is refused by name: a recipe is never carried out in part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["METHODS", "MergekitError", "MergekitRecipe", "Slice", "Source", "read_mergekit"]

# Method to the parameters that each model has, and that all share.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("weight",), ("normalize",)),
    "slerp": ((), ("t",)),
    "karcher": ((), ("max_iter", "tol")),
    "task_arithmetic": (("weight",), ("normalize", "lambda", "int8_mask")),
}
_ELSEWHERE = {
    "multislerp": "it is one step of the iteration that karcher carries to its end: write "
    "merge_method: karcher, or manifold-merge models --geometry sphere --weights W,W,...",
    "nuslerp": "write merge_method: slerp, or manifold-merge models --geometry sphere "
    "--weights W,W",
    "passthrough": "nothing is averaged: copy the tensors with safetensors",
    "nearswap": "it is no mean of the models",
    "arcee_fusion": "it is no mean of the models",
    "model_stock": "its weights depend on angles between models: give weights to linear or karcher",
}
_TRANSFORMS = (
    "its rules for single entries exist for adapters: extract or train adapters, and merge them "
    "with manifold-merge adapters --transform ties=DENSITY (--help lists the transforms)"
)
_KEYS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype",
         "tokenizer_source", "tokenizer")  # fmt: skip
_UNSUPPORTED = {
    "modules": "models of several modules are not read; merge each module's weights by themselves",
    "chat_template": "leave it out, and put chat_template.jinja into the output folder",
    "name": "mergekit does not use it either; leave it out",
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_YES_OR_NO = ("normalize", "int8_mask")

Settings = Mapping[str, Any]


class MergekitError(ValueError):
    """A recipe that cannot be read, or not be carried out here."""


@dataclass(frozen=True)
class Source:
    """One model of a slice."""

    model: str
    layers: tuple[int, int] | None  # None: all
    parameters: Settings


@dataclass(frozen=True)
class Slice:
    """Consecutive layers, and what is said about them."""

    sources: tuple[Source, ...]
    parameters: Settings


@dataclass(frozen=True)
class MergekitRecipe:
    """A configuration that has been read, and can be carried out.

    Attributes:
        path: The file.
        method: ``merge_method``.
        models: Names of the models, ``base_model`` first if there is one, else in order.
        base: ``base_model``.
        slices: At least one; ``models:`` is one slice of all layers.
        parameters: Those at the top.
        dtype: Type of the output; that of the first model if ``None``.
        tokenizer: ``tokenizer_source``.
    """

    path: Path
    method: str
    models: tuple[str, ...]
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Settings = field(default_factory=dict)
    dtype: torch.dtype | None = None
    tokenizer: str | None = None

    def setting(
        self, key: str, tensor: str, t: float | None, part: Slice, source: Source | None = None
    ) -> Any:
        """What the recipe says about one tensor, the closest scope first; ``None`` if nothing.

        Args:
            key: Name of the parameter.
            tensor: Name of the tensor.
            t: How deep in the slice it is, from 0 to 1; ``None`` if that is not known.
            part: The slice that it is in.
            source: The model in question, for parameters that models have.

        Raises:
            MergekitError: A value is none, or depends on a depth that is not known.
        """
        scopes = [part.parameters, self.parameters]
        if source is not None:
            scopes.insert(0, source.parameters)
        for scope in scopes:
            if key in scope:
                value = self._value(scope[key], key, tensor, t)
                if value is not None:
                    return value
        return None

    def _value(self, setting: Any, key: str, tensor: str, t: float | None) -> Any:
        if isinstance(setting, Mapping):
            setting = [setting]
        if not isinstance(setting, list):
            return _number(self.path, setting, key)
        if not setting or not isinstance(setting[0], Mapping):
            return self._at_depth(setting, key, tensor, t)
        for condition in setting:
            wanted = condition.get("filter")
            if wanted is None or wanted == "*" or wanted in tensor:
                return self._value(condition["value"], key, tensor, t)
        return None

    def _at_depth(self, values: list[Any], key: str, tensor: str, t: float | None) -> Any:
        """A list is a gradient: its values stand at equal distances over the layers."""
        numbers = [_number(self.path, x, key) for x in values]
        if len(set(numbers)) == 1:
            return numbers[0]
        if not numbers:
            return None
        if t is None:
            raise MergekitError(
                f"{self.path}: parameters.{key} changes over the layers, and it cannot be told how "
                f"deep tensor {tensor!r} is: there are several stacks of layers, or more layers "
                f"than config.json says; give it a value of its own with - filter: {tensor}"
            )
        place = t * (len(numbers) - 1)
        before = min(int(place), len(numbers) - 1)
        after = min(before + 1, len(numbers) - 1)
        share = place - before
        if key in _YES_OR_NO:
            return numbers[before]
        return (1 - share) * numbers[before] + share * numbers[after]


def read_mergekit(path: str | os.PathLike[str]) -> MergekitRecipe:
    """Read a configuration of mergekit, and refuse what has no counterpart here.

    Args:
        path: A YAML file, as for ``mergekit-yaml``.

    Returns:
        The recipe; no model has been looked at.

    Raises:
        FileNotFoundError: There is no such file.
        MergekitError: It is no such configuration, or a key, method or parameter is not supported;
            the message names it and says what to do.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "recipe.yml")
        >>> text = "{merge_method: slerp, base_model: a, models: [{model: b}], "
        >>> _ = file.write_text(text + "parameters: {t: 0.3}}")
        >>> read_mergekit(file).models
        ('a', 'b')
    """
    import yaml  # type: ignore[import-untyped]

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the YAML file of a mergekit recipe")
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergekitError(f"{file} is not one YAML document ({error}); repair it") from error
    if not isinstance(document, Mapping) or "merge_method" not in document:
        raise MergekitError(
            f"{file}: expected a mergekit configuration with merge_method: ...; is this another "
            "file (a mixture of experts or an evolution)?"
        )
    for key, remedy in _UNSUPPORTED.items():
        if document.get(key) is not None:
            raise MergekitError(f"{file}: {key}: {remedy}")
    _check_keys(file, document, (*_KEYS, *_UNSUPPORTED), "the configuration")
    method = _method(file, document["merge_method"])
    base = _model(file, "base_model", document.get("base_model"))
    slices = _slices(file, document, base, method)
    models = tuple(source.model for source in slices[0].sources)
    for number, part in enumerate(slices):
        if {source.model for source in part.sources} != set(models):
            raise MergekitError(
                f"{file}: slices[{number}] has other models than slices[0]; slices of different "
                "models make a new architecture, which is no mean"
            )
    shared = METHODS[method][0] + METHODS[method][1]
    parameters = _parameters(file, document, shared, method, "parameters")
    if any(len({source.model for source in x.sources}) < len(x.sources) for x in slices):
        raise MergekitError(f"{file}: a model is listed twice; list it once and add the weights")
    if method in ("slerp", "task_arithmetic") and base is None:
        raise MergekitError(f"{file}: merge_method {method} needs base_model: ...")
    if method == "slerp" and len(models) != 2:
        raise MergekitError(
            f"{file}: merge_method slerp takes two models, got {len(models)}; use karcher"
        )
    if base is not None:
        models = (base, *(x for x in models if x != base))
    return MergekitRecipe(
        file, method, models, base, slices, parameters, _dtype(file, document),
        _tokenizer(file, document),
    )  # fmt: skip


def _check_keys(file: Path, given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise MergekitError(f"{file}: {where}: expected keys and values, got {given!r}")
    for key in given:
        if key not in known:
            raise MergekitError(
                f"{file}: {where} has the key {key!r}, which is not supported; known are "
                f"{', '.join(known)}. Leave it out if the result does not depend on it"
            )


def _method(file: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise MergekitError(
            f"{file}: merge_method: expected one of {', '.join(METHODS)}, got {name!r}"
        )
    if name in METHODS:
        return name
    if name.lower() in METHODS:
        remedy = f"write {name.lower()}"
    else:
        remedy = _ELSEWHERE.get(name, _TRANSFORMS)
    raise MergekitError(
        f"{file}: merge_method {name!r} is not supported ({', '.join(METHODS)} are); {remedy}"
    )


def _slices(
    file: Path, document: Mapping[str, Any], base: str | None, method: str
) -> tuple[Slice, ...]:
    own = METHODS[method][0]
    given = [key for key in ("models", "slices") if document.get(key)]
    if len(given) != 1:
        raise MergekitError(f"{file}: exactly one of models: and slices: is expected, got {given}")
    entries = document[given[0]]
    if not isinstance(entries, list):
        raise MergekitError(f"{file}: {given[0]}: expected a list, got {entries!r}")
    if given == ["models"]:
        sources = []
        for number, entry in enumerate(entries):
            where = f"models[{number}]"
            _check_keys(file, entry, ("model", "parameters"), where)
            sources.append(_source(file, where, entry, own, method, None))
        if base is not None and base not in [source.model for source in sources]:
            sources.append(Source(base, None, {}))  # as mergekit does
        return (Slice(tuple(sources), {}),)
    slices = []
    for number, entry in enumerate(entries):
        where = f"slices[{number}]"
        _check_keys(file, entry, ("sources", "parameters", "base_model"), where)
        if entry.get("base_model") not in (None, base):
            raise MergekitError(f"{file}: {where}.base_model differs from base_model: {base}")
        listed = entry.get("sources")
        if not isinstance(listed, list) or not listed:
            raise MergekitError(f"{file}: {where}.sources: expected a list of models")
        sources = []
        for index, source in enumerate(listed):
            place = f"{where}.sources[{index}]"
            _check_keys(file, source, ("model", "layer_range", "parameters"), place)
            layers = source.get("layer_range")
            fits = isinstance(layers, list) and len(layers) == 2
            if not fits or not all(type(x) is int for x in layers) or layers[0] >= layers[1]:
                raise MergekitError(
                    f"{file}: {place}.layer_range: expected [first, last + 1], got {layers!r}"
                )
            sources.append(_source(file, place, source, own, method, (layers[0], layers[1])))
        if base is not None and base not in [source.model for source in sources]:
            raise MergekitError(f"{file}: {where} has no source of base_model {base}; list it")
        shared = METHODS[method][0] + METHODS[method][1]
        parameters = _parameters(file, entry, shared, method, f"{where}.parameters")
        slices.append(Slice(tuple(sources), parameters))
    return tuple(slices)


def _source(
    file: Path,
    where: str,
    entry: Mapping[str, Any],
    own: Iterable[str],
    method: str,
    layers: tuple[int, int] | None,
) -> Source:
    name = _model(file, f"{where}.model", entry.get("model"))
    if name is None:
        raise MergekitError(f"{file}: {where} has no model; give the folder of one")
    parameters = _parameters(file, entry, tuple(own), method, f"{where}.parameters")
    return Source(name, layers, parameters)


def _parameters(
    file: Path, entry: Mapping[str, Any], known: tuple[str, ...], method: str, where: str
) -> Settings:
    given = entry.get("parameters") or {}
    if not isinstance(given, Mapping):
        raise MergekitError(f"{file}: {where}: expected keys and values, got {given!r}")
    for key in given:
        if key not in known:
            remedy = ""
            if key == "weight":
                remedy = (
                    "; its models have equal weights: use manifold-merge models --geometry sphere "
                    "--weights W,W,..."
                    if method == "karcher"
                    else "; write t: ... in the parameters at the top"
                )
            raise MergekitError(
                f"{file}: {where} has {key!r}, which merge_method {method} does not have here "
                f"(it has {', '.join(known) or 'none there'}){remedy or '; leave it out'}"
            )
        _check_setting(file, given[key], key)
    return dict(given)


def _check_setting(file: Path, setting: Any, key: str) -> None:
    """Raise unless this is a value, a list of values, or a list of conditions, all of them."""
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(conditions, list) or not any(isinstance(x, Mapping) for x in conditions):
        for value in conditions if isinstance(conditions, list) else [conditions]:
            _number(file, value, key)
        return
    for condition in conditions:
        _check_keys(file, condition, ("filter", "value"), f"parameters.{key}")
        wanted, value = condition.get("filter"), condition.get("value")
        if not isinstance(wanted, str | None):
            raise MergekitError(
                f"{file}: parameters.{key}: filter: expected a part of the names of tensors, such "
                f"as mlp, got {wanted!r}; write one - filter: ..., value: ... for each"
            )
        for number in value if isinstance(value, list) else [value]:
            _number(file, number, key)


def _number(file: Path, value: Any, key: str) -> Any:
    """A number, or true or false where that is meant."""
    if key in _YES_OR_NO:
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise MergekitError(f"{file}: parameters.{key}: expected true or false, got {value!r}")
    try:  # YAML reads 1e-3 as a text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MergekitError(
            f"{file}: parameters.{key}: expected a number, a list of numbers, or a list "
            f"of - filter: ..., value: ...; got {value!r}"
        )
    return number


def _model(file: Path, where: str, given: Any) -> str | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        extra = [key for key in given if key != "model" and given[key] is not None]
        if extra == ["lora"] and isinstance(given.get("model"), str):
            given = f"{given['model']}+{given['lora']}"
        elif extra:
            raise MergekitError(f"{file}: {where}: {extra[0]} is not supported; give a folder")
        else:
            given = given.get("model")
    if not isinstance(given, str) or not given:
        raise MergekitError(f"{file}: {where}: expected the folder of a model, got {given!r}")
    if "+" in given and not Path(given).exists():
        name, _, adapter = given.partition("+")
        raise MergekitError(
            f"{file}: {where}: {adapter} is an adapter on {name}; merge adapters with each other "
            f"and without the base model: manifold-merge adapters {adapter} OTHER ... --output "
            f"MERGED, and load {name} with MERGED"
        )
    if "@" in given and not Path(given).exists():
        name, _, revision = given.partition("@")
        raise MergekitError(
            f"{file}: {where}: fetch revision {revision} of {name} first, with "
            "huggingface_hub.snapshot_download(..., revision=...), and give its folder"
        )
    return given


def _dtype(file: Path, document: Mapping[str, Any]) -> torch.dtype | None:
    # mergekit rounds its inputs to dtype too; here the arithmetic keeps its digits.
    name = document.get("out_dtype") or document.get("dtype")
    for key in ("dtype", "out_dtype"):
        given = document.get(key)
        if given is not None and str(given).removeprefix("torch.") not in _DTYPES:
            raise MergekitError(
                f"{file}: {key}: expected one of {', '.join(_DTYPES)}, got {given!r}"
            )
    kind: torch.dtype | None = None
    if name is not None:
        kind = getattr(torch, str(name).removeprefix("torch."))
    return kind


def _tokenizer(file: Path, document: Mapping[str, Any]) -> str | None:
    source = document.get("tokenizer_source")
    given = document.get("tokenizer")
    if given is not None:
        if source is not None:
            raise MergekitError(f"{file}: tokenizer_source and tokenizer are both given; keep one")
        _check_keys(file, given, ("source",), "tokenizer")
        source = given.get("source", "union")
    if source in (None, "base", "union"):
        return source if source is None else str(source)
    return _model(file, "tokenizer_source", source)
