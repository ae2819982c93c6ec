"""The estimators that take several samples or evaluate the objective several times, certified by enumeration.

Every expectation is a finite sum over the outcomes of the noise in float64 (for Fiete and Seung's Gaussian directions a
quadrature), against the gradient of the sum over 2^N or C^N outcomes, or the closed form of a biased estimator.
"""

import copy
import itertools

import pytest
import torch

import gatelet
import oracles
import oracles_multi as multi
from gatelet.diagnose.table import facts
from gatelet.estimators import LeaveOneOut, ScoreFunction
from gatelet.estimators.antithetic import ARM, DisARM
from gatelet.estimators.enumeration import Enumeration
from gatelet.estimators.local_expectation import LocalExpectation
from gatelet.estimators.muprop import MuProp
from gatelet.estimators.nvil import NVIL
from gatelet.estimators.perturbation import SPSA, FieteSeung, FiniteDifferences
from gatelet.estimators.unordered_set import UnorderedSet, ratios
from gatelet.estimators.vimco import VIMCO

TOLERANCE = 1e-10  # 3e-15 is reached; Fiete and Seung's quadrature reaches 1e-14

CLASSES = {
    "vimco": VIMCO,
    "nvil": NVIL,
    "muprop": MuProp,
    "arm": ARM,
    "disarm": DisARM,
    "local_expectation": LocalExpectation,
    "enumeration": Enumeration,
    "spsa": SPSA,
    "fiete_seung": FieteSeung,
    "finite_differences": FiniteDifferences,
    "unordered_set": UnorderedSet,
}
BINARY = [name for name in CLASSES if name != "unordered_set"]
CATEGORICAL = ["vimco", "local_expectation", "enumeration", "unordered_set"]


def logits_for(*shape, dtype=torch.float64, seed=0):
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (1.3 * draw).to(dtype)


def truth(name, method, objective, logits, samples):
    """The expected gradient, and the expected value."""
    if name == "vimco":
        return multi.vimco(objective, logits, samples)
    of_bias = multi.BIASED.get(name)
    slope = of_bias(objective, logits, method) if of_bias else oracles.bernoulli_gradient(objective, logits)
    return slope, oracles.bernoulli_value(objective, logits)


def trained_nvil(units):
    """A baseline that has seen losses."""
    method = NVIL(hidden=5)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.05)  # made before the parameters have their size
    for seed in range(20):
        logits = logits_for(8, units, seed=seed)
        noise = method.draw_noise(logits[None], torch.Generator().manual_seed(seed))
        optimiser.zero_grad()
        method.surrogate(lambda h: 3 + h.sum(-1), logits, noise).mean().backward()
        optimiser.step()
    return method


def makes(name, units):
    yield CLASSES[name]()
    if name == "nvil":
        yield trained_nvil(units)
    if name in ("spsa", "finite_differences"):
        yield CLASSES[name](step=1.3)
    if name == "fiete_seung":
        yield FieteSeung(std=0.2)


# ---------------------------------------------------------------- the expectation


def cells(name, samples, units):
    """How many outcomes the noise has."""
    per_unit = {"arm": 6, "disarm": 3, "spsa": 8, "finite_differences": 4, "fiete_seung": 144, "enumeration": 1}
    rows = samples // 2 if CLASSES[name].antithetic else samples
    return per_unit.get(name, 2) ** (rows * units)


EXPECTATIONS = [
    pytest.param(name, objective, batch, units, samples, id=f"{name}-{objective}-B{batch}-N{units}-K{samples}")
    for name in BINARY
    for objective in oracles.OBJECTIVES
    for batch, units, samples in [
        (1, 1, 1),
        (3, 1, 2),
        (3, 2, 1),
        (1, 2, 2),
        (2, 2, 3),
        (2, 3, 1),
        (3, 3, 2),
        (1, 4, 1),
    ]
    if samples >= CLASSES[name].replicas and not (CLASSES[name].antithetic and samples % 2)
    if cells(name, samples, units) * batch <= 1 << 15
] + [
    pytest.param(name, "table", 1, 2, 4, id=f"{name}-table-B1-N2-K4")
    for name in ("arm", "disarm")  # two pairs
]


def check_expectation(name, method, objective, batch, units, samples):
    logits, loss = logits_for(batch, units), oracles.OBJECTIVES[objective](batch, units)
    mean, _, value = multi.enumerate_noise(name, method, loss, logits, samples)
    slope, expected = truth(name, method, loss, logits, samples)
    torch.testing.assert_close(mean, slope, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "objective", "batch", "units", "samples"), EXPECTATIONS)
def test_expectation(name, objective, batch, units, samples):
    for method in makes(name, units):
        check_expectation(name, method, objective, batch, units, samples)


@pytest.mark.parametrize("name", ["spsa", "fiete_seung", "finite_differences"])
def test_bias_falls_with_the_square_of_the_step(name):
    logits, loss = logits_for(2, 2), oracles.table(2, 2)
    exact = oracles.bernoulli_gradient(loss, logits)
    errors = [(multi.BIASED[name](loss, logits, CLASSES[name](step)) - exact).abs().max() for step in (0.2, 0.1)]
    assert 3.7 < errors[0] / errors[1] < 4.3
    assert not CLASSES[name].unbiased


CATEGORICAL_SHAPES = [
    pytest.param(name, *shape, id=f"{name}-B{shape[0]}-N{shape[1]}-C{shape[2]}-K{shape[3]}")
    for name in CATEGORICAL
    for shape in [(1, 1, 2, 1), (2, 1, 3, 2), (2, 2, 3, 1), (1, 3, 3, 1), (1, 1, 5, 3), (2, 1, 3, 3), (1, 2, 2, 2)]
    if CLASSES[name].replicas <= shape[3] and (name != "unordered_set" or shape[1] == 1)
]


def check_categorical(name, method, batch, units, classes, samples):
    logits, loss = logits_for(batch, units, classes), multi.categorical_objective(3, batch, units, classes)
    mean, _, value = multi.enumerate_noise(name, method, loss, logits, samples)
    if name == "vimco":

        def joint(gates):  # K·N variables
            losses = torch.stack([loss(part) for part in gates.chunk(samples, -2)])
            return -torch.log(torch.exp(-losses).mean(0))

        repeated = logits.repeat(1, samples, 1)
        expected = multi.categorical_value(joint, repeated)
        slope = multi.categorical_gradient(joint, repeated).unflatten(1, (samples, units)).sum(1)
    else:
        slope, expected = multi.categorical_gradient(loss, logits), multi.categorical_value(loss, logits)
    torch.testing.assert_close(mean, slope, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "batch", "units", "classes", "samples"), CATEGORICAL_SHAPES)
def test_categorical(name, batch, units, classes, samples):
    check_categorical(name, CLASSES[name](kind="categorical"), batch, units, classes, samples)


@pytest.mark.parametrize("name", ["vimco", "local_expectation", "enumeration"])
def test_two_classes_are_a_bernoulli_unit(name):
    """Logits (a, 0) and gates (h, 1 − h): the gradient of a is the same, that of 0 its negative."""
    a, loss = logits_for(2, 3), oracles.table(2, 3)
    binary = CLASSES[name]()
    noise = binary.draw_noise(a.expand(2, 2, 3))
    leaf = a.clone().requires_grad_()
    value = binary.surrogate(loss, leaf, noise)
    pair = torch.stack([a, torch.zeros_like(a)], -1).requires_grad_()
    gumbel = torch.stack([torch.zeros_like(noise), noise.logit()], -1)  # a > logit(u) iff u < σ(a)
    categorical = CLASSES[name](kind="categorical")
    other = categorical.surrogate(lambda h: loss(h[..., 0]), pair, gumbel)
    torch.testing.assert_close(other, value, rtol=0, atol=1e-12)
    (slope,), (slopes,) = torch.autograd.grad(value.sum(), leaf), torch.autograd.grad(other.sum(), pair)
    torch.testing.assert_close(slopes, torch.stack([slope, -slope], -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 3, 4, 5])
def test_leave_one_out_ratios_are_the_sum_over_orders(samples):
    p = torch.softmax(logits_for(5), -1).tolist()
    members = [3, 0, 4, 1, 2][:samples]
    drawn = torch.tensor([p[c] for c in members], dtype=torch.float64).log()
    rest = torch.tensor([p[c] for c in range(5) if c not in members], dtype=torch.float64).sum().log()
    weights, inner = ratios(drawn[:, None], rest[None])
    for i, s in enumerate(members):
        assert weights[i, 0].item() == pytest.approx(p[s] * multi.leave_one_out_ratio(p, members, s), rel=1e-12)
        assert inner[i, i, 0].item() == pytest.approx(p[s], rel=1e-12)
        # Without s: the other classes, their probabilities divided by 1 − p(s).
        less = {c: p[c] / (1 - p[s]) for c in range(5) if c != s}
        for j, t in enumerate(members):
            if j != i:
                ratio = multi.leave_one_out_ratio(less, [c for c in members if c != s], t)
                assert inner[i, j, 0].item() == pytest.approx(p[t] * ratio / (1 - p[s]) * (1 - p[s]), rel=1e-12)
    assert weights.sum().item() == pytest.approx(1, rel=1e-12)


def test_all_classes_drawn_is_exact():
    logits, loss = logits_for(2, 1, 4), multi.categorical_objective(1, 2, 1, 4)
    leaf, method = logits.clone().requires_grad_(), UnorderedSet()
    value = method.surrogate(loss, leaf, method.draw_noise(logits.expand(4, 2, 1, 4)))
    torch.testing.assert_close(value, multi.categorical_value(loss, logits), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(slope, multi.categorical_gradient(loss, logits), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the variance


def variance(method, objective, logits, samples, name="score_function"):
    return multi.enumerate_noise(name, method, objective, logits, samples)[1]


def plain():
    return ScoreFunction(baseline="none")


def test_known_variances():
    """E[(b − 0.45)²] at logit −2, per estimator with two samples (the plain score function with one too)."""
    logits = torch.tensor([[-2.0]], dtype=torch.float64)

    def loss(h):
        return (h - 0.45).square().sum(-1)

    assert oracles.bernoulli_gradient(loss, logits).item() == pytest.approx(0.0105, abs=5e-5)
    found = {
        "plain": variance(plain(), loss, logits, 1).item(),
        "leave_one_out": variance(LeaveOneOut(), loss, logits, 2).item(),
        "disarm": variance(DisARM(), loss, logits, 2, "disarm").item(),
    }
    assert found == pytest.approx({"plain": 8.9e-3, "leave_one_out": 4.1e-4, "disarm": 3.5e-4}, rel=0.02)


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
@pytest.mark.parametrize("units", [1, 2])
def test_leave_one_out_has_less_than_plain_under_an_offset(objective, units):
    logits, loss = logits_for(2, units), oracles.OBJECTIVES[objective](2, units)
    of_both = (variance(m, lambda h: 5 + loss(h), logits, 2).sum() for m in (LeaveOneOut(), plain()))
    assert next(of_both) < next(of_both)


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_disarm_has_at_most_arm_and_two_plain_samples(objective, units):
    logits, loss = logits_for(2, units), oracles.OBJECTIVES[objective](2, units)
    for shifted in (loss, lambda h: 5 + loss(h)):
        disarm, arm = (variance(m(), shifted, logits, 2, m.__name__.lower()) for m in (DisARM, ARM))
        assert (disarm <= arm + 1e-12).all()  # a conditional expectation: unit by unit
    assert disarm.sum() <= variance(plain(), lambda h: 5 + loss(h), logits, 2).sum()


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_local_expectation_has_at_most_the_score_function(objective, units):
    logits, loss = logits_for(2, units), oracles.OBJECTIVES[objective](2, units)
    local = variance(LocalExpectation(), loss, logits, 1, "local_expectation")
    assert (local <= variance(plain(), loss, logits, 1) + 1e-12).all()
    if objective == "linear":
        assert local.max() < 1e-25


def test_muprop_has_less_than_plain_near_a_linear_loss():
    logits, linear, bend = logits_for(2, 3), oracles.linear(2, 3), oracles.quadratic(2, 3)
    assert variance(MuProp(), linear, logits, 1, "muprop").max() < 1e-25

    def loss(h):
        return 2 + linear(h) + 0.05 * bend(h)

    assert variance(MuProp(), loss, logits, 1, "muprop").sum() < 0.01 * variance(plain(), loss, logits, 1).sum()


def test_a_trained_nvil_has_less_than_plain():
    logits = logits_for(3, 2)

    def loss(h):
        return 3 + h.sum(-1)

    assert variance(trained_nvil(2), loss, logits, 1).sum() < 0.2 * variance(plain(), loss, logits, 1).sum()
    torch.testing.assert_close(  # before training b = 0
        variance(NVIL(), loss, logits, 1), variance(plain(), loss, logits, 1), rtol=0, atol=1e-12
    )


def test_unordered_set_has_less_than_leave_one_out():
    logits, loss = logits_for(2, 1, 4), multi.categorical_objective(2, 2, 1, 4)
    ours = variance(UnorderedSet(), loss, logits, 2, "unordered_set").sum()
    assert ours < variance(LeaveOneOut(kind="categorical"), loss, logits, 2).sum()


# ---------------------------------------------------------------- wrong on purpose


class UnsignedDisARM(DisARM):
    """Forgets which of the two gates fired, as a peer's does."""

    def coefficients(self, logits, gates, losses, noise=None):
        return super().coefficients(logits, gates, losses, noise).abs()


class NeighbourLocalExpectation(LocalExpectation):
    """Looks up the value of a unit at its neighbour."""

    def estimate(self, objective, logits, gates, losses, noise):
        return super().estimate(objective, logits, gates, losses, noise).roll(1, -1)


class OneSidedSPSA(SPSA):
    """Divides a difference over 2c by c."""

    def compare(self, moved, losses, shifts):
        return 2 * super().compare(moved, losses, shifts)


class NoExpansion(MuProp):
    """Subtracts the expansion and does not add its gradient."""

    def surrogate(self, objective, logits, noise):
        good = super().surrogate(objective, logits, noise)
        mean = logits.detach().sigmoid()
        slope = torch.func.grad(lambda h: objective(h[None]).sum())(mean)
        inner = (slope * mean * (1 - mean) * logits).sum(-1)
        return good - (inner - inner.detach())


class WithReplacement(UnorderedSet):
    """Draws without replacement and averages as if with it."""

    def surrogate(self, objective, logits, noise):
        gates = self(self.replicate(logits, noise), noise)
        losses = objective(gates).detach()
        value = losses[..., None, None] * (gates - logits.detach().softmax(-1))
        inner = (value * logits).sum((-1, -2))
        return (losses + inner - inner.detach()).mean(0)


@pytest.mark.parametrize(
    ("name", "wrong", "samples"),
    [
        ("disarm", UnsignedDisARM, 2),
        ("local_expectation", NeighbourLocalExpectation, 1),
        ("spsa", OneSidedSPSA, 1),
        ("muprop", NoExpansion, 1),
    ],
)
def test_wrong_ones_are_rejected(name, wrong, samples):
    check_expectation(name, CLASSES[name](), "table", 2, 2, samples)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_expectation(name, wrong(), "table", 2, 2, samples)


def test_a_mean_over_draws_without_replacement_is_rejected():
    check_categorical("unordered_set", UnorderedSet(), 1, 1, 3, 2)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_categorical("unordered_set", WithReplacement(), 1, 1, 3, 2)


# ---------------------------------------------------------------- the surrogate


KINDS = [pytest.param(name, "bernoulli", id=name) for name in BINARY]
KINDS += [pytest.param(name, "categorical", id=f"{name}-categorical") for name in CATEGORICAL]


def problem(name, kind, dtype=torch.float64, batch=3):
    """An estimator, logits and noise of its kind, two replicas."""
    method = CLASSES[name](kind="categorical") if kind == "categorical" else CLASSES[name]()
    shape = (batch, 4) if kind == "bernoulli" else (batch, 1 if name == "unordered_set" else 2, 3)
    logits = logits_for(*shape, dtype=dtype)
    return method, logits, method.draw_noise(logits.expand(2, *shape), torch.Generator().manual_seed(1))


def loss_of(method, weight=None):
    """A loss per replica and example, with another slope at every gate."""

    def objective(h):
        flat = h if method.event_dims == 1 else h.flatten(-2)
        scale = torch.linspace(-1, 2, flat.shape[-1], dtype=h.dtype) if weight is None else weight
        return ((flat * scale).sum(-1) - 0.3).square() + 1

    return objective


def gradient(method, objective, logits, noise):
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(method.surrogate(objective, leaf, noise).sum(), leaf)[0]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_value_and_other_parameters(name, kind):
    """The value is the loss of the drawn gates, and whatever else it depends on receives its ordinary gradient."""
    method, logits, noise = problem(name, kind)
    weight = torch.linspace(-1, 2, logits[0].numel(), dtype=torch.float64).requires_grad_()
    objective = loss_of(method, weight)
    gates = method(logits.expand(2, *logits.shape), noise)
    assert not gates.requires_grad
    losses = objective(gates)
    if name == "enumeration":  # E[L]: no gates are drawn
        if kind == "categorical":
            expected = multi.categorical_value(objective, logits)
        else:
            expected = sum(
                torch.where(h > 0, logits.sigmoid(), 1 - logits.sigmoid()).prod(-1) * objective(h.expand(1, 3, 4))[0]
                for h in torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
            )
    elif name == "vimco":
        expected = -torch.log(torch.exp(-losses).mean(0))
    elif name == "unordered_set":
        p, parts = logits.softmax(-1)[:, 0].tolist(), []
        for b in range(3):
            members = gates[:, b, 0].argmax(-1).tolist()
            parts.append(sum(p[b][s] * multi.leave_one_out_ratio(p[b], members, s) * losses[k, b]
                             for k, s in enumerate(members)))  # fmt: skip
        expected = torch.stack(parts)
    else:
        expected = losses.mean(0)
    value = method.surrogate(objective, logits.clone().requires_grad_(), noise)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    (found,) = torch.autograd.grad(value.sum(), weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), weight)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_vmap(name, kind):
    """torch.func.vmap over noise and logits is a loop."""
    method, logits, _ = problem(name, kind)
    stacked = torch.stack([logits, 0.5 * logits, -logits])
    noise = method.draw_noise(stacked.new_zeros(2, *stacked.shape)).movedim(1, 0)
    leaf = stacked.clone().requires_grad_()
    objective = loss_of(method)
    surrogate = copy.deepcopy(method).surrogate  # (a first call under vmap may size a baseline)
    value = torch.func.vmap(lambda a, z: surrogate(objective, a, z), randomness="different")(leaf, noise)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    for i in range(3):
        one = stacked[i].clone().requires_grad_()
        torch.testing.assert_close(value[i], method.surrogate(objective, one, noise[i]), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(slope[i], gradient(method, objective, one, noise[i]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_functional_gradient(name, kind):
    """torch.func.grad gives the gradient of autograd."""
    method, logits, noise = problem(name, kind)
    slope = torch.func.grad(lambda a: method.surrogate(loss_of(method), a, noise).sum())(logits)
    torch.testing.assert_close(slope, gradient(method, loss_of(method), logits, noise), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_dtypes_saturation_and_shapes(name, kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        method, logits, _ = problem(name, kind, dtype)
        flat = torch.tensor([-100.0, 100.0, -30.0, 30.0, 0.0, 100.0], dtype=dtype).repeat(4)[: logits.numel()]
        for these, seed in itertools.product((logits, flat.reshape(logits.shape)), range(3)):
            noise = method.draw_noise(these.expand(2, *these.shape), torch.Generator().manual_seed(seed))
            assert noise.dtype == torch.promote_types(dtype, torch.float32) or name == "enumeration"
            leaf = these.clone().requires_grad_()
            value = method.surrogate(loss_of(method), leaf, noise)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
            assert value.dtype == slope.dtype == dtype
            assert value.isfinite().all()
            assert slope.isfinite().all()
        assert method(these.expand(2, *these.shape), noise).dtype == dtype

        empty, nothing, noise = problem(name, kind, dtype, batch=0)
        assert empty.surrogate(loss_of(empty), nothing, noise).shape == (0,)
        assert gradient(empty, loss_of(empty), nothing, noise).shape == nothing.shape
    # Single precision agrees with double where the gates do.
    method, logits, noise = problem(name, kind)
    double = gradient(method, loss_of(method), logits, noise)
    single = gradient(method, loss_of(method), logits.float(), noise.float())
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_layouts(name, kind):
    method, logits, noise = problem(name, kind)
    strange = torch.stack([logits, -logits], 1)[:, 0]
    backwards = list(range(noise.dim()))[::-1]
    strange_noise = noise.permute(backwards).contiguous().permute(backwards)
    assert not strange.is_contiguous()
    plain_slope = gradient(method, loss_of(method), logits, noise)
    view = strange.detach().requires_grad_()
    (slope,) = torch.autograd.grad(method.surrogate(loss_of(method), view, strange_noise).sum(), view)
    assert torch.equal(slope, plain_slope)
    row = logits[:1].requires_grad_()
    (slope,) = torch.autograd.grad(method.surrogate(loss_of(method), row.expand_as(logits), noise).sum(), row)
    whole = gradient(method, loss_of(method), row.expand_as(logits).contiguous(), noise)
    torch.testing.assert_close(slope, whole.sum(0, keepdim=True), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_public_surrogate(name, kind):
    """gatelet.surrogate: the least number of samples, a leading shape, a reproducible generator."""
    method, logits, _ = problem(name, kind)
    nested = logits.expand(2, *logits.shape)
    slopes = []
    for _ in range(2):
        leaf = nested.clone().requires_grad_()
        source = torch.Generator().manual_seed(3)
        value = gatelet.surrogate(loss_of(method), leaf, copy.deepcopy(method), generator=source)
        assert value.shape == (2, 3)
        slopes.append(torch.autograd.grad(value.sum(), leaf)[0])
    assert torch.equal(*slopes)


@pytest.mark.parametrize(
    "name", [name for name in BINARY if CLASSES[name].antithetic or "_d" in name or name == "spsa"]
)
def test_breaks(name):
    """Between the breaks nothing changes: the cells of the oracle have the same edges."""
    method, logits = CLASSES[name](), logits_for(1, 2)
    u, weight = multi.noise_nodes("disarm" if name == "arm" else name, method, logits)
    if name == "spsa":
        u, weight = u[: len(u) // 2, ..., 0], 2 * weight[: len(u) // 2]
    edges = facts(method).splits(method, logits).movedim(-1, 0).sort(0).values
    torch.testing.assert_close(edges, (u + weight / 2)[:-1], rtol=0, atol=1e-14)


# ---------------------------------------------------------------- modules and tapes


@pytest.mark.parametrize("name", ["nvil", "arm", "disarm"])
def test_tape_is_surrogate(name):
    """A module and a Tape give the gradient that surrogate gives."""
    method, logits, noise = problem(name, "bernoulli")
    unit = gatelet.StochasticUnit(copy.deepcopy(method))
    leaf = logits.clone().requires_grad_()
    with gatelet.Tape() as tape:
        gates = unit(tape.replicate(leaf, 2), generator=torch.Generator().manual_seed(1))  # that of `noise`
        loss = loss_of(method)(gates)
    tape.surrogate(loss).reshape(2, 3).mean(0).sum().backward()
    torch.testing.assert_close(leaf.grad, gradient(method, loss_of(method), logits, noise), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["arm", "disarm"])
def test_antithetic_pairs(name):
    method = CLASSES[name]()
    logits = logits_for(3, 2)
    noise = method.draw_noise(logits.expand(4, 3, 2))
    assert noise.shape == (2, 3, 2)
    gates = method(logits.expand(4, 3, 2), noise)
    assert torch.equal(gates[:2], (noise < logits.sigmoid()).double())
    assert torch.equal(gates[2:], (1 - noise < logits.sigmoid()).double())
    with pytest.raises(ValueError, match="even number of samples"):
        gatelet.surrogate(oracles.linear(3, 2), logits, method, samples=3)
    net = torch.nn.Sequential(
        gatelet.StochasticUnit(method), torch.nn.Linear(2, 2), gatelet.StochasticUnit(CLASSES[name]())
    )
    with gatelet.Tape() as tape:
        loss = net(tape.replicate(logits.float().requires_grad_(), 2)).sum(-1)
    with pytest.raises(ValueError, match="single stochastic layer"):
        tape.surrogate(loss)


def test_units_that_act_several_times():
    """Tokens: logits (K·B, T, N) and one loss per example."""
    for name in ("disarm", "arm", "nvil"):
        unit = gatelet.StochasticUnit(CLASSES[name]())
        leaf = logits_for(3, 2, 4).requires_grad_()
        with gatelet.Tape() as tape:
            loss = unit(tape.replicate(leaf, 2)).square().sum((-1, -2))
        tape.surrogate(loss).mean().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


def test_arm_needs_its_noise():
    with pytest.raises(ValueError, match="noise"):
        ARM().coefficients(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1))


# ---------------------------------------------------------------- NVIL's baseline


def test_nvil_parameters():
    method, logits, noise = problem("nvil", "bernoulli", torch.float32)
    before = torch.get_rng_state()
    names = dict(method.named_parameters())
    assert names.keys() == {"weight", "bias", "out", "offset"}
    losses = loss_of(method)(method(logits.expand(2, 3, 4), noise))
    leaf = logits.clone().requires_grad_()
    value = method.surrogate(loss_of(method), leaf, noise)
    assert torch.equal(value, losses.mean(0))
    value.mean().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert names["weight"] is method.weight
    assert method.weight.shape == (64, 4)
    # The gradient of mean (L − b)², and of nothing else.
    error = (losses - method.predict(logits.expand(2, 3, 4))).square().mean()
    for parameter, expected in zip(
        method.parameters(), torch.autograd.grad(error, [*method.parameters()]), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected)
    assert not torch.autograd.grad(method.predict(leaf).sum(), leaf, allow_unused=True)[0]
    # A checkpoint brings the size; a sized one takes it.
    for fresh in (NVIL(), NVIL(units=4)):
        fresh.load_state_dict(method.state_dict())
        torch.testing.assert_close(fresh.predict(logits), method.predict(logits))
    assert torch.equal(NVIL(units=4).weight, method.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        NVIL(units=5).load_state_dict(method.state_dict())
    with pytest.raises(ValueError, match="predicts the loss from 4 logits and was called with 5"):
        method.predict(torch.zeros(1, 5))


def test_nvil_in_a_network_with_two_layers():
    torch.manual_seed(0)
    units = [gatelet.StochasticUnit(NVIL(hidden=8)) for _ in range(2)]
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), units[0], torch.nn.Linear(4, 5), units[1], torch.nn.Linear(5, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.randn(16, 3)
    for _ in range(3):
        optimiser.zero_grad()
        with gatelet.Tape() as tape:
            loss = (net(x)[:, 0] - 5).square()
        tape.surrogate(loss).mean().backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert units[1].estimator.offset.item() > 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gatelet.surrogate(lambda h: h.sum(-1), torch.zeros(1, 17), Enumeration()), r"2\^17 outcomes"),
        (lambda: gatelet.surrogate(lambda h: h.sum((-1, -2)), torch.zeros(1, 2, 3), UnorderedSet()), "one categorical"),
        (lambda: gatelet.surrogate(lambda h: h.sum((-1, -2)), torch.zeros(1, 1, 3), UnorderedSet(), 4), "of 3, not 4"),
        (lambda: gatelet.surrogate(lambda h: h.sum(-1), torch.zeros(1, 2), VIMCO(), 1), "at least 2 samples"),
        (lambda: UnorderedSet(kind="bernoulli"), "no bernoulli form"),
        (lambda: SPSA(step=0.0), "step must be"),
        (lambda: FieteSeung(std=-1.0), "std must be"),
        (lambda: gatelet.StochasticUnit(MuProp()), "evaluates the objective at several gates"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluations():
    """What an estimator costs is what its docstring says."""
    counts = {}
    for name in BINARY:
        method, logits, noise = problem(name, "bernoulli")
        seen = []

        def objective(h, seen=seen):
            seen.append(h.shape[0])
            return h.sum(-1)

        method.surrogate(objective, logits, noise)
        counts[name] = sum(seen)
    assert counts == {
        "vimco": 2,
        "nvil": 2,
        "muprop": 3,
        "arm": 2,
        "disarm": 2,
        "local_expectation": 10,
        "enumeration": 16,
        "spsa": 6,
        "fiete_seung": 4,
        "finite_differences": 18,
    }
