"""rank="auto": the least rank that gives up next to nothing, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_adapters import FEWER, MORE, OTHER_RANKS, PLAIN, adapter, rewrite
from test_calibrate import statistics
from test_merge import gauged
from torch import Tensor

from manifold_merge import Adapter, LoRAQuotient, frechet_mean, merge_adapters
from manifold_merge.fisher import KroneckerFisher
from manifold_merge.rank_choice import RANK_TOLERANCE, choose_rank, parse_auto, truncation_losses

FLOAT64 = torch.float64
M, N, RANKS = 9, 7, (2, 3, 1)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=FLOAT64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def gram(size: int, seed: int) -> Tensor:
    x = draw(3 * size, size, seed=seed) * torch.linspace(0.2, 2, size, dtype=FLOAT64)
    return x.T @ x / len(x)


def points(seed: int = 0) -> list[Tensor]:
    return [draw(2, M + N, r, seed=10 * seed + r) for r in RANKS]


SIDES = {
    "none": (False, False),
    "inputs": (True, False),
    "outputs": (False, True),
    "both": (True, True),
}


def metrics(inputs: bool, outputs: bool) -> list[KroneckerFisher] | None:
    if not inputs and not outputs:
        return None
    return [
        KroneckerFisher(
            M, N,
            input_gram=gram(N, 20 + i) if inputs else None,
            output_gram=gram(M, 40 + i) if outputs else None,
        )
        for i in range(len(RANKS))
    ]  # fmt: skip


# --- the losses -----------------------------------------------------------------------------------


def solve(anchors: list[Tensor], chosen: list[KroneckerFisher] | None, rank: int) -> Any:
    if chosen is None:
        manifold = LoRAQuotient(M, N, distance="chordal")
        return frechet_mean(manifold, anchors, WEIGHTS, rank=rank)
    return frechet_mean(
        LoRAQuotient(M, N), anchors, WEIGHTS, rank=rank, metrics=chosen, tolerance=1e-11
    )


def objective(product: Tensor, anchors: list[Tensor], chosen: list[KroneckerFisher] | None):
    """Σ wᵢ |W - Wᵢ|ᵢ² from dense matrices."""
    manifold = LoRAQuotient(M, N)
    total = torch.zeros(product.shape[:-2], dtype=FLOAT64)
    for i, (w, x) in enumerate(zip(WEIGHTS, anchors, strict=True)):
        d = product - manifold.product(x)
        if chosen is None:
            total = total + w * d.square().sum((-2, -1))
        else:
            total = total + w * chosen[i].inner(d, d)
    return total


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES.keys())
def test_losses_are_those_of_merging_at_every_rank(sides: tuple[bool, bool]) -> None:
    """Brute force: merge at each rank and evaluate the objective on dense matrices."""
    manifold, anchors, chosen = LoRAQuotient(M, N), points(), metrics(*sides)
    full = solve(anchors, chosen, sum(RANKS))
    losses = truncation_losses(LoRAQuotient._split(manifold, full.point), WEIGHTS, chosen)
    zero = torch.zeros(2, M, N, dtype=FLOAT64)
    least = objective(manifold.product(full.point), anchors, chosen)
    gain = objective(zero, anchors, chosen) - least
    assert losses.shape == (2, sum(RANKS) + 1)
    assert torch.allclose(losses[:, 0], torch.ones(2, dtype=FLOAT64))
    assert torch.allclose(losses[:, -1], torch.zeros(2, dtype=FLOAT64), atol=1e-12)
    for rank in range(1, sum(RANKS)):
        best = objective(manifold.product(solve(anchors, chosen, rank).point), anchors, chosen)
        lost = (best - least) / gain
        if all(sides):  # an upper bound, and not a loose one
            assert bool((lost <= losses[:, rank] + 1e-8).all())
            assert bool((losses[:, rank] <= 1.5 * lost + 1e-3).all())
        else:
            assert torch.allclose(losses[:, rank], lost, atol=1e-9), rank


def test_a_common_two_sided_metric_has_exact_losses() -> None:
    """With one metric for all anchors the truncation is the best product of its rank."""
    manifold, anchors = LoRAQuotient(M, N), points(1)
    chosen = [metrics(True, True)[0]] * 3  # type: ignore[index]
    full = solve(anchors, chosen, sum(RANKS))
    losses = truncation_losses(LoRAQuotient._split(manifold, full.point), WEIGHTS, chosen)
    least = objective(manifold.product(full.point), anchors, chosen)
    gain = objective(torch.zeros(2, M, N, dtype=FLOAT64), anchors, chosen) - least
    for rank in (1, 2, 4):
        best = objective(manifold.product(solve(anchors, chosen, rank).point), anchors, chosen)
        assert torch.allclose(losses[:, rank], (best - least) / gain, atol=1e-7)


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES.keys())
@given(seed=st.integers(0, 1000))
def test_losses_fall_from_one_to_zero_in_every_gauge(sides: tuple[bool, bool], seed: int) -> None:
    manifold = LoRAQuotient(M, N)
    mean = draw(M + N, 4, seed=seed)
    moved = manifold.random_representative(
        mean, generator=torch.Generator().manual_seed(seed), condition=100.0
    )
    one, two = (
        truncation_losses(LoRAQuotient._split(manifold, x), WEIGHTS, metrics(*sides))
        for x in (mean, moved)
    )
    assert bool((one.diff() <= 0).all())
    assert torch.allclose(one[[0, -1]], torch.tensor([1.0, 0.0], dtype=FLOAT64))
    assert torch.allclose(one, two, atol=1e-9)


def test_a_mean_of_zero_has_no_losses() -> None:
    mean = (torch.zeros(2, 5, 3), torch.zeros(2, 4, 3))
    assert bool(truncation_losses(mean).isnan().all())
    choice = choose_rank({"q": truncation_losses(mean)[0].tolist()}, 0.01)
    assert (choice.rank, choice.losses[1]) == (1, 0.0)


# --- the choice -----------------------------------------------------------------------------------


@given(
    tables=st.lists(
        st.lists(st.floats(0, 1), min_size=1, max_size=6).map(
            lambda x: [1.0, *sorted(x, reverse=True), 0.0]
        ),
        min_size=1,
        max_size=4,
    ),
    tolerance=st.floats(0, 1),
)
def test_the_least_rank_within_the_tolerance(tables: list[list[float]], tolerance: float) -> None:
    choice = choose_rank({str(i): x for i, x in enumerate(tables)}, tolerance)
    longest = max(map(len, tables))

    def loss(rank: int) -> float:
        return sum(x[rank] if rank < len(x) else 0.0 for x in tables) / len(tables)

    assert loss(choice.rank) <= max(tolerance, 1e-12) + 1e-15
    assert choice.rank == 1 or loss(choice.rank - 1) > tolerance - 1e-15
    assert choice.losses == pytest.approx([loss(r) for r in range(longest)])
    assert choice.worst[1] == max(x[choice.rank] if choice.rank < len(x) else 0 for x in tables)


def test_tolerances_are_read() -> None:
    assert parse_auto("auto") == RANK_TOLERANCE
    assert parse_auto("auto=0.25") == 0.25
    assert parse_auto("full") is parse_auto(3) is parse_auto(None) is None
    for text in ("auto=", "auto=x", "auto=-1", "auto=2", "auto=nan"):
        with pytest.raises(ValueError, match=r"rank: auto takes .* such as auto=0\.02; got"):
            parse_auto(text)


# --- merging --------------------------------------------------------------------------------------

CHOSEN: dict[str, dict[str, Any]] = {
    "lifted": {"geometry": "lifted"},
    "embedded chordal": {"geometry": "embedded", "distance": "chordal"},
    "mixed chordal": {"geometry": "mixed", "distance": "chordal"},
    "polar chordal": {"geometry": "polar", "distance": "chordal"},
    "fisher": {"geometry": "fisher"},
    "fisher by task": {"geometry": "fisher", "normalisation": "task"},
    "sum": {"sum": True, "weights": [2.0, -1.0, 1.0]},
    "median": {"geometry": "embedded", "p": 1},
    "transform": {"geometry": "lifted", "transform": "isotropic"},
    "norm": {"geometry": "embedded", "distance": "chordal", "scale": "norm"},
}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three calibrated adapters of different ranks; one lacks modules of the others."""
    shapes = (PLAIN, OTHER_RANKS, MORE)
    made = [adapter(tmp_path / f"t{i}", shape, seed=i) for i, shape in enumerate(shapes)]
    for i, (folder, shape) in enumerate(zip(made, shapes, strict=True)):
        statistics(10 * i, tuple(shape)).save(folder, dtype=FLOAT64)
    return made


def products(merge: Any) -> dict[str, Tensor]:
    return {name: b.double() @ a.double() for name, (b, a) in merge.modules.items()}


@pytest.mark.parametrize("options", CHOSEN.values(), ids=CHOSEN.keys())
def test_auto_is_the_merge_at_the_rank_that_it_names(
    options: dict[str, Any], folders: list[Path]
) -> None:
    auto = merge_adapters(folders, rank="auto=0.1", **options)
    rank = auto.recipe["rank"]
    same = products(merge_adapters(folders, rank=rank, **options))
    for name, product in products(auto).items():
        assert torch.equal(product, same[name])
        assert auto.modules[name][1].shape[0] <= rank
    found = auto.recipe["rank_choice"]
    assert found["tolerance"] == 0.1
    assert found["loss"] <= 0.1 < found["loss_one_rank_below"] or rank == 1
    assert auto.recipe["rank_chosen_because"].startswith("it gives up ")
    assert f"rank: {rank} (it gives up" in repr(auto)


@pytest.mark.parametrize("name", ["lifted", "embedded chordal", "fisher"])
def test_no_lower_rank_is_within_the_tolerance(name: str, folders: list[Path]) -> None:
    """Brute force over all ranks, with losses from the products of real merges."""
    options = CHOSEN[name]
    full = products(merge_adapters(folders, rank="full", **options))
    auto = merge_adapters(folders, rank="auto=0.1", **options)
    roots = {key: torch.eye(x.shape[1], dtype=FLOAT64) for key, x in full.items()}
    if name == "fisher":
        for key in roots:
            having = [f for f in folders if key in Adapter(f).modules]
            total = torch.zeros_like(roots[key])
            for f in folders:  # a folder without the module is measured on the others' inputs
                own = [f] if f in having else having
                for g in own:
                    matrix = statistics(10 * folders.index(g), tuple(Adapter(g).modules))
                    dense = matrix.gram(key).dense()
                    eye = torch.eye(len(dense), dtype=FLOAT64)
                    total += (dense + 1e-2 * dense.trace() / len(dense) * eye) / len(own)
            roots[key] = torch.linalg.cholesky(total / 3)

    def loss(rank: int) -> float:
        merged = products(merge_adapters(folders, rank=rank, **options))
        lost = []
        for key, whole in full.items():
            cut = merged[key]
            if name == "lifted":  # whose norm is restored after the cut
                values = torch.linalg.svdvals(whole)
                lost.append(float(values[rank:].square().sum() / values.square().sum()))
                continue
            lost.append(
                float(((whole - cut) @ roots[key]).square().sum()
                      / (whole @ roots[key]).square().sum())
            )  # fmt: skip
        return sum(lost) / len(lost)

    rank = auto.recipe["rank"]
    losses = [loss(r) for r in range(1, rank + 1)]
    assert losses[-1] <= 0.1
    assert all(x > 0.1 for x in losses[:-1])
    assert auto.recipe["rank_choice"]["loss"] == pytest.approx(losses[-1], rel=1e-9)


def test_two_sided_metrics(tmp_path: Path) -> None:
    made = [adapter(tmp_path / f"t{i}", seed=i) for i in range(2)]
    for i, folder in enumerate(made):
        statistics(10 * i, kind="kfac").save(folder, dtype=FLOAT64)
    auto = merge_adapters(made, rank="auto=0.2")
    assert auto.recipe["geometry"] == "fisher"
    assert 1 < auto.recipe["rank"] < 6
    same = products(merge_adapters(made, rank=auto.recipe["rank"]))
    assert all(torch.equal(x, same[name]) for name, x in products(auto).items())
    assert auto.recipe["output_errors"] == merge_adapters(made, rank=auto.recipe["rank"]).recipe[
        "output_errors"
    ]  # fmt: skip


def test_ranks_fall_as_tolerances_rise(folders: list[Path]) -> None:
    ranks = [
        merge_adapters(folders, rank=f"auto={x}").recipe["rank"] for x in (0, 0.01, 0.1, 0.5, 1)
    ]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 7  # of a 9 x 7 module whose ranks 3, 5 and 3 add up to more
    assert ranks[-1] == 1


@pytest.mark.parametrize("name", ["lifted", "embedded chordal", "polar chordal", "fisher"])
def test_a_change_of_gauge_changes_neither_rank_nor_reason(
    name: str, folders: list[Path], tmp_path: Path
) -> None:
    given = [statistics(10 * i, tuple(Adapter(f).modules)) for i, f in enumerate(folders)]
    moved = [gauged(path, tmp_path / f"g{i}", 1e3, i) for i, path in enumerate(folders)]
    options = CHOSEN[name] | ({"statistics": given} if name == "fisher" else {})
    one, two = (merge_adapters(x, rank="auto=0.1", **options) for x in (folders, moved))
    assert one.recipe["rank"] == two.recipe["rank"]
    assert one.recipe["rank_chosen_because"] == two.recipe["rank_chosen_because"]
    again = products(two)
    for key, product in products(one).items():
        assert float((product - again[key]).norm() / product.norm()) < 1e-9


def test_one_adapter_is_compressed(tmp_path: Path) -> None:
    """Copies of a direction cost no rank."""
    folder = adapter(tmp_path / "a")

    def repeat(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            if "lora_A" in key:
                value[1:] = value[:1]

    rewrite(folder, repeat)
    merged = merge_adapters([folder], rank="auto=0")
    assert merged.recipe["rank"] == 1
    for name, product in products(merged).items():
        assert torch.allclose(product, Adapter(folder).delta_weight(name), atol=1e-12)


def test_absent_modules_count_as_the_zeros_that_they_are(tmp_path: Path) -> None:
    made = [adapter(tmp_path / "a", FEWER), adapter(tmp_path / "b", PLAIN, seed=1)]
    auto = merge_adapters(made, rank="auto=0.3")
    assert set(auto.modules) == set(PLAIN)
    assert auto.recipe["rank"] < 6


@pytest.mark.parametrize("distance", ["exact", "aligned"])
def test_distances_between_products_of_one_rank_leave_no_choice(
    distance: str, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a")
    close = adapter(tmp_path / "b")

    def move(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            tensors[key] = value + 0.01 * draw(*value.shape, seed=len(key))

    rewrite(close, move)
    options: dict[str, Any] = {"geometry": "mixed", "distance": distance}
    auto = merge_adapters([folder, close], rank="auto", **options)
    same = products(merge_adapters([folder, close], **options))
    assert all(torch.equal(x, same[name]) for name, x in products(auto).items())
    assert auto.recipe["rank"] == "greatest of inputs"
    assert auto.recipe["rank_chosen_because"] == (
        f"{distance} distances are between products of equal rank"
    )


def test_all_geometries_by_themselves_can_choose(folders: list[Path]) -> None:
    """geometry="auto" and rank="auto" together: metric, rank and scale from what is there."""
    merged = merge_adapters(folders, rank="auto")
    assert merged.recipe["geometry"] == "fisher"
    assert "of the predicted effect of" in merged.recipe["rank_chosen_because"]
    for folder in folders:
        (folder / "merge_statistics.safetensors").unlink()
    merged = merge_adapters(folders, rank="auto")
    assert merged.recipe["geometry"] == "lifted"
    assert "squared norm" in merged.recipe["rank_chosen_because"]


@pytest.mark.parametrize(
    ("options", "rank", "why", "scale"),
    [
        (
            {},
            "full",
            "no lower rank has a lower predicted error",
            "least squares have none to tune",
        ),
        ({"geometry": "lifted"}, "full", "each adapter keeps its directions", "keeps their norm"),
        ({"geometry": "embedded"}, "greatest of inputs", "that of the inputs", "a mean has none"),
        ({"rank": 2, "scale": "norm"}, 2, "given", "given"),
    ],
)
def test_defaults_have_reasons_too(
    options: dict[str, Any], rank: Any, why: str, scale: str, folders: list[Path]
) -> None:
    recipe = merge_adapters(folders, **options).recipe
    assert (recipe["rank"], recipe["rank_chosen_because"]) == (rank, why)
    assert scale in recipe["scale_chosen_because"]


def test_progress_counts_both_passes(folders: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    merge_adapters(folders, rank="auto", progress=lambda *x: seen.append(x))
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- the command line -----------------------------------------------------------------------------


def test_the_command_says_which_rank_and_why(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    shown = run("adapters", *folders, "--rank", "auto=0.1", "--output", output, COLUMNS="200")
    assert shown.exit_code == 0, shown.output
    config = json.loads((output / "adapter_config.json").read_text())
    rank = max(config["r"], *config["rank_pattern"].values())
    assert f"{rank}: it gives up" in " ".join(shown.output.split())
    card = (output / "README.md").read_text()
    assert f"Rank {rank}: it gives up" in card
    stored = load_file(output / "adapter_model.safetensors")
    assert max(x.shape[0] for key, x in stored.items() if "lora_A" in key) == rank
    answer = run("adapters", *folders, "--rank", "auto=0.1", "-o", tmp_path / "two", "--json")
    recipe = json.loads(answer.stdout)["recipe"]
    assert recipe["rank"] == rank
    assert recipe["rank_choice"]["loss"] <= 0.1


def test_a_tolerance_that_is_none_is_refused(folders: list[Path], tmp_path: Path) -> None:
    refused = run("adapters", *folders, "--rank", "auto=much", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--rank: auto takes the share" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()
