"""Write a PEFT LoRA adapter folder that ``PeftModel.from_pretrained`` loads as it was meant.

The written scaling is exactly one (``lora_alpha == r`` for every module), the modules are listed by
their full names, and ranks may differ between modules. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_merge.adapter_config import CONFIG_NAME, KNOWN_KEYS, AdapterError
from manifold_merge.adapters import PREFIX, WEIGHTS_NAME, Adapter, AdapterModule, ExtraTensor
from manifold_merge.linalg import all_finite
from manifold_merge.output_folder import atomic_folder, check_output_folder
from manifold_merge.tensor_file import TensorFileWriter

__all__ = ["check_adapter_output", "write_adapter"]

CARD_NAME = "README.md"
_REPLACEABLE = frozenset({CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, ".gitattributes"})

# Modules that PEFT itself adds to modules_to_save for a task, and without whose tensors it then
# refuses to load.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

Factors = tuple[Tensor, Tensor]


def check_adapter_output(
    output: str | os.PathLike[str], *, like: Sequence[Adapter] = (), overwrite: bool = False
) -> Path:
    """Check, before any work, that an adapter folder can be written.

    Args:
        output: The folder to write.
        like: The adapters being merged; none of them may be the output, not even with
            ``overwrite``, because the result could then never be made again or compared.
        overwrite: Whether an existing adapter folder is replaced. A folder that holds anything but
            an adapter's files never is.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: The output is an input, or exists and cannot be replaced.
        PermissionError: The parent folder is not writable.
    """
    path = Path(output).resolve()
    for adapter in like:
        if adapter.path.resolve() == path:
            raise FileExistsError(
                f"output {output} is one of the input adapters; write to another folder, and move "
                "it afterwards if it is to take the input's place"
            )
    return check_output_folder(path, replaceable=_REPLACEABLE, overwrite=overwrite)


def write_adapter(
    output: str | os.PathLike[str],
    modules: Mapping[str, Factors] | Iterable[tuple[str, Factors]],
    *,
    like: Sequence[Adapter],
    extras: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    model_card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder whose updates are exactly ``B @ A``.

    Args:
        output: The folder to write; missing parents are made.
        modules: Module name and factors ``(B, A)`` of shapes ``(m, R)`` and ``(R, n)``, a mapping
            or an iterable of pairs. ``R`` may differ between modules. Names, kinds and shapes are
            those of :attr:`Adapter.modules` in ``like``.
        like: The adapters that were merged. Their configuration (base model, task, ...) is carried
            over, of the first one where they differ.
        extras: Values for names of :attr:`Adapter.extras` in ``like``; a ``"lora_bias"`` with its
            scaling, as :meth:`Adapter.extra` gives it. Those not given are not written.
        dtype: Type of all tensors. Default: the widest that ``like`` stores.
        model_card: Text of ``README.md``. A metadata header is added unless it brings its own.
        overwrite: Whether to replace an existing adapter folder.

    Returns:
        The absolute path of the folder.

    Raises:
        AdapterError: A name is unknown, a shape is wrong, a value is not finite in ``dtype``.
        FileExistsError: See :func:`check_adapter_output`.

    Example:
        Halve an adapter:

        >>> import json, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        >>> stem = "base_model.model.layer.0.query"
        >>> save_file({f"{stem}.lora_A.weight": torch.ones(2, 3),
        ...            f"{stem}.lora_B.weight": torch.ones(5, 2)},
        ...           folder / "adapter_model.safetensors")
        >>> adapter = Adapter(folder)
        >>> B, A = adapter.factors("layer.0.query")
        >>> halved = write_adapter(folder / "half", {"layer.0.query": (B / 2, A)}, like=[adapter])
        >>> half = Adapter(halved)
        >>> half.modules["layer.0.query"].scaling
        1.0
        >>> bool(torch.equal(2 * half.delta_weight("layer.0.query"), B @ A))
        True
    """
    if not like:
        raise ValueError("like is empty; give the adapters whose configuration is carried over")
    layouts = {name: m for adapter in reversed(like) for name, m in adapter.modules.items()}
    check_adapter_output(output, like=like, overwrite=overwrite)
    pairs = modules.items() if isinstance(modules, Mapping) else modules
    with atomic_folder(output, replaceable=_REPLACEABLE, overwrite=overwrite) as folder:
        with TensorFileWriter(folder / WEIGHTS_NAME, _possible_keys(layouts, like)) as file:
            ranks = _write_factors(file, pairs, layouts, like, dtype)
            written = {name: layouts[name] for name in sorted(ranks)}
            kinds = _write_extras(file, extras or {}, written, like, dtype)
        config = _make_config(written, ranks, kinds, like)
        (folder / CARD_NAME).write_text(_make_card(model_card, config, like), encoding="utf-8")
        # Last, because a folder without it is no adapter folder.
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return Path(output).resolve()


def _possible_keys(layouts: Mapping[str, AdapterModule], like: Sequence[Adapter]) -> set[str]:
    """Keys of all tensors that may have to be written."""
    keys = {key for module in layouts.values() for key in module.factor_keys}
    keys |= {_bias_key(module) for module in layouts.values()}
    extras = {extra for adapter in like for extra in adapter.extras.values()}
    return keys | {_extra_key(extra, layouts) for extra in extras if extra.kind != "lora_bias"}


def _write_factors(
    file: TensorFileWriter,
    pairs: Iterable[tuple[str, Factors]],
    layouts: Mapping[str, AdapterModule],
    like: Sequence[Adapter],
    dtype: torch.dtype | None,
) -> dict[str, int]:
    """Write factors as they come; returns the rank of each module."""
    families = Counter(_parent(module) for module in layouts.values())
    ranks: dict[str, int] = {}
    waiting: dict[str, Factors] = {}  # for the others of their family, whose ranks must be equal
    for name, (B, A) in pairs:
        if name in ranks:
            raise AdapterError(f"module {name!r} was given twice; give each module once")
        if name not in layouts:
            raise AdapterError(
                f"module {name!r} is in none of the input adapters; its kind is not known, so give "
                "only modules that they have"
            )
        module = layouts[name]
        stored = [adapter.modules[name].dtype for adapter in like if name in adapter.modules]
        factors = _prepare_factors(module, B, A, dtype or _widest(stored))
        ranks[name] = len(factors[1])
        if families[_parent(module)] > 1 or _parent(module) != name:
            waiting[name] = factors
        else:
            _write_pair(file, module, factors)
    if not ranks:
        raise AdapterError("modules is empty; give the factors of at least one module")
    _equalise_nested_ranks(waiting, layouts)
    for name, factors in waiting.items():
        ranks[name] = len(factors[1])
        _write_pair(file, layouts[name], factors)
    return ranks


def _write_pair(file: TensorFileWriter, module: AdapterModule, factors: Factors) -> None:
    (key_B, key_A), (B, A), kernel = module.factor_keys, factors, module.kernel
    file.write(key_B, B.reshape(*B.shape, *[1] * (len(kernel) - 1)) if kernel else B)
    file.write(key_A, A.reshape(-1, *kernel) if kernel else A)


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _to_disk(what: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers on the CPU, contiguous, in the type that is written; checked."""
    # Converted in its own layout first: to transpose and convert at once takes longer.
    copy = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not all_finite(copy):
        cause = "was given with NaN or infinite values; check the inputs"
        if all_finite(tensor):
            cause = f"overflows {dtype}; write it as torch.bfloat16 or torch.float32"
        raise AdapterError(f"{what} {cause}")
    return copy


def _prepare_factors(module: AdapterModule, B: Tensor, A: Tensor, dtype: torch.dtype) -> Factors:
    name, m, n = module.name, module.out_features, module.in_features
    matrices = B.ndim == A.ndim == 2
    if not matrices or B.shape[0] != m or A.shape[1] != n or B.shape[1] != A.shape[0]:
        raise AdapterError(
            f"module {name!r} has factors B {tuple(B.shape)} and A {tuple(A.shape)}, expected "
            f"({m}, R) and (R, {n})"
        )
    if B.shape[1] == 0:
        raise AdapterError(
            f"module {name!r} has rank 0, which PEFT cannot load; leave it out, or give zeros of "
            "rank 1"
        )
    return _to_disk(f"B of {name!r}", B, dtype), _to_disk(f"A of {name!r}", A, dtype)


def _parent(module: AdapterModule) -> str:
    """The module that PEFT wraps: itself, or the MultiheadAttention around it."""
    return module.stored_name.split(".base_layer.")[0]


def _equalise_nested_ranks(
    factors: dict[str, Factors], layouts: Mapping[str, AdapterModule]
) -> None:
    """Pad with zeros: PEFT gives both parts of a MultiheadAttention one rank."""
    families: dict[str, list[str]] = {}
    for name in factors:
        families.setdefault(_parent(layouts[name]), []).append(name)
    for parent, names in families.items():
        if parent not in factors:
            raise AdapterError(
                f"module {names[0]!r} is the output projection of the attention {parent!r}, and "
                "PEFT loads only both together; give zeros for the missing one"
            )
        rank = max(factors[name][1].shape[0] for name in names)
        for name in names:
            B, A = factors[name]
            missing = rank - A.shape[0]
            if missing:
                pad = torch.nn.functional.pad
                factors[name] = pad(B, (0, missing)), pad(A, (0, 0, 0, missing))


def _write_extras(
    file: TensorFileWriter,
    extras: Mapping[str, Tensor],
    written: Mapping[str, AdapterModule],
    like: Sequence[Adapter],
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """Write the extras; returns the kind of each."""
    kinds: dict[str, str] = {}
    biased: set[str] = set()
    for name, tensor in extras.items():
        known = [adapter.extras[name] for adapter in like if name in adapter.extras]
        if not known:
            raise AdapterError(
                f"extra tensor {name!r} is in none of the input adapters; give only theirs"
            )
        if tuple(tensor.shape) != known[0].shape:
            raise AdapterError(
                f"extra tensor {name!r} has shape {tuple(tensor.shape)}, expected {known[0].shape}"
            )
        target = dtype or _widest([extra.dtype for extra in known])
        key = _extra_key(known[0], written)
        file.write(key, _to_disk(f"extra tensor {name!r}", tensor, target))
        kinds[name] = known[0].kind
        biased.add(key)
    if "lora_bias" in kinds.values():
        # With lora_bias, PEFT gives every adapted module a bias.
        for module in written.values():
            if module.kind == "embedding":
                raise AdapterError(
                    f"module {module.name!r} is an embedding, which PEFT cannot load beside "
                    "lora_bias tensors; leave out one or the other"
                )
            if _bias_key(module) not in biased:
                target = dtype or _widest(
                    [a.modules[module.name].dtype for a in like if module.name in a.modules]
                )
                file.write(_bias_key(module), torch.zeros(module.out_features, dtype=target))
    return kinds


def _bias_key(module: AdapterModule) -> str:
    return f"{PREFIX}{module.stored_name or module.name}.lora_B.bias"


def _extra_key(extra: ExtraTensor, written: Mapping[str, AdapterModule]) -> str:
    if extra.kind == "lora_bias":
        module = extra.name.removesuffix(".lora_B.bias")
        if module not in written:
            raise AdapterError(
                f"extra tensor {extra.name!r} belongs to module {module!r}, which is not among the "
                "modules; give both or neither"
            )
        return _bias_key(written[module])
    # PEFT moves the parameters of a module that it adapts into its base_layer.
    module, _, parameter = extra.name.rpartition(".")
    if module in written:
        return f"{PREFIX}{written[module].stored_name}.base_layer.{parameter}"
    return PREFIX + extra.name


def _make_config(
    written: Mapping[str, AdapterModule],
    ranks: Mapping[str, int],
    kinds: Mapping[str, str],
    like: Sequence[Adapter],
) -> dict[str, Any]:
    # Keys that are neither known nor empty were accepted for reading only.
    config = {k: v for k, v in like[0].config.items() if k in KNOWN_KEYS or not v}
    config.pop("runtime_config", None)
    for key in ("base_model_name_or_path", "revision"):
        config[key] = next((a.config[key] for a in like if a.config.get(key)), None)

    targets = {_parent(module): ranks[name] for name, module in written.items()}
    counts = Counter(targets.values())
    rank = max(counts, key=lambda value: (counts[value], value))
    # Anchored and escaped, a pattern matches this one module: "layer.1" is a suffix of other names,
    # and PEFT takes the first pattern that matches.
    pattern = {f"^{re.escape(name)}": value for name, value in targets.items() if value != rank}
    saved_names = [name for name, kind in kinds.items() if kind == "modules_to_save"]
    stated = [name for adapter in like for name in adapter.config.get("modules_to_save") or []]
    saved = [
        module
        for module in dict.fromkeys(stated)
        if any(re.match(rf"(.*\.)?{re.escape(module)}\.", name) for name in saved_names)
    ]
    heads = _HEADS.get(config.get("task_type") or "", ())
    if heads and not set(heads) & set(saved):
        config["task_type"] = None
    biases = {adapter.config.get("bias", "none") for adapter in like}
    bias = "all" if "all" in biases else "lora_only" if "lora_only" in biases else "none"
    config |= {
        "alpha_pattern": dict(pattern),
        "bias": bias if "bias" in kinds.values() else "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_bias": "lora_bias" in kinds.values(),
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(pattern),
        "target_modules": _target_modules(targets, like),
        "use_rslora": False,
    }
    # How the inputs were initialised and trained does not describe the result.
    for key in ("corda_config", "eva_config", "lora_ga_config", "velora_config"):
        if key in config:
            config[key] = None
    if "loftq_config" in config:
        config["loftq_config"] = {}
    return config


def _target_modules(targets: Iterable[str], like: Sequence[Adapter]) -> list[str] | str:
    """Name exactly the given modules.

    PEFT also takes a listed name as a suffix of other names. Where that could happen, at the top
    level of a model or with names that the inputs show to exist, a regular expression that has to
    match in full takes the place of the list.
    """
    names = sorted(targets)
    others = {name for adapter in like for name in adapter.modules}
    others |= {name.rpartition(".")[0] for adapter in like for name in adapter.extras}
    suffixes = tuple(f".{name}" for name in names)
    if all("." in name for name in names) and not any(
        other.endswith(suffixes) for other in others.difference(names)
    ):
        return names
    return "|".join(re.escape(name) for name in names)


def _make_card(text: str | None, config: Mapping[str, Any], like: Sequence[Adapter]) -> str:
    if text is None:
        sources = "\n".join(f"- `{adapter.path.name}`" for adapter in like)
        text = f"# Merged LoRA adapter\n\nMerged with manifold-merge from\n\n{sources}\n"
    if text.startswith("---"):
        return text
    tags = ["lora", "manifold-merge", "merge"]
    header = ["library_name: peft"]
    base = config.get("base_model_name_or_path")
    if base:
        header.append(f"base_model: {json.dumps(base)}")  # a JSON string is a YAML string
        tags.append(f"base_model:adapter:{base}")
    header += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    return "\n".join(["---", *header, "---", "", text])
