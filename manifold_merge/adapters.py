"""Read PEFT LoRA adapter folders without the base model, PEFT or transformers.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. :class:`Adapter` reads the
configuration and the header of the tensor file, checks that the update of each adapted module is
exactly ``scaling * B @ A`` on the unchanged base model, and hands out the factors on request.
Whatever does not have that meaning (DoRA, PiSSA, ...) is refused by name with a remedy. The layout
is that of PEFT 0.21 (https://github.com/huggingface/peft); :mod:`manifold_merge.adapter_writer`
writes it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manifold_merge.adapter_config import CONFIG_NAME, AdapterError, pattern_value, read_config
from manifold_merge.linalg import all_finite

__all__ = ["PREFIX", "RELEASE_EVERY", "WEIGHTS_NAME", "Adapter", "AdapterModule", "ExtraTensor"]

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
RELEASE_EVERY = 2**26  # bytes of a mapped file, which count as memory once they are read

ModuleKind = Literal["linear", "conv", "embedding"]
ExtraKind = Literal["lora_bias", "bias", "modules_to_save", "base_weight"]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

_FACTOR_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_[AB])")
_IGNORED_SEGMENT = "lora_velora_embed"  # state of VeLoRA's backward pass
_SEGMENT_REASONS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_diag": "a KaSA diagonal",
    "trainable_tokens_delta": "replaced rows of an embedding",
}


@dataclass(frozen=True)
class AdapterModule:
    """One adapted module: its update is ``delta W = B @ A`` with the scaling folded into ``B``.

    Attributes:
        name: The module's name in the base model.
        kind: ``"linear"`` (also transformers' ``Conv1D``), ``"conv"`` or ``"embedding"``.
        out_features: Rows ``m`` of ``delta W``; for an embedding, its dimension.
        in_features: Columns ``n`` of ``delta W``; for a convolution, input channels times kernel
            size; for an embedding, the number of embeddings, so that ``delta W`` is the transpose
            of the update of ``torch.nn.Embedding.weight``.
        rank: Rank ``r``.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA
            (arXiv:2312.03732).
        dtype: The stored type of ``A`` (of both factors, as PEFT writes them).
        kernel: Trailing shape ``(channels, k, ...)`` of a convolution's ``A``, else ``()``.
        stored_name: The name in the tensor file. It differs from ``name`` only within
            ``torch.nn.MultiheadAttention``, which PEFT wraps twice.
    """

    name: str
    kind: ModuleKind
    out_features: int
    in_features: int
    rank: int
    scaling: float
    dtype: torch.dtype
    kernel: tuple[int, ...] = ()
    stored_name: str = ""

    @property
    def factor_keys(self) -> tuple[str, str]:
        """Keys of ``B`` and ``A`` in the tensor file."""
        form = "lora_embedding_{}" if self.kind == "embedding" else "lora_{}.weight"
        stem = PREFIX + (self.stored_name or self.name) + "."
        return stem + form.format("B"), stem + form.format("A")


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor beside the LoRA factors.

    Attributes:
        name: The parameter's name in the base model; for ``"lora_bias"`` the module's name followed
            by ``.lora_B.bias``.
        kind: ``"lora_bias"`` is an update of a bias and is zero where an adapter lacks it. The
            others replace a tensor of the base model: ``"bias"`` (``bias="all"`` or
            ``"lora_only"``), ``"modules_to_save"``, and ``"base_weight"``, any other tensor, such
            as a resized embedding.
        shape: Its shape.
        dtype: Its stored type.
        key: Its key in the tensor file.
        scaling: What the stored values are multiplied by (1 unless ``"lora_bias"``).
    """

    name: str
    kind: ExtraKind
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    scaling: float = 1.0

    @property
    def replaces_base(self) -> bool:
        """Whether the tensor replaces one of the base model, so that its absence is not zero."""
        return self.kind != "lora_bias"


class Adapter:
    """A LoRA adapter folder, opened for reading.

    Opening reads the configuration and the header of the tensor file only. Tensors are read when
    asked for and checked for NaN and infinity the first time; :meth:`validate` checks all of them.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        ignore_config_keys: Keys of the configuration that are unknown to this library but known to
            you not to change what the factors mean.

    Attributes:
        path: The folder.
        config: The configuration, read-only.
        modules: The adapted modules by name, sorted.
        extras: All other tensors by name, sorted.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        AdapterError: The folder does not hold a plain LoRA adapter; the message names the file and
            key and says what to do.

    Example:
        >>> import json, tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        >>> stem = "base_model.model.layer.0.query"
        >>> save_file({f"{stem}.lora_A.weight": torch.ones(2, 3),
        ...            f"{stem}.lora_B.weight": torch.ones(5, 2)},
        ...           folder / "adapter_model.safetensors")
        >>> adapter = Adapter(folder)
        >>> adapter.modules["layer.0.query"].scaling
        2.0
        >>> B, A = adapter.factors("layer.0.query")
        >>> B.shape, A.shape, (B @ A)[0, 0].item()
        (torch.Size([5, 2]), torch.Size([2, 3]), 4.0)
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, AdapterModule]
    extras: Mapping[str, ExtraTensor]

    def __init__(
        self, path: str | os.PathLike[str], *, ignore_config_keys: Iterable[str] = ()
    ) -> None:
        self.path = Path(path)
        _check_files(self.path)
        config = read_config(self.path / CONFIG_NAME, frozenset(ignore_config_keys))
        self.config = MappingProxyType(config)
        self._file = _open_tensors(self.path / WEIGHTS_NAME)
        self._finite: set[str] = set()
        modules, extras = _parse_tensors(self.path / WEIGHTS_NAME, self._file, config)
        self.modules = MappingProxyType(dict(sorted(modules.items())))
        self.extras = MappingProxyType(dict(sorted(extras.items())))

    def __repr__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        return f"Adapter({str(self.path)!r}, modules={len(self.modules)}, ranks={ranks})"

    @property
    def base_model(self) -> str | None:
        """The base model's name or path as the adapter states it."""
        return self.config.get("base_model_name_or_path") or None

    def factors(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read the factors of one module's update, ``delta W = B @ A``.

        Args:
            name: The module's name in the base model.
            dtype: Type of the result. Default: the stored one, at least float32.
            device: Device of the result. Default: CPU.

        Returns:
            ``B``, shape ``(m, r)``, with the scaling folded in, and ``A``, shape ``(r, n)``. Both
            are fresh copies; a convolution's kernel dimensions are flattened.

        Raises:
            KeyError: The adapter does not adapt this module.
            AdapterError: A value is NaN or infinite.
        """
        module = self._module(name)
        key_B, key_A = module.factor_keys
        B = self._read(key_B, dtype, device, module.scaling)
        A = self._read(key_A, dtype, device)
        return B.reshape(module.out_features, module.rank), A.reshape(module.rank, -1)

    def read_factors(self, name: str, out: tuple[Tensor, Tensor]) -> None:
        """Read the factors of one module into tensors that exist, views of a batch for instance.

        Args:
            name: The module's name in the base model.
            out: B ``(m, r)``, which gets the scaling, and A ``(r, n)``, of float32 or float64, on
                any device.

        Raises:
            KeyError: The adapter does not adapt this module.
            AdapterError: A value is NaN or infinite.
        """
        module = self._module(name)
        for key, place in zip(module.factor_keys, out, strict=True):
            stored = self._get(key)
            self._check_finite(key, stored)
            place.copy_(stored.reshape(place.shape))
        if module.scaling != 1.0:
            out[0].mul_(module.scaling)

    def _module(self, name: str) -> AdapterModule:
        if name not in self.modules:
            raise KeyError(f"{self.path} does not adapt {name!r}; see Adapter.modules")
        return self.modules[name]

    def extra(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Read one of :attr:`extras`, in its own shape; a ``"lora_bias"`` comes scaled.

        Raises:
            KeyError: There is no such tensor.
            AdapterError: A value is NaN or infinite.
        """
        if name not in self.extras:
            raise KeyError(f"{self.path} has no extra tensor {name!r}; see Adapter.extras")
        extra = self.extras[name]
        return self._read(extra.key, dtype, device, extra.scaling)

    def delta_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Form one module's dense update in the layout of the base model's weight.

        This allocates the full matrix: it serves to inspect or test, the merge never needs it.

        Returns:
            ``(m, n)`` for a linear module, ``(n, m)`` where weights are stored transposed
            (``fan_in_fan_out`` and embeddings), ``(m, channels, k, ...)`` for a convolution.

        Raises:
            KeyError: The adapter does not adapt this module.
            AdapterError: A value is NaN or infinite.
        """
        B, A = self.factors(name, dtype)
        module = self.modules[name]
        if module.kind == "conv":
            return (B @ A).reshape(module.out_features, *module.kernel)
        transposed = module.kind == "embedding" or bool(self.config.get("fan_in_fan_out"))
        return (B @ A).mT.contiguous() if transposed else B @ A

    def validate(self) -> None:
        """Read every tensor once and raise if one holds NaN or infinity.

        Raises:
            AdapterError: Names the file and the tensor.
        """
        keys = [key for module in self.modules.values() for key in module.factor_keys]
        mapped = 0
        for key in [*keys, *(extra.key for extra in self.extras.values())]:
            stored = self._get(key)
            self._check_finite(key, stored)
            mapped += stored.nbytes
            if mapped > RELEASE_EVERY:
                mapped = 0
                self.release()

    def release(self) -> None:
        """Let go of the parts of the tensor file that were read.

        The file is mapped into memory, and what was read counts as memory of this process until the
        system needs it. A streaming merge calls this between groups of modules; reading goes on as
        before.
        """
        self._file = _open_tensors(self.path / WEIGHTS_NAME)

    def _get(self, key: str) -> Tensor:
        # A view into the memory map: never handed out, because writing to it would change what
        # the next reader sees.
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def _read(
        self,
        key: str,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        scaling: float = 1.0,
    ) -> Tensor:
        stored = self._get(key)
        self._check_finite(key, stored)
        # Scale in at least single precision: half precision would round the product once more.
        working = torch.promote_types(stored.dtype, torch.float32)
        if dtype is not None:
            working = torch.promote_types(working, dtype)
        tensor = stored.to(device=device, dtype=working, copy=True)
        if scaling != 1.0:
            tensor.mul_(scaling)
        return tensor if dtype is None else tensor.to(dtype)

    def _check_finite(self, key: str, tensor: Tensor) -> None:
        if key in self._finite:
            return
        if not all_finite(tensor):
            raise AdapterError(
                f"{self.path / WEIGHTS_NAME}: tensor {key!r} holds NaN or infinite values; the "
                "training diverged or the file is damaged: use an earlier checkpoint"
            )
        self._finite.add(key)


def _check_files(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"adapter folder {path} does not exist; give a local folder (fetch one from the Hub "
            "with huggingface_hub.snapshot_download)"
        )
    if not path.is_dir():
        raise AdapterError(f"{path} is a file; give the adapter folder that holds {CONFIG_NAME}")
    if not (path / CONFIG_NAME).is_file():
        nested = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_NAME}"))
        hint = f"did you mean {' or '.join(nested)}?" if nested else "is this an adapter folder?"
        raise FileNotFoundError(f"{path / CONFIG_NAME} is missing; {hint}")
    if not (path / WEIGHTS_NAME).is_file():
        pickled = path / "adapter_model.bin"
        if pickled.exists():
            raise AdapterError(
                f"{pickled} is a pickle, which can run code when it is loaded; convert it: load "
                "the adapter with PEFT and save it with save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(f"{path / WEIGHTS_NAME} is missing; save or download it again")


def _open_tensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        with file.open("rb") as stream:
            is_pointer = stream.read(19) == b"version https://git"
        damage = "is a Git LFS pointer" if is_pointer else f"is truncated or damaged ({error})"
        remedy = "run git lfs pull" if is_pointer else "save or download it again"
        raise AdapterError(f"{file} {damage}; {remedy}") from error


def _parse_tensors(
    file: Path, handle: Any, config: Mapping[str, Any]
) -> tuple[dict[str, AdapterModule], dict[str, ExtraTensor]]:
    """Sort the tensors of a file into modules and extras, from its header alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    factors: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
        if not key.startswith(PREFIX):
            raise AdapterError(
                f"{file}: tensor {key!r} does not start with {PREFIX!r} as PEFT's do; load the "
                "adapter with the library that wrote it and save it with PEFT's save_pretrained"
            )
        if f".{_IGNORED_SEGMENT}" in key:
            continue
        header = handle.get_slice(key)
        shapes[key] = tuple(header.get_shape())
        if header.get_dtype() not in _DTYPES:
            raise AdapterError(
                f"{file}: tensor {key!r} has type {header.get_dtype()}, expected one of "
                f"{', '.join(_DTYPES)}; convert the file to one of these"
            )
        dtypes[key] = _DTYPES[header.get_dtype()]
        match = _FACTOR_KEY.fullmatch(key.removeprefix(PREFIX))
        if match:
            factors.setdefault(match[1], {})[match[2]] = key
        else:
            others.append(key)
    if not factors:
        raise AdapterError(
            f"{file} holds no lora_A and lora_B tensors, so there is nothing to merge; save the "
            "adapter again with PEFT's save_pretrained"
        )

    modules: dict[str, AdapterModule] = {}
    for stored_name, keys in factors.items():
        module = _parse_module(file, stored_name, keys, shapes, dtypes, config)
        modules[module.name] = module
    extras = [_parse_extra(file, key, shapes[key], dtypes[key], config, modules) for key in others]
    return modules, {extra.name: extra for extra in extras}


def _parse_module(
    file: Path,
    stored_name: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    config: Mapping[str, Any],
) -> AdapterModule:
    embedding = any(what.startswith("lora_embedding") for what in keys)
    form = "lora_embedding_{}" if embedding else "lora_{}.weight"
    for factor in "AB":
        if form.format(factor) not in keys:
            missing = f"{PREFIX}{stored_name}.{form.format(factor)}"
            raise AdapterError(
                f"{file}: tensor {missing!r} is missing beside {', '.join(keys.values())}; save "
                "the adapter again with PEFT's save_pretrained"
            )
    key_A, key_B = keys[form.format("A")], keys[form.format("B")]
    shape_A, shape_B = shapes[key_A], shapes[key_B]
    found = f"{file}: module {stored_name!r} has A of shape {shape_A} and B of shape {shape_B}"
    remedy = "save the adapter again (with DeepSpeed or FSDP, gather the shards first)"
    if len(shape_A) < 2 or len(shape_A) != len(shape_B) or 0 in shape_A + shape_B:
        raise AdapterError(f"{found}, expected two matrices or two convolution kernels; {remedy}")
    if len(shape_A) > 2 and shape_B[1] != shape_A[0] and shape_A[0] % shape_B[1] == 0:
        raise AdapterError(
            f"{found}: a grouped convolution, whose update is not of the form B @ A; leave it out "
            "of target_modules and train again"
        )
    if shape_A[0] != shape_B[1] or set(shape_B[2:]) - {1}:
        raise AdapterError(f"{found}, expected A ({shape_B[1]}, n) for this B; {remedy}")

    # PEFT looks a module inside torch.nn.MultiheadAttention up under the attention's name.
    looked_up = stored_name.split(".base_layer.")[0]
    rank = pattern_value(config.get("rank_pattern"), looked_up, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern"), looked_up, config.get("lora_alpha", 8))
    if rank != shape_A[0]:
        raise AdapterError(
            f"{found}, but r and rank_pattern in {CONFIG_NAME} give rank {rank}; the two files do "
            "not belong together: save the adapter again"
        )
    return AdapterModule(
        name=stored_name.replace(".base_layer.", "."),
        kind="embedding" if embedding else "linear" if len(shape_A) == 2 else "conv",
        out_features=shape_B[0],
        in_features=math.prod(shape_A[1:]),
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        dtype=dtypes[key_A],
        kernel=shape_A[1:] if len(shape_A) > 2 else (),
        stored_name=stored_name,
    )


def _parse_extra(
    file: Path,
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: Mapping[str, Any],
    modules: Mapping[str, AdapterModule],
) -> ExtraTensor:
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    module = modules.get(name.removesuffix(".lora_B.bias"))
    if name.endswith(".lora_B.bias") and module is not None:
        if not config.get("lora_bias"):
            raise AdapterError(
                f"{file}: tensor {key!r} is present but lora_bias is not set in {CONFIG_NAME}; the "
                "two files do not belong together: save the adapter again"
            )
        return ExtraTensor(name, "lora_bias", shape, dtype, key, module.scaling)

    saved = config.get("modules_to_save") or []
    if any(re.match(rf"(.*\.)?{re.escape(module_name)}\.", name) for module_name in saved):
        return ExtraTensor(name, "modules_to_save", shape, dtype, key)
    for segment in name.split("."):
        if segment.startswith("lora_") or segment in _SEGMENT_REASONS:
            reason = _SEGMENT_REASONS.get(segment, "not one of plain LoRA's tensors")
            raise AdapterError(
                f"{file}: tensor {key!r} is {reason}, which is not supported; save a plain LoRA "
                "adapter with PEFT's save_pretrained (no adapter name inside the keys)"
            )
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return ExtraTensor(name, "bias", shape, dtype, key)
    if name.endswith((".weight", ".bias")):
        return ExtraTensor(name, "base_weight", shape, dtype, key)
    raise AdapterError(
        f"{file}: tensor {key!r} is not understood, expected LoRA factors, biases or weights; "
        "remove it from the file if it is not needed"
    )
