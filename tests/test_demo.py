"""The demo's scorer against a plain one, its two counter-examples, and the whole of it in short."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import demo
from minilm import DATA, embed, load_tasks

SHORT = 8  # texts per task in the short run


def products(folder: Path) -> dict[str, torch.Tensor]:
    """Return B A of every module, in float64."""
    state = {key: value.double() for key, value in load_file(folder / demo.WEIGHTS).items()}
    return {
        key: state[key.replace("lora_A", "lora_B")] @ state[key] for key in state if "lora_A" in key
    }


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest relative Frobenius distance of two adapters' products."""
    return max(((first[key] - second[key]).norm() / first[key].norm()).item() for key in first)


def test_embedding_in_batches_equals_one_text_at_a_time(minilm, bundled_texts):
    texts = bundled_texts["icd10_chapter"][0][:9]
    batched = embed(minilm.model, minilm.tokenizer, texts, batch_size=4)
    for row, text in zip(batched, texts, strict=True):
        tokens = minilm.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = minilm.model(**tokens).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("split", "count"), [("test", 200), ("validation", 100)])
def test_bundled_texts_are_labelled(split, count):
    for task in load_tasks(split):
        assert len(task.texts) == len(task.targets) == count
        assert task.weight.shape == (len(task.labels), 384)
        assert task.bias.shape == (len(task.labels),)
        assert 0 <= task.targets.min() <= task.targets.max() < len(task.labels)


def test_splits_share_no_row():
    for path in sorted((DATA / "texts").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts = {
            split: {row["text"] for row in rows if row["split"] == split}
            for split in ("test", "validation")
        }
        assert not texts["test"] & texts["validation"]


def test_unknown_split_names_the_remedy():
    with pytest.raises(ValueError, match="use 'test' or 'validation'"):
        load_tasks("train")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["debian_section", "icd10_chapter", "code_language"])
def test_own_adapter_beats_the_base_model(minilm, bundled_adapters, task):
    assert minilm.accuracy(task, bundled_adapters[task]) > minilm.accuracy(task) + 0.1


def test_change_of_gauge_keeps_the_adapter_and_moves_the_average(bundled_adapters, tmp_path):
    adapters = list(bundled_adapters.values())
    regauged = [demo.change_gauge(folder, tmp_path / folder.name) for folder in adapters]
    for before, after in zip(adapters, regauged, strict=True):
        assert distance(products(before), products(after)) < 1e-5
    demo.average_factors(adapters, tmp_path / "averaged")
    demo.average_factors(regauged, tmp_path / "averaged_regauged")
    moved = distance(products(tmp_path / "averaged"), products(tmp_path / "averaged_regauged"))
    assert moved > 0.5


@pytest.mark.slow
def test_demo_in_short(tmp_path):
    tasks = [
        dataclasses.replace(task, texts=task.texts[:SHORT], targets=task.targets[:SHORT])
        for task in load_tasks()
    ]
    scores = demo.score(tasks, tmp_path, lambda line: None)
    assert all(len(values) == len(tasks) for values in scores.values())
    assert scores["manifold_merge"] == scores["manifold_merge, other gauge"]
    assert distance(products(tmp_path / "merged"), products(tmp_path / "merged_regauged")) < 1e-2
    assert demo.make_table(tasks, scores).row_count == len(scores)
    demo.save_figure(tasks, scores, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
