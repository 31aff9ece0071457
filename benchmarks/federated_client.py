"""A client of the federated benchmark: the last layers of a frozen encoder, its own texts, LoRA.

The layers below are frozen, so that their outputs are computed once for all texts and read from a
file. What a client trains and sends is a real PEFT adapter: the factors, and the head.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manifold_merge import merge_updates

BATCH = 32

app = ClientApp()


class Tail(nn.Module):
    """The last layers of the encoder, the mean over tokens, and a linear head of zeros."""

    def __init__(self, encoder: nn.Module, labels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(encoder.encoder.layer[-layers:])  # type: ignore[union-attr,index,arg-type]
        self.head = nn.Linear(encoder.config.hidden_size, labels)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(b, labels)`` of hidden states ``(b, tokens, width)``."""
        away = (1 - mask.to(hidden.dtype))[:, None, None] * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, away)
        weights = mask.to(hidden.dtype)[..., None]
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits


class Texts:
    """Hidden states below the tail, labels and shares, as ``prepare`` wrote them."""

    def __init__(self, file: Path) -> None:
        stored = load_file(file)
        self.tokens, self.starts = stored["tokens"], stored["starts"]
        self.labels, self.owner = stored["labels"], stored["owner"]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Padded hidden states, mask and labels of some texts."""
        spans = [self.tokens[self.starts[i] : self.starts[i + 1]].float() for i in index.tolist()]
        hidden = nn.utils.rnn.pad_sequence(spans, batch_first=True)
        lengths = torch.tensor([len(x) for x in spans])
        mask = (torch.arange(hidden.shape[1]) < lengths[:, None]).long()
        return hidden, mask, self.labels[index]


@torch.no_grad()
def prepare(
    bench: Any, task: str, split: str, file: Path, layers: int, owner: Tensor | None = None
) -> None:
    """Write the hidden states of a split below the tail."""
    encoder, tokenizer = bench.loader.load_base()
    del encoder.encoder.layer[-layers:]
    texts, labels = bench.loader.load_split(task, split)
    ids = tokenizer(texts, truncation=True, max_length=bench.loader.MAX_LEN)["input_ids"]
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        longest = max(len(ids[i]) for i in chosen)
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in chosen])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in chosen])
        hidden = encoder(input_ids=padded, attention_mask=mask).last_hidden_state
        for i, row in zip(chosen, hidden, strict=True):
            found[i] = row[: len(ids[i])].half()
    starts = torch.tensor([0, *(len(x) for x in found)]).cumsum(0)
    owner = torch.zeros(len(labels), dtype=torch.long) if owner is None else owner
    save_file(
        {"tokens": torch.cat(found), "starts": starts, "labels": labels, "owner": owner}, file
    )


@functools.lru_cache(maxsize=2)
def texts_of(file: str) -> Texts:
    """Read once in a process."""
    return Texts(Path(file))


@functools.lru_cache(maxsize=8)
def model_of(bench: str, labels: int, rank: int, layers: int) -> nn.Module:
    """A PEFT model, made once in a process: every round overwrites what it trains."""
    import harness
    from bench_data import Bench
    from peft import LoraConfig, get_peft_model

    harness.quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tail = Tail(Bench(Path(bench)).base(), labels, layers)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["query", "value"], modules_to_save=["head"]
    )
    model: nn.Module = get_peft_model(tail, config)  # type: ignore[arg-type]
    return model


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What travels: the tensors of the adapter, under PEFT's names."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: x.detach().clone() for key, x in tensors.items()}


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the global tensors into a model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, tensors)


def train_locally(
    tensors: dict[str, Tensor], config: dict[str, Any], client: int
) -> tuple[dict[str, Tensor], int]:
    """Train the global tensors on the texts of one client; tensors and number of its texts."""
    data = texts_of(str(config["texts"]))
    rank = json.loads(str(config["ranks"]))[client]
    model = model_of(str(config["bench"]), int(config["labels"]), rank, int(config["layers"]))
    if rank != int(
        config["rank"]
    ):  # the best approximation of the global update at this client's own rank
        tensors = merge_updates([tensors], rank=rank).tensors
    load_tensors(model, tensors)
    mine = (data.owner == client).nonzero()[:, 0]
    seed = 10_000 * int(config["seed"]) + 100 * int(config["server-round"]) + client
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout: the same in every row and column
    named = [(k, x) for k, x in model.named_parameters() if x.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {"params": [x for k, x in named if "lora_" in k], "lr": float(config["lr"])},
            {"params": [x for k, x in named if "lora_" not in k], "lr": float(config["lr-head"])},
        ]
    )
    model.train()
    for _ in range(int(config["steps"])):
        index = mine[torch.randint(len(mine), (BATCH,), generator=generator)]
        hidden, mask, labels = data.batch(index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(hidden, mask), labels).backward()
        optimizer.step()
    return trained_tensors(model), len(mine)


def rebased(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same model in other factors: B Q and Qᵀ A with a random orthogonal Q."""
    moved = dict(tensors)
    generator = torch.Generator().manual_seed(seed)
    for key in (k for k in tensors if "lora_B" in k):
        other = key.replace("lora_B", "lora_A")
        rank = tensors[key].shape[1]
        q = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
        moved[key], moved[other] = tensors[key] @ q, q.mT @ tensors[other]
    return moved


def behaved(tensors: dict[str, Tensor], behaviour: str, seed: int) -> dict[str, Tensor]:
    """What the odd client makes of its tensors before it sends them."""
    if behaviour == "re-based":
        return rebased(tensors, seed)
    factor = {"honest": 1.0, "flipped": -10.0, "huge": 1e6}[behaviour]
    return {k: x if "lora_A" in k else factor * x for k, x in tensors.items()}


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of one client."""
    torch.set_num_threads(1)
    config = dict(message.content["config"])
    client = int(context.node_config["partition-id"])
    tensors = message.content["arrays"].to_torch_state_dict()
    tensors, count = train_locally(tensors, config, client)
    if client == 0:
        tensors = behaved(tensors, str(config["behaviour"]), int(config["server-round"]))
    content = RecordDict(
        {
            "arrays": ArrayRecord({k: x.contiguous() for k, x in tensors.items()}),
            "metrics": MetricRecord({"num-examples": count}),
        }
    )
    return Message(content, reply_to=message)


@torch.no_grad()
def correct(tensors: dict[str, Tensor], model: nn.Module, file: str) -> Tensor:
    """Which texts of a file the global model gets right, ``(texts,)``."""
    data = Texts(Path(file))
    load_tensors(model, tensors)
    model.eval()
    order = (data.starts[1:] - data.starts[:-1]).argsort()
    right = torch.zeros(len(order), dtype=torch.bool)
    for index in order.split(100):
        hidden, mask, wanted = data.batch(index)
        right[index] = model(hidden, mask).argmax(1) == wanted
    return right
