"""Leave-one-out whose baseline also uses the other examples of the batch, the more the better they agree."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Sampled
from gatelet.estimators._distributed import sums_of_all
from gatelet.estimators.double_control import others_mean


class ShrunkBaseline(Sampled):
    """Score function whose baseline is shrunk from the example's own other samples towards the other examples' mean.

    b_k = (1 − λ)·mean_{j≠k} L_j + λ·m, m the mean over the batch's other examples of their mean losses; λ = v/(v + s),
    with v the mean over the other examples of var_K(L)/(K − 1), how far a mean of K − 1 samples is off, and s the
    variance of the other examples' means, how far examples differ. Both leave the example out (so "two-level
    leave-one-out"), and λ = 0 with fewer than two other examples.
    (The source estimates s with Stein's correction for the noise of the means; here s holds that noise too, so
    λ is a little smaller.)

    Bias: none: neither λ nor m depends on this example's gates, given that examples are drawn independently.
    Variance: below leave-one-out's with few replicas and examples with similar losses; near it otherwise. No state.

    Args:
        kind: ``"bernoulli"``, ``"categorical"`` or ``"subset"``.
        k: for subset units, how many are open.

    >>> import torch
    >>> unit = ShrunkBaseline()
    >>> a = torch.zeros(2, 3, 1)
    >>> h = unit(a, torch.tensor([[[0.4], [0.6], [0.6]], [[0.6], [0.4], [0.4]]]))
    >>> losses = torch.tensor([[3.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    >>> unit.coefficients(a, h, losses)[:, 0].flatten()               # two examples without spread: λ = 0
    tensor([1., 1.])

    Reference: G. Zeng, Z. Zhou, D. Arora, A. Zanette, "Shrinking the Variance: Shrinkage Baselines for Reinforcement
    Learning with Verifiable Rewards", 2025, arXiv:2511.03710.
    """

    unbiased = True
    replicas = 2
    kinds = ("bernoulli", "categorical", "subset")
    reference = "Zeng, Zhou, Arora, Zanette 2025, arXiv:2511.03710"

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return (h − σ(a))·(L − b)."""
        baseline = others_mean(losses)
        # An example is a row of the batch; what it does in further dimensions shares its loss.
        found = None if losses.dim() < 2 else _towards_others(losses.unsqueeze(-1).flatten(2).mean(-1))
        if found is not None:
            weight, centre = found
            shape = (-1, *(1,) * (losses.dim() - 2))
            baseline = torch.lerp(baseline, centre.reshape(shape).expand(baseline.shape), weight.reshape(shape))
        return self.score(logits, gates, losses) * (losses - baseline).unsqueeze(-1)


def _towards_others(losses: Float[Tensor, "K B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]] | None:
    """Return for each example λ and the other examples' mean loss; None if there are fewer than two others.

    The others are those of all processes.
    """
    means = losses.mean(0)
    spread = (losses - means).square().sum(0) / (len(losses) - 1) ** 2
    own = torch.stack([means, spread, means.square()])
    total, examples = sums_of_all(own.sum(1), own.shape[1])
    count = examples - 1
    if count < 2:
        return None
    centre, off, square = (total.unsqueeze(1) - own) / count
    # The variance of the other examples' means, each time without one.
    apart = (square - centre.square()).clamp_min(0.0) * count / (count - 1)
    return torch.where(off > 0, off / (off + apart), 0.0), centre
