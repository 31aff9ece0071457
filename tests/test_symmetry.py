"""Symmetries derived from networks: the expected groups, and functions that stay as they are."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import tiny_models as zoo
import torch
from symmetry_cases import (
    ARCHITECTURES,
    CASES,
    TRANSFORMERS,
    Case,
    built,
    every_case,
    every_case_slowly,
)
from torch import Tensor, nn

from manifold_merge import (
    GaugeGroup,
    NetworkSymmetry,
    PermutedSet,
    SymmetryElement,
    SymmetryError,
    prove,
    symmetry_of,
)
from manifold_merge.symmetry_proof import Prover
from manifold_merge.symmetry_trace import tensors_of

_derived: dict[str, NetworkSymmetry] = {}


def symmetry_for(case: Case) -> NetworkSymmetry:
    if case.name not in _derived:
        model, inputs = built(case)
        _derived[case.name] = symmetry_of(model, inputs)
    return _derived[case.name]


def generic(model: nn.Module) -> nn.Module:
    """Norm weights of one and biases of zero hide errors."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            if "running_var" in name:
                buffer.mul_(1 + torch.rand(buffer.shape, generator=generator))
    return model


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = model(inputs)
    return tensors_of(getattr(result, "logits", result))


@every_case
def test_the_expected_group_is_found(case: Case) -> None:
    symmetry = symmetry_for(case)
    assert Counter(s.count for s in symmetry.sets if s.parent is None) == case.sets
    assert Counter(s.count for s in symmetry.sets if s.parent is not None) == case.nested
    assert Counter((g.kind, g.dimension) for g in symmetry.gauges) == case.gauges


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_other_architectures(case: Case) -> None:
    test_the_expected_group_is_found(case)
    model, inputs = built(case)
    assert prove(model, symmetry_for(case), inputs, seed=1) < 1e-10


@every_case
def test_the_function_is_preserved_in_float64(case: Case) -> None:
    model, inputs = built(case)
    symmetry = symmetry_for(case)
    assert max(prove(model, symmetry, inputs, seed=seed) for seed in range(3)) < 1e-10


@every_case
@pytest.mark.parametrize("kind", ["permutations", "everything"])
def test_the_function_is_preserved_in_float32(case: Case, kind: str) -> None:
    model, inputs = built(case)
    model = generic(model)
    symmetry = symmetry_for(case)
    if kind == "permutations":
        symmetry = symmetry.only("permutation").discrete()
    before = outputs(model, inputs)
    moved = copy.deepcopy(model)
    element = symmetry.random(torch.Generator().manual_seed(5))
    moved.load_state_dict(symmetry.apply(model.state_dict(), element))
    for old, new in zip(before, outputs(moved, inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5 * float(old.abs().max()))


@every_case
def test_every_single_set_and_gauge_moves_something(case: Case) -> None:
    """No silent no-op: each action changes each tensor that it lists."""
    model, _ = built(case)
    state = generic(model).double().state_dict()
    symmetry = symmetry_for(case)
    element = symmetry.random(torch.Generator().manual_seed(1))
    for each in symmetry.sets:
        order = torch.roll(torch.arange(each.count), 1)
        moved = symmetry.permute(state, {each.name: order})
        for name in {p.tensor for p in each.placements} | {n for t in each.tensors for n in t}:
            assert not torch.equal(moved[name], state[name]), (each.name, name)
    for gauge in symmetry.gauges:
        moved = symmetry.transform(state, {gauge.name: element.gauges[gauge.name]})
        for place in gauge.placements:
            assert not torch.equal(moved[place.tensor], state[place.tensor])


def is_key_bias(tensor: str, start: int) -> bool:
    """A key's bias shifts all scores of a query alike: softmax does not see it."""
    fused = {"qkv.bias": 12, "in_proj_bias": 8, "c_attn.bias": 16}
    for name, keys in fused.items():
        if tensor.endswith(name):
            return keys <= start < 2 * keys
    return tensor.endswith((".k.bias", ".key.bias", ".k_proj.bias"))


@every_case_slowly
def test_a_wrong_set_is_named(case: Case) -> None:
    """Without one of its placements, no set leaves the function as it is."""
    model, inputs = built(case)
    symmetry = symmetry_for(case)
    prover = Prover(model, [inputs], {})
    roles = set()
    for each in (*symmetry.sets, *symmetry.gauges):
        if each.role and each.role in roles:
            continue
        roles.add(each.role)
        places = [p for p in each.placements if not is_key_bias(p.tensor, p.start)]
        for place in places[:1] if case in TRANSFORMERS else (places[0], places[-1]):
            broken = replace(each, placements=tuple(p for p in each.placements if p != place))
            sets = tuple(broken if s is each else s for s in symmetry.sets)
            gauges = tuple(broken if g is each else g for g in symmetry.gauges)
            wrong = replace(symmetry, sets=sets, gauges=gauges)
            assert list(prover.failures(wrong, 1e-8)) == [each.name], place


def test_the_error_names_the_set_and_its_tensors() -> None:
    model, inputs = zoo.mlp(), zoo.vectors(6)
    symmetry = symmetry_of(model, inputs).only("permutation")
    wrong = replace(
        symmetry,
        sets=tuple(
            replace(s, placements=s.placements[:-1]) if s.name == "0" else s for s in symmetry.sets
        ),
    )
    with pytest.raises(SymmetryError, match=r"'0': by .* it moves 0\.weight, 0\.bias\n.*without"):
        prove(model, wrong, inputs)


MUTATIONS = {
    "shifted": ("0.weight", {"start": 1}, "covers positions"),
    "other_axis": ("2.weight", {"axis": 0}, "covers positions"),
    "unknown_tensor": ("0.bias", {"tensor": "9.bias"}, "9.bias"),
    "beyond_the_axes": ("0.bias", {"axis": 1}, "axis 1"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_placement_that_does_not_fit_is_named(name: str) -> None:
    tensor, change, message = MUTATIONS[name]
    model, inputs = zoo.mlp(), zoo.vectors(6)
    symmetry = symmetry_of(model, inputs)
    hidden = symmetry["0"]
    places = tuple(replace(p, **change) if p.tensor == tensor else p for p in hidden.placements)
    wrong = replace(
        symmetry,
        sets=tuple(replace(s, placements=places) if s is hidden else s for s in symmetry.sets),
    )
    with pytest.raises(SymmetryError, match=message) as error:
        prove(model, wrong, inputs)
    assert "'0'" in str(error.value)


def test_swapped_placements_change_the_function() -> None:
    """Shapes fit, but two hidden layers of one width have their columns exchanged."""
    model, inputs = zoo.mlp(widths=(6, 8, 8, 8, 4)), zoo.vectors(6)
    symmetry = symmetry_of(model, inputs)
    first, second = symmetry["0"], symmetry["2"]
    a, b = first.placements, second.placements
    swapped = {
        first.name: replace(first, placements=(*a[:-1], b[-1])),
        second.name: replace(second, placements=(*b[:-1], a[-1])),
    }
    wrong = replace(symmetry, sets=tuple(swapped.get(s.name, s) for s in symmetry.sets), gauges=())
    with pytest.raises(SymmetryError, match="'0': by"):
        prove(model, wrong, inputs)


def test_example_inputs_are_asked_for() -> None:
    with pytest.raises(SymmetryError, match=r"inputs: give example inputs.*'input'"):
        symmetry_of(nn.Linear(3, 2))


def test_parameters_without_use_raise() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 5), "idle": nn.Linear(3, 7)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model
            self.out = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.parts["used"](x)))

    with pytest.raises(SymmetryError, match=r"parts\.idle\.weight, parts\.idle\.bias.*unused="):
        symmetry_of(Net(), zoo.vectors(3))
    symmetry = symmetry_of(Net(), zoo.vectors(3), unused="freeze")
    assert symmetry.frozen["parts.idle.weight[0]"] == "not used on the example inputs"


def test_experts_that_no_example_reaches_are_completed() -> None:
    """One token reaches two of four experts; the others have the same neurons and streams."""
    torch.manual_seed(0)
    model = zoo.Llama(layers=1, mlp=zoo.RoutedExperts)
    symmetry = symmetry_of(model, torch.tensor([[3]]))
    wanted = symmetry_of(model, zoo.tokens())

    def places(each: NetworkSymmetry) -> set[frozenset]:
        return {frozenset(s.placements) for s in each.sets}

    assert places(symmetry) == places(wanted)
    assert prove(model, symmetry, zoo.tokens()) < 1e-10


def test_stacked_experts_that_no_example_reaches_raise() -> None:
    class One(zoo.StackedExperts):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.tanh(x @ self.up[1].t()), self.down[1])

    with pytest.raises(SymmetryError, match="up"):
        symmetry_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), One(6)), zoo.vectors(4))


def test_tied_tensors_stay_tied() -> None:
    model = zoo.GPT()
    symmetry = symmetry_of(model, zoo.tokens())
    assert symmetry.aliases == {"head.weight": "embed.weight"}
    element = symmetry.random(torch.Generator().manual_seed(0))
    moved = symmetry.apply(model.state_dict(), element)
    assert moved["head.weight"] is moved["embed.weight"]
    # A file may keep one name only, and not the first.
    stored = {k: v for k, v in model.state_dict().items() if k != "embed.weight"}
    symmetry.check(stored)
    again = symmetry.apply(stored, element)
    assert torch.equal(again["head.weight"], moved["embed.weight"])
    assert "embed.weight" not in again


def test_the_model_is_left_alone() -> None:
    model = zoo.mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    model.train()
    symmetry_of(model, zoo.tokens(30))
    assert model.training
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_outputs_may_be_chosen() -> None:
    """Hidden states that are returned are frozen, unless only the logits count."""
    model, inputs = built(next(case for case in CASES if case.name == "hf_llama"))
    whole = symmetry_of(model, inputs, output_hidden_states=True)
    part = symmetry_of(model, inputs, output_hidden_states=True, output=lambda out: out.logits)
    assert 16 not in {s.count for s in whole.sets}
    assert 16 in {s.count for s in part.sets}


@every_case
def test_json_round_trip(case: Case) -> None:
    symmetry = symmetry_for(case)
    again = NetworkSymmetry.from_dict(json.loads(json.dumps(symmetry.to_dict())))
    assert again == symmetry


def test_what_is_no_specification_raises() -> None:
    with pytest.raises(SymmetryError, match="to_dict"):
        NetworkSymmetry.from_dict({"gauges": []})
    with pytest.raises(SymmetryError, match="colour"):
        NetworkSymmetry.from_dict({"sets": [{"name": "a", "count": 2, "colour": 1}]})


def test_subgroups() -> None:
    symmetry = symmetry_for(next(case for case in CASES if case.name == "llama"))
    name = "layers.0.attention.heads[1].q"
    assert isinstance(symmetry[name], PermutedSet)
    fewer = symmetry.without(name)
    # Its sibling in the other head would change places with it.
    assert {s.name for s in symmetry.sets} - {s.name for s in fewer.sets} == {
        name,
        "layers.0.attention.heads[0].q",
    }
    flat = symmetry.without("layers.0.attention.heads")
    assert flat[name].parent is None
    assert all(isinstance(flat[g.name], GaugeGroup) for g in symmetry.gauges)
    assert not symmetry.only("permutation").gauges
    assert {g.kind for g in symmetry.only("rotation").gauges} == {"rotation"}
    discrete = symmetry.discrete()
    assert len(discrete.sets) == len(symmetry.sets) + 4
    model, inputs = built(next(case for case in CASES if case.name == "llama"))
    for each in (fewer, flat, symmetry.only("rotation"), discrete):
        assert prove(model, each, inputs) < 1e-10


def test_elements_that_do_not_fit_raise() -> None:
    symmetry = symmetry_for(CASES[0])
    state = zoo.mlp().state_dict()
    bad = {
        "no permuted set": SymmetryElement({"1": torch.arange(10)}),
        "must hold each": SymmetryElement({"0": torch.zeros(10, dtype=torch.long)}),
        "no gauge group": SymmetryElement({}, {"0": torch.ones(10)}),
        "must have shape": SymmetryElement({}, {"0.scale": torch.ones(9)}),
    }
    for message, element in bad.items():
        with pytest.raises(SymmetryError, match=message):
            symmetry.apply(state, element)


def test_a_state_of_another_model_raises() -> None:
    symmetry = symmetry_for(CASES[0])
    with pytest.raises(SymmetryError, match=r"0\.weight.*\(12, 6\).*\(10, 6\)"):
        symmetry.check(zoo.mlp(widths=(6, 12, 8, 4)).state_dict())
    with pytest.raises(SymmetryError, match="no tensor"):
        symmetry.check({})


def test_the_table_lists_everything() -> None:
    symmetry = symmetry_for(next(case for case in CASES if case.name == "llama"))
    text = symmetry.describe()
    assert all(each.name in text for each in (*symmetry.sets, *symmetry.gauges))
    assert "embed.weight[0]" in text
    assert "embed.weight[0]" not in symmetry.describe(frozen=False)
    assert str(NetworkSymmetry(())) == "no symmetry"


class Deviation(nn.Module):
    """A parameter that must stay positive for the outputs to be finite."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 6)
        self.variance = nn.Parameter(torch.full((6,), 0.5))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)) / self.variance.sqrt())


def test_parameters_stay_where_outputs_are_finite() -> None:
    symmetry = symmetry_of(Deviation(), zoo.vectors(3))
    assert [s.count for s in symmetry.sets] == [6]
    with pytest.raises(SymmetryError, match="not finite"):
        symmetry_of(zoo.mlp(), zoo.vectors(6) * float("nan"))
