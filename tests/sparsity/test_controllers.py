"""The sparsity controllers, each against its formula by hand."""

import math

import pytest
import scipy.stats
import torch
from jaxtyping import config

from gatelet.estimators import (
    ALL,
    NoisyRectifier,
    Rectifier,
    ScoreFunction,
    Sigmoid,
    SmoothTimesStochastic,
    StraightThrough,
)
from gatelet.sparsity import AdaptiveL1, BetaNoise, FiringRateBias, KLRate


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def kl(s: float, p: float) -> float:
    return s * math.log(s / p) + (1 - s) * math.log((1 - s) / (1 - p))


# ---------------------------------------------------------------- KLRate


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_is_of_the_mean_over_all_leading_dimensions(shape, dtype):
    logits = torch.randn(shape, dtype=dtype)
    p = logits.double().sigmoid().reshape(-1, 3).mean(0).tolist()
    found = KLRate(0.2, weight=0.7).penalty(StraightThrough(), logits, logits)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.item() == pytest.approx(0.7 * sum(kl(0.2, each) for each in p), rel=rtol)


@pytest.mark.parametrize(
    ("estimator", "probability"),
    [
        (SmoothTimesStochastic(), lambda a: math.sqrt(1 / (1 + math.exp(-a)))),
        (NoisyRectifier(), scipy.stats.norm.cdf),
        (NoisyRectifier("logistic", std=0.5), lambda a: 1 / (1 + math.exp(-2 * a))),
        (ScoreFunction(), lambda a: 1 / (1 + math.exp(-a))),
    ],
)
def test_kl_is_of_the_firing_probability(estimator, probability):
    found = KLRate(0.1, weight=1.0).penalty(estimator, torch.tensor([[-0.8]]), torch.zeros(1, 1))
    assert found.item() == pytest.approx(kl(0.1, probability(-0.8)), rel=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, kind in ALL.items() if kind.needs != "objective" and n not in ("simple", "carms")]
)
def test_kl_pulls_towards_the_target(name):
    logits = torch.tensor([[-5.0, 5.0]], requires_grad=True)
    estimator = ALL[name]()
    if not estimator.fire_probability(logits).requires_grad:
        with pytest.raises(ValueError, match=rf"firing probability of {type(estimator).__name__}.*AdaptiveL1"):
            KLRate(0.3).penalty(estimator, logits, logits)
        return
    if name == "stochastic_gates":  # whose scale is half of the others'
        logits = (logits.detach() / 2).requires_grad_()
    if not estimator.rated:  # its threshold is what a rate moves
        at = estimator.logit_at(0.3) + torch.tensor([[-1.0], [0.0001], [1.0], [2.0]])
        KLRate(0.3).penalty(estimator, at, at).backward()
        assert estimator.log_threshold.grad < 0  # three of four are open: the threshold has to rise
        return
    KLRate(0.3).penalty(estimator, logits, logits).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]
    at = torch.full((1, 1), estimator.logit_at(0.3), requires_grad=True)
    term = KLRate(0.3).penalty(estimator, at, at)
    term.backward()
    torch.testing.assert_close(term.detach(), torch.zeros(()), atol=1e-6, rtol=0)
    torch.testing.assert_close(at.grad, torch.zeros(1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("logit", [-80.0, -20.0, -14.0, 14.0, 15.0])
def test_kl_gradient_is_p_minus_s_at_saturated_logits_too(logit):
    """A dead unit must be pushed with −λs: its probability is tiny, its gradient is not."""
    logits = torch.full((4, 1), logit, requires_grad=True)
    KLRate(0.1, weight=2.0).penalty(StraightThrough(), logits, logits).backward()
    p = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, 2.0 * (p - 0.1) / 4, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logit", [-1e4, -200.0, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("estimator", [StraightThrough(), SmoothTimesStochastic(), NoisyRectifier()])
def test_kl_is_finite_everywhere(estimator, logit, dtype):
    logits = torch.full((2, 3), logit, dtype=dtype, requires_grad=True)
    term = KLRate(0.1).penalty(estimator, logits, logits)
    term.backward()
    assert term.isfinite()
    assert term > 0.5
    assert logits.grad.isfinite().all()


def test_kl_of_bfloat16_logits_is_computed_in_float32():
    logits = torch.full((2, 1), 7.0, dtype=torch.bfloat16, requires_grad=True)  # σ(7) rounds to 1 in bfloat16
    KLRate(0.1, weight=1.0).penalty(StraightThrough(), logits, logits).backward()
    torch.testing.assert_close(logits.grad, torch.full((2, 1), 0.45, dtype=torch.bfloat16), rtol=1e-2, atol=0)


def test_kl_in_no_grad_and_empty_batches():
    assert KLRate(0.1).penalty(StraightThrough(), torch.zeros(2, 3), torch.zeros(2, 3)) > 0
    assert KLRate(0.1).penalty(StraightThrough(), torch.zeros(0, 3), torch.zeros(0, 3)) == 0


# ---------------------------------------------------------------- AdaptiveL1


def gates_with_share(share: float) -> torch.Tensor:
    return (torch.arange(100) < round(100 * share)).float().reshape(4, 25)


def step_weight(control: AdaptiveL1, share: float) -> float:
    control.penalty(Rectifier(), gates_with_share(share), gates_with_share(share))
    return control.weight.item()


@pytest.mark.parametrize(
    ("share", "factor"), [(0.30, 1.1), (0.22, 1.1), (0.21, 1.0), (0.20, 1.0), (0.19, 1.0), (0.18, 0.9), (0.0, 0.9)]
)
def test_l1_weight_moves_outside_of_the_band(share, factor):
    # the band's own edges, 0.19 and 0.21, are not outside of it; 1e-4 keeps rounding out of the question
    control = AdaptiveL1(0.2, weight=0.5, band=0.0101)
    assert step_weight(control, share) == pytest.approx(0.5 * factor)


def test_l1_is_the_mean_over_the_batch_with_the_weight_before_its_update():
    gates = torch.tensor([[[1.0, -2.0], [0.0, 3.0]]], requires_grad=True)
    control = AdaptiveL1(0.1, weight=0.25)
    term = control.penalty(Rectifier(), gates, gates)
    assert term.item() == pytest.approx(0.25 * (3 + 3) / 2)
    term.backward()
    torch.testing.assert_close(gates.grad, 0.125 * gates.detach().sign())
    assert control.weight.item() == pytest.approx(0.275)
    assert not control.weight.requires_grad


def test_l1_weight_is_clipped():
    high, low = AdaptiveL1(0.2, weight=0.95), AdaptiveL1(0.2, weight=1.05e-13)
    assert [step_weight(high, 0.9) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert [step_weight(low, 0.0) for _ in range(3)] == [pytest.approx(1e-13, rel=1e-6, abs=0)] * 3
    assert step_weight(low, 0.9) == pytest.approx(1.1e-13, rel=1e-6, abs=0)  # it comes back


def test_l1_options_and_state():
    control = AdaptiveL1(0.2, weight=0.5, step=0.5, band=0.3)
    assert step_weight(control, 0.45) == 0.5
    assert step_weight(control, 0.6) == 0.75
    fresh = AdaptiveL1(0.2)
    fresh.load_state_dict(control.state_dict(), strict=True)
    assert fresh.weight == 0.75
    assert AdaptiveL1(0.2).weight.item() == pytest.approx(1e-5)


def test_l1_of_half_precision_gates_does_not_overflow():
    gates = torch.full((2, 4000), 60.0, dtype=torch.float16)
    assert AdaptiveL1(0.1, weight=0.5).penalty(Rectifier(), gates, gates).item() == 120_000


def test_l1_empty_batch_changes_nothing():
    control = AdaptiveL1(0.1, weight=0.5)
    assert control.penalty(Rectifier(), torch.zeros(0, 4), torch.zeros(0, 4)) == 0
    assert control.weight == 0.5


def test_l1_holds_the_rate_of_a_rectifier():
    bias = torch.full((50,), 1.0, requires_grad=True)
    control, sgd = AdaptiveL1(0.1, weight=0.01, step=0.02), torch.optim.SGD([bias], 0.2)
    noise, shares = torch.randn(256, 50), []
    for _ in range(600):
        gates = (noise + bias).relu()
        # a task that wants every gate at ½, against which λ has to find its height
        loss = control.penalty(Rectifier(), gates, gates) + 0.5 * (gates - 0.5).square().sum(-1).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        shares.append((gates != 0).float().mean().item())
    assert shares[0] > 0.8
    assert sum(shares[-200:]) / 200 == pytest.approx(0.1, abs=0.02)


# ---------------------------------------------------------------- FiringRateBias


def test_firing_rate_formula():
    control, rate, bias = FiringRateBias(0.3, step=0.25, decay=0.8), torch.full((3,), 0.3), torch.zeros(3)
    for _ in range(20):
        gates = (torch.rand(2, 5, 3) < torch.tensor([0.0, 0.3, 1.0])).float() * -2.0
        assert control.penalty(StraightThrough(), gates, gates) is None
        rate = 0.8 * rate + 0.2 * (gates != 0).float().mean((0, 1))
        bias = bias + 0.25 * (rate < 0.3)
        torch.testing.assert_close(control.rate, rate)
        torch.testing.assert_close(control.bias, bias)
    logits = torch.randn(4, 3)
    torch.testing.assert_close(control.shift(logits), logits + bias)


def test_a_dead_unit_wakes_and_the_push_stops():
    control, estimator = FiringRateBias(0.1, step=0.2, decay=0.9), StraightThrough()
    logits = torch.tensor([-8.0, 0.0]).expand(500, 2)
    history = []
    for _ in range(400):
        shifted = control.shift(logits)
        gates = estimator(shifted, torch.rand(shifted.shape))
        control.penalty(estimator, shifted, gates)
        history.append(control.bias.clone())
    assert history[0][0] > 0
    alive = control.shift(logits)[0].sigmoid()
    assert alive[0] > 0.1
    assert torch.equal(history[-1], history[-100])  # back above the target: no more pushing
    assert history[-1][1] == 0  # never dead, never pushed


def test_firing_rate_state():
    control, gates = FiringRateBias(0.5, step=1.0), torch.tensor([[1.0, 0.0, 0.0]])
    logits = torch.zeros(2, 3)
    assert control.shift(logits) is logits
    control.penalty(StraightThrough(), gates, gates)
    fresh = torch.nn.Sequential(FiringRateBias(0.5))
    fresh.load_state_dict({"0." + k: v for k, v in control.state_dict().items()}, strict=True)
    assert torch.equal(fresh[0].shift(logits), control.shift(logits))
    fresh[0].penalty(StraightThrough(), gates, gates)
    control.penalty(StraightThrough(), gates, gates)
    assert torch.equal(fresh[0].rate, control.rate)
    control.load_state_dict(FiringRateBias(0.5).state_dict(), strict=True)  # of one that has seen no batch
    assert torch.equal(control.shift(logits), logits)
    assert torch.equal(control.rate, torch.full((3,), 0.5))
    assert control.penalty(StraightThrough(), torch.zeros(0, 3), torch.zeros(0, 3)) is None
    assert not control.bias.any()


def test_firing_rate_of_layers_of_other_widths():
    control = FiringRateBias(0.5)
    control.penalty(StraightThrough(), torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="keeps biases for 1 units and was called with 3"):
        control.shift(torch.zeros(2, 3))  # a bias of one unit would broadcast


def test_shift_keeps_the_dtype():
    control = FiringRateBias(0.5)
    control.penalty(StraightThrough(), torch.zeros(2, 3), torch.zeros(2, 3))
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert control.shift(half).dtype == torch.bfloat16
    assert BetaNoise(0.1).shift(half).dtype == torch.bfloat16
    assert BetaNoise(0.1).eval().shift(half).dtype == torch.bfloat16


# ---------------------------------------------------------------- BetaNoise

BETAS = [(0.1, 40.1), (0.1, 1.1), (0.3, 5.1), (0.5, 160.1), (0.9, 2.6)]


@pytest.mark.parametrize(("s", "beta"), BETAS)
def test_beta_parameters(s, beta):
    noise = BetaNoise(s, beta)
    assert noise.alpha == pytest.approx((s * (beta - 2) + 1) / (1 - s))
    assert noise.scale == pytest.approx(abs(math.log(1 / s**2 - 1)))
    grid = torch.linspace(0, 1, 100_001)[1:-1]
    mode = grid[scipy.stats.beta.logpdf(grid.double().cpu().numpy(), noise.alpha, beta).argmax()]
    assert mode.item() == pytest.approx(s, abs=1e-4)


@pytest.mark.parametrize(("s", "beta"), BETAS)
def test_beta_tails(s, beta):
    """The ends of the table: noise from beyond the law's practical support would flip gates at random."""
    noise, n = BetaNoise(s, beta), 1_000_000
    drawn = noise.draw_noise(torch.zeros(n), torch.Generator().manual_seed(0))
    low, high = scipy.stats.beta(noise.alpha, beta).ppf([1e-9, 1 - 1e-9])
    assert low <= drawn.min() < drawn.max() <= high


@pytest.mark.parametrize(("s", "beta"), BETAS)
def test_beta_distribution(s, beta):
    noise, n = BetaNoise(s, beta), 100_000
    drawn = noise.draw_noise(torch.zeros(100, 1000), torch.Generator().manual_seed(0)).double().flatten()
    law = scipy.stats.beta(noise.alpha, beta)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert scipy.stats.kstest(drawn.cpu().numpy(), law.cdf).statistic < 1.63 / math.sqrt(n)  # 1 % level
    assert drawn.mean().item() == pytest.approx(law.mean(), abs=4 * law.std() / math.sqrt(n))
    kurtosis = law.stats("k") + 2
    assert drawn.var().item() == pytest.approx(law.var(), rel=4 * math.sqrt(kurtosis / n))
    probabilities = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    exact = torch.from_numpy(law.ppf(probabilities.cpu().numpy())).to(drawn)
    density = torch.from_numpy(law.pdf(exact.cpu().numpy())).to(drawn)
    error = 4 * (probabilities * (1 - probabilities) / n).sqrt() / density
    assert ((drawn.quantile(probabilities) - exact).abs() < error).all()


def test_beta_shift():
    noise, logits = BetaNoise(0.1), torch.randn(3, 4)
    z = torch.rand(3, 4)
    torch.testing.assert_close(noise.shift(logits, z), logits + math.log(99) * (z - 0.5))
    mean = noise.alpha / (noise.alpha + 40.1)
    noise.eval()
    torch.testing.assert_close(noise.shift(logits), logits + math.log(99) * (mean - 0.5))
    assert torch.equal(noise.shift(logits), noise.shift(logits, generator=torch.Generator()))


def test_beta_generator():
    noise, logits = BetaNoise(0.1), torch.zeros(5, 4)
    draws = [noise.shift(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    noise.shift(logits, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(noise.shift(logits), noise.shift(logits))


def test_beta_passes_the_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    BetaNoise(0.1).shift(logits).sum().backward()
    assert torch.equal(logits.grad, torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4)])
def test_beta_shapes(shape):
    assert BetaNoise(0.1).shift(torch.zeros(shape)).shape == shape


# ---------------------------------------------------------------- bad arguments


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("kind", [KLRate, AdaptiveL1, FiringRateBias, BetaNoise])
@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0, math.nan, "0.1", None, True])
def test_bad_rates(kind, bad):
    with pytest.raises(ValueError, match="target_rate must lie strictly between 0 and 1"):
        kind(bad)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("kind", "argument", "bad"),
    [
        (KLRate, "weight", 0.0),
        (KLRate, "weight", math.inf),
        (AdaptiveL1, "weight", -1.0),
        (AdaptiveL1, "step", 1.0),
        (AdaptiveL1, "step", 0.0),
        (AdaptiveL1, "band", 0.0),
        (FiringRateBias, "step", 0.0),
        (FiringRateBias, "decay", 1.0),
        (BetaNoise, "beta", 1.0),
        (BetaNoise, "beta", math.nan),
        (BetaNoise, "beta", math.inf),
    ],
)
def test_bad_options(kind, argument, bad):
    with pytest.raises(ValueError, match=f"^{argument} must "):
        kind(0.1, **{argument: bad})


def test_sigmoid_gates_have_no_rate_to_pull():
    logits = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="Sigmoid does not depend smoothly"):
        KLRate(0.1).penalty(Sigmoid(), logits, logits.sigmoid())
