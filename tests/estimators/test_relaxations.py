"""The relaxed estimators against truths derived by hand (``oracles_relaxations.py``).

Expectations are integrals: Gauss–Legendre nodes in every unit's noise, a tensor product over the units. The nodes are
laid out as examples of one batch, every one with its own noise, so the estimates are the surrogate's own.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

import oracles
import oracles_relaxations as truth
from gatelet.diagnose.table import facts
from gatelet.estimators._kinds import Categorical
from gatelet.estimators._temperature import relax
from gatelet.estimators.concrete import Concrete, StraightThroughGumbel
from gatelet.estimators.gapped_straight_through import GappedStraightThrough
from gatelet.estimators.gumbel_rao import GumbelRao
from gatelet.estimators.hard_concrete import HardConcrete
from gatelet.estimators.rebar import REBAR, RELAX
from gatelet.estimators.reinmax import ReinMax
from gatelet.estimators.straight_through import ClippedStraightThrough

# Quadrature on both sides; 1e-12 to 3e-11 is reached.
QUADRATURE = 1e-9
ENUMERATED = 1e-12

LOGITS = torch.tensor([[0.7, -1.6, 0.2]], dtype=torch.float64)


def logits_for(units):
    return LOGITS[:, :units]


# ---------------------------------------------------------------- nodes


def product_of(parts):
    """Tensor product of (nodes (M, ...), weights (M,)), one per unit: nodes (Q, N, ...), weights (Q,)."""
    index = torch.cartesian_prod(*[torch.arange(len(weights)) for _, weights in parts]).reshape(-1, len(parts))
    nodes = torch.stack([nodes[index[:, i]] for i, (nodes, _) in enumerate(parts)], 1)
    return nodes, torch.stack([weights[index[:, i]] for i, (_, weights) in enumerate(parts)], 1).prod(1)


def logistic(order=24, at=0.0):
    """Nodes and weights of logistic noise, split where it carries y across 0."""
    cuts = [torch.tensor(float(c), dtype=torch.float64) for c in (-38, at - 6, at, at + 6, 38)]
    nodes, weights = truth.panels(cuts, order)
    return nodes, weights * oracles.logistic_density(nodes)


def cells(a):
    """A uniform number for h = 1 and one for h = 0, with their weights."""
    p = a.sigmoid()
    return torch.stack([p / 2, (1 + p) / 2]), torch.stack([p, 1 - p])


def estimates(method, loss, logits, noise):
    """Every node's estimate (Q, N) and value (Q,); noise (Q, N, ...) or (Q, V, C, ...), logits (1, ...)."""
    results = []
    for part in noise.split(1 << 18):
        leaf = logits.expand(len(part), *logits.shape[1:]).clone().requires_grad_()
        value = method.surrogate(loss, leaf, part[None])
        results.append((torch.autograd.grad(value.sum(), leaf)[0], value.detach()))
    return tuple(torch.cat(x) for x in zip(*results, strict=True))


def mean(found, weights):
    return (weights.reshape(-1, *(1,) * (found.dim() - 1)) * found).sum(0, keepdim=True)


def variance(found, weights):
    return mean((found - mean(found, weights)).square(), weights)


def expectation_by_logistic(method, loss, logits, order=24):
    """E[ĝ] of a unit with one logistic noise."""
    noise, weights = product_of([logistic(order, -a.item()) for a in logits[0]])
    return mean(estimates(method, loss, logits, noise)[0], weights)


def expectation_by_breaks(method, loss, logits, order=24):
    """The same, split at the unit's own breaks."""
    parts = []
    for breaks in facts(method).splits(method, logits)[0]:
        reach = [torch.tensor(c, dtype=torch.float64) for c in (-38.0, -7.0, 7.0, 38.0)]
        nodes, weights = truth.panels([*reach, *breaks.unbind()], order)
        parts.append((nodes, weights * oracles.logistic_density(nodes)))
    noise, weights = product_of(parts)
    return mean(estimates(method, loss, logits, noise)[0], weights)


def expectation_by_cells(method, loss, logits):
    """E[ĝ] of a unit with one uniform number, and a gradient that depends on the outcome only."""
    noise, weights = product_of([cells(a) for a in logits[0]])
    return mean(estimates(method, loss, logits, noise)[0], weights)


def expectation_of_rao(method, loss, logits, order=24):
    """E[ĝ] of one uniform number and one logistic draw."""
    noise, weights = product_of([product_of([cells(a), logistic(order)]) for a in logits[0]])
    return mean(estimates(method, loss, logits, noise)[0], weights)


def expectation_of_rebar(method, loss, logits, order=24, inner=24):
    """E[ĝ] for ĝ(ℓ, λ) = A(h(ℓ), λ) + B(ℓ), so that the two noises need no tensor product with each other.

    With one ℓ*(h) for each outcome: E[ĝ] = Σ_h P(h) E_λ[ĝ(ℓ*(h), λ)] + E_ℓ[ĝ(ℓ, 0) − ĝ(ℓ*(h(ℓ)), 0)]. That ĝ is
    such a sum is checked on random noise.
    """
    p = logits.sigmoid()

    def stand_in(free):
        return torch.where(free + logits > 0, 2 - logits, -1 - logits)

    def found(free, bound):
        return estimates(method, loss, logits, torch.stack([free, bound], -1))[0]

    free, one, other = (3 * oracles._draw(seed, 64, logits.shape[-1]) for seed in (20, 21, 22))
    change = [found(free, bound) - found(stand_in(free), bound) for bound in (one, other)]
    torch.testing.assert_close(*change, rtol=0, atol=1e-12)

    bound, weights = product_of([logistic(inner)] * logits.shape[-1])
    total = 0
    for outcome in itertools.product((-1.0, 2.0), repeat=logits.shape[-1]):
        free = torch.tensor(outcome, dtype=torch.float64) - logits
        share = torch.where(free + logits > 0, p, 1 - p).prod()
        total = total + share * mean(found(free.expand_as(bound), bound), weights)
    free, weights = product_of([logistic(order, -a.item()) for a in logits[0]])
    zero = torch.zeros_like(free)
    return total + mean(found(free, zero) - found(stand_in(free), zero), weights)


def close(found, expected, atol=QUADRATURE):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------- expectations of Bernoulli units


def check_concrete(method, loss, logits, order=24):
    close(expectation_by_logistic(method, loss, logits, order), truth.concrete(loss, logits, method.temperature))


def check_straight_through_gumbel(method, loss, logits, order=24):
    found = expectation_by_logistic(method, loss, logits, order)
    close(found, truth.straight_through_gumbel(loss, logits, method.temperature))


def check_gumbel_rao(method, loss, logits):
    found = expectation_of_rao(method, loss, logits)
    close(found, truth.straight_through_gumbel(loss, logits, method.temperature))


def check_hard_concrete(method, loss, logits, order=24):
    found = expectation_by_breaks(method, loss, logits, order)
    close(found, truth.hard_concrete(loss, logits, method.temperature, method.low, method.high))


def check_gapped(method, loss, logits):
    found = expectation_by_cells(method, loss, logits)
    close(found, truth.gapped(loss, logits, method.temperature, method.gap), ENUMERATED)


def check_reinmax(method, loss, logits):
    found = expectation_by_cells(method, loss, logits)
    close(found, truth.reinmax(loss, logits, method.temperature), ENUMERATED)


def check_clipped(method, loss, logits):
    found = expectation_by_cells(method, loss, logits)
    close(found, truth.clipped_straight_through(loss, logits, method.unit == "hard"), ENUMERATED)


def check_unbiased(method, loss, logits, order=24, inner=24):
    found = expectation_of_rebar(method, loss, logits, order, inner)
    close(found, oracles.bernoulli_gradient(loss, logits))


def check_fine(method, loss, logits):
    """With more nodes: tanh features with weights of 2 and more are steep."""
    check_unbiased(method, loss, logits, order=48, inner=48)


def random_relax(units=None, seed=0):
    """RELAX with every parameter away from its start: the default control, or a network of all units."""
    control = None if units is None else nn.Sequential(nn.Linear(units, 4), nn.Tanh(), nn.Linear(4, 1))
    method = RELAX(control, nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.8)))
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.control.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source))
    return method


OBJECTIVES = list(oracles.OBJECTIVES)
CHECKS = [
    (check_concrete, lambda: Concrete()),
    (check_concrete, lambda: Concrete(temperature=1.3)),
    (check_straight_through_gumbel, lambda: StraightThroughGumbel()),
    (check_straight_through_gumbel, lambda: StraightThroughGumbel(temperature=torch.tensor(1.3).double())),
    (check_gumbel_rao, lambda: GumbelRao(inner=1)),
    (check_gumbel_rao, lambda: GumbelRao(inner=1, temperature=1.3)),
    (check_hard_concrete, lambda: HardConcrete()),
    (check_hard_concrete, lambda: HardConcrete(temperature=0.5, low=-0.2, high=1.3)),
    (check_gapped, lambda: GappedStraightThrough()),
    (check_gapped, lambda: GappedStraightThrough(gap=0.4, temperature=0.5)),
    (check_reinmax, lambda: ReinMax()),
    (check_reinmax, lambda: ReinMax(temperature=1.5)),
    (check_clipped, lambda: ClippedStraightThrough()),
    (check_clipped, lambda: ClippedStraightThrough("hard")),
    (check_unbiased, lambda: REBAR()),
    (check_unbiased, lambda: REBAR(eta=-0.6, temperature=nn.Parameter(torch.tensor(0.9).double()))),
    (check_unbiased, lambda: RELAX()),
    (check_fine, lambda: random_relax()),
]


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("check", "make"), CHECKS, ids=[f"{check.__name__[6:]}-{i}" for i, (check, _) in enumerate(CHECKS)]
)
def test_expectation(check, make, objective, units):
    check(make(), oracles.OBJECTIVES[objective](1, units), logits_for(units))


@pytest.mark.parametrize("objective", ["table", "network"])
def test_expectation_of_a_network_as_control(objective):
    check_fine(random_relax(units=2), oracles.OBJECTIVES[objective](1, 2), logits_for(2))


@pytest.mark.parametrize(
    ("check", "make", "options"),
    [
        (check_concrete, lambda: Concrete(temperature=1.0), {"order": 20}),
        (check_straight_through_gumbel, lambda: StraightThroughGumbel(temperature=1.0), {"order": 20}),
        (check_hard_concrete, lambda: HardConcrete(), {"order": 20}),
        (check_gapped, lambda: GappedStraightThrough(), {}),
        (check_reinmax, lambda: ReinMax(), {}),
        (check_clipped, lambda: ClippedStraightThrough(), {}),
        (check_unbiased, lambda: REBAR(temperature=1.0), {"order": 20, "inner": 14}),
    ],
    ids=["concrete", "straight_through_gumbel", "hard_concrete", "gapped", "reinmax", "clipped", "rebar"],
)
def test_expectation_of_three_units(check, make, options):
    check(make(), oracles.network(1, 3), logits_for(3), **options)


def test_expectation_of_rebar_by_the_full_tensor_product():
    """The sum of two integrals, against the integral over both noises at once; the value is the expected loss."""
    logits, loss, method = logits_for(1), oracles.network(1, 1), REBAR()
    noise, weights = product_of([product_of([logistic(at=-logits.item()), logistic()])])
    found, value = estimates(method, loss, logits, noise)
    close(mean(found, weights), oracles.bernoulli_gradient(loss, logits))
    close(mean(value, weights), oracles.bernoulli_value(loss, logits))


# ---------------------------------------------------------------- limits and exactness


def cubic(h):
    return (h - 0.45).abs().pow(3).sum(-1) + h.pow(3).prod(-1)


def test_concrete_tends_to_the_exact_gradient():
    """As τ → 0, with an error of order τ; for a linear loss of order τ²."""
    logits = logits_for(1)
    for loss, order in ((lambda h: h.exp().sum(-1), 1), (lambda h: 3 * h.sum(-1), 2)):
        exact = oracles.bernoulli_gradient(loss, logits)
        error = [(truth.concrete(loss, logits, tau) - exact).abs().item() for tau in (0.01, 0.005, 0.0025)]
        assert error[0] / error[1] == pytest.approx(2**order, rel=0.05)
        assert error[1] / error[2] == pytest.approx(2**order, rel=0.05)
        assert error[2] < 5e-3


@pytest.mark.parametrize("make", [StraightThroughGumbel, lambda temperature: GumbelRao(1, temperature)])
def test_straight_through_gumbel_tends_to_the_trapezoid_rule(make):
    """As τ → 0 exact for quadratic losses, and only for those."""
    logits = logits_for(2)
    for tau in (0.02, 0.01):
        found = truth.straight_through_gumbel(cubic, logits, tau)
        close(found, truth.trapezoid(cubic, logits), 3 * tau)
        quadratic = oracles.quadratic(1, 2)
        found = truth.straight_through_gumbel(quadratic, logits, tau)
        close(found, oracles.bernoulli_gradient(quadratic, logits), 6 * tau)
    assert (truth.trapezoid(cubic, logits) - oracles.bernoulli_gradient(cubic, logits)).abs().max() > 0.03
    # The library's own mean at a small τ, near 0 with panels as steep as it is.
    parts = []
    method = make(temperature=0.02)
    if isinstance(method, GumbelRao):
        return  # its expectation is the same function of τ, see test_expectation
    for a in logits[0]:
        nodes, weights = truth.around_zero(a, 0.02, 12)
        parts.append((nodes - a, weights * oracles.logistic_density(nodes - a)))
    noise, weights = product_of(parts)
    close(mean(estimates(method, cubic, logits, noise)[0], weights), truth.trapezoid(cubic, logits), 0.06)


def test_gapped_vanishes_at_temperature_zero():
    for tau in (0.1, 0.05):
        found = expectation_by_cells(GappedStraightThrough(temperature=tau), cubic, logits_for(2))
        assert found.abs().max() < 6 * torch.tensor(-1 / tau).exp() / tau


def test_reinmax_is_exact_on_quadratics():
    for units, objective in itertools.product((1, 2, 3), ("linear", "quadratic", "product", "table")):
        loss, logits = oracles.OBJECTIVES[objective](1, units), logits_for(units)
        found = expectation_by_cells(ReinMax(), loss, logits)
        close(found, oracles.bernoulli_gradient(loss, logits), ENUMERATED)
        close(found, truth.trapezoid(loss, logits), ENUMERATED)
    biased = expectation_by_cells(ReinMax(), cubic, logits_for(2)) - oracles.bernoulli_gradient(cubic, logits_for(2))
    assert biased.abs().max() > 0.03


# ---------------------------------------------------------------- variance


def toy(h):
    return (h - 0.45).square().sum(-1)


def test_variance_of_rao_is_at_most_that_of_straight_through_gumbel():
    logits = logits_for(1)
    noise, weights = product_of([logistic(at=-logits.item())])
    plain = variance(estimates(StraightThroughGumbel(), toy, logits, noise)[0], weights)
    found = []
    for inner, order in ((1, 24), (2, 24), (3, 10)):
        noise, weights = product_of([product_of([cells(logits[0, 0])] + [logistic(order)] * inner)])
        found.append(variance(estimates(GumbelRao(inner), toy, logits, noise)[0], weights))
    close(found[0], plain)
    # Var = Var(E[ĝ | h]) + E[Var(ĝ | h)]/S, so the second differences are those of 1/S.
    assert found[2] < found[1] < found[0]
    close((found[0] - found[1]) / (found[0] - found[2]), torch.full_like(plain, 0.75), 1e-4)


def rebar_variances(loss, logits, **options):
    """The variance at the given η, at the best one, and at η = 0, where it is the score function's."""
    noise, weights = product_of([product_of([logistic(at=-logits.item()), logistic()])])

    def at(eta):
        return variance(estimates(REBAR(eta, **options), loss, logits, noise)[0], weights).item()

    zero, one, minus = at(0.0), at(1.0), at(-1.0)
    square, slope = (one + minus) / 2 - zero, (one - minus) / 2  # a quadratic function of η
    assert at(0.3) == pytest.approx(zero + 0.3 * slope + 0.09 * square, rel=1e-9)
    return one, zero - slope**2 / (4 * square), zero


def test_variance_of_rebar_against_the_score_function():
    """E[(b − .45)²] at logit −2: 8.87e-3 for the plain score function."""
    logits = torch.tensor([[-2.0]], dtype=torch.float64)
    p = logits.sigmoid()
    exact = p * (1 - p) * (0.55**2 - 0.45**2)
    score = (p * ((1 - p) * 0.55**2) ** 2 + (1 - p) * (p * 0.45**2) ** 2 - exact**2).item()
    assert score == pytest.approx(8.87e-3, rel=1e-3)
    for temperature in (0.5, 1.0, 2.0, 4.0):
        fixed, best, zero = rebar_variances(toy, logits, temperature=temperature)
        assert zero == pytest.approx(score, rel=1e-9)
        assert best < score
        # This loss is 0 between its hard gates: as a control variate, η = 1 is too much of it.
        assert (fixed < score) == (temperature == 4.0)
        if temperature == 0.5:
            assert fixed == pytest.approx(1.33e-2, rel=1e-2)
    # Where the relaxed loss follows the hard one, the defaults reduce it.
    for loss in (lambda h: (h + 1).square().sum(-1), lambda h: (1 + h).sum(-1)):
        fixed, best, zero = rebar_variances(loss, logits)
        assert best <= fixed < 0.3 * zero


def test_training_lowers_the_variance_of_relax():
    logits = torch.tensor([[-2.0]], dtype=torch.float64)
    noise, weights = product_of([product_of([logistic(12, 2.0), logistic(12)])])
    method = RELAX(eta=nn.Parameter(torch.tensor(1.0)), temperature=nn.Parameter(torch.tensor(0.5)))
    before = variance(estimates(method, toy, logits, noise)[0], weights)
    optimiser = torch.optim.Adam(method.parameters(), lr=0.02)
    source = torch.Generator().manual_seed(1)
    for _ in range(200):
        optimiser.zero_grad()
        batch = logits.expand(256, 1)
        method.surrogate(toy, batch, method.draw_noise(batch[None], source)).mean().backward()
        optimiser.step()
    after, _ = estimates(method, toy, logits, noise)
    assert variance(after, weights) < 0.7 * before
    p = logits.sigmoid()
    close(mean(after, weights), p * (1 - p) * (0.55**2 - 0.45**2), 1e-5)  # 12 nodes, a learned temperature


# ---------------------------------------------------------------- learned parameters


def test_temperature_of_concrete_receives_the_gradient_of_the_expected_loss():
    logits, loss = logits_for(2), oracles.network(1, 2)
    temperature = nn.Parameter(torch.tensor(0.6).double())
    method = Concrete(temperature)
    noise, weights = product_of([logistic(at=-a.item()) for a in logits[0]])
    value = method.surrogate(loss, logits.expand(len(noise), 2), noise[None])
    (found,) = torch.autograd.grad((weights * value).sum(), temperature)
    above, below = (truth.concrete_value(loss, logits, 0.6 + step) for step in (1e-4, -1e-4))
    close(found, ((above - below) / 2e-4).squeeze(), 1e-7)


@pytest.mark.parametrize("make", [StraightThroughGumbel, lambda temperature: GumbelRao(3, temperature), HardConcrete])
def test_temperature_is_learned(make):
    temperature = nn.Parameter(torch.tensor(0.7).double())
    method = make(temperature=temperature)
    assert [name for name, _ in method.named_parameters()] == ["temperature"]
    noise = method.draw_noise(logits_for(3).expand(8, 1, 3))
    value = method.surrogate(oracles.network(1, 3), logits_for(3), noise).sum()
    (found,) = torch.autograd.grad(value, temperature)
    assert found.isfinite()
    assert found != 0


def test_temperature_of_a_float_a_buffer_and_a_parameter_agree():
    logits = logits_for(3)
    for cls in (Concrete, StraightThroughGumbel, GumbelRao, GappedStraightThrough, HardConcrete, REBAR, RELAX):
        kinds = [cls(temperature=t) for t in (0.75, torch.tensor(0.75), nn.Parameter(torch.tensor(0.75)))]
        noise = kinds[0].draw_noise(logits.expand(2, 1, 3))
        found = [gradient(method, oracles.network(1, 3), logits, noise) for method in kinds]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert "temperature" in kinds[1].state_dict()
        assert "temperature" not in kinds[0].state_dict()


@pytest.mark.parametrize(
    "value",
    [0.0, -1.0, float("nan"), torch.tensor(0.0), torch.ones(2), torch.tensor(1), torch.ones((), requires_grad=True)],
)
def test_temperature_is_checked(value):
    with pytest.raises(ValueError, match="temperature"):
        Concrete(value)


def test_a_temperature_that_learning_has_made_negative_is_refused():
    method = Concrete(nn.Parameter(torch.tensor(0.1)))
    with torch.no_grad():
        method.temperature.sub_(0.2)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        method(torch.zeros(3), torch.zeros(3))


def gradient(method, loss, logits, noise):
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(method.surrogate(loss, leaf, noise).sum(), leaf)[0]


def test_parameters_of_rebar_and_relax_receive_the_gradient_of_the_mean_square():
    """Against central differences of mean(ĝ²), one replica, float64; nothing else feels the variance objective."""
    batch, units = 5, 3
    logits = torch.randn(batch, units, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = torch.linspace(-1, 1, units, dtype=torch.float64).requires_grad_()

    def loss(h):
        return ((h * weight).sum(-1).tanh() - 0.3).square()

    rebar = REBAR(nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(0.6))).double()
    for method in (rebar, random_relax(units=3).double(), random_relax().double()):
        noise = method.draw_noise(logits.expand(1, batch, units), torch.Generator().manual_seed(4))
        leaf = logits.clone().requires_grad_()
        value = method.surrogate(loss, leaf, noise)
        names, parameters = zip(*method.named_parameters(), strict=True)
        found = torch.autograd.grad(value.mean(), [leaf, weight, *parameters])
        # Logits and the objective's weights: as if nothing were learned.
        fixed = copy.deepcopy(method).requires_grad_(False)
        plain = torch.autograd.grad(fixed.surrogate(loss, leaf, noise).mean(), [leaf, weight])
        assert torch.equal(plain[0], found[0])
        assert torch.equal(plain[1], found[1])
        gates = method(logits[None], noise)
        close(found[1], torch.autograd.grad(loss(gates).mean(), weight)[0], 1e-15)
        close(value, loss(gates)[0], 0)
        for name, parameter, slope in zip(names, parameters, found[2:], strict=True):
            for index in list(itertools.product(*map(range, parameter.shape)))[:3]:
                squares = []
                for step in (1e-5, -1e-5):
                    moved = copy.deepcopy(fixed)
                    moved.get_parameter(name).data[index] += step
                    squares.append(gradient(moved, loss, logits, noise).square().mean())
                close(slope[index], (squares[0] - squares[1]) / 2e-5, 1e-8)


def test_a_control_of_another_shape_is_refused():
    method = RELAX(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"control must map \(2, 5, 3\) to \(2, 5\), but returned \(2, 5, 2\)"):
        method.surrogate(toy, torch.zeros(5, 3), method.draw_noise(torch.zeros(2, 5, 3)))


# ---------------------------------------------------------------- categorical units


CATEGORICAL = [
    (lambda kind: Concrete(0.7, kind), "logistic"),
    (lambda kind: StraightThroughGumbel(0.7, kind), "logistic"),
    (lambda kind: GumbelRao(3, 0.7, kind), "uniform"),
    (lambda kind: GappedStraightThrough(0.8, 0.7, kind), "uniform"),
    (lambda kind: ReinMax(1.2, kind), "uniform"),
    (lambda kind: REBAR(0.8, 0.7, kind), "logistic"),
]


@pytest.mark.parametrize(("make", "law"), CATEGORICAL)
def test_two_classes_equal_the_bernoulli_form(make, law):
    """Noise for noise, not only on average: a = a1 − a0, the gate that of the first class."""
    categorical, bernoulli = make("categorical"), make("bernoulli")
    classes = oracles._draw(30, 40, 3, 2)
    logits = classes[..., 0] - classes[..., 1]
    loss = oracles.network(40, 6)
    g = categorical.draw_noise(classes.expand(2, 40, 3, 2), torch.Generator().manual_seed(0))
    main = g if not categorical.more else g[..., 0]
    noise = main[..., 0] - main[..., 1]
    hard = (noise + logits > 0).double()
    if law == "uniform":
        noise = (-noise).sigmoid()
    if categorical.more:
        # λ is the noise of the open class less that of the other.
        extra = (2 * hard[..., None] - 1) * (g[..., 0, 1:] - g[..., 1, 1:])
        noise = torch.cat([noise[..., None], extra], -1)

    leaves = [classes.clone().requires_grad_(), logits.clone().requires_grad_()]
    found = categorical.surrogate(lambda h: loss(h.flatten(-2)), leaves[0], g)
    expected = bernoulli.surrogate(lambda h: loss(torch.stack([h, 1 - h], -1).flatten(-2)), leaves[1], noise)
    close(found, expected, 1e-12)
    found, expected = (torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in zip((found, expected), leaves, strict=True))
    close(found[..., 0], expected, 1e-12)
    close(found[..., 1], -expected, 1e-12)


THREE = torch.tensor([[[0.5, -0.7, 0.1], [-1.0, 0.3, 0.2]]], dtype=torch.float64)


def three_quadratic(h):
    """Quadratic, with pairs within and between the variables."""
    return oracles.quadratic(1, 6)(h.flatten(-2))


def three_network(h):
    return oracles.network(1, 6)(h.flatten(-2))


def expectation_of_classes(method, loss, logits):
    """E[ĝ] of an estimator that depends on the outcome only: any noise under which a class wins stands for it."""
    hard = truth.outcomes_of(*logits.shape[1:])
    weights = (logits.softmax(-1) * hard).sum(-1).prod(-1)
    return mean(estimates(method, loss, logits, 50 * hard - logits)[0], weights)


def test_reinmax_of_three_classes():
    for loss in (three_quadratic, three_network):
        found = expectation_of_classes(ReinMax(1.3, "categorical"), loss, THREE)
        p, tempered = THREE.softmax(-1), (THREE / 1.3).softmax(-1)

        def jacobian(h, p=p, tempered=tempered):
            return 2 * truth.softmax_jacobian((h + tempered) / 2) - truth.softmax_jacobian(p) / 2

        close(found, truth.categorical_with_jacobians(loss, THREE, jacobian), ENUMERATED)
    exact = truth.categorical_gradient(three_quadratic, THREE)
    close(expectation_of_classes(ReinMax(kind="categorical"), three_quadratic, THREE), exact, ENUMERATED)

    def one(h):
        return (h[..., 0, :] * torch.tensor([1.0, 2.0, -1.0]).double()).sum(-1).exp()

    found = expectation_of_classes(ReinMax(kind="categorical"), one, THREE[:, :1])
    close(found, truth.categorical_trapezoid(one, THREE[:, :1]), ENUMERATED)
    assert (found - truth.categorical_gradient(one, THREE[:, :1])).abs().max() > 1e-2


def test_gapped_of_three_classes():
    method = GappedStraightThrough(0.8, 0.6, "categorical")

    def jacobian(h):
        return truth.softmax_jacobian((truth.gapped_logits(THREE, h, 0.8) / 0.6).softmax(-1)) / 0.6

    found = expectation_of_classes(method, three_network, THREE)
    close(found, truth.categorical_with_jacobians(three_network, THREE, jacobian), ENUMERATED)


# Monte Carlo, fixed seed: every mean within 4.5 of its standard errors, which are under 5e-3 (twelve numbers a case;
# a right estimator fails at one seed in ten thousand).
MANY, ERRORS, LARGEST = 400_000, 4.5, 5e-3


def agree(samples, expected):
    error = samples.std(0) / len(samples) ** 0.5
    assert (error < LARGEST).all()
    assert ((samples.mean(0) - expected).abs() < ERRORS * error).all()


def drawn(method, loss, seed=0):
    noise = method.draw_noise(THREE.expand(1, MANY, 2, 3), torch.Generator().manual_seed(seed))[0]
    return noise, estimates(method, loss, THREE, noise)[0]


@pytest.mark.parametrize("make", [REBAR, RELAX], ids=["rebar", "relax"])
def test_control_variates_of_three_classes_are_unbiased(make):
    method = make(temperature=0.7, kind="categorical")
    if make is RELAX:
        nn.init.normal_(method.control.weight, generator=torch.Generator().manual_seed(2))
        method.requires_grad_(False)
    agree(drawn(method, three_network)[1], truth.categorical_gradient(three_network, THREE)[0])


def test_concrete_of_three_classes():
    """The path against the score of the same noise: E[L·∂log density of a + g] = E[L·(1 − e^{−g})]."""
    noise, path = drawn(Concrete(0.7, "categorical"), three_network)
    losses = three_network(((THREE + noise) / 0.7).softmax(-1)[None])[0]
    score = (losses - losses.mean())[:, None, None] * (1 - torch.exp(-noise))
    agree(path - score, 0.0)


def test_rao_of_three_classes_has_the_mean_of_straight_through_gumbel():
    plain = drawn(StraightThroughGumbel(0.7, "categorical"), three_network)[1]
    rao = drawn(GumbelRao(3, 0.7, "categorical"), three_network, seed=1)[1]
    agree(rao - plain, 0.0)
    # S = 1 has the law of straight-through Gumbel, so three draws have less variance in every entry.
    assert (rao.var(0) < plain.var(0)).all()


def test_conditional_gumbels_have_the_law_of_the_perturbed_logits():
    """z̃ given the winner, over winners with their probabilities, is a + g; and the winner stays the winner."""
    source = torch.Generator().manual_seed(0)
    gumbel = [-(-torch.rand(MANY, 3, generator=source, dtype=torch.float64).log()).log() for _ in range(2)]
    logits = THREE[0, :1].expand(MANY, 3)
    gates = torch.zeros_like(logits).scatter(-1, (logits + gumbel[0]).argmax(-1, keepdim=True), 1.0)
    z = Categorical().condition(logits, gates, gumbel[1])
    assert torch.equal(z.argmax(-1), gates.argmax(-1))
    agree(z - logits, torch.full((3,), 0.5772156649, dtype=torch.float64))
    centred = (z - logits - 0.5772156649).square()
    agree(centred / 2, torch.full((3,), torch.pi**2 / 12, dtype=torch.float64))
    agree(z[:, :1] * z[:, 1:], (logits[0, 0] + 0.5772156649) * (logits[0, 1:] + 0.5772156649))


# ---------------------------------------------------------------- what a user may do


EVERY = {
    "concrete": Concrete,
    "straight_through_gumbel": StraightThroughGumbel,
    "gumbel_rao": GumbelRao,
    "gapped_straight_through": GappedStraightThrough,
    "hard_concrete": HardConcrete,
    "reinmax": ReinMax,
    "clipped_straight_through": ClippedStraightThrough,
    "rebar": REBAR,
    "relax": RELAX,
}
KINDS = [(name, kind) for name, cls in EVERY.items() for kind in cls.kinds]


def build(name, kind):
    if kind == "subset":
        return EVERY[name](kind=kind, k=2)
    return EVERY[name](kind=kind) if len(EVERY[name].kinds) > 1 else EVERY[name]()


def squares(h):
    dims = tuple(range(2, h.dim()))
    return (h - torch.linspace(-1, 2, h.shape[-1], dtype=h.dtype)).square().sum(dims)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_saturated_logits(name, kind, dtype):
    method = build(name, kind)
    logits = torch.tensor([[-100.0, 100.0, 30.0], [0.0, -30.0, 100.0]], dtype=dtype)
    logits = logits[:, None] if kind == "categorical" else logits
    for seed in range(3):
        noise = method.draw_noise(logits.expand(4, *logits.shape), torch.Generator().manual_seed(seed))
        leaf = logits.clone().requires_grad_()
        value = method.surrogate(squares, leaf, noise)
        value.sum().backward()
        assert value.dtype == leaf.grad.dtype == dtype
        assert value.isfinite().all()
        assert leaf.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in method.parameters())
        gates = method(logits.expand(4, *logits.shape), noise)
        assert gates.dtype == dtype
        if kind == "categorical":
            close(gates.float().sum(-1), torch.ones(4, 2, 1), 1e-2)
    assert method.open_value(logits).isfinite().all()
    if kind == "bernoulli":
        assert (method.open_value(logits) > 0).all()


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_empty_batch_strides_and_vmap(name, kind):
    method = build(name, kind)
    shape = (4, 2, 3) if kind == "categorical" else (4, 3)
    empty = torch.zeros(0, *shape[1:])
    assert method.surrogate(squares, empty, method.draw_noise(empty.expand(2, *empty.shape))).shape == (0,)
    logits = oracles._draw(40, *shape)
    noise = method.draw_noise(logits.expand(2, *shape), torch.Generator().manual_seed(0))
    plain = gradient(method, squares, logits, noise)
    strided = torch.stack([logits, logits], -1)[..., 0].detach()
    leaf = strided.requires_grad_()
    scattered = noise.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not leaf.is_contiguous()
    found = torch.autograd.grad(method.surrogate(squares, leaf, scattered).sum(), leaf)[0]
    assert torch.equal(found, plain)

    def one(a, z):
        return method.surrogate(lambda h: squares(h), a[None], z[:, None]).sum()

    found = torch.func.vmap(torch.func.grad(one), in_dims=(0, 1))(logits, noise)
    close(found, plain, 1e-12)


def test_a_hard_concrete_unit_is_open_with_its_probability():
    method = HardConcrete()
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    opens = -logits + 2 / 3 * torch.tensor(0.1 / 1.1, dtype=torch.float64).log()
    close(facts(method).splits(method, logits)[:, 0], opens, 1e-12)
    assert (method(logits, opens - 1e-9) == 0).all()
    assert (method(logits, opens + 1e-9) > 0).all()
    close(method.fire_probability(logits), oracles.logistic_cumulative(-opens), 1e-14)
    for probability in (1e-4, 0.3, 0.999):
        at = torch.tensor([method.logit_at(probability)], dtype=torch.float64)
        assert method.fire_probability(at).item() == pytest.approx(probability, rel=1e-12)
    # Half of the open mass lies above the open value.
    middle = method.open_value(logits)
    inside = middle < 1
    y = 2 / 3 * torch.logit((middle + 0.1) / 1.2)
    close(oracles.logistic_cumulative(logits - y)[inside], (method.fire_probability(logits) / 2)[inside], 1e-12)
    assert inside.any()


def test_relaxed_gates_are_never_closed_and_fire_probability_is_that_of_the_hard_gate():
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    noise = torch.randn(1000, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates = Concrete()(logits.expand_as(noise), noise)
    assert ((gates > 0) & (gates < 1)).all()
    assert torch.equal(gates > 0.5, StraightThroughGumbel()(logits.expand_as(noise), noise) == 1)
    assert torch.equal(Concrete().fire_probability(logits), logits.sigmoid())


# ---------------------------------------------------------------- wrong on purpose


class SharedNoise(REBAR):
    """One conditional noise for all units (as a peer ships it)."""

    def _estimate(self, objective, logits, gates, losses, noise, values):
        shared = torch.stack([noise[..., 0], noise[..., :1, 1].expand(noise.shape[:-1])], -1)
        return super()._estimate(objective, logits, gates, losses, shared, values)


class ForgetsItsConditionalPath(REBAR):
    """Does not differentiate z̃ (a control variate whose mean is not given back)."""

    def _estimate(self, objective, logits, gates, losses, noise, values):
        right = super()._estimate(objective, logits, gates, losses, noise, values)

        def bound(a):
            return self._control(objective, self.form.condition(a, gates, noise[..., 1]), values, a.dtype).sum()

        return right + values.get("eta", self.eta) * torch.func.grad(bound)(logits)


class WithoutTheHalf(ReinMax):
    """2 p₁(1 − p₁) alone."""

    def forward(self, logits, noise):
        h = super().forward(logits, noise)
        p = logits.detach().sigmoid()
        return h + p * (1 - p) / 2 * (logits - logits.detach())


class OneNoiseForAll(HardConcrete):
    """One noise value for all units (as a peer ships it)."""

    def forward(self, logits, noise):
        return super().forward(logits, noise[..., :1].expand(noise.shape))


class ThroughTheConditionalDraw(GumbelRao):
    """Differentiates the conditional draw instead of holding its noise."""

    def forward(self, logits, noise):
        gates = self.sample(logits, noise[..., 0])
        z = self.form.condition(
            logits.expand(noise.shape[-1] - 1, *logits.shape),
            gates[None].expand(noise.shape[-1] - 1, *gates.shape),
            noise[..., 1:].movedim(-1, 0),
        )
        path = relax(z, self.temperature, self.form).mean(0)
        return gates + path - path.detach()


@pytest.mark.parametrize(
    ("check", "right", "wrong", "objective"),
    [
        (check_unbiased, REBAR, SharedNoise, "network"),
        (check_unbiased, REBAR, ForgetsItsConditionalPath, "network"),
        (check_reinmax, ReinMax, WithoutTheHalf, "quadratic"),
        (check_hard_concrete, HardConcrete, OneNoiseForAll, "quadratic"),
        (check_gumbel_rao, lambda: GumbelRao(1), lambda: ThroughTheConditionalDraw(1), "quadratic"),
    ],
    ids=["shared-noise", "no-conditional-path", "without-the-half", "one-noise-for-all", "through-the-draw"],
)
def test_wrong_versions_are_rejected(check, right, wrong, objective):
    loss, logits = oracles.OBJECTIVES[objective](1, 2), logits_for(2)
    check(right(), loss, logits)
    with pytest.raises(AssertionError, match="not close"):
        check(wrong(), loss, logits)
