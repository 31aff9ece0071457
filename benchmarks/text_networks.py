"""Tiny GPT-2 models trained on the benchmark's texts, letter by letter."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from bench_data import Bench
from network_data import State
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 64
# Printable ASCII, the end of a text, and one sign for all other characters.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\0"
HEADS = 4


def model(width: int = 128, layers: int = 2) -> nn.Module:
    """GPT-2 from its configuration, without dropout, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(ALPHABET),
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).eval()


def letters(bench: Bench, split: str) -> Tensor:
    """All texts of one split of all tasks as one sequence of tokens, ``(N,)``."""
    codes = {letter: code for code, letter in enumerate(ALPHABET)}
    texts = [text for task in bench.tasks for text in bench.loader.load_split(task, split)[0]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    joined = "\n".join(texts[i] for i in order)
    return torch.tensor([codes.get(letter, len(ALPHABET) - 1) for letter in joined])


def windows(tokens: Tensor, count: int) -> Tensor:
    """``count`` windows spread evenly over the tokens, ``(count, CONTEXT)``."""
    starts = torch.linspace(0, len(tokens) - CONTEXT, count).long()
    return tokens[starts[:, None] + torch.arange(CONTEXT)]


def next_letter_loss(network: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next letter, in nats."""
    logits = network(input_ids=rows).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def networks(
    cache: Path, tokens: Tensor, count: int, *, width: int = 128, layers: int = 2, steps: int = 1500
) -> list[State]:
    """Networks of seeds 0 to ``count`` - 1, trained unless the cache holds them.

    AdamW, rate 1e-3 with 100 steps of warm-up and a cosine to zero, decay 0.1, batches of 32
    windows drawn from a generator of that seed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    states = []
    for seed in range(count):
        file = cache / f"gpt2_{width}x{layers}_{steps}_{seed}.safetensors"
        if not file.is_file():
            save_file(_train(seed, tokens, width, layers, steps), file)
        states.append(load_file(file))
    return states


def _train(seed: int, tokens: Tensor, width: int, layers: int, steps: int) -> State:
    torch.manual_seed(seed)
    network = model(width, layers).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / 100, 0.5 * (1 + math.cos(math.pi * t / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (32,), generator=generator)
        rows = tokens[starts[:, None] + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        next_letter_loss(network, rows).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    # A tensor that has two names is stored once, under its first.
    seen: set[int] = set()
    state = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().clone()
    return state
