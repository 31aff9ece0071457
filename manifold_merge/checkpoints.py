"""Hugging Face checkpoints: folders of safetensors shards, read lazily, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manifold_merge.linalg import all_finite
from manifold_merge.tensor_file import DTYPES

__all__ = ["Checkpoint", "CheckpointError", "TensorEntry", "check_same_architecture"]

WEIGHTS_NAME, INDEX_NAME, CONFIG_NAME = (
    "model.safetensors", "model.safetensors.index.json", "config.json",
)  # fmt: skip
# Keys of a configuration that name where a model comes from, or how it is used, not what it
# computes.
_NEUTRAL = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "bos_token_id",
        "classifier_dropout",
        "dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "label2id",
        "language",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or does not fit the others."""


@dataclass(frozen=True)
class TensorEntry:
    """What the header of a file says about one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class Checkpoint:
    """The weights of one model on disk; nothing is read but headers until asked for.

    Args:
        path: A folder with ``model.safetensors`` or ``model.safetensors.index.json`` and its
            shards, or one ``.safetensors`` file.

    Attributes:
        path: The folder or file.
        tensors: Name to :class:`TensorEntry`, in the order of the shards.
        config: ``config.json``, empty where there is none.

    Raises:
        FileNotFoundError: The folder, a shard or the index is missing.
        CheckpointError: A file is truncated, not safetensors, or contradicts the index.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"linear.weight": torch.ones(2, 3)}, folder / "model.safetensors")
        >>> checkpoint = Checkpoint(folder)
        >>> checkpoint.tensors["linear.weight"].shape
        (2, 3)
        >>> checkpoint.read("linear.weight").sum()
        tensor(6.)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(
                f"checkpoint {path} does not exist; give a local folder (fetch one from the Hub "
                "with huggingface_hub.snapshot_download)"
            )
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.files, weight_map = self._find_files()
        self._open: dict[str, Any] = {}
        entries: dict[str, TensorEntry] = {}
        for file in self.files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if weight_map is not None and weight_map.get(name) != file:
                    continue
                header = handle.get_slice(name)
                kind = header.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(
                        f"{self.folder / file}: tensor {name!r} has type {kind}, expected one of "
                        f"{', '.join(DTYPES)}; dequantise the checkpoint first"
                    )
                entries[name] = TensorEntry(name, tuple(header.get_shape()), DTYPES[kind], file)
        lost = sorted(set(weight_map or ()) - set(entries))
        if lost:
            raise CheckpointError(
                f"{self.folder / INDEX_NAME} names tensor {lost[0]!r}"
                f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which the shards do not "
                "hold; download the checkpoint again"
            )
        if not entries:
            raise CheckpointError(f"{path} holds no tensors; save the model again")
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(entries)
        config = self.folder / CONFIG_NAME
        self.config: dict[str, Any] = {}
        if self.path.is_dir() and config.is_file():
            try:
                self.config = json.loads(config.read_text("utf-8"))
            except json.JSONDecodeError as error:
                raise CheckpointError(f"{config} is not JSON ({error}); repair it") from error

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, tensors={len(self.tensors)})"

    def _find_files(self) -> tuple[list[str], dict[str, str] | None]:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise CheckpointError(
                    f"{self.path} is no .safetensors file; save the model with safetensors (a "
                    "pickle can run code when it is loaded)"
                )
            self._refuse_adapter([self.path.name])
            return [self.path.name], None
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_text("utf-8"))["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{index} has no readable weight_map ({error!r}); download it again"
                ) from error
            files = sorted(set(weight_map.values()))
            for file in files:
                if not (self.folder / file).is_file():
                    raise FileNotFoundError(
                        f"{self.folder / file} is missing, and {index.name} names it; download the "
                        "shard again"
                    )
            return files, weight_map
        if (self.folder / WEIGHTS_NAME).is_file():
            return [WEIGHTS_NAME], None
        others = sorted(self.folder.glob("*.safetensors"))
        self._refuse_adapter([x.name for x in others])
        if len(others) == 1:
            return [others[0].name], None
        pickled = [x for x in ("pytorch_model.bin", "pytorch_model.bin.index.json")
                   if (self.folder / x).is_file()]  # fmt: skip
        if pickled:
            raise CheckpointError(
                f"{self.folder / pickled[0]} is a pickle, which can run code when it is loaded; "
                "convert it: load the model with transformers and save it with "
                "save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(
            f"{self.folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}; is this the folder of a "
            "model?"
        )

    def _refuse_adapter(self, files: list[str]) -> None:
        """Raise where the tensors are factors of LoRA, whose entries have no mean."""
        configured = (self.folder / "adapter_config.json").is_file()
        if "adapter_model.safetensors" in files or (configured and not self.path.is_file()):
            raise CheckpointError(
                f"{self.folder} is a LoRA adapter; merge adapters with merge_adapters or "
                "manifold-merge adapters"
            )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is truncated or damaged ({error}); download it again"
                ) from error
        return self._open[file]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored: a view of the file, which must not be written to.

        Raises:
            KeyError: There is no such tensor.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}; see Checkpoint.tensors")
        tensor: Tensor = self._handle(self.tensors[name].file).get_tensor(name)
        return tensor

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise if a tensor that was read holds NaN or infinity.

        Raises:
            CheckpointError: Names the checkpoint and the tensor.
        """
        if not tensor.is_floating_point():
            return
        # Sums of eight-bit numbers are not defined.
        if not all_finite(tensor if tensor.dtype.itemsize > 1 else tensor.float()):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} holds NaN or infinite values; the training diverged "
                "or the file is damaged: use an earlier checkpoint"
            )

    def release(self) -> None:
        """Let go of the files; what was read no longer counts as memory of this process."""
        self._open.clear()

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each file: whether it is still the same checkpoint."""
        found = [(file, (self.folder / file).stat()) for file in self.files]
        return [(file, status.st_size, status.st_mtime_ns) for file, status in found]


def check_same_architecture(
    checkpoints: Sequence[Checkpoint], *, allow_different_config: bool = False
) -> None:
    """Raise unless all checkpoints hold tensors of the same names and shapes for one architecture.

    Args:
        checkpoints: At least one.
        allow_different_config: Accept configurations that differ in what a model computes.

    Raises:
        CheckpointError: Says which tensor or key differs, and in which checkpoint.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for one, two in ((first, other), (other, first)):
            lost = [name for name in one.tensors if name not in two.tensors]
            if lost:
                more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
                raise CheckpointError(
                    f"{two.path} has no tensor {lost[0]!r}{more}, which {one.path} has; merge "
                    "models of one architecture, saved in one way"
                )
        for name, entry in first.tensors.items():
            shape = other.tensors[name].shape
            if shape != entry.shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {shape} in {other.path} and {entry.shape} in "
                    f"{first.path}; merge models of one architecture and vocabulary"
                )
        differing = sorted(_differences(first.config, other.config))
        if differing and not allow_different_config:
            key = differing[0]
            raise CheckpointError(
                f"{other.folder / CONFIG_NAME} has {key!r} = {other.config.get(key)!r}, and that "
                f"of {first.path} has {first.config.get(key)!r}; if both compute the same function "
                "of their weights, pass allow_different_config=True"
            )


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    if not one or not two:
        return
    for key in (one.keys() | two.keys()) - _NEUTRAL:
        if one.get(key) != two.get(key):
            yield key
