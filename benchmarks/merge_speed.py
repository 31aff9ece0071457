"""Merge random adapters of one large linear layer: ours against PEFT's ``svd``, side by side.

    python benchmarks/merge_speed.py

Eight adapters of rank 16 of one 4096 x 4096 layer. PEFT's ``add_weighted_adapter`` forms the sum of
the updates, 4096 x 4096, and its singular value decomposition; only that call is timed, not
loading. Ours is timed from the same factors in memory, and from folders to a folder. ``QR + SVD``
is the textbook way to decompose a product of thin factors, as a measure of what is possible.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import peft
import torch
from torch import Tensor, nn

from manifold_merge.frechet import frechet_mean
from manifold_merge.lift import lifted_mean
from manifold_merge.lora import LoRAQuotient
from manifold_merge.merge import merge_adapters

PEER = "PEFT svd"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Factors = list[tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)


class Peer:
    """A model with the adapters loaded, as PEFT needs it."""

    def __init__(self, factors: Factors, size: int) -> None:
        rank = factors[0][1].shape[0]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
        torch.manual_seed(0)
        self.names = [f"task{i}" for i in range(len(factors))]
        self.model = peft.get_peft_model(Layer(size), config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        layer = self.model.base_model.model.layer
        for name, (b, a) in zip(self.names, factors, strict=True):
            # PEFT loads adapters in half precision as float32 unless told otherwise.
            layer.lora_B[name].weight.data.copy_(b)
            layer.lora_A[name].weight.data.copy_(a)

    @torch.no_grad()
    def merge(self) -> None:
        """Time this."""
        if "merged" in self.model.peft_config:
            self.model.delete_adapter("merged")
        weights = [1 / len(self.names)] * len(self.names)
        self.model.add_weighted_adapter(self.names, weights, "merged", combination_type="svd")

    @torch.no_grad()
    def update(self) -> Tensor:
        """The merged update, dense."""
        update: Tensor = self.model.base_model.model.layer.get_delta_weight("merged")
        return update

    def save(self, folder: Path) -> list[Path]:
        """Write each adapter as PEFT does."""
        self.model.save_pretrained(str(folder), selected_adapters=self.names)
        return [folder / name for name in self.names]


def random_factors(size: int, rank: int, count: int, dtype: torch.dtype) -> Factors:
    """Factors B ``(size, rank)`` and A ``(rank, size)`` with independent normal entries."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [torch.randn(shape, generator=generator) for shape in ((size, rank), (rank, size))]
        for _ in range(count)
    ]
    return [(b.to(dtype) / size**0.5, a.to(dtype) / size**0.5) for b, a in pairs]


def qr_and_svd(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of the mean product, by Householder QR of the stacked factors."""
    left = torch.cat([b.float() for b, _ in factors], -1) / len(factors)
    right = torch.cat([a.float().mT for _, a in factors], -1)
    (frame_b, upper_b), (frame_a, upper_a) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(upper_b @ upper_a.mT)
    return frame_b @ (u[:, :rank] * s[:rank]), (frame_a @ vh[:rank].mT).mT


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one process."""
    size, rank, count = options.size, options.rank, options.adapters
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "size": size,
        "rank": rank,
        "adapters": count,
        "repeats": options.repeats,
        "runs": [],
    }
    chordal = LoRAQuotient(size, size, metric="embedded", distance="chordal")
    for name, dtype in DTYPES.items():
        factors = random_factors(size, rank, count, dtype)
        peer = Peer(factors, size)
        with tempfile.TemporaryDirectory() as scratch:
            folders = peer.save(Path(scratch) / "adapters")
            if dtype != torch.float32:
                convert(folders, dtype)
            functions = ours(factors, chordal, rank, folders, Path(scratch))
            for threads in options.threads:
                torch.set_num_threads(threads)
                before = harness.load()
                repeats = {PEER: options.repeats} | dict.fromkeys(functions, 7 * options.repeats)
                measured = harness.measure({PEER: peer.merge, **functions}, repeats)
                difference = compare(peer.update(), factors, chordal)
                result["runs"].append(
                    {
                        "dtype": name,
                        "threads": threads,
                        "load_average": [before, harness.load()],
                        "relative_difference": difference,
                        "timings": measured,
                    }
                )
    result["load_average"]["after"] = harness.load()
    return result


def convert(folders: list[Path], dtype: torch.dtype) -> None:
    """Rewrite saved adapters in another type."""
    from safetensors.torch import load_file, save_file

    for folder in folders:
        file = folder / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})


def ours(
    factors: Factors, manifold: LoRAQuotient, rank: int, folders: list[Path], scratch: Path
) -> dict[str, Callable[[], object]]:
    """Our ways to merge, by name; from memory they start at the factors in their stored type."""

    def points() -> list[Tensor]:
        return [manifold.pack(b.float(), a.float()) for b, a in factors]

    def to_folder(**options: Any) -> None:
        merge_adapters(folders, scratch / "merged", overwrite=True, **options)

    chordal = {"geometry": "embedded", "distance": "chordal"}
    return {
        "QR + SVD": lambda: qr_and_svd(factors, rank),
        f"chordal, rank {rank}": lambda: frechet_mean(manifold, points(), rank=rank),
        f"lifted, rank {rank}": lambda: lifted_mean(manifold, points(), rank=rank),
        "lifted, full rank": lambda: lifted_mean(manifold, points()),
        f"chordal, rank {rank}, folders to folder": lambda: to_folder(**chordal),
        f"lifted, rank {rank}, folders to folder": lambda: to_folder(rank=rank),
        "lifted, full rank, folders to folder": lambda: to_folder(),
    }


def compare(expected: Tensor, factors: Factors, manifold: LoRAQuotient) -> float:
    """Relative difference of our chordal mean from PEFT's update."""
    points = [manifold.pack(b.float(), a.float()) for b, a in factors]
    found = manifold.product(frechet_mean(manifold, points).point)
    return float((found - expected).norm() / expected.norm())


def render(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    size = result["size"]
    blocks = [
        f"{result['adapters']} adapters of rank {result['rank']} of one {size} x {size} layer. "
        f"Median of {result['repeats']} repeats of PEFT and {7 * result['repeats']} of the others "
        "(least to greatest), in turn in one process. Ratio: PEFT's median over this one."
    ]
    for entry in result["runs"]:
        peer = entry["timings"][PEER]
        rows = [
            [
                name,
                harness.spread(timing["wall"]),
                ratio(peer, timing, "wall"),
                harness.spread(timing["cpu"]),
                ratio(peer, timing, "cpu"),
            ]
            for name, timing in entry["timings"].items()
        ]
        threads = f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"
        blocks.append(
            f"**{entry['dtype']}, {threads}** (load average {entry['load_average'][0]} to "
            f"{entry['load_average'][1]}; our chordal update differs from PEFT's by "
            f"{entry['relative_difference']:.0e} relative)"
        )
        blocks.append(harness.table(["merge", "wall time", "ratio", "CPU time", "CPU ratio"], rows))
    blocks.append(harness.footer(result))
    return "\n\n".join(blocks)


def ratio(peer: Mapping[str, Any], timing: Mapping[str, Any], clock: str) -> str:
    """How many times faster than PEFT."""
    value = peer[clock]["median"] / timing[clock]["median"]
    return f"{value:.0f} x" if value >= 10 else f"{value:.1f} x"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of PEFT's merge")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    harness.quiet()
    harness.finish("merge_speed", run(options), render, options.output)


if __name__ == "__main__":
    main()
