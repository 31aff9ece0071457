"""Statistics of real modules against what they claim to measure."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, jacrev

from manifold_merge.statistics import STATISTICS_NAME, Gram, Statistics, collect_statistics
from manifold_merge.statistics_gram import DenseSum, SketchSum

FILE = STATISTICS_NAME
LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), padding=(2, 1)), (2, 2, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 6)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
                        (2, 2, 5, 5)),
    "conv1d reflect": (lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"),
                       (2, 2, 8)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_gram_predicts_the_change_of_the_output(make, shape):
    layer, x = make().double(), torch.randn(*shape).double()
    gram = collect_statistics(nn.Sequential(layer), [x]).gram("0")
    change = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(change)
        layer.bias.zero_()
        output = layer(x)
    dW = change.flatten(1)
    channels = -1 if isinstance(layer, nn.Linear) else 1
    torch.testing.assert_close((dW @ gram.dense() * dW).sum() * gram.count, output.square().sum())
    assert gram.count == output.numel() // output.shape[channels]
    torch.testing.assert_close(dW @ gram.mean, output.movedim(channels, -1).flatten(0, -2).mean(0))


def test_embedding_counts_tokens_and_padding_does_not():
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2))
    ids = torch.tensor([[1, 1, 5, 0], [2, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    statistics = collect_statistics(model, [ids], mask=lambda batch: mask)
    frequency = torch.tensor([0, 2, 1, 0, 0, 1]) / 4
    torch.testing.assert_close(statistics.gram("0").diagonal(), frequency.double())
    kept = model[0](ids)[mask.bool()]
    torch.testing.assert_close(
        statistics.gram("1").dense(), (kept.T @ kept / 4).double(), check_dtype=False
    )


class Attention(nn.Module):
    """Query, key and value of one input; padding is whatever the mask says."""

    def __init__(self, repeats=1):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.dense = nn.Linear(4, 2)
        self.repeats = repeats

    def forward(self, states, attention_mask=None):
        for _ in range(self.repeats):
            scores = self.query(states) @ self.key(states).transpose(1, 2)
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
            states = scores.softmax(-1) @ self.value(states)
        return self.dense(states)


@pytest.mark.parametrize("kind", ["input_gram", "kfac", "diagonal"])
def test_padding_changes_nothing(kind):
    model = Attention().double()
    texts = [torch.randn(1, n, 4).double() for n in (3, 5, 2)]
    padded = torch.zeros(3, 5, 4).double()
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : text.shape[1]] = text
        mask[row, : text.shape[1]] = 1
        padded[row, text.shape[1] :] = 100.0
    # One token's label each, so that the same labels are drawn with and without padding.
    options = {
        "kind": kind,
        "likelihood": "gaussian",
        "output": lambda result, batch: result[:, 0],
        "modules": ["query", "key", "value", "dense"],
    }
    one = collect_statistics(model, [{"states": padded, "attention_mask": mask}], **options)
    many = collect_statistics(model, [{"states": text} for text in texts], **options)
    if kind == "diagonal":
        for name in many.names:
            torch.testing.assert_close(one.diagonal(name), many.diagonal(name))
        return
    for name in many.names:
        torch.testing.assert_close(one.gram(name).dense(), many.gram(name).dense())
        assert one.gram(name).count == 10
        if kind == "kfac":
            assert one.output_gram(name).count == 3  # examples, not tokens
            torch.testing.assert_close(
                one.output_gram(name).dense(), many.output_gram(name).dense()
            )


@pytest.mark.parametrize("repeats", [1, 3])
def test_one_input_is_stored_once(repeats):
    model = Attention(repeats)
    x = torch.randn(2, 3, 4)
    statistics = collect_statistics(model, [x, x])
    assert set(statistics.input_grams) == {"query", "dense"}
    assert statistics.owners["key"] == statistics.owners["value"] == "query"
    assert statistics.gram("value").count == 12 * repeats
    alone = collect_statistics(model, [x, x], modules=["value"])
    torch.testing.assert_close(statistics.gram("value").dense(), alone.gram("value").dense())


def test_inputs_shared_only_sometimes_are_an_error():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.a(x) + self.b(x if self.calls % 2 else x.clone())

    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"'b' shares its input .* pass of its own"):
        collect_statistics(Sometimes(), [x, x])


# --- low rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 8])
def test_sketch_is_exact_up_to_its_rank_and_never_above(rank):
    data = torch.randn(50, 5).double() @ torch.randn(5, 40).double()
    sketch = SketchSum(40, rank, torch.float64, torch.device("cpu"))
    exact = DenseSum(40, torch.float64, torch.device("cpu"))
    for rows in data.split(20):
        sketch.add(rows)
        exact.add(rows)
    low, whole = sketch.result(), exact.result()
    torch.testing.assert_close(low.diagonal(), whole.diagonal())
    gap = torch.linalg.eigvalsh(whole.dense() - low.factor @ low.factor.T)
    assert gap.min() > -1e-4 * gap.abs().max().clamp(min=1)
    if rank >= 5:
        torch.testing.assert_close(low.dense(), whole.dense(), atol=1e-3, rtol=1e-3)
        assert low.energy > 0.9999
    else:
        assert low.energy < 0.95
        assert low.energy <= whole.compress(rank).energy


def test_rank_makes_wide_layers_small_and_keeps_narrow_ones_exact():
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 6))
    x = torch.randn(30, 6)
    exact = collect_statistics(model, [x])
    small = collect_statistics(model, [x], rank=8)
    assert small.gram("0").matrix is not None
    assert small.gram("1").factor.shape == (64, 8)
    assert small.nbytes < exact.nbytes / 3
    assert exact.compress(8).nbytes == small.nbytes
    # The 64 features are linear in 6, which rank 8 holds exactly.
    torch.testing.assert_close(
        small.gram("1").dense(), exact.gram("1").dense(), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    "gram",
    [
        Gram(matrix=torch.eye(4) + 1),
        Gram(factor=torch.randn(4, 2), remainder=torch.rand(4)),
        Gram(factor=torch.randn(4, 2)),
        Gram(remainder=torch.rand(4)),
    ],
    ids=["dense", "low rank plus diagonal", "low rank", "diagonal"],
)
def test_forms_of_a_gram_agree(gram):
    x, dense = torch.randn(4, 3), gram.dense()
    torch.testing.assert_close(gram @ x, dense @ x)
    torch.testing.assert_close(gram @ x[:, 0], dense @ x[:, 0])
    torch.testing.assert_close(gram.diagonal(), dense.diagonal())
    torch.testing.assert_close(gram.trace(), dense.trace())
    torch.testing.assert_close(gram.compress(4).dense(), dense, atol=1e-5, rtol=1e-5)
    assert gram.features == 4
    assert gram.to(torch.float64).dtype == torch.float64


def test_half_precision_models_are_added_up_in_float64():
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    x = torch.randn(4096, 8).to(torch.bfloat16)
    gram = collect_statistics(model, x.split(16)).gram("0").dense()
    exact = x.double().T @ x.double() / 4096
    torch.testing.assert_close(gram, exact, atol=1e-6, rtol=1e-5)


# --- Fisher ---------------------------------------------------------------------------------------


def small_network(kind):
    if kind == "mlp":
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)), (6, 3)
    if kind == "convolution":
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)), (
            5, 2, 3, 3,
        )  # fmt: skip
    return nn.Sequential(nn.Embedding(7, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(12, 4)), None


@pytest.mark.parametrize("kind", ["mlp", "convolution", "embedding"])
def test_empirical_diagonal_is_the_mean_of_squared_gradients(kind):
    model, shape = small_network(kind)
    model = model.double()
    x = torch.randint(7, (6, 4)) if shape is None else torch.randn(*shape).double()
    y = torch.randint(4, (len(x),))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient.square() / len(x)
    pairs = list(zip(x.split(4), y.split(4), strict=True))
    statistics = collect_statistics(model, pairs, kind="diagonal", labels="given")
    assert set(statistics.names) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(statistics.diagonal(name), value)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_drawn_labels_give_the_true_fisher(likelihood):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(4, 2).double()
    weights = dict(model.named_parameters())
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(weights)
    p = model(x).softmax(-1)
    curvature = (
        torch.diag_embed(p) - p[:, :, None] * p[:, None]
        if likelihood == "categorical"
        else torch.eye(3).double().expand(4, 3, 3)
    )
    many = [x] * 4000
    statistics = collect_statistics(model, many, kind="diagonal", likelihood=likelihood)
    for name, jacobian in jacobians.items():
        J = jacobian.flatten(2)
        exact = torch.einsum("nci,ncd,ndi->i", J, curvature, J) / 4
        found = statistics.diagonal(name).flatten()
        torch.testing.assert_close(found, exact, rtol=0.1, atol=5e-3)


def test_kfac_factors_are_exact_for_one_layer_and_one_example():
    model = nn.Sequential(nn.Linear(3, 4)).double()
    x, y = torch.randn(1, 3).double(), torch.tensor([2])
    statistics = collect_statistics(model, [(x, y)], kind="kfac", labels="given")
    loss = nn.functional.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, [model[0].weight])
    g = gradient.flatten()
    kronecker = torch.kron(statistics.output_gram("0").dense(), statistics.gram("0").dense())
    torch.testing.assert_close(kronecker, g[:, None] * g)


def test_kfac_agrees_with_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(5, 2, 3, 3).double(), torch.randint(4, (5,))
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        [p for p in model.parameters() if p.ndim > 1],
        [(x[:3], y[:3]), (x[3:], y[3:])],
        fisher_type="empirical",
        separate_weight_and_bias=True,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    ours = collect_statistics(model, [(x[:3], y[:3]), (x[3:], y[3:])], kind="kfac", labels="given")
    for name in ours.names:
        theirs = torch.kron(operator._gradient_covariances[name], operator._input_covariances[name])
        mine = torch.kron(ours.output_gram(name).dense(), ours.gram(name).dense())
        torch.testing.assert_close(mine / mine.norm(), theirs / theirs.norm())


@pytest.mark.parametrize("kind", ["input_gram", "kfac", "diagonal"])
def test_the_model_is_left_as_it_was(kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_statistics(model, [torch.randn(4, 3)], kind=kind)
    assert model.training
    assert not model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    ids = torch.randint(9, (4, 5))
    statistics = collect_statistics(model, [ids], ["1", "3"], kind="kfac", rank=4)
    statistics.save(tmp_path)
    return statistics, tmp_path / FILE


def test_a_saved_file_loads_as_it_was(saved):
    statistics, file = saved
    for path in (file, file.parent):
        loaded = Statistics.load(path, modules=["1", "3"])
        assert loaded.owners == statistics.owners
        assert loaded.options == statistics.options
        assert (loaded.kind, loaded.examples) == ("kfac", 4)
        for name in ("1", "3"):
            for side in (Statistics.gram, Statistics.output_gram):
                ours, theirs = side(statistics, name), side(loaded, name)
                torch.testing.assert_close(ours.dense(), theirs.dense(), atol=1e-5, rtol=1e-5)
                assert (ours.count, ours.energy) == (theirs.count, theirs.energy)
    assert file.stat().st_size < statistics.nbytes + 4000
    assert [path.name for path in file.parent.iterdir()] == [FILE]


def damage(file, how):
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        metadata = dict(handle.metadata())
    header = json.loads(metadata["header"])
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
        return
    if how == "nan":
        tensors["input/1/matrix"][3] = torch.nan
    elif how == "negative":
        tensors["input/3/remainder"][3] = -1
    elif how == "tensor gone":
        del tensors["input/3/factor"]
    elif how == "gram gone":
        header["owners"]["3"] = "7"
    elif how == "newer":
        header["schema"] = 99
    elif how == "header":
        del header["grams"]
    elif how == "foreign":
        metadata["format"] = "pt"
    elif how == "size":
        tensors["input/3/mean"] = torch.zeros(5)
    metadata["header"] = json.dumps(header)
    save_file(tensors, file, metadata=metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated or damaged"),
        ("nan", r"'input/1/matrix' has NaN"),
        ("negative", r"'input/3/remainder' has negative"),
        ("tensor gone", r"'input/3/factor' is missing"),
        ("gram gone", r"the Gram '7' is missing"),
        ("newer", r"schema 99.*upgrade"),
        ("header", "damaged header"),
        ("foreign", "no statistics file"),
        ("size", r"parts of 'input/3' do not fit"),
    ],
)
def test_a_damaged_file_is_refused_by_name(saved, how, message):
    _, file = saved
    damage(file, how)
    with pytest.raises(ValueError, match=message) as caught:
        Statistics.load(file)
    assert FILE in str(caught.value)


def test_missing_files_and_modules_are_named(saved, tmp_path):
    statistics, file = saved
    with pytest.raises(ValueError, match=r"no statistics of 'layer\.0' and 1 more"):
        Statistics.load(file, modules=["1", "layer.0", "layer.1"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Statistics.load(tmp_path / "nowhere")
    with pytest.raises(KeyError, match=r"input Gram of 'x', but of 1, 3"):
        statistics.gram("x")
    with pytest.raises(KeyError, match="diagonal Fisher"):
        statistics.diagonal("1.weight")


def test_numbers_too_large_for_the_stored_type_are_refused(saved):
    _, file = saved
    huge = Statistics("input_gram", {"1": Gram(torch.eye(2) * 1e6)}, {"1": "1"}, examples=1)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"'input/1/matrix' has NaN or infinite numbers"):
        huge.save(file, dtype=torch.float16)
    assert file.read_bytes() == before


# --- what cannot be measured ----------------------------------------------------------------------

MLP = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (MLP, [], {}, "batches is empty"),
        (MLP, [X], {"kind": "gram"}, "kind is 'gram', expected one of input_gram"),
        (MLP, [X], {"rank": 0}, "rank is 0"),
        (MLP, [X], {"modules": ["9"]}, "module '9' is not in Sequential"),
        (MLP, [X], {"modules": ["1"]}, "module '1' is a ReLU"),
        (MLP, [X * torch.nan], {}, "input of module '0' is not finite"),
        (MLP, [X], {"forward": lambda m, b: m[0](b)}, "module '2' took no part"),
        (MLP, [X], {"kind": "kfac", "labels": "given"}, "labels='given' needs"),
        (MLP, [X], {"mask": lambda b: torch.ones(3)}, r"the mask has shape \(3,\)"),
        (nn.Sequential(nn.ReLU()), [X], {}, "no linear, convolutional or embedding layer"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), [X], {}, "2 groups"),
        (
            nn.Sequential(nn.Linear(2, 2)),
            [torch.ones(1, 3, 2)],
            {"mask": lambda b: torch.zeros(1, 3)},
            "every token of module '0' is masked",
        ),
    ],
)
def test_errors_name_what_to_do(model, batches, options, message):
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, batches, **options)


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="pass output="):
        collect_statistics(MLP, [X], kind="kfac", forward=lambda m, b: (m(b),))


# --- the real encoder -----------------------------------------------------------------------------


def test_peft_models_are_measured_under_the_names_of_the_base_model(minilm, bundled_adapters):
    from peft import PeftModel

    from manifold_merge.adapters import Adapter

    folder = bundled_adapters["code_language"]
    model = PeftModel.from_pretrained(minilm.fresh(), folder)
    batch = minilm.tokenizer(["x = 1", "int main(void) {}"], padding=True, return_tensors="pt")
    statistics = collect_statistics(model, [batch], rank=64)
    assert set(statistics.names) == set(Adapter(folder).modules)
    assert len(statistics.input_grams) == 24  # query, key and value share one
    layer = "encoder.layer.3.attention.self"
    assert statistics.owners[f"{layer}.value"] == f"{layer}.query"
    assert statistics.gram(f"{layer}.key").count == int(batch["attention_mask"].sum())
    # The second layer's input depends on the adapter: it must be the adapted model's.
    merged = PeftModel.from_pretrained(minilm.fresh(), folder).merge_and_unload()
    name = f"{layer}.query"
    direct = collect_statistics(merged, [batch], [name]).gram(name).dense()
    torch.testing.assert_close(statistics.gram(name).dense(), direct, rtol=1e-3, atol=1e-5)
