"""Exact mean and variance of an estimator, by quadrature over its noise."""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_count, check_logits
from gatelet.diagnose.table import facts
from gatelet.estimators import Estimator, Objective, resolve
from gatelet.estimators._base import evaluate
from gatelet.estimators._kinds import Bernoulli
from gatelet.estimators._noise import NONE, Noise

MAX_GATES = 1 << 25
_CHUNK = 1 << 20  # gates held at once


class Moments(NamedTuple):
    """What :func:`moments` returns; every entry is float64."""

    mean: Float[Tensor, "..."]
    """E[ĝ], the expected estimate of the gradient."""
    variance: Float[Tensor, "..."]
    """E[(ĝ − E[ĝ])²], per logit."""
    value: Float[Tensor, "..."]
    """The expected value of the surrogate, E[L]."""


def moments(
    objective: Objective,
    logits: Float[Tensor, "*lead N"],
    estimator: str | Estimator,
    samples: int | None = None,
    *,
    order: int = 64,
) -> Moments:
    """Exact mean and variance of an estimator's gradient, in float64, without Monte Carlo.

    E[ĝ] = ∫ ĝ(z) dF(z) over the K·N units' noise of an example: each one's range is split at the
    estimator's ``breaks``, where a gate jumps or has a kink. An estimator that is constant in between needs one node
    per interval, and the sum is exact; for a smooth one Gauss–Legendre nodes are placed in each interval. The
    nodes of the units form a tensor product. A categorical unit has its C outcomes for nodes.

    Bias and variance: none. Where the gate is smooth in the noise, the quadrature's error is about 1e-12 for
    Gaussian and 1e-10 for logistic noise at the default order, for an objective as smooth as tanh. Cost: Q
    calls of the surrogate, Q = (nodes per variable)^(K·N), vectorised by ``torch.func.vmap``.

    Each of the Q calls sees the estimator in its present state, and leaves it unchanged. In each call all examples of
    the batch take the node of the same index, so the estimate of an example must not depend on the noise of another. An
    estimator whose baseline contains the losses of the whole batch is exact for a batch of one only.

    Args:
        objective: maps gates (K, B, N), of the logits' dtype, to losses (K, B), with operations that ``vmap`` supports.
        logits: (B, N), any leading shape; (B, N, C) for categorical units.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance.
        samples: K, the number of replicas; by default the least that the estimator works with, mostly 1.
        order: Gauss–Legendre nodes per interval, for gates that vary smoothly with the noise.

    Returns:
        ``mean`` (B, N) and ``variance`` (B, N) of the gradient, ``value`` (B,), the expected loss.

    Raises:
        ValueError: for logits that are not finite, an unknown estimator, an objective that does not return one loss
            per replica and example, more outcomes than can be enumerated, or a categorical estimator that is smooth in
            its noise.

    >>> import torch
    >>> a = torch.zeros(1, 1)
    >>> exact = 0.25 * ((1 - 0.45) ** 2 - 0.45**2)               # σ(a)(1 − σ(a))·(L(1) − L(0))
    >>> round(exact, 4)
    0.025
    >>> moments(lambda h: ((h - 0.45) ** 2).sum(-1), a, "score_function").mean
    tensor([[0.0250]], dtype=torch.float64)
    >>> moments(lambda h: ((h - 0.45) ** 2).sum(-1), a, "straight_through").mean      # biased
    tensor([[0.1000]], dtype=torch.float64)

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, proof of Theorem 1 (binary units).
    """
    method = resolve(estimator)
    if not facts(method).summable:
        raise ValueError(f"estimator: the noise of {type(method).__name__} cannot be summed over unit by unit")
    check_logits(logits)
    samples = method.replicas if samples is None else check_count(samples, "samples")
    exact = logits.detach().to(torch.float64)
    # Counted before any of them is made: a unit with ten noise variables has more nodes than memory holds.
    count = _count_nodes(method, exact, check_count(order, "order"))
    replicated = torch.Size((samples, *logits.shape))
    units, rows = method.form.variables(logits.shape), method.noise_shape(replicated)[0]
    variables = rows * units
    if noise_outcomes(method, exact, samples, order) * samples * max(1, logits.numel()) > MAX_GATES:
        raise ValueError(
            f"logits, samples: {variables} noise variables of {count} nodes have {count}^{variables} outcomes, each of "
            f"{samples} x {logits.numel()} gates; moments enumerates at most {MAX_GATES} gates. Take fewer units, "
            "examples or samples" + ("" if facts(method).constant else ", or a lower order")
        )
    nodes, weights = _quadrature(method, exact, order)
    powers = count ** torch.arange(variables, device=logits.device)
    step = max(1, _CHUNK // max(1, samples * logits.numel()))
    parts = []
    for outcome in torch.arange(count**variables, device=logits.device).split(step):
        index = (outcome[:, None] // powers % count).reshape(-1, rows, units)
        mass = _pick(weights, index, weights.dim() - 2).prod(1).prod(-1)
        noise = _pick(nodes, index, weights.dim() - 2).reshape(-1, *method.noise_shape(replicated))
        # A copy: a baseline is updated when it is used.
        value, gradient = _estimates(copy.deepcopy(method), objective, exact, noise, logits.dtype)
        parts.append((mass, value, gradient))
    mass, value, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    share = method.form.spread(mass)
    mean = (share * gradient).sum(0)
    variance = (share * (gradient - mean).square()).sum(0)
    return Moments(mean, variance, (mass * value).sum(0))


def noise_outcomes(method: Estimator, logits: Tensor, samples: int, order: int) -> int:
    """Return how many outcomes of the noise :func:`moments` sums over."""
    rows = method.noise_shape(torch.Size((samples, *logits.shape)))[0]
    outcomes: int = _count_nodes(method, logits, order) ** (rows * method.form.variables(logits.shape))
    return outcomes


def _count_nodes(method: Estimator, logits: Tensor, order: int) -> int:
    """Return how many nodes :func:`_quadrature` gives a unit."""
    if method.law == NONE:
        return 1
    if not isinstance(method.form, Bernoulli):
        return method.form.values(logits.shape)
    known = facts(method)
    each = 1 if known.constant else order
    nodes = (known.splits(method, logits.detach()).shape[-1] + 1) * each
    more = (len(known.more_breaks(method)) + 1) * each
    return nodes * math.prod(len(law.atoms) or more for law in method.more)


def _estimates(
    method: Estimator, objective: Objective, logits: Tensor, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the surrogate (Q, *lead) and its gradient (Q, *logits) for every outcome's noise (Q, ...).

    Each outcome is a call of its own (vectorised), so that none sees another.
    """

    def wide(gates: Tensor) -> Tensor:
        return evaluate(objective, gates.to(dtype), method.event_dims).to(torch.float64)

    def surrogate(one: Tensor, its_noise: Tensor) -> Tensor:
        return method.surrogate(wide, one, its_noise)

    leaves = logits.expand(noise.shape[0], *logits.shape).clone().requires_grad_()
    with torch.enable_grad():
        value = torch.func.vmap(surrogate, randomness="different")(leaves, noise)
        # Adding zero gives a loss that ignores its gates a gradient, which is zero.
        (gradient,) = torch.autograd.grad(value.sum() + 0 * leaves.sum(), leaves)
    return value.detach(), gradient


def _pick(table: Tensor, index: Tensor, lead: int) -> Tensor:
    """Return (Q, R, *lead, N, ...): for each outcome's node indices (Q, R, N), every example's own node."""
    units = torch.arange(index.shape[-1], device=index.device)
    return table.movedim(1 + lead, 1)[index, units].movedim(2, 2 + lead)


def _quadrature(method: Estimator, logits: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return each unit's nodes (M, *lead, N, ...) and weights (M, *lead, N); "...": several numbers a unit, if so."""
    lead, variables = logits.shape[: logits.dim() - method.event_dims], method.form.variables(logits.shape)
    if method.law == NONE:
        nothing = logits.new_zeros((1, *logits.shape))
        whole = variables != logits.shape[-method.event_dims]  # the units of an example are one variable
        return nothing.unsqueeze(-2) if whole else nothing, logits.new_ones((1, *lead, variables))
    known = facts(method)
    if not isinstance(method.form, Bernoulli):
        if not known.constant or method.more:
            raise ValueError(
                f"estimator: {type(method).__name__}(kind={method.form.name!r}) is smooth in several noise variables "
                "at once, which moments cannot integrate; with two classes its Bernoulli form is the same"
            )
        return method.form.nodes(logits)
    nodes, weights = _intervals(method.law, known.splits(method, logits).detach(), known.constant, order)
    if not method.more:
        return nodes, weights
    nodes = nodes.unsqueeze(-1)
    for law in method.more:
        breaks = logits.new_tensor(known.more_breaks(method)).expand(*logits.shape, -1)
        more, its_weights = _intervals(law, breaks, known.constant, order)
        pairs = torch.cartesian_prod(torch.arange(len(nodes)), torch.arange(len(more)))
        nodes = torch.cat([nodes[pairs[:, 0]], more[pairs[:, 1]].unsqueeze(-1)], -1)
        weights = weights[pairs[:, 0]] * its_weights[pairs[:, 1]]
    return nodes, weights


def _intervals(noise: Noise, breaks: Tensor, constant: bool, order: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (M, *lead, N) of one noise variable per unit, split at its breaks (*lead, N, J)."""
    if noise.atoms:
        count = len(noise.atoms)
        atoms = breaks.new_tensor(noise.atoms).reshape(count, *(1,) * (breaks.dim() - 1))
        atoms = atoms.expand(count, *breaks.shape[:-1])
        return atoms, torch.full_like(atoms, 1 / count)
    inner = breaks.clamp(noise.low, noise.high).sort(-1).values
    ends = breaks.new_tensor([noise.low, noise.high]).expand(*breaks.shape[:-1], 2)
    edges = torch.cat([ends[..., :1], inner, ends[..., 1:]], -1).movedim(-1, 0)
    low, high = edges[:-1], edges[1:]
    if constant:
        return (low + high) / 2, noise.cdf(high) - noise.cdf(low)
    at, weight = (breaks.new_tensor(x).reshape(-1, *(1,) * low.dim()) for x in np.polynomial.legendre.leggauss(order))
    if noise.long_tails:  # nodes at z = sinh(t), dense where relaxed gates turn
        low, high = low.asinh(), high.asinh()
    nodes = low + (high - low) * (1 + at) / 2
    weights = (high - low) / 2 * weight
    if noise.long_tails:
        nodes, weights = nodes.sinh(), weights * nodes.cosh()
    return nodes.flatten(0, 1), (weights * noise.density(nodes)).flatten(0, 1)
