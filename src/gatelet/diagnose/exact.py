"""Exact gradients of stochastic binary units, by enumeration."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatelet._checks import check_choice, check_logits
from gatelet.estimators._base import Kind, Objective, evaluate

MAX_OUTCOMES = 1 << 20
_CHUNK = 1 << 20  # gates held at once


def outcomes(units: int, classes: int = 2) -> Int[Tensor, "Q N"]:
    """Return all C^N outcomes of ``units`` variables of ``classes`` values, as indices.

    >>> outcomes(2)
    tensor([[0, 0],
            [1, 0],
            [0, 1],
            [1, 1]])
    """
    return torch.arange(classes**units)[:, None] // classes ** torch.arange(units) % classes


def exact_gradient(
    objective: Objective, logits: Float[Tensor, "*lead N"], kind: Kind = "bernoulli"
) -> Float[Tensor, "*lead N"]:
    """Exact gradient of the expected loss of independent Bernoulli (or categorical) gates, in float64.

    ∂/∂a E[L(h)] = Σ_h P(h)·(h − σ(a))·L(h), over all 2^N outcomes, P(h) = Π_i σ(a_i)^{h_i} (1 − σ(a_i))^{1 − h_i};
    for one-hot gates of C classes the sum is over C^N outcomes, with softmax(a) in place of σ(a).

    Bias and variance: none. Cost: 2^N (or C^N) evaluations of the objective, in chunks.

    Args:
        objective: maps gates (K, B, N), of the logits' dtype, to losses (K, B).
        logits: (B, N), any leading shape, at most 2^20 outcomes; (B, N, C) for categorical units.
        kind: ``"bernoulli"`` or ``"categorical"``.

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
    categorical = check_choice(kind, ("bernoulli", "categorical"), "kind") == "categorical"
    if categorical and logits.dim() < 2:
        raise ValueError(f"logits of categorical units must have shape (..., N, C), not {tuple(logits.shape)}")
    events = 2 if categorical else 1
    units, classes = logits.shape[-events], logits.shape[-1] if categorical else 2
    if classes**units > MAX_OUTCOMES:
        raise ValueError(
            f"logits: {units} units have {classes}^{units} outcomes; exact_gradient enumerates at most {MAX_OUTCOMES}"
        )
    exact = logits.detach().to(torch.float64)
    mean = exact.softmax(-1) if categorical else exact.sigmoid()
    total = torch.zeros_like(exact)
    step = max(1, _CHUNK // max(1, logits.numel()))
    with torch.no_grad():
        for index in outcomes(units, classes).to(logits.device).split(step):
            gates = torch.nn.functional.one_hot(index, classes) if categorical else index
            gates = gates.reshape(len(index), *(1,) * (logits.dim() - events), *gates.shape[1:]).to(torch.float64)
            gates = gates.expand(-1, *logits.shape)
            losses = evaluate(objective, gates.to(logits.dtype), events).to(torch.float64)
            chosen = (gates * mean).sum(-1) if categorical else torch.where(gates > 0, mean, 1 - mean)
            # ∂P(h)/∂a = P(h)·(h − mean)
            weight = (chosen.prod(-1) * losses).reshape(*losses.shape, *(1,) * events)
            total += (weight * (gates - mean)).sum(0)
    return total
