"""The command refine: what it writes and prints, errors before any work, going on after a stop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from test_cli import run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from manifold_merge.adapters import Adapter
from manifold_merge.base_model import load_base_model
from manifold_merge.functional import functional_distances
from manifold_merge.merge import merge_adapters

WORDS = [f"w{i}" for i in range(models.VOCABULARY - 4)]


def gpt2_with_head() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=models.VOCABULARY, n_positions=16, n_embd=12, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def save_base(build: Callable[[], nn.Module], folder: Path) -> Path:
    models.make(build, torch.float32).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    return folder


def save_texts(file: Path, seed: int, count: int = 30) -> Path:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        rows.append(json.dumps({"text": " ".join(WORDS[i] for i in chosen), "label": 1}))
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    """A complete request: base model, adapters, a merge, texts."""
    base = save_base(models.bert, tmp_path / "base")
    adapters = [
        models.save(
            models.adapt(models.bert, seed, torch.float32, target_modules=["query", "dense"]),
            tmp_path / f"a{seed}",
        )
        for seed in (1, 2)
    ]
    merge_adapters(adapters, tmp_path / "merged", rank=3)
    data = [save_texts(tmp_path / f"t{seed}.jsonl", seed) for seed in (1, 2)]
    return {"base": base, "adapters": adapters, "merged": tmp_path / "merged", "data": data,
            "output": tmp_path / "out"}  # fmt: skip


def command(given: dict[str, Any], *more: object, **changes: Any) -> list[object]:
    given = given | changes
    return [
        "refine", given["merged"], "--adapters", *given["adapters"], "--base-model", given["base"],
        "--data", *given["data"], "--output", given["output"], "--steps", 12,
        "--evaluate-every", 5, *more,
    ]  # fmt: skip


def test_it_refines_and_says_so(request_: dict[str, Any]) -> None:
    result = run(*command(request_))
    assert result.exit_code == 0, result.stderr
    assert "Refined merged towards 2 adapters of" in result.stdout
    assert "Squared functional distance" in result.stdout
    assert "Wrote" in result.stdout
    assert Adapter(request_["output"]).modules.keys() == Adapter(request_["merged"]).modules.keys()
    assert sorted(p.name for p in request_["output"].parent.glob("out*")) == ["out"]


@pytest.mark.parametrize(
    ("best", "said"), [(0, "the best was the least-squares start"), (6, "the best was step 6")]
)
def test_best_step_is_named(
    best: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from manifold_merge import cli_refine
    from manifold_merge.cli_session import Session

    monkeypatch.setenv("COLUMNS", "120")
    recipe = {"adapters": ["a"], "merged": "m", "examples": [3], "steps": 12}
    result = {"recipe": recipe, "base_model": "b", "before": [0.1], "after": [0.05], "steps": 12,
              "best_step": best, "seconds": 1.0, "output": "o"}  # fmt: skip
    cli_refine._show(Session(as_json=False, quiet=False), result)
    assert f"12 of 12; {said}" in capsys.readouterr().out


def test_json_is_what_the_library_measures(request_: dict[str, Any]) -> None:
    result = run(*command(request_, "--json", "--held-back", 0, "--features", "mean"))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["command"] == "refine"
    assert document["recipe"]["features"] == {"mean": 1.0}
    assert document["steps"] == 12
    opened = [Adapter(folder) for folder in request_["adapters"]]
    model, tokenizer = load_base_model(request_["base"], opened)
    texts = [[json.loads(line)["text"] for line in file.read_text().splitlines()]
             for file in request_["data"]]  # fmt: skip
    for folder, stated in ((request_["merged"], "before"), (request_["output"], "after")):
        measured = functional_distances(folder, opened, model, texts, tokenizer=tokenizer)
        assert measured.tolist() == pytest.approx(document[stated], rel=1e-4)
    assert sum(document["after"]) < sum(document["before"])


def test_going_on_after_a_stop(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from manifold_merge import refine_run

    expected = run(*command(request_, output=tmp_path / "expected"))
    assert expected.exit_code == 0, expected.stderr
    plain = refine_run.Descent._step

    def stop(self: Any, step: int) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(refine_run.Descent, "_step", stop)
    stopped = run(*command(request_))
    assert stopped.exit_code == 130
    assert "go on with --resume" in stopped.stderr
    assert not request_["output"].exists()
    monkeypatch.setattr(refine_run.Descent, "_step", plain)
    refused = run(*command(request_))
    assert refused.exit_code == 2
    assert re.search(r"checkpoint .*out\.checkpoint\.safetensors exists; pass --resume to go on",
                     " ".join(refused.stderr.split()))  # fmt: skip
    resumed = run(*command(request_, "--resume"))
    assert resumed.exit_code == 0, resumed.stderr
    names = ["adapter_model.safetensors", "adapter_config.json", "README.md"]
    for name in names:
        assert (request_["output"] / name).read_bytes() == (
            tmp_path / "expected" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"merged": "nowhere"}, [], "adapter folder nowhere does not exist"),
        ({"data": ["nowhere.jsonl"]}, [], "data file nowhere.jsonl does not exist"),
        ({"data": ["a", "b", "c"]}, [], "--data: expected one file, or 2"),
        ({}, ["--key", "body"], "expected a text under the key 'body', got keys 'text', 'label'"),
        ({}, ["--weights", "1"], "--weights: expected 2, one for each adapter; got 1"),
        ({}, ["--rank", "0"], "--rank must be at least 1"),
        ({}, ["--learning-rate", "0"], "--learning-rate must be positive"),
        ({}, ["--features", "pooled"], "--features: 'pooled' is unknown"),
        ({}, ["--variation", "2"], "--variation must be between 0 and 1"),
    ],
)
def test_errors_come_before_any_work(
    request_: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    more: list[str],
    message: str,
) -> None:
    import manifold_merge.base_model

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(manifold_merge.base_model, "load_base_model", loaded)
    result = run(*command(request_, *more, **changes))
    assert result.exit_code == 2, result.stderr
    assert message in " ".join(result.stderr.split())
    assert not request_["output"].exists()


def test_an_output_that_exists_is_kept(request_: dict[str, Any]) -> None:
    request_["output"].mkdir()
    (request_["output"] / "precious.txt").write_text("x")
    result = run(*command(request_, "--overwrite"))
    assert result.exit_code == 2
    assert "holds other files" in result.stderr


def test_one_file_may_serve_all(request_: dict[str, Any]) -> None:
    result = run(*command(request_, "--json", "--steps", "1", data=request_["data"][:1]))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recipe"]["examples"] == [30, 30]


@pytest.mark.parametrize(
    ("build", "target", "expected"),
    [
        (models.bert, "query", "BertModel"),
        (models.bert_classifier, "query", "BertForSequenceClassification"),
        (models.gpt2, "c_attn", "GPT2Model"),
        (gpt2_with_head, "c_attn", "GPT2LMHeadModel"),
    ],
)
def test_the_class_of_the_base_model_is_found(
    build: Callable[[], nn.Module], target: str, expected: str, tmp_path: Path
) -> None:
    base = save_base(build, tmp_path / "base")
    folder = models.save(models.adapt(build, target_modules=[target]), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = None  # as adapters with a task type have it
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, tokenizer = load_base_model(base, [Adapter(folder)])
    assert type(model).__name__ == expected
    assert set(Adapter(folder).modules) <= {name for name, _ in model.named_modules()}
    assert tokenizer(["w1 w2"])["input_ids"] == [[1, 5, 6, 2]]
    assert not model.training


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    base = save_base(models.bert, tmp_path / "base")
    folder = models.save(models.adapt(models.gpt2, target_modules=["c_attn"]), tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not have the modules .*BertModel has no 'h\.0"):
        load_base_model(base, [Adapter(folder)])
