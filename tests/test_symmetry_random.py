"""Random networks: whatever group is derived is proved, and obeys the laws of a group."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_merge import symmetry_of

BATCH, LENGTH, WIDTH = 3, 4, 12
Step = Callable[["RandomNet", Tensor, str], Tensor]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


class RandomNet(nn.Module):
    """A chain of operations that a seed chooses."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.seed = seed
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.weights = nn.ParameterDict()
        self.chosen: list[str] = []
        with torch.no_grad():
            self(torch.randn(BATCH, LENGTH, 5))

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = nn.Parameter(0.5 * torch.randn(*shape))
        return self.weights[name]

    def forward(self, x: Tensor) -> Tensor:
        self.dice = random.Random(self.seed)
        self.chosen = [self.dice.choice(list(STEPS)) for _ in range(self.dice.randint(2, 9))]
        x = self.first(x)
        self.earlier = [x]
        for number, name in enumerate(self.chosen):
            x = STEPS[name](self, x, f"{name}{number}")
            self.earlier.append(x)
        return self.last(torch.tanh(x) if self.dice.random() < 0.3 else x)


@step
def linear(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return F.linear(x, net.weight(f"{name}w", WIDTH, WIDTH), net.weight(f"{name}b", WIDTH))


@step
def relu(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return F.relu(x)


@step
def gelu_of_heads(net: RandomNet, x: Tensor, name: str) -> Tensor:
    heads = x.view(BATCH, LENGTH, net.dice.choice([2, 3, 4]), -1)
    return F.gelu(heads.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


@step
def concatenation(net: RandomNet, x: Tensor, name: str) -> Tensor:
    more = F.linear(x, net.weight(f"{name}w", 4, WIDTH))
    both = torch.cat([x, more] if net.dice.random() < 0.5 else [more, x], -1)
    return F.linear(both, net.weight(f"{name}v", WIDTH, WIDTH + 4))


@step
def split_and_gate(net: RandomNet, x: Tensor, name: str) -> Tensor:
    a, b = F.linear(x, net.weight(f"{name}w", 2 * WIDTH, WIDTH)).split(WIDTH, -1)
    return a * torch.sigmoid(b) if net.dice.random() < 0.5 else a + b


@step
def layer_norm(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, (WIDTH,), net.weight(f"{name}w", WIDTH), net.weight(f"{name}b", WIDTH))


@step
def root_mean_square(net: RandomNet, x: Tensor, name: str) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
    return x * scale * net.weight(f"{name}w", WIDTH)


@step
def residual(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return x + net.dice.choice(net.earlier)


@step
def gated(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return x * F.silu(net.dice.choice(net.earlier))


@step
def scaled(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return x * net.weight(f"{name}w", WIDTH) + net.weight(f"{name}b", 1, 1, WIDTH)


@step
def stacked(net: RandomNet, x: Tensor, name: str) -> Tensor:
    x = torch.einsum("btd,edf->btef", x, net.weight(f"{name}w", 3, WIDTH, 6))
    x = F.relu(x) if net.dice.random() < 0.5 else x
    if net.dice.random() < 0.5:
        return torch.einsum("btef,efd->btd", x, net.weight(f"{name}v", 3, 6, WIDTH))
    return torch.einsum("btef,fd->btd", x, net.weight(f"{name}u", 6, WIDTH))


@step
def attention(net: RandomNet, x: Tensor, name: str) -> Tensor:
    heads = net.dice.choice([2, 3])
    groups = net.dice.choice([1, heads])

    def projected(role: str, count: int) -> Tensor:
        out = F.linear(x, net.weight(f"{name}{role}", count * 4, WIDTH))
        return out.view(BATCH, LENGTH, count, 4).transpose(1, 2)

    q, k, v = projected("q", heads), projected("k", groups), projected("v", groups)
    q = F.normalize(q, dim=-1) if net.dice.random() < 0.3 else q
    v = F.relu(v) if net.dice.random() < 0.3 else v
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(BATCH, LENGTH, -1)
    return F.linear(out, net.weight(f"{name}o", WIDTH, heads * 4))


@step
def neighbours(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return x + x.roll(1, net.dice.choice([1, 2]))


@step
def token_mixing(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return F.linear(x.transpose(1, 2), net.weight(f"{name}w", LENGTH, LENGTH)).transpose(1, 2)


@step
def convolution(net: RandomNet, x: Tensor, name: str) -> Tensor:
    weight, bias = net.weight(f"{name}w", WIDTH, WIDTH, 3), net.weight(f"{name}b", WIDTH)
    return F.conv1d(x.transpose(1, 2), weight, bias, padding=1).transpose(1, 2)


@step
def group_norm(net: RandomNet, x: Tensor, name: str) -> Tensor:
    weight, bias = net.weight(f"{name}w", WIDTH), net.weight(f"{name}b", WIDTH)
    return F.group_norm(x.transpose(1, 2), net.dice.choice([2, 3]), weight, bias).transpose(1, 2)


@step
def gram(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return x @ (x.transpose(1, 2) @ x) / WIDTH


@step
def softmax(net: RandomNet, x: Tensor, name: str) -> Tensor:
    return F.softmax(x, net.dice.choice([1, 2]))


@step
def experts(net: RandomNet, x: Tensor, name: str) -> Tensor:
    weights, chosen = F.linear(x, net.weight(f"{name}g", 4, WIDTH)).softmax(-1).topk(2, -1)
    up, down = net.weight(f"{name}u", 4, 5, WIDTH), net.weight(f"{name}d", 4, WIDTH, 5)
    hidden = F.relu(torch.einsum("btkfd,btd->btkf", up[chosen], x))
    return (weights[..., None] * torch.einsum("btkdf,btkf->btkd", down[chosen], hidden)).sum(2)


@step
def flattened(net: RandomNet, x: Tensor, name: str) -> Tensor:
    size = LENGTH * WIDTH
    return F.linear(x.reshape(BATCH, -1), net.weight(f"{name}w", size, size) / 4).view(x.shape)


@step
def tied(net: RandomNet, x: Tensor, name: str) -> Tensor:
    weight = net.weight("tied", WIDTH, WIDTH)
    x = F.linear(x, weight)
    x = F.relu(x) if net.dice.random() < 0.5 else x
    return F.linear(x, weight.t() if net.dice.random() < 0.5 else weight)


@step
def reordered_chunks(net: RandomNet, x: Tensor, name: str) -> Tensor:
    a, b, c = x.chunk(3, -1)
    return torch.cat([b, a + c, a], -1)


@step
def block_diagonal(net: RandomNet, x: Tensor, name: str) -> Tensor:
    heads = x.view(BATCH, LENGTH, 3, 4)
    return torch.einsum("bthd,hde->bthe", heads, net.weight(f"{name}w", 3, 4, 4)).reshape(x.shape)


@step
def norm_of_heads(net: RandomNet, x: Tensor, name: str) -> Tensor:
    heads = x.view(BATCH, LENGTH, 3, 4)
    weight = net.weight(f"{name}w", 4) if net.dice.random() < 0.5 else None
    return F.rms_norm(heads, (4,), weight).flatten(-2)


def check(seed: int) -> int:
    net = RandomNet(seed)
    x = torch.randn(BATCH, LENGTH, 5, generator=torch.Generator().manual_seed(1))
    symmetry = symmetry_of(net, x, unused="freeze")
    g, h = (symmetry.random(torch.Generator().manual_seed(s)) for s in (seed, seed + 1))
    state = {name: torch.randn_like(t).double() for name, t in net.state_dict().items()}
    twice = symmetry.apply(symmetry.apply(state, g), h)
    once = symmetry.apply(state, symmetry.compose(g, h))
    back = symmetry.apply(symmetry.apply(state, g), symmetry.inverse(g))
    for name in state:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(back[name], state[name], rtol=1e-8, atol=1e-8)
    return len(symmetry.members)


def test_random_networks() -> None:
    assert sum(check(seed) for seed in range(30)) > 150


@pytest.mark.slow
def test_many_random_networks() -> None:
    assert sum(check(seed) for seed in range(30, 500)) > 3000
