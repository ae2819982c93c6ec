"""Independent truths for the relaxed estimators, from the mathematics, in float64; nothing of the library is used.

f and F are the density and distribution function of the logistic law; a unit's perturbed logit is y = a + ℓ. Integrals
over y are taken at nodes that do not move with a: all of the dependence on a is in the weights f(y − a), so a gradient
comes from the law of y and shares nothing with a path derivative.
"""

import itertools

import torch

import oracles
from oracles import logistic_cumulative, logistic_density, slope_at

REACH = 38.0  # leaves out a mass of 3e-17 on each side


def panels(cuts, order):
    """Gauss–Legendre nodes and weights (M, *shape) on the panels between the cuts."""
    cuts = torch.stack(torch.broadcast_tensors(*cuts)).sort(0).values
    parts = [oracles.gauss_legendre(low, high, order) for low, high in itertools.pairwise(cuts)]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def around_zero(logits, temperature, order):
    """Nodes in y for functions that are steep at 0 on the scale τ: (M, B, N)."""
    fixed = logits.detach()
    steps = [3.0 * temperature, 12.0 * temperature, 40.0 * temperature] if temperature < 0.3 else []
    cuts = [fixed - REACH, fixed + REACH, *(torch.tensor(c).double() for c in (-6, 0, 6))]
    cuts += [torch.tensor(side * c).double() for c in steps for side in (-1, 1) if c < 6]
    return panels(cuts, order)


# ---------------------------------------------------------------- relaxed units: E[L] by the law of h


def concrete_support(temperature, order=24):
    """h = σ(y/τ)."""

    def support(logits):
        y, weight = around_zero(logits, temperature, order)
        return 1 / (1 + torch.exp(-y / temperature)), weight * logistic_density(y - logits)

    return support


def concrete_value(objective, logits, temperature):
    return oracles._expectation(objective, logits, concrete_support(temperature))


def concrete(objective, logits, temperature):
    """∂E[L(σ(y/τ))]/∂a."""
    return oracles._gradient(objective, logits, concrete_support(temperature))


def hard_concrete_support(temperature, low, high, order=40):
    """Atoms at 0 and 1, and between them the density of y where σ(y/β)(ζ − γ) + γ lies in (0, 1)."""

    def where_stretched_is(value):
        return temperature * torch.logit(torch.tensor((value - low) / (high - low), dtype=torch.float64))

    def support(logits):
        opens, full = where_stretched_is(0.0), where_stretched_is(1.0)
        y, weight = panels([opens + 0 * logits.detach(), full], order)
        inside = low + (high - low) / (1 + torch.exp(-y / temperature))
        zero, one = torch.zeros_like(logits)[None], torch.ones_like(logits)[None]
        # 1 − F(x) = F(−x)
        atoms = logistic_cumulative(opens - logits)[None], logistic_cumulative(logits - full)[None]
        values = torch.cat([zero, inside.detach(), one])
        return values, torch.cat([atoms[0], weight * logistic_density(y - logits), atoms[1]])

    return support


def hard_concrete(objective, logits, temperature, low, high):
    return oracles._gradient(objective, logits, hard_concrete_support(temperature, low, high))


# ---------------------------------------------------------------- hard units with a slope of their own


def with_slopes(objective, logits, slopes):
    """E[ĝ_i] = Σ_h P(h)·∂L/∂h_i(h)·s_i(h_i), for ``slopes`` = (s(0), s(1)), each (B, N)."""
    p = 1 / (1 + torch.exp(-logits))
    total = torch.zeros_like(logits)
    for outcome in itertools.product((0.0, 1.0), repeat=logits.shape[-1]):
        h = torch.tensor(outcome, dtype=torch.float64).expand_as(logits)
        weight = torch.where(h > 0, p, 1 - p).prod(-1, keepdim=True)
        total = total + weight * slope_at(objective, h[None])[0] * torch.where(h > 0, slopes[1], slopes[0])
    return total


def gumbel_slopes(logits, temperature, order=24):
    """E[σ′(y/τ)/τ | y < 0] and E[σ′(y/τ)/τ | y > 0]."""
    y, weight = around_zero(logits, temperature, order)
    mass = weight * logistic_density(y / temperature) / temperature * logistic_density(y - logits)
    p = 1 / (1 + torch.exp(-logits))
    return (mass * (y < 0)).sum(0) / (1 - p), (mass * (y > 0)).sum(0) / p


def straight_through_gumbel(objective, logits, temperature):
    """Also the expectation of its Rao-Blackwellised form, for any number of inner draws."""
    return with_slopes(objective, logits, gumbel_slopes(logits, temperature))


def trapezoid(objective, logits):
    """p(1 − p)·½(E[∂L/∂h_i | h_i = 1] + E[∂L/∂h_i | h_i = 0]): exact where L is quadratic in each gate."""
    p = 1 / (1 + torch.exp(-logits))
    return with_slopes(objective, logits, (p / 2, (1 - p) / 2))


def reinmax(objective, logits, temperature):
    """Slope 2 p₁(1 − p₁) − ½ p(1 − p), p₁ = (h + σ(a/τ))/2."""
    p, tempered = 1 / (1 + torch.exp(-logits)), 1 / (1 + torch.exp(-logits / temperature))
    slopes = [2 * (h + tempered) / 2 * (1 - (h + tempered) / 2) - p * (1 - p) / 2 for h in (0.0, 1.0)]
    return with_slopes(objective, logits, slopes)


def gapped(objective, logits, temperature, gap):
    """The slope of the two-class softmax at (a, 0) + m₁ + m₂, m₁ and m₂ as the paper writes them."""
    classes = torch.stack([logits, torch.zeros_like(logits)], -1)
    slopes = []
    for open_class in (1, 0):  # h = 0, h = 1
        moved = gapped_logits(classes, torch.eye(2, dtype=torch.float64)[open_class], gap)
        slopes.append(logistic_density((moved[..., 0] - moved[..., 1]) / temperature) / temperature)
    return with_slopes(objective, logits, slopes)


def gapped_logits(classes, chosen, gap):
    top = classes.amax(-1, keepdim=True)
    lift = (top - (classes * chosen).sum(-1, keepdim=True)) * chosen
    push = -(1 - chosen) * (classes + gap - top).clamp_min(0)
    return classes + lift + push


def clipped_straight_through(objective, logits, hard=False):
    inside = (logits.abs() <= 1).double()
    if hard:
        return slope_at(objective, (logits > 0).double()[None])[0] * inside
    return with_slopes(objective, logits, (inside, inside))


# ---------------------------------------------------------------- categorical units, (B, V, C)


def outcomes_of(variables, classes):
    """All one-hot outcomes (C^V, V, C)."""
    eye = torch.eye(classes, dtype=torch.float64)
    return torch.stack([eye[list(row)] for row in itertools.product(range(classes), repeat=variables)])


def categorical_gradient(objective, logits):
    """The derivative of the sum over all outcomes."""
    logits = logits.detach().clone().requires_grad_()
    gates = outcomes_of(*logits.shape[1:])[:, None].expand(-1, *logits.shape)
    weight = (logits.softmax(-1) * gates).sum(-1).prod(-1)
    return torch.autograd.grad((weight * objective(gates)).sum(), logits)[0]


def categorical_with_jacobians(objective, logits, jacobian):
    """Σ_h P(h) J(h) ∂L/∂h; ``jacobian`` maps one outcome (B, V, C) to (B, V, C, C)."""
    p, total = logits.softmax(-1), torch.zeros_like(logits)
    for outcome in outcomes_of(*logits.shape[1:]):
        h = outcome.expand_as(logits)
        weight = (p * h).sum(-1).prod(-1)[:, None, None]
        slope = slope_at(objective, h[None])[0]
        total = total + weight * torch.einsum("bvij,bvj->bvi", jacobian(h), slope)
    return total


def softmax_jacobian(p):
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def categorical_trapezoid(objective, logits):
    """∂E[L]/∂a_k = π_k Σ_j π_j (L(e_k) − L(e_j)), each difference by the trapezoid rule, for one variable."""
    p = logits[:, 0].softmax(-1)
    classes = p.shape[-1]
    slopes = torch.stack([slope_at(objective, h.expand_as(logits)[None])[0, :, 0] for h in outcomes_of(1, classes)])
    eye = torch.eye(classes, dtype=torch.float64)
    total = torch.zeros_like(p)
    for k, j in itertools.product(range(classes), repeat=2):
        difference = ((slopes[k] + slopes[j]) / 2 * (eye[k] - eye[j])).sum(-1)
        total[:, k] += p[:, k] * p[:, j] * difference
    return total[:, None]


# ---------------------------------------------------------------- by the estimator's name, (objective, logits, method)

EXACT = {"hard_concrete": lambda o, a, m: hard_concrete(o, a, float(m.temperature), m.low, m.high)}
EXPECTED = {
    "concrete": lambda o, a, m: concrete(o, a, float(m.temperature)),
    "straight_through_gumbel": lambda o, a, m: straight_through_gumbel(o, a, float(m.temperature)),
    "gumbel_rao": lambda o, a, m: straight_through_gumbel(o, a, float(m.temperature)),
    "reinmax": lambda o, a, m: reinmax(o, a, m.temperature),
    "gapped_straight_through": lambda o, a, m: gapped(o, a, float(m.temperature), m.gap),
    "clipped_straight_through": lambda o, a, m: clipped_straight_through(o, a, m.unit == "hard"),
}
