"""Independent truths: expected losses and gradients, written from the mathematics, in float64.

Nothing of the library is used here. An *objective* maps gates (K, B, N) to losses (K, B); logits are (B, N).
``EXACT`` and ``EXPECTED`` hold, by the estimator's name, what its expected gradient must be: ``EXACT`` the gradient of
the expected loss, for unbiased estimators of units that are not binary (all binary ones share
:func:`bernoulli_gradient`); ``EXPECTED`` the closed form of a biased estimator's expectation.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------- objectives


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(batch: int, units: int):
    """L = Σ c_i h_i, every example with coefficients of its own."""
    weight = _draw(1, batch, units)
    return lambda h: (h * weight).sum(-1)


def quadratic(batch: int, units: int):
    """L = |h − t|² + hᵀQh: the gates interact in pairs."""
    target, pairs = _draw(2, batch, units), _draw(3, units, units)
    return lambda h: (h - target).square().sum(-1) + torch.einsum("kbi,ij,kbj->kb", h, pairs, h)


def product(batch: int, units: int):
    """L = c Π (1 − 2h_i): the parity of the gates; no unit alone has any effect on it at h_j = ½."""
    scale = 1 + _draw(4, batch).abs()
    return lambda h: scale * (1 - 2 * h).prod(-1)


def table(batch: int, units: int):
    """L = T[b, h], any number for any outcome; between the outcomes the multilinear extension."""
    entries = _draw(5, batch, 2**units)
    codes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)

    def objective(h):
        weight = (h.unsqueeze(-2) * codes + (1 - h.unsqueeze(-2)) * (1 - codes)).prod(-1)  # (K, B, 2^N)
        return (weight * entries).sum(-1)

    return objective


def network(batch: int, units: int):
    """L = the squared error of a small tanh network."""
    first, second, target = 0.5 * _draw(6, units, 5), 0.7 * _draw(7, 5), _draw(8, batch)
    return lambda h: ((h @ first - 0.2).tanh() @ second - target).square()


OBJECTIVES = {"linear": linear, "quadratic": quadratic, "product": product, "table": table, "network": network}


# ---------------------------------------------------------------- sums and integrals


def _expectation(objective, logits, support):
    """E[L] (B,), where ``support(logits)`` gives each unit's values and weights, both (M, B, N)."""
    values, weights = support(logits)
    _, batch, units = values.shape
    total = torch.zeros(batch, dtype=torch.float64)
    grids = torch.cartesian_prod(*[torch.arange(len(values))] * units).reshape(-1, units)
    for rows in grids.split(1 << 18):
        gates = torch.stack([values[rows[:, i], :, i] for i in range(units)], -1)
        weight = torch.stack([weights[rows[:, i], :, i] for i in range(units)], -1).prod(-1)
        total = total + (weight * objective(gates)).sum(0)
    return total


def _gradient(objective, logits, support):
    logits = logits.detach().double().requires_grad_()
    return torch.autograd.grad(_expectation(objective, logits, support).sum(), logits)[0]


def _two_points(probability, high=None):
    """The law of a unit that is ``high`` (1 by default) with a probability and 0 otherwise."""
    high = torch.ones_like(probability) if high is None else high
    return torch.stack([torch.zeros_like(high), high]), torch.stack([1 - probability, probability])


def _bernoulli(logits):
    return _two_points(1 / (1 + torch.exp(-logits)))


def bernoulli_value(objective, logits):
    """E[L] of independent Bernoulli(σ(a)) gates: the sum over 2^N outcomes."""
    return _expectation(objective, logits.double(), _bernoulli)


def bernoulli_gradient(objective, logits):
    """∂E[L]/∂a of independent Bernoulli(σ(a)) gates: the derivative of the sum over 2^N outcomes."""
    return _gradient(objective, logits, _bernoulli)


def gauss_legendre(low, high, order):
    """Nodes and weights (order, *shape) between ``low`` and ``high``."""
    at, weight = (torch.from_numpy(x).to(torch.get_default_device()) for x in np.polynomial.legendre.leggauss(order))
    at, weight = (x.reshape(-1, *(1,) * low.dim()) for x in (at, weight))
    return low + (high - low) * (at + 1) / 2, (high - low) / 2 * weight


def gaussian_density(z):
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def gaussian_cumulative(z):
    return torch.erfc(-z / math.sqrt(2)) / 2


def logistic_density(z):
    return 1 / (2 * torch.cosh(z / 2)) ** 2


def logistic_cumulative(z):
    return 1 / (1 + torch.exp(-z))


NOISE = {
    "gaussian": (gaussian_density, gaussian_cumulative, 9.0),
    "logistic": (logistic_density, logistic_cumulative, 39.0),
}


def noisy_rectifier_support(noise, std, order):
    """The law of h = max(0, a + s·z): an atom at 0 of mass F(−a/s), and the density f((h − a)/s)/s on h > 0.

    The nodes do not move with a: all of the dependence on a is in the weights, so the derivative comes from the law of
    h and shares nothing with a path derivative.
    """
    density, cumulative, reach = NOISE[noise]

    def support(logits):
        # Panels that end where the density has its bulk.
        fixed = logits.detach()
        cut = [torch.zeros_like(fixed), fixed.clamp_min(0), (fixed + reach * std).clamp_min(0)]
        panels = [gauss_legendre(low, high, order) for low, high in itertools.pairwise(cut)]
        h, weight = (torch.cat(x) for x in zip(*panels, strict=True))
        values = torch.cat([torch.zeros_like(fixed)[None], h])
        return values, torch.cat([cumulative(-logits / std)[None], weight * density((h - logits) / std) / std])

    return support


def noisy_sigmoid_support(std, order):
    """The law of h = σ(y), y = a + s·z: the density φ((y − a)/s)/s at nodes y that do not move with a."""

    def support(logits):
        fixed = logits.detach()
        y, weight = gauss_legendre(fixed - 9 * std, fixed + 9 * std, order)
        return 1 / (1 + torch.exp(-y)), weight * gaussian_density((y - logits) / std) / std

    return support


def _order(method, units):
    """Nodes per panel: as many as a tensor product over the units affords."""
    if method.law.name == "logistic":
        return {1: 160, 2: 96}[units]
    return 48 if units < 3 else 30


# ---------------------------------------------------------------- gradients by the estimator's name


def slope_at(objective, gates):
    """∂L/∂h (K, B, N) at these gates."""
    gates = gates.detach().clone().requires_grad_()
    return torch.autograd.grad(objective(gates).sum(), gates)[0]


def _sum_of_slopes(objective, values, weights):
    """Σ_outcomes P(outcome)·∂L/∂h at the outcome, and the indicator 'unit i is at its second value' beside it."""
    _, batch, units = values.shape
    for outcome in itertools.product((0, 1), repeat=units):
        gates = torch.stack([values[m, :, i] for i, m in enumerate(outcome)], -1)
        weight = torch.stack([weights[m, :, i] for i, m in enumerate(outcome)], -1).prod(-1)
        on = torch.tensor(outcome, dtype=torch.float64).expand(batch, units)
        yield weight.unsqueeze(-1) * slope_at(objective, gates[None])[0], on


def straight_through(objective, logits, method):
    """E[ĝ_i] = E_h[∂L/∂h_i]·slope(a_i); on the hard unit h = 1[a > 0], without an expectation."""
    p = 1 / (1 + torch.exp(-logits))
    slope = torch.ones_like(p) if method.slope == "identity" else p * (1 - p)
    if method.unit == "hard":
        return slope_at(objective, (logits > 0).double()[None])[0] * slope
    return sum(part for part, _ in _sum_of_slopes(objective, *_two_points(p))) * slope


def smooth_times_stochastic(objective, logits, method):
    """E[ĝ_i] = Σ_b P(b)·∂L/∂h_i(b√p)·b_i·√p(1 − p)/2, where P(b_i = 1) = √p."""
    p = 1 / (1 + torch.exp(-logits))
    law = _two_points(p.sqrt(), p.sqrt())
    return sum(part * on for part, on in _sum_of_slopes(objective, *law)) * p.sqrt() * (1 - p) / 2


def noisy_rectifier(objective, logits, method):
    """∂E[L]/∂a by the law of h."""
    order = _order(method, logits.shape[-1])
    return _gradient(objective, logits, noisy_rectifier_support(method.law.name, method.std, order))


def noisy_sigmoid(objective, logits, method):
    """∂E[L]/∂a by the law of h."""
    return _gradient(objective, logits, noisy_sigmoid_support(method.std, 120 if logits.shape[-1] < 3 else 64))


def straight_through_open(objective, logits, method):
    """Σ_h P(h)·h_i·∂L/∂h_i."""
    p = 1 / (1 + torch.exp(-logits))
    return sum(part * on for part, on in _sum_of_slopes(objective, *_two_points(p)))


def straight_through_sampled(objective, logits, method):
    """E[ĝ_i] = E_h[∂L/∂h_i]: the share q cancels."""
    return sum(part for part, _ in _sum_of_slopes(objective, *_two_points(1 / (1 + torch.exp(-logits)))))


def rectifier(objective, logits, method):
    """∂L/∂h_i at h = max(0, a), where a_i > 0."""
    return slope_at(objective, logits.clamp_min(0)[None])[0] * (logits > 0)


def sigmoid(objective, logits, method):
    """∂L/∂h_i·σ(a_i)(1 − σ(a_i)) at h = σ(a)."""
    p = 1 / (1 + torch.exp(-logits))
    return slope_at(objective, p[None])[0] * p * (1 - p)


def jump_relu(objective, logits, method):
    """∂L/∂h_i at h = a·1[a > θ], where a_i > θ."""
    is_open = (logits > method.theta.detach().double()).double()
    return slope_at(objective, (logits * is_open)[None])[0] * is_open


def top_k(objective, logits, method):
    """∂L/∂h_i at h = a·1[a_i is among the k largest], where it is."""
    rank = (logits.unsqueeze(-2) > logits.unsqueeze(-1)).sum(-1)  # how many are larger
    kept = (rank < method.k).double()
    return slope_at(objective, (logits * kept)[None])[0] * kept


EXACT = {
    "jump_relu": jump_relu,
    "top_k": top_k,
    "noisy_rectifier": noisy_rectifier,
    "noisy_sigmoid": noisy_sigmoid,
    "rectifier": rectifier,
    "sigmoid": sigmoid,
}
EXPECTED = {
    "straight_through": straight_through,
    "smooth_times_stochastic": smooth_times_stochastic,
    "straight_through_open": straight_through_open,
    "straight_through_sampled": straight_through_sampled,
}


def truth(name, method):
    """Return the function (objective, logits, method) -> (B, N) that the expected gradient must equal."""
    import oracles_multi
    import oracles_relaxations
    import oracles_second

    exact = EXACT | oracles_relaxations.EXACT | oracles_second.EXACT
    expected = EXPECTED | oracles_multi.BIASED | oracles_relaxations.EXPECTED | oracles_second.EXPECTED
    if not method.unbiased:
        assert name in expected, f"bias must be declared: {name} is biased and no oracle has its closed form"
        return expected[name]
    if name == "vimco":  # unbiased for the K-sample bound
        return lambda objective, logits, method, samples=2: oracles_multi.vimco(objective, logits, samples)[0]
    if method.binary:
        return lambda objective, logits, method: bernoulli_gradient(objective, logits)
    assert name in exact, f"{name} claims to be unbiased; oracles.EXACT must say what the exact gradient is"
    return exact[name]
