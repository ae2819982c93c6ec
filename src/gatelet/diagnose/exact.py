"""Exact gradients of stochastic units, by enumeration."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_logits
from gatelet.estimators._base import AnyKind, Objective, evaluate
from gatelet.estimators._kinds import Kind, make_kind

MAX_OUTCOMES = 1 << 20
_CHUNK = 1 << 20  # gates held at once


def exact_gradient(
    objective: Objective, logits: Float[Tensor, "*lead N"], kind: AnyKind = "bernoulli", k: int | None = None
) -> Float[Tensor, "*lead N"]:
    """Exact gradient of the expected loss of independent Bernoulli (or categorical) gates, in float64.

    ∂/∂a E[L(h)] = Σ_h P(h)·(h − σ(a))·L(h), over all 2^N outcomes, P(h) = Π_i σ(a_i)^{h_i} (1 − σ(a_i))^{1 − h_i};
    for one-hot gates of C classes the sum is over C^N outcomes, with softmax(a) in place of σ(a); for subsets over
    the C(N, k) gates with k ones, P(h) ∝ exp(Σ a_i h_i), with the marginals.

    Bias and variance: none. Cost: 2^N (or C^N) evaluations of the objective, in chunks.

    Args:
        objective: maps gates (K, B, N), of the logits' dtype, to losses (K, B).
        logits: (B, N), any leading shape, at most 2^20 outcomes; (B, N, C) for categorical units.
        kind: ``"bernoulli"``, ``"categorical"`` or ``"subset"``.
        k: for subset units, how many are open.

    Returns:
        of the logits' shape, float64: row b is the gradient of example b's expected loss.

    Raises:
        ValueError: for too many outcomes, logits that are not finite, or an objective that does not return
            one loss per outcome and example.

    >>> import torch
    >>> a = torch.tensor([[0.0, 1.0]])
    >>> exact_gradient(lambda h: (h * torch.tensor([2.0, 4.0])).sum(-1), a)     # w·σ(a)(1 − σ(a))
    tensor([[0.5000, 0.7864]], dtype=torch.float64)

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, proof of Theorem 1.
    """
    check_logits(logits)
    units = make_kind(kind, k)
    check_dims(logits, units)
    count = units.count(logits.shape)
    if count > MAX_OUTCOMES:
        raise ValueError(
            f"logits: {units.describe(logits.shape)} outcomes; exact_gradient enumerates at most {MAX_OUTCOMES}"
        )
    exact = logits.detach().to(torch.float64)
    mean = units.probability(exact)
    total = torch.zeros_like(exact)
    step = max(1, _CHUNK // max(1, logits.numel()))
    with torch.no_grad():
        for index in torch.arange(count, device=logits.device).split(step):
            gates = units.outcomes(logits.shape, index).to(torch.float64).expand(-1, *logits.shape)
            losses = evaluate(objective, gates.to(logits.dtype), units.event_dims).to(torch.float64)
            # ∂P(h)/∂a = P(h)·(h − mean)
            weight = units.spread(units.log_probability(exact, gates).exp() * losses)
            total += (weight * (gates - mean)).sum(0)
    return total


def check_dims(logits: Tensor, kind: Kind) -> None:
    """Raise unless the logits have the dimensions that units of this kind need."""
    if logits.dim() < kind.event_dims:
        raise ValueError(f"logits of categorical units must have shape (..., N, C), not {tuple(logits.shape)}")
