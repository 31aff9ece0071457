"""Networks with the symmetry groups they must have, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import tiny_models as zoo
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, its inputs and its group.

    ``sets`` counts top-level sets by size, ``nested`` those inside elements of another set,
    ``gauges`` the gauge groups by kind and dimension.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    sets: dict[int, int]
    nested: dict[int, int] = field(default_factory=dict)
    gauges: dict[tuple[str, int], int] = field(default_factory=dict)


GL, R, RoPE = "general_linear", "positive", "rotation"


def one_layer(mlp: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: zoo.Llama(layers=1, mlp=mlp)


def words() -> Tensor:
    return zoo.tokens(30)


# A Llama-style layer: 2 key-value heads with 2 query heads each, of width 4; a stream of 16 with
# a norm before attention, before the MLP and before the output.
ONE_LAYER: dict[tuple[str, int], int] = {(GL, 4): 2, (RoPE, 4): 2, (R, 16): 3}

PLAIN = [
    Case("mlp_relu", zoo.mlp, lambda: zoo.vectors(6), {10: 1, 8: 1}, {}, {(R, 10): 1, (R, 8): 1}),
    Case("mlp_gelu", lambda: zoo.mlp(nn.GELU), lambda: zoo.vectors(6), {10: 1, 8: 1}),
    Case(
        "mlp_linear",
        lambda: zoo.mlp(nn.Identity),
        lambda: zoo.vectors(6),
        {},
        {},
        {(GL, 10): 1, (GL, 8): 1},
    ),
    Case("cnn", zoo.cnn, zoo.images, {6: 1, 5: 1, 12: 1}, {}, {(R, 6): 1, (R, 5): 1, (R, 12): 1}),
    # Two streams (6 and 8 channels) and the inner channels of two blocks each.
    Case("resnet", zoo.ResNet, zoo.images, {6: 3, 8: 3}, {}, {(R, 6): 3, (R, 8): 3}),
    # Three groups of four; the grouped convolution has two groups, five inputs, two outputs each.
    Case(
        "group_norm",
        zoo.GroupNormNet,
        lambda: zoo.vectors(9, 3, 2),
        {3: 1, 2: 1},
        {4: 3, 5: 2, 2: 2},
        {(R, 4): 3},
    ),
    Case("shared", zoo.Shared, lambda: zoo.vectors(5), {8: 1}),
    Case("tied_autoencoder", zoo.TiedAutoencoder, lambda: zoo.vectors(6), {9: 1}),
    Case("dense_net", zoo.DenseNet, lambda: zoo.vectors(4), {5: 1, 3: 1, 6: 1}),
    Case("recurrent", zoo.Recurrent, lambda: zoo.vectors(5, 3, 6), {7: 2}),
    Case("vit", zoo.ViT, zoo.images, {12: 1, 3: 2, 16: 2}, {}, {(GL, 4): 12, (R, 12): 5}),
    # The last norm feeds the embedding itself, whose columns must not be rescaled.
    Case("gpt", zoo.GPT, zoo.tokens, {12: 1, 3: 2, 16: 2}, {}, {(GL, 4): 12, (R, 12): 4}),
    Case(
        "llama",
        zoo.Llama,
        zoo.tokens,
        {16: 1, 2: 2, 14: 2},
        {2: 4},
        {(GL, 4): 4, (RoPE, 4): 4, (R, 16): 5, (R, 14): 2},
    ),
    Case(
        "no_rotary",
        lambda: zoo.Llama(layers=1, rotary=False, bias=True),
        zoo.tokens,
        {16: 1, 2: 1, 14: 1},
        {2: 2},
        {(GL, 4): 4, (R, 16): 3, (R, 14): 1},
    ),
    # A norm on queries and keys fixes their basis; without rotary positions, the coordinates of
    # all heads may still be reordered together.
    Case(
        "qk_norm",
        lambda: zoo.Llama(layers=1, qk_norm=True),
        zoo.tokens,
        {16: 1, 2: 1, 14: 1},
        {2: 2},
        {(GL, 4): 2, (R, 16): 3, (R, 14): 1},
    ),
    Case(
        "qk_norm_no_rotary",
        lambda: zoo.Llama(layers=1, qk_norm=True, rotary=False),
        zoo.tokens,
        {16: 1, 2: 1, 14: 1, 4: 1},
        {2: 2},
        {(GL, 4): 2, (R, 16): 3, (R, 14): 1},
    ),
    Case(
        "interleaved_rotary",
        zoo.Interleaved,
        lambda: zoo.vectors(6, 3, 5),
        {3: 1},
        {},
        {(GL, 4): 1, (RoPE, 4): 1},
    ),
    Case(
        "torch_encoder",
        lambda: nn.TransformerEncoderLayer(8, 2, 10, batch_first=True),
        lambda: zoo.vectors(8, 2, 5),
        {10: 1, 2: 1},
        {},
        {(GL, 4): 4, (R, 10): 1},
    ),
    *(
        Case(name, one_layer(kind), zoo.tokens, {16: 1, 2: 1, 4: 1}, {2: 2, 5: 4}, ONE_LAYER)
        for name, kind in {
            "experts": zoo.Experts,
            "routed_experts": zoo.RoutedExperts,
            "stacked_experts": zoo.StackedExperts,
            "dense_stacked_experts": zoo.DenseStackedExperts,
            "looped_experts": zoo.LoopedExperts,
        }.items()
    ),
]

TRANSFORMERS = [
    Case("bert", zoo.bert, words, {16: 2, 4: 2, 20: 2}, {}, {(GL, 4): 16, (R, 16): 1}),
    Case("gpt2", zoo.gpt2, words, {16: 1, 4: 2, 64: 2}, {}, {(GL, 4): 16, (R, 16): 4}),
    Case(
        "hf_llama",
        zoo.llama,
        words,
        {16: 1, 2: 2, 20: 2},
        {2: 4},
        {(GL, 4): 4, (RoPE, 4): 4, (R, 16): 5, (R, 20): 2},
    ),
    Case(
        "mixtral",
        zoo.mixtral,
        words,
        {16: 1, 2: 2, 4: 2},
        {2: 4, 20: 8},
        {(GL, 4): 4, (RoPE, 4): 4, (R, 16): 5, (R, 20): 8},
    ),
    Case(
        "qwen_moe",
        zoo.qwen_moe,
        words,
        {16: 1, 2: 2, 4: 2, 12: 2},
        {2: 4, 8: 8},
        {(GL, 4): 4, (RoPE, 4): 4, (R, 16): 5, (R, 8): 8, (R, 12): 2},
    ),
    Case("hf_vit", zoo.hf_vit, zoo.images, {16: 1, 4: 2, 20: 2}, {}, {(GL, 4): 16, (R, 16): 5}),
]


def causal(family: str, **changes: object) -> Callable[[], nn.Module]:
    """A tiny causal language model of transformers, of width 32 with four heads of width 8."""

    def build() -> nn.Module:
        import transformers

        sizes = {
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
            **changes,
        }
        config = getattr(transformers, f"{family}Config")(**sizes)
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return build


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MIXED = {**GROUPED, "num_experts_per_tok": 2}

# Two layers of two key-value heads with two query heads each.
ARCHITECTURES = [
    Case(
        "phi3: fused projections",
        causal("Phi3", num_key_value_heads=2),
        words,
        {32: 1, 2: 2, 24: 2},
        {2: 4},
        {(GL, 8): 4, (RoPE, 8): 4, (R, 32): 5, (R, 24): 2},
    ),
    # The gain of a norm is 1 + w, which no factor respects; scores are capped.
    Case(
        "gemma2: soft caps",
        causal("Gemma2", **GROUPED),
        words,
        {32: 1, 2: 2, 24: 2},
        {2: 4},
        {(GL, 8): 4, (RoPE, 8): 4, (R, 24): 2},
    ),
    Case(
        "qwen3: norms of queries and keys",
        causal("Qwen3", **GROUPED),
        words,
        {32: 1, 2: 2, 24: 2},
        {2: 4},
        {(GL, 8): 4, (R, 32): 5, (R, 24): 2},
    ),
    # The last norm feeds the tied embedding.
    Case(
        "opt: ReLU",
        causal("OPT", ffn_dim=24, word_embed_proj_dim=32),
        words,
        {32: 1, 4: 2, 24: 2},
        {},
        {(GL, 8): 16, (R, 32): 4, (R, 24): 2},
    ),
    # Half of each head turns, in neighbouring pairs; one norm for attention and MLP.
    Case(
        "gptj: partial rotary positions",
        causal("GPTJ", n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4),
        words,
        {32: 1, 4: 2, 128: 2},
        {},
        {(GL, 8): 8, (GL, 4): 8, (RoPE, 4): 8, (R, 32): 3},
    ),
    # A clamp fixes the scale of the neurons; each head has a sink.
    Case(
        "gpt_oss: sinks, experts with biases",
        causal("GptOss", **MIXED, num_local_experts=4),
        words,
        {32: 1, 2: 2, 4: 2},
        {2: 4, 24: 8},
        {(GL, 8): 4, (RoPE, 8): 4, (R, 32): 5},
    ),
    # Queries and keys are normalised over all heads at once.
    Case(
        "olmoe: norm over heads",
        causal("Olmoe", **MIXED, num_experts=4),
        words,
        {32: 1, 2: 2, 4: 2},
        {2: 4, 24: 8},
        {(GL, 8): 4, (R, 32): 5, (R, 24): 8},
    ),
]

CASES = PLAIN + TRANSFORMERS

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# Each forward pass is short, but hundreds are not.
_QUICK = {"mlp_relu", "mlp_linear", "cnn", "group_norm", "shared", "dense_net", "stacked_experts"}
every_case_slowly = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in _QUICK else pytest.mark.slow)
        for case in CASES
    ],
)


def built(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return case.build().eval(), case.inputs()
