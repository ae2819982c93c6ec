"""The paper's propositions, theorem and corollary, and what it says of straight-through: exact, in float64."""

import itertools
import math
import sys

import pytest
import torch

import gatelet
import oracles
from gatelet.diagnose import exact_gradient, moments
from gatelet.estimators import NoisyRectifier, ScoreFunction, SmoothTimesStochastic, StraightThrough

LOGITS = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]  # a batch of 13 single units


def total(h):
    return h.sum(-1)


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


# ---------------------------------------------------------------- Proposition 1: the noisy rectifier


def test_proposition_1_logistic_noise():
    """P(h > 0) = σ(a); E[h] = softplus(a); hence E[dh/da] = σ(a)."""
    unit = NoisyRectifier(noise="logistic")
    found = moments(total, LOGITS, unit, order=128)
    close(found.value, LOGITS[:, 0].exp().log1p())
    close(found.mean, LOGITS.sigmoid())
    # dh/da is 1 where h > 0 and 0 elsewhere, so its second moment is P(h > 0) too.
    close(found.variance + found.mean.square(), LOGITS.sigmoid())
    close(unit.fire_probability(LOGITS), LOGITS.sigmoid(), atol=1e-15)
    close(unit.open_value(LOGITS)[:, 0], found.value)


@pytest.mark.parametrize(("noise", "std"), [("gaussian", 1.0), ("gaussian", 0.5), ("logistic", 2.0)])
def test_the_rectifiers_open_value_is_its_mean(noise, std):
    unit = NoisyRectifier(noise, std)
    found = moments(total, LOGITS, unit, order=128)
    close(unit.open_value(LOGITS)[:, 0], found.value)
    close(unit.fire_probability(LOGITS), found.mean)


# ---------------------------------------------------------------- Proposition 2: smooth times stochastic


def test_proposition_2_mean_and_rate():
    """(a) E[h] = p; (b), corrected: P(h > 0) = √p."""
    p = LOGITS.sigmoid()
    found = moments(total, LOGITS, "smooth_times_stochastic")
    close(found.value, p[:, 0], atol=1e-15)
    close(SmoothTimesStochastic().open_value(LOGITS), p, atol=1e-15)
    # h² is p where the unit fires: E[h²]/p = P(h > 0).
    second = moments(lambda h: h.square().sum(-1), LOGITS, "smooth_times_stochastic").value
    close(second / p[:, 0], p[:, 0].sqrt(), atol=1e-14)
    close(SmoothTimesStochastic().fire_probability(LOGITS), p.sqrt(), atol=1e-15)
    # What the paper prints in (b) is another number: at p = 0.1 the unit fires 32 % of the time.
    at = torch.tensor([[math.log(0.1 / 0.9)]], dtype=torch.float64)
    assert SmoothTimesStochastic().fire_probability(at).item() == pytest.approx(0.31623, abs=1e-5)


@pytest.mark.parametrize(
    ("f", "second_derivative"),
    [(torch.exp, 1.0), (lambda h: (1 + h).log(), -1.0), (lambda h: (h - 0.3).sin(), math.sin(0.3))],
    ids=["exp", "log", "sin"],
)
def test_proposition_2_smooth_functions(f, second_derivative):
    """(c) E[f(h)] = f(p) + o(√p); in fact the error is f″(0)/2·p^1.5 + O(p²)."""
    p = torch.tensor([4.0**-k for k in range(4, 13)], dtype=torch.float64)
    found = moments(lambda h: f(h).sum(-1), p.logit()[:, None], "smooth_times_stochastic")
    error = found.value - f(p)
    ratio = (error / p.sqrt()).abs()
    assert (ratio[1:] < ratio[:-1] / 3).all()
    # The observed order tends to 1.5, and the next term is √p smaller: its share halves when p falls fourfold.
    distance = ((error[:-1] / error[1:]).log() / math.log(4) - 1.5).abs()
    assert distance[-1] < 2e-3
    assert (distance[1:] < 0.6 * distance[:-1]).all()
    assert (error[6] / p[6] ** 1.5).item() == pytest.approx(second_derivative / 2, rel=0.02)


# ---------------------------------------------------------------- Theorem 1 and Corollary 1


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
def test_theorem_1_and_corollary_1_in_one_layer(objective):
    """E[(h − σ)L] = E[(h − σ)(L − c)] = ∂E[L]/∂a for every constant c per unit and every loss."""
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0], [-3.0, 0.4, -0.2, 1.0]], dtype=torch.float64)
    loss = oracles.OBJECTIVES[objective](2, 4)
    truth = oracles.bernoulli_gradient(loss, logits)
    close(moments(loss, logits, ScoreFunction("none")).mean, truth)
    for constant in (torch.tensor([-1.0, 0.0, 3.0, 100.0]), torch.tensor([0.5])):
        close(moments(loss, logits, with_baseline(constant)).mean, truth)


def with_baseline(constant):
    """A ScoreFunction whose moving averages stand at these constants: (N,), one per unit, or (1,), one for all."""
    unit = ScoreFunction("per_unit" if constant.numel() > 1 else "running_mean").double()
    unit.numerator, unit.denominator = constant.double().clone(), torch.ones_like(constant, dtype=torch.float64)
    return unit


class TwoLayers:
    """x → W x → h₁ → W h₁ + c → h₂ → a loss with any value at any of the 16 outcomes; W is shared by both layers."""

    def __init__(self):
        self.weight = torch.tensor([[0.8, -1.1], [0.5, 1.7]], dtype=torch.float64).requires_grad_()
        self.first_bias = torch.tensor([0.1, -0.4], dtype=torch.float64).requires_grad_()
        self.second_bias = torch.tensor([-0.3, 0.6], dtype=torch.float64).requires_grad_()
        self.scale = torch.tensor(1.3, dtype=torch.float64).requires_grad_()
        self.x = torch.tensor([0.7, -0.9], dtype=torch.float64)
        self.losses = torch.randn(16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)

    @property
    def parameters(self):
        return [self.weight, self.first_bias, self.second_bias, self.scale]

    def logits(self, h1):
        """Both layers' logits (16, 2), given the first layer's sample."""
        first = (self.weight @ self.x + self.first_bias).expand(16, 2)
        return first, h1 @ self.weight.t() + self.second_bias

    def probabilities(self):
        """P(h₁) and P(h₂ | h₁), both (16,)."""
        h1, h2 = self.outcomes.split(2, -1)
        pairs = zip(self.logits(h1), (h1, h2), strict=True)
        return [torch.where(h > 0, a.sigmoid(), (-a).sigmoid()).prod(-1) for a, h in pairs]

    def exact(self):
        """∂/∂θ Σ P(h₁)·P(h₂ | h₁)·L(h₁, h₂), by autograd through the sum."""
        first, second = self.probabilities()
        return torch.autograd.grad((first * second * self.scale * self.losses).sum(), self.parameters)

    def estimated(self, units):
        """The expected gradient through two StochasticUnits and a Tape: all noise enumerated, one outcome per row."""
        h1, h2 = self.outcomes.split(2, -1)
        with gatelet.Tape() as tape:
            first, _ = self.logits(h1)
            sample = units[0](first, noise=noise_for(first, h1))
            _, second = self.logits(sample)
            top = units[1](second, noise=noise_for(second, h2))
            assert torch.equal(torch.cat([sample, top], -1), self.outcomes)
            loss = self.scale * self.losses
        probability = torch.stack(self.probabilities()).prod(0).detach()
        # self.scale does not depend on the gates: its gradient comes from the loss itself.
        return torch.autograd.grad((probability * tape.surrogate(loss)).sum(), self.parameters)


def noise_for(logits, gates):
    """Noise in the middle of the interval that gives these gates."""
    p = logits.detach().sigmoid()
    return torch.where(gates > 0, p / 2, (1 + p) / 2)


@pytest.mark.parametrize(
    "make",
    [lambda: ScoreFunction("none"), ScoreFunction, lambda: with_baseline(torch.tensor([2.0, -7.0]))],
    ids=["none", "fresh", "used"],
)
def test_theorem_1_through_two_layers(make):
    """Stacked layers, the second's logits a function of the first's sample, a shared weight: the total gradient."""
    net = TwoLayers()
    for found, truth in zip(net.estimated([gatelet.StochasticUnit(make()) for _ in "12"]), net.exact(), strict=True):
        close(found, truth)


def test_theorem_1_conditioned_on_the_layer_below():
    """Given h₁, the second layer's expected estimate is the derivative of E[L | h₁] by its logits."""
    net = TwoLayers()
    h1, h2 = (part.reshape(4, 4, 2) for part in net.outcomes.split(2, -1))
    losses = net.losses.reshape(4, 4)
    for one, two, loss in zip(h1, h2, losses, strict=True):
        assert (one == one[0]).all()
        logits = (one[0] @ net.weight.t() + net.second_bias).detach().requires_grad_()
        p = torch.where(two > 0, logits.sigmoid(), (-logits).sigmoid()).prod(-1)
        (truth,) = torch.autograd.grad((p * loss).sum(), logits)
        unit = ScoreFunction("none")
        gates = unit(logits.expand(4, 2), noise_for(logits, two))
        close((p.detach()[:, None] * unit.coefficients(logits.detach().expand(4, 2), gates, loss)).sum(0), truth)


def best_constant(loss, logits):
    """E[(h − σ)² L]/E[(h − σ)²] (N,) and the denominator, for a batch of one, by enumeration."""
    p = logits.sigmoid()
    codes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=logits.shape[-1])), dtype=torch.float64)
    probability = torch.where(codes > 0, p, 1 - p).prod(-1)
    weight = probability[:, None] * (codes - p) ** 2
    values = loss(codes[:, None])  # (2^N, 1)
    return (weight * values).sum(0) / weight.sum(0), weight.sum(0)


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
def test_corollary_1_the_constant_has_least_variance(objective):
    """Var(c) − Var(L̄) = (c − L̄)²·E[(h − σ)²] for every unit: L̄ is the minimum, and the only one."""
    logits = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    loss = oracles.OBJECTIVES[objective](1, 3)
    best, curvature = best_constant(loss, logits)
    least = moments(loss, logits, with_baseline(best)).variance
    for step in (-1.0, -0.01, 0.01, 1.0):
        variance = moments(loss, logits, with_baseline(best + step)).variance
        assert (variance > least).all()
        close(variance - least, step**2 * curvature[None], atol=1e-14)
    assert (least <= moments(loss, logits, ScoreFunction("none")).variance).all()


def batch_in_proportion():
    """Logits with p = (¼, ½, ¾) and the 32 rows that hold every outcome as often as it is probable."""
    p = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    rows = []
    for code in itertools.product((0.0, 1.0), repeat=3):
        h = torch.tensor(code, dtype=torch.float64)
        rows += [h] * round(32 * torch.where(h > 0, p, 1 - p).prod().item())
    assert len(rows) == 32
    return p.logit()[None], torch.stack(rows)


@pytest.mark.parametrize("baseline", ["per_unit", "running_mean"])
def test_moving_averages_converge_to_the_baseline(baseline):
    """To E[(h − σ)²L]/E[(h − σ)²] and to E[L], from a wrong start, with coefficient 0.9."""
    logits, rows = batch_in_proportion()
    loss = oracles.table(1, 3)
    target = best_constant(loss, logits)[0] if baseline == "per_unit" else oracles.bernoulli_value(loss, logits)
    share = best_constant(loss, logits)[1] if baseline == "per_unit" else torch.ones(1, dtype=torch.float64)
    start = torch.full_like(share, 50.0)
    unit, fresh = with_baseline(start), ScoreFunction(baseline).double()
    assert unit.baseline == baseline
    for batch in range(300):
        # Both averages keep 0.9 of what they were: L̄ = (0.9^t·50 + (1 − 0.9^t)·E[wL]) / (0.9^t + (1 − 0.9^t)·E[w]).
        kept = 0.9**batch
        close(unit.current_baseline(3), (kept * start + (1 - kept) * share * target) / (kept + (1 - kept) * share))
        for each in (unit, fresh):
            each.coefficients(logits.expand(32, 3), rows, loss(rows[:, None])[:, 0])
        close(fresh.current_baseline(3), target, atol=1e-13)  # no start to forget
    close(unit.current_baseline(3), target, atol=1e-10)


@pytest.mark.parametrize("baseline", ["per_unit", "running_mean"])
def test_the_baseline_never_uses_the_loss_it_is_subtracted_from(baseline):
    """A constant on this batch's loss shifts its coefficients by (h − σ)·c, and only the next batch's baseline by c."""
    logits, rows = batch_in_proportion()
    losses = oracles.table(1, 3)(rows[:, None])[:, 0]
    logits = logits.expand(32, 3)
    difference = rows - logits.sigmoid()
    found, baselines = [], []
    for constant in (0.0, 5.0):
        unit = with_baseline(torch.tensor([0.7, -2.0, 4.0] if baseline == "per_unit" else [0.7]))
        before = unit.current_baseline(3).clone()
        found.append(unit.coefficients(logits, rows, losses + constant))
        close(found[-1], difference * (losses[:, None] + constant - before), atol=1e-14)
        baselines.append(unit.current_baseline(3))
        assert (baselines[-1] != before).all()
    close(found[1] - found[0], 5.0 * difference, atol=1e-14)
    assert (baselines[1] > baselines[0]).all()


# ---------------------------------------------------------------- section 4: straight-through


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
@pytest.mark.parametrize("slope", ["identity", "sigmoid"])
def test_straight_through_expectation(objective, slope):
    """E[ĝ_i] = E[∂L/∂h_i]·slope(a_i)."""
    logits, loss = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64), oracles.OBJECTIVES[objective](1, 3)
    unit = StraightThrough(slope=slope)
    close(moments(loss, logits, unit).mean, oracles.straight_through(loss, logits, unit), atol=1e-14)


@pytest.mark.parametrize("objective", ["linear", "product", "table"])
def test_straight_through_with_the_sigmoid_slope_is_exact_for_multilinear_losses(objective):
    logits, loss = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64), oracles.OBJECTIVES[objective](1, 3)
    close(moments(loss, logits, StraightThrough(slope="sigmoid")).mean, oracles.bernoulli_gradient(loss, logits))


@pytest.mark.parametrize("slope", ["identity", "sigmoid"])
@pytest.mark.parametrize(
    "loss",
    [torch.exp, lambda h: -h.tanh(), lambda h: (h + 0.1).log(), lambda h: -(h**3) - h],
    ids=["exp", "tanh", "log", "cubic"],
)
def test_straight_through_has_the_right_sign_in_one_layer(loss, slope):
    """One unit, a loss monotone in it: E[ĝ] and ∂E[L]/∂a agree in sign at every logit."""

    def objective(h):
        return loss(h).sum(-1)

    found = moments(objective, LOGITS, StraightThrough(slope=slope)).mean
    truth = exact_gradient(objective, LOGITS)
    assert (found.sign() == truth.sign()).all()
    assert (truth != 0).all()


def test_straight_through_can_have_the_wrong_sign_in_two_layers():
    """Two upper units, one saturated: back-propagation counts its path, the expected loss does not feel it.

    h₁ ~ Bernoulli(½), a₂ = 10 + 5h₁, a₃ = −h₁, L = h₂ + h₃, linear and increasing in both. Straight-through:
    ∂L/∂a₁ ≈ 5 − 1 = 4. True: σ′(0)·[σ(15) − σ(10) + σ(−1) − σ(0)] = −0.058.
    """
    weight, bias = torch.tensor([[5.0], [-1.0]], dtype=torch.float64), torch.tensor([10.0, 0.0], dtype=torch.float64)
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    h1, top = outcomes[:, :1], outcomes[:, 1:]

    def probability(a1):
        a2 = h1 @ weight.t() + bias
        factors = [torch.where(h > 0, a.sigmoid(), (-a).sigmoid()) for a, h in ((a1.expand(8, 1), h1), (a2, top))]
        return torch.cat(factors, -1).prod(-1)

    a1 = torch.zeros(1, dtype=torch.float64).requires_grad_()
    (truth,) = torch.autograd.grad((probability(a1) * top.sum(-1)).sum(), a1)
    unit = gatelet.StochasticUnit("straight_through")
    sample = unit(a1.expand(8, 1), noise=noise_for(a1.expand(8, 1), h1))
    a2 = sample @ weight.t() + bias
    gates = unit(a2, noise=noise_for(a2, top))
    assert torch.equal(torch.cat([sample, gates], -1), outcomes)
    (found,) = torch.autograd.grad((probability(a1).detach() * gates.sum(-1)).sum(), a1)
    close(found, [4.0])

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    close(truth, [0.25 * (sigma(15) - sigma(10) + sigma(-1) - sigma(0))])
    assert truth.item() < 0 < found.item()


# ---------------------------------------------------------------- the exact gradient


@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
@pytest.mark.parametrize("units", [1, 4, 7])
def test_exact_gradient_is_the_derivative_of_the_expected_loss(objective, units):
    logits = torch.randn(3, units, generator=torch.Generator().manual_seed(units), dtype=torch.float64)
    loss = oracles.OBJECTIVES[objective](3, units)
    found = exact_gradient(loss, logits)
    close(found, oracles.bernoulli_gradient(loss, logits), atol=1e-12)
    step = 1e-4
    for unit in range(units):
        shift = step * torch.eye(units, dtype=torch.float64)[unit]
        ends = [oracles.bernoulli_value(loss, logits + sign * shift) for sign in (1, -1)]
        close(found[:, unit], (ends[0] - ends[1]) / (2 * step), atol=1e-6)  # of order step²


def test_exact_gradient_takes_any_leading_shape_and_dtype(monkeypatch):
    logits, loss = torch.randn(2, 3, 4), oracles.table(6, 4)

    def nested(h):
        assert h.dtype == torch.float32
        return loss(h.double().reshape(-1, 6, 4)).reshape(-1, 2, 3)

    found = exact_gradient(nested, logits)
    assert found.dtype == torch.float64
    close(found.reshape(6, 4), oracles.bernoulli_gradient(loss, logits.reshape(6, 4)), atol=1e-12)
    monkeypatch.setattr(sys.modules[exact_gradient.__module__], "_CHUNK", 100)
    close(exact_gradient(nested, logits), found, atol=1e-14)


def test_exact_gradient_of_single_vector_and_empty_batch():
    weight = torch.tensor([2.0, 4.0])
    found = exact_gradient(lambda h: (h * weight).sum(-1), torch.tensor([0.0, 1.0]))
    close(found, [0.5, 4 * 0.19661193324148185], atol=1e-7)  # the logit 1.0 and the weights are float32
    assert exact_gradient(total, torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("objective", "logits", "message"),
    [
        (total, torch.zeros(1, 21), r"21 units have 2\^21 outcomes"),
        (lambda h: h, torch.zeros(2, 3), "one loss per replica and example"),
        (lambda h: h.sum(), torch.zeros(2, 3), "one loss per replica and example"),
        (lambda h: 1.0, torch.zeros(2, 3), "returned float"),
        (total, torch.tensor([[0.0, float("nan")]]), "logits holds 1 values that are NaN"),
        (total, torch.tensor([[0.0, float("inf")]]), "logits holds 1 values"),
    ],
    ids=["units", "unreduced", "reduced", "number", "nan", "inf"],
)
def test_exact_gradient_refuses(objective, logits, message):
    with pytest.raises(ValueError, match=message):
        exact_gradient(objective, logits)
