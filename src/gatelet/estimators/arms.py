"""DisARM for n samples: replicas that avoid each other."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Sampled
from gatelet.estimators._noise import below


class ARMS(Sampled):
    """Score function of K antithetic samples, with the other samples as baseline, made unbiased unit by unit.

    e_k = −log u_k, d = e/Σe (Dirichlet), v_k = (1 − d_k)^{K−1}, uniform and negatively dependent; h_k = 1[v_k < p]
    where p = σ(a) ≤ ½, 1[1 − v_k < p] elsewhere. ĝ = 1/(K − 1)·Σ_k (L_k − L̄)·(h_k − p)·p(1 − p)/(p − ρ),
    ρ = P(h_j = h_k = 1) = max(0, 2q^{1/(K−1)} − 1)^{K−1} with q = p where p ≤ ½, and 2p − 1 + the same of q = 1 − p
    elsewhere. (Of the source's two copulas the Dirichlet one, turned over by p as in its code.)

    Bias: none, for one layer of independent units.
    Variance: below that of leave-one-out where the loss is near linear, as samples are spread out; with K = 2 it is
    DisARM. No state.

    >>> import torch
    >>> unit = ARMS()
    >>> a = torch.zeros(2, 1, 1)
    >>> h = unit(a, torch.tensor([[[0.3]], [[0.9]]]))
    >>> h.flatten()
    tensor([1., 0.])
    >>> unit.coefficients(a, h, torch.tensor([[3.0], [1.0]])).flatten()          # DisARM's ½(3 − 1)·½, both
    tensor([0.5000, 0.5000])

    Reference: A. Dimitriev, M. Zhou, "ARMS: Antithetic-REINFORCE-Multi-Sample Gradient for Binary Variables", 2021,
    arXiv:2105.14141.
    """

    unbiased = True
    replicas = 2
    several_layers = False
    reference = "Dimitriev, Zhou 2021, arXiv:2105.14141"

    def forward(
        self, logits: Float[Tensor, "K *lead N"], noise: Float[Tensor, "K *lead N"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return the samples; they carry no gradient. A single replica is an ordinary sample."""
        if len(noise) == 1:
            return self.sample(logits, noise)
        noise = noise.contiguous()
        exponential = -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
        share = exponential / exponential.sum(0).clamp_min(torch.finfo(noise.dtype).tiny)
        spread = (1 - share).clamp_min(0.0).pow(len(noise) - 1)
        p = logits.detach().to(noise.dtype).sigmoid()
        return below(torch.where(p > 0.5, 1 - spread, spread), p, logits.dtype)

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return K/(K − 1)·(L − L̄)·(h − p)·p(1 − p)/(p − ρ), whose mean over replicas is the estimate."""
        count = len(losses)
        a = logits[:1].to(losses.dtype)
        less = (-a.abs()).sigmoid()  # the smaller of p and 1 − p; both have the same p − ρ
        both = (2 * less.pow(1 / (count - 1)) - 1).clamp_min(0.0).pow(count - 1)
        weight = less * a.abs().sigmoid() / (less - both).clamp_min(torch.finfo(losses.dtype).tiny)
        signal = (losses - losses.mean(0)) * count / (count - 1)
        return self.score(logits, gates, losses) * weight * signal.unsqueeze(-1)
