"""Score data-free peers, each at a scale tuned on validation labels, on the open benchmark.

    python benchmarks/peers.py --bench BENCH --set r16 --test

BENCH is the folder of the benchmark, with its ``bench.py``. The methods below are written anew from
their papers, PEFT's are called. Each is a direction of the update and a scale; the scale is chosen
among at most five by the mean normalised accuracy on the validation texts, 300 labelled texts a
task, and then scored once on the test texts (``--test``). That choice is the peers' advantage: no
row of this library tunes anything. Rows of rank R are cut by a singular value decomposition; a flat
spectrum has no largest directions, so isotropic methods are cut before they are flattened.

Normalised accuracy is accuracy divided by that of the task's own adapter; its standard error is
that of a paired bootstrap over the texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from bench_data import SETS, Bench
from peft import PeftModel
from score_refined import normalised
from torch import Tensor

from manifold_merge import Adapter

NAMES = {key: name for name, key in SETS.items()}
DENSITY = 0.2  # of TIES' own experiments, and those of KnOTS and Core Space
# Singular values below are rounding; the same bound as in KnOTS' and Core Space's experiments.
LEAST = 1e-5

# For each module the updates of all tasks, B_i (m, r_i) and A_i (r_i, n), scaling folded in.
Layers = dict[str, list[tuple[Tensor, Tensor]]]
Updates = dict[str, Tensor]


# --- the methods: from the adapters' factors to one dense update a module, at scale 1 ------------


def task_arithmetic(layers: Layers, rank: int | None) -> Updates:
    """Sum of the updates (Ilharco et al., arXiv:2212.04089)."""
    return {name: cut(total(pairs), rank) for name, pairs in layers.items()}


def knots_ties(layers: Layers, rank: int | None) -> Updates:
    """TIES on S Vᵀ of [W_1, ..., W_k] = U S Vᵀ (Stoica et al., arXiv:2410.19735).

    Entries are trimmed over all modules together, as TIES does (Yadav et al., arXiv:2306.01708).
    """
    bases, parts = {}, {}
    for name, pairs in layers.items():
        u, s, vh = torch.linalg.svd(torch.cat([b @ a for b, a in pairs], 1), full_matrices=False)
        live = s > LEAST
        bases[name] = u[:, live]
        parts[name] = torch.stack((s[live, None] * vh[live]).chunk(len(pairs), 1))
    flat = ties(torch.cat([part.flatten(1) for part in parts.values()], 1))
    merged = flat.split([part[0].numel() for part in parts.values()])
    return {
        name: cut(bases[name] @ x.reshape(part.shape[1:]), rank)
        for (name, part), x in zip(parts.items(), merged, strict=True)
    }


def core_ties(layers: Layers, rank: int | None) -> Updates:
    """TIES on the cores Uᵀ W_i V, module by module (Panariello et al., arXiv:2509.17786)."""
    updates = {}
    for name, pairs in layers.items():
        u, cores, vh = core_space(pairs)
        core = ties(cores.flatten(1)).reshape(cores.shape[1:])
        updates[name] = cut(u @ core @ vh, rank)
    return updates


def core_iso(layers: Layers, rank: int | None) -> Updates:
    """The summed core matrix with a flat spectrum (arXiv:2509.17786, with Iso-C's spectrum)."""
    updates = {}
    for name, pairs in layers.items():
        u, cores, vh = core_space(pairs)
        updates[name] = u @ flattened(cores.sum(0), rank) @ vh
    return updates


def tsv_m(layers: Layers, rank: int | None) -> Updates:
    """Leading singular frames of all tasks made orthogonal (Gargiulo et al., arXiv:2412.00081)."""
    updates = {}
    for name, pairs in layers.items():
        frames, spectra, coframes = [], [], []
        for b, a in pairs:
            u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
            kept = min(b.shape[1], len(s) // len(pairs))
            frames.append(u[:, :kept])
            spectra.append(s[:kept])
            coframes.append(vh[:kept])
        left, right = orthogonal(torch.cat(frames, 1)), orthogonal(torch.cat(coframes, 0))
        updates[name] = cut(left * torch.cat(spectra) @ right, rank)
    return updates


def iso_c(layers: Layers, rank: int | None) -> Updates:
    """The summed update with a flat spectrum over min(m, n) (Marczak et al., arXiv:2502.04959)."""
    return {name: flattened(total(pairs), rank) for name, pairs in layers.items()}


def total(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ B_i A_i."""
    return torch.stack([b @ a for b, a in pairs]).sum(0)


def cut(update: Tensor, rank: int | None) -> Tensor:
    """The nearest matrix of that rank; the matrix itself if ``None``."""
    if rank is None:
        return update
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def flattened(update: Tensor, rank: int | None) -> Tensor:
    """Singular values replaced by their mean, of all or of the first ``rank``."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


def orthogonal(frame: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    u, _, vh = torch.linalg.svd(frame, full_matrices=False)
    return u @ vh


def core_space(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, K) of [B_1, ...], cores (k, K, K) and Vᵀ (K, n) of the stacked A_i."""
    u = torch.linalg.svd(torch.cat([b for b, _ in pairs], 1), full_matrices=False)[0]
    vh = torch.linalg.svd(torch.cat([a for _, a in pairs], 0), full_matrices=False)[2]
    return u, torch.stack([u.T @ b @ (a @ vh.T) for b, a in pairs]), vh


def ties(vectors: Tensor) -> Tensor:
    """Trim, elect signs by mass, mean of what agrees: ``(entries,)`` from ``(k, entries)``."""
    count = vectors.shape[1]
    least = vectors.abs().kthvalue(count - int(DENSITY * count), dim=1, keepdim=True).values
    trimmed = torch.where(vectors.abs() >= least, vectors, 0.0)
    elected = trimmed.sum(0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    agreeing = torch.where(trimmed.sign() == elected, trimmed, 0.0)
    mean: Tensor = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    return mean


@torch.no_grad()
def peft_merge(bench: Bench, folders: Sequence[Path], kind: str, rank: int) -> Updates:
    """PEFT's ``add_weighted_adapter`` with weights 1/k, whose result is linear in the weights."""
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(bench.base(), str(folders[0]), names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), name)
    density = DENSITY if kind.startswith("ties") else None
    weights = [1 / len(names)] * len(names)
    model.add_weighted_adapter(
        names, weights, "merged", combination_type=kind, svd_rank=rank, density=density
    )
    with tempfile.TemporaryDirectory() as output:
        model.save_pretrained(output, selected_adapters=["merged"])
        merged = Adapter(Path(output) / "merged")
        return {name: merged.delta_weight(name).double() for name in merged.modules}


# --- what is scored ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peer:
    """A method at one output rank.

    Attributes:
        name: What tables call it.
        merge: From factors and rank to updates, or the name of PEFT's combination.
        rank: Output rank; ``None`` for the rank that the method has.
        scales: The grid. The first is the method's own.
    """

    name: str
    merge: Callable[[Layers, int | None], Updates] | str
    rank: int | None
    scales: tuple[float, ...]


TIES_SCALES = (1.0, 0.5, 0.75, 1.5, 2.0)
SUM_SCALES = (1.0, 0.3, 0.4, 0.5, 0.7)


def peers(rank: int) -> list[Peer]:
    """All rows; k updates of full rank span Σ rᵢ, only Iso-C fills min(m, n)."""
    return [
        Peer("task arithmetic", task_arithmetic, None, (0.3, 0.2, 0.4, 0.5, 0.7)),
        Peer("KnOTS-TIES", knots_ties, None, TIES_SCALES),
        Peer("Core Space + TIES", core_ties, None, TIES_SCALES),
        Peer("Core Space + Iso", core_iso, None, TIES_SCALES),
        Peer("TSV-M", tsv_m, None, SUM_SCALES),
        Peer("Iso-C", iso_c, None, (1.0, 2.0, 4.0, 5.5, 8.0)),
        Peer("PEFT `svd` (task arithmetic)", "svd", rank, (1.0, 1.5, 2.0, 2.5, 3.0)),
        Peer("PEFT `ties_svd`", "ties_svd", rank, (1.0, 2.0, 3.0, 4.0, 5.0)),
        Peer("KnOTS-TIES", knots_ties, rank, TIES_SCALES),
        Peer("Core Space + TIES", core_ties, rank, TIES_SCALES),
        Peer("Core Space + Iso, Iso-C", core_iso, rank, TIES_SCALES),
        Peer("TSV-M", tsv_m, rank, SUM_SCALES),
    ]


class Scorer:
    """The base model, whose weights are set to base + scale x update."""

    def __init__(self, bench: Bench, which: str, limit: int | None) -> None:
        self.bench, self.which, self.limit = bench, NAMES[which], limit
        self.folders = bench.adapters(self.which)
        self.model = bench.base().eval()
        opened = [Adapter(folder) for folder in self.folders]
        self.layers: Layers = {
            name: [tuple(x.double() for x in a.factors(name)) for a in opened]  # type: ignore[misc]
            for name in opened[0].modules
        }
        modules = dict(self.model.named_modules())
        self.weights = {name: modules[name].weight for name in self.layers}
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.own: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def put(self, updates: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Set the weights."""
        for name, weight in self.weights.items():
            weight.copy_(self.base[name] + (scale * updates[name]).float())

    def predict(self, split: str, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Labels that the model predicts, task by task."""
        return {
            task: self.bench.predicted(self.model, task, self.which, split, self.limit)
            for task in tasks
        }

    def individual(self, split: str) -> dict[str, Tensor]:
        """Labels that each task's own adapter predicts."""
        if split not in self.own:
            found = {}
            for i, task in enumerate(self.bench.tasks):
                self.put(
                    {name: b @ a for name, pairs in self.layers.items() for b, a in [pairs[i]]}
                )
                found |= self.predict(split, [task])
            self.own[split] = found
        return self.own[split]

    def score(self, updates: Updates, scale: float, split: str) -> dict[str, Any]:
        """Normalised accuracies of the merged model."""
        own = self.individual(split)
        self.put(updates, scale)
        found = self.predict(split, self.bench.tasks)
        labels = {task: self.bench.labels(task, split, self.limit) for task in found}
        rows, mean, error = normalised({t: (found[t], own[t], labels[t]) for t in found})
        return {"tasks": rows, "mean": mean, "standard_error": error}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Tune and score every peer."""
    torch.set_num_threads(options.threads)
    bench = Bench(options.bench, options.part, NAMES[options.set])
    scorer = Scorer(bench, options.set, options.limit)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "set": options.set,
        "split": "test" if options.test else "val",
        "texts": {
            split: {task: len(bench.labels(task, split, options.limit)) for task in bench.tasks}
            for split in ("val", "test")
        },
        "probe": {task: bench.probe(task) for task in bench.tasks},
        "rows": [],
    }
    for peer in peers(options.rank):
        clock = time.perf_counter()
        if isinstance(peer.merge, str):
            assert peer.rank is not None
            updates = peft_merge(bench, scorer.folders, peer.merge, peer.rank)
        else:
            updates = peer.merge(scorer.layers, peer.rank)
        merging = time.perf_counter() - clock
        tuned = {scale: scorer.score(updates, scale, "val") for scale in peer.scales}
        scale = max(peer.scales, key=lambda x: tuned[x]["mean"])  # the method's own wins ties
        found = scorer.score(updates, scale, "test") if options.test else tuned[scale]
        first = next(iter(updates.values())).shape
        result["rows"].append(
            {
                "method": peer.name,
                "rank": peer.rank or (min(first) if peer.merge is iso_c else "full"),
                "own_scale": peer.scales[0],
                "validation": {str(x): tuned[x]["mean"] for x in sorted(peer.scales)},
                "scale": scale,
                "merge_seconds": merging,
                **found,
            }
        )
        print(f"{peer.name}, rank {peer.rank}: scale {scale}, {found['mean']:.4f}", file=sys.stderr,
              flush=True)  # fmt: skip
    result["individual"] = {
        task: float((found == bench.labels(task, result["split"], options.limit)).double().mean())
        for task, found in scorer.individual(result["split"]).items()
    }
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """What validation texts said of each scale, and the test score of the best, in Markdown."""
    lines = []
    for row in result["rows"]:
        tried = [
            f"**{x}: {100 * mean:.1f}**" if float(x) == row["scale"] else f"{x}: {100 * mean:.1f}"
            for x, mean in row["validation"].items()
        ]
        score = f"{100 * row['mean']:.1f} ± {100 * row['standard_error']:.1f}"
        lines.append([row["method"], str(row["rank"]), f"{row['own_scale']:g}", *tried, score])
    count = len(result["rows"][0]["validation"])
    columns = [f"scale {i + 1}: validation, %" for i in range(count)]
    header = ["method", "rank", "own scale", *columns, f"{result['split']}, %"]
    title = f"**Adapters of {NAMES[result['set']]}**"
    return "\n\n".join([title, harness.table(header, lines), harness.footer(result)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--set", choices=sorted(NAMES), default="r16", help="set of adapters")
    parser.add_argument("--part", choices=["open", "heldout", "all"], default="open")
    parser.add_argument("--rank", type=int, default=16, help="rank of the rows with a bound")
    parser.add_argument("--test", action="store_true", help="score the tuned scales on test texts")
    parser.add_argument("--limit", type=int, help="texts of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    harness.quiet()
    harness.finish(f"peers_{options.set}", run(options), render, options.output)


if __name__ == "__main__":
    main()
