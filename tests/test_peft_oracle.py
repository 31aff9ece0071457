"""PEFT as the oracle, on real adapters of a real encoder.

PEFT's ``svd`` is one point of our table: the embedded metric with the chordal distance. The same
adapters go through both libraries here. What PEFT merges by averaging factors is the
counter-example: it depends on how an adapter happens to be factored.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from conftest import MiniLM
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifold_merge.adapter_config import CONFIG_NAME
from manifold_merge.adapters import WEIGHTS_NAME
from manifold_merge.merge import merge_adapters

SETS = ("rank 16", "mixed ranks")
WEIGHTS = {
    "equal": (1 / 3, 1 / 3, 1 / 3),
    "unequal": (0.6, 0.3, 0.1),
    "negative": (0.8, 0.6, -0.4),
}
# PEFT turns weights into float32; these have no rounding there.
EXACT_WEIGHTS = {"positive": (0.5, 0.375, 0.125), "negative": (0.75, 0.5, -0.25)}
# Name of a merge in our words, as arguments of merge_adapters.
GEOMETRIES = {
    "lifted": {"geometry": "lifted"},
    "lifted, rank 16": {"geometry": "lifted", "rank": 16},
    "embedded": {"geometry": "embedded", "distance": "chordal"},
    "mixed": {"geometry": "mixed", "distance": "chordal"},
    "invariant": {"geometry": "invariant", "distance": "chordal"},
    "polar": {"geometry": "polar", "distance": "chordal"},
}

Updates = dict[str, Tensor]


class Oracle:
    """A model with several adapters in PEFT's hands."""

    def __init__(
        self, minilm: MiniLM, folders: Sequence[Path], dtype: torch.dtype = torch.float32
    ) -> None:
        base = minilm.fresh().to(dtype)
        # Not "0", "1": PEFT takes an adapter's name for part of a layer's and saves half of them.
        self.names = [f"task{i}" for i in range(len(folders))]
        self.model = PeftModel.from_pretrained(base, str(folders[0]), self.names[0])
        for name, folder in zip(self.names[1:], folders[1:], strict=True):
            self.model.load_adapter(str(folder), name)
        self._merges = 0

    def merge(self, weights: Sequence[float], combination_type: str = "svd") -> str:
        """Merge as PEFT's documentation says; returns the name of the merged adapter."""
        self._merges += 1
        name = f"merged{self._merges}"
        options = {"svd_full_matrices": False} if combination_type == "svd" else {}
        self.model.add_weighted_adapter(
            self.names, list(weights), name, combination_type=combination_type, **options
        )
        return name

    def updates(self, name: str) -> Updates:
        """The update of each module, as PEFT adds it to the base model's weight."""
        layers = models.lora_layers(self.model)
        with torch.no_grad():
            return {key: layer.get_delta_weight(name) for key, layer in layers.items()}

    def save(self, name: str, folder: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(str(folder), selected_adapters=[name])
        return folder / name


@pytest.fixture(scope="module")
def folders(
    bundled_adapters: dict[str, Path], bundled_mixed_adapters: dict[str, Path]
) -> dict[str, list[Path]]:
    sets = (bundled_adapters, bundled_mixed_adapters)
    return {name: list(chosen.values()) for name, chosen in zip(SETS, sets, strict=True)}


@pytest.fixture(scope="module")
def oracle(minilm: MiniLM, folders: dict[str, list[Path]]) -> Callable[..., Oracle]:
    made: dict[tuple[str, torch.dtype], Oracle] = {}

    def get(which: str, dtype: torch.dtype = torch.float32) -> Oracle:
        if (which, dtype) not in made:
            made[which, dtype] = Oracle(minilm, folders[which], dtype)
        return made[which, dtype]

    return get


def products(modules: Mapping[str, tuple[Tensor, Tensor]]) -> Updates:
    return {name: B.double() @ A.double() for name, (B, A) in modules.items()}


def loaded(minilm: MiniLM, folder: Path, dtype: torch.dtype = torch.float32) -> Updates:
    """The updates of a folder as PEFT loads it; keys missing from the file are an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(minilm.fresh().to(dtype), str(folder))
    layers = models.lora_layers(model)
    with torch.no_grad():
        return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[float]:
    """Relative Frobenius distance of each module."""
    assert first.keys() == second.keys()
    return [
        float((first[name].double() - second[name].double()).norm() / second[name].double().norm())
        for name in second
    ]


def change_gauge(folder: Path, output: Path, *, condition: float) -> Path:
    """Write the same adapter in float64 with factors B G and G⁻¹ A; condition 1 keeps them."""
    state = {key: value.double() for key, value in load_file(folder / WEIGHTS_NAME).items()}
    for key in [key for key in state if "lora_A" in key and condition > 1]:
        other = key.replace("lora_A", "lora_B")
        rank = len(state[key])
        left, right = (torch.linalg.qr(torch.randn(rank, rank).double()).Q for _ in range(2))
        spread = torch.logspace(-0.5, 0.5, rank, base=condition, dtype=torch.float64)
        state[other] = state[other] @ (left * spread @ right)
        state[key] = (right.mT / spread @ left.mT) @ state[key]
    output.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in state.items()}, output / WEIGHTS_NAME)
    shutil.copy(folder / CONFIG_NAME, output)
    return output


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("which", SETS)
def test_embedded_chordal_is_peft_svd(folders, oracle, which, weights):
    peft = oracle(which)
    expected = peft.updates(peft.merge(weights))
    result = merge_adapters(
        folders[which], weights=weights, geometry="embedded", distance="chordal"
    )
    assert result.modules_merged == len(expected) == 36
    assert {B.shape[1] for B, _ in result.modules.values()} == {16}
    assert max(differences(products(result.modules), expected)) <= 1e-5


@pytest.mark.parametrize("weights", EXACT_WEIGHTS.values(), ids=EXACT_WEIGHTS)
def test_agreement_grows_with_the_precision(folders, oracle, tmp_path, weights):
    # What is left in float32 is rounding, not another formula.
    peft = oracle(SETS[0], torch.float64)
    expected = peft.updates(peft.merge(weights))
    double = [change_gauge(x, tmp_path / x.name, condition=1) for x in folders[SETS[0]]]
    result = merge_adapters(double, weights=weights, geometry="embedded", distance="chordal")
    assert max(differences(products(result.modules), expected)) <= 1e-10


def test_weights_that_do_not_sum_to_one(folders, oracle):
    # PEFT adds w_i W_i as the weights are; we divide by their sum, and say so, unless sum=True.
    weights = (1.0, 0.5, 0.25)
    peft = oracle(SETS[0])
    expected = peft.updates(peft.merge(weights))
    options = {"weights": weights, "geometry": "embedded", "distance": "chordal"}
    mean = merge_adapters(folders[SETS[0]], **options).modules
    total = merge_adapters(folders[SETS[0]], weights=weights, sum=True).modules
    assert max(differences(products(total), expected)) <= 1e-5
    scaled = {name: value / sum(weights) for name, value in expected.items()}
    assert max(differences(products(mean), scaled)) <= 1e-5
    assert min(differences(products(mean), expected)) > 0.1


@pytest.mark.parametrize("which", SETS)
def test_full_rank_chordal_is_the_weighted_sum_of_updates(folders, oracle, which):
    # PEFT's `cat`, which keeps every direction, is the other method of PEFT that has no gauge.
    peft = oracle(which)
    expected = peft.updates(peft.merge(WEIGHTS["unequal"], "cat"))
    result = merge_adapters(
        folders[which],
        weights=WEIGHTS["unequal"],
        geometry="embedded",
        distance="chordal",
        rank="full",
    )
    ranks = {B.shape[1] for B, _ in result.modules.values()}
    assert ranks == {48 if which == SETS[0] else 28}
    assert max(differences(products(result.modules), expected)) <= 1e-5


# --- the same behaviour --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", SETS)
def test_merged_folder_scores_as_peft_does(minilm, folders, oracle, bundled_texts, tmp_path, which):
    peft = oracle(which)
    theirs = peft.save(peft.merge(WEIGHTS["equal"]), tmp_path / "peft")
    ours = tmp_path / "ours"
    options: dict[str, Any] = {"geometry": "embedded", "distance": "chordal"}
    merge_adapters(folders[which], ours, dtype=torch.float32, **options)
    assert max(differences(loaded(minilm, ours), loaded(minilm, theirs))) <= 1e-5
    mixed = which == "mixed ranks"
    for task in bundled_texts:
        expected = minilm.accuracy(task, theirs, mixed_rank=mixed)
        assert minilm.accuracy(task, ours, mixed_rank=mixed) == expected > 0.5


# --- our own geometry through PEFT's loader ------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 16], ids=["full rank", "rank 16"])
@pytest.mark.parametrize("which", SETS)
def test_lifted_folder_loads_as_written(minilm, folders, tmp_path, which, rank):
    in_memory = merge_adapters(folders[which], geometry="lifted", rank=rank)
    merge_adapters(folders[which], tmp_path / "merged", geometry="lifted", rank=rank)
    single = tmp_path / "single"
    merge_adapters(folders[which], single, geometry="lifted", rank=rank, dtype=torch.float32)
    expected = products(in_memory.modules)
    full = 48 if which == SETS[0] else 28
    assert {B.shape[1] for B, _ in in_memory.modules.values()} == {rank or full}
    assert max(differences(loaded(minilm, single), expected)) <= 1e-6
    # By default the result is stored as the inputs are, in half precision.
    assert max(differences(loaded(minilm, tmp_path / "merged"), expected)) <= 1e-3


# --- gauge ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gauges(
    folders: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[Path]]:
    """The rank-16 adapters in float64, and again with gauges of condition 1e4."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("gauges")
    return tuple(
        [change_gauge(x, root / f"{condition:g}" / x.name, condition=condition) for x in adapters]
        for condition, adapters in ((1, folders[SETS[0]]), (1e4, folders[SETS[0]]))
    )


def test_peft_linear_depends_on_the_gauge(minilm, gauges):
    alone, merged = [], []
    for adapters in gauges:
        peft = Oracle(minilm, adapters, torch.float64)
        alone.append(peft.updates("task0"))
        merged.append(peft.updates(peft.merge(WEIGHTS["equal"], "linear")))
    assert max(differences(*alone)) <= 1e-9  # each adapter is the same model as before
    assert min(differences(*merged)) > 0.5  # and their average is another


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_merge_does_not_depend_on_the_gauge(gauges, options):
    before, after = (products(merge_adapters(x, **options).modules) for x in gauges)
    assert max(differences(after, before)) <= 1e-9


def test_change_of_gauge_is_as_large_as_said(gauges):
    before, after = (load_file(x[0] / WEIGHTS_NAME) for x in gauges)
    for key in before:
        if "lora_B" in key:
            gauge = torch.linalg.lstsq(before[key], after[key]).solution
            assert torch.linalg.cond(gauge) == pytest.approx(1e4, rel=1e-3)
