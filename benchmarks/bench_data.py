"""Access to the benchmark folder (adapters, heads, texts), which is no part of this repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

# The sets of adapters, as the benchmark's own loader names them.
SETS = {"rank 16": "r16", "mixed ranks": "mixed"}


class Bench:
    """The folder's own loader, ``bench.py``, so that scores are those of its ``evaluate.py``.

    Args:
        folder: The benchmark folder.
        part: Which tasks: ``"open"``, ``"heldout"`` or ``"all"`` of those present.
        which: One of :data:`SETS`; tasks that have no adapter in it are left out.

    Attributes:
        tasks: The tasks' names.
    """

    def __init__(self, folder: Path, part: str = "open", which: str | None = None) -> None:
        if not (folder / "bench.py").is_file():
            raise SystemExit(f"{folder} holds no bench.py; give the benchmark folder as --bench")
        self.folder = folder
        self.loader = _load(folder / "bench.py")
        entries = self.loader.tasks(part)
        if which is not None and SETS[which] == "mixed":
            entries = {task: entry for task, entry in entries.items() if entry.get("mixed_rank")}
        if not entries:
            raise SystemExit(f"{folder} holds no task of part {part!r}")
        self.tasks: list[str] = list(entries)
        self._tokenizer: object = None

    def adapters(self, which: str) -> list[Path]:
        """The PEFT folder of each task, from one of :data:`SETS`."""
        return [Path(self.loader.adapter_dir(task, SETS[which])) for task in self.tasks]

    def base(self) -> torch.nn.Module:
        """A fresh copy of the base model, from disk."""
        model: torch.nn.Module
        model, self._tokenizer = self.loader.load_base()
        return model

    @torch.no_grad()
    def correct(
        self, model: torch.nn.Module, task: str, which: str, split: str, limit: int | None = None
    ) -> Tensor:
        """Which texts of a task the model with that task's head gets right, ``(texts,)``."""
        right: Tensor = self.predicted(model, task, which, split, limit) == self.labels(
            task, split, limit
        )
        return right

    @torch.no_grad()
    def predicted(
        self, model: torch.nn.Module, task: str, which: str, split: str, limit: int | None = None
    ) -> Tensor:
        """The label that the model with that task's head gives each text, ``(texts,)``."""
        if self._tokenizer is None:
            self.base()
        texts, _ = self.loader.load_split(task, split)
        weight, bias = self.loader.load_head(task, SETS[which])
        hidden = self.loader.embed(model, self._tokenizer, texts[:limit])
        found: Tensor = (hidden @ weight.T + bias).argmax(1)
        return found

    def labels(self, task: str, split: str, limit: int | None = None) -> Tensor:
        """The true label of each text, ``(texts,)``."""
        found: Tensor = self.loader.load_split(task, split)[1][:limit]
        return found

    def probe(self, task: str) -> float:
        """Test accuracy of a linear probe on the frozen base, trained on all labels of the task."""
        return float(self.loader.tasks()[task]["frozen_probe_test"])


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module
