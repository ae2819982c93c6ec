"""ConditionalFFN: the formula by hand on both paths, masks, counts, bad arguments."""

import copy

import pytest
import torch
from jaxtyping import config
from torch import nn

from gatelet import Tape
from gatelet.nn import ConditionalFFN, ConditionalLinear, fully_open, masking
from gatelet.nn.conditional_ffn import ACTIVATIONS
from gatelet.sparsity import AdaptiveL1, FiringRateBias, KLRate, calibrate_thresholds, penalty

BY_HAND = {
    "relu": lambda z: z.clamp_min(0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": torch.tanh,
}


@pytest.fixture
def as_user():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def layer(d_model=8, d_ff=32, bottleneck=4, **options) -> ConditionalFFN:
    net = ConditionalFFN(d_model, d_ff, bottleneck, **options)
    for parameter in (p for p in net.parameters() if p.dim() == 1):
        parameter.data += torch.randn_like(parameter) / 2
    return net


def by_hand(net: ConditionalFFN, x, gates):
    z = x @ net.up.weight.T + net.up.bias
    act = BY_HAND[net.activation]
    hidden = act(z) if net.glu is None else act(x @ net.glu.weight.T + net.glu.bias) * z
    each = torch.stack([gates[..., i // net.group_size] for i in range(net.units)], -1)
    return (hidden * each) @ net.down.weight.T + net.down.bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (0, 8)])
def test_formula(activation, gated, shape):
    net, x = layer(activation=activation, gated=gated, group_size=4), torch.randn(shape)
    noise = torch.rand(*shape[:-1], 8)
    gates = net.unit.estimator(net.gater(x), noise)
    torch.testing.assert_close(net(x, noise=noise), by_hand(net, x, gates))


@pytest.mark.parametrize(
    "name",
    [
        "noisy_rectifier",
        "smooth_times_stochastic",
        "straight_through",
        "straight_through_sampled",
        "score_function",
    ],
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@pytest.mark.parametrize("sizes", [(8, 32, 4), (192, 768, 4)])  # dense by itself; through the kernels
@pytest.mark.parametrize("group_size", [1, 16])
def test_training_is_that_of_the_formula(name, gated, activation, sizes, group_size):
    net = layer(*sizes, estimator=name, activation=activation, gated=gated, group_size=group_size)
    x = torch.randn(64, sizes[0], requires_grad=True)
    noise = net.unit.estimator.draw_noise(torch.zeros(1, 64, sizes[1] // group_size))[0]
    with Tape():
        y = net(x, noise=noise)
        want = by_hand(net, x, net.unit.estimator(net.gater(x), noise))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    learns = [p for key, p in net.named_parameters() if name != "score_function" or not key.startswith("gater")]
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
    have = torch.autograd.grad((y * weight).sum(), [x, *learns])
    for a, b in zip(have, torch.autograd.grad((want * weight).sum(), [x, *learns]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("gated", [False, True])
def test_closed_units_are_not_read(gated):
    net, x = layer(192, 768, 4, gated=gated, target_rate=0.1), torch.randn(64, 192)
    calibrate_thresholds(net, [x])
    net.eval()
    gates, _ = net.decide(x)
    want = by_hand(net, x, gates)
    closed = gates.sum(0) == 0
    assert closed.any()
    with torch.no_grad():
        for linear in (net.up, net.glu) if gated else (net.up,):
            linear.weight[closed] = torch.nan
        net.down.weight[:, closed] = torch.nan
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: layer(d_ff=64), lambda: ConditionalLinear(8, 64, 4)])
def test_padding_counts_nowhere(make):
    net, x, noise = make(), torch.randn(2, 5, 8), torch.rand(2, 5, 64)
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    y = net(x, mask=mask, noise=noise)
    share, term = net.active_fraction, penalty(net)
    alone = make()
    alone.load_state_dict(net.state_dict())
    want = alone(x[mask], noise=noise[mask])
    torch.testing.assert_close(y[mask], want)
    assert share == alone.active_fraction
    torch.testing.assert_close(term, penalty(alone))
    assert int(net.tokens) == 6
    assert torch.equal(net.opened, alone.opened)
    if isinstance(net, ConditionalFFN):
        assert torch.equal(y[~mask], net.down.bias.expand(4, 8))
    # what stands at padding changes nothing, no gradient comes from there
    other = torch.where(mask[..., None], x, 100.0).requires_grad_()
    z = net(other, mask=mask, noise=noise)
    torch.testing.assert_close(z[mask], y[mask])
    (z.sum() + penalty(net)).backward()
    assert not other.grad[~mask].any()


def test_padding_sends_no_signal_to_score_function_gates():
    start, x = layer(estimator="score_function"), torch.randn(4, 8)
    found = []
    for fill in (0.0, 5.0):
        net = copy.deepcopy(start)
        x[2:] = fill
        with Tape() as tape:
            y = net(x, mask=torch.tensor([True, True, False, False]), noise=torch.linspace(0, 1, 128).view(4, 32))
        tape.surrogate(y[:, 0].detach()).sum().backward()
        found.append(net.gater.hidden.weight.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_a_mask_for_the_whole_model():
    net, x = nn.Sequential(layer(), layer()), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with masking(net, mask):
        net(x)
    assert [int(each.tokens) for each in net] == [3, 3]
    net(x)
    assert [int(each.tokens) for each in net] == [9, 9]


def test_calibration_leaves_padding_out():
    net, x = layer(target_rate=0.25), torch.randn(1, 200, 8)
    mask = torch.arange(200)[None] < 100
    calibrate_thresholds(net, [torch.where(mask[..., None], x, 50.0)], forward=lambda m, b: m(b, mask=mask))
    net.eval()(x[mask])
    assert net.active_fraction.item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.usefixtures("as_user")
def test_bad_masks():
    for mask in (torch.ones(3), torch.ones(2, 3, 8), [True]):
        with pytest.raises(ValueError, match=r"mask must be one boolean per token, shape \(2, 3\)"):
            layer()(torch.randn(2, 3, 8), mask=mask)


def test_counts():
    net = layer()
    net.gater.gates.weight.data.zero_()
    net.gater.gates.bias.data = torch.tensor([-100.0, 100.0]).repeat(16)
    net(torch.randn(3, 4, 8))
    net(torch.randn(5, 8))
    assert torch.equal(net.opened, torch.tensor([0, 17]).repeat(16))
    assert int(net.tokens) == 17
    assert net.active_fraction == 0.5
    net.eval()
    assert not net.opened.any()
    assert "opened" not in net.state_dict()


@pytest.mark.parametrize("gated", [False, True])
def test_fully_open(gated):
    net, x = layer(gated=gated), torch.randn(3, 8)
    for mode in (True, False):
        net.train(mode)
        with fully_open(net):
            torch.testing.assert_close(net(x), by_hand(net, x, torch.ones(3, 32)))
            assert penalty(net) == 0
        assert int(net.tokens) == 0
    with pytest.raises(ValueError, match="holds no conditional layer"), fully_open(nn.Linear(2, 2)):
        pass


@pytest.mark.cpu
def test_fully_open_ends_with_the_block():
    net, x = layer().eval(), torch.randn(3, 8)
    with fully_open(net):
        net(x)
    with pytest.raises(RuntimeError, match="no test-time threshold"):
        net(x)


def test_dropout_is_on_the_hidden_layer():
    net, x = layer(dropout=0.5, target_rate=None), torch.randn(400, 8)
    with torch.no_grad():
        net.down.weight.copy_(torch.eye(32)[:8] * 1.0)
        with fully_open(net):
            hidden = net(x) - net.down.bias
            assert (hidden == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
            assert not (net.eval()(x) - net.down.bias == 0).any()
        noise = torch.zeros(400, 32)
        assert (net.train()(x, noise=noise) - net.down.bias == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_rate_is_held_over_tokens():
    torch.manual_seed(1)
    net, x = layer(d_ff=64, target_rate=0.25, sparsity=[KLRate(0.25, weight=1.0)]), torch.randn(16, 20, 8)
    net.gater.gates.bias.data.fill_(2.0)
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(150):
        loss = net(x).square().mean() + penalty(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net.active_fraction.item() == pytest.approx(0.25, abs=0.05)


def test_default_controllers_and_estimators():
    assert type(layer(estimator="rectifier").sparsity[0]) is AdaptiveL1
    assert len(layer(estimator="sigmoid").sparsity) == 0


def test_autocast_and_bfloat16(device):
    net, x = layer(), torch.randn(5, 8)
    with torch.autocast(device, torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.bfloat16
    (y.float().sum() + penalty(net)).backward()
    assert net.up.weight.grad.dtype == torch.float32


def test_repr():
    text = repr(layer(activation="silu", gated=True, group_size=4))
    assert "ConditionalFFN(\n  8, 32, group_size=4, activation='silu', gated=True" in text


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group_size": 3}, "group_size must divide d_ff: 3 does not divide 32"),
        ({"d_model": 0}, "d_model must be an integer of at least 1"),
        ({"d_ff": 8.0}, "d_ff must be an integer of at least 1"),
        ({"target_rate": 1.0}, "target_rate must lie strictly between 0 and 1"),
        ({"activation": "gulu"}, "unknown activation 'gulu'; did you mean 'gelu'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        (
            {"bottleneck": 12},
            r"gater: it costs 960 FLOPs per token, but closing 90% of the 32 units saves only 922 of their 1,024; "
            r"take a bottleneck far under 11",
        ),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        ConditionalFFN(**{"d_model": 8, "d_ff": 32, "bottleneck": 4, **options})


def the_long_way(net: ConditionalFFN) -> ConditionalFFN:
    twin = copy.deepcopy(net)
    twin.gater.register_forward_hook(lambda *_: None)  # whoever listens to the gater wants it run as a module
    return twin


@pytest.mark.parametrize("shape", [(8,), (1, 8), (70, 8), (2, 5, 8), (0, 8)])
@pytest.mark.parametrize("estimator", ["straight_through", "noisy_rectifier", "hard_concrete", "rectifier"])
@pytest.mark.parametrize("shifted", [False, True])
def test_test_mode_is_the_same_the_short_way_and_the_long_one(shape, estimator, shifted):
    net = layer(estimator=estimator, group_size=2, sparsity=[FiringRateBias(0.1)] if shifted else None)
    calibrate_thresholds(net, [torch.randn(200, 8)])
    net, x = net.eval(), torch.randn(shape)
    slow = the_long_way(net)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(net(x), slow(x), rtol=0, atol=0)
            torch.testing.assert_close(net.active_fraction, slow.active_fraction, equal_nan=True)
    torch.testing.assert_close(net.opened, slow.opened)
    assert net.tokens == slow.tokens
    torch.testing.assert_close(net(x).detach(), slow(x).detach())  # with gradients on, there is no short way


@pytest.mark.cpu
@pytest.mark.usefixtures("as_user")
def test_the_short_way_refuses_what_the_long_one_does():
    net = layer().eval()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no test-time threshold"):
            net(torch.randn(3, 8))
        calibrate_thresholds(net, [torch.randn(200, 8)])
        for bad in (float("nan"), float("inf")):
            x = torch.randn(3, 8)
            x[1, 2] = bad
            with pytest.raises(ValueError, match="x holds 1 values that are NaN or infinite"):
                net(x)
        with pytest.raises(ValueError, match="must have 8 features"):
            net(torch.randn(3, 9))
        with pytest.raises(ValueError, match="at least one dimension"):
            net(torch.tensor(1.0))
        with pytest.raises(TypeError, match="dtype"):
            net(torch.randn(3, 8).double())
        net.gater.gates.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="logits holds 3 values"):
            net(torch.randn(3, 8))
        net.gater.hidden.weight.fill_(1e38)  # overflows in the middle and is right all the same
        net.gater.gates.weight.zero_()
        assert net(torch.full((3, 8), 100.0)).isfinite().all()
