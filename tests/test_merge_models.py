"""Merging whole checkpoints: means, files, resumption, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manifold_merge import FisherEuclidean, checkpoint_parts, frechet_mean
from manifold_merge.checkpoint_merge import merge_models
from manifold_merge.checkpoint_span import core_coefficients
from manifold_merge.checkpoints import Checkpoint, CheckpointError
from manifold_merge.statistics_file import Statistics

SHAPES = {"embed.weight": (50, 8), "layers.0.weight": (24, 8), "layers.0.bias": (24,), "scale": ()}
CONFIG = {"model_type": "toy", "num_attention_heads": 4, "hidden_size": 8, "dtype": "float32"}


def state(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }
    return {**made, "position_ids": torch.arange(5), "norm.num_batches_tracked": torch.tensor(seed)}


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"m{i}", state(i), shards=i + 1) for i in range(3)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts a tensor, the last one shorter."""
    monkeypatch.setattr(checkpoint_parts, "CHUNK", 37)


def flat(name: str) -> torch.Tensor:
    return torch.stack([state(i)[name].reshape(-1) for i in range(3)])


def euclidean(name: str, weights: torch.Tensor, p: int) -> torch.Tensor:
    return frechet_mean(geoopt.Euclidean(ndim=1), flat(name), weights, p=p).point


def sphere(name: str, weights: torch.Tensor, p: int) -> torch.Tensor:
    points = flat(name)
    if points.shape[1] == 1:  # the sphere of one dimension is two points
        return euclidean(name, weights, p)
    norms = points.norm(dim=1)
    direction = frechet_mean(geoopt.SphereExact(), points / norms[:, None], weights, p=p).point
    norm = frechet_mean(geoopt.Euclidean(ndim=1), norms[:, None], weights, p=p).point
    return norm * direction


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("mean", [euclidean, sphere])
def test_each_tensor_is_the_mean_of_its_own(
    mean: Callable[..., torch.Tensor], p: int, three: list[Path], tmp_path: Path
) -> None:
    """The streamed mean in the span of the anchors equals the mean of the whole tensors."""
    weights = [3.0, 2.0, 2.0]
    merged = merge_models(three, tmp_path / "out", weights=weights, geometry=mean.__name__, p=p)
    found = read(merged.output)
    assert found.keys() == state(0).keys()
    for name in SHAPES:
        expected = mean(name, torch.tensor(weights).double(), p)
        assert torch.allclose(
            found[name].reshape(-1), expected, rtol=0, atol=1e-7 if p == 1 else 1e-10
        )
    assert merged.copied == ("norm.num_batches_tracked", "position_ids")


@pytest.mark.usefixtures("small_chunks")
def test_the_whole_model_as_one_point(three: list[Path], tmp_path: Path) -> None:
    merged = merge_models(three, tmp_path / "out", geometry="sphere", scope="model")
    joined = torch.cat([flat(name) for name in SHAPES], 1)
    norms = joined.norm(dim=1, keepdim=True)
    expected = norms.mean() * frechet_mean(geoopt.SphereExact(), joined / norms).point
    found = torch.cat([read(merged.output)[name].reshape(-1) for name in SHAPES])
    assert torch.allclose(found, expected, atol=1e-10)


def test_slerp_of_two(tmp_path: Path) -> None:
    """Shoemake's formula, for points of one norm."""
    states = []
    for i in range(2):
        made = {name: x for name, x in state(i).items() if name in SHAPES and x.numel() > 1}
        states.append({name: x / x.norm() for name, x in made.items()})
    folders = [write(tmp_path / str(i), states[i]) for i in range(2)]
    merged = merge_models(folders, tmp_path / "out", weights=[0.75, 0.25], geometry="sphere")
    for name, found in read(merged.output).items():
        one, two = states[0][name], states[1][name]
        angle = torch.acos((one * two).sum())
        expected = (torch.sin(0.75 * angle) * one + torch.sin(0.25 * angle) * two) / torch.sin(
            angle
        )
        assert torch.allclose(found, expected, atol=1e-10)


def edit_statistics(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the numbers of a statistics file, which then has no stored means, as older files."""
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    assert header.pop("means").keys() == tensors.keys()
    change(tensors)
    save_file(tensors, file, {**metadata, "header": json.dumps(header)})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("stored_means", [True, False])
def test_fisher_merging(stored_means: bool, three: list[Path], tmp_path: Path) -> None:
    """The streamed mean equals frechet_mean with FisherEuclidean metrics."""
    files, diagonals = [], []
    for i in range(3):
        generator = torch.Generator().manual_seed(10 + i)
        own = {
            name: torch.rand(shape, generator=generator, dtype=torch.float64).square()
            for name, shape in SHAPES.items()
            if name != "layers.0.bias"
        }
        files.append(tmp_path / f"s{i}.safetensors")
        Statistics("diagonal", diagonals=own, examples=3).save(files[-1], dtype=torch.float64)
        if not stored_means:
            edit_statistics(files[-1], lambda tensors: None)
        diagonals.append(own)
    merged = merge_models(
        three, tmp_path / "out", geometry="fisher", statistics=files, damping=0.1,
        weights=[1, 2, 1],
    )  # fmt: skip
    weights = torch.tensor([0.25, 0.5, 0.25]).double()
    found = read(merged.output)
    for name in SHAPES:
        points = torch.stack([state(i)[name] for i in range(3)])
        expected = torch.einsum("k...,k->...", points, weights)
        if name != "layers.0.bias":
            metrics = [FisherEuclidean(own[name], damping=0.1) for own in diagonals]
            space = geoopt.Euclidean(ndim=len(SHAPES[name]))
            expected = frechet_mean(space, points, weights, metrics=metrics).point
        atol = 1e-12 if stored_means else 1e-7  # means of older files are taken in float32
        assert torch.allclose(found[name], expected, atol=atol)


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 0, 1]])
@pytest.mark.parametrize(
    ("value", "damping", "message"),
    [
        (-1.0, 0.5, "'embed.weight' is negative or not finite"),
        (float("nan"), 0.5, "'embed.weight' is negative or not finite"),
        (0.0, 0.0, "'embed.weight' has entries of zero"),
        (0.0, 0.5, None),
    ],
)
def test_fisher_information_is_checked(
    value: float, damping: float, message: str | None, weights: list[int],
    three: list[Path], tmp_path: Path,
) -> None:  # fmt: skip
    """Whatever the weight of the model."""
    files = [tmp_path / f"s{i}.safetensors" for i in range(3)]
    for file in files:
        own = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        Statistics("diagonal", diagonals=own, examples=3).save(file)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["diagonal/embed.weight"][-1, -1] = value

    edit_statistics(files[1], spoil)
    options = {"geometry": "fisher", "statistics": files, "damping": damping, "weights": weights}
    if message is None:
        merge_models(three, tmp_path / "out", **options)
        return
    with pytest.raises(CheckpointError, match=f"s1.safetensors: the Fisher .* {message}"):
        merge_models(three, tmp_path / "out", **options)


@pytest.mark.parametrize("geometry", ["euclidean", "sphere"])
@pytest.mark.parametrize("p", [1, 2])
def test_laws_of_means(geometry: str, p: int, three: list[Path], tmp_path: Path) -> None:
    def merged(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
        out = tmp_path / "out"
        result = merge_models(folders, out, weights=weights, geometry=geometry, p=p, overwrite=True)
        return {k: v for k, v in read(result.output).items() if v.is_floating_point()}

    def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], atol: float) -> bool:
        return all(torch.allclose(one[k], two[k], rtol=0, atol=atol) for k in one)

    a, b, c = three
    assert same(merged([a, a, a], [1, 1, 1]), read(a), 1e-12)  # idempotence
    assert same(merged([a, b, c], [0, 1, 0]), read(b), 1e-12)  # one-hot weights
    atol = 1e-10 if p == 2 else 1e-6
    double = merged([a, b, c], [2, 1, 1])
    twice = merged([a, a, b, c], [1, 1, 1, 1])
    order = merged([c, a, b], [1, 2, 1])
    for name in SHAPES:
        assert torch.allclose(double[name], twice[name], rtol=0, atol=atol)
        assert torch.allclose(double[name], order[name], rtol=0, atol=atol)


def test_core_coefficients_of_zero_vectors() -> None:
    weights = torch.tensor([0.5, 0.5]).double()
    zero = core_coefficients(torch.zeros(2, 2).double(), weights, "sphere", 2)
    assert zero.isfinite().all()
    one = core_coefficients(torch.diag(torch.tensor([4.0, 0.0]).double()), weights, "sphere", 2)
    assert torch.allclose(one, torch.tensor([0.5, 0.0]).double())  # the norm is averaged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    states = [state(i, dtype) for i in range(3)]
    folders = [write(tmp_path / str(i), x) for i, x in enumerate(states)]
    merged = merge_models(folders, tmp_path / "out", weights=[1, 1, 2])
    for name in SHAPES:
        wide = torch.stack([x[name].double() for x in states])
        mean = (wide[0] + wide[1] + 2 * wide[2]) / 4
        found = read(merged.output)[name]
        assert found.dtype == dtype
        error = (found.double() - mean).abs()
        # Half a unit in the last place of the written type, and rounding of the sum in float32.
        allowed = torch.finfo(dtype).eps / 2 * mean.abs() + 5e-7 * wide.abs().amax(0)
        assert bool((error <= allowed).all())


def test_shards_index_and_files_beside(three: list[Path], tmp_path: Path) -> None:
    merged = merge_models(three[::-1], tmp_path / "out", dtype=torch.bfloat16)
    names = {file.name for file in merged.output.iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == shards | {
        "README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"
    }  # fmt: skip
    index = json.loads((merged.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state(0).keys()
    stored = {k: v for name in shards for k, v in load_file(merged.output / name).items()}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored.values())
    assert json.loads((merged.output / "config.json").read_text())["dtype"] == "bfloat16"
    assert stored["position_ids"].dtype == torch.int64
    assert "| `m2` | 0.333333 |" in (merged.output / "README.md").read_text()

    small = merge_models(three, tmp_path / "small", max_shard_size=2000)
    for file in small.output.glob("*.safetensors"):
        part = load_file(file)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 2000
    assert read(small.output).keys() == state(0).keys()


def test_transformers_loads_the_result(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=12,
    )  # fmt: skip
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(transformers.BertModel(config))
        models[-1].save_pretrained(tmp_path / str(seed), max_shard_size="20KB")
    folders = [tmp_path / "0", tmp_path / "1"]
    merged = merge_models(folders, tmp_path / "out", weights=[1, 3])
    loaded = transformers.BertModel.from_pretrained(merged.output)
    for name, x in loaded.state_dict().items():
        one, two = (m.state_dict()[name] for m in models)
        assert torch.allclose(x, 0.25 * one + 0.75 * two, atol=1e-6), name


class Stopped(Exception):
    pass


@pytest.mark.parametrize("change", [None, "weights", "input"])
def test_an_interrupted_run_is_resumed(
    change: str | None, three: list[Path], tmp_path: Path
) -> None:
    folders, out = three[::-1], tmp_path / "out"
    expected = read(merge_models(folders, tmp_path / "whole").output)

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        if (
            done > 0.3 * total
            and (tmp_path / ".out.unfinished").exists()
            and list((tmp_path / ".out.unfinished").glob("*.safetensors"))
        ):
            raise Stopped

    with pytest.raises(Stopped):
        merge_models(folders, out, progress=stop)
    assert not out.exists()
    options: dict[str, Any] = {}
    if change == "weights":
        options["weights"] = [1, 1, 2]
        expected = read(merge_models(folders, tmp_path / "other", **options).output)
    if change == "input":
        shutil.rmtree(folders[1])
        write(folders[1], state(7), shards=2)
        expected = read(merge_models(folders, tmp_path / "other").output)
    again = merge_models(folders, out, **options)
    assert (again.resumed > 0) == (change is None)
    found = read(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(x.name for x in tmp_path.iterdir() if x.name.startswith(".")) == []


def _truncate(folders: list[Path]) -> None:
    file = folders[1] / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _lose(folders: list[Path]) -> None:
    (folders[1] / "model-00002-of-00002.safetensors").unlink()


def _poison(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    bad = state(1)
    bad["layers.0.weight"][3, 4] = float("nan")
    write(folders[1], bad)


def _reshape(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    write(folders[1], state(1) | {"embed.weight": torch.ones(51, 8)})


def _fewer(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    write(folders[1], {k: v for k, v in state(1).items() if k != "scale"})


def _heads(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    write(folders[1], state(1), num_attention_heads=2)


def _positions(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    write(folders[1], state(1) | {"position_ids": torch.arange(1, 6)})


def _pickle(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    folders[1].mkdir()
    (folders[1] / "pytorch_model.bin").write_bytes(b"")


def _adapter(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])
    folders[1].mkdir()
    (folders[1] / "adapter_config.json").write_text("{}")


def _nothing(folders: list[Path]) -> None:
    shutil.rmtree(folders[1])


def _exists(folders: list[Path]) -> None:
    out = folders[0].parent / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")


ERRORS: dict[str, tuple[Callable[[list[Path]], None], dict[str, Any], type[Exception], str]] = {
    "truncated": (_truncate, {}, CheckpointError, "m1/model-00001.* truncated or damaged"),
    "shard": (_lose, {}, FileNotFoundError, "model-00002-of-00002.safetensors is missing"),
    "nan": (_poison, {}, CheckpointError, "m1: tensor 'layers.0.weight' holds NaN"),
    "nan sphere": (
        _poison, {"geometry": "sphere"}, CheckpointError, "m1: tensor 'layers.0.weight' holds NaN"
    ),
    "nan model": (
        _poison, {"p": 1, "scope": "model"}, CheckpointError, "m1: tensor 'layers.0.weight' holds"
    ),
    "shape": (_reshape, {}, CheckpointError, r"'embed.weight' has shape \(51, 8\) in .*m1"),
    "fewer": (_fewer, {}, CheckpointError, "m1 has no tensor 'scale', which .*m0 has"),
    "heads": (_heads, {}, CheckpointError, "'num_attention_heads' = 2, .* allow_different_config"),
    "integers": (_positions, {}, CheckpointError, "'position_ids' holds torch.int64 numbers"),
    "pickle": (_pickle, {}, CheckpointError, "is a pickle"),
    "adapter": (_adapter, {}, CheckpointError, "is a LoRA adapter; .*merge_adapters"),
    "missing": (_nothing, {}, FileNotFoundError, "checkpoint .*m1 does not exist"),
    "foreign": (_exists, {}, FileExistsError, "holds other files, such as 'thesis.tex'"),
    "geometry": (lambda x: None, {"geometry": "flat"}, ValueError, "geometry must be one of"),
    "scope": (lambda x: None, {"scope": "layer"}, ValueError, "scope must be one of"),
    "weights": (lambda x: None, {"weights": [1, 2]}, ValueError, "^weights: expected"),
    "pattern": (
        lambda x: None, {"layer_weights": {"*.0.*": [1, -1, 1]}}, ValueError,
        r"^layer_weights\['\*\.0\.\*'\]: ",
    ),
    "p": (lambda x: None, {"p": 3}, ValueError, "p must be 2"),
    "statistics": (lambda x: None, {"geometry": "fisher"}, ValueError, "needs one file for each"),
    "sign": (lambda x: None, {"weights": [1, -1, 1]}, ValueError, "write a task_arithmetic recipe"),
    "shard size": (lambda x: None, {"max_shard_size": 0}, ValueError, "max_shard_size: expected"),
    "both": (
        lambda x: None, {"scope": "model", "layer_weights": {"*": [1, 1, 1]}}, ValueError,
        "leave one of the two out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, three: list[Path], tmp_path: Path) -> None:
    spoil, options, error, message = ERRORS[case]
    spoil(three)
    with pytest.raises(error, match=message):
        merge_models(three, tmp_path / "out", **options)
    if case != "foreign":
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_file", [False, True])
def test_adapters_are_no_models(as_file: bool, tmp_path: Path) -> None:
    """Averaging their factors entry by entry is what this library is there to prevent."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_A": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    given = folder / "adapter_model.safetensors" if as_file else folder
    with pytest.raises(CheckpointError, match="is a LoRA adapter; merge adapters with"):
        merge_models([given, given], tmp_path / "out")


def test_different_configurations_can_be_accepted(three: list[Path], tmp_path: Path) -> None:
    _heads(three)
    merge_models(three, tmp_path / "out", allow_different_config=True)


def test_an_input_is_never_the_output(three: list[Path]) -> None:
    with pytest.raises(FileExistsError, match="is one of the inputs"):
        merge_models(three, three[0], overwrite=True)


@pytest.mark.parametrize("case", ["kind", "shape", "names", "some"])
def test_statistics_that_do_not_fit(case: str, three: list[Path], tmp_path: Path) -> None:
    own = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    files = []
    for i in range(3):
        given = dict(own)
        if case == "shape":
            given["embed.weight"] = torch.ones(2, 8)
        if case == "names":
            given = {f"model.{k}": v for k, v in own.items()}
        if case == "some" and i == 1:
            del given["scale"]
        kind = "kfac" if case == "kind" else "diagonal"
        files.append(tmp_path / f"{i}.safetensors")
        Statistics(kind, diagonals=given, examples=1).save(files[-1])
    message = {
        "kind": "statistics of kind 'kfac'; whole models need kind='diagonal'",
        "shape": r"Fisher information of 'embed.weight' has shape \(2, 8\), expected \(50, 8\)",
        "names": "no Fisher information of any tensor .*its names begin with 'model.embed.weight'",
        "some": "1.safetensors has no Fisher information of 'scale'",
    }[case]
    with pytest.raises(ValueError, match=message):
        merge_models(three, tmp_path / "out", geometry="fisher", statistics=files)
