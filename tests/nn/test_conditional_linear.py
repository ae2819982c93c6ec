"""Gater and ConditionalLinear: the formula by hand, state, gradients, bad arguments."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from jaxtyping import config
from torch import nn

from gatelet import StochasticUnit, Tape, sampling
from gatelet.estimators import ALL, Estimator, ScoreFunction
from gatelet.nn import ConditionalLinear, Gater
from gatelet.sparsity import AdaptiveL1, BetaNoise, FiringRateBias, KLRate, calibrate_thresholds, penalty

# what runs with one sample per example
ONE = [n for n, kind in ALL.items() if kind.needs != "objective" and kind.replicas == 1 and not kind.antithetic]
CLOSING = [name for name in ONE if ALL[name].rated]
every = pytest.mark.parametrize("name", ONE)


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def layer(**options) -> ConditionalLinear:
    return ConditionalLinear(6, 8, bottleneck=2, **options)


# ---------------------------------------------------------------- Gater


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6), (0, 6)])
def test_gater_shapes(shape):
    assert Gater(6, 9, bottleneck=4)(torch.randn(shape)).shape == (*shape[:-1], 9)


def test_gater_formula():
    gater, x = Gater(6, 9, bottleneck=4), torch.randn(3, 6)
    for parameter in gater.parameters():
        parameter.data.normal_()
    hidden = torch.tanh(x @ gater.hidden.weight.T + gater.hidden.bias)
    torch.testing.assert_close(gater(x), hidden @ gater.gates.weight.T + gater.gates.bias)
    assert gater.hidden.weight.shape == (4, 6)
    assert gater.gates.weight.shape == (9, 4)


def test_initial_weights():
    net = ConditionalLinear(100, 2000, bottleneck=50, group_size=2)
    for linear, gain in ((net.gater.hidden, 1.0), (net.gater.gates, 4.0), (net.expert, 1.0)):
        bound = gain * math.sqrt(6 / (linear.in_features + linear.out_features))
        assert linear.weight.abs().max() <= bound
        assert linear.weight.abs().max() > 0.99 * bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(linear.weight.mean().item()) < 0.05 * bound
    assert net.gater.gates.out_features == 1000
    assert not net.gater.hidden.bias.any()
    assert not net.expert.bias.any()


@pytest.mark.parametrize("name", [n for n in CLOSING if n != "rectifier"])
def test_gates_start_at_the_target_rate(name):
    bias = layer(estimator=name, target_rate=0.2).gater.gates.bias
    torch.testing.assert_close(ALL[name]().fire_probability(bias), torch.full((8,), 0.2))
    assert not layer(estimator=name, target_rate=None).gater.gates.bias.any()


@pytest.mark.parametrize("detach", [False, True])
def test_detached_input_gets_no_gradient_from_the_gates(detach):
    x, noise = torch.randn(3, 6, requires_grad=True), torch.rand(3, 8)
    net = layer(detach_gater_input=detach)
    logits = net.gater(x)
    assert (torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] is None) == detach
    gates = net.unit(logits, noise=noise).detach()
    by_layer, by_expert = (
        torch.autograd.grad(y.square().sum(), x)[0] for y in (net(x, noise=noise), net.expert(x) * gates)
    )
    assert torch.equal(by_layer, by_expert) == detach
    net(x, noise=noise).sum().backward()
    assert net.gater.hidden.weight.grad.any()


# ---------------------------------------------------------------- the layer's value


@every
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6), (0, 6)])
@pytest.mark.parametrize("group_size", [1, 4])
def test_formula(name, shape, group_size):
    net, x = layer(estimator=name, group_size=group_size), torch.randn(shape)
    net.expert.bias.data.normal_()
    logits = net.gater(x).detach()
    noise = net.unit.estimator.draw_noise(logits[None])[0]
    with Tape():
        y = net(x, noise=noise)
    gates = net.unit.estimator(logits, noise)
    assert gates.shape == (*shape[:-1], 8 // group_size)
    spread = torch.stack([gates[..., i // group_size] for i in range(8)], -1)
    torch.testing.assert_close(y, (x @ net.expert.weight.T + net.expert.bias) * spread)
    assert y.shape == (*shape[:-1], 8)
    if x.numel():
        assert net.active_fraction.item() == pytest.approx((gates != 0).float().mean().item())


@every
def test_gradient_of_every_parameter(name):
    net, x = layer(estimator=name), torch.randn(16, 6)
    with Tape() as tape:
        loss = net(x).square().sum(-1)
    (tape.surrogate(loss).mean() + penalty(net)).backward()
    for key, parameter in net.named_parameters():
        # A learned baseline's first layer has none as long as the second is zero.
        assert parameter.grad.any() or key.startswith("unit.estimator."), key
        assert parameter.grad.isfinite().all(), key


def test_group_shares_a_gate():
    net = layer(group_size=4, estimator="sigmoid")
    net.expert.weight.data.zero_()
    net.expert.bias.data.fill_(1.0)
    y = net(torch.randn(3, 6))
    assert torch.equal(y[:, :4], y[:, :1].expand(3, 4))
    assert torch.equal(y[:, 4:], y[:, 4:5].expand(3, 4))
    assert not torch.equal(y[:, 0], y[:, 4])


def test_noise_and_generator():
    for sparsity in ([], [BetaNoise(0.1)]):
        net, x = layer(sparsity=sparsity), torch.randn(30, 6)
        draws = [net(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        state = torch.get_rng_state()
        net(x, generator=torch.Generator())
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(net(x), net(x))


def test_active_fraction():
    net, x = layer(), torch.randn(3, 6)
    assert net.active_fraction.isnan()
    net.gater.gates.weight.data.zero_()
    net.gater.gates.bias.data = torch.tensor([-100.0, 100.0, -100.0, 100.0, -100.0, -100.0, -100.0, -100.0])
    net(x)
    assert net.active_fraction.item() == 0.25
    assert not net.active_fraction.requires_grad
    net.unit.threshold.fill_(200.0)
    net.eval()(x)
    assert net.active_fraction.item() == 0.0


def test_controllers_are_called_in_order_with_the_shifted_logits():
    net, x = layer(sparsity=[FiringRateBias(0.1), KLRate(0.1, weight=1.0)]), torch.randn(3, 6)
    net(x)
    penalty(net)
    net.sparsity[0].bias.copy_(torch.linspace(-1, 1, 8))
    logits = net.gater(x) + net.sparsity[0].bias
    net(x)
    torch.testing.assert_close(penalty(net), KLRate(0.1, weight=1.0).penalty(net.unit.estimator, logits, logits))


@pytest.mark.parametrize("name", CLOSING)
def test_default_controller(name):
    (control,) = layer(estimator=name, target_rate=0.2).sparsity
    assert type(control) is (AdaptiveL1 if name == "rectifier" else KLRate)  # its firing probability is 0 or 1
    assert control.target_rate == 0.2


@pytest.mark.parametrize("name", [name for name in ONE if name not in CLOSING])
def test_gates_that_settle_their_number_have_no_rate(name):
    net = layer(estimator=name, target_rate=0.2)
    assert net.unit.target_rate is None
    assert len(net.sparsity) == 0
    net(torch.randn(3, 6))
    assert penalty(net) == 0
    net.eval()(torch.randn(3, 6))
    if name in ("sigmoid", "noisy_sigmoid"):
        assert net.active_fraction == 1
    elif name in ("top_k", "simple"):
        assert net.active_fraction == 1 / net.units
    else:
        assert 0 < net.active_fraction <= 1


# ---------------------------------------------------------------- eval


@pytest.mark.cpu
@pytest.mark.parametrize("name", CLOSING)
def test_eval_needs_calibration(name):
    with pytest.raises(RuntimeError, match="no test-time threshold yet"):
        layer(estimator=name).eval()(torch.randn(20, 6))


@pytest.mark.parametrize("name", CLOSING)
def test_eval_is_deterministic_after_calibration(name):
    net, x = layer(estimator=name), torch.randn(20, 6)
    net.eval()
    with torch.no_grad(), sampling(net):
        net(x)
    calibrate_thresholds(net, [x])
    assert torch.equal(net(x), net(x))
    gates = net.unit.estimator.deterministic(net.gater(x), net.unit.threshold)
    torch.testing.assert_close(net(x), net.expert(x) * gates)


def test_no_target_rate_means_open_above_one_half():
    net, x = layer(target_rate=None), torch.randn(5, 6)
    assert len(net.sparsity) == 0
    assert net.unit.target_rate is None
    net(x)
    assert penalty(net) == 0
    torch.testing.assert_close(net.eval()(x), net.expert(x) * (net.gater(x).sigmoid() > 0.5))


def test_stacked_in_a_sequential():
    net = nn.Sequential(layer(estimator="score_function"), ConditionalLinear(8, 5, 1), nn.Linear(5, 2))
    x, sgd = torch.randn(16, 6), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        with Tape() as tape:
            loss = net(x).square().sum(-1)
        sgd.zero_grad()
        (tape.surrogate(loss).mean() + penalty(net)).backward()
        assert all(p.grad.any() for p in net.parameters())
        sgd.step()
    assert list(calibrate_thresholds(net, [x])) == ["0.unit", "1.unit"]
    assert net.eval()(x).shape == (16, 2)


def test_autocast_and_bfloat16(device):
    net, x = layer(), torch.randn(5, 6)
    with torch.autocast(device, torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.bfloat16
        net(x.bfloat16())
    (y.float().sum() + penalty(net)).backward()
    assert net.gater.hidden.weight.grad.dtype == torch.float32
    half = layer().to(torch.bfloat16)
    with warnings.catch_warnings():  # the kernels announce, once in a process, that they run dense here
        warnings.simplefilter("ignore")
        assert half(x.bfloat16()).dtype == torch.bfloat16
        penalty(half).backward()
        calibrate_thresholds(half, [x.bfloat16()])
        assert half.eval()(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_without_a_graph_break():
    net, x, noise = layer(), torch.randn(5, 6), torch.rand(5, 8)
    config.update("jaxtyping_disable", True)
    try:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        y = compiled(x, noise=noise)
        term = penalty(compiled)
    finally:
        config.update("jaxtyping_disable", False)
        torch.compiler.reset()
    torch.testing.assert_close(y, net(x, noise=noise))
    torch.testing.assert_close(term, penalty(net))


# ---------------------------------------------------------------- state


@every
@pytest.mark.parametrize("sparsity", [lambda: None, lambda: [FiringRateBias(0.1), AdaptiveL1(0.1), BetaNoise(0.1)]])
def test_state_dict_holds_everything(name, sparsity):
    x = torch.randn(20, 6)
    net, fresh = (nn.Sequential(layer(estimator=name, sparsity=sparsity())) for _ in range(2))
    with Tape() as tape:
        loss = net(x).sum(-1)
    tape.surrogate(loss)
    calibrate_thresholds(net, [x])
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    ours, theirs = net.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    # and training goes on as it would have
    torch.manual_seed(1)
    noise = net[0].unit.estimator.draw_noise(torch.zeros(1, 20, 8))[0]
    totals = []
    for model in (net, fresh):
        torch.manual_seed(2)
        with Tape() as tape:
            loss = model.train()[0](x, noise=noise).sum(-1)
        (tape.surrogate(loss).sum() + penalty(model)).backward()
        totals.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copy_between_forward_and_backward(name, clone):
    net, x = nn.Sequential(layer(estimator=name)), torch.randn(5, 6)
    with Tape() as tape:
        loss = net(x).square().sum(-1)
    twin = clone(net)
    (tape.surrogate(loss).mean() + penalty(net)).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in twin.parameters())
    with pytest.raises(RuntimeError, match="has not run in training"):
        penalty(twin)
    with Tape():
        twin(x)
    penalty(twin)


def test_copy_after_inference_mode():
    net = layer()
    with torch.inference_mode():
        net(torch.randn(3, 6))
    twin = copy.deepcopy(net).to(torch.float64)
    twin(torch.randn(3, 6).double()).sum().backward()
    net(torch.randn(3, 6)).sum().backward()


def test_meta_device_and_repr(device):
    with torch.device("meta"):
        net = layer()
    assert "6, 8, group_size=1" in repr(net)
    net = net.to_empty(device=device)
    source = layer()
    calibrate_thresholds(source, [torch.randn(9, 6)])
    net.load_state_dict(source.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(net.eval()(x), source.eval()(x))


# ---------------------------------------------------------------- bad arguments


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("build", [lambda: layer(), lambda: Gater(6, 8, bottleneck=4)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (torch.zeros(3, 7), ValueError, r"x must have 6 features in its last dimension, but has shape \(3, 7\)"),
        (torch.zeros(6, 3), ValueError, "x must have 6 features"),
        (torch.zeros(3, 0), ValueError, "x must have 6 features"),
        (torch.zeros(3, 1), ValueError, "x must have 6 features"),
        (torch.tensor(1.0), ValueError, "x must have at least one dimension"),
        pytest.param(torch.full((3, 6), math.nan), ValueError, "x holds 18 values that are NaN", marks=pytest.mark.cpu),
        pytest.param(torch.full((3, 6), math.inf), ValueError, "x holds 18 values", marks=pytest.mark.cpu),
        (torch.zeros(3, 6, dtype=torch.int64), TypeError, r"x must have a floating dtype, not torch\.int64"),
        (torch.zeros(3, 6).double(), TypeError, r"x has dtype torch\.float64, but the layer's weights have torch\.fl"),
        ([0.0] * 6, TypeError, r"x must be a torch\.Tensor, not list"),
    ],
)
def test_bad_inputs(build, training, bad, error, says):
    with pytest.raises(error, match=says):
        build().train(training)(bad)


@pytest.mark.usefixtures("as_user")
def test_bad_noise():
    for shape in ((3, 8), (3, 4), (2,)):
        with pytest.raises(ValueError, match=r"noise must be a tensor of shape \(3, 2\)"):
            layer(group_size=4)(torch.zeros(3, 6), noise=torch.rand(shape))


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group_size": 3}, "group_size must divide out_features: 3 does not divide 8"),
        ({"group_size": 16}, "group_size must divide out_features: 16 does not divide 8"),
        ({"group_size": 0}, "group_size must be an integer of at least 1"),
        ({"group_size": 2.0}, "group_size must be an integer of at least 1"),
        ({"in_features": 0}, "in_features must be an integer of at least 1, not 0"),
        ({"out_features": -8}, "out_features must be an integer of at least 1, not -8"),
        ({"out_features": 8.0}, "out_features must be an integer of at least 1"),
        ({"bottleneck": 0}, "bottleneck must be an integer of at least 1"),
        ({"bottleneck": True}, "bottleneck must be an integer of at least 1"),
        ({"target_rate": 0.0}, "target_rate must lie strictly between 0 and 1"),
        ({"target_rate": 10}, "target_rate must lie strictly between 0 and 1"),
        ({"estimator": "straight-through"}, "did you mean 'straight_through'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        ConditionalLinear(**{"in_features": 6, "out_features": 8, "bottleneck": 2, **options})


@pytest.mark.usefixtures("as_user")
def test_bad_estimators():
    class Twice(Estimator):
        needs = "objective"

    with pytest.raises(ValueError, match="estimator: Twice evaluates the objective"):
        layer(estimator=Twice())
    with pytest.raises(TypeError, match=r"ScoreFunction \(a class: call it\)"):
        layer(estimator=ScoreFunction)


def test_rate_penalty_of_gates_without_a_rate():
    net = layer(estimator="rectifier", sparsity=[KLRate(0.1)])
    with pytest.raises(ValueError, match="KLRate: the firing probability of Rectifier"):
        net(torch.randn(3, 6))


def test_score_function_layer_needs_a_tape():
    net = layer(estimator="score_function")
    with pytest.raises(RuntimeError, match="found no tape"):
        net(torch.randn(3, 6))
    assert isinstance(net.unit, StochasticUnit)
