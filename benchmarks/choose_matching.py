"""Which settings of the matching are the defaults, and why: measured on validation images only.

Networks of other seeds, widths and activations than those that are scored elsewhere are trained on
four fifths of the training images of each data set; means of pairs and triples of them are compared
on the last fifth. Test images play no part::

    python benchmarks/choose_matching.py FOLDER --cache CACHE
"""

from __future__ import annotations

import harness  # isort: skip  (sets the environment before torch is imported)

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from network_data import (
    Data,
    State,
    accuracy,
    average,
    convolutional_networks,
    digits,
    digits_networks,
    load_models,
    mlp,
)
from torch import Tensor, nn
from torch.nn import functional

from manifold_merge import (
    NetworkSymmetry,
    merge_networks,
    reestimate_batch_norm,
    repair,
    symmetry_of,
    unit_responses,
)
from manifold_merge.rescaling import positive_gauges

SCALE = {"balance": True}
# What merge_networks is called with; "layers" and "biases" become a metric, "responses" a scale.
SETTINGS: dict[str, dict[str, Any]] = {
    "order": {"balance": False},
    "order and scale": SCALE,
    "100 temperatures": {**SCALE, "steps": 100},
    "4 starts": {**SCALE, "starts": 4},
    "biases count fourfold": {**SCALE, "biases": 4.0},
    "layers count alike": {**SCALE, "layers": True},
    "scale in matching only": {**SCALE, "unscaled": True},
    "order, responses, 1": {"balance": False, "responses": 1.0},
    "responses, 0.1": {**SCALE, "responses": 0.1},
    "responses, 1": {**SCALE, "responses": 1.0},
    "responses, 10": {**SCALE, "responses": 10.0},
}
RESPONSES = 3000  # images at most


@dataclass
class Family:
    """Networks of one architecture, with the images that they were trained and are compared on.

    Attributes:
        make: A fresh network.
        states: Trained networks.
        data: Images and labels of training and of validation.
        sizes: How many networks a mean is taken of.
    """

    make: Callable[[], nn.Module]
    states: list[State]
    data: Data
    sizes: tuple[int, ...] = (2, 3)

    def groups(self) -> list[tuple[int, ...]]:
        """Which networks are averaged."""
        numbers = range(len(self.states))
        return [g for size in self.sizes for g in itertools.combinations(numbers, size)]


def split(data: Data) -> Data:
    """The first four fifths of the training images, and the last fifth in place of the test."""
    x, y = data[:2]
    cut = len(x) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def families(folder: Path, cache: Path) -> dict[str, Family]:
    """All networks, trained unless the cache holds them."""
    images = split(digits())
    result = {}
    for name, width, activation, count in (
        ("digits, width 256", 256, nn.ReLU, 4),
        ("digits, width 128", 128, nn.ReLU, 4),
        ("digits, width 128, GELU", 128, nn.GELU, 4),
    ):

        def make(width: int = width, activation: type[nn.Module] = activation) -> nn.Module:
            return mlp(width, activation)

        states = digits_networks(
            cache / f"{width}_{activation.__name__}", images, count, first=10, make=make
        )
        result[name] = Family(make, states, images)
    models = load_models(folder)
    images = split(models.mnist())
    states = convolutional_networks(cache / "cnn", models.CNN, images, 3, first=10)
    result["MNIST, BatchNorm"] = Family(models.CNN, states, images)
    return result


def compare(family: Family, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Loss and accuracy of the means on validation images, plain and with data, by setting."""
    x, _, x_val, y_val = family.data
    symmetry = symmetry_of(family.make().eval(), x[:2])
    seen = [_responses(family, state, symmetry) for state in family.states]
    rows: dict[str, Any] = {}
    for name, options in settings.items():
        if options.get("balance") and not positive_gauges(symmetry):
            options = {**options, "balance": False}
        scores = []
        for group in family.groups():
            states = [family.states[i] for i in group]
            given = _options(options, states, [seen[i] for i in group])
            unscaled = given.pop("unscaled", False)
            mean = merge_networks(states, symmetry, **given)
            merged, aligned = mean.state, mean.aligned
            if unscaled:
                pairs = zip(states, mean.permutations, strict=True)
                aligned = tuple(symmetry.permute(state, p) for state, p in pairs)
                merged = average(aligned)
            plain = family.make().eval()
            plain.load_state_dict(merged)
            helped = _with_data(family, merged, aligned)
            scores.append(
                {
                    "networks": list(group),
                    "plain": _score(plain, x_val, y_val),
                    "with data": _score(helped, x_val, y_val),
                }
            )
        rows[name] = {"all": scores, **_summary(scores)}
        print(name, {k: v for k, v in rows[name].items() if k != "all"}, flush=True)
    rows["networks"] = [accuracy(family.make(), s, x_val, y_val) for s in family.states]
    return rows


def _responses(family: Family, state: State, symmetry: NetworkSymmetry) -> dict[str, Tensor]:
    model = family.make()
    model.load_state_dict(state)
    return unit_responses(model, symmetry, family.data[0][:RESPONSES].split(500), samples=8000)


def _options(
    options: Mapping[str, Any],
    states: Sequence[State],
    seen: Sequence[Mapping[str, Tensor]],
) -> dict[str, Any]:
    given = dict(options)
    scale = given.pop("responses", None)
    if scale is not None:
        given |= {"responses": seen, "response_scale": scale}
    biases, layers = given.pop("biases", None), given.pop("layers", False)
    if biases is not None or layers:
        given["fisher"] = {
            name: torch.full_like(t, _weight(name, t, biases or 1.0, layers))
            for name, t in states[0].items()
            if t.is_floating_point()
        }
    return given


def _weight(name: str, tensor: Tensor, biases: float, layers: bool) -> float:
    weight = biases if name.endswith("bias") else 1.0
    # The mean square of a tensor of the first network stands for that of all.
    return weight / float(tensor.square().mean().clamp(min=1e-12)) if layers else weight


def _with_data(family: Family, state: State, aligned: Sequence[State]) -> nn.Module:
    """Statistics re-estimated where there are any, units repaired where there are none."""
    model = family.make().eval()
    model.load_state_dict(state)
    batches = family.data[0].split(500)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        reestimate_batch_norm(model, batches[:4])
        return model
    references = [family.make().eval() for _ in aligned]
    for reference, each in zip(references, aligned, strict=True):
        reference.load_state_dict(each)
    repair(model, references, batches)
    return model


@torch.no_grad()
def _score(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    logits = torch.cat([model(rows) for rows in x.split(500)])
    return {
        "loss": float(functional.cross_entropy(logits, y)),
        "accuracy": float((logits.argmax(1) == y).double().mean()),
    }


def _summary(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        kind: {
            key: statistics.mean(row[kind][key] for row in scores) for key in ("loss", "accuracy")
        }
        for kind in ("plain", "with data")
    }


def render(result: Mapping[str, Any]) -> str:
    """One table: loss and accuracy of each family by setting."""
    found = result["families"]
    rows = []
    for setting in result["settings"]:
        cells = []
        for family in found.values():
            for kind in ("plain", "with data"):
                row = family[setting][kind]
                cells.append(f"{row['loss']:.3f} / {100 * row['accuracy']:.2f}")
        rows.append([setting, *cells])
    header = ["validation loss / accuracy, %"]
    for name in found:
        data = "re-estimated" if "BatchNorm" in name else "repaired"
        header += [name, data]
    return "\n".join([harness.table(header, rows), "", harness.footer(result)])


def main() -> None:
    """Compare the settings, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="trained networks with their models.py")
    parser.add_argument("--cache", type=Path, required=True, help="where networks are kept")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=SETTINGS,
        help="what to run; the rest is kept from the results of an earlier run",
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = harness.load()
    file = arguments.output / "choose_matching.json"
    kept = json.loads(file.read_text("utf-8"))["families"] if file.is_file() else {}
    chosen = {name: SETTINGS[name] for name in arguments.settings}
    found = {}
    for name, family in families(arguments.folder, arguments.cache).items():
        print(name, flush=True)
        found[name] = {**kept.get(name, {}), **compare(family, chosen)}
    result = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": before, "after": harness.load()},
        "settings": [name for name in SETTINGS if all(name in rows for rows in found.values())],
        "families": found,
    }
    harness.finish("choose_matching", result, render, arguments.output)


if __name__ == "__main__":
    main()
