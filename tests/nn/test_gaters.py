"""Gaters as parts: each name, and any module, in every layer; the two stages open what one stage would."""

import copy
import pickle

import pytest
import torch
from jaxtyping import config
from torch import nn
from torch.nn import functional as F

import gatelet
from gatelet.estimators import ALL
from gatelet.nn import ConditionalFFN, ConditionalLinear, Gater, TwoStageGater
from gatelet.nn.gaters import CLOSED, resolve
from gatelet.sparsity import calibrate_thresholds

USUAL = [n for n, kind in ALL.items() if kind.needs != "objective" and kind.replicas == 1 and not kind.antithetic]


class Own(nn.Module):
    """What a user may write: neither `start_at` nor `flops`."""

    def __init__(self, width=20, gates=60):
        super().__init__()
        self.first, self.last = nn.Linear(width, 5), nn.Linear(5, gates)
        self.norm = nn.BatchNorm1d(5)  # refuses a single example in training: the probe must not train

    def forward(self, x):
        return self.last(self.norm(self.first(x).flatten(0, -2))).view(*x.shape[:-1], -1)


def made(gater, group_size=1, **options):
    torch.manual_seed(0)
    own = Own(20, 120 // group_size) if gater == "own" else gater
    bottleneck = None if gater == "own" else 4
    return ConditionalLinear(20, 120, bottleneck, gater=own, group_size=group_size, **options)


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------- every gater, every estimator


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("gater", ["mlp", "two_stage", "own"])
def test_every_estimator_trains_every_gater(gater, name):
    net, x = made(gater, estimator=name), torch.randn(64, 20)
    with gatelet.Tape() as tape:
        losses = net(x).square().sum(1)
    (tape.surrogate(losses).mean() + gatelet.sparsity.penalty(net)).backward()
    for parameter in net.gater.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("gater", ["mlp", "two_stage", "own"])
def test_rate_threshold_and_report(gater, group_size):
    net, x = made(gater, group_size, target_rate=0.2), torch.randn(500, 20)
    assert calibrate_thresholds(net, [x]) == {"unit": pytest.approx(0.2, abs=1e-3)}
    net.eval()(x)
    row = gatelet.report(net)[""]
    assert row.open_share == pytest.approx(0.2, abs=1e-3)
    groups = 120 // group_size
    if gater == "mlp":
        assert row.flops_gater == 2 * 4 * (20 + groups)
    elif gater == "own":
        assert row.flops_gater == 2 * 5 * (20 + groups)
    else:
        stage = net.gater.groups.out_features
        assert 2 * 4 * (20 + stage) < row.flops_gater < 2 * 4 * (20 + stage + groups)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gater", ["two_stage", "own"])
def test_in_a_feed_forward_layer(gater, gated):
    torch.manual_seed(0)
    own, bottleneck = (Own(20, 60), None) if gater == "own" else (gater, 4)
    net = ConditionalFFN(20, 60, bottleneck, gated=gated, gater=own, target_rate=0.3)
    x = torch.randn(2, 30, 20)
    calibrate_thresholds(net, [x])
    gates = net.eval().decide(x)[0]
    hidden = F.gelu(net.up(x)) if net.glu is None else F.gelu(net.glu(x)) * net.up(x)
    torch.testing.assert_close(net(x), net.down(hidden * gates))
    assert float(gates.mean()) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("gater", ["two_stage", "own"])
def test_in_a_converted_model(gater):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 20))
    model = copy.deepcopy(teacher)
    own, bottleneck = (Own(20, 60), None) if gater == "own" else (gater, 4)
    gatelet.convert(model, target_rate=0.3, bottleneck=bottleneck, gater=own)
    if gater == "own":
        assert model[0].gating.gater is not own  # a copy: other blocks get theirs
    found = gatelet.distil(model, teacher, list(torch.randn(12, 64, 20)), steps=60, every=20)
    assert found.errors["0.gating"] < found.first_errors["0.gating"]
    assert found.open_share["0.gating"] == pytest.approx(0.3, abs=0.05)


# ---------------------------------------------------------------- two stages


def test_the_logit_is_that_of_two_independent_decisions():
    gater, x = TwoStageGater(6, 12, bottleneck=5, groups=3).double(), torch.randn(4, 6, dtype=torch.float64)
    hidden = torch.tanh(gater.hidden(x))
    both = gater.groups(hidden).sigmoid().repeat_interleave(4, dim=-1) * gater.gates(hidden).sigmoid()
    torch.testing.assert_close(gater(x), both.logit())


@pytest.mark.parametrize("shape", [(50,), (5, 10), (0,)])
def test_what_is_left_out_would_have_been_closed(shape):
    gater, x = TwoStageGater(6, 40, bottleneck=5, groups=8).eval(), torch.randn(*shape, 6)
    limit = torch.tensor(-1.5)
    every, some = gater(x), gater(x, limit)
    assert torch.equal(every > limit, some > limit)
    torch.testing.assert_close(some[some != CLOSED], every[some != CLOSED])
    if x.numel():
        assert (some == CLOSED).any()


def test_a_closed_groups_weights_are_not_read():
    net, x = made("two_stage").eval(), torch.randn(1, 20)
    calibrate_thresholds(net, [torch.randn(100, 20)])
    with torch.no_grad():
        want = net(x)
        hidden = torch.tanh(net.gater.hidden(x))
        closed = (net.gater.groups(hidden)[0] <= net.unit.threshold).repeat_interleave(
            120 // net.gater.groups.out_features
        )
        assert closed.any()
        net.gater.gates.weight[closed] = torch.nan
        torch.testing.assert_close(net(x), want)


def test_who_listens_to_the_unit_gets_all_logits():
    net, x = made("two_stage"), torch.randn(100, 20)
    calibrate_thresholds(net, [x])
    net.eval()
    alone, seen = net(x), []
    hook = net.unit.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(net(x), alone)
    hook.remove()
    assert (seen[0] > CLOSED).all()


def test_the_cost_is_what_was_computed():
    net, x = made("two_stage"), torch.randn(100, 20)
    calibrate_thresholds(net, [x])
    gater, groups = net.gater, net.gater.groups.out_features
    net.train().eval()
    assert net.flops_gater == round(2 * 4 * (20 + groups + gater.group_rate * 120))
    net(x)
    share = (gater.groups(torch.tanh(gater.hidden(x))) > net.unit.threshold).float().mean().item()
    assert net.flops_gater == pytest.approx(2 * 4 * (20 + groups + share * 120), abs=1)


def test_the_penalty_holds_the_share_of_groups():
    gater, x = TwoStageGater(6, 40, bottleneck=5, groups=8, group_rate=0.25), torch.randn(200, 6)
    optimizer = torch.optim.Adam(gater.parameters(), lr=0.02)
    with torch.no_grad():
        gater.groups.bias.fill_(2.0)
    for _ in range(400):
        gater(x)
        optimizer.zero_grad()
        gater.penalty().backward()
        optimizer.step()
    rates = gater.groups(torch.tanh(gater.hidden(x))).sigmoid().mean(0)
    torch.testing.assert_close(rates, torch.full((8,), 0.25), atol=0.03, rtol=0)
    gater(x)
    only = gater.penalty(torch.arange(200) < 50)
    rates = gater.groups(torch.tanh(gater.hidden(x[:50]))).sigmoid().mean(0)
    kl = 0.25 * (0.25 / rates).log() + 0.75 * (0.75 / (1 - rates)).log()
    torch.testing.assert_close(only, gater.weight * kl.sum())


def test_gates_start_at_the_target():
    net = made("two_stage", target_rate=0.05)
    probability = net.gater(torch.zeros(1, 20)).sigmoid()
    torch.testing.assert_close(probability, torch.full((1, 120), 0.05))


def test_it_can_be_copied_and_pickled():
    net, x = made("two_stage"), torch.randn(30, 20)
    net(x)  # keeps a graph
    copy.deepcopy(net)
    again = pickle.loads(pickle.dumps(net))
    calibrate_thresholds(net, [x])
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(x), net.eval()(x))


# ---------------------------------------------------------------- what is refused


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"gater": "mpl"}, ValueError, "unknown gater 'mpl'; did you mean 'mlp'"),
        ({"gater": 3}, TypeError, "gater must be a name .* or a module, not int"),
        ({"bottleneck": None}, ValueError, "bottleneck: must be given"),
        ({"gater": Own(20, 60)}, ValueError, "bottleneck: is for a gater by name; gater is a Own"),
        ({"gater": Own(20, 60), "bottleneck": None, "detach_gater_input": True}, ValueError, "detach_gater_input: is"),
        (
            {"gater": Own(20, 61), "bottleneck": None},
            ValueError,
            r"gater: must give \(..., 60\) logits, one per gate, but gives \(1, 61\) for an input \(1, 20\)",
        ),
        ({"gater": Own(21, 60), "bottleneck": None}, ValueError, r"gater: does not take an input \(..., 20\)"),
        ({"bottleneck": 30}, ValueError, "it costs 4,800 FLOPs .* take a bottleneck far under 13"),
        (
            {"gater": TwoStageGater(20, 60, 4, group_rate=0.3), "bottleneck": None, "target_rate": 0.4},
            ValueError,
            "group_rate: must lie above target_rate 0.4, and is 0.3",
        ),
    ],
)
def test_bad_gaters(options, error, says):
    with pytest.raises(error, match=says):
        ConditionalLinear(20, 60, **{"bottleneck": 4, **options})


def test_of_a_module_that_saves_nothing_a_warning_tells():
    with pytest.warns(UserWarning, match="it costs 4,800 FLOPs per token, .* saves only 2,160 of their 2,400"):
        ConditionalLinear(20, 60, gater=nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 60)))


def test_groups_must_divide_the_gates():
    with pytest.raises(ValueError, match="groups must divide the 60 gates: 7 does not"):
        TwoStageGater(20, 60, bottleneck=4, groups=7)


def test_a_gater_is_left_in_its_mode():
    own = Own(20, 60).train()
    ConditionalLinear(20, 60, gater=own)
    assert own.norm.training
    assert own.norm.num_batches_tracked == 0


def test_a_block_that_a_gater_does_not_fit_is_left():
    model = nn.Sequential(
        nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 20), nn.Linear(20, 80), nn.ReLU(), nn.Linear(80, 9)
    )
    made = gatelet.convert(model, target_rate=0.3, gater=Own(20, 60))
    assert list(made.converted) == ["0"]
    assert "gater: must give (..., 80) logits" in made.left["3"]


def test_a_name_is_a_new_gater():
    assert type(resolve("mlp", 6, 8, 2)) is Gater
    assert type(resolve("two_stage", 6, 8, 2)) is TwoStageGater
