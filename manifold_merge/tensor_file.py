"""Write a safetensors file one tensor at a time, so that the file need not fit into memory.

The format (huggingface/safetensors, "Format") is a length, a JSON header and the tensors' bytes.
The header comes first but is known last, so room for it is left and filled with spaces, which the
format allows. Everything is read with safetensors itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "TensorFileWriter"]

# The names that safetensors gives to the types in which networks are stored.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Type, up to 8 sizes and two offsets with their keys and punctuation.
_ENTRY_BYTES = 300


class TensorFileWriter:
    """A safetensors file that grows by one tensor at a time.

    Args:
        path: The file to write; it is replaced if it exists, and no valid file until
            :meth:`close`, or the end of a ``with`` block, has written its header.
        names: Names of the tensors that may be written; not all of them have to be.
        metadata: Strings for the header. Default: ``{"format": "pt"}``, as transformers wants.

    Raises:
        OSError: The file cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with TensorFileWriter(path, ["a", "b"]) as file:
        ...     file.write("b", torch.arange(3.0))
        >>> load_file(path)
        {'b': tensor([0., 1., 2.])}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        names: Iterable[str],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._allowed = set(names)
        header = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
        self._header: dict[str, Any] = header
        entries = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in self._allowed)
        room = len(json.dumps(header).encode()) + entries
        self._room = room + -room % 8  # the tensors start at a multiple of eight bytes
        self._end = 0
        self._stream = self.path.open("wb")
        self._stream.seek(8 + self._room)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor of any shape and device.

        Raises:
            ValueError: The name was not announced, was written already, or the type has no name in
                the format.
        """
        self._begin(name, tensor.dtype, tensor.shape)
        self._append(tensor)

    def write_parts(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], parts: Iterable[Tensor]
    ) -> None:
        """Append one tensor that comes in parts, in the order of its entries.

        Args:
            name: As in :meth:`write`.
            dtype: Type of the tensor; parts are converted.
            shape: Shape of the whole.
            parts: Tensors whose entries, one after the other, are those of the whole.

        Raises:
            ValueError: As in :meth:`write`, or the parts have too many or too few entries.
        """
        self._begin(name, dtype, shape)
        start = self._end
        for part in parts:
            self._append(part.to(dtype))
        expected, found = math.prod(shape) * dtype.itemsize, self._end - start
        if found != expected:
            raise ValueError(
                f"{self.path}: the parts of {name!r} have {found} bytes, expected {expected} for "
                f"shape {tuple(shape)}"
            )

    def _begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        if name not in self._allowed or name in self._header:
            why = "was written already" if name in self._header else "was not announced"
            raise ValueError(f"{self.path}: tensor {name!r} {why}; write each announced name once")
        if dtype not in _NAMES:
            raise ValueError(
                f"{self.path}: tensor {name!r} has type {dtype}, which cannot be stored; "
                f"convert it to one of {', '.join(map(str, _NAMES))}"
            )
        size = math.prod(shape) * dtype.itemsize
        self._header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [self._end, self._end + size],
        }

    def _append(self, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._stream.write(data.data)
        self._end += data.size

    def close(self) -> None:
        """Write the header, after which the file is complete."""
        if self._stream.closed:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._stream.seek(0)
        self._stream.write(self._room.to_bytes(8, "little"))
        self._stream.write(header.ljust(self._room))
        self._stream.close()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self._stream.close()  # without a header it is no valid file
