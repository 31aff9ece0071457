"""Checkpoints modulo permutations: real transformers folders are aligned and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_transformers
import torch
from safetensors.torch import load_file, save_file
from test_cli import run
from torch import nn

from manifold_merge import align_models, merge_models, symmetry_of
from manifold_merge.checkpoint_symmetry import checkpoint_symmetry
from manifold_merge.checkpoints import Checkpoint, CheckpointError


def saved(folder: Path, make: Callable[[], nn.Module], seed: int) -> tuple[Path, nn.Module]:
    torch.manual_seed(seed)
    model = make().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norms of ones and biases of zero hide mistakes
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder, model


def shuffled(folder: Path, model: nn.Module, like: Path) -> Path:
    """The same function, its units in a random order."""
    symmetry = checkpoint_symmetry(Checkpoint(like))
    state = {name: x.clone() for name, x in load_file(like / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(5)
    orders = {s.name: torch.randperm(s.count, generator=generator) for s in symmetry.sets}
    moved = symmetry.permute(state, orders)
    assert any(not torch.equal(moved[name], state[name]) for name in state)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in moved.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text((like / "config.json").read_text())
    return folder


MODELS = {
    "gpt2": tiny_transformers.gpt2,
    "llama": tiny_transformers.llama,
    "bert": tiny_transformers.bert,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_shuffled_copy_is_brought_back(name: str, tmp_path: Path) -> None:
    one, model = saved(tmp_path / "a", MODELS[name], 0)
    two = shuffled(tmp_path / "b", model, one)
    found = align_models(two, one, tmp_path / "aligned")
    assert found.distance_before > 1
    assert found.distance_after < 1e-4
    assert found.moved > 0
    merged = merge_models([one, two], tmp_path / "merged", geometry="permutation")
    naive = merge_models([one, two], tmp_path / "naive")
    loaded = [type(model).from_pretrained(x).eval() for x in (merged.output, naive.output)]
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, ours, theirs = (m(tokens)[0] for m in (model, *loaded))
    size = expected.norm()
    assert float((ours - expected).norm() / size) < 1e-4
    assert float((theirs - expected).norm() / size) > 1e-2  # the average without alignment


def test_command_line(tmp_path: Path) -> None:
    one, model = saved(tmp_path / "a", tiny_transformers.gpt2, 0)
    two = shuffled(tmp_path / "b", model, one)
    shown = run("align", two, "--to", one, "-o", tmp_path / "aligned")
    assert shown.exit_code == 0, shown.stderr
    assert "b, aligned to a" in shown.stdout
    document = json.loads(
        run("models", one, two, "--geometry", "permutation", "-o", tmp_path / "m", "--json").stdout
    )
    assert document["recipe"]["geometry"] == "permutation"


OPTIONS = [
    ([], "auto", "bases inside heads"),
    (["--no-basis"], False, "units in another order;"),
    (["--basis"], True, "bases inside heads"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "basis", "card"), OPTIONS)
def test_bases_can_be_kept(given: list[str], basis: bool | str, card: str, tmp_path: Path) -> None:
    one, model = saved(tmp_path / "a", tiny_transformers.gpt2, 0)
    two, _ = saved(tmp_path / "b", tiny_transformers.gpt2, 1)
    shown = run("align", two, "--to", one, "-o", tmp_path / "c", "--json", *given)
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert (document["recipe"]["basis"], document["recipe"]["rescale"]) == (basis, "auto")
    assert card in (tmp_path / "c" / "README.md").read_text()
    expected = align_models(two, one, tmp_path / "d", basis=basis)
    assert document["distance_after"] == expected.distance_after
    shown = run("models", one, two, "--geometry", "permutation", "-o", tmp_path / "m", *given)
    assert shown.exit_code == 0, shown.stderr
    merged = merge_models([one, two], tmp_path / "n", geometry="permutation", basis=basis)
    assert merged.recipe["basis"] == basis
    found, wanted = (load_file(tmp_path / x / "model.safetensors") for x in "mn")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    type(model).from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--basis", "removes no symmetry"),
        ("--balance", "removes no symmetry"),
    ],
)
def test_gauges_belong_to_permutations(option: str, message: str, tmp_path: Path) -> None:
    one, _ = saved(tmp_path / "a", tiny_transformers.gpt2, 0)
    shown = run("models", one, one, "-o", tmp_path / "m", option)
    assert shown.exit_code != 0
    assert message in " ".join(shown.stderr.split())


def test_nan_names_the_checkpoint(tmp_path: Path) -> None:
    one, _ = saved(tmp_path / "a", tiny_transformers.gpt2, 0)
    two, _ = saved(tmp_path / "b", tiny_transformers.gpt2, 1)
    state = load_file(two / "model.safetensors")
    name = "transformer.wpe.weight"
    state[name][0, 0] = float("nan")
    save_file(state, two / "model.safetensors", {"format": "pt"})
    message = f"b: tensor '{name}' holds NaN"
    with pytest.raises(CheckpointError, match=message):
        merge_models([one, two], tmp_path / "out", geometry="permutation")
    with pytest.raises(CheckpointError, match=message):
        align_models(two, one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_own_networks_bring_their_symmetry(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    symmetry = symmetry_of(network, torch.randn(5, 3))
    state = network.state_dict()
    files = []
    for seed in range(3):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(symmetry.permute(state, {symmetry.sets[0].name: order}), files[-1])
    merged = merge_models(files, tmp_path / "out", geometry="permutation", symmetry=symmetry)
    network.load_state_dict(load_file(merged.output / "model.safetensors"))
    inputs = torch.randn(5, 3)
    expected = nn.functional.linear(
        nn.functional.linear(inputs, state["0.weight"], state["0.bias"]).relu(),
        state["2.weight"],
        state["2.bias"],
    )
    assert torch.allclose(network(inputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "does not say what the network is"),
        ({"model_type": "nothing-known"}, "pass symmetry="),
        ({"model_type": "bert", "hidden_size": 12, "num_attention_heads": 2, "vocab_size": 9,
          "intermediate_size": 8, "num_hidden_layers": 1}, "is no parameter of Bert"),
    ],
)  # fmt: skip
def test_networks_that_are_not_known(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_file({"strange.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        checkpoint_symmetry(Checkpoint(tmp_path))


def test_options_that_contradict(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="one point with one weight"):
        merge_models([tmp_path / "a.safetensors"], tmp_path / "o", geometry="permutation",
                     scope="model")  # fmt: skip
