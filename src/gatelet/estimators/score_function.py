"""Section 3: the unbiased estimator from a broadcast loss, and its baselines."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice, check_rate
from gatelet.estimators._base import AnyKind, Sampled
from gatelet.estimators._distributed import mean_of_sums


class ScoreFunction(Sampled):
    """Binary unit that learns from the correlation of its own noise with the loss (REINFORCE).

    h ~ Bernoulli(σ(a)); ĝ_i = (h_i − σ(a_i)) · (L − L̄_i) (Theorem 1 with L̄_i = 0, eq. 4; Corollary 1 otherwise).

    Bias: none, for any L̄_i that does not depend on this h_i. The baseline is a moving average over *earlier*
    batches only: it is updated after it was used, so it never contains the loss it is subtracted from.
    Variance: grows with E[L²] without a baseline; least, among constants, with
    L̄_i = E[(h_i − σ_i)² L] / E[(h_i − σ_i)²] (Corollary 1). No signal is propagated back through the gates.

    Args:
        baseline: ``"per_unit"``: the minimum-variance constant, as two moving averages per unit; ``"running_mean"``:
            one moving average of the loss; ``"none"``.
        decay: the moving averages' coefficient (paper's code: 0.9).
        kind: ``"bernoulli"``, or ``"categorical"``: h one-hot, ĝ = (h − softmax(a))·(L − L̄), L̄ per class; or
            ``"subset"``: the marginals P(h_i = 1) in place of σ(a).
        k: for subset units, how many are open.

    Raises:
        ValueError: for an unknown baseline, or a decay outside (0, 1); when units of another number share
            the baseline.

    >>> import torch
    >>> unit = ScoreFunction(baseline="none")
    >>> a = torch.zeros(1, 2)
    >>> h = unit(a, torch.tensor([[0.4, 0.6]]))
    >>> unit.coefficients(a, h, torch.tensor([2.0]))         # (h − ½)·2
    tensor([[ 1., -1.]])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 3; R. J. Williams, "Simple
    statistical gradient-following algorithms for connectionist reinforcement learning", 1992; L. Weaver,
    N. Tao, "The optimal reward baseline for gradient-based reinforcement learning", 2001, arXiv:1301.2315.
    """

    unbiased = True
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 3; Williams 1992; Weaver, Tao 2001"
    kinds = ("bernoulli", "categorical", "subset")

    numerator: Tensor
    denominator: Tensor

    def __init__(
        self,
        baseline: Literal["per_unit", "running_mean", "none"] = "per_unit",
        decay: float = 0.9,
        kind: AnyKind = "bernoulli",
        k: int | None = None,
    ) -> None:
        super().__init__(kind, k)
        self.baseline = check_choice(baseline, ("per_unit", "running_mean", "none"), "baseline")
        self.decay = check_rate(decay, "decay")
        # L̄ = numerator / denominator: averages of wL and w, with w = (h − σ)² per unit, or 1. Both start at
        # zero, so the ratio needs no correction for its start. The units' number is known at the first call: so they
        # are in state_dict, but no buffers: code that copies or averages a model expects buffers to keep their size.
        self.numerator, self.denominator = torch.zeros(0), torch.zeros(0)

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return (h − σ(a))·(L − L̄), then take these losses into L̄."""
        difference = self.score(logits, gates, losses)
        losses = losses.unsqueeze(-1)
        if self.baseline == "none":
            return difference * losses
        estimate = difference * (losses - self.current_baseline(logits.shape[-1]).to(losses))
        self.update(difference, losses)
        return estimate

    def current_baseline(self, units: int) -> Float[Tensor, "..."]:
        """Return L̄, of shape (N,) or (1,); zero before the first batch."""
        size = units if self.baseline == "per_unit" else 1
        if self.numerator.numel() == 0:
            self.numerator = self.numerator.new_zeros(size)
            self.denominator = self.denominator.new_zeros(size)
        if self.numerator.numel() != size:
            raise ValueError(
                f"estimator: this ScoreFunction keeps a baseline for {self.numerator.numel()} units and was called "
                f"with {size}; give each layer an instance of its own"
            )
        return torch.where(self.denominator > 0, self.numerator / self.denominator, 0.0)

    def update(self, difference: Float[Tensor, "*lead N"], losses: Float[Tensor, "*lead 1"]) -> None:
        """Take a batch into the two moving averages, that of all processes under torch.distributed.

        A loss that is not finite (a step that gradient scaling will skip) is left out, or it would stay in the average.
        """
        losses = losses.reshape(1, -1)
        finite = losses.isfinite()
        weight = (
            difference.reshape(losses.numel(), difference.shape[-1]).square()
            if self.baseline == "per_unit"
            else losses.new_ones(1)
        )
        weight = weight.expand(losses.numel(), -1)
        both = torch.cat([torch.where(finite, losses, 0.0), finite.to(losses.dtype)])
        means = mean_of_sums(both @ weight, losses.numel())
        if means is not None:
            if not torch.compiler.is_compiling():  # a tensor of torch.func.grad must not outlive it
                while torch._C._functorch.is_gradtrackingtensor(means):
                    means = torch._C._functorch.get_unwrapped(means)
            numerator, denominator = means.to(self.numerator)
            self.numerator = torch.lerp(numerator, self.numerator, self.decay)
            self.denominator = torch.lerp(denominator, self.denominator, self.decay)

    def _apply(self, fn: Any, recurse: bool = True) -> "ScoreFunction":
        super()._apply(fn, recurse)
        self.numerator, self.denominator = fn(self.numerator), fn(self.denominator)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "numerator"], destination[prefix + "denominator"] = self.numerator, self.denominator

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        names = ("numerator", "denominator")
        own = {name: state_dict.get(prefix + name) for name in names}
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        for name, value in own.items():
            if value is None:
                missing.extend([prefix + name] if strict else [])
            else:
                setattr(self, name, value.detach().to(getattr(self, name)).clone())
