"""diagnose_model: each layer's numbers, and that the model is as it was."""

import contextlib

import pytest
import torch
from torch import nn

import gatelet
from gatelet.diagnose import ModelReport, diagnose_model
from gatelet.estimators import LeaveOneOut, ScoreFunction, StraightThrough

FEW = ["leave_one_out", "straight_through"]


def batch(examples=6):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(examples, 5, generator=draw), torch.randint(3, (examples,), generator=draw)


def cross_entropy(output, target):
    return nn.functional.cross_entropy(output, target, reduction="none")


def one_layer(estimator="score_function"):
    return nn.Sequential(nn.Linear(5, 3), gatelet.StochasticUnit(estimator), nn.Linear(3, 3))


def two_layers(first="straight_through", second="straight_through"):
    return nn.Sequential(
        nn.Linear(5, 3), gatelet.StochasticUnit(first), nn.Linear(3, 4), gatelet.StochasticUnit(second), nn.Linear(4, 3)
    )


def conditional():
    layers = [gatelet.nn.ConditionalLinear(5, 8, 1, target_rate=0.3), nn.BatchNorm1d(8)]
    sparsity = [gatelet.sparsity.AdaptiveL1(0.3), gatelet.sparsity.FiringRateBias(0.3)]
    layers.append(gatelet.nn.ConditionalLinear(8, 6, 1, estimator="score_function", target_rate=0.3, sparsity=sparsity))
    return nn.Sequential(*layers, nn.Linear(6, 3))


def test_a_single_layer_is_the_network_above_it():
    model, (x, y) = one_layer(), batch()
    report = diagnose_model(model, cross_entropy, (x, y), FEW, samples=2000)
    logits = model[0](x).detach()

    def above(h):
        output = model[2](h)
        return cross_entropy(output.flatten(0, 1), y.repeat(len(h))).reshape(h.shape[:2])

    exact = gatelet.exact_gradient(above, logits)
    torch.testing.assert_close(report["1"].reference, exact)
    biased = gatelet.diagnose(above, logits, FEW)
    for name in FEW:
        found, known = report["1"][name], biased[name]
        assert abs(found.variance - known.variance) < 5 * found.variance_error
        assert abs(found.bias - known.bias) < 4 * found.bias_error
        assert found.evaluations == known.evaluations


def test_layers_below_are_fixed_and_layers_above_are_drawn():
    model, data = two_layers("straight_through", "leave_one_out"), batch()
    report = diagnose_model(model, cross_entropy, data, FEW, samples=400)
    assert list(report.layers) == ["1", "3"]
    # above: noise, so a long run; at the top: none, so enumeration
    assert report["1"].reference_error > 0
    assert report["3"].reference_how == "exact gradient by enumeration"
    assert report["1"].reference.shape == (6, 3)
    assert report["3"].reference.shape == (6, 4)
    for layer in report.layers.values():
        assert layer["leave_one_out"].bias < 4 * layer["leave_one_out"].bias_error


def test_layers_above_are_summed_out_by_the_reference():
    """∂E[L]/∂logits of the first layer, by enumerating both layers' gates."""
    model, (x, y) = two_layers("straight_through", "score_function").double(), batch()
    x = x.double()
    with torch.no_grad():
        first, codes = model[0](x), torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)

    def above(h):
        with torch.no_grad():
            p = model[2](h).sigmoid()
            weight = torch.where(codes > 0, p.unsqueeze(-2), 1 - p.unsqueeze(-2)).prod(-1)
            losses = torch.stack([cross_entropy(model[4](code).expand(len(y), 3), y) for code in codes], -1)
            return (weight * losses).sum(-1)

    report = diagnose_model(model, cross_entropy, (x, y), ["leave_one_out"], samples=2000)["1"]
    difference = report.reference - gatelet.exact_gradient(above, first)
    assert difference.square().sum(-1).mean().sqrt() < 4 * report.reference_error


def fingerprint(model):
    state = {}
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            state[f"{name}.{key}"] = (id(buffer), None if buffer is None else buffer.clone())
        state[f"{name} attributes"] = {
            key: value if isinstance(value, bool | int | float | str) else id(value)
            for key, value in vars(module).items()
            if key not in ("_buffers", "_modules", "_parameters")
        }
        state[f"{name} modules"] = {key: id(child) for key, child in module._modules.items()}
    state["parameters"] = [(id(p), p.detach().clone(), id(p.grad)) for p in model.parameters()]
    return state


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(torch.nan_to_num(one.double(), 7.0), torch.nan_to_num(other.double(), 7.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("make", [one_layer, two_layers, conditional])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(make, training, fails):
    model, data = make().train(training), batch()
    if training:  # buffers and gradients hold something
        with gatelet.Tape() as tape:
            loss = cross_entropy(model(data[0]), data[1])
        tape.surrogate(loss).mean().backward()
    before, random = fingerprint(model), torch.get_rng_state()
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        if fails and calls == 8:
            raise ArithmeticError("stop")
        return cross_entropy(output, target)

    if fails:
        with contextlib.suppress(ArithmeticError):
            diagnose_model(model, loss, data, FEW, samples=10)
        assert calls >= 8
    else:
        diagnose_model(model, loss, data, FEW, samples=10)
    assert same(before, fingerprint(model))
    assert torch.equal(random, torch.get_rng_state())


def test_an_error_of_the_network_is_raised_and_the_model_restored():
    model, data = one_layer(), batch()
    before = fingerprint(model)

    def loss(output, target):
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        diagnose_model(model, loss, data)
    assert same(before, fingerprint(model))


def test_the_units_estimators_may_need_replicas():
    report = diagnose_model(one_layer("leave_one_out"), cross_entropy, batch(), {"it": LeaveOneOut()}, samples=20)
    assert report["1"]["it"].replicas == 2


def test_sequences_and_categorical_units():
    class Steps(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.unit = gatelet.StochasticUnit(ScoreFunction(kind=kind))
            self.output = nn.Linear(12, 3)

        def forward(self, x):
            return self.output(self.unit(x[:, :4, None] + torch.arange(3.0)).flatten(1))

    for kind, shape in (("bernoulli", (6, 12)), ("categorical", (6, 4, 3))):
        report = diagnose_model(Steps(kind), cross_entropy, batch(), ["leave_one_out"], samples=600)["unit"]
        assert report.reference.shape == shape
        assert report["leave_one_out"].bias <= 4 * report["leave_one_out"].bias_error


def test_the_report(tmp_path):
    report = diagnose_model(two_layers(), cross_entropy, batch(), FEW, samples=10, budget="evaluations")
    assert isinstance(report, ModelReport)
    assert [record["layer"] for record in report.records()] == ["1", "1", "3", "3"]
    assert repr(report).startswith("layer 1\nreference: ")
    assert "\n\nlayer 3\n" in repr(report)
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 0
    with pytest.raises(ValueError, match="unknown layer '2'"):
        report["2"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.unit = gatelet.StochasticUnit("straight_through")

    def forward(self, x):
        return self.unit(self.unit(x[:, :3]))


class Transposed(Twice):
    def forward(self, x):
        return self.unit(x.T).T[:, :3]


@pytest.mark.parametrize(
    ("model", "loss", "data", "error", "message"),
    [
        (nn.Linear(5, 3), cross_entropy, batch(), ValueError, "model: has no gatelet.StochasticUnit"),
        (Twice(), cross_entropy, batch(), ValueError, "model: the unit 'unit' runs several times"),
        (Transposed(), cross_entropy, batch(), ValueError, "whose first dimension is not the batch of 6"),
        (one_layer(), nn.CrossEntropyLoss(), batch(), ValueError, "loss_fn must return one loss per example"),
        (one_layer(), cross_entropy, (batch()[0], batch(4)[1]), ValueError, "batch: x and y must hold the same"),
    ],
)
def test_bad_inputs(model, loss, data, error, message):
    with pytest.raises(error, match=message):
        diagnose_model(model, loss, data, [StraightThrough()])


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match="unknown estimator 'straight'; did you mean"):
        diagnose_model(one_layer(), cross_entropy, batch(), ["straight"])
