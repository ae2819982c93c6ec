"""jump_relu's threshold over a law of logits, its functions, and top_k: what the contract does not ask."""

import itertools

import pytest
import torch

import gatelet
import oracles
from gatelet.estimators import JumpReLU, TopK
from gatelet.estimators.jump_relu import jump_count, jump_relu, jump_step, near_threshold
from gatelet.estimators.top_k import top_k


def over_the_law(threshold, bandwidth, order=200):
    """Nodes of a ~ N(0.3, 1), with panels that end at the threshold and at the kernel's edges; and their mass."""
    cuts = [-9.0, threshold - bandwidth / 2, threshold, threshold + bandwidth / 2, 9.0]
    ends = torch.tensor(cuts, dtype=torch.float64).unsqueeze(-1)
    parts = [oracles.gauss_legendre(low, high, order) for low, high in itertools.pairwise(ends)]
    a, weight = (torch.cat(part).flatten() for part in zip(*parts, strict=True))
    return a, weight * oracles.gaussian_density(a - 0.3)


def density(a):
    return oracles.gaussian_density(torch.tensor(a - 0.3, dtype=torch.float64)).item()


def quadratic(h):
    return (h - 2.0).square() + 0.5 * h


def quartic(h):
    return (h - 1.0) ** 4


def threshold_gradient(loss, threshold, bandwidth):
    """E over the law of a of the library's pseudo-derivative."""
    a, mass = over_the_law(threshold, bandwidth)
    theta = torch.tensor(threshold, dtype=torch.float64, requires_grad=True)
    (mass * loss(jump_relu(a, theta, bandwidth))).sum().backward()
    return theta.grad.item()


@pytest.mark.parametrize("loss", [quadratic, quartic])
@pytest.mark.parametrize("bandwidth", [0.5, 0.01])
def test_the_threshold_has_the_gradient_of_its_closed_form(loss, bandwidth):
    """E[−(θ/ε)·L′(h(a))·1[|a − θ| ≤ ε/2]], integrated with L′(0) under θ and L′(a) above it."""
    theta = 0.7
    total = 0.0
    for low, high, is_open in ((theta - bandwidth / 2, theta, 0.0), (theta, theta + bandwidth / 2, 1.0)):
        ends = (torch.tensor([end], dtype=torch.float64) for end in (low, high))
        a, weight = oracles.gauss_legendre(*ends, 60)
        h = (a * is_open).requires_grad_()
        (slope,) = torch.autograd.grad(loss(h).sum(), h)
        total += (weight * oracles.gaussian_density(a - 0.3) * slope).sum().item()
    assert threshold_gradient(loss, theta, bandwidth) == pytest.approx(-theta / bandwidth * total, rel=1e-9)


def test_the_threshold_is_unbiased_for_quadratic_losses_as_the_bandwidth_shrinks():
    theta = 0.7
    at, closed = torch.tensor(theta), torch.tensor(0.0)
    exact = [-(loss(at) - loss(closed)).item() * density(theta) for loss in (quadratic, quartic)]
    found = [threshold_gradient(loss, theta, 1e-5) for loss in (quadratic, quartic)]
    assert found[0] == pytest.approx(exact[0], rel=1e-4)
    trapezoid = -theta * (4 * (theta - 1) ** 3 + 4 * (-1.0) ** 3) / 2 * density(theta)
    assert found[1] == pytest.approx(trapezoid, rel=1e-4)
    assert abs(found[1] - exact[1]) > 0.1 * abs(exact[1])


def test_the_penalty_has_the_gradient_of_the_expected_count():
    """E[Σ 1[a > θ]] = 1 − F(θ); the kernel's mean is (F(θ + ε/2) − F(θ − ε/2))/ε."""
    theta, bandwidth = 0.7, 0.4
    a, mass = over_the_law(theta, bandwidth)
    leaf = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    (mass * jump_step(a, leaf, bandwidth)).sum().backward()
    edges = torch.tensor([theta - bandwidth / 2, theta + bandwidth / 2], dtype=torch.float64) - 0.3
    low, high = oracles.gaussian_cumulative(edges).tolist()
    assert leaf.grad.item() == pytest.approx(-(high - low) / bandwidth, rel=1e-9)


def test_functions_agree_with_the_mathematics_written_out():
    """Against the kernel as a dense product, per unit thresholds, and torch's own double backward of what is linear."""
    a = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    theta = torch.rand(6, dtype=torch.float64).add_(0.1).requires_grad_()
    above = torch.randn(40, 6, dtype=torch.float64)
    kernel = ((a.detach() - theta.detach()) / 0.8).abs() <= 0.5
    assert torch.equal(near_threshold(a, theta, 0.8), kernel)
    slopes = torch.autograd.grad((jump_relu(a, theta, 0.8) * above).sum(), (a, theta))
    torch.testing.assert_close(slopes[0], above * (a > theta))
    torch.testing.assert_close(slopes[1], -(theta / 0.8 * kernel * above).sum(0))
    (slope,) = torch.autograd.grad((jump_count(a, theta, 0.8) * above[:, 0]).sum(), theta)
    torch.testing.assert_close(slope, -(kernel * above[:, :1]).sum(0) / 0.8)
    assert torch.equal(jump_count(a, theta, 0.8), jump_step(a, theta, 0.8).sum(-1))


def test_the_estimator_learns_a_threshold_per_unit_and_holds_a_rate():
    """A penalty on fire_probability moves θ until the share of open units is the one asked for."""
    torch.manual_seed(0)
    unit = gatelet.StochasticUnit(JumpReLU(torch.full((4,), 0.3), bandwidth=0.5))
    step = torch.optim.Adam(unit.parameters(), 0.02)
    for _ in range(300):
        a = torch.randn(256, 4)
        gates = unit(a)
        share = unit.estimator.fire_probability(a).mean()
        ((share - 0.1).square() + 0 * gates.sum()).backward()
        step.step()
        step.zero_grad()
    assert (unit.eval()(torch.randn(4000, 4)) != 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert unit.estimator.theta.std() < 0.2


@pytest.mark.parametrize("make", [lambda: JumpReLU(0.5, 0.5), lambda: TopK(3)])
def test_a_conditional_layer_has_the_same_gates_in_eval_and_needs_no_calibration(make):
    layer = gatelet.nn.ConditionalLinear(10, 12, bottleneck=3, estimator=make(), target_rate=0.1)
    x = torch.randn(20, 10)
    seen = [gate.detach() for gate in (layer.gating if hasattr(layer, "gating") else layer).decide(x)[:1]]
    with torch.no_grad():
        assert torch.equal(layer.eval().decide(x)[0], seen[0])
    assert gatelet.sparsity.calibrate_thresholds(layer, [x]) == {}


def test_top_k_keeps_exactly_k_of_ties_and_passes_the_kept_ones_alone():
    a = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    above = torch.randn(5, 7, dtype=torch.float64)
    assert (torch.autograd.grad((top_k(a, 3) * above).sum(), a)[0] != 0).sum(-1).tolist() == [3] * 5
    distinct = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    kept = top_k(distinct, 3)
    assert ((kept != 0).sum(-1) == 3).all()
    torch.testing.assert_close(kept.sum(-1), distinct.sort(-1, descending=True).values[:, :3].sum(-1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JumpReLU(threshold=0.0), "threshold must be a finite number above 0"),
        (lambda: JumpReLU(torch.tensor([0.1, -1.0])), "threshold must be a number above 0"),
        (lambda: JumpReLU(bandwidth=-1.0), "bandwidth must be"),
        (lambda: TopK(0), "k must be an integer of at least 1"),
        (lambda: TopK(4)(torch.zeros(2, 3), torch.zeros(2, 3)), "top_k keeps k = 4 of them, but there are 3"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
