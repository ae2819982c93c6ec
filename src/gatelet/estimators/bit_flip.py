"""One unit at a time: the loss's change when a unit drawn at random flips."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Evaluating, Objective, evaluate
from gatelet.estimators._noise import UNIFORM, wide


class BitFlip(Evaluating):
    """Flips one unit, drawn with equal chances, and gives it N times its exact marginal difference.

    i uniform on the N units: ĝ_i = N·σ(a_i)(1 − σ(a_i))·(L(h with h_i = 1) − L(h with h_i = 0)), ĝ_j = 0 for the
    others. (bitflip-1 of the source, whose abstract and introduction were read; the formula is as other public work
    restates it. Ours: the derivation and the bound below, and a unit of its own for each replica. The source's UGC,
    which takes DisARM for units away from 0 and 1, is not here.)

    Bias: none. ∂E[L]/∂a_i = σ(a_i)(1 − σ(a_i))·E[L(h_i = 1) − L(h_i = 0)], and i is drawn with chance 1/N: it is one
    term of :class:`~gatelet.estimators.local_expectation.LocalExpectation`.
    Variance: at most N·(σ(1 − σ))² E[ΔL²] per unit, small where units are nearly decided, where DisARM's grows; about
    N times that of local expectation. Cost: 2 evaluations, for any N.

    >>> import torch
    >>> a = torch.zeros(1, 2, requires_grad=True)
    >>> noise = torch.tensor([[[[0.4, 0.2], [0.6, 0.7]]]])            # u, and which unit: the largest, the second
    >>> BitFlip().surrogate(lambda h: h @ torch.tensor([2.0, 4.0]), a, noise).sum().backward()
    >>> a.grad                                                        # 2·¼·4
    tensor([[-0., 2.]])

    Reference: R. Z. Kunes, M. Yin, M. Land, D. Haviv, D. Pe'er, S. Tavaré, "Gradient Estimation for Binary Latent
    Variables via Gradient Variance Clipping", 2023, arXiv:2208.06124.
    """

    unbiased = True
    more = (UNIFORM,)
    reference = "Kunes, Yin, Land, Haviv, Pe'er, Tavaré 2023, arXiv:2208.06124"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N 2"]) -> Float[Tensor, "*lead N"]:
        """Return the sample; it carries no gradient."""
        return self.sample(logits, noise[..., 0])

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead N"]:
        """Return N·σ(1 − σ)·(L(h_i = 1) − L(h_i = 0)) at the unit whose second noise is the largest."""
        exact = logits.to(wide(logits)).contiguous()
        chosen = torch.zeros_like(exact)
        if exact.shape[-1]:
            chosen = chosen.scatter(-1, noise[..., 1].argmax(-1, keepdim=True), 1.0)
        flipped = torch.where(chosen > 0, 1 - gates, gates)
        at = evaluate(objective, flipped, self.event_dims)
        change = ((losses - at).to(exact.dtype).unsqueeze(-1)) * (2 * gates - 1)
        return exact.shape[-1] * chosen * change * exact.sigmoid() * (-exact).sigmoid()
