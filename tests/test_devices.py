"""Everything that takes a device computes there, and finds what the CPU finds.

On a machine with an accelerator the cases run on it. Without one they run on a simulated device,
which does the arithmetic on the CPU and refuses what an accelerator refuses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from frechet_cases import CASES, SEARCHED, Case, cloud
from safetensors.torch import load_file, save_file
from simulated_device import Simulated, SimulatedDevice, SimulatedGenerator, open_scripts
from small_adapters import MORE, OTHER_RANKS, adapter
from torch import Tensor, nn

from manifold_merge import (
    FisherEuclidean,
    FrechetAveragedModel,
    FrechetMean,
    KroneckerFisher,
    LoRAQuotient,
    NetworkSymmetry,
    PermutationQuotient,
    align,
    frechet_mean,
    lifted_mean,
    merge_adapters,
    merge_models,
    merge_networks,
    symmetry_of,
)
from manifold_merge.rank_choice import truncation_losses
from manifold_merge.statistics_file import Statistics

CUDA = torch.cuda.is_available()


@pytest.fixture(params=["simulated cuda", "cuda"])
def device(request, monkeypatch) -> Iterator[str]:
    """The name of a device, while it exists."""
    yield from existing(request.param, monkeypatch)


@pytest.fixture(params=["simulated cuda", "cuda", "simulated mps", "mps"])
def any_device(request, monkeypatch) -> Iterator[str]:
    """The same, also without float64."""
    yield from existing(request.param, monkeypatch)


def existing(which: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    *how, name = which.split()
    real = getattr(torch, "backends" if name == "mps" else name)
    real = (real.mps if name == "mps" else real).is_available()
    if bool(how) == real:
        pytest.skip(f"there is a real {name} device" if real else f"no {name} device")
    if real:
        yield name
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")
    monkeypatch.setattr(torch, "Generator", SimulatedGenerator)
    open_scripts(monkeypatch)
    with SimulatedDevice():
        yield name


def moved(value: Any, device: str) -> Any:
    return [x.to(device) for x in value] if isinstance(value, list) else value.to(device)


def same(on_device: Tensor, on_cpu: Tensor, rtol: float = 1e-9) -> bool:
    assert on_device.device.type == "cuda"
    scale = float(on_cpu.abs().amax().clamp(min=1e-300))
    return float((on_device.cpu() - on_cpu).abs().amax()) <= rtol * scale


# --- the simulation itself -----------------------------------------------------------------------

MISTAKES = {
    "constant": lambda x: x + torch.ones(3),
    "product": lambda x: x @ torch.eye(3),
    "list": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "numpy": lambda x: x.numpy(),
    "generator": lambda x: torch.randn(3, device=x.device, generator=torch.Generator("cpu")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_device_refuses_mistakes(name, device):
    x = torch.eye(3).to(device)
    assert (2 * x @ x)[0].device.type == "cuda"
    assert torch.linalg.eigh(x).eigenvalues.device.type == "cuda"
    assert torch.zeros(2, device=x.device).device.type == "cuda"
    assert x.cpu().device.type == "cpu"
    with pytest.raises((RuntimeError, TypeError)):
        MISTAKES[name](x)


# --- means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "p"),
    [(name, 2) for name in CASES if name not in SEARCHED or name == "Stiefel"]
    + [(name, 1) for name in ("Euclidean", "SPD", "LoRA(embedded, chordal)")],
)
def test_means(name: str, p: int, device: str):
    case: Case = dataclasses.replace(CASES[name], radius=0.05)
    points = cloud(case, 3, seed=1)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expected = frechet_mean(case.manifold, points, weights, p=p)
    manifold = copy.deepcopy(case.manifold).to(device)
    found = frechet_mean(manifold, moved(list(points), device), weights.to(device), p=p)
    assert same(found.point, expected.point)
    assert same(found.objective, expected.objective)
    # Weights are few and often typed by hand: they may stay on the CPU.
    assert same(frechet_mean(manifold, moved(points, device), [2, 3, 5], p=p).point, expected.point)


@pytest.mark.parametrize("solver", ["trust_region", "conjugate_gradient", "karcher"])
def test_solvers(solver: str, device: str):
    case = CASES["Sphere"]
    points = cloud(case, 4, seed=0)
    expected = frechet_mean(case.manifold, points, solver=solver).point
    manifold = copy.deepcopy(case.manifold).to(device)
    assert same(frechet_mean(manifold, moved(points, device), solver=solver).point, expected)


def test_metrics_and_lifted_means(device: str):
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    fishers, points = [draw(4, 3).square() + 0.1 for _ in range(3)], [draw(4, 3) for _ in range(3)]
    plain = geoopt.Euclidean(ndim=2)
    expected = frechet_mean(plain, points, metrics=[FisherEuclidean(f) for f in fishers]).point
    metrics = [FisherEuclidean(f.to(device)) for f in fishers]
    assert same(frechet_mean(plain, moved(points, device), metrics=metrics).point, expected)

    sides = [(x @ x.mT + torch.eye(3), y @ y.mT + torch.eye(4))
             for x, y in ((draw(3, 5), draw(4, 5)) for _ in range(3))]  # fmt: skip
    quotient = LoRAQuotient(4, 3, "embedded", "chordal")
    pairs = [draw(7, 2) for _ in range(3)]
    for output in (False, True):
        given = [(g, h if output else None) for g, h in sides]
        expected, found = (
            frechet_mean(
                quotient, moved(pairs, where),
                metrics=[KroneckerFisher(4, 3, input_gram=g.to(where),
                                         output_gram=None if h is None else h.to(where))
                         for g, h in given],
                rank=2,
            ).point
            for where in ("cpu", device)
        )  # fmt: skip
        assert same(quotient.product(found), quotient.product(expected), 1e-7)
        weights = torch.full((3,), 1 / 3, dtype=torch.float64)
        expected, found = (
            truncation_losses(
                quotient._split(moved(pairs[0], where)), moved(weights, where),
                [KroneckerFisher(4, 3, input_gram=g.to(where),
                                 output_gram=None if h is None else h.to(where))
                 for g, h in given],
            )
            for where in ("cpu", device)
        )  # fmt: skip
        assert same(found, expected, 1e-9)
    assert same(
        lifted_mean(quotient, moved(pairs, device)).point, lifted_mean(quotient, pairs).point
    )


@pytest.mark.parametrize("assignment", ["exact", "sinkhorn"])
def test_permutation_quotients(assignment: str, device: str):
    space = PermutationQuotient(geoopt.Euclidean(1), 5, assignment=assignment)
    generator = torch.Generator("cpu").manual_seed(0)
    x, y = torch.randn((2, 5, 3), generator=generator, dtype=torch.float64)
    assert same(space.align(moved(x, device), moved(y, device)), space.align(x, y))
    points = [x, y, x + 0.1 * y]
    expected = frechet_mean(space, points).point
    assert same(frechet_mean(space, moved(points, device)).point, expected)
    assert same(space.dist(moved(x, device), moved(y, device)), space.dist(x, y))


# --- merges --------------------------------------------------------------------------------------

MERGES: dict[str, dict[str, Any]] = {
    "auto": {},
    "mixed": {"geometry": "mixed", "distance": "chordal"},
    "median": {"geometry": "embedded", "distance": "chordal", "p": 1, "rank": 4},
    "polar": {"geometry": "polar"},
    "sum": {"sum": True, "rank": "full", "weights": [1.0, -0.5, 0.2]},
    "ties": {"transform": "ties=0.5", "rank": 2},
    "checked": {"gauge_check": True},
    "chosen rank": {"rank": "auto=0.1"},
}


@pytest.mark.parametrize("name", MERGES)
def test_adapters(name: str, any_device: str, tmp_path: Path):
    shapes = (
        (OTHER_RANKS, OTHER_RANKS, OTHER_RANKS) if name == "polar" else (OTHER_RANKS, MORE, MORE)
    )
    dtype = torch.float32 if any_device == "mps" else torch.float64
    first = adapter(tmp_path / "0", shapes[0], dtype=dtype)
    folders = [
        first,
        *(adapter(tmp_path / str(i), x, seed=i, dtype=dtype) for i, x in enumerate(shapes[1:], 1)),
    ]
    expected = merge_adapters(folders, tmp_path / "cpu", **MERGES[name])
    found = merge_adapters(folders, tmp_path / "device", device=any_device, **MERGES[name])
    assert found.modules.keys() == expected.modules.keys()
    one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("device", "cpu"))
    for key, value in two.items():
        assert one[key].device.type == "cpu"  # files hold plain tensors
        if "lora_A" in key:
            b = key.replace("lora_A", "lora_B")
            difference = (one[b] @ one[key] - two[b] @ value).abs().amax()
            # Medians stop when they have the digits of their type.
            assert float(difference) <= (1e-9 if any_device == "cuda" else 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1},
        {"geometry": "sphere"},
        {"geometry": "sphere", "scope": "model"},
        {"geometry": "fisher"},
    ],
    ids=str,
)
def test_checkpoints(options: dict[str, Any], any_device: str, tmp_path: Path):
    folders, files = [], []
    for i in range(3):
        generator = torch.Generator("cpu").manual_seed(i)
        tensors = {
            "w": torch.randn((6, 5), generator=generator),
            "b": torch.randn(6, generator=generator),
        }
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "model.safetensors")
        files.append(tmp_path / f"{i}.safetensors")
        diagonals = {name: x.square() + 0.1 for name, x in tensors.items()}
        Statistics("diagonal", diagonals=diagonals, examples=1).save(files[-1])
    if options.get("geometry") == "fisher":
        options = {**options, "statistics": files}
    merge_models(folders, tmp_path / "cpu", **options)
    merge_models(folders, tmp_path / "device", device=any_device, **options)
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("device", "cpu"))
    assert all(torch.allclose(one[key], two[key], rtol=1e-6) for key in two)


@pytest.fixture
def networks() -> tuple[list[nn.Module], NetworkSymmetry]:
    """Three networks, and their symmetry, which is found on the CPU."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(3)]
    return nets, symmetry_of(nets[0], torch.randn(5, 3))


def test_networks(networks, device: str):
    nets, symmetry = networks
    states = [{k: v.double() for k, v in net.state_dict().items()} for net in nets]
    expected = merge_networks(states, symmetry).state
    on_device = [{k: v.to(device) for k, v in state.items()} for state in states]
    found = merge_networks(on_device, symmetry).state
    assert all(same(found[key], expected[key]) for key in expected)


class Attention(nn.Module):
    """One layer of attention and ReLU units: heads with bases, units with scales."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.inner(x, x, x, need_weights=False)[0])))


@pytest.fixture
def heads() -> tuple[list[nn.Module], NetworkSymmetry]:
    """Two of them, and their symmetry, which is found on the CPU."""
    torch.manual_seed(0)
    nets = [Attention() for _ in range(2)]
    return nets, symmetry_of(nets[0], torch.randn(2, 5, 4))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["anneal"])
def test_heads_with_bases(method: str, heads, device: str):
    nets, symmetry = heads
    assert {"general_linear", "positive"} <= {gauge.kind for gauge in symmetry.gauges}
    states = [dict(net.state_dict()) for net in nets]
    on_device = [{k: v.to(device) for k, v in state.items()} for state in states]
    options: dict[str, Any] = {"method": method, "steps": 3}
    pairs = [
        (
            merge_networks(s, symmetry, **options).state,
            align(s[1], s[0], symmetry, **options).state,
        )
        for s in (on_device, states)
    ]
    for found, expected in zip(*pairs, strict=True):
        assert all(same(found[key], expected[key], 1e-3) for key in expected)


# --- training ------------------------------------------------------------------------------------


def test_optimiser_and_averaged_model(device: str):
    quotient = LoRAQuotient(5, 4, "mixed", "chordal")
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((5, 2), (2, 4), (3,)) * 3]

    def stepped(where: str) -> list[Tensor]:
        b, a, c, *rest = [x.to(where) for x in drawn]
        groups = [
            {"params": [b, a], "manifold": quotient, "anchors": [rest[0:2], rest[3:5]]},
            {"params": [c], "anchors": [[rest[2]], [rest[5]]]},
        ]
        pull = FrechetMean(groups, lr=0.3)
        for _ in range(2):
            pull.step()
        return [b @ a, c]

    for found, expected in zip(stepped(device), stepped("cpu"), strict=True):
        assert same(found, expected, 1e-5)

    model = {"weight": torch.randn((3, 2), generator=generator)}

    def averaged(where: str) -> Tensor:
        net = nn.Linear(2, 3, bias=False)
        net.weight = nn.Parameter(model["weight"].to(where), requires_grad=False)
        mean = FrechetAveragedModel(net)
        for factor in (1.0, 2.0):
            net.weight = nn.Parameter(model["weight"].to(where) * factor, requires_grad=False)
            mean.update_parameters(net)
        return mean.module.weight.detach()

    if device == "cuda" and CUDA:  # parameters of modules are no simulated tensors
        assert same(averaged(device), averaged("cpu"), 1e-6)


def test_nothing_outlives_the_simulation():
    with SimulatedDevice():
        x = torch.ones(2).to("cuda")
    assert isinstance(x, Simulated)
    with pytest.raises(RuntimeError, match="outlived"):
        x + 1
