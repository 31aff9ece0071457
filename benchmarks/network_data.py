"""Trained networks for the matching benchmark: those of a folder, and digits networks."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

State = dict[str, Tensor]
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load_models(folder: Path) -> ModuleType:
    """The folder's own ``models.py``: classes, data and accuracy."""
    if not (folder / "models.py").is_file():
        raise SystemExit(f"{folder} holds no models.py; give the folder of trained networks")
    spec = importlib.util.spec_from_file_location("models", folder / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models"] = module
    spec.loader.exec_module(module)
    return module


def mlp(width: int = 256, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Three hidden layers of one width, 64 inputs and 10 outputs."""
    widths = (64, width, width, width, 10)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def digits() -> Data:
    """Training and test part of scikit-learn's digits, stratified, 30 % test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.data / 16 - 0.5, dtype=torch.float32)
    labels = torch.tensor(data.target)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.3, random_state=0, stratify=data.target
    )
    return x, y, x_test, y_test


def digits_networks(
    cache: Path,
    data: Data,
    count: int = 10,
    *,
    first: int = 0,
    make: Callable[[], nn.Module] = mlp,
) -> list[State]:
    """Digits networks of ``count`` seeds from ``first`` on, trained unless the cache holds them.

    Adam, rate 1e-3, batches of 64, 60 epochs, the order of the data from a generator of that seed.
    """
    seeds = range(first, first + count)
    return [_trained(cache / f"digits_{s}.safetensors", make, data, s, 64, 60) for s in seeds]


def convolutional_networks(
    cache: Path, make: Callable[[], nn.Module], data: Data, count: int, *, first: int
) -> list[State]:
    """Networks for images, trained like those for digits for 12 epochs in batches of 128."""
    seeds = range(first, first + count)
    return [_trained(cache / f"cnn_{s}.safetensors", make, data, s, 128, 12) for s in seeds]


def _trained(
    file: Path, make: Callable[[], nn.Module], data: Data, seed: int, batch: int, epochs: int
) -> State:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        save_file(_train(make, data, seed, batch, epochs), file)
    return load_file(file)


def _train(make: Callable[[], nn.Module], data: Data, seed: int, batch: int, epochs: int) -> State:
    x, y = data[:2]
    torch.manual_seed(seed)
    model = make().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@torch.no_grad()
def accuracy(model: nn.Module, state: State, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    model.load_state_dict(state)
    model.eval()
    found = torch.cat([model(rows).argmax(1) for rows in x.split(500)])
    return float((found == y).double().mean())


def average(states: Sequence[State]) -> State:
    """The plain average, tensor by tensor."""
    return {
        name: torch.stack([s[name].double() for s in states]).mean(0).to(t.dtype)
        for name, t in states[0].items()
    }


@torch.no_grad()
def barrier(a: State, b: State, x: Tensor, y: Tensor, points: int = 25) -> float:
    """Greatest excess of the loss on the segment between two networks over the chord."""
    model, losses = mlp(), []
    shares = torch.linspace(0, 1, points).tolist()
    for share in shares:
        model.load_state_dict({name: torch.lerp(a[name], b[name], share) for name in a})
        losses.append(float(functional.cross_entropy(model(x), y)))
    chord = [(1 - s) * losses[0] + s * losses[-1] for s in shares]
    return max(loss - level for loss, level in zip(losses, chord, strict=True))
