"""Independent truths for the estimators that take several samples, or evaluate the objective several times.

``enumerate_noise`` calls an estimator once per outcome of its noise (one example per outcome, no vmap) and sums.
``noise_nodes`` says, from the mathematics, where the noise of a unit has its cells and what they weigh. The rest are
expected gradients; of the library, only the estimator under test is used.
"""

import itertools
import math

import torch

import oracles

# ---------------------------------------------------------------- the noise of one unit


def _sigma(a):
    return 1 / (1 + torch.exp(-a))


def uniform_nodes(edges, points=1):
    """Cells of a uniform number between sorted edges (E, B, N): nodes and weights (M, B, N)."""
    edges = torch.cat([torch.zeros_like(edges[:1]), edges.sort(0).values, torch.ones_like(edges[:1])])
    low, high = edges[:-1], edges[1:]
    if points == 1:
        return (low + high) / 2, high - low
    nodes, weights = oracles.gauss_legendre(low, high, points)
    return nodes.flatten(0, 1), weights.flatten(0, 1)


def noise_nodes(name, method, logits):
    """Nodes (M, B, N[, channels]) and weights (M, B, N) of a unit's noise, cell by cell."""
    p = _sigma(logits)
    if name == "enumeration":
        return torch.zeros_like(logits)[None], torch.ones_like(logits)[None]
    if name == "arm":  # linear in u between the edges: two points integrate its square
        return uniform_nodes(torch.stack([p, 1 - p]), 2)
    if name == "disarm":
        return uniform_nodes(torch.stack([p, 1 - p]))
    if name == "finite_differences":
        return uniform_nodes(torch.stack([_sigma(logits + d) for d in (-method.step, 0, method.step)]))
    if name == "spsa":
        u, weight = uniform_nodes(torch.stack([_sigma(logits + d) for d in (-method.step, 0, method.step)]))
        nodes = [torch.stack([u, torch.full_like(u, sign)], -1) for sign in (-1.0, 1.0)]
        return torch.cat(nodes), torch.cat([weight, weight]) / 2
    if name == "fiete_seung":  # given z, the gates switch at σ(a) and σ(a + sz); what is left is smooth in z
        z, mass = oracles.gauss_legendre(torch.full_like(logits, -9), torch.full_like(logits, 9), 48)
        parts = []
        for at, its_mass in zip(z, mass * oracles.gaussian_density(z), strict=True):
            u, weight = uniform_nodes(torch.stack([p, _sigma(logits + method.std * at)]))
            parts.append((torch.stack([u, at.expand(u.shape)], -1), weight * its_mass))
        nodes, weights = zip(*parts, strict=True)
        return torch.cat(nodes), torch.cat(weights)
    return uniform_nodes(p[None])


def categorical_nodes(logits):
    """For (B, N, C): Gumbel noise (C, B, N, C) under which class c is drawn, and p_c."""
    eye = 10 * torch.eye(logits.shape[-1], dtype=torch.float64)
    nodes = eye[:, None, None, :] - logits
    return nodes, torch.softmax(logits, -1).movedim(-1, 0)


def ordered_draws(logits, samples):
    """For one variable (B, 1, C): noise (Q, K, B, 1, C) of every ordered draw without replacement, its probability."""
    p = torch.softmax(logits, -1)[:, 0]
    eye = 10 * torch.eye(logits.shape[-1], dtype=torch.float64)
    nodes, masses = [], []
    for order in itertools.permutations(range(logits.shape[-1]), samples):
        left, mass = torch.ones_like(p[:, 0]), torch.ones_like(p[:, 0])
        for c in order:
            mass, left = mass * p[:, c] / left, left - p[:, c]
        nodes.append(torch.stack([eye[c] - logits for c in order]))
        masses.append(mass)
    return torch.stack(nodes), torch.stack(masses)


# ---------------------------------------------------------------- the estimator's moments


def product_noise(nodes, weights, rows):
    """All combinations of the nodes of rows·N variables: noise (Q, rows, B, N, ...) and mass (Q, B)."""
    count, _, units = weights.shape
    index = torch.cartesian_prod(*[torch.arange(count)] * (rows * units)).reshape(-1, rows, units)
    unit = torch.arange(units)
    pick = nodes.movedim(2, 1)[index, unit]  # (Q, rows, N, B, ...)
    mass = weights.movedim(2, 1)[index, unit].prod(1).prod(1)
    return pick.movedim(2, 3), mass


def moments(method, objective, logits, noise, mass):
    """Mean, variance and value of the estimator over the outcomes (Q, K, B, ...) with their mass (Q, B)."""
    event, outcomes = method.event_dims, len(mass)

    def of_outcomes(gates):  # (K, Q, B, ...): the objectives know one batch dimension
        flat = gates.flatten(0, 1)
        return objective(flat).reshape(gates.shape[: gates.dim() - event])

    leaf = logits.expand(outcomes, *logits.shape).clone().requires_grad_()
    value = method.surrogate(of_outcomes, leaf, noise.transpose(0, 1))
    (slope,) = torch.autograd.grad((value + 0 * leaf.flatten(2).sum(-1)).sum(), leaf)
    weight = mass.reshape(*mass.shape, *(1,) * event)
    mean = (weight * slope).sum(0)
    return mean, (weight * (slope - mean).square()).sum(0), (mass * value.detach()).sum(0)


def enumerate_noise(name, method, objective, logits, samples):
    """Mean, variance and value of the estimator: exact, float64."""
    rows = samples // 2 if method.antithetic else samples
    if method.event_dims == 2:
        draws = ordered_draws(logits, samples) if name == "unordered_set" else None
        noise, mass = draws if draws else product_noise(*categorical_nodes(logits), rows)
    else:
        noise, mass = product_noise(*noise_nodes(name, method, logits), rows)
    assert torch.allclose(mass.sum(0), torch.ones_like(mass[0]), rtol=0, atol=1e-12)
    return moments(method, objective, logits, noise, mass)


# ---------------------------------------------------------------- expected gradients


def spsa(objective, logits, method):
    """2^−N Σ_Δ (J(a + cΔ) − J(a − cΔ))/(2cΔ_i), with J the sum over the gates' outcomes."""
    c, total = method.step, torch.zeros_like(logits)
    for signs in itertools.product((-1.0, 1.0), repeat=logits.shape[-1]):
        delta = torch.tensor(signs, dtype=torch.float64)
        up, down = (oracles.bernoulli_value(objective, logits + s * c * delta) for s in (1, -1))
        total = total + (up - down)[:, None] / (2 * c * delta) / 2 ** logits.shape[-1]
    return total


def finite_differences(objective, logits, method):
    """∂J/∂p_i times the secant of σ: J is linear in each probability."""
    p, c = _sigma(logits), method.step
    slope = oracles.bernoulli_gradient(objective, logits) / (p * (1 - p))
    return slope * (_sigma(logits + c) - _sigma(logits - c)) / (2 * c)


def fiete_seung(objective, logits, method):
    """∇ of J smoothed: ∂J/∂p_i at the probabilities E_z[σ(a + sz)], times E_z[σ'(a_i + sz_i)]."""
    z, weight = oracles.gauss_legendre(torch.full_like(logits, -9), torch.full_like(logits, 9), 200)
    weight, p = weight * oracles.gaussian_density(z), _sigma(logits + method.std * z)
    smooth, slope = (weight * p).sum(0), (weight * p * (1 - p)).sum(0)
    at = torch.log(smooth / (1 - smooth))
    return oracles.bernoulli_gradient(objective, at) / (smooth * (1 - smooth)) * slope


def k_sample_bound(objective, samples):
    """The bound −log (1/K) Σ exp(−L_k) as a loss of K·N units."""

    def bound(gates):  # (M, B, K·N)
        losses = torch.stack([objective(part) for part in gates.chunk(samples, -1)])
        return -torch.log(torch.exp(-losses).sum(0) / samples)

    return bound


def vimco(objective, logits, samples):
    """∂E[bound]/∂a and E[bound], summed over all 2^(K·N) outcomes of all samples."""
    bound, repeated = k_sample_bound(objective, samples), logits.repeat(1, samples)
    slope = oracles.bernoulli_gradient(bound, repeated).unflatten(-1, (samples, -1)).sum(1)
    return slope, oracles.bernoulli_value(bound, repeated)


BIASED = {"spsa": spsa, "finite_differences": finite_differences, "fiete_seung": fiete_seung}


# ---------------------------------------------------------------- categorical units


def categorical_objective(seed, batch, units, classes):
    """L = T[b, class_1, ..., class_N] + 2: any number for any outcome."""
    generator = torch.Generator().manual_seed(seed)
    table = 2 + torch.randn(batch, *[classes] * units, generator=generator, dtype=torch.float64)

    def objective(gates):  # (K, B, N, C)
        index = gates.argmax(-1).unbind(-1)
        return table[torch.arange(batch).expand(index[0].shape), *index]

    return objective


def categorical_value(objective, logits):
    """E[L] (B,), differentiable: the sum over C^N outcomes."""
    batch, units, classes = logits.shape
    p = torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True))
    total = torch.zeros(batch, dtype=torch.float64)
    for outcome in itertools.product(range(classes), repeat=units):
        gates = torch.eye(classes, dtype=torch.float64)[list(outcome)].expand(1, batch, units, classes)
        total = total + math.prod(p[:, i, c] for i, c in enumerate(outcome)) * objective(gates)[0]
    return total


def categorical_gradient(objective, logits):
    """∂E[L]/∂a (B, N, C)."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(categorical_value(objective, leaf).sum(), leaf)[0]


def set_probability(p, members):
    """The probability of drawing this set without replacement: the sum over its orders."""
    total = 0.0
    for order in itertools.permutations(members):
        mass, left = 1.0, 1.0
        for c in order:
            mass, left = mass * p[c] / left, left - p[c]
        total += mass
    return total


def leave_one_out_ratio(p, members, s):
    """R(S, s) = P_{∖s}(S∖s)/P(S)."""
    rest = [p[c] / (1 - p[s]) for c in members if c != s]
    return set_probability(rest, range(len(rest))) / set_probability(p, members)
