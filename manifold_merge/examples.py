"""Unlabelled examples: token sequences or tensors, their batches, and variations of them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "Example", "Frame", "Sampler", "as_examples", "collate", "read_texts", "vary"]

Example = list[int] | Tensor
"""Token ids, or a tensor that a batch is stacked of (an image, a feature vector)."""

# Batches are cut from windows of this many batches sorted by length: little padding, yet batches
# that differ from epoch to epoch.
WINDOW = 8
# Of a varied text, the share that is spliced with another one, and the greatest share of tokens
# dropped.
SPLICED = 0.5
DROPPED = 0.4


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples side by side.

    Attributes:
        inputs: Token ids ``(batch, seq)`` or stacked tensors ``(batch, ...)``.
        mask: ``(batch, seq)``, True for tokens and False for padding; ``None`` for tensors.
    """

    inputs: Tensor
    mask: Tensor | None


def read_texts(
    file: str | os.PathLike[str], *, key: str = "text", limit: int | None = None
) -> list[str]:
    r"""Read texts from a file, one a line: JSON objects (``.jsonl``), or the text itself.

    Args:
        file: The file. With the ending ``.jsonl`` or ``.json`` each line holds a JSON object or a
            JSON string; with any other, each line that is not blank is a text.
        key: The key of the text in a JSON object; all other keys, labels too, are ignored.
        limit: Read only that many texts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not JSON, lacks the key, or the file holds no text; names the line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "texts.jsonl"
        >>> _ = file.write_text('{"text": "one", "label": 3}\n"two"\n')
        >>> read_texts(file)
        ['one', 'two']
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist; give a .jsonl or a text file")
    texts: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(texts) >= limit:
                break
            if not line.strip():
                continue
            if path.suffix not in (".jsonl", ".json"):
                texts.append(line.rstrip("\n"))
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg}); put one object on each line"
                ) from None
            text = row.get(key) if isinstance(row, dict) else row
            if not isinstance(text, str):
                keys = f"keys {', '.join(map(repr, row))}" if isinstance(row, dict) else repr(row)
                raise ValueError(
                    f"{path}, line {number}: expected a text under the key {key!r}, got {keys}; "
                    "name the key of the text"
                )
            if not text.strip():
                raise ValueError(
                    f"{path}, line {number}: the text under the key {key!r} is empty; leave the "
                    "line out"
                )
            texts.append(text)
    if not texts:
        raise ValueError(f"data file {path} holds no text; give at least one line")
    return texts


def as_examples(
    data: Sequence[Any], tokenizer: Any = None, *, max_tokens: int = 512, name: str = "data"
) -> list[Example]:
    """Turn texts, lists of token ids or tensors into examples.

    Args:
        data: Texts (which need the tokenizer), sequences of token ids, or tensors; a
            one-dimensional tensor of integers counts as token ids.
        tokenizer: Called with a list of texts, as those of transformers are.
        max_tokens: Longer sequences are cut.
        name: What to call ``data`` in errors.

    Raises:
        ValueError: There are no examples, kinds are mixed, shapes differ, or texts come without a
            tokenizer.
    """
    items = list(data)
    if not items:
        raise ValueError(f"{name} is empty; give at least one example")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise ValueError(f"{name} holds texts; pass tokenizer=, or give token ids")
        items = tokenizer(items, truncation=True, max_length=max_tokens)["input_ids"]
    examples: list[Example] = []
    for position, item in enumerate(items):
        if isinstance(item, Tensor) and (item.is_floating_point() or item.ndim != 1):
            examples.append(item)
            continue
        ids = item.tolist() if isinstance(item, Tensor) else item
        if isinstance(ids, str) or not all(isinstance(token, int) for token in ids):
            raise ValueError(
                f"{name}[{position}] is a {type(item).__name__}; give texts, lists of token ids, "
                "or tensors, all of one kind"
            )
        if not ids:
            raise ValueError(f"{name}[{position}] has no tokens; leave it out")
        examples.append(list(ids[:max_tokens]))
    shapes = {tuple(x.shape) if isinstance(x, Tensor) else None for x in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"{name} mixes examples of shapes {sorted(map(str, shapes))}; give token ids, or "
            "tensors of one shape"
        )
    return examples


def collate(examples: Sequence[Example], device: torch.device, pad: int = 0) -> Batch:
    """Put examples side by side; token ids are padded on the right."""
    if isinstance(examples[0], Tensor):
        return Batch(torch.stack([x for x in examples if isinstance(x, Tensor)]).to(device), None)
    width = max(len(x) for x in examples)
    ids = torch.full((len(examples), width), pad, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, x in enumerate(examples):
        ids[row, : len(x)] = torch.tensor(x)
        mask[row, : len(x)] = True
    return Batch(ids.to(device), mask.to(device))


@dataclasses.dataclass(frozen=True)
class Frame:
    """How many tokens at the start and at the end of each text are the same in all of them.

    Special tokens and prompt templates are of that kind. They are never varied.
    """

    start: int
    end: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Frame:
        """Find the frame; a text that is all frame keeps at least none of its tokens varied.

        Example:
            >>> Frame.of([[1, 7, 8, 2], [1, 9, 2], [1, 7, 7, 7, 2]])
            Frame(start=1, end=1)
        """
        texts = [x for x in examples if not isinstance(x, Tensor)]
        if len(texts) < 2:
            return cls(0, 0)
        shortest = min(map(len, texts))

        def common(ends: Sequence[Sequence[int]]) -> int:
            count = 0
            while count < shortest and len({x[count] for x in ends}) == 1:
                count += 1
            return count

        start = common(texts)
        return cls(start, min(common([x[::-1] for x in texts]), shortest - start))

    def split(self, text: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Start, body and end of a text."""
        cut = len(text) - self.end
        return text[: self.start], text[self.start : cut], text[cut:]


def vary(
    examples: Sequence[Example], share: float, frame: Frame, generator: random.Random
) -> list[Example]:
    """Make new token sequences from a batch: splice two of them, and drop tokens at random.

    A merged model must do on *any* input what the anchors do, and anchors can be asked about any
    input, so that more inputs than the given ones are there for free. Splicing takes the first part
    of one body and the last part of another one of the batch. Tensors are returned as they are.

    Args:
        examples: A batch, of like length.
        share: Probability with which a sequence is varied; the others stay as they are.
        frame: Tokens at either end that stay.
        generator: Source of chance.
    """
    bodies = [[] if isinstance(x, Tensor) else frame.split(x)[1] for x in examples]
    longest = max(map(len, bodies))
    varied: list[Example] = []
    for example, body in zip(examples, bodies, strict=True):
        if generator.random() >= share or isinstance(example, Tensor) or not body:
            varied.append(example)
            continue
        made = body
        if generator.random() < SPLICED:
            other = generator.choice(bodies)
            cut, resume = generator.randint(0, len(body)), generator.randint(0, len(other))
            made = (body[:cut] + other[resume:])[:longest]
        drop = DROPPED * generator.random()
        made = [token for token in made if generator.random() >= drop] or body
        start, _, end = frame.split(example)
        varied.append(start + made + end)
    return varied


class Sampler:
    """Batches of one anchor's examples, as a function of the step alone.

    Nothing has to be remembered to go on where a run was stopped.

    Args:
        examples: The examples.
        batch_size: Examples in a batch; all of them where there are fewer.
        share: See :func:`vary`; 0 leaves examples as they are.
        seed: Anything with a text form; different anchors should have different ones.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, share: float, seed: object
    ) -> None:
        self.examples = examples
        self.size = min(batch_size, len(examples))
        self.share = share
        self.seed = seed
        self.frame = Frame.of(examples)
        self._epoch = -1
        self._order: list[list[int]] = []

    def batch(self, step: int) -> list[Example]:
        """The examples of one step."""
        epoch, position = divmod(step, len(self.examples) // self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        chosen = [self.examples[i] for i in self._order[position]]
        if not self.share:
            return chosen
        return vary(chosen, self.share, self.frame, random.Random(f"{self.seed}/{step}"))

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed}/epoch {epoch}")
        order = list(range(len(self.examples)))
        generator.shuffle(order)
        order = order[: len(order) // self.size * self.size]
        width = WINDOW * self.size
        batches: list[list[int]] = []
        for first in range(0, len(order), width):
            window = sorted(order[first : first + width], key=lambda i: len(self.examples[i]))
            batches += [window[i : i + self.size] for i in range(0, len(window), self.size)]
        generator.shuffle(batches)
        return batches
