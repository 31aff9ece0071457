"""Tensors of several checkpoints, part by part, within a bound on memory.

Files are mapped into memory, and what was read of them counts as memory of the process until it
lets go of the file. So the files are let go of, and opened again, each time half of the budget has
been read, in the middle of a tensor if need be; the other half is for the parts at work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manifold_merge.checkpoints import Checkpoint
from manifold_merge.statistics_file import DiagonalFile

__all__ = ["DEFAULT_BUDGET", "PartReader"]

DEFAULT_BUDGET = 2**30
# Entries worked on at a time: all anchors' parts stay in the cache of a core, or fill a GPU.
CHUNK, CHUNK_GPU = 2**17, 2**25
LEAST_CHUNK = 2**12


class PartReader:
    """Reads tensors of the same names from all models, and the Fisher information beside them.

    Args:
        models: k checkpoints of one architecture.
        diagonals: k files of Fisher information, or none.
        device: Where parts are wanted.
        max_bytes: Bytes of mapped files and of parts together; at least some 4,096 entries of each
            model are worked on at a time.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"w": torch.arange(10000.0)}, file)
        >>> reader = PartReader([Checkpoint(file)] * 2, [], torch.device("cpu"), max_bytes=1)
        >>> [part.shape for part, _ in reader.parts("w")]
        [torch.Size([2, 4096]), torch.Size([2, 4096]), torch.Size([2, 1808])]
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        diagonals: Sequence[DiagonalFile],
        device: torch.device,
        max_bytes: int,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes: expected a positive number of bytes, got {max_bytes}")
        self.models, self.diagonals, self.device = models, diagonals, device
        self.max_bytes = max_bytes
        self._mapped = 0

    @property
    def chunk(self) -> int:
        """Entries worked on at a time."""
        usual = CHUNK_GPU
        if self.device.type == "cpu":
            # Several threads have to be woken for each operation: it must be worth it.
            usual = CHUNK if torch.get_num_threads() == 1 else 4 * CHUNK
        # The parts, sums of them, the result and its copy as written, with eight bytes a number.
        each = 16 * (len(self.models) + len(self.diagonals) + 4)
        return min(usual, max(LEAST_CHUNK, self.max_bytes // each))

    def parts(self, name: str, fisher: bool = False) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Parts of one tensor in working precision, in one buffer, and of its Fisher information.

        Args:
            name: Of the tensor.
            fisher: Whether the information is wanted too.

        Yields:
            ``(k, entries)``, overwritten by the next part, and k views ``(entries,)`` or none.
        """
        entries = [model.tensors[name] for model in self.models]
        kind = torch.float32
        for entry in entries:
            kind = torch.promote_types(kind, entry.dtype) if entry.dtype.itemsize > 1 else kind
        kind = torch.float32 if self.device.type == "mps" else kind  # which has no float64
        buffer = torch.empty(
            len(entries), min(self.chunk, entries[0].numel), dtype=kind, device=self.device
        )
        for stored, beside in self.stored(name, fisher):
            part = buffer[:, : len(stored[0])]
            for x, place in zip(stored, part, strict=True):
                place.copy_(x)
            yield part, beside

    def stored(
        self, name: str, fisher: bool = False
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Parts of one tensor as they are in the files: views, not to be written to or kept.

        Args:
            name: Of the tensor.
            fisher: Whether its Fisher information is wanted too.

        Yields:
            k views ``(entries,)``, and k views ``(entries,)`` of the information or none.
        """
        entries = [model.tensors[name] for model in self.models]
        chunk, size = self.chunk, entries[0].numel
        # Fisher information is stored in float32 as a rule, in float64 at most.
        each = sum(entry.dtype.itemsize for entry in entries) + 8 * fisher * len(self.diagonals)
        stored: list[Tensor] = []
        beside: list[Tensor] = []
        for start in range(0, size, chunk):
            count = min(chunk, size - start)
            if self._mapped and self._mapped + each * count > self.max_bytes // 2:
                stored, beside = [], []
                self.release()
            if not stored:
                stored = [model.read(name).reshape(-1) for model in self.models]
                files = self.diagonals if fisher else []
                beside = [file.read(name).reshape(-1) for file in files]
            self._mapped += each * count
            here = slice(start, start + count)
            yield [x[here] for x in stored], [f[here] for f in beside]

    def release(self) -> None:
        """Let go of the files."""
        self._mapped = 0
        for model in self.models:
            model.release()
        for file in self.diagonals:
            file.release()
