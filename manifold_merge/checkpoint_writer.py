"""Write a checkpoint folder shard by shard; after an interruption, the shards that are missing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from manifold_merge.checkpoints import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    TensorEntry,
)
from manifold_merge.distributed import rank, wait_for_all, world_size
from manifold_merge.output_folder import (
    check_output_folder,
    resumable_folder,
    unfinished_folder,
)
from manifold_merge.tensor_file import TensorFileWriter

__all__ = ["CheckpointWriter"]

# What is taken over from the first checkpoint's folder besides its weights.
_CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_CARD = "README.md"


class CheckpointWriter:
    """Writes a folder like that of a checkpoint, with other numbers.

    Args:
        output: Folder to write.
        like: The checkpoint whose tensors, shards, configuration and tokenizer the result has.
        inputs: Checkpoints that are read; none of them may be the output.
        dtype: Type of the real tensors; as stored if ``None``.
        max_shard_size: Bytes of tensors in one file; the shards of ``like`` if ``None``.
        overwrite: Replace a folder that holds nothing but a model.

    Raises:
        FileExistsError: The output exists, or is an input.
        ValueError: The size of a shard is not positive.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        like: Checkpoint,
        inputs: Sequence[Checkpoint],
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.like, self.dtype, self.overwrite = like, dtype, overwrite
        self.path = Path(output).resolve()
        self.shards = _shards(like, dtype, max_shard_size)
        self._carried = _carried(like)
        if any(self.path in (x.folder.resolve(), x.path.resolve()) for x in inputs):
            raise FileExistsError(f"output {output} is one of the inputs; write to another folder")
        files = _shards_of(self.path)
        self._names = {*self.shards, *self._carried, INDEX_NAME, CONFIG_NAME, _CARD, *files}
        check_output_folder(self.path, replaceable=self._names, overwrite=overwrite)

    def write(
        self,
        parts_of: Callable[[TensorEntry], Iterable[Tensor]],
        card: str,
        *,
        fingerprint: str,
        begin: Callable[[], None] | None = None,
        release: Callable[[], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write all shards that an interrupted run has not written, and the files beside them.

        Args:
            parts_of: Gives the parts of one tensor, flat and in order.
            card: Text of ``README.md``.
            fingerprint: Of all that the numbers depend on.
            begin: Called before the first tensor, if there is anything to write.
            release: Called after each shard.
            progress: Called with the number of entries done and in all.

        Returns:
            How many shards were there already.
        """
        total = sum(entry.numel for entry in self.like.tensors.values())
        done = 0
        with self._folder(fingerprint) as folder:
            finished = {shard for shard in self.shards if (folder / shard).is_file()}
            wait_for_all()  # every process has seen the same files
            if len(finished) < len(self.shards) and begin is not None:
                begin()
            # With fewer shards than processes, all of them work on each shard.
            together = len(self.shards) - len(finished) < world_size()
            for number, (shard, entries) in enumerate(self.shards.items()):
                mine = [] if shard in finished else entries
                if together:
                    mine = _share(mine)
                elif number % world_size() != rank():
                    mine = []
                done += sum(entry.numel for entry in entries) - sum(x.numel for x in mine)
                if not mine:
                    continue
                partial = folder / f"{shard}.part{rank() if together else ''}"
                with TensorFileWriter(partial, [entry.name for entry in mine]) as file:
                    for entry in mine:
                        kind = self.type_of(entry)
                        file.write_parts(entry.name, kind, entry.shape, parts_of(entry))
                        done += entry.numel
                        if progress is not None:
                            progress(done, total)
                if not together:
                    partial.rename(folder / shard)
                if release is not None:
                    release()
            wait_for_all()  # every shard is written
            if rank() == 0:
                if together:
                    self._join(folder, finished)
                self._write_rest(folder, card)
        wait_for_all()  # the output is there when any process returns
        return len(finished)

    def _join(self, folder: Path, finished: set[str]) -> None:
        """Make shards of the parts that the processes have written, as one would have."""
        for shard, entries in self.shards.items():
            if shard in finished:
                continue
            parts = [folder / f"{shard}.part{number}" for number in range(world_size())]
            places = {entry.name: part for part, mine in zip(parts, _shares(entries), strict=True)
                      for entry in mine}  # fmt: skip
            partial = folder / f"{shard}.part"
            with TensorFileWriter(partial, [entry.name for entry in entries]) as file:
                for entry in entries:
                    # Opened for each tensor: what was read of a mapped file counts as memory.
                    with safe_open(places[entry.name], framework="pt") as part:
                        file.write(entry.name, part.get_tensor(entry.name))
            partial.rename(folder / shard)

    @contextlib.contextmanager
    def _folder(self, fingerprint: str) -> Iterator[Path]:
        """The first process makes the folder and puts it in place, the others write into it."""
        if rank() == 0:
            with resumable_folder(
                self.path, fingerprint, replaceable=self._names, overwrite=self.overwrite
            ) as folder:
                wait_for_all()
                yield folder
        else:
            wait_for_all()
            yield unfinished_folder(self.path)

    def layout(self) -> dict[str, list[str]]:
        """File names to the names of their tensors."""
        return {shard: [x.name for x in entries] for shard, entries in self.shards.items()}

    def type_of(self, entry: TensorEntry) -> torch.dtype:
        """In which type a tensor is written."""
        if self.dtype is not None and entry.dtype.is_floating_point:
            return self.dtype
        return entry.dtype

    def _write_rest(self, folder: Path, card: str) -> None:
        for left in folder.glob("*.part*"):  # of this run, or of one with more processes
            left.unlink()
        for name in self._carried:
            shutil.copyfile(self.like.folder / name, folder / name)
        if self.dtype is not None and CONFIG_NAME in self._carried:
            kind = str(self.dtype).removeprefix("torch.")
            config: dict[str, Any] = dict(self.like.config)
            config |= {key: kind for key in ("dtype", "torch_dtype") if key in config}
            (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if len(self.shards) > 1:
            tensors = self.like.tensors.values()
            size = sum(x.numel * self.type_of(x).itemsize for x in tensors)
            places = {name: shard for shard, names in self.layout().items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        (folder / _CARD).write_text(card, "utf-8")


def _shares(entries: Sequence[TensorEntry]) -> list[list[TensorEntry]]:
    """Tensors of one shard for each process, of about the same size together."""
    shares: list[list[TensorEntry]] = [[] for _ in range(world_size())]
    sizes = [0] * len(shares)
    for entry in entries:
        least = sizes.index(min(sizes))
        shares[least].append(entry)
        sizes[least] += entry.numel
    return shares


def _share(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """The tensors of this process."""
    return _shares(entries)[rank()]


def _shards(
    first: Checkpoint, dtype: torch.dtype | None, limit: int | None
) -> dict[str, list[TensorEntry]]:
    """File names to the tensors that are written there."""
    if limit is not None and limit < 1:
        raise ValueError(f"max_shard_size: expected a positive number of bytes, got {limit}")
    entries = list(first.tensors.values())
    if limit is None:
        if len(first.files) == 1:
            return {WEIGHTS_NAME: entries}
        return {f: [x for x in entries if x.file == f] for f in first.files}
    groups: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        kind = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        own = entry.numel * kind.itemsize
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += own
    if len(groups) == 1:
        return {WEIGHTS_NAME: entries}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _shards_of(folder: Path) -> set[str]:
    """Weight files of a merged model that is there already."""
    try:
        return set(Checkpoint(folder).files)
    except (OSError, ValueError):
        return set()


def _carried(first: Checkpoint) -> list[str]:
    """Names of the files besides the weights that make a model."""
    if first.path.is_file():
        return []
    found = {x.name for pattern in _CARRIED for x in first.folder.glob(pattern) if x.is_file()}
    return sorted(x for x in found if not x.endswith(".index.json"))
