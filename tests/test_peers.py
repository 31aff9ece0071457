"""The peers in benchmarks/ are what their papers say, where an oracle or a closed form tells."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
FLOAT64 = torch.float64


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is no part of an installed package")
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("peers")
    finally:
        sys.path.remove(str(FOLDER))
        for name in {"peers", "harness", "bench_data", "score_refined"} - before:
            sys.modules.pop(name, None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def layers(count: int = 3) -> dict[str, list[tuple[Tensor, Tensor]]]:
    return {
        name: [
            (draw(12, r, seed=10 * i + m), draw(r, 10, seed=10 * i + m + 5))
            for i, r in enumerate(range(1, count + 1))
        ]
        for m, name in enumerate(("q", "k"))
    }


def test_ties_is_that_of_peft(peers: ModuleType) -> None:
    vectors = draw(3, 500)
    ours = peers.ties(vectors)
    theirs = peft_ties(list(vectors), torch.ones(3, dtype=FLOAT64), peers.DENSITY)
    # One of the two keeps the entry at the threshold, the other does not.
    assert int((ours - theirs).abs().gt(1e-12).sum()) <= 3
    assert float(ours.norm()) > 1


def test_one_adapter_is_itself(peers: ModuleType) -> None:
    given = {name: [pairs[2]] for name, pairs in layers().items()}
    for merge in (peers.task_arithmetic, peers.tsv_m):
        for name, update in merge(given, None).items():
            b, a = given[name][0]
            assert torch.allclose(update, b @ a, atol=1e-12)


@pytest.mark.parametrize("name", ["task_arithmetic", "knots_ties", "tsv_m"])
def test_peers_in_bases_of_the_products_have_no_gauge(peers: ModuleType, name: str) -> None:
    given = layers()
    moved = {
        key: [
            (b @ g, torch.linalg.solve(g, a))
            for b, a in pairs
            for g in [draw(b.shape[1], b.shape[1], seed=99)]
        ]
        for key, pairs in given.items()
    }
    one, two = getattr(peers, name)(given, 2), getattr(peers, name)(moved, 2)
    assert all(torch.allclose(one[key], two[key], atol=1e-9) for key in one)


def test_spectra_of_isotropic_methods_are_flat(peers: ModuleType) -> None:
    given = layers()
    for merge, rank, live in (
        (peers.core_iso, None, 6),
        (peers.core_iso, 4, 4),
        (peers.iso_c, None, 10),
    ):
        for name, update in merge(given, rank).items():
            values = torch.linalg.svdvals(update)
            total = torch.linalg.svdvals(peers.total(given[name]))[:live]
            expected = total.mean().expand(live)
            assert torch.allclose(values[:live], expected, atol=1e-10)
            assert bool((values[live:] < 1e-10).all())


def test_orthogonal_frames_stay(peers: ModuleType) -> None:
    """TSV-M of adapters that do not share directions is their sum."""
    eye = torch.eye(12, dtype=FLOAT64)
    pairs = [(eye[:, i : i + 2] * 2.0, eye[i : i + 2]) for i in (0, 2, 4)]
    (update,) = peers.tsv_m({"q": pairs}, None).values()
    assert torch.allclose(update, peers.total(pairs), atol=1e-12)


def test_ranks_are_cut(peers: ModuleType) -> None:
    for peer in peers.peers(2):
        if callable(peer.merge) and peer.rank:
            for update in peer.merge(layers(), peer.rank).values():
                assert int(torch.linalg.matrix_rank(update)) == 2
        assert len(set(peer.scales)) == len(peer.scales) <= 5
