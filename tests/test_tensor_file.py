"""Files that grow by one tensor at a time are read by safetensors as they were meant."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from manifold_merge.tensor_file import DTYPES, TensorFileWriter

NAMES = st.text(string.printable + "é層🙂", min_size=1, max_size=40)


@given(
    names=st.lists(NAMES, unique=True, max_size=8),
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
    metadata=st.dictionaries(NAMES, NAMES, max_size=3),
)
def test_safetensors_reads_what_was_written(
    names: list[str],
    shape: list[int],
    dtype: str,
    metadata: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    names = [name for name in names if name != "__metadata__"]
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    expected = {
        name: (10 * torch.randn(shape, generator=torch.Generator().manual_seed(i))).to(
            DTYPES[dtype]
        )
        for i, name in enumerate(names)
    }
    with TensorFileWriter(path, [*names, "not written"], metadata) as file:
        for name, tensor in expected.items():
            file.write(name, tensor)
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    with safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_large_sizes_fit_into_the_header(tmp_path: Path) -> None:
    """Room is left for the longest entry: eight dimensions of nineteen digits."""
    name = "x"
    path = tmp_path / "file.safetensors"
    with TensorFileWriter(path, [name]) as file:
        entry = {
            "dtype": "F8_E4M3",
            "shape": [2**62] * 8,
            "data_offsets": [2**62] * 2,
        }
        file._header[name] = entry
        assert len(json.dumps(file._header)) <= file._room


def test_strided_and_shared_tensors(tmp_path: Path) -> None:
    """safetensors' own save refuses these; a merge produces them."""
    x = torch.arange(12.0).reshape(3, 4)
    with TensorFileWriter(tmp_path / "a", ["t", "row"]) as file:
        file.write("t", x.mT)
        file.write("row", x[1])
    found = load_file(tmp_path / "a")
    assert torch.equal(found["t"], x.mT)
    assert torch.equal(found["row"], x[1])


def test_same_bytes_as_safetensors_after_the_header(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(2).double()}
    save_file(tensors, tmp_path / "theirs")
    with TensorFileWriter(tmp_path / "ours", tensors) as file:
        for name in ("b", "a"):  # theirs sorts by type
            file.write(name, tensors[name])

    def content(path: Path) -> bytes:
        raw = path.read_bytes()
        return raw[8 + int.from_bytes(raw[:8], "little") :]

    assert content(tmp_path / "ours") == content(tmp_path / "theirs")


def test_misuse_is_told(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "a", ["x", "y"]) as file:
        file.write("x", torch.ones(1))
        with pytest.raises(ValueError, match="'x' was written already"):
            file.write("x", torch.ones(1))
        with pytest.raises(ValueError, match="'z' was not announced"):
            file.write("z", torch.ones(1))
        with pytest.raises(ValueError, match="'y' has type"):
            file.write("y", torch.ones(1, dtype=torch.complex64))
        file.write("y", torch.ones(1))
    file.close()  # a second time does nothing
    assert load_file(tmp_path / "a").keys() == {"x", "y"}


def test_an_unfinished_file_is_not_valid(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(ValueError, match="announced"), TensorFileWriter(path, ["x"]) as file:
        file.write("y", torch.ones(1))
    with pytest.raises(SafetensorError):
        load_file(path)
