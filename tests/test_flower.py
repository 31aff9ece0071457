"""The strategy for Flower, where that is installed."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from client_updates import gap, rebased, update

from manifold_merge import UpdateError, merge_updates

ROOT = Path(__file__).resolve().parent.parent


def test_missing_flower_says_how_to_install_it(monkeypatch):
    from manifold_merge import flower

    monkeypatch.setattr(flower, "ArrayRecord", None)
    with pytest.raises(ImportError, match=r'pip install "manifold-merge\[flwr\]"'):
        flower.FedFrechet(p=1)


@pytest.fixture
def flwr(monkeypatch):
    pytest.importorskip("flwr.serverapp.strategy", reason="flwr is not installed")
    import flwr.app

    with contextlib.suppress(ImportError):  # newer releases want what their runtime sets
        from flwr.supercore.task_identity import TaskIdentity

        for name in ("_run_id", "_task_id", "_node_id"):
            monkeypatch.setattr(TaskIdentity, name, 1)
    return flwr.app


class LocalGrid:
    """Clients in this process, behind the interface that a strategy talks to."""

    def __init__(self, app, clients):
        self.app, self.clients = app, clients

    def get_node_ids(self):
        return list(self.clients)

    def send_and_receive(self, messages, **_):
        return [
            self.app.Message(self.clients[x.metadata.dst_node_id](x.content["arrays"]), reply_to=x)
            for x in messages
        ]


def replying(app, tensors, examples=1, **metrics):
    def client(arrays):
        record = {"num-examples": examples, "loss": 1.0} | metrics
        return app.RecordDict(
            {"arrays": app.ArrayRecord(dict(tensors)), "metrics": app.MetricRecord(record)}
        )

    return client


def started(app, clients, **options):
    from manifold_merge.flower import FedFrechet

    strategy = FedFrechet(fraction_evaluate=0.0, **options)
    first = app.ArrayRecord({k: x.float() for k, x in update(50).items()})
    grid = LocalGrid(app, clients)
    return strategy, strategy.start(grid, first, num_rounds=1)


def float32(seed, r=3):
    return {k: x.float() if x.is_floating_point() else x for k, x in update(seed, r).items()}


def test_strategy_is_the_mean_of_the_replies(flwr):
    updates = {1: float32(1), 2: float32(2, r=2), 3: rebased(float32(3), 0)}
    clients = {i: replying(flwr, u, examples=i, loss=float(i)) for i, u in updates.items()}
    strategy, result = started(flwr, clients, rank=3)
    found = result.arrays.to_torch_state_dict()
    assert gap(found, merge_updates(list(updates.values()), [1, 2, 3], rank=3).tensors) < 1e-6
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(14 / 6)
    assert strategy.merge.recipe["weights"].keys() == {"node 1", "node 2", "node 3"}
    strategy, result = started(flwr, clients, equal_weights=True, p=1)
    expected = merge_updates(list(updates.values()), p=1).tensors
    assert gap(result.arrays.to_torch_state_dict(), expected) < 1e-6


FAULTS = {
    "NaN": ({"head.weight": torch.full((2, 3), torch.nan)}, {}, "'head.weight' holds NaN"),
    "shape": ({"head.weight": torch.ones(9)}, {}, r"has shape \(9,\), but \(2, 3\) in like"),
    "no examples": ({}, {"num-examples": -1}, "'num-examples' is -1"),
}


@pytest.mark.parametrize(("tensors", "metrics", "message"), FAULTS.values(), ids=FAULTS)
def test_strategy_names_the_node(flwr, tensors, metrics, message, caplog):
    clients = {i: replying(flwr, float32(i)) for i in (1, 2, 3)}
    clients[2] = replying(flwr, float32(2) | tensors, **metrics)
    with pytest.raises(UpdateError, match=f"node 2: .*{message}"):
        started(flwr, clients)
    strategy, result = started(flwr, clients, invalid="drop")
    assert strategy.merge.recipe["weights"].keys() == {"node 1", "node 3"}
    assert gap(result.arrays.to_torch_state_dict(), strategy.merge.tensors) < 1e-6
    assert "node 2" in caplog.text


def test_strategy_keeps_the_model_if_nothing_can_be_averaged(flwr, caplog):
    bad = float32(1) | {"head.weight": torch.full((2, 3), torch.nan)}
    strategy, result = started(
        flwr, {i: replying(flwr, bad) for i in (1, 2)}, invalid="drop", min_train_nodes=2
    )
    assert strategy.merge is None
    assert not result.arrays
    assert "round 1: no update, the global tensors stay" in caplog.text
    assert strategy.aggregate_train(2, []) == (None, None)


def test_strategy_leaves_out_clients_that_fail(flwr, caplog):
    strategy, _ = started(flwr, {i: replying(flwr, float32(i)) for i in (1, 2)})
    sent = [flwr.Message(flwr.RecordDict(), dst_node_id=i, message_type="train") for i in (1, 2)]
    good = flwr.Message(replying(flwr, float32(1))(None), reply_to=sent[0])
    failed = flwr.Message(flwr.Error(code=0, reason="out of memory"), reply_to=sent[1])
    arrays, _ = strategy.aggregate_train(1, [good, failed])
    assert gap(arrays.to_torch_state_dict(), float32(1)) < 1e-5
    assert "node 2 failed: out of memory" in caplog.text
    empty = flwr.Message(flwr.RecordDict(), reply_to=sent[1])
    with pytest.raises(UpdateError, match="node 2: 0 ArrayRecords in its reply, expected one"):
        strategy.aggregate_train(1, [good, empty])


def test_flower_code_on_the_page_runs(flwr):
    page = (ROOT / "docs" / "federated.md").read_text("utf-8")
    code = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    assert code
    names = {"initial_tensors": float32(0), "trained": lambda tensors, context: (float32(1), 10)}
    for block in code:
        exec(compile(block, "federated.md", "exec"), names)
    clients = {i: replying(flwr, float32(i)) for i in (1, 2)}
    context = flwr.Context(
        run_id=1, node_id=0, node_config={}, state=flwr.RecordDict(), run_config={}
    )
    names["main"](LocalGrid(flwr, clients), context)
    assert gap(names["final_tensors"], merge_updates([float32(1), float32(2)], p=1).tensors) < 1e-5
