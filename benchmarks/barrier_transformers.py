"""Loss between independently trained transformers: as they are, reordered, and in common bases.

Tiny GPT-2 models of several seeds are trained on the benchmark's texts, letter by letter, and kept
in CACHE. For pairs of them the loss on held-out texts is followed along the straight line between
the two: as trained, modulo permutations (residual stream, heads, neurons), and modulo permutations
and changes of basis inside the heads::

    python benchmarks/barrier_transformers.py --bench FOLDER --cache CACHE
"""

from __future__ import annotations

import harness  # isort: skip  (sets the environment before torch is imported)

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import text_networks
import torch
from bench_data import Bench
from network_data import State
from torch import Tensor, nn

from manifold_merge import NetworkQuotient, NetworkSymmetry, symmetry_of

PAIRS = ((0, 1), (2, 3), (4, 5))
GROUPS: dict[str, dict[str, Any] | None] = {
    "as trained": None,
    "permutations": {},
    "permutations and bases": {"basis": True},
    "permutations and scales": {"balance": True},
    "permutations, bases and scales": {"basis": True, "balance": True},
}
# What theory orders: a larger group of exact symmetries leaves networks no farther apart.
DRAWN = ("as trained", "permutations", "permutations and bases")
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "barrier_transformers.png"


def ends(
    symmetry: NetworkSymmetry, a: State, b: State, options: Mapping[str, Any] | None
) -> tuple[State, State]:
    """Two state dicts of the networks' functions, close modulo the group."""
    if options is None:
        return a, b
    quotient = NetworkQuotient(symmetry, a, **options)
    x = quotient.pack(a)
    y = quotient.align(x, quotient.pack(b))
    return quotient.unpack(x), quotient.unpack(y)


@torch.no_grad()
def loss(network: nn.Module, state: State, rows: Tensor) -> float:
    """Mean loss of the next letter."""
    found = network.load_state_dict(state, strict=False)
    network.tie_weights()  # type: ignore[operator]
    assert set(found.missing_keys) <= {"lm_head.weight"}, found.missing_keys
    parts = rows.split(64)
    losses = [float(text_networks.next_letter_loss(network, part)) * len(part) for part in parts]
    return sum(losses) / len(rows)


def measure(
    states: Sequence[State],
    pairs: Sequence[tuple[int, int]],
    symmetry: NetworkSymmetry,
    network: nn.Module,
    rows: Tensor,
    validation: Tensor,
    points: int,
) -> dict[str, Any]:
    """Curves, barriers, distances and times of each pair, by group."""
    shares = torch.linspace(0, 1, points).tolist()
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in GROUPS}
    for i, j in pairs:
        for name, options in GROUPS.items():
            began = time.perf_counter()
            a, b = ends(symmetry, states[i], states[j], options)
            seconds = time.perf_counter() - began
            curve = [loss(network, {k: torch.lerp(a[k], b[k], s) for k in a}, rows) for s in shares]
            chords = [(1 - s) * curve[0] + s * curve[-1] for s in shares]
            row = {
                "pair": [i, j],
                "seconds": seconds,
                "squared distance": sum(float((a[k] - b[k]).double().square().sum()) for k in a),
                "curve": curve,
                "barrier": max(x - y for x, y in zip(curve, chords, strict=True)),
                "validation": _excess(network, a, b, validation),
            }
            result[name].append(row)
            print(i, j, name, round(row["barrier"], 4), flush=True)
    return {
        name: {
            "all": rows_,
            **{
                key: {
                    "mean": statistics.mean(row[key] for row in rows_),
                    "deviation": statistics.stdev(row[key] for row in rows_),
                }
                for key in ("barrier", "validation", "squared distance", "seconds")
            },
        }
        for name, rows_ in result.items()
    }


def _excess(network: nn.Module, a: State, b: State, rows: Tensor) -> float:
    """Loss at the midpoint above that of the ends."""
    middle = {k: torch.lerp(a[k], b[k], 0.5) for k in a}
    return loss(network, middle, rows) - 0.5 * (loss(network, a, rows) + loss(network, b, rows))


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Loss above the line between its values at the ends, each pair thin, their mean thick."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    colours = ("#8a8a8a", "#1f77b4", "#d1495b")
    for name, colour in zip(DRAWN, colours, strict=True):
        curves = []
        for row in result["groups"][name]["all"]:
            curve = torch.tensor(row["curve"])
            shares = torch.linspace(0, 1, len(curve))
            curves.append(curve - torch.lerp(curve[0], curve[-1], shares))
            axes.plot(shares, curves[-1], color=colour, linewidth=0.7, alpha=0.5)
        barrier = result["groups"][name]["barrier"]["mean"]
        mean = torch.stack(curves).mean(0)
        axes.plot(shares, mean, color=colour, linewidth=2.2, label=f"{name} ({barrier:.2f})")
    axes.set_xlabel("share of the second network")
    axes.set_ylabel("loss above the straight line\nbetween the two ends, nats a letter")
    axes.set_title("Between independently trained transformers, held-out text", fontsize=11)
    axes.legend(frameon=False, title="mean barrier in parentheses", title_fontsize=8, fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def render(result: Mapping[str, Any]) -> str:
    """A table of barriers and distances."""
    rows = []
    for name, found in result["groups"].items():
        barrier, each = found["barrier"], [row["barrier"] for row in found["all"]]
        rows.append(
            [
                name,
                f"{found['squared distance']['mean']:.1f}",
                f"{barrier['mean']:.3f} ± {barrier['deviation']:.2g}",
                " / ".join(f"{x:.3f}" for x in each),
                f"{found['validation']['mean']:.3f}",
                f"{found['seconds']['mean']:.1f}",
            ]
        )
    header = ["modulo", "squared distance", "barrier", "of each pair", "validation", "s a pair"]
    size = result["model"]
    losses = ", ".join(f"{x:.3f}" for x in result["losses"])
    return "\n".join(
        [
            harness.table(header, rows),
            "",
            f"GPT-2, {size['layers']} layers of width {size['width']}, {size['steps']} steps; "
            f"held-out loss of the networks {losses} nats a letter. Barriers on the "
            f"{result['split']} split; in the column of validation the excess at the midpoint on "
            "that split, by which the defaults were chosen.",
            harness.footer(result),
        ]
    )


def main() -> None:
    """Train what is missing, follow the lines, write the JSON file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--cache", type=Path, required=True, help="where networks are kept")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--points", type=int, default=11)
    parser.add_argument("--windows", type=int, default=256, help="of held-out text")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    harness.quiet()
    before = harness.load()
    bench = Bench(arguments.bench)
    size = {"width": arguments.width, "layers": arguments.layers}
    states = text_networks.networks(
        arguments.cache, text_networks.letters(bench, "train"), 6, steps=arguments.steps, **size
    )
    rows = text_networks.windows(text_networks.letters(bench, arguments.split), arguments.windows)
    validation = text_networks.windows(text_networks.letters(bench, "val"), arguments.windows // 2)
    network = text_networks.model(**size)
    symmetry = symmetry_of(network, input_ids=rows[:2, :9], output=_logits)

    result = {
        "command": harness.command(),
        "environment": harness.environment(),
        "model": {**size, "steps": arguments.steps},
        "split": arguments.split,
        "losses": [loss(network, state, rows) for state in states],
        "groups": measure(states, PAIRS, symmetry, network, rows, validation, arguments.points),
        "load_average": {"before": before, "after": harness.load()},
    }
    harness.finish("barrier_transformers", result, render, arguments.output)
    draw(result, arguments.figure)


def _logits(result: Any) -> Tensor:
    logits: Tensor = result.logits
    return logits


if __name__ == "__main__":
    main()
