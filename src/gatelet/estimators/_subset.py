"""Bernoulli units given that k of them are open: normaliser, marginals and samples, by halving the units.

A node of the tree holds, for j = 0 … k, log of the sum of exp(Σ a_i h_i) over its units' gates with j ones; the node
above it has the product of its children's polynomials. So all of it takes log₂ N steps of whole tensors, O(N·k) numbers
and O(N·k²) operations at most, and is differentiable twice.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

FLOOR = -1e9
"""Stands for log 0: finite, so that its derivative is 0 and not NaN."""


def log_normaliser(logits: Float[Tensor, "*lead N"], k: int) -> Float[Tensor, "*lead"]:
    """Return log Σ exp(Σ a_i h_i) over the gates with k ones, differentiable."""
    return _levels(logits, k)[-1][..., 0, k]


def marginals(logits: Float[Tensor, "*lead N"], k: int) -> Float[Tensor, "*lead N"]:
    """Return P(h_i = 1), the derivative of the normaliser, differentiable once more (its derivative is Cov(h))."""

    def total(a: Tensor) -> Tensor:
        return log_normaliser(a, k).sum()

    mean: Tensor = torch.func.grad(total)(logits)
    return mean


def sample(logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"], k: int) -> Float[Tensor, "*lead N"]:
    """Return gates with k ones from uniform noise: from the root, how many of a node's ones go to its left child."""
    levels, units = _levels(logits, k), logits.shape[-1]
    ones = torch.full_like(levels[-1][..., 0], k, dtype=torch.long)  # (*lead, nodes)
    used = 0
    for children, random in zip(levels[-2::-1], _random(units)[::-1], strict=True):
        chance = _splits(children[..., ::2, :], children[..., 1::2, :], ones)
        draw = noise[..., used : used + random]
        draw = F.pad(draw, (0, ones.shape[-1] - random))
        used += random
        taken = (draw.unsqueeze(-1) >= chance.cumsum(-1)).sum(-1)
        # Rounding must not send ones where there is no unit for them.
        index = torch.arange(chance.shape[-1], device=logits.device)
        last = torch.where(chance > 0, index, 0).amax(-1)
        first = torch.where(chance > 0, index, chance.shape[-1]).amin(-1)
        taken = torch.minimum(torch.maximum(taken, first), last)
        ones = torch.stack([taken, ones - taken], -1).flatten(-2)
    return ones[..., :units].to(logits.dtype)


def noise_for(
    logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "Q *lead N"], k: int
) -> Float[Tensor, "Q *lead N"]:
    """Return, for gates with k ones, uniform noise from which :func:`sample` makes them (the middle of its cell)."""
    levels, units = _levels(logits, k), logits.shape[-1]
    counts = [_padded(gates, 0.0).long()]
    while counts[-1].shape[-1] > 1:
        counts.append(counts[-1][..., ::2] + counts[-1][..., 1::2])
    parts = [gates.new_zeros((*gates.shape[:-1], 1))]  # N − 1 nodes choose; one number is left over
    for level, random in reversed(list(enumerate(_random(units)))):
        children = levels[level]
        chance = _splits(children[..., ::2, :], children[..., 1::2, :], counts[level + 1])
        taken = counts[level][..., ::2].unsqueeze(-1)
        middle = chance.cumsum(-1).gather(-1, taken) - chance.gather(-1, taken) / 2
        parts.insert(-1, middle.squeeze(-1)[..., :random])
    return torch.cat(parts, -1)


def _random(units: int) -> list[int]:
    """Return, from the leaves' parents up, how many nodes of a level have units in both of their children."""
    found, child = [], 1
    while child < units:
        found.append(-((child - units) // (2 * child)))
        child *= 2
    return found


def relax(z: Float[Tensor, "*lead N"], k: int, temperature: float | Tensor) -> Float[Tensor, "*lead N"]:
    """Return the relaxed k-hot vector: p₁ = softmax(z/τ), z ← z + log(1 − p₁), … and the sum of the k p's."""
    total = torch.zeros_like(z)
    tiny = torch.finfo(z.dtype).tiny
    for _ in range(k):
        p = (z / temperature).softmax(-1)
        total = total + p
        z = z + (1 - p).clamp_min(tiny).log()
    return total


def _levels(logits: Tensor, k: int) -> list[Tensor]:
    """Return the nodes' polynomials (*lead, nodes, degree + 1), leaves first, the root last with exactly k + 1."""
    padded = _padded(logits, FLOOR)
    level = torch.stack([torch.zeros_like(padded), padded], -1)
    levels = [level]
    while level.shape[-2] > 1:
        level = _product(level[..., ::2, :], level[..., 1::2, :], k)
        levels.append(level)
    return levels


def _padded(values: Tensor, fill: float) -> Tensor:
    """Return the units followed by as many as make their number a power of two."""
    units = values.shape[-1]
    size = 1 << max(0, units - 1).bit_length()
    return F.pad(values, (0, size - units), value=fill)


def _product(left: Tensor, right: Tensor, k: int) -> Tensor:
    """Return log of the product of two polynomials given by the logs of their coefficients, up to degree k."""
    degree = left.shape[-1] - 1
    size = min(2 * degree, k) + 1
    # terms[j, i] = left[i] + right[j − i]
    wide = F.pad(right.flip(-1), (degree, degree), value=FLOOR)
    windows = torch.stack([wide[..., 2 * degree - j : 3 * degree - j + 1] for j in range(size)], -2)
    return torch.logsumexp(left.unsqueeze(-2) + windows, -1)


def _splits(left: Tensor, right: Tensor, ones: Tensor) -> Tensor:
    """Return P(i of the node's ones are in its left child), i = 0 … degree, for ones (..., nodes)."""
    degree = left.shape[-1] - 1
    index = torch.arange(degree + 1, device=left.device)
    rest = ones.unsqueeze(-1) - index
    other = right.expand(*rest.shape[:-1], degree + 1).gather(-1, rest.clamp(0, degree))
    terms = torch.where((rest >= 0) & (rest <= degree), left + other, 2 * FLOOR)
    chance = terms.softmax(-1)
    return torch.where(terms > FLOOR / 2, chance, 0.0)
