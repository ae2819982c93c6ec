"""Independent truths for the second generation of estimators, from the mathematics; nothing of the library is used."""

import itertools
import math

import torch

import oracles
from oracles import logistic_cumulative, slope_at
from oracles_relaxations import softmax_jacobian, with_slopes

# ---------------------------------------------------------------- units of another law, deterministic maps


def stochastic_gates(objective, logits, method):
    """h = clip(a + s·z): atoms at 0 and 1, between them the density of a + s·z, at nodes that do not move with a."""
    std, order = method.std, 48 if logits.shape[-1] < 3 else 30

    def support(a):
        zero = torch.zeros_like(a.detach())
        h, weight = oracles.gauss_legendre(zero, zero + 1, order)
        atoms = oracles.gaussian_cumulative(-a / std), oracles.gaussian_cumulative((a - 1) / std)
        values = torch.cat([zero[None], h, zero[None] + 1])
        return values, torch.cat(
            [atoms[0][None], weight * oracles.gaussian_density((h - a) / std) / std, atoms[1][None]]
        )

    return oracles._gradient(objective, logits, support)


def on_the_simplex(logits, gate):
    """Gates gate(a − t) with t found by bisection so that they sum to 1."""
    low, high = logits.amin(-1, keepdim=True) - 3, logits.amax(-1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        too_many = gate(logits - middle).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return gate(logits - low)


def sparse_map(gate, speed):
    """∂L/∂a = (diag(r) − rrᵀ/Σr) ∂L/∂h, r = the derivative of ``gate`` where it is open: from Σ gate(a − t) = 1."""

    def gradient(objective, logits, method):
        h = on_the_simplex(logits, gate)
        r, slope = speed(h), slope_at(objective, h[None])[0]
        return r * (slope - (r * slope).sum(-1, keepdim=True) / r.sum(-1, keepdim=True))

    return gradient


EXACT = {
    "stochastic_gates": stochastic_gates,
    "sparsemax": sparse_map(lambda x: x.clamp_min(0), lambda h: (h > 0).double()),
    "entmax": sparse_map(lambda x: (x / 2).clamp_min(0).square(), lambda h: h.sqrt()),
}


# ---------------------------------------------------------------- biased, Bernoulli


def darn(objective, logits, method):
    """Σ_h P(h)·∂L/∂h_i(h)·(h_i − p_i)²."""
    p = 1 / (1 + torch.exp(-logits))
    return with_slopes(objective, logits, (p**2, (1 - p) ** 2))


def zgr(objective, logits, method):
    """p(1 − p)·½(E[∂L/∂h_i | h_i = 1] + E[∂L/∂h_i | h_i = 0]), the trapezoid rule."""
    p = 1 / (1 + torch.exp(-logits))
    return with_slopes(objective, logits, (p / 2, (1 - p) / 2))


def decoupled_straight_through(objective, logits, method):
    """E over h ~ σ(a/τ_f) of ∂L/∂h_i, times σ′(a_i/τ_b)/τ_b."""
    slope = oracles.logistic_density(logits / method.backward_temperature) / method.backward_temperature
    return with_slopes(objective, logits / method.forward_temperature, (slope, slope))


def _by_outcome(objective, logits, change):
    """Σ_h P(h)·E[ĝ_i | h], where ``change(a, g, h)`` is E[ĝ_i | h] for ∂L/∂h = g."""
    p, total = 1 / (1 + torch.exp(-logits)), torch.zeros_like(logits)
    for outcome in itertools.product((0.0, 1.0), repeat=logits.shape[-1]):
        h = torch.tensor(outcome, dtype=torch.float64).expand_as(logits)
        weight = torch.where(h > 0, p, 1 - p).prod(-1, keepdim=True)
        total = total + weight * change(logits, slope_at(objective, h[None])[0], h)
    return total


def imle(objective, logits, method):
    """A gate that is open closes where −a < ℓ < −a + λg, one that is closed opens where −a + λg < ℓ < −a."""

    def change(a, g, h):
        p, moved = logistic_cumulative(a), logistic_cumulative(a - method.step * g)
        share = torch.where(h > 0, (p - moved).clamp_min(0) / p, (p - moved).clamp_max(0) / (1 - p))
        return share / method.step

    return _by_outcome(objective, logits, change)


def aimle(objective, logits, method):
    """The gates at a + λg and a − λg differ where |ℓ + a| < λ|g|; λ = β|a|/|g|."""
    beta = method.scale.item()

    def change(a, g, h):
        step = beta * a.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)
        p = logistic_cumulative(a)
        above, below = logistic_cumulative(a + step * g.abs()), logistic_cumulative(a - step * g.abs())
        share = torch.where(h > 0, (p - below) / p, (above - p) / (1 - p))
        return share * g.sign() / (2 * step)

    return _by_outcome(objective, logits, change)


EXPECTED = {
    "darn": darn,
    "zgr": zgr,
    "decoupled_straight_through": decoupled_straight_through,
    "imle": imle,
    "aimle": aimle,
}


# ---------------------------------------------------------------- classes: the Jacobian at an outcome


def darn_jacobian(p, h):
    return (h - p).unsqueeze(-1) * (h - p).unsqueeze(-2)


def zgr_jacobian(p, h):
    """Rows c ≠ x: ½p_c(e_c − e_x); row x: ½(e_x − p)."""
    classes = p.shape[-1]
    eye = torch.eye(classes, dtype=torch.float64)
    x = h.argmax(-1)
    rows = 0.5 * p.unsqueeze(-1) * (eye - h.unsqueeze(-2))
    own = 0.5 * (h - p)
    return torch.where(torch.nn.functional.one_hot(x, classes).bool().unsqueeze(-1), own.unsqueeze(-2), rows)


def tempered_jacobian(logits, temperature):
    return softmax_jacobian((logits / temperature).softmax(-1)) / temperature


# ---------------------------------------------------------------- k of N


def subsets(units, k):
    """All gates with k ones, (Q, N)."""
    gates = torch.zeros(0, units, dtype=torch.float64)
    for members in itertools.combinations(range(units), k):
        row = torch.zeros(1, units, dtype=torch.float64)
        row[0, list(members)] = 1
        gates = torch.cat([gates, row])
    return gates


def subset_law(logits, k):
    """Gates (Q, B, N) and P(h) (Q, B), proportional to Π_i p_i^{h_i} (1 − p_i)^{1 − h_i}: Bernoulli given the sum."""
    gates = subsets(logits.shape[-1], k)[:, None].expand(-1, *logits.shape)
    p = 1 / (1 + torch.exp(-logits))
    mass = torch.where(gates > 0, p, 1 - p).prod(-1)
    return gates, mass / mass.sum(0)


def subset_gradient(objective, logits, k):
    leaf = logits.detach().clone().requires_grad_()
    gates, mass = subset_law(leaf, k)
    return torch.autograd.grad((mass * objective(gates)).sum(), leaf)[0]


def subset_mean_slope(objective, logits, k):
    """E[∂L/∂h] and Cov(h)·E[∂L/∂h]."""
    gates, mass = subset_law(logits, k)
    slope = (mass[..., None] * slope_at(objective, gates)).sum(0)
    mean = (mass[..., None] * gates).sum(0)
    centred = gates - mean
    covariance = torch.einsum("qb,qbi,qbj->bij", mass, centred, centred)
    return slope, torch.einsum("bij,bj->bi", covariance, slope)


# ---------------------------------------------------------------- the law of coupled replicas


def arms_patterns(p, samples):
    """Every pattern of K gates of one unit and its mass under the Dirichlet copula, by inclusion and exclusion."""
    q = min(p, 1 - p)  # beyond ½ it is the closed gates that avoid each other
    t = 1 - q ** (1 / (samples - 1))

    def all_of(m):
        return max(0.0, 1 - m * t) ** (samples - 1) if m else 1.0

    patterns = []
    for gates in itertools.product((0.0, 1.0), repeat=samples):
        m = sum(gates) if p <= 0.5 else samples - sum(gates)
        m = int(m)
        mass = sum((-1) ** j * math.comb(samples - m, j) * all_of(m + j) for j in range(samples - m + 1))
        patterns.append((torch.tensor(gates, dtype=torch.float64), mass))
    return patterns


def carms_patterns(p, samples):
    """Every pattern of K classes of one variable (K, C) and its mass, by inclusion and exclusion, over all orders."""
    classes, power = len(p), samples - 1

    def below(ends):
        return max(0.0, sum(x ** (1 / power) for x in ends) - power) ** power

    pairs, mass = list(itertools.combinations(range(classes), 2)), {}
    for first, last in pairs:
        order = [first, *(c for c in range(classes) if c not in (first, last)), last]
        part, start = {}, 0.0
        for c in order:
            part[c] = (start, start + p[c])
            start += p[c]
        for pattern in itertools.product(range(classes), repeat=samples):
            for corner in itertools.product((0, 1), repeat=samples):
                sign = (-1) ** (samples - sum(corner))
                volume = sign * below([part[c][i] for c, i in zip(pattern, corner, strict=True)])
                mass[pattern] = mass.get(pattern, 0.0) + volume / len(pairs)
    eye = torch.eye(classes, dtype=torch.float64)
    return [(eye[list(pattern)], m) for pattern, m in mass.items()]


# ---------------------------------------------------------------- classes and their noise, swapped


def arsm_cells(logits):
    """Parts of the simplex of π, in none of which a swapped argmin_i π_i·exp(−a_i) changes: centre and mass of each.

    The simplex is cut into smaller ones, an edge at a time, until no plane π_i·exp(−a_k) = π_j·exp(−a_m) crosses any,
    for all i, j that one swap brings to k, m. An estimate that is linear in π on each has its mean at the centre.
    """
    classes = len(logits)
    done = torch.eye(classes, dtype=torch.float64)[None]
    for k, m in itertools.combinations(range(classes), 2):
        for i, j in itertools.permutations(range(classes), 2):
            if i != k and j != m and (i, j) != (m, k):
                continue  # two swaps
            plane = torch.zeros(classes, dtype=torch.float64)
            plane[i], plane[j] = math.exp(logits[m] - logits[k]), -1.0
            done = _cut(done, plane / plane.abs().max())
    mass = torch.linalg.det(done).abs()
    kept = mass > 1e-20
    return done[kept].mean(1), mass[kept]


def _cut(simplices, plane):
    """Halve the simplices at an edge that crosses the plane, until none does."""
    done = []
    while len(simplices):
        side = simplices @ plane
        (below, low), (above, high) = side.min(1), side.max(1)
        crossed = (below < -1e-13) & (above > 1e-13)
        done.append(simplices[~crossed])
        simplices, below, above, low, high = (each[crossed] for each in (simplices, below, above, low, high))
        row = torch.arange(len(simplices))
        share = (-below / (above - below))[:, None]
        at = torch.lerp(simplices[row, low], simplices[row, high], share)
        upper, lower = simplices.clone(), simplices.clone()
        upper[row, low], lower[row, high] = at, at
        simplices = torch.cat([upper, lower])
    return torch.cat(done)
