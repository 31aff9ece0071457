"""Writing adapter folders: what PEFT loads, what is refused, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from safetensors.torch import load_file

from manifold_merge import output_folder
from manifold_merge.adapter_config import AdapterError
from manifold_merge.adapter_writer import check_adapter_output, write_adapter
from manifold_merge.adapters import Adapter

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    model = models.adapt(models.Mlp, target_modules=["up", "mid", "down"])
    return Adapter(models.save(model, tmp_path / "input"))


def content(adapter: Adapter) -> dict[str, Any]:
    return {name: adapter.factors(name) for name in adapter.modules}


def configuration(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


NAMES = ["dense", "layer.1", "layer.11", "layer.111", "block.1", "block.dense", "sub.layer.1"]


@pytest.mark.parametrize("left_out", [None, *NAMES])
def test_names_within_names(left_out: str | None, tmp_path: Path) -> None:
    # Ranks differ between all modules, and one that the inputs adapt is not written.
    model = models.adapt(models.Names, target_modules=["dense", "1", "11", "111"])
    adapter = Adapter(models.save(model, tmp_path / "input"))
    assert sorted(adapter.modules) == sorted(NAMES)
    written = {}
    for rank, name in enumerate(NAMES, 1):
        if name != left_out:
            B, A = adapter.factors(name)
            written[name] = torch.cat([B, B.new_zeros(6, rank)], 1), torch.cat([A, A[:1]])
            if rank > 1:
                B, A = written[name]
                written[name] = B, torch.cat([A, A.new_zeros(rank - 1, 6)])
    output = write_adapter(tmp_path / "out", written, like=[adapter])
    loaded = models.load(models.Names, output)
    layers = models.lora_layers(loaded)
    assert layers.keys() == written.keys()
    for name, layer in layers.items():
        expected = adapter.delta_weight(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)
        assert layer.r["default"] == written[name][1].shape[0]

    # What PEFT makes of it when it saves the loaded model is read back too.
    again = Adapter(models.save(loaded, tmp_path / "again"))
    assert {n: m.rank for n, m in again.modules.items()} == {
        n: m[1].shape[0] for n, m in written.items()
    }


def test_a_name_at_the_top_level_catches_no_other(tmp_path: Path) -> None:
    # The inputs do not show that there is a block.dense too.
    model = models.adapt(models.Names, target_modules="dense|layer.1")
    adapter = Adapter(models.save(model, tmp_path / "input"))
    output = write_adapter(tmp_path / "out", content(adapter), like=[adapter])
    loaded = models.load(models.Names, output)
    assert models.lora_layers(loaded).keys() == {"dense", "layer.1"}
    torch.testing.assert_close(models.output(loaded), models.output(model))


def test_a_name_that_ends_another_known_name_catches_only_itself(tmp_path: Path) -> None:
    model = models.adapt(models.Names, target_modules=["1", "11", "111"])
    adapter = Adapter(models.save(model, tmp_path / "input"))
    written = {name: adapter.factors(name) for name in ("layer.1", "layer.11")}
    output = write_adapter(tmp_path / "out", written, like=[adapter])
    loaded = models.load(models.Names, output)  # which also has sub.layer.1
    assert models.lora_layers(loaded).keys() == written.keys()


def test_dense_does_not_catch_the_pooler(tmp_path: Path) -> None:
    target = r"encoder\..*dense"
    adapter = Adapter(
        models.save(models.adapt(models.bert, target_modules=target), tmp_path / "in")
    )
    output = write_adapter(tmp_path / "out", content(adapter), like=[adapter])
    assert configuration(output)["target_modules"] == sorted(adapter.modules)
    layers = models.lora_layers(models.load(models.bert, output))
    assert "pooler.dense" not in layers
    assert layers.keys() == adapter.modules.keys()


def test_configuration_is_carried_over(tmp_path: Path) -> None:
    model = models.adapt(
        models.bert_classifier,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        use_rslora=True,
        rank_pattern={"query": 2},
        lora_dropout=0.25,
        layers_to_transform=[1],
        revision="v2",
        init_lora_weights="orthogonal",
        r=4,
    )
    model.peft_config["default"].base_model_name_or_path = "some/base"
    with pytest.MonkeyPatch.context() as patch:  # PEFT would ask the network about the base model
        patch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a: None)
        adapter = Adapter(models.save(model, tmp_path / "in"))
    extras = {name: adapter.extra(name) for name in adapter.extras}
    output = write_adapter(
        tmp_path / "out", content(adapter), like=[adapter], extras=extras, model_card="# Card\n"
    )
    config = configuration(output)
    expected = {
        "alpha_pattern": config["rank_pattern"],
        "base_model_name_or_path": "some/base",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_dropout": 0.25,
        "modules_to_save": ["classifier"],
        "revision": "v2",
        "peft_version": adapter.config["peft_version"],
        "task_type": "SEQ_CLS",
        "use_rslora": False,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["lora_alpha"] == config["r"]
    card = (output / "README.md").read_text()
    assert card.endswith("\n# Card\n")
    assert 'base_model: "some/base"' in card
    assert {file.name for file in output.iterdir()} == FILES
    assert {file.stat().st_mode & 0o777 for file in output.iterdir()} == {
        (output / "README.md").stat().st_mode & 0o777
    }


def test_without_its_head_a_classifier_adapter_still_loads(tmp_path: Path) -> None:
    model = models.adapt(models.bert_classifier, target_modules=["query"], task_type="SEQ_CLS")
    adapter = Adapter(models.save(model, tmp_path / "in"))
    output = write_adapter(tmp_path / "out", content(adapter), like=[adapter])
    loaded = models.load(models.bert_classifier, output)
    base = models.make(models.bert_classifier)
    assert torch.equal(loaded.base_model.model.classifier.weight, base.classifier.weight)


def test_lora_bias_of_some_modules_only(tmp_path: Path) -> None:
    model = models.adapt(models.Mlp, target_modules=["up", "mid"], lora_bias=True)
    adapter = Adapter(models.save(model, tmp_path / "in"))
    extras = {"net.up.lora_B.bias": adapter.extra("net.up.lora_B.bias")}
    output = write_adapter(tmp_path / "out", content(adapter), like=[adapter], extras=extras)
    model.base_model.model.net["mid"].lora_B["default"].bias.data.zero_()
    torch.testing.assert_close(models.output(models.load(models.Mlp, output)), models.output(model))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float64), (torch.bfloat16, torch.bfloat16)]
)
def test_types(dtype: torch.dtype | None, expected: torch.dtype, adapter: Adapter) -> None:
    output = write_adapter(
        adapter.path.parent / "out", content(adapter), like=[adapter], dtype=dtype
    )
    stored = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {expected}


def test_views_of_one_batch_are_written(adapter: Adapter) -> None:
    # A batched solver hands out slices and transposes of one tensor.
    stacked = torch.randn(2, 4, 10, dtype=torch.float64)
    up = stacked[0].mT, stacked[1, :, :8]
    mid = stacked[0].mT, stacked[0]
    output = write_adapter(
        adapter.path.parent / "out", iter([("net.up", up), ("net.mid", mid)]), like=[adapter]
    )
    again = Adapter(output)
    assert list(again.modules) == ["net.mid", "net.up"]
    assert torch.equal(again.factors("net.up")[1], up[1])


ONES = torch.ones
# modules, options, what the message names and advises
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "unknown": ({"net.x": (ONES(1), ONES(1))}, {}, ["'net.x'", "none of the input adapters"]),
    "shape": ({"net.up": (ONES(10, 2), ONES(3, 8))}, {}, ["'net.up'", "(10, 2)", "(10, R)"]),
    "transposed": ({"net.up": (ONES(2, 10), ONES(8, 2))}, {}, ["'net.up'", "(R, 8)"]),
    "rank": ({"net.up": (ONES(10, 0), ONES(0, 8))}, {}, ["'net.up'", "rank 0", "zeros"]),
    "nan": (
        {"net.up": (ONES(10, 1), ONES(1, 8) * float("nan"))},
        {},
        ["A of 'net.up'", "NaN", "check the inputs"],
    ),
    "overflow": (
        {"net.up": (ONES(10, 1) * 1e6, ONES(1, 8))},
        {"dtype": torch.float16},
        ["B of 'net.up'", "overflows torch.float16", "bfloat16"],
    ),
    "nothing": ({}, {}, ["modules is empty"]),
    "extra": (
        {"net.up": (ONES(10, 1), ONES(1, 8))},
        {"extras": {"head": ONES(2)}},
        ["'head'", "none of the input adapters"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_results(case: str, adapter: Adapter) -> None:
    modules, options, fragments = REFUSED[case]
    output = adapter.path.parent / "out"
    with pytest.raises(AdapterError) as caught:
        write_adapter(output, modules, like=[adapter], **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert [folder.name for folder in adapter.path.parent.iterdir()] == ["input"]


def test_module_given_twice(adapter: Adapter) -> None:
    pairs = [("net.up", adapter.factors("net.up"))] * 2
    with pytest.raises(AdapterError, match=r"'net\.up' was given twice"):
        write_adapter(adapter.path.parent / "out", pairs, like=[adapter])
    with pytest.raises(ValueError, match="like is empty"):
        write_adapter(adapter.path.parent / "out", pairs, like=[])


def test_bias_without_its_module(tmp_path: Path) -> None:
    model = models.adapt(models.Mlp, target_modules=["up", "mid"], lora_bias=True)
    adapter = Adapter(models.save(model, tmp_path / "in"))
    extras = {"net.up.lora_B.bias": adapter.extra("net.up.lora_B.bias")}
    modules = {"net.mid": adapter.factors("net.mid")}
    with pytest.raises(AdapterError, match=r"'net\.up', which is not among the modules"):
        write_adapter(tmp_path / "out", modules, like=[adapter], extras=extras)
    wrong = {"net.up.lora_B.bias": torch.ones(3)}
    with pytest.raises(AdapterError, match=r"shape \(3,\), expected \(10,\)"):
        write_adapter(tmp_path / "out", content(adapter), like=[adapter], extras=wrong)


def test_half_of_an_attention(tmp_path: Path) -> None:
    model = models.adapt(models.Attention, target_modules=["attention"])
    adapter = Adapter(models.save(model, tmp_path / "in"))
    name = "layer.attention.out_proj"
    with pytest.raises(AdapterError, match=r"output projection.*'layer\.attention'.*zeros"):
        write_adapter(tmp_path / "out", {name: adapter.factors(name)}, like=[adapter])


def test_existing_output(adapter: Adapter) -> None:
    output = adapter.path.parent / "deep" / "out"
    write_adapter(output, content(adapter), like=[adapter], model_card="first")
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        write_adapter(output, content(adapter), like=[adapter])
    assert (output / "README.md").read_text().endswith("first")
    write_adapter(output, content(adapter), like=[adapter], model_card="second", overwrite=True)
    assert (output / "README.md").read_text().endswith("second")
    assert [folder.name for folder in output.parent.iterdir()] == ["out"]


def test_overwriting_without_the_exchange_of_linux(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "_exchange", lambda first, second: False)
    test_existing_output(adapter)


def test_an_empty_folder_is_no_obstacle(adapter: Adapter) -> None:
    output = adapter.path.parent / "out"
    output.mkdir()
    write_adapter(output, content(adapter), like=[adapter])
    assert {file.name for file in output.iterdir()} == FILES


def _file(parent: Path) -> None:
    (parent / "out").write_text("kept")


def _foreign_file(parent: Path) -> None:
    (parent / "out").mkdir()
    (parent / "out" / "thesis.tex").write_text("kept")


def _foreign_folder(parent: Path) -> None:
    (parent / "out" / "README.md").mkdir(parents=True)


def _file_as_parent(parent: Path) -> None:
    (parent / "input" / "adapter_config.json").rename(parent / "out")
    (parent / "out").rename(parent / "kept")
    (parent / "out").symlink_to(parent / "kept" / "below")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_file, "out is a file; choose a folder"),
        (_foreign_file, "other files, such as 'thesis.tex', and is never overwritten"),
        (_foreign_folder, "other files, such as 'README.md', and is never overwritten"),
        (_file_as_parent, "kept is a file"),
    ],
)
def test_what_is_never_overwritten(
    prepare: Any, message: str, overwrite: bool, adapter: Adapter
) -> None:
    modules = content(adapter)
    parent = adapter.path.parent
    prepare(parent)
    before = sorted(parent.rglob("*"))
    with pytest.raises(FileExistsError, match=message):
        write_adapter(parent / "out", modules, like=[adapter], overwrite=overwrite)
    assert sorted(parent.rglob("*")) == before


@pytest.mark.parametrize("source", ["input", "link"])
@pytest.mark.parametrize("name", ["input", "link", "input/../input"])
def test_an_input_is_never_overwritten(name: str, source: str, adapter: Adapter) -> None:
    parent = adapter.path.parent
    (parent / "link").symlink_to(adapter.path)
    with pytest.raises(FileExistsError, match="one of the input adapters; write to another"):
        check_adapter_output(parent / name, like=[Adapter(parent / source)], overwrite=True)


def test_an_error_while_writing_leaves_nothing(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    output = adapter.path.parent / "out"
    write_adapter(output, content(adapter), like=[adapter], model_card="first")
    monkeypatch.setattr("manifold_merge.tensor_file.TensorFileWriter.write", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(output, content(adapter), like=[adapter], overwrite=True)
    assert (output / "README.md").read_text().endswith("first")
    assert sorted(folder.name for folder in output.parent.iterdir()) == ["input", "out"]


KILLED = """
import sys, time
from pathlib import Path
from manifold_merge import adapter_writer
from manifold_merge.adapters import Adapter

place, source, output = sys.argv[1:]

def stop(*arguments, **options):
    print("ready", flush=True)
    time.sleep(60)

if place == "tensors":
    write = adapter_writer.TensorFileWriter.write

    def half(file, name, tensor):
        write(file, name, tensor)
        stop()

    adapter_writer.TensorFileWriter.write = half
elif place == "configuration":
    adapter_writer._make_card = stop
else:
    from manifold_merge import output_folder
    output_folder._put_in_place = stop
adapter = Adapter(source)
modules = {name: adapter.factors(name) for name in adapter.modules}
adapter_writer.write_adapter(output, modules, like=[adapter], overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["tensors", "configuration", "rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_no_half_folder(place: str, existing: bool, adapter: Adapter) -> None:
    parent = adapter.path.parent
    output = parent / "out"
    if existing:
        write_adapter(output, content(adapter), like=[adapter], model_card="first")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, place, adapter.path, output],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(output_folder.__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    if existing:
        assert {file.name for file in output.iterdir()} == FILES
        Adapter(output).validate()
    else:
        assert not output.exists()

    # The remains are hidden, and the next run clears them away.
    remains = [folder for folder in parent.iterdir() if folder.name.startswith(".")]
    assert len(remains) == 1
    assert (remains[0] / "adapter_config.json").exists() == (place == "rename")
    hour_ago = time.time() - 3600
    os.utime(remains[0], (hour_ago, hour_ago))
    write_adapter(output, content(adapter), like=[adapter], overwrite=existing)
    assert sorted(folder.name for folder in parent.iterdir()) == ["input", "out"]
    Adapter(output).validate()


def test_folders_in_use_are_not_cleared_away(tmp_path: Path) -> None:
    # Two runs write into one folder at a time, and both are slow.
    hour_ago = time.time() - 3600
    with output_folder.atomic_folder(tmp_path / "first", replaceable=()) as first:
        os.utime(first, (hour_ago, hour_ago))
        with output_folder.atomic_folder(tmp_path / "second", replaceable=()):
            assert first.exists()
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["first", "second"]


def test_a_folder_just_made_is_not_cleared_away(tmp_path: Path) -> None:
    # Another run has made it and not locked it yet.
    (tmp_path / ".manifold-merge-partial-0").mkdir()
    with output_folder.atomic_folder(tmp_path / "out", replaceable=()):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_appears_during_the_run_is_kept(tmp_path: Path) -> None:
    run = output_folder.atomic_folder(tmp_path / "out", replaceable=(), overwrite=True)
    run.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"'thesis\.tex', and is never overwritten"):
        run.__exit__(None, None, None)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "thesis.tex"]
