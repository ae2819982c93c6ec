"""Tape and surrogate: whose gradient is added to which loss, and what is said about losses that do not fit."""

import threading

import pytest
import torch
from jaxtyping import config
from torch import nn

import gatelet
from gatelet import StochasticUnit, Tape, surrogate
from gatelet.estimators import ALL, ScoreFunction
from gatelet.estimators._noise import NONE

BERNOULLI = {name: kind for name, kind in ALL.items() if "bernoulli" in kind.kinds}
PATH = [name for name, kind in ALL.items() if kind.needs == "path"]


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def reinforce(baseline="none") -> StochasticUnit:
    return StochasticUnit(ScoreFunction(baseline=baseline))


def leaf(*shape) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


# ---------------------------------------------------------------- value and gradient


@pytest.mark.parametrize(
    ("logit_shape", "loss_shape"),
    [((5, 4), (5,)), ((5, 3, 4), (5,)), ((5, 3, 4), (5, 3)), ((5, 3, 2, 4), (5, 3)), ((4,), ()), ((1, 4), (1,))],
)
def test_gradient_is_the_formula(logit_shape, loss_shape):
    logits, loss = leaf(*logit_shape), torch.randn(loss_shape) * 100
    with Tape() as tape:
        gates = reinforce()(logits)
    assert not gates.requires_grad
    total = tape.surrogate(loss)
    assert torch.equal(total, loss)
    total.sum().backward()
    middle = (1,) * (len(logit_shape) - len(loss_shape))
    torch.testing.assert_close(logits.grad, (gates - logits.detach().sigmoid()) * loss.reshape(*loss_shape, *middle))


def test_mean_divides_by_the_batch():
    logits, loss = leaf(5, 4), torch.rand(5)
    with Tape() as tape:
        gates = reinforce()(logits)
    tape.surrogate(loss).mean().backward()
    torch.testing.assert_close(logits.grad, (gates - logits.detach().sigmoid()) * loss[:, None] / 5)


@pytest.mark.parametrize("baseline", ["per_unit", "running_mean"])
def test_baseline_is_that_of_earlier_batches(baseline):
    unit, losses = reinforce(baseline), [torch.rand(6) + 3, torch.rand(6) + 5]
    top = bottom = torch.zeros(())
    for loss in losses:
        logits = leaf(6, 4)
        with Tape() as tape:
            gates = unit(logits)
        tape.surrogate(loss).sum().backward()
        difference = gates - logits.detach().sigmoid()
        expected = top / bottom if bottom.any() else 0.0
        torch.testing.assert_close(logits.grad, difference * (loss[:, None] - expected))
        weight = difference.square() if baseline == "per_unit" else torch.ones(6, 1)
        top = 0.9 * top + 0.1 * (weight * loss[:, None]).mean(0)
        bottom = 0.9 * bottom + 0.1 * weight.mean(0)


def test_loss_keeps_its_own_gradient():
    net, x = nn.Sequential(nn.Linear(5, 4), reinforce(), nn.Linear(4, 1)), torch.randn(8, 5)
    with Tape() as tape:
        loss = net(x).squeeze(-1).square()
    own = torch.autograd.grad(loss.mean(), net[2].weight, retain_graph=True)[0]
    tape.surrogate(loss).mean().backward()
    assert torch.equal(net[2].weight.grad, own)
    assert net[0].weight.grad.any()


def test_stacked_layers_all_receive_the_loss():
    lower, upper = nn.Linear(5, 4), nn.Linear(4, 3)
    one, two = reinforce(), reinforce()
    with Tape() as tape:
        first = lower(torch.randn(6, 5))
        first.retain_grad()
        h1 = one(first)
        second = upper(h1)
        second.retain_grad()
        h2 = two(second)
    loss = torch.randn(6)
    tape.surrogate(loss).sum().backward()
    torch.testing.assert_close(first.grad, (h1 - first.detach().sigmoid()) * loss[:, None])
    torch.testing.assert_close(second.grad, (h2 - second.detach().sigmoid()) * loss[:, None])


def test_loss_that_requires_no_grad():
    logits, loss = leaf(5, 4), torch.rand(5)
    with Tape() as tape:
        reinforce()(logits)
    total = tape.surrogate(loss)
    assert total.requires_grad
    assert not loss.requires_grad


@pytest.mark.parametrize("name", PATH)
def test_tape_with_path_units_changes_no_bit(name):
    grads = []
    for taped in (False, True):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 4), StochasticUnit(name), nn.Linear(4, 3))
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        if taped:
            with Tape() as tape:
                loss = nn.functional.cross_entropy(net(x), y, reduction="none")
            total = tape.surrogate(loss)
            assert total is loss
        else:
            total = nn.functional.cross_entropy(net(x), y, reduction="none")
        total.mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_path_units_accept_any_loss():
    with Tape() as tape:
        loss = StochasticUnit("straight_through")(leaf(4, 3)).mean()
    assert tape.surrogate(loss) is loss


def test_gradients_accumulate_over_two_tapes():
    logits, expected = leaf(4, 3), torch.zeros(4, 3)
    unit = reinforce()
    for _ in range(2):
        loss = torch.rand(4)
        with Tape() as tape:
            gates = unit(logits)
        tape.surrogate(loss).sum().backward()
        expected += (gates - logits.detach().sigmoid()) * loss[:, None]
    torch.testing.assert_close(logits.grad, expected)


def test_two_tapes_before_one_backward():
    logits, unit, totals, expected = leaf(4, 3), reinforce(), [], torch.zeros(4, 3)
    for _ in range(2):
        with Tape() as tape:
            gates = unit(logits)
        totals.append(tape.surrogate(torch.ones(4)))
        expected += gates - logits.detach().sigmoid()
    sum(totals).sum().backward()
    torch.testing.assert_close(logits.grad, expected)


def test_empty_batch():
    logits = leaf(0, 3)
    for baseline in ("none", "running_mean", "per_unit"):
        unit = reinforce(baseline)
        with Tape() as tape:
            unit(logits)
            unit(logits)
        total = tape.surrogate(torch.zeros(0))
        assert total.shape == (0,)
        total.sum().backward()
        assert not unit.estimator.numerator.isnan().any()


@pytest.mark.parametrize("reduced", [torch.bfloat16, torch.float64])
def test_loss_and_logits_may_differ_in_dtype(reduced):
    logits = torch.randn(4, 3, dtype=reduced, requires_grad=True)
    loss = torch.rand(4)
    with Tape() as tape:
        gates = reinforce()(logits)
    total = tape.surrogate(loss)
    assert torch.equal(total, loss)
    assert total.dtype == loss.dtype
    total.sum().backward()
    expected = (gates.double() - logits.detach().double().sigmoid()) * loss[:, None]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-2, atol=1e-6)


def test_bfloat16_autocast():
    net = nn.Sequential(nn.Linear(5, 4), reinforce("per_unit"), nn.Linear(4, 3))
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        with Tape() as tape:
            out = net(x)
            loss = nn.functional.cross_entropy(out, y, reduction="none")
        total = tape.surrogate(loss)
    assert out.dtype == torch.bfloat16
    assert torch.equal(total, loss)
    total.mean().backward()
    assert net[0].weight.grad.dtype == torch.float32
    assert net[0].weight.grad.isfinite().all()
    assert net[0].weight.grad.any()
    assert net[1].estimator.numerator.dtype == torch.float32


# ---------------------------------------------------------------- a unit that runs several times


@pytest.mark.parametrize("baseline", ["per_unit", "running_mean", "none"])
@pytest.mark.parametrize("loss_shape", [(6,), (6, 2)])
def test_unit_used_twice_subtracts_the_same_earlier_baseline(baseline, loss_shape):
    """The second use must not see this batch's loss in its baseline: it would be biased (Corollary 1)."""
    unit = reinforce(baseline)
    with Tape() as tape:
        unit(leaf(6, 2, 4))
    tape.surrogate(torch.rand(6) + 3)
    earlier = 0.0 if baseline == "none" else unit.estimator.current_baseline(4).clone()
    one, two = leaf(6, 2, 4), leaf(6, 2, 3, 4)
    with Tape() as tape:
        h1, h2 = unit(one), unit(two)
    loss = torch.rand(loss_shape) + 5
    total = tape.surrogate(loss)
    assert torch.equal(total, loss)
    total.sum().backward()
    wide = loss.reshape(6, -1, 1)
    torch.testing.assert_close(one.grad, (h1 - one.detach().sigmoid()) * (wide - earlier))
    torch.testing.assert_close(two.grad, (h2 - two.detach().sigmoid()) * (wide.unsqueeze(-1) - earlier))


def test_baseline_learns_from_all_uses():
    unit, logits = reinforce("per_unit"), [leaf(6, 4) for _ in range(3)]
    with Tape() as tape:
        differences = [unit(a) - a.detach().sigmoid() for a in logits]
    loss = torch.rand(6)
    tape.surrogate(loss)
    weight = torch.stack(differences, 1).square()
    torch.testing.assert_close(unit.estimator.numerator, 0.1 * (weight * loss[:, None, None]).mean((0, 1)))


def test_single_vector_used_twice():
    unit, one, two = reinforce(), leaf(4), leaf(4)
    with Tape() as tape:
        h1, h2 = unit(one), unit(two)
    total = tape.surrogate(torch.tensor(3.0))
    assert total.shape == ()
    total.backward()
    torch.testing.assert_close(one.grad, (h1 - one.detach().sigmoid()) * 3)
    torch.testing.assert_close(two.grad, (h2 - two.detach().sigmoid()) * 3)


def test_two_layers_of_other_widths_cannot_share_a_baseline():
    shared = ScoreFunction()
    with Tape() as tape:
        StochasticUnit(shared)(leaf(3, 4))
        StochasticUnit(shared)(leaf(3, 5))
    with pytest.raises(ValueError, match=r"keeps a baseline for 4 units and was called with 5"):
        tape.surrogate(torch.rand(3))


# ---------------------------------------------------------------- which tape


def test_nested_tapes_each_have_their_own_units():
    outer_logits, inner_logits = leaf(3, 4), leaf(2, 4)
    with Tape() as outer:
        reinforce()(outer_logits)
        with Tape() as inner:
            assert Tape.current() is inner
            reinforce()(inner_logits)
        assert Tape.current() is outer
        inner.surrogate(torch.ones(2)).sum().backward()
    assert Tape.current() is None
    assert inner_logits.grad is not None
    assert outer_logits.grad is None
    outer.surrogate(torch.ones(3)).sum().backward()
    assert outer_logits.grad is not None


def test_threads_have_their_own_tapes():
    barrier, grads, problems = threading.Barrier(2, timeout=20), {}, []

    def work(index: int) -> None:
        try:
            assert Tape.current() is None
            logits, loss = torch.zeros(2, 3, requires_grad=True), torch.full((2,), 10.0**index)
            with Tape() as tape:
                barrier.wait()
                gates = reinforce()(logits)
                barrier.wait()
                assert Tape.current() is tape
            tape.surrogate(loss).sum().backward()
            grads[index] = (logits.grad, (gates - 0.5) * loss[:, None])
        except BaseException as error:
            problems.append(error)

    with Tape():
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    for found, expected in grads.values():
        torch.testing.assert_close(found, expected)


def test_exception_closes_the_tape():
    tape = Tape()

    def fail():
        with tape:
            reinforce()(leaf(2, 3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert Tape.current() is None
    with pytest.raises(RuntimeError, match="found no tape"):
        reinforce()(leaf(2, 3))
    with Tape() as outer:
        with pytest.raises(KeyError), Tape():
            raise KeyError
        assert Tape.current() is outer
    assert tape.surrogate(torch.ones(2)).requires_grad  # what was recorded before it is whole


def test_a_tape_serves_one_forward_pass():
    with Tape() as tape:
        with pytest.raises(RuntimeError, match="serves one forward pass"), tape:
            pass
        with pytest.raises(RuntimeError, match="after the `with Tape"):
            tape.surrogate(torch.ones(2))
        assert Tape.current() is tape
    tape.surrogate(torch.ones(2))
    with pytest.raises(RuntimeError, match="surrogate of this tape was taken before"):
        tape.surrogate(torch.ones(2))
    with pytest.raises(RuntimeError, match="serves one forward pass"), tape:
        pass


def test_nothing_is_recorded_where_nothing_is_trained():
    with Tape() as tape:
        with torch.no_grad():
            reinforce()(leaf(2, 3))
        reinforce()(torch.zeros(2, 3))
        reinforce().eval()(leaf(5, 3))
    loss = torch.tensor(1.0)
    assert tape.surrogate(loss) is loss


# ---------------------------------------------------------------- replicas


def others_mean(losses: torch.Tensor) -> torch.Tensor:
    return (losses.sum(0) - losses) / (len(losses) - 1)


def test_replicate_repeats_the_batch():
    x = torch.randn(2, 5)
    replicated = Tape().replicate(x, 3)
    assert torch.equal(replicated, torch.cat([x, x, x]))
    assert Tape().replicate(torch.tensor([1, 2]), 2).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("loss_shape", [(), (4,)])
@pytest.mark.parametrize("uses", [1, 2])
def test_leave_one_out_compares_the_replicas_of_an_example(loss_shape, uses):
    logits, unit, samples = [leaf(2, 4, 5) for _ in range(uses)], StochasticUnit("leave_one_out"), 3
    with Tape() as tape:
        gates = [unit(tape.replicate(a, samples)).unflatten(0, (samples, 2)) for a in logits]
    losses = torch.randn(samples, 2, *loss_shape)
    total = tape.surrogate(losses.flatten(0, 1))
    assert torch.equal(total, losses.flatten(0, 1))
    total.sum().backward()
    signal = (losses - others_mean(losses)).reshape(samples, 2, -1, 1)
    for a, h in zip(logits, gates, strict=True):
        torch.testing.assert_close(a.grad, ((h - a.detach().sigmoid()) * signal).sum(0))


def test_mean_over_replicated_losses_is_the_mean_over_replicas():
    logits, loss = leaf(2, 5), torch.rand(6)
    with Tape() as tape:
        gates = reinforce()(tape.replicate(logits, 3))
    tape.surrogate(loss).mean().backward()
    single = (gates - logits.detach().sigmoid().repeat(3, 1)) * loss[:, None]
    torch.testing.assert_close(logits.grad, single.unflatten(0, (3, 2)).mean(0) / 2)


def test_replicas_of_stacked_layers():
    lower, upper = leaf(2, 4), nn.Linear(4, 3)
    with Tape() as tape:
        h1 = StochasticUnit("leave_one_out")(tape.replicate(lower, 5))
        second = upper(h1)
        second.retain_grad()
        h2 = StochasticUnit("leave_one_out")(second)
    losses = torch.randn(5, 2)
    tape.surrogate(losses.flatten()).sum().backward()
    signal = (losses - others_mean(losses)).flatten()[:, None]
    torch.testing.assert_close(second.grad, (h2 - second.detach().sigmoid()) * signal)
    first = (h1 - lower.detach().sigmoid().repeat(5, 1)) * signal
    torch.testing.assert_close(lower.grad, first.unflatten(0, (5, 2)).sum(0))


def test_replicas_are_replicated_alike_and_before_the_first_unit():
    tape, x = Tape(), torch.zeros(2, 3)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="samples must be an integer of at least 1"):
            tape.replicate(x, bad)
    tape.replicate(x, 3)
    tape.replicate(x, 3)
    with pytest.raises(ValueError, match="has 3 replicas, not 2; replicate all inputs and targets alike"):
        tape.replicate(x, 2)
    with Tape() as late:
        reinforce()(leaf(2, 3))
        with pytest.raises(ValueError, match="before the first unit runs"):
            late.replicate(x, 2)


def test_estimators_that_compare_replicas_need_them():
    with (
        Tape(),
        pytest.raises(ValueError, match=r"LeaveOneOut needs at least 2 samples.*tape\.replicate\(x, samples\)"),
    ):
        StochasticUnit("leave_one_out")(leaf(2, 3))
    StochasticUnit("leave_one_out")(torch.zeros(2, 3))  # nothing to learn


@pytest.mark.parametrize("shape", [(7, 3), (3,)])
def test_logits_that_were_not_replicated(shape):
    with Tape() as tape:
        tape.replicate(torch.zeros(4), 2)
        with pytest.raises(ValueError, match=r"this tape's forward pass has 2 replicas.*replicate all inputs"):
            reinforce()(leaf(*shape))


def test_loss_of_fewer_replicas():
    with Tape() as tape:
        reinforce()(tape.replicate(leaf(2, 4), 3))
    with pytest.raises(ValueError, match=r"shape \(6,\) for units with logits \(6, 4\), but has shape \(2,\)"):
        tape.surrogate(torch.rand(2))


def test_estimators_for_a_single_layer_refuse_several():
    class Single(ScoreFunction):
        several_layers = False

    def unit() -> StochasticUnit:
        return StochasticUnit(Single("none"))

    with Tape() as fine:
        unit()(fine.replicate(leaf(2, 4), 3))
    assert fine.surrogate(torch.rand(6)).requires_grad
    with Tape() as rounded:  # a matrix product may round its rows differently
        logits = rounded.replicate(leaf(2, 4), 3)
        unit()(logits * (1 + 1e-7 * torch.arange(len(logits)).unsqueeze(1)))
    assert rounded.surrogate(torch.rand(6)).requires_grad
    with Tape() as stacked:
        unit()(nn.Linear(4, 3)(unit()(leaf(2, 4))))
    with Tape() as below:  # a unit that records nothing lies below
        unit()(StochasticUnit("straight_through")(below.replicate(torch.zeros(2, 40), 3).requires_grad_()))
    for tape, loss in ((stacked, torch.rand(2)), (below, torch.rand(6))):
        with pytest.raises(ValueError, match=r"Single is for a single stochastic layer.*take one of .*score_function"):
            tape.surrogate(loss)


# ---------------------------------------------------------------- losses that do not fit


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("logit_shape", "loss", "error", "says"),
    [
        ((8, 4), torch.ones(()), ValueError, r"shape \(8,\) for units.*has shape \(\); it was already reduced.*'none'"),
        ((8, 5, 4), torch.ones(()), ValueError, r"\(8,\) or \(8, 5\) for .*already reduced: .*reduction='none'"),
        ((8, 4), torch.ones(7), ValueError, r"shape \(8,\) for units with logits \(8, 4\), but has shape \(7,\)"),
        ((8, 4), torch.ones(1), ValueError, r"but has shape \(1,\)"),
        ((8, 4), torch.ones(8, 1), ValueError, r"but has shape \(8, 1\)"),
        ((8, 4), torch.ones(8, 4), ValueError, r"but has shape \(8, 4\)"),
        ((8, 5, 4), torch.ones(5), ValueError, r"but has shape \(5,\)"),
        ((8, 5, 4), torch.ones(40), ValueError, r"but has shape \(40,\)"),
        ((8, 5, 6, 4), torch.ones(3), ValueError, r"\(8,\) or \(8, 5\) or \(8, 5, 6\) for units"),
        ((4,), torch.ones(4), ValueError, r"shape \(\) for units with logits \(4,\), but has shape \(4,\)"),
        ((8, 4), 1.0, TypeError, r"loss must be a torch\.Tensor, not float"),
    ],
)
def test_losses_that_do_not_fit(logit_shape, loss, error, says):
    with Tape() as tape:
        reinforce()(leaf(*logit_shape))
    with pytest.raises(error, match=says):
        tape.surrogate(loss)
    right = torch.ones(logit_shape[:-1][:1])
    assert tape.surrogate(right).requires_grad  # a refused loss does not spend the tape


def test_one_misfit_among_several_units_is_seen_before_any_baseline_moves():
    unit = reinforce("per_unit")
    with Tape() as tape:
        unit(leaf(8, 4))
        reinforce()(leaf(6, 4))
    with pytest.raises(ValueError, match=r"logits \(6, 4\)"):
        tape.surrogate(torch.ones(8))
    assert unit.estimator.numerator.numel() == 0


# ---------------------------------------------------------------- surrogate()


def quadratic(h: torch.Tensor) -> torch.Tensor:
    return (h * torch.arange(1.0, h.shape[-1] + 1) - 0.45).square().sum(-1)


@pytest.mark.parametrize(
    # I-MLE's step is as long as ∂L/∂h, which the mean over replicas shortens.
    "name",
    [name for name, kind in ALL.items() if kind.needs != "objective" and kind.replicas == 1 and name != "imle"],
)
def test_replicas_average_the_single_ones(name):
    logits, replicas = leaf(2, 3), 5
    noise = ALL[name]().draw_noise(logits.expand(replicas, 2, 3))
    loss = surrogate(quadratic, logits, name, samples=replicas, noise=noise)
    together = torch.autograd.grad(loss.sum(), logits)[0]
    singles = [surrogate(quadratic, logits, name, noise=noise[k : k + 1]) for k in range(replicas)]
    apart = [torch.autograd.grad(single.sum(), logits)[0] for single in singles]
    torch.testing.assert_close(loss, torch.stack(singles).mean(0))
    torch.testing.assert_close(together, torch.stack(apart).mean(0))
    assert loss.shape == (2,)


def test_surrogate_passes_the_ordinary_gradient_to_everything_else():
    logits, weight = leaf(4, 3), leaf(3)
    noise = torch.rand(6, 4, 3)
    surrogate(lambda h: (h * weight).sum(-1), logits, "score_function", samples=6, noise=noise).sum().backward()
    gates = (noise < logits.sigmoid()).float()
    torch.testing.assert_close(weight.grad, gates.mean(0).sum(0))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (0, 3)])
@pytest.mark.parametrize("name", BERNOULLI)
def test_surrogate_has_the_leading_shape(name, shape):
    assert surrogate(quadratic, leaf(*shape), name, samples=4).shape == shape[:-1]


@pytest.mark.parametrize("name", [name for name, kind in BERNOULLI.items() if kind().law != NONE])
def test_generator_reproduces(name):
    logits = leaf(3, 40)
    draws = [surrogate(quadratic, logits, name, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_noise_gives_the_number_of_replicas():
    counts = []

    def objective(h):
        counts.append(h.shape[0])
        return h.sum(-1)

    surrogate(objective, leaf(2, 3), "straight_through", noise=torch.rand(4, 2, 3))
    surrogate(objective, leaf(2, 3), "straight_through", samples=4, noise=torch.rand(4, 2, 3))
    surrogate(objective, leaf(2, 3), "straight_through", samples=2)
    assert counts == [4, 4, 2]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("samples", "noise"),
    [
        (1, torch.rand(0, 2, 3)),
        (1, torch.rand(2, 3)),
        (1, torch.rand(1, 3, 2)),
        (1, torch.rand(())),
        (1, 0.5),
        (2, torch.rand(4, 2, 3)),
    ],
)
def test_wrong_noise(samples, noise):
    with pytest.raises(ValueError, match=rf"noise must be a tensor of shape \({samples}, 2, 3\), not"):
        surrogate(quadratic, leaf(2, 3), "straight_through", samples=samples, noise=noise)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("samples", [0, -1, 1.0, True, "2"])
def test_wrong_samples(samples):
    with pytest.raises(ValueError, match="samples must be an integer of at least 1"):
        surrogate(quadratic, leaf(2, 3), "straight_through", samples=samples)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("name", [name for name in BERNOULLI if name != "enumeration"])  # whose replicas are outcomes
@pytest.mark.parametrize(
    ("objective", "found"),
    [
        (lambda h: h.sum(), r"\(\)"),
        (lambda h: h.sum((0, 2)), r"\(2,\)"),
        (lambda h: h.mean((1, 2)), r"\(4,\)"),
        (lambda h: h, r"\(4, 2, 3\)"),
        (lambda h: h.sum(-1, keepdim=True), r"\(4, 2, 1\)"),
        (lambda h: 1.0, "float"),
    ],
)
def test_objective_of_another_shape(name, objective, found):
    with pytest.raises(ValueError, match=f"objective must map gates .*returned {found}; reduce over the units only"):
        surrogate(objective, leaf(2, 3), name, samples=4)


@pytest.mark.usefixtures("as_user")
def test_surrogate_checks_logits_and_estimator():
    with pytest.raises(ValueError, match="logits holds 1 values"):
        surrogate(quadratic, torch.tensor([float("nan")]), "straight_through")
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        surrogate(quadratic, [0.0], "straight_through")
    with pytest.raises(ValueError, match="did you mean 'score_function'"):
        surrogate(quadratic, torch.zeros(2, 3), "score_funktion")
    with pytest.raises(TypeError, match="a class: call it"):
        surrogate(quadratic, torch.zeros(2, 3), ScoreFunction)


def test_an_instance_keeps_its_baseline_between_calls():
    estimator = ScoreFunction(baseline="running_mean")
    surrogate(lambda h: h.sum(-1) * 0 + 3, leaf(2, 3), estimator, samples=4)
    assert estimator.current_baseline(3).item() == pytest.approx(3)


def test_public_names():
    assert gatelet.Tape is Tape
    assert gatelet.surrogate is surrogate
