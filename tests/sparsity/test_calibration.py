"""calibrate_thresholds: the share of open gates after it, for every unit, loader and accident."""

import math

import pytest
import torch
from jaxtyping import config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gatelet import StochasticUnit, sampling
from gatelet.estimators import ALL
from gatelet.estimators._noise import NONE
from gatelet.nn import ConditionalLinear
from gatelet.sparsity import FiringRateBias, calibrate_thresholds, calibration

UNITS = {
    name: kind() for name, kind in ALL.items() if kind.needs != "objective" and not kind.antithetic and name != "carms"
}
STOCHASTIC = [name for name, unit in UNITS.items() if unit.law != NONE and unit.rated]


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def batches(count=3, size=20, width=6) -> list[torch.Tensor]:
    return [torch.randn(size, width) for _ in range(count)]


def layer(width_in=6, width=50, **options) -> ConditionalLinear:
    return ConditionalLinear(width_in, width, bottleneck=1, **options)


def share(model: nn.Module, unit: StochasticUnit, data) -> float:
    """The open share that the unit really has when the whole model runs in eval()."""
    seen = []
    hook = unit.register_forward_hook(lambda _, __, gates: seen.append((gates != 0).double().flatten()))
    model.eval()
    for batch in data:
        model(batch)
    hook.remove()
    return torch.cat(seen).mean().item()


# ---------------------------------------------------------------- the share


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("group_size", [1, 5])
def test_target_share_is_reached(name, rate, group_size):
    net, data = layer(60, estimator=name, target_rate=rate, group_size=group_size), batches(width=60)
    found = calibrate_thresholds(net, data)
    gates = 60 * 50 // group_size
    assert list(found) == ["unit"]
    assert abs(found["unit"] - rate) <= 1 / gates + 1e-6
    assert share(net, net.unit, data) == pytest.approx(found["unit"], abs=1e-6)


def test_gates_are_the_largest_logits():
    unit = StochasticUnit("straight_through", target_rate=0.25)
    data = [torch.tensor([[0.0, 5.0, 1.0, 2.0]]), torch.tensor([[7.0, 3.0, 4.0, 6.0]])]
    assert calibrate_thresholds(unit, data) == {"": 0.25}
    assert unit.threshold == 5.0
    assert torch.equal(unit.eval()(data[1]), torch.tensor([[1.0, 0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stacked_layers_in_order(name):
    """The second layer's logits depend on which gates of the first are open."""
    net = nn.Sequential(layer(estimator=name), layer(50, 40, estimator=name), layer(40, 30, estimator=name))
    data = batches()
    for module in net:
        module.expert.bias.data.normal_()
        module.gater.gates.bias.data.normal_()
    found = calibrate_thresholds(net, data)
    assert list(found) == ["0.unit", "1.unit", "2.unit"]
    for module, width in zip(net, (50, 40, 30), strict=True):
        assert abs(share(net, module.unit, data) - 0.1) <= 1 / (60 * width) + 1e-6


def test_passes_over_the_data_do_not_grow_with_depth():
    """Thirty layers: at most four passes, and every share is right on the data."""
    net = nn.Sequential(layer(6, 40), *[layer(40, 40) for _ in range(29)])
    for module in net:
        module.gater.gates.bias.data.normal_()
    data, runs = list(torch.randn(8, 50, 6)), 0

    def forward(model, batch):
        nonlocal runs
        runs += 1
        return model(batch)

    calibrate_thresholds(net, data, forward=forward)
    assert runs <= 4 * len(data)
    assert [share(net, module.unit, data) for module in net] == pytest.approx([0.1] * 30, abs=2e-3)


def test_one_batch_needs_one_pass():
    net, runs = nn.Sequential(layer(), layer(50, 40), layer(40, 30)), []
    x = torch.randn(60, 6)
    calibrate_thresholds(net, [x], forward=lambda model, batch: model(runs.append(batch) or batch))
    assert len(runs) == 1
    assert [share(net, module.unit, [x]) for module in net] == pytest.approx([0.1] * 3, abs=1e-3)


def test_order_is_that_of_running_not_of_registration():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = layer(50, 40), layer()

        def forward(self, x):
            return self.second(self.first(x))

    net, data = Reversed(), batches()
    assert list(calibrate_thresholds(net, data)) == ["first.unit", "second.unit"]
    assert abs(share(net, net.second.unit, data) - 0.1) <= 1 / 2400 + 1e-6


@pytest.mark.parametrize("offset", [-300.0, 30.0, 300.0])
@pytest.mark.parametrize("name", [n for n in STOCHASTIC if ALL[n].binary])
def test_saturated_logits(name, offset):
    unit, data = StochasticUnit(name, target_rate=0.1), [offset + torch.randn(40, 25)]
    assert calibrate_thresholds(unit, data)[""] == pytest.approx(0.1)
    assert share(unit, unit, data) == pytest.approx(0.1)


def test_ties_are_reported_not_hidden():
    unit = StochasticUnit("straight_through", target_rate=0.1)
    assert calibrate_thresholds(unit, [torch.zeros(10, 10)]) == {"": 0.0}
    half = torch.cat([torch.zeros(5, 10), torch.ones(5, 10)])
    assert calibrate_thresholds(unit, [half], target_rate=0.7) == {"": 0.5}
    assert share(unit, unit, [half]) == 0.5


def test_rectifier_opens_no_more_than_it_has():
    unit, logits = StochasticUnit("rectifier", target_rate=0.5), torch.randn(100, 10) - 1
    positive = (logits > 0).double().mean().item()
    assert calibrate_thresholds(unit, [logits])[""] == pytest.approx(positive)
    assert calibrate_thresholds(unit, [logits], target_rate=0.05)[""] == pytest.approx(0.05)


def test_one_gate():
    unit = StochasticUnit("straight_through", target_rate=0.9)
    assert calibrate_thresholds(unit, [torch.zeros(1, 1)]) == {"": 0.0}
    assert unit.threshold == 0.0


def neighbours(dtype: torch.dtype) -> torch.Tensor:
    """1000 consecutive numbers of this dtype."""
    if dtype == torch.float64:
        return 1 + torch.arange(1000, dtype=dtype) * torch.finfo(dtype).eps
    return (torch.arange(1000) + 0x4400).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_neighbouring_logits_are_told_apart(dtype):
    unit, data = StochasticUnit("straight_through", target_rate=0.1).to(dtype), [neighbours(dtype).reshape(10, 100)]
    assert calibrate_thresholds(unit, data)[""] == pytest.approx(0.1)
    assert share(unit, unit, data) == 0.1


@pytest.mark.parametrize("kept", [100, 1500, 20_000])
def test_subsampling_keeps_the_quantile(monkeypatch, kept):
    monkeypatch.setattr(calibration, "_KEPT", kept)
    unit, data = StochasticUnit("straight_through", target_rate=0.1), [torch.randn(10, 100) for _ in range(40)]
    reported = calibrate_thresholds(unit, data)[""]
    remaining = 40_000 if kept > 40_000 else kept / 4  # what is surely left after a halving, with slack
    error = 4 * math.sqrt(0.1 * 0.9 / remaining)
    assert abs(share(unit, unit, data) - 0.1) < error
    assert abs(reported - 0.1) < 1 / remaining + 1e-6
    first = unit.threshold.clone()
    calibrate_thresholds(unit, data)
    assert torch.equal(unit.threshold, first)


def test_subsampling_weighs_early_and_late_batches_alike(monkeypatch):
    monkeypatch.setattr(calibration, "_KEPT", 4000)
    unit = StochasticUnit("straight_through", target_rate=0.5)
    data = [torch.full((10, 100), float(index)) + torch.rand(10, 100) for index in range(40)]
    calibrate_thresholds(unit, data)
    assert abs(share(unit, unit, data) - 0.5) < 4 * math.sqrt(0.25 / 1000)


def test_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr(calibration, "_KEPT", 1000)
    largest = 0
    pick = calibration._Sample.settle

    def watch(sample):
        nonlocal largest
        largest = max(largest, sample.logits().numel())
        return pick(sample)

    monkeypatch.setattr(calibration._Sample, "settle", watch)
    calibrate_thresholds(StochasticUnit("straight_through", target_rate=0.1), [torch.randn(10, 50)] * 40)
    assert 250 < largest <= 1000


# ---------------------------------------------------------------- rates


def test_target_rate_overrides_the_units_own():
    net, data = nn.Sequential(layer(target_rate=0.1), layer(50, 40, target_rate=0.3)), batches()
    assert list(calibrate_thresholds(net, data).values()) == pytest.approx([0.1, 0.3], abs=1e-3)
    assert list(calibrate_thresholds(net, data, target_rate=0.2).values()) == pytest.approx([0.2, 0.2], abs=1e-3)
    assert [net[0].unit.target_rate, net[1].unit.target_rate] == [0.1, 0.3]


def test_units_without_a_rate_are_left_alone():
    net = nn.Sequential(layer(), StochasticUnit("straight_through", threshold=0.7))
    before = net[1].threshold.clone()
    assert list(calibrate_thresholds(net, batches())) == ["0.unit"]
    assert torch.equal(net[1].threshold, before)


def test_controllers_shift_is_seen():
    net = layer(sparsity=[FiringRateBias(0.1)])
    net(torch.randn(4, 6))
    net.sparsity[0].bias.copy_(torch.linspace(-50, 50, 50))
    data = batches()
    calibrate_thresholds(net, data)
    assert abs(share(net, net.unit, data) - 0.1) <= 1 / 3000 + 1e-6
    assert net.unit.threshold > 30


# ---------------------------------------------------------------- loaders


def test_data_loader_of_tuples():
    x = torch.randn(50, 6)
    loader = DataLoader(TensorDataset(x, torch.zeros(50)), batch_size=16)
    net, twin = layer(), layer()
    twin.load_state_dict(net.state_dict())
    calibrate_thresholds(net, loader)
    calibrate_thresholds(twin, [x])
    torch.testing.assert_close(net.unit.threshold, twin.unit.threshold)


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, 1), None),
        (lambda x: [x], None),
        (lambda x: {"x": x}, lambda model, batch: model(batch["x"])),
        (lambda x: (1, x), lambda model, batch: model(batch[1])),
    ],
)
def test_batches_of_any_kind(wrap, forward):
    net, twin, data = layer(), layer(), batches()
    twin.load_state_dict(net.state_dict())
    calibrate_thresholds(net, [wrap(x) for x in data], forward=forward)
    calibrate_thresholds(twin, [torch.cat(data)])
    assert torch.equal(net.unit.threshold, twin.unit.threshold)


def test_batches_of_other_sizes_and_empty_ones():
    net, twin, x = layer(), layer(), torch.randn(30, 6)
    twin.load_state_dict(net.state_dict())
    calibrate_thresholds(net, [x[:0], x[:1], x[1:1], x[1:]])
    calibrate_thresholds(twin, [x])
    assert torch.equal(net.unit.threshold, twin.unit.threshold)


def test_units_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = StochasticUnit("straight_through", threshold=None, target_rate=0.1)

        def forward(self, x):
            return self.unit(logits=x)

    assert calibrate_thresholds(Keyword(), [torch.randn(10, 10)]) == {"unit": pytest.approx(0.1)}


def test_no_gradient_and_no_training_state():
    net = layer(estimator="score_function", sparsity=[FiringRateBias(0.1)])
    calibrate_thresholds(net, [torch.ones(4, 6)])  # no tape needed
    assert net._penalty is None
    assert not net.sparsity[0].bias.any()
    assert all(p.grad is None for p in net.parameters())


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored(training):
    net = nn.Sequential(layer(), nn.Dropout(), layer(50, 40)).train(training)
    net[1].train(not training)
    modes = [module.training for module in net.modules()]
    calibrate_thresholds(net, batches())
    assert [module.training for module in net.modules()] == modes
    assert not any(unit.sample_in_eval for unit in (net[0].unit, net[2].unit))
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_modes_are_restored_after_exceptions(fails_at):
    net, calls = nn.Sequential(layer(), nn.Dropout(), layer(50, 40)), iter(range(100))

    def forward(model, batch):
        if next(calls) == fails_at:
            raise KeyError("mine")
        return model(batch)

    with pytest.raises(KeyError, match="mine"):
        calibrate_thresholds(net, batches(), forward=forward)
    assert all(module.training for module in net.modules())
    assert not any(unit.sample_in_eval for unit in (net[0].unit, net[2].unit))
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_dropout_is_off_while_calibrating():
    net, data = nn.Sequential(nn.Dropout(0.9), layer()), batches()
    calibrate_thresholds(net, data)
    assert abs(share(net, net[1].unit, data) - 0.1) <= 1 / 3000 + 1e-6


def test_inside_sampling_the_earlier_units_are_still_deterministic():
    net, data = nn.Sequential(layer(), layer(50, 40)), batches()
    with sampling(net):
        calibrate_thresholds(net, data)
        assert net[0].unit.sample_in_eval
    assert abs(share(net, net[1].unit, data) - 0.1) <= 1 / 2400 + 1e-6


# ---------------------------------------------------------------- bad arguments


def test_nothing_to_calibrate():
    for model in (nn.Linear(6, 2), StochasticUnit("straight_through"), layer(target_rate=None)):
        with pytest.raises(ValueError, match="model: holds no stochastic unit with a target_rate"):
            calibrate_thresholds(model, batches())


def test_gates_that_are_always_open_have_nothing_to_calibrate():
    net = nn.Sequential(layer(estimator="sigmoid"), layer(50, 40))
    assert list(calibrate_thresholds(net, batches())) == ["1.unit"]
    assert calibrate_thresholds(net[0], batches()) == {}
    net.eval()(torch.randn(3, 6))
    assert net[0].active_fraction == 1


def test_units_that_never_run():
    with pytest.raises(ValueError, match="ran none of its stochastic units"):
        calibrate_thresholds(layer(), batches(), forward=lambda model, batch: batch)


def test_loaders_without_data():
    for loader in ([], (), DataLoader(TensorDataset(torch.zeros(0, 6)))):
        with pytest.raises(ValueError, match="loader: yielded no batch"):
            calibrate_thresholds(layer(), loader)
    with pytest.raises(ValueError, match="loader: yielded only empty batches"):
        calibrate_thresholds(layer(), [torch.zeros(0, 6)])


@pytest.mark.parametrize("make", [iter, lambda data: (x for x in data), lambda data: map(torch.clone, data)])
def test_iterators_are_refused_before_a_batch_is_lost(make):
    net = layer()
    with pytest.raises(ValueError, match="loader: must allow several passes; give a list or a DataLoader"):
        calibrate_thresholds(net, make(batches()))
    assert net.unit.threshold.isnan()


def test_loader_that_yields_once_only():
    class Once:
        def __init__(self, data):
            self.data = iter(data)

        def __iter__(self):
            yield from self.data

    with pytest.raises(ValueError, match="yielded no batch on a second pass"):
        calibrate_thresholds(nn.Sequential(layer(), layer(50, 40)), Once(batches()))


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("bad", [0.0, 1.0, 1.5, math.nan, "0.1"])
def test_bad_rate(bad):
    with pytest.raises(ValueError, match="target_rate must lie strictly between 0 and 1"):
        calibrate_thresholds(layer(), batches(), target_rate=bad)


@pytest.mark.cpu
def test_data_with_nan():
    with pytest.raises(ValueError, match="x holds 1 values that are NaN"):
        calibrate_thresholds(layer(), [torch.tensor([[0.0, 0, 0, 0, 0, math.nan]])])


def test_logits_with_nan():
    unit = StochasticUnit("straight_through", threshold=None, target_rate=0.1)
    good, bad = torch.randn(5, 10), torch.full((5, 10), math.nan)
    with pytest.raises(ValueError, match="logits holds 50 values"):
        calibrate_thresholds(unit, [good, bad])
    assert unit.threshold.isnan()


def test_the_default_device_is_not_asked(monkeypatch):
    monkeypatch.setattr(calibration, "_KEPT", 100)
    unit, twin = (StochasticUnit("straight_through", target_rate=0.1) for _ in range(2))
    data = [torch.randn(10, 10) for _ in range(4)]
    calibrate_thresholds(twin, data)
    with torch.device("meta"):
        calibrate_thresholds(unit, data)
    assert torch.equal(unit.threshold, twin.threshold)
