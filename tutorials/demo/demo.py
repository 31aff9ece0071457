"""Merge three real LoRA adapters of one encoder and score the merge on the real model.

    python tutorials/demo/demo.py --output demo_output

Each adapter was trained alone, for its own task. One merged adapter has to serve all three tasks.
Averaging the factors B and A depends on how each adapter happens to be factored: B G and G⁻¹ A are
the same adapter for any invertible G, but their average is another. The demo shows that too.
"""

import argparse
import copy
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is installed
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from manifold_merge.merge import merge_adapters
from minilm import Task, accuracy, load_encoder, load_tasks

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def average_factors(adapters: Sequence[Path], output: Path) -> None:
    """Write the adapter whose B and A are the plain means of the adapters' B and A."""
    states = [load_file(adapter / WEIGHTS) for adapter in adapters]
    output.mkdir(parents=True, exist_ok=True)
    mean = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    save_file(mean, output / WEIGHTS)
    shutil.copy(adapters[0] / CONFIG, output)


def change_gauge(adapter: Path, output: Path) -> Path:
    """Write the same adapter with other factors: B G and Gᵀ A, G a random orthogonal matrix."""
    state = load_file(adapter / WEIGHTS)
    for key in [key for key in state if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        gauge = torch.linalg.qr(torch.randn(len(state[key]), len(state[key]))).Q
        state[key] = gauge.T @ state[key].float()
        state[other] = state[other].float() @ gauge
    output.mkdir(parents=True, exist_ok=True)
    save_file(state, output / WEIGHTS)
    shutil.copy(adapter / CONFIG, output)
    return output


def score(
    tasks: Sequence[Task], output: Path, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Make every merge and measure its accuracy on every task, on the real model."""
    encoder, tokenizer = load_encoder()

    def with_adapter(folder: Path, scored: Sequence[Task]) -> list[float]:
        model = PeftModel.from_pretrained(copy.deepcopy(encoder), folder)
        return [accuracy(model, tokenizer, task) for task in scored]

    report("Scoring the base model and each adapter")
    scores = {
        "Base model": [accuracy(encoder, tokenizer, task) for task in tasks],
        "Own adapter": [with_adapter(task.adapter, [task])[0] for task in tasks],
    }
    adapters = [task.adapter for task in tasks]
    regauged = [change_gauge(task.adapter, output / "regauged" / task.name) for task in tasks]

    report("Averaging the factors")
    average_factors(adapters, output / "averaged")
    scores["Averaged factors"] = with_adapter(output / "averaged", tasks)
    average_factors(regauged, output / "averaged_regauged")
    scores["Averaged factors, other gauge"] = with_adapter(output / "averaged_regauged", tasks)

    start = time.perf_counter()
    recipe = merge_adapters(adapters, output / "merged", overwrite=True).recipe
    report(f"Merged the adapters with manifold_merge in {time.perf_counter() - start:.1f} s,")
    report(f"geometry {recipe['geometry']} ({recipe['chosen_because']})")
    scores["manifold_merge"] = with_adapter(output / "merged", tasks)
    merge_adapters(regauged, output / "merged_regauged", overwrite=True)
    scores["manifold_merge, other gauge"] = with_adapter(output / "merged_regauged", tasks)
    return scores


def normalised_mean(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the mean over the tasks of accuracy divided by the own adapter's accuracy."""
    return sum(value / own for value, own in zip(values, reference, strict=True)) / len(values)


def make_table(tasks: Sequence[Task], scores: dict[str, list[float]]) -> Table:
    """Tabulate the accuracies, one row per model."""
    table = Table(
        title="Accuracy on the test texts (%)",
        caption="Relative: accuracy divided by the own adapter's accuracy, mean of the tasks.\n"
        "Other gauge: the same adapters, each with other factors (B G, G⁻¹ A).",
    )
    table.add_column("Model", no_wrap=True)
    for task in tasks:
        table.add_column(task.name.replace("_", " "), justify="right")
    table.add_column("relative", justify="right")
    for name, values in scores.items():
        mean = normalised_mean(values, scores["Own adapter"])
        cells = [f"{100 * value:.1f}" for value in (*values, mean)]
        table.add_row(name, *cells, style="bold" if name == "manifold_merge" else None)
    return table


def save_figure(tasks: Sequence[Task], scores: dict[str, list[float]], path: Path) -> None:
    """Draw the accuracies as bars, grouped by task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's palette, which colour-blind readers can tell apart; hatched: the other gauge.
    styles = {
        "Base model": ("#BBBBBB", ""),
        "Own adapter": ("#56B4E9", ""),
        "Averaged factors": ("#E69F00", ""),
        "Averaged factors, other gauge": ("#E69F00", "///"),
        "manifold_merge": ("#009E73", ""),
        "manifold_merge, other gauge": ("#009E73", "///"),
    }
    width = 0.8 / len(scores)
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for position, (name, values) in enumerate(scores.items()):
        colour, hatch = styles[name]
        mean = 100 * normalised_mean(values, scores["Own adapter"])
        bars = axes.bar(
            [task + (position - (len(scores) - 1) / 2) * width for task in range(len(tasks))],
            [100 * value for value in values],
            width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"{name} ({mean:.1f} %)",
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_xticks(range(len(tasks)), [task.name for task in tasks])
    axes.set_ylabel("Accuracy on the test texts (%)")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("One merged adapter for three tasks, on the real model", loc="left")
    figure.legend(
        title="Model (mean over tasks,\nrelative to own adapter)",
        loc="outside right upper",
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write")
    output = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # asked by PEFT
    torch.manual_seed(0)

    console = Console()
    tasks = load_tasks()
    console.print("Three tasks, each with its own LoRA adapter of all-MiniLM-L6-v2:")
    for task in tasks:
        console.print(f"  {task.name}: {len(task.labels)} labels, {len(task.texts)} test texts")
    scores = score(tasks, output, console.print)
    console.print(make_table(tasks, scores))
    save_figure(tasks, scores, output / "accuracy.png")
    console.print(f"Merged adapter, ready for PeftModel.from_pretrained: {output / 'merged'}")
    console.print(f"Figure: {output / 'accuracy.png'}")


if __name__ == "__main__":
    main()
