"""Exact gradients of stochastic binary units, by enumeration."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_logits
from gatelet.estimators._base import Objective, evaluate

MAX_UNITS = 20
_CHUNK = 1 << 20  # gates held at once


def outcomes(units: int) -> Float[Tensor, "Q N"]:
    """Return all 2^N binary vectors of ``units`` gates, float64.

    >>> outcomes(2)
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    index = torch.arange(1 << units)
    return (index[:, None] >> torch.arange(units) & 1).to(torch.float64)


def exact_gradient(objective: Objective, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
    """Exact gradient of the expected loss of independent Bernoulli gates, in float64.

    ∂/∂a E[L(h)] = ∂/∂a Σ_h Π_i σ(a_i)^{h_i} (1 − σ(a_i))^{1 − h_i} L(h), summed over all 2^N outcomes.

    Bias and variance: none. Cost: 2^N evaluations of the objective, in chunks.

    Args:
        objective: maps gates (K, B, N), of the logits' dtype, to losses (K, B).
        logits: (B, N), any leading shape, N at most 20.

    Returns:
        (B, N), float64: row b is the gradient of example b's expected loss.

    Raises:
        ValueError: for more than 20 units, logits that are not finite, or an objective that does not return
            one loss per outcome and example.

    >>> import torch
    >>> a = torch.tensor([[0.0, 1.0]])
    >>> exact_gradient(lambda h: (h * torch.tensor([2.0, 4.0])).sum(-1), a)     # w·σ(a)(1 − σ(a))
    tensor([[0.5000, 0.7864]], dtype=torch.float64)

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, proof of Theorem 1.
    """
    check_logits(logits)
    units = logits.shape[-1]
    if units > MAX_UNITS:
        raise ValueError(
            f"logits: {units} units have 2^{units} outcomes; exact_gradient enumerates at most {MAX_UNITS} units"
        )
    total = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    sigma = logits.detach().to(torch.float64).sigmoid()
    step = max(1, _CHUNK // max(1, logits.numel()))
    with torch.no_grad():
        for gates in outcomes(units).to(logits.device).split(step):
            gates = gates.reshape(-1, *(1,) * (logits.dim() - 1), units).expand(-1, *logits.shape)
            losses = evaluate(objective, gates.to(logits.dtype)).to(torch.float64)
            factors = torch.where(gates > 0, sigma, 1 - sigma)
            # ∂P(h)/∂a_i = P(h)·(h_i − σ_i)
            weight = factors.prod(-1) * losses
            total += (weight.unsqueeze(-1) * (gates - sigma)).sum(0)
    return total
