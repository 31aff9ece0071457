"""From texts to statistics beside an adapter, to merges that use them: library and command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import FEWER, MORE, OTHER_RANKS, PLAIN, adapter, rewrite
from torch import Tensor, nn
from typer.testing import CliRunner

from manifold_merge import LoRAQuotient, merge_adapters
from manifold_merge.adapters import Adapter
from manifold_merge.calibrate import calibrate_adapter
from manifold_merge.cli import app
from manifold_merge.merge_fisher import AdapterMetrics
from manifold_merge.statistics import STATISTICS_NAME, Gram, Statistics

FLOAT64 = torch.float64
SIZES = {"layer.0.query": 7, "layer.1.query": 7, "layer.10.up": 12, "layer.2.key": 4}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def gram(n: int, seed: int) -> Gram:
    x = draw(5 * n, n, seed=seed)
    return Gram(x.T @ x / len(x), count=len(x))


def statistics(seed: int, names: tuple[str, ...] = tuple(PLAIN), kind: str = "input_gram"):
    """Made statistics; the two queries share their input."""
    owners = {n: "layer.0.query" if n == "layer.1.query" else n for n in names}
    outputs = {"layer.0.query": 9, "layer.1.query": 9, "layer.10.up": 8, "layer.2.key": 4}
    return Statistics(
        kind=kind,
        input_grams={
            o: gram(SIZES[o], seed + i) for i, o in enumerate(sorted(set(owners.values())))
        },
        owners=owners,
        output_grams={n: gram(outputs[n], seed + 50) for n in names} if kind == "kfac" else {},
        examples=4,
    )


def dense(folder: Path, name: str) -> Tensor:
    b, a = Adapter(folder).factors(name, FLOAT64)
    return b @ a


def damped(one: Statistics, name: str, damping: float = 1e-2) -> Tensor:
    matrix = one.gram(name).dense()
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=FLOAT64)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [adapter(tmp_path / f"t{i}", (PLAIN, OTHER_RANKS, PLAIN)[i], seed=i) for i in range(3)]
    for i, folder in enumerate(made):
        statistics(10 * i).save(folder, dtype=FLOAT64)
    return made


# --- merging --------------------------------------------------------------------------------------


def test_the_unconstrained_merge_is_regmean(folders):
    """(Σ wᵢWᵢGᵢ)(Σ wᵢGᵢ)⁻¹, of adapters of different ranks, from the files beside them."""
    weights = [1.0, 2.0, 1.0]
    merged = merge_adapters(folders, weights=weights)
    assert merged.recipe["geometry"] == "fisher"
    assert "statistics" in merged.recipe["chosen_because"]
    assert merged.recipe["statistics"]["damping"] == 1e-2
    assert merged.status == {"converged": 3}
    loaded = [Statistics.load(folder) for folder in folders]
    for name, (b, a) in merged.modules.items():
        grams = [damped(one, name) for one in loaded]
        left = sum(w * dense(f, name) @ g for w, f, g in zip(weights, folders, grams, strict=True))
        expected = left @ torch.linalg.inv(sum(w * g for w, g in zip(weights, grams, strict=True)))
        gap = float((b @ a - expected).norm() / expected.norm())
        assert gap < 1e-10
        assert b.shape[1] == min(sum(PLAIN[name][2] for _ in range(2)) + OTHER_RANKS[name][2],
                                 *PLAIN[name][:2])  # fmt: skip


@pytest.mark.parametrize("kind", ["input_gram", "kfac"])
@pytest.mark.parametrize("normalisation", ["none", "trace", "task"])
@pytest.mark.parametrize("rank", [None, 2])
def test_no_gauge_changes_a_number(folders, tmp_path, kind, normalisation, rank):
    made = [statistics(10 * i, kind=kind) for i in range(3)]
    options = {"rank": rank, "geometry": "fisher", "statistics": made}
    options["normalisation"] = normalisation
    merged = merge_adapters(folders, gauge_check=True, **options)
    assert merged.gauge_residual is not None
    assert merged.gauge_residual < 1e-8
    generator = torch.Generator().manual_seed(5)
    moved = []
    for i, folder in enumerate(folders):
        copy = Path(shutil.copytree(folder, tmp_path / f"moved{i}"))

        def regauge(tensors: dict[str, Tensor]) -> None:
            for key in [k for k in tensors if "lora_A" in k]:
                other = key.replace("lora_A", "lora_B")
                r = tensors[key].shape[0]
                g = torch.randn(r, r, generator=generator, dtype=FLOAT64) + 2 * torch.eye(r)
                tensors[key] = torch.linalg.inv(g) @ tensors[key]
                tensors[other] = tensors[other] @ g

        moved.append(rewrite(copy, regauge))
    again = merge_adapters(moved, **options)
    for name, (b, a) in merged.modules.items():
        c, d = again.modules[name]
        assert float((b @ a - c @ d).norm()) < 1e-8 * float((b @ a).norm())


def test_shared_inputs_are_solved_as_one_batch_like_each_alone(folders):
    merged = merge_adapters(folders, rank=2)
    for name in PLAIN:
        alone = [
            Statistics(kind="input_gram", input_grams={name: one.gram(name)}, owners={name: name})
            for one in (Statistics.load(folder) for folder in folders)
        ]
        manifold = LoRAQuotient(*PLAIN[name][:2])
        points = [
            manifold.pack(*Adapter(folder).factors(name, FLOAT64))[None] for folder in folders
        ]
        metrics = AdapterMetrics(alone, ["a", "b", "c"])
        single = metrics.mean(
            manifold, points, [1, 1, 1], [name], [[0], [1], [2]],
            adapter_weights=[1, 1, 1], rank=2,
        )  # fmt: skip
        b, a = merged.modules[name]
        expected = manifold.product(single.point)[0]
        assert float((b @ a - expected).norm()) < 1e-10 * float(expected.norm())


def test_modules_come_back_in_the_order_in_which_they_were_given():
    """The first and the last share their inputs and are solved together, those between are not."""
    names = ["first", "other", "third", "last"]
    made = [
        Statistics(
            kind="input_gram",
            input_grams={
                "first": gram(7, i),
                "other": gram(7, 10 + i),
                "third": gram(7, 20 + i),
            },
            owners={"first": "first", "other": "other", "third": "third", "last": "first"},
        )
        for i in (0, 1)
    ]
    manifold = LoRAQuotient(9, 7)
    points = [draw(4, 16, 2, seed=i) for i in (0, 1)]
    for normalisation in ("none", "task"):
        metrics = AdapterMetrics(made, ["a", "b"], normalisation=normalisation)
        options = {"adapter_weights": [1, 2], "rank": 2}
        whole = metrics.mean(manifold, points, [1, 2], names, [[0], [1]], **options)
        assert whole.weights.shape == (2, 4)
        for row, name in enumerate(names):
            some = [x[row : row + 1] for x in points]
            one = metrics.mean(manifold, some, [1, 2], [name], [[0], [1]], **options)
            expected = manifold.product(one.point)[0]
            gap = manifold.product(whole.point)[row] - expected
            assert float(gap.norm()) < 1e-10 * float(expected.norm())
            torch.testing.assert_close(whole.objective[row], one.objective[0])
            torch.testing.assert_close(whole.weights[:, row], one.weights[:, 0])


@pytest.mark.parametrize("missing", ["zero", "present"])
def test_modules_that_some_adapters_lack(tmp_path, missing):
    made = [adapter(tmp_path / "full", MORE, seed=0), adapter(tmp_path / "few", FEWER, seed=1)]
    # The second was calibrated on all modules of the model, or on its own ones only.
    wide = [statistics(0, tuple(MORE)), statistics(9, tuple(MORE))]
    narrow = [wide[0], statistics(9, tuple(FEWER))]
    for given, same in ((wide, False), (narrow, True)):
        merged = merge_adapters(made, geometry="fisher", statistics=given, missing=missing)
        b, a = merged.modules["layer.2.key"]
        own = dense(made[0], "layer.2.key")
        if missing == "present":
            expected = own
        else:
            grams = [damped(given[0], "layer.2.key")]
            grams.append(grams[0] if same else damped(given[1], "layer.2.key"))
            expected = own @ grams[0] @ torch.linalg.inv(sum(grams))
        assert float((b @ a - expected).norm()) < 1e-9 * float(own.norm())


def test_normalisations_are_what_they_say(folders):
    """Grams of another scale count as much with "trace"; so do updates of another with "task"."""
    made = [statistics(10 * i) for i in range(3)]
    loud = Statistics(
        kind="input_gram",
        input_grams={k: Gram(100 * g.matrix) for k, g in made[0].input_grams.items()},
        owners=made[0].owners,
    )
    results = {}
    for normalisation in ("none", "trace", "task"):
        for label, first in (("plain", made[0]), ("loud", loud)):
            merged = merge_adapters(
                folders,
                geometry="fisher",
                statistics=[first, *made[1:]],
                normalisation=normalisation,
                rank=2,
            )
            b, a = merged.modules["layer.10.up"]
            results[normalisation, label] = b @ a
    for normalisation, equal in (("none", False), ("trace", True), ("task", True)):
        x, y = results[normalisation, "plain"], results[normalisation, "loud"]
        assert (float((x - y).norm()) < 1e-9 * float(x.norm())) is equal


def test_the_recipe_predicts_the_errors_of_the_merge(folders):
    made = [statistics(10 * i) for i in range(3)]
    merged = merge_adapters(folders, statistics=made, rank=2, damping=0.0)
    for i, folder in enumerate(folders):
        ratios = []
        for name, (b, a) in merged.modules.items():
            own, g = dense(folder, name), made[i].gram(name).dense()
            gap = b @ a - own
            ratios.append(float((gap @ g * gap).sum() / (own @ g * own).sum()))
        expected = (sum(ratios) / len(ratios)) ** 0.5
        assert merged.recipe["output_errors"][i] == pytest.approx(expected, rel=1e-9)
    assert "output_errors" not in merge_adapters(folders, geometry="lifted").recipe


def test_transforms_and_scales_compose_with_the_metric(folders):
    plain = merge_adapters(folders)
    whitened = merge_adapters(folders, transform="whiten=0.5")
    scaled = merge_adapters(folders, scale="norm")
    for name in PLAIN:
        b, a = plain.modules[name]
        c, d = whitened.modules[name]
        assert float((b @ a - c @ d).norm()) > 1e-3 * float((b @ a).norm())
        e, f = scaled.modules[name]
        norms = [float(dense(folder, name).norm()) ** 2 for folder in folders]
        assert float((e @ f).norm()) == pytest.approx((sum(norms) / 3) ** 0.5)
        factor = float((e @ f).norm() / (b @ a).norm())
        assert float((e @ f - factor * b @ a).norm()) < 1e-9 * float((e @ f).norm())
    median = merge_adapters(folders, p=1, rank=2)
    assert set(median.status) <= {"converged", "max_iterations"}


BAD = {
    "none beside": ({"drop": 1}, FileNotFoundError, "calibrate"),
    "count": ({"statistics": [statistics(0)]}, ValueError, "statistics: expected 3"),
    "kinds": (
        {"statistics": [statistics(0), statistics(1), statistics(2, kind="kfac")]},
        ValueError,
        r"different kinds \(.*t0 input_gram, .*t2 kfac\); calibrate all adapters with one --kind",
    ),
    "size": (
        {
            "statistics": [
                Statistics("input_gram", {n: gram(5, 0) for n in PLAIN}, {n: n for n in PLAIN})
            ]
            * 3
        },
        ValueError,
        "has size 5, the module 7",
    ),
    "lacks": (
        {"statistics": [statistics(0), statistics(1), statistics(2, tuple(FEWER))]},
        ValueError,
        "lack it",
    ),
    "diagonal": (
        {"statistics": [Statistics("diagonal")] * 3},
        ValueError,
        "collect kind='input_gram'",
    ),
    "distance": ({"distance": "exact"}, ValueError, "brings its own distance"),
    "normalisation": ({"normalisation": "x"}, ValueError, "normalisation must be"),
    "damping": ({"damping": -1.0}, ValueError, "damping"),
    "transform": ({"transform": "tiess"}, ValueError, "transform"),
    "scale": ({"scale": "norms"}, ValueError, "scale"),
}


@pytest.mark.parametrize("name", BAD)
def test_misuse_says_what_to_do(folders, name):
    options, kind, message = BAD[name]
    options = dict(options)
    if "drop" in options:
        (folders[options.pop("drop")] / STATISTICS_NAME).unlink()
    with pytest.raises(kind, match=message):
        merge_adapters(folders, geometry="fisher", **options)


def test_auto_takes_statistics_only_where_all_have_them(folders):
    (folders[0] / STATISTICS_NAME).unlink()
    assert merge_adapters(folders).recipe["geometry"] == "lifted"


# --- calibrating ----------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_statistics_are_those_of_the_adapted_model(tmp_path):
    torch.manual_seed(0)
    model = TwoLayers()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folder = adapter(tmp_path / "a", {"first": (6, 5, 2), "second": (4, 6, 1)}, dtype=torch.float32)
    images = [torch.randn(5) for _ in range(20)]
    seen: list[tuple[int, int]] = []
    found = calibrate_adapter(
        folder, model, images, folder, batch_size=8, progress=lambda *x: seen.append(x)
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    x = torch.stack(images)
    hidden = nn.functional.linear(x, model.first.weight + dense(folder, "first").float())
    hidden = (hidden + model.first.bias).tanh()
    for name, value in (("first", x), ("second", hidden)):
        expected = (value.T @ value / 20).double()
        torch.testing.assert_close(found.gram(name).dense(), expected, rtol=1e-5, atol=1e-6)
    stored = Statistics.load(folder)
    torch.testing.assert_close(stored.gram("second").dense(), found.gram("second").dense())
    assert (folder / STATISTICS_NAME).stat().st_mode & 0o600 == 0o600
    some = calibrate_adapter(folder, model, images, limit=7)
    assert some.examples == 7
    both = calibrate_adapter(folder, model, images, kind="kfac")
    last = both.output_gram("second").dense()  # the output itself: unit Gaussian noise
    assert last.shape == (4, 4)
    assert float(torch.linalg.eigvalsh(last).min()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "diagonal"}, "kind must be"),
        ({"likelihood": "x"}, "likelihood must be"),
        ({"limit": 0}, "limit"),
        ({"rank": 0}, "rank"),
        ({"data": []}, "empty"),
        ({"data": ["text"]}, "tokenizer"),
    ],
)
def test_calibration_misuse_says_what_to_do(tmp_path, options, message):
    folder = adapter(tmp_path / "a", {"first": (6, 5, 2)})
    data = options.pop("data", [torch.randn(5)])
    with pytest.raises(ValueError, match=message):
        calibrate_adapter(folder, TwoLayers(), data, **options)


@pytest.fixture
def base(tmp_path, minilm) -> Path:
    """A tiny encoder with the tokenizer of the real one, and two adapters of it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=minilm.tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    folder = tmp_path / "base"
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    minilm.tokenizer.save_pretrained(folder)
    name = "encoder.layer.{}.attention.self.{}"
    shapes = {name.format(i, k): (16, 16, 2) for i in (0, 1) for k in ("query", "value")}
    for i in (0, 1):
        adapter(tmp_path / f"task{i}", shapes, seed=i, dtype=torch.float32, size=0.1)
        lines = [json.dumps({"text": f"text {i} {j}", "label": j}) for j in range(12)]
        (tmp_path / f"texts{i}.jsonl").write_text("\n".join(lines))
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line_calibrates_and_merges(base, tmp_path):
    for i in (0, 1):
        code, out, err = run(
            "calibrate", tmp_path / f"task{i}", "--base-model", base,
            "--data", tmp_path / f"texts{i}.jsonl", "--texts", 10, "--json",
        )  # fmt: skip
        assert code == 0, err
        found = json.loads(out)
        assert found["texts"] == 10
        assert found["modules"] == 4
        assert Path(found["output"]).stat().st_size == found["bytes"]
    loaded = Statistics.load(tmp_path / "task0")
    # Query and value are handed the same tensor: it is stored once.
    assert len(loaded.input_grams) == 2
    folders = [tmp_path / f"task{i}" for i in (0, 1)]
    code, out, err = run(
        "adapters", *folders, "-o", tmp_path / "merged", "--rank", 2, "--json", "--damping", 0.1
    )
    assert code == 0, err
    recipe = json.loads(out)["recipe"]
    assert recipe["geometry"] == "fisher"
    assert recipe["statistics"]["examples"] == [10, 10]
    assert recipe["statistics"]["damping"] == 0.1
    tensors = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    same = merge_adapters(folders, rank=2, damping=0.1).modules
    for name, (b, a) in same.items():
        stem = f"base_model.model.{name}"
        stored = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(stored, (b @ a).float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "--overwrite"),
        ({"--data": "missing.jsonl"}, "does not exist"),
        ({"--rank": "x"}, "--rank"),
        ({"--output": "nowhere/file.safetensors"}, "make it first"),
        ({"--base-model": "nowhere"}, "nowhere"),
    ],
)
def test_command_line_errors_are_one_line(base, tmp_path, change, message):
    folder = tmp_path / "task0"
    if not change:
        save_file({}, folder / STATISTICS_NAME)
    options = {"--base-model": base, "--data": tmp_path / "texts0.jsonl"}
    for key, value in change.items():
        options[key] = value if key == "--rank" else tmp_path / str(value)
    flat = [str(x) for pair in options.items() for x in pair]
    code, _, err = run("calibrate", folder, *flat)
    assert code == 2, err
    assert message in err
    assert err.strip().splitlines()[-1].startswith("error:")
