"""FrechetMean as a torch optimiser: three uses, torch's habits, misuse."""

import copy
import functools
import io
import itertools

import geoopt
import pytest
import torch
from peft_models import adapt, bert, inputs, output
from torch import nn

from manifold_merge import FrechetMean, LoRAQuotient, frechet_mean, param_groups
from manifold_merge.lora_groups import lora_pairs

TARGETS = ["query", "value"]


def model(seed=1, dtype=torch.float64, **config):
    return adapt(bert, seed, dtype, target_modules=TARGETS, **config).to(dtype)


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def products(module):
    named = dict(module.named_parameters())
    return torch.stack([named[b].detach() @ named[a].detach() for b, a in lora_pairs(named)])


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@functools.cache
def teacher():
    return model(7)


def batch(seed):
    """Token ids, and what another adapter of the same base makes of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (16, 8), generator=generator)
    with torch.no_grad():
        return ids, teacher()(input_ids=ids).last_hidden_state.mean(1)


def loss_of(module, seed):
    ids, target = batch(seed)
    return (module(input_ids=ids).last_hidden_state.mean(1) - target).square().mean()


def train(module, optimizer, steps, after=None, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(module, step)
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        losses.append(float(loss.detach()))
    return losses


# --- use 1: average finished models ---------------------------------------------------------------


@pytest.mark.parametrize("distance", ["chordal", "exact"])
@pytest.mark.parametrize("metric", ["mixed", "invariant", "embedded"])
def test_steps_converge_to_the_frechet_mean(metric, distance):
    manifold = LoRAQuotient(7, 6, metric, distance)
    x = manifold.random(13, 2, dtype=torch.float64).as_subclass(torch.Tensor)
    anchors = [x + 0.15 * torch.randn_like(x) for _ in range(3)]
    weights = [1.0, 2.0, 3.0]
    factors = [nn.Parameter(f.clone()) for f in manifold.unpack(anchors[0])]
    optimizer = FrechetMean(
        [{"params": factors, "manifold": manifold}],
        anchors=[manifold.unpack(a) for a in anchors],
        weights=weights,
    )
    steps, limit = (4, 1e-3) if distance == "exact" else (12, 1e-8)
    objectives = torch.stack([optimizer.step() for _ in range(steps)])
    expected = frechet_mean(manifold, anchors, weights)
    reached = manifold.pack(*factors).detach()
    assert float(manifold.relative_difference(expected.point, reached)) < limit
    assert float(objectives[-1]) == pytest.approx(float(expected.objective), rel=limit)
    assert bool((objectives.diff() <= 1e-10).all())


def test_average_of_adapters_does_not_depend_on_the_gauge():
    models = [model(seed) for seed in (1, 2, 3)]
    turned = [copy.deepcopy(m) for m in models]
    for k, other in enumerate(turned):
        named = dict(other.named_parameters())
        for name_b, name_a in lora_pairs(named):
            gauge = torch.randn(3, 3, dtype=torch.float64) + (k + 2) * torch.eye(3)
            named[name_b].data = named[name_b].data @ gauge
            named[name_a].data = torch.linalg.solve(gauge, named[name_a].data)
    means = []
    for family in (models, turned):
        mean = copy.deepcopy(family[0])
        optimizer = FrechetMean(param_groups(mean), anchors=family)
        for _ in range(30):
            optimizer.step()
        means.append(mean)
    one, two = map(products, means)
    assert float((one - two).norm() / one.norm()) < 1e-8
    assert torch.allclose(output(means[0]), output(means[1]), atol=1e-8)


def test_euclidean_parameters_are_averaged_in_one_step():
    models = [nn.Linear(4, 3) for _ in range(3)]
    mean = copy.deepcopy(models[0])
    FrechetMean(mean.named_parameters(), [m.state_dict() for m in models], weights=[1, 1, 2]).step()
    expected = (models[0].weight + models[1].weight + 2 * models[2].weight) / 4
    assert torch.allclose(mean.weight, expected)


def test_manifold_parameters_bring_their_manifold():
    sphere = geoopt.Sphere()
    anchors = [sphere.random(5, 3, dtype=torch.float64) for _ in range(2)]
    point = geoopt.ManifoldParameter(anchors[0].clone(), manifold=sphere)
    optimizer = FrechetMean([point], anchors=[[a] for a in anchors])
    for _ in range(60):
        optimizer.step()
    expected = frechet_mean(sphere, anchors).point
    assert torch.allclose(point.detach(), expected, atol=1e-10)
    assert torch.allclose(point.norm(dim=-1), torch.ones(5, dtype=torch.float64))


def test_lower_rank_anchors_are_welcome():
    manifold = LoRAQuotient(7, 6, distance="chordal")
    big, small = (manifold.random(13, r, dtype=torch.float64) for r in (3, 1))
    factors = [nn.Parameter(f.clone()) for f in manifold.unpack(big)]
    optimizer = FrechetMean(
        [{"params": factors, "manifold": manifold}], [manifold.unpack(big), manifold.unpack(small)]
    )
    for _ in range(200):
        optimizer.step()
    expected = frechet_mean(manifold, [big, small]).point
    reached = manifold.pack(*factors).detach()
    assert float(manifold.relative_difference(expected, reached)) < 1e-6


# --- use 2: a pull during training ----------------------------------------------------------------


def test_pull_keeps_a_team_together_while_it_learns():
    spreads = {}
    for lr in (0.0, 0.2):
        team = [model(seed) for seed in (1, 2)]
        adams = [torch.optim.AdamW(trainable(m).values(), lr=2e-2) for m in team]
        pulls = [
            FrechetMean(param_groups(m), anchors=[o], lr=lr)
            for m, o in zip(team, reversed(team), strict=True)
        ]
        start = [float(loss_of(m, 99).detach()) for m in team]
        for step in range(12):
            for m, adam, pull in zip(team, adams, pulls, strict=True):
                train(m, adam, 1, after=pull.step, first=step)
        end = [float(loss_of(m, 99).detach()) for m in team]
        assert all(b < 0.6 * a for a, b in zip(start, end, strict=True)), (start, end)
        one, two = map(products, team)
        spreads[lr] = float((one - two).norm())
    assert spreads[0.2] < 0.3 * spreads[0.0]


def test_scheduler_anneals_the_pull():
    module, teammate = model(1), model(2)
    pull = FrechetMean(param_groups(module), anchors=[teammate], lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(pull, 1.0, 0.0, total_iters=4)
    moved = []
    for _ in range(5):
        before = vector(module)
        pull.step()
        schedule.step()
        moved.append(float((vector(module) - before).norm()))
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0
    assert moved[4] == 0.0


def test_zero_rate_moves_nothing():
    module = model(1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    objective = FrechetMean(param_groups(module), anchors=[model(2)], lr=0.0).step()
    assert float(objective) > 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_closure_is_called_with_gradients_and_its_loss_returned():
    module = model(1)
    pull = FrechetMean(param_groups(module), anchors=[model(2)], lr=0.1)

    def closure():
        loss = loss_of(module, 0)
        loss.backward()
        return loss

    loss = pull.step(closure)
    assert float(loss.detach()) == pytest.approx(float(loss_of(model(1), 0).detach()))
    assert all(p.grad is not None for p in trainable(module).values())
    assert float(pull.objective) > 0


def test_training_resumes_bit_for_bit():
    def start():
        module = model(1)
        adam = torch.optim.AdamW(trainable(module).values(), lr=1e-2)
        pull = FrechetMean(param_groups(module), anchors=[model(2)], weights=[2.0], lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(pull, 0.9)

        def after():
            pull.step()
            schedule.step()

        return (module, adam, pull, schedule), after

    whole, after = start()
    train(whole[0], whole[1], 6, after)
    first, after = start()
    train(first[0], first[1], 3, after)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second, after = start()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(second[0], second[1], 3, after, first=3)
    assert torch.equal(vector(second[0]), vector(whole[0]))
    assert second[2].param_groups[0]["lr"] == whole[2].param_groups[0]["lr"]
    assert isinstance(second[2].param_groups[0]["manifold"], LoRAQuotient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_with_float32_arithmetic(dtype):
    modules = {}
    for kind in (torch.float32, dtype):
        module, teammate = model(1, kind), model(2, kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            FrechetMean(param_groups(module), anchors=[teammate], lr=0.5).step()
        modules[kind] = module
        assert all(p.dtype == kind for p in trainable(module).values())
    one, two = (vector(modules[kind]).float() for kind in (torch.float32, dtype))
    error = float((one - two).norm() / one.norm())
    assert error < 4 * torch.finfo(dtype).eps


def test_gradient_scaler_and_accumulation_see_the_usual_optimiser_only():
    module = model(1, torch.float32)
    adam = torch.optim.AdamW(trainable(module).values(), lr=1e-2)
    pull = FrechetMean(param_groups(module), anchors=[model(2, torch.float32)], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(4):
        ids, target = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = module(input_ids=ids).last_hidden_state.mean(1)
        loss = (prediction.float() - target.float()).square().mean()
        scaler.scale(loss / 2).backward()
        before = {k: p.grad.clone() for k, p in trainable(module).items()}
        if step % 2:
            scaler.step(adam)
            scaler.update()
            adam.zero_grad()
        else:
            pull.step()
            after = {k: p.grad for k, p in trainable(module).items()}
            assert all(torch.equal(after[k], before[k]) for k in before)


def test_compiled_models_are_matched_by_their_clean_names():
    module, teammate = model(1), model(2)
    compiled = torch.compile(module, backend="eager")
    groups = param_groups(compiled)
    assert groups[0]["params"][0][0].startswith("_orig_mod.")
    FrechetMean(groups, anchors=[teammate], lr=0.5).step()
    plain = model(1)
    FrechetMean(param_groups(plain), anchors=[teammate], lr=0.5).step()
    assert torch.equal(vector(module), vector(plain))


# --- groups ---------------------------------------------------------------------------------------


def test_param_groups_of_a_peft_model():
    module = model(1, modules_to_save=["pooler"], bias="lora_only")
    *pairs, rest = param_groups(module, metric="invariant", distance="aligned")
    assert len(pairs) == 4  # two layers, query and value
    for group in pairs:
        (name_b, b), (name_a, a) = group["params"]
        assert ("lora_B" in name_b, "lora_A" in name_a) == (True, True)
        assert group["manifold"].product(group["manifold"].pack(b, a)).shape == (12, 12)
        assert (group["manifold"].metric, group["manifold"].distance) == ("invariant", "aligned")
    names = {name for name, _ in rest["params"]}
    listed = names | {name for group in pairs for name, _ in group["params"]}
    assert listed == set(trainable(module))
    torch.optim.AdamW(param_groups(module))  # a key that torch does not know is no obstacle


def test_convolutions_and_embeddings_are_pairs_too():
    layer = nn.ParameterDict(
        {
            "conv_lora_A": torch.randn(2, 3, 3, 3),
            "lora_A": torch.randn(2, 3, 3, 3),
            "lora_B": torch.randn(8, 2, 1, 1),
            "lora_embedding_A": torch.randn(2, 20),
            "lora_embedding_B": torch.randn(6, 2),
        }
    )
    groups = param_groups(layer)
    sizes = [(g["manifold"].out_features, g["manifold"].in_features) for g in groups[:-1]]
    assert sizes == [(8, 27), (6, 20)]
    assert [name for name, _ in groups[-1]["params"]] == ["conv_lora_A"]
    other = copy.deepcopy(layer)
    for p in other.values():
        p.data += 0.1 * torch.randn_like(p)
    FrechetMean(groups, anchors=[other]).step()
    assert layer["lora_A"].shape == (2, 3, 3, 3)
    one, two = (x["lora_B"].flatten(1) @ x["lora_A"].flatten(1) for x in (layer, other))
    assert float((one - two).detach().norm() / two.detach().norm()) < 0.2


def test_rank_above_the_sizes_is_euclidean(caplog):
    layer = nn.ParameterDict({"lora_A": torch.randn(4, 3), "lora_B": torch.randn(3, 4)})
    groups = param_groups(layer)
    assert len(groups) == 1
    assert "manifold" not in groups[0]
    assert "lora_B" in caplog.text


def test_groups_may_bring_anchors_weights_and_rates():
    x, y = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = FrechetMean([{"params": [x], "anchors": [[torch.ones(3)]]}])
    optimizer.add_param_group(
        {
            "params": [y],
            "anchors": [[torch.ones(3)], [3 * torch.ones(3)]],
            "weights": [3, 1],
            "lr": 0.5,
        }
    )
    objective = optimizer.step()
    assert x.tolist() == [1, 1, 1]
    assert y.tolist() == [0.75, 0.75, 0.75]
    assert float(objective) == pytest.approx(3 + 3 * (0.75 + 0.25 * 9))


# --- misuse ---------------------------------------------------------------------------------------

P = nn.Parameter(torch.zeros(2, 3))
PAIR = [nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.zeros(2, 4))]
LAYER = nn.Linear(3, 2)

MISUSE = {
    "no anchors": (lambda: FrechetMean([P]).step(), RuntimeError, "no anchors"),
    "empty": (lambda: FrechetMean([P], []), ValueError, "at least one"),
    "one model": (lambda: FrechetMean([P], LAYER), ValueError, "expected a list, got a Linear"),
    "one state": (lambda: FrechetMean([P], {"a": P}), ValueError, "expected a list, got a dict"),
    "one sequence of layers": (
        lambda: FrechetMean([P], nn.Sequential(LAYER)),
        ValueError,
        "expected a list, got a Sequential",
    ),
    "named weights": (
        lambda: FrechetMean([P], [[P]], weights="uniform"),
        ValueError,
        "weights: expected a list of numbers",
    ),
    "frozen": (
        lambda: param_groups(nn.Linear(3, 2).requires_grad_(False)),
        ValueError,
        "param_groups: no parameter requires grad",
    ),
    "shape": (
        lambda: FrechetMean([P], [[torch.zeros(3, 2)]]),
        ValueError,
        r"anchors\[0\].*\(3, 2\).*\(2, 3\)",
    ),
    "too few": (lambda: FrechetMean([P], [[]]), ValueError, "one tensor for each parameter"),
    "names": (lambda: FrechetMean([P], [LAYER]), ValueError, "named_parameters"),
    "missing": (
        lambda: FrechetMean(LAYER.named_parameters(), [{"weight": LAYER.weight}]),
        ValueError,
        "1 of 2 parameters are missing, first 'bias'",
    ),
    "negative weight": (
        lambda: FrechetMean([P], [[P], [P]], weights=[1, -1]),
        ValueError,
        "negative",
    ),
    "zero weights": (
        lambda: FrechetMean([P], [[P], [P]], weights=[0, 0]),
        ValueError,
        "must be positive",
    ),
    "number of weights": (
        lambda: FrechetMean([P], [[P]], weights=[1, 1]),
        ValueError,
        "expected 1",
    ),
    "negative rate": (lambda: FrechetMean([P], [[P]], lr=-1.0), ValueError, "lr"),
    "factors exchanged": (
        lambda: FrechetMean([{"params": PAIR[::-1], "manifold": LoRAQuotient(5, 4)}], [PAIR[::-1]]),
        ValueError,
        "in this order",
    ),
    "wrong manifold": (
        lambda: FrechetMean([{"params": PAIR, "manifold": LoRAQuotient(6, 4)}], [PAIR]),
        ValueError,
        "pack expects",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_told(case):
    call, error, message = MISUSE[case]
    with pytest.raises(error, match=message):
        call()


def test_inputs_stay_as_they_are():
    module, teammate = model(1), model(2)
    before = vector(teammate)
    FrechetMean(param_groups(module), anchors=[teammate]).step()
    assert torch.equal(vector(teammate), before)
    assert module(input_ids=inputs()).last_hidden_state.isfinite().all()


def test_a_pull_near_rank_deficiency_never_raises_the_objective() -> None:
    """A chordal logarithm at a nearly rank-deficient point is long and misses its anchor."""
    manifold = LoRAQuotient(12, 9, distance="chordal")
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    b = b * torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)
    a = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    x = torch.nn.Parameter(manifold.pack(b, a))
    y = manifold.random(21, 3, dtype=torch.float64)
    optimizer = FrechetMean(
        [{"params": [x], "manifold": manifold}], anchors=[[y.detach().clone()]], lr=0.5
    )
    objectives = [float(optimizer.step()) for _ in range(60)]
    assert all(new <= 1.01 * old for old, new in itertools.pairwise(objectives))
    assert objectives[-1] < 0.9 * objectives[0]


def test_training_that_diverged_is_told() -> None:
    manifold = LoRAQuotient(4, 3)
    x = torch.nn.Parameter(torch.full((7, 1), float("nan")))
    optimizer = FrechetMean([{"params": [x], "manifold": manifold}], anchors=[[torch.ones(7, 1)]])
    with pytest.raises(ValueError, match="7 entries are NaN or infinite, the training diverged"):
        optimizer.step()
