"""The contract: what every estimator of ``gatelet.estimators.ALL`` must do, in every variant.

The checks are plain functions of a name and a factory, so that ``test_rejects_wrong.py`` can run the same ones on
estimators that are wrong on purpose. At the end: the instrument itself, :func:`gatelet.moments`.
"""

import copy
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

import gatelet
import oracles
import oracles_relaxations
from gatelet.diagnose import moments
from gatelet.diagnose.table import facts
from gatelet.estimators import ALL
from gatelet.estimators._noise import NONE

# An enumeration is a finite sum: only rounding is left (2e-15 is reached).
ENUMERATED = 1e-10
# Gauss–Legendre on both sides, with the nodes of `order_for`: 1e-13 is reached here, 2e-11 at other logits.
QUADRATURE = 1e-10


def label(name, options):
    return f"{name}({','.join(f'{key}={value}' for key, value in options.items())})"


CASES = [
    pytest.param(name, lambda cls=cls, options=options: cls(**options), id=label(name, options))
    for name, cls in ALL.items()
    if "bernoulli" in cls.kinds
    for options in ({}, *facts(cls).variants)
]
CATEGORICAL = [
    pytest.param(name, lambda cls=cls: cls(kind="categorical"), id=label(name, {"kind": "categorical"}))
    for name, cls in ALL.items()
    if "categorical" in cls.kinds
]
# Cases whose noise is too large, or not of the form, for diagnose.moments, and where they are certified instead.
ELSEWHERE = {
    "gumbel_rao()": "test_relaxations.py",  # ten more variables a unit; its variant with one is walked
    "fiete_seung()": "test_multi_evaluation.py",
    "arms()": "test_second_generation.py",
    "bit_flip()": "test_second_generation.py",
    "imle()": "test_second_generation.py",
    "aimle()": "test_second_generation.py",
    "darn(kind=categorical)": "test_second_generation.py",
    "zgr(kind=categorical)": "test_second_generation.py",
    "decoupled_straight_through(kind=categorical)": "test_second_generation.py",
    "carms(kind=categorical)": "test_second_generation.py",
    "arsm(kind=categorical)": "test_second_generation.py",
    "shrunk_baseline(kind=categorical)": "test_second_generation.py",
    "unordered_set(kind=categorical)": "test_multi_evaluation.py",
    "vimco(kind=categorical)": "test_multi_evaluation.py",  # for its bound, which is not E[L]
    "concrete(kind=categorical)": "test_relaxations.py",
    "straight_through_gumbel(kind=categorical)": "test_relaxations.py",
    "gumbel_rao(kind=categorical)": "test_relaxations.py",
    "gapped_straight_through(kind=categorical)": "test_relaxations.py",
    "reinmax(kind=categorical)": "test_relaxations.py",
    "rebar(kind=categorical)": "test_relaxations.py",
    "relax(kind=categorical)": "test_relaxations.py",
}
BUDGET = 1 << 22  # gates that one enumeration may hold


def logits_for(batch, units, dtype=torch.float64):
    draw = torch.randn(batch, units, generator=torch.Generator().manual_seed(10 * batch + units), dtype=torch.float64)
    return (1.5 * draw).to(dtype)


def splits(method, logits):
    return facts(method).splits(method, logits)


def alone(method):
    """Whether the noise of one replica says nothing without that of the others."""
    return facts(method).coupled and not facts(method).summable


def is_smooth(method):
    return method.law != NONE and not facts(method).constant


def order_for(method, units):
    """Nodes per interval: enough for ``QUADRATURE``, few enough for a tensor product over the units."""
    if method.more:
        return 64
    if units < 3:
        return 96
    # A unit without a kink has one interval for all of its noise.
    return 32 if splits(method, torch.zeros(1)).shape[-1] else 64


def shapes_for(method):
    """The batches and units that can be enumerated within the budget: a smooth unit has 60 to 190 nodes of its own."""
    if not facts(method).summable:
        return []
    batches = (1,) if facts(method).coupled else (1, 3)
    fits = []
    for batch, units in [*itertools.product(batches, (1, 2, 3, 4)), (1, 8)]:
        if is_smooth(method) and units > (3 if method.law.name == "gaussian" and batch == 1 else 2):
            continue
        cells = splits(method, torch.zeros(units)).shape[-1] + 1
        nodes = cells * (order_for(method, units) if is_smooth(method) else 1)
        nodes *= (order_for(method, units) if is_smooth(method) else 2) ** len(method.more)
        rows = method.noise_shape(torch.Size((method.replicas, batch, units)))[0]
        outcomes = nodes ** (rows * units)
        # Eight units where two nodes each are all: 256 outcomes.
        if outcomes * method.replicas * batch * units <= BUDGET and (units < 8 or outcomes <= 256):
            fits.append((batch, units))
    return fits


def states(make, batch, units):
    """Yield the estimator as made and, if it has a state, one that has seen losses."""
    yield make()
    used = make()
    if used.state_dict():
        for seed in range(3):
            logits = logits_for(batch, units)
            noise = draw(used, logits, samples=4, seed=seed)
            used.surrogate(lambda h: 3 + h.sum(-1), logits, noise)
        yield used


def replicas_for(method, samples=1):
    """The number of replicas: ``samples`` times the least that the estimator works with."""
    return samples * method.replicas


def draw(method, logits, samples=1, seed=0):
    """Noise for that many replicas; ``method.replicate(logits, noise)`` are the logits that go with it."""
    replicas = logits.expand(replicas_for(method, samples), *logits.shape)
    return method.draw_noise(replicas, torch.Generator().manual_seed(seed))


def gradient(method, objective, logits, noise):
    """The estimate of ∂E[L]/∂logits (B, N) at this noise."""
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(method.surrogate(objective, leaf, noise).sum(), leaf)[0]


def squares(h):
    """A loss for any number of units, with another slope at every gate."""
    target = torch.linspace(-1, 2, h.shape[-1], dtype=h.dtype)
    return (h - target).square().sum(-1)


# ---------------------------------------------------------------- the expectation


def check_expectation(name, make, objective, batch, units):
    """The exact mean of the estimator is the exact gradient, or its declared closed form."""
    logits = logits_for(batch, units)
    loss = oracles.OBJECTIVES[objective](batch, units)
    truth = oracles.truth(name, make())(loss, logits, make())
    for method in states(make, batch, units):
        found = moments(loss, logits, method, order=order_for(method, units))
        assert found.mean.shape == logits.shape
        tolerance = QUADRATURE if is_smooth(method) else ENUMERATED
        torch.testing.assert_close(found.mean, truth, rtol=0, atol=tolerance)
        assert (found.variance >= 0).all()
        if method.binary and method.unbiased and name != "vimco":  # whose value is its bound
            torch.testing.assert_close(found.value, oracles.bernoulli_value(loss, logits), rtol=0, atol=tolerance)


def check_expectation_of_replicas(name, make):
    """The mean over two replicas has the same expectation."""
    batch, units = (3, 1) if is_smooth(make()) else (1 if facts(make()).coupled else 3, 2)
    logits, loss, samples = logits_for(batch, units), oracles.quadratic(batch, units), 2 * make().replicas
    if not shapes_for(make()) or make().more:
        return  # elsewhere, or too many variables for two replicas
    more = {"samples": samples} if name == "vimco" else {}
    truth = oracles.truth(name, make())(loss, logits, make(), **more)
    for method in states(make, *logits.shape):
        found = moments(loss, logits, method, samples=samples, order=96)
        torch.testing.assert_close(found.mean, truth, rtol=0, atol=QUADRATURE if is_smooth(method) else ENUMERATED)


EXPECTATIONS = [
    pytest.param(*case.values, objective, batch, units, id=f"{case.id}-{objective}-B{batch}-N{units}")
    for case in CASES
    for objective in oracles.OBJECTIVES
    for batch, units in shapes_for(case.values[1]())
]


@pytest.mark.parametrize(("name", "make", "objective", "batch", "units"), EXPECTATIONS)
def test_expectation(name, make, objective, batch, units):
    check_expectation(name, make, objective, batch, units)


@pytest.mark.parametrize(("name", "make"), [case for case in CATEGORICAL if case.id not in ELSEWHERE])
@pytest.mark.parametrize(("batch", "units", "classes"), [(1, 1, 2), (2, 1, 4), (2, 2, 3)])
def test_expectation_of_categorical_units(name, make, batch, units, classes):
    """The mean is the exact gradient over C^N outcomes; for straight-through, the mean of ∂L/∂h."""
    logits = logits_for(batch * units, classes).reshape(batch, units, classes)
    weight = logits_for(units, classes) - 0.3

    def loss(h):
        return ((h * weight).sum((-1, -2)) - 0.4).tanh().square()

    found = moments(loss, logits, make())
    truth = oracles_relaxations.categorical_gradient(loss, logits)
    if not make().unbiased:
        assert name == "straight_through", "bias must be declared"
        identity = torch.eye(classes, dtype=torch.float64).expand(batch, units, classes, classes)
        truth = oracles_relaxations.categorical_with_jacobians(loss, logits, lambda h: identity)
    torch.testing.assert_close(found.mean, truth, rtol=0, atol=ENUMERATED)


def test_what_is_certified_elsewhere_is_named():
    walked = {case.id.rsplit("-", 3)[0] for case in EXPECTATIONS}
    assert {case.id for case in CASES} - walked == {case for case in ELSEWHERE if "kind" not in case}
    for case, file in ELSEWHERE.items():
        assert ALL[case.split("(")[0]].__name__ in (Path(__file__).parent / file).read_text()


# ---------------------------------------------------------------- what the noise does


def _noise_law(method):
    """The range of the noise and its distribution function."""
    if method.law.name == "uniform":
        return 0.0, 1.0, lambda u: u
    _, cumulative, reach = oracles.NOISE[method.law.name]
    return -reach, reach, cumulative


def gates_at(method, logits, noise):
    """Gates for rows of the main noise (R, *logits.shape); a unit's further noise is held at one place."""
    if method.more:
        other = [torch.full_like(noise, 1.0 if law.name == "sign" else 0.3) for law in method.more]
        noise = torch.stack([noise, *other], -1)
    # Antithetic: the first half of the replicas uses the noise as it is.
    return method(method.replicate(logits, noise), noise)[: noise.shape[0]]


def _switches(method, logits):
    """Noise values at which gates open or close: ((unit, from, to, open before), ...), by scan and bisection."""
    low, high, _ = _noise_law(method)
    grid = torch.linspace(low, high, 2001, dtype=torch.float64)[1:-1, None].expand(-1, len(logits))
    is_open = gates_at(method, logits, grid) > facts(method).closed
    row, unit = (is_open[1:] != is_open[:-1]).nonzero().unbind(1)
    left, right, before = grid[row, unit], grid[row + 1, unit], is_open[row, unit]
    for _ in range(60):
        middle = (left + right) / 2
        same = (gates_at(method, logits[unit], middle[None])[0] > facts(method).closed) == before
        left, right = torch.where(same, middle, left), torch.where(same, right, middle)
    return unit, (left + right) / 2, before, is_open[-1]


def check_fire_probability(name, make):
    """fire_probability is P(h ≠ 0) under the law of the noise; the gate switches where ``breaks`` says."""
    method = make()
    logits = torch.linspace(-3.1, 3, 13, dtype=torch.float64)
    claimed = method.fire_probability(logits).detach()
    if method.law == NONE and method.needs == "objective":
        return  # an enumeration draws nothing
    if method.law == NONE:
        assert torch.equal(claimed, (method(logits, torch.zeros_like(logits)) != 0).double())
        return
    _, _, cumulative = _noise_law(method)
    if alone(method):
        return
    unit, at, before, last = _switches(method, logits)
    # P(open) = F(the upper end) if open there, plus F(switch) where it closes, minus F(switch) where it opens.
    measure = last.double().index_add(0, unit, torch.where(before, 1.0, -1.0).double() * cumulative(at))
    torch.testing.assert_close(claimed, measure, rtol=0, atol=1e-12)
    breaks = splits(method, logits)
    if len(unit):
        assert (breaks[unit] - at[:, None]).abs().amin(-1).max() < 1e-9


def check_breaks(name, make):
    """Between two breaks a piecewise constant estimator has one gate and one gradient."""
    method = make()
    logits = logits_for(1, 3)
    if is_smooth(method) or method.law == NONE or alone(method):
        return
    low, high, _ = _noise_law(method)
    ends = torch.full((1, 3, 1), 1.0, dtype=torch.float64)
    edges = torch.cat([low * ends, splits(method, logits).sort(-1).values, high * ends], -1)
    for cell in itertools.product(range(edges.shape[-1] - 1), repeat=3):
        index = torch.tensor(cell)[None, :, None]
        left, right = edges.gather(-1, index)[..., 0], edges.gather(-1, index + 1)[..., 0]
        ends_of_cell = [torch.lerp(left, right, share) for share in (0.01, 0.99)]
        gates = [gates_at(method, logits, noise[None]) for noise in ends_of_cell]
        assert torch.equal(*gates)
        rows = method.noise_shape(torch.Size((method.replicas, *logits.shape)))[0]
        if not method.more and facts(method).summable:
            assert torch.equal(*(gradient(make(), squares, logits, z.expand(rows, *z.shape)) for z in ends_of_cell))


def check_logit_at(name, make):
    """logit_at inverts fire_probability: gates above it fire with at least the probability, gates below with less."""
    method = make()
    if not method.rated and method.law == NONE and method.logit_at(0.5) > -float("inf"):
        return  # which units open is no matter of one logit
    for probability in (1e-4, 0.1, 0.5, 0.9, 0.999):
        at = method.logit_at(probability)
        if method.law != NONE and at > -float("inf"):
            fires = method.fire_probability(torch.tensor([at], dtype=torch.float64)).item()
            assert fires == pytest.approx(probability, rel=1e-10)
        around = torch.tensor([max(at, -50.0) - 1e-3, max(at, -50.0) + 1e-3], dtype=torch.float64)
        under, over = method.fire_probability(around).tolist()
        assert over >= probability
        assert under < probability or at == -float("inf")


def check_half_precision(name, make):
    """Half-precision logits get float32 noise and fire exactly where the same numbers in float32 do."""
    method = make()
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.linspace(-4, 4, 65).to(dtype)
        noise = draw(method, logits)
        gates = method(method.replicate(logits, noise), noise)
        assert gates.dtype == dtype
        if method.law == NONE:
            continue
        assert noise.dtype == torch.float32
        if method.law.name == "uniform" and not alone(method):
            edge = splits(method, logits.float())
            for share in (1 - 1e-4, 1 + 1e-4):
                for noise in (edge * share).unbind(-1):
                    both = (gates_at(method, these, noise[None]) != 0 for these in (logits, logits.float()))
                    assert torch.equal(*both)


# ---------------------------------------------------------------- the surrogate


def check_value_kept(name, make):
    """The surrogate's value is the mean loss at the same noise, bit by bit."""
    if make().needs == "objective":
        return  # it takes the loss at several gates; check_expectation holds its mean
    for dtype, samples in itertools.product((torch.float32, torch.float64), (1, 3)):
        logits = logits_for(3, 4, dtype)
        for method in states(make, 3, 4):
            noise = draw(method, logits, samples)
            gates = method(method.replicate(logits, noise), noise)
            value = method.surrogate(squares, logits.clone().requires_grad_(), noise)
            assert torch.equal(value, squares(gates).mean(0))


def check_other_parameters(name, make):
    """Parameters of the objective receive the ordinary gradient of the mean loss at the same gates."""
    if make().needs == "objective":
        return
    logits = logits_for(3, 4)
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()

    def objective(h):
        return ((h * weight).sum(-1).tanh() - 0.3).square()

    for method in states(make, 3, 4):
        noise = draw(method, logits, samples=3)
        gates = method(method.replicate(logits, noise), noise).detach()
        (ordinary,) = torch.autograd.grad(objective(gates).mean(0).sum(), weight)
        value = method.surrogate(objective, logits.clone().requires_grad_(), noise)
        (found,) = torch.autograd.grad(value.sum(), weight)
        torch.testing.assert_close(found, ordinary, rtol=1e-13, atol=1e-15)


def check_generator(name, make):
    """One seed gives the same bits twice, and the noise of that seed given as an argument gives them again."""
    for method in states(make, 3, 4):
        results = []
        for given in (False, False, True):
            logits = logits_for(3, 4, torch.float32).requires_grad_()
            source, samples = torch.Generator().manual_seed(5), replicas_for(method, 2)
            how = {"noise": method.draw_noise(logits.expand(samples, 3, 4), source)} if given else {"generator": source}
            value = gatelet.surrogate(squares, logits, copy.deepcopy(method), samples=samples, **how)
            results.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
        for value, slope in results[1:]:
            assert torch.equal(value, results[0][0])
            assert torch.equal(slope, results[0][1])


def check_saturated(name, make):
    """Logits of ±100 give finite gates and gradients."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.tensor([[-100.0, 100.0, -30.0, 30.0, 0.0]], dtype=dtype)
        for method, seed in itertools.product(states(make, 1, 5), range(3)):
            noise = draw(method, logits, samples=2, seed=seed)
            assert method(method.replicate(logits, noise), noise).isfinite().all()
            assert gradient(method, squares, logits, noise).isfinite().all()
            leaf = logits.clone().requires_grad_()
            probability = method.fire_probability(leaf)
            assert probability.isfinite().all()
            if probability.requires_grad:
                assert torch.autograd.grad(probability.sum(), leaf)[0].isfinite().all()


def check_dtypes(name, make):
    """Gates, values and gradients have the logits' dtype; in float64 all digits are there."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = logits_for(3, 4, dtype)
        method = make()
        noise = draw(method, logits)
        assert method(method.replicate(logits, noise), noise).dtype == dtype
        assert method.surrogate(squares, logits, noise).dtype == dtype
        assert gradient(method, squares, logits, noise).dtype == dtype
    noise = draw(make(), logits_for(3, 4))
    assert noise.dtype == torch.float64
    slope = gradient(make(), squares, logits_for(3, 4), noise)
    single = gradient(make(), squares, logits_for(3, 4, torch.float32), noise.float())
    torch.testing.assert_close(single.double(), slope, rtol=1e-4, atol=1e-5)


def check_empty_batch(name, make):
    """A batch without examples passes, forward and backward."""
    logits = torch.zeros(0, 4)
    for method in states(make, 2, 4):
        noise = draw(method, logits, samples=2)
        assert method(method.replicate(logits, noise), noise).shape == (replicas_for(method, 2), 0, 4)
        assert method.surrogate(squares, logits, noise).shape == (0,)
        assert gradient(method, squares, logits, noise).shape == (0, 4)
        assert all(buffer.isfinite().all() for buffer in method.buffers())


def check_layouts(name, make):
    """Transposed, sliced and expanded logits and noise give the bits of contiguous ones."""
    logits = logits_for(3, 4)
    row = logits[:1]
    layouts = [
        (logits.t().contiguous().t(), logits),
        (torch.stack([logits, -logits], -1)[..., 0], logits),
        (row.expand(3, 4), row.expand(3, 4).contiguous()),
    ]
    for (strange, plain), method in itertools.product(layouts, states(make, 3, 4)):
        noise = draw(method, plain, samples=2)
        strange_noise = noise.movedim(2, 0).contiguous().movedim(0, 2)
        outcomes = []
        for these, z in ((plain, noise), (strange, strange_noise)):
            again = copy.deepcopy(method)
            # A view of a leaf, so that the gradient passes through the layout.
            leaf = these.detach().requires_grad_()
            value = again.surrogate(squares, leaf, z)
            outcomes.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
        assert torch.equal(outcomes[0][0], outcomes[1][0])
        assert torch.equal(outcomes[0][1], outcomes[1][1])


# ---------------------------------------------------------------- what is declared


def check_declared(name, make):
    """The attributes and the docstring say what a user has to know."""
    method = make()
    assert isinstance(method.unbiased, bool)
    assert isinstance(method.binary, bool)
    assert method.needs in ("path", "loss", "objective")
    assert method.support in ("none", "open", "sampled", "all")
    assert method.law.name in ("none", "uniform", "gaussian", "logistic")
    assert set(method.kinds) <= {"bernoulli", "categorical", "subset"}
    assert re.search(r"\b(19|20)\d\d\b", method.reference), "the reference has a year"
    text = type(method).__doc__ or ""
    assert re.search(r"\bBias:|unbiased", text), "the docstring says what the bias is"
    assert re.search(r"[Vv]ariance", text), "the docstring says what the variance is"
    assert "Reference:" in text
    assert ">>>" in text, "the docstring has an example"


def check_support(name, make):
    """∂L/∂h of a closed gate outside of the declared support has no effect on the gradient of the logits."""
    method = make()
    logits = logits_for(8, 4).requires_grad_()
    noise = draw(method, logits, samples=4)
    replicas = method.replicate(logits, noise)
    gates = method(replicas, noise)
    if method.support == "none":
        assert not gates.requires_grad
        assert method.needs != "path"
        return
    closed = gates == 0
    above = torch.linspace(0.5, 2, gates.numel(), dtype=torch.float64).reshape(gates.shape)
    (slope,) = torch.autograd.grad(gates, replicas, above, retain_graph=True)
    other = torch.where(closed, above - 9, above)
    (changed,) = torch.autograd.grad(gates, replicas, other)
    if method.support == "open":
        assert closed.any()
        assert (slope[closed] == 0).all()
        assert torch.equal(slope, changed)
    elif closed.any():
        assert method.support == "all" or (slope[closed] == 0).any(), "some closed units need not be computed"
        assert not torch.equal(slope, changed), "no closed gate asks for ∂L/∂h: the support is 'open'"
    assert (slope[~closed] != 0).any()


CHECKS = [
    check_expectation_of_replicas,
    check_fire_probability,
    check_breaks,
    check_logit_at,
    check_half_precision,
    check_value_kept,
    check_other_parameters,
    check_generator,
    check_saturated,
    check_dtypes,
    check_empty_batch,
    check_layouts,
    check_declared,
    check_support,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("name", "make"), CASES)
def test_contract(name, make, check):
    check(name, make)


def test_every_estimator_is_walked():
    assert {case.values[0] for case in CASES + CATEGORICAL} | {"simple"} == set(ALL)
    assert all(type(gatelet.estimators.resolve(name)) is cls for name, cls in ALL.items())
    # An oracle without its estimator is a truth that nobody is held to.
    assert set(oracles.EXACT) | set(oracles.EXPECTED) <= set(ALL)


# ---------------------------------------------------------------- the instrument


@pytest.mark.parametrize("samples", [1, 2])
def test_moments_equal_a_plain_loop(samples):
    """Mean, variance and value against one call of the surrogate per outcome, without vmap."""
    logits, loss = logits_for(2, 2), oracles.table(2, 2)
    method = gatelet.estimators.ScoreFunction("running_mean")
    method.surrogate(loss, logits, draw(method, logits))
    p = logits.sigmoid()
    parts = []
    for fires in itertools.product((True, False), repeat=2 * samples):
        on = torch.tensor(fires).reshape(samples, 1, 2)
        noise = torch.where(on, p / 2, (1 + p) / 2)
        weight = torch.where(on, p, 1 - p).prod(0).prod(-1)
        fresh = copy.deepcopy(method)
        value = fresh.surrogate(loss, logits, noise)
        parts.append((weight, value, gradient(copy.deepcopy(method), loss, logits, noise)))
    weight, value, slope = (torch.stack(part) for part in zip(*parts, strict=True))
    mean = (weight[..., None] * slope).sum(0)
    found = moments(loss, logits, method, samples=samples)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.variance, (weight[..., None] * (slope - mean) ** 2).sum(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.value, (weight * value).sum(0), rtol=0, atol=1e-14)


def test_moments_of_replicas_divide_the_variance():
    logits, loss = logits_for(3, 2), oracles.table(3, 2)
    one, three = (moments(loss, logits, "score_function", samples=k) for k in (1, 3))
    torch.testing.assert_close(three.mean, one.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(three.variance, one.variance / 3, rtol=0, atol=1e-14)


def test_moments_leave_the_estimator_as_it_was(monkeypatch):
    logits, loss = logits_for(3, 3), oracles.table(3, 3)
    method = gatelet.estimators.ScoreFunction()
    method.surrogate(loss, logits, draw(method, logits))
    before = copy.deepcopy(method.state_dict())
    whole = moments(loss, logits, method)
    after = method.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    # In chunks of one outcome, the state is the same for each of them.
    monkeypatch.setattr(sys.modules[moments.__module__], "_CHUNK", 1)
    for chunked, at_once in zip(moments(loss, logits, method), whole, strict=True):
        torch.testing.assert_close(chunked, at_once, rtol=0, atol=1e-14)


def test_moments_take_any_leading_shape_and_dtype():
    logits, loss = logits_for(6, 2), oracles.linear(6, 2)

    def nested(h):
        assert h.shape == (1, 2, 3, 2)
        assert h.dtype == torch.float32
        return loss(h.double().reshape(1, 6, 2)).reshape(1, 2, 3)

    found = moments(nested, logits.float().reshape(2, 3, 2), "score_function")
    flat = moments(loss, logits.float().double(), "score_function")
    for one, other in zip(found, flat, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=0, atol=1e-14)


def test_moments_of_a_loss_that_ignores_its_gates():
    found = moments(lambda h: torch.ones(h.shape[:-1], dtype=h.dtype), logits_for(3, 2), "straight_through")
    assert torch.equal(found.mean, torch.zeros(3, 2, dtype=torch.float64))


def test_moments_of_a_saturated_unit():
    logits = torch.tensor([[200.0, -200.0]], dtype=torch.float64)
    for name in ("score_function", "noisy_rectifier", "smooth_times_stochastic"):
        found = moments(squares, logits, name)
        assert all(part.isfinite().all() for part in found)


def test_moments_default_order_reaches_what_its_docstring_says():
    for method, error in (
        (gatelet.estimators.NoisyRectifier(), 1e-12),
        (gatelet.estimators.NoisyRectifier("logistic"), 1e-9),
    ):
        for objective in ("network", "quadratic"):
            logits, loss = logits_for(3, 2), oracles.OBJECTIVES[objective](3, 2)
            found, fine = moments(loss, logits, method), moments(loss, logits, method, order=128)
            torch.testing.assert_close(found.mean, fine.mean, rtol=0, atol=error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(1, 40)}, r"40 noise variables of 2 nodes have 2\^40 outcomes"),
        ({"logits": torch.zeros(1, 400), "samples": 3}, r"2\^1200 outcomes"),
        ({"estimator": "noisy_rectifier", "logits": torch.zeros(1, 5)}, "lower order"),
        ({"logits": torch.tensor([[float("nan")]])}, "logits holds 1 values that are NaN"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
        ({"order": 0}, "order must be an integer of at least 1"),
        ({"objective": lambda h: h.sum()}, "one loss per replica and example"),
        ({"estimator": "straight_trough"}, "did you mean 'straight_through'"),
    ],
    ids=["units", "overflow", "order", "nan", "samples", "order-0", "objective", "name"],
)
def test_moments_refuse(change, message):
    arguments = {"objective": squares, "logits": torch.zeros(2, 2), "estimator": "score_function", **change}
    with pytest.raises(ValueError, match=message):
        moments(**arguments)
