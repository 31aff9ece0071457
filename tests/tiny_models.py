"""A zoo of tiny networks for the tests of symmetries: plain modules, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from tiny_transformers import bert, gpt2, hf_vit, llama, mixtral, qwen_moe
from torch import Tensor, nn

__all__ = ["bert", "gpt2", "hf_vit", "llama", "mixtral", "qwen_moe"]


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, widths=(6, 10, 8, 4)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Convolutions with BatchNorm, and a Flatten of 4 × 4 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


class Block(nn.Module):
    """A residual block with an optional downsampling shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        x += short
        return F.relu(x)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(Block(6, 6), Block(6, 6))
        self.layer2 = nn.Sequential(Block(6, 8, 2), Block(8, 8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class GroupNormNet(nn.Module):
    """GroupNorm with 3 groups of 4 channels, and convolutions in 3 groups and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.conv2 = nn.Conv1d(12, 10, 3, padding=1)
        self.depthwise = nn.Conv1d(10, 10, 3, padding=1, groups=10)
        self.grouped = nn.Conv1d(10, 4, 1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.gelu(self.grouped(F.silu(self.depthwise(F.gelu(self.conv2(x))))))
        return self.head(x.mean(-1))


class Shared(nn.Module):
    """One layer called twice: its inputs and outputs are one family."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed; biases are their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 9)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


class DenseNet(nn.Module):
    """Features are concatenated and cut again."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 5)
        self.two = nn.Linear(5, 3)
        self.three = nn.Linear(8, 6)
        self.out = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.one(x))
        b = torch.tanh(self.two(a))
        both = torch.cat([a, b], dim=-1)
        c = torch.tanh(self.three(both))
        return self.out(torch.cat([c, both[..., 5:]], dim=-1))


class FixedFilter(nn.Module):
    """An operation along the features that no permutation respects, between two free layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 7)
        self.two = nn.Linear(7, 6)
        self.three = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(torch.tanh(self.one(x))).real
        return self.three(torch.tanh(self.two(x)))


class Attention(nn.Module):
    """Multi-head attention; grouped queries, rotary positions and a fused projection on request."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        fused: bool,
        rotary: bool,
        bias: bool,
        causal: bool,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.fused, self.rotary, self.causal = fused, rotary, causal
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.q = nn.Linear(width, heads * self.size, bias=bias)
            self.k = nn.Linear(width, kv_heads * self.size, bias=bias)
            self.v = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.o = nn.Linear(heads * self.size, width, bias=bias)
        self.norm = nn.RMSNorm(self.size) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.fused:
            qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.size)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
            k = self.k(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
            v = self.v(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        if self.kv_heads < self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of pairs (j, j + d / 2)."""
    length, size = x.shape[-2:]
    frequency = 100.0 ** (-torch.arange(size // 2, dtype=x.dtype) / (size // 2))
    angle = torch.arange(length, dtype=x.dtype)[:, None] * torch.cat([frequency, frequency])
    half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
    return x * angle.cos() + half * angle.sin()


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, norm: type[nn.Module], attention: nn.Module, mlp: nn.Module, width: int):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class ViT(nn.Module):
    """A vision transformer: patches, class token, fused projections."""

    def __init__(self, width: int = 12, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.layers = nn.ModuleList(
            Layer(
                nn.LayerNorm,
                Attention(width, heads, heads, fused=True, rotary=False, bias=True, causal=False),
                feed_forward(width, 16),
                width,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class GPT(nn.Module):
    """A GPT-style decoder whose output embedding is tied to the input embedding."""

    def __init__(self, width: int = 12, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.position = nn.Embedding(16, width)
        self.layers = nn.ModuleList(
            Layer(
                nn.LayerNorm,
                Attention(width, heads, heads, fused=False, rotary=False, bias=True, causal=True),
                feed_forward(width, 16),
                width,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Llama(nn.Module):
    """A Llama-style decoder: grouped queries, rotary positions, RMSNorm, gated MLP."""

    def __init__(
        self,
        width: int = 16,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 2,
        mlp: Callable[[int], nn.Module] = lambda width: GatedMLP(width, 14),
        *,
        rotary: bool = True,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            Layer(
                nn.RMSNorm,
                Attention(
                    width,
                    heads,
                    kv_heads,
                    fused=False,
                    rotary=rotary,
                    bias=bias,
                    causal=True,
                    qk_norm=qk_norm,
                ),
                mlp(width),
                width,
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Experts(nn.Module):
    """A mixture of experts in a ModuleList, all of which are computed for every token."""

    def __init__(self, width: int, hidden: int = 5, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(feed_forward(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class RoutedExperts(Experts):
    """Only the two best experts of each token are computed: data decide what runs."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == e)
            if len(row):
                out.index_add_(0, row, weights[row, rank, None] * expert(tokens[row]))
        return out.reshape(x.shape)


class StackedExperts(nn.Module):
    """A mixture of experts in stacked tensors; each token gathers the weights of its experts."""

    def __init__(self, width: int, hidden: int = 5, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(0.3 * torch.randn(experts, hidden, width))
        self.up_bias = nn.Parameter(0.3 * torch.randn(experts, hidden))
        self.down = nn.Parameter(0.3 * torch.randn(experts, width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        up = torch.einsum("btkfd,btd->btkf", self.up[chosen], x) + self.up_bias[chosen]
        down = torch.einsum("btkdf,btkf->btkd", self.down[chosen], F.gelu(up))
        return (weights[..., None] * down).sum(2)


class DenseStackedExperts(StackedExperts):
    """The same, with every expert computed for every token."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        up = torch.einsum("efd,btd->btef", self.up, x) + self.up_bias
        return torch.einsum("edf,btef,bte->btd", self.down, F.gelu(up), weights)


class LoopedExperts(StackedExperts):
    """The same, in a loop that picks the experts one by one."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for e in range(len(self.up)):
            hidden = F.gelu(F.linear(x, self.up[e], self.up_bias[e]))
            out = out + weights[..., e, None] * F.linear(hidden, self.down[e])
        return out


class Recurrent(nn.Module):
    """Two LSTM layers: four gates share the units of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, num_layers=2, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Interleaved(nn.Module):
    """Rotary positions on neighbouring pairs (2 j, 2 j + 1), a multi-query head."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 3 * 4)
        self.k = nn.Linear(6, 4)
        self.v = nn.Linear(6, 4)
        self.o = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (3, 4)).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.2]).to(x)
        cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)

        def turn(y: Tensor) -> Tensor:
            other = torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(-2)
            return y * cos + other * sin

        weights = (turn(q) @ turn(k).transpose(-1, -2)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(-2))


def vectors(width: int, *lead: int) -> Tensor:
    return torch.randn(*(lead or (7,)), width, generator=torch.Generator().manual_seed(1))


def tokens(vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, (3, 9), generator=torch.Generator().manual_seed(1))


def images(size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))
