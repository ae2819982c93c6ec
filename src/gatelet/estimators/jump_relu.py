"""The rectifier with a learned threshold, and how often it is open, as functions and as an estimator."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_positive
from gatelet.estimators._base import Estimator
from gatelet.estimators._noise import NONE


class JumpReLU(Estimator):
    """Rectifier that opens above a learned threshold θ, whose pseudo-derivative is a kernel estimate.

    h = a·1[a > θ]; ∂h/∂a = 1[a > θ]; ∂h/∂θ ≈ −(θ/ε)·K((a − θ)/ε), K(u) = 1[|u| ≤ ½]. The penalty
    Σ 1[a > θ], the L0 norm, is ``fire_probability(a).sum()``: ∂1[a > θ]/∂θ ≈ −(1/ε)·K((a − θ)/ε), and none for a.

    θ is kept as its logarithm, so that it stays above 0.

    Bias: none for a, wherever h has a derivative (unbiased, as the rectifier). For θ, over the law of a: the estimate
    is −(θ/ε)·E[L′(h)·1[|a − θ| ≤ ε/2]], which tends to −θ·½(L′(0) + L′(θ))·f(θ), f the density of a, as ε → 0. That is
    ∂E[L]/∂θ = −(L(θ) − L(0))·f(θ) for a loss quadratic in h; the error is that of the trapezoid rule otherwise.
    Variance: for a none. For θ it grows as 1/ε: only logits within ε/2 of the threshold contribute.

    Args:
        threshold: θ at the start: a number for all units, or a tensor (N,), one per unit. (The source: 0.001.)
        bandwidth: ε, in the logits' unit. (The source: 0.001, for inputs of mean square 1.)

    Raises:
        ValueError: for a threshold or bandwidth that is not above 0.

    >>> import torch
    >>> unit = JumpReLU(threshold=1.0, bandwidth=0.5)
    >>> a = torch.tensor([0.9, 1.1, 3.0], requires_grad=True)
    >>> h = unit(a, torch.zeros(3))
    >>> h.detach()
    tensor([0.0000, 1.1000, 3.0000])
    >>> h.sum().backward()
    >>> a.grad, unit.log_threshold.grad                               # −θ·(1 + 1)/0.5, times θ for the logarithm
    (tensor([0., 1., 1.]), tensor(-4.))

    Reference: S. Rajamanoharan, T. Lieberum, N. Sonnerat, A. Conmy, V. Varma, J. Kramár, N. Nanda, "Jumping Ahead:
    Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", 2024, arXiv:2407.14435.
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    law = NONE
    rated = False
    reference = "Rajamanoharan, Lieberum, Sonnerat, Conmy, Varma, Kramár, Nanda 2024, arXiv:2407.14435"

    def __init__(self, threshold: float | Tensor = 0.001, bandwidth: float = 0.001) -> None:
        super().__init__()
        if isinstance(threshold, Tensor):
            above = threshold.is_meta or bool((threshold > 0).all())
            if threshold.dim() > 1 or not threshold.is_floating_point() or not above:
                raise ValueError("threshold must be a number above 0, or a floating tensor (N,) of such numbers")
            start = threshold.detach().clone()
        else:
            start = torch.tensor(check_positive(threshold, "threshold"))
        self.log_threshold = nn.Parameter(start.log())
        self.bandwidth = check_positive(bandwidth, "bandwidth")

    @property
    def theta(self) -> Tensor:
        """θ, differentiable in ``log_threshold``."""
        return self.log_threshold.exp()

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return a·1[a > θ]."""
        return jump_relu(logits, self.theta, self.bandwidth)

    def deterministic(self, logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*lead N"]:
        """Return a·1[a > θ]: the learned threshold is the one of the test time too."""
        return jump_relu(logits, self.theta, self.bandwidth)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return 1[a > θ], with the pseudo-derivative for θ; its derivative in a is zero."""
        return jump_step(logits, self.theta, self.bandwidth)

    def logit_at(self, probability: float) -> float:
        """Return the mean θ, about where units open."""
        return float(self.theta.detach().mean())

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return a."""
        return logits


def jump_relu(
    logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, "..."], bandwidth: float
) -> Float[Tensor, "*lead N"]:
    """Return a·1[a > θ], differentiable in a, and in θ by the kernel estimate.

    Of the size of ``logits``, forward holds its result and one mask of bytes, backward the logits and two more.

    Args:
        logits: a (..., N).
        threshold: θ, a scalar or (N,), of any floating dtype.
        bandwidth: ε.

    >>> import torch
    >>> jump_relu(torch.tensor([0.5, 2.0]), torch.tensor(1.0), 0.1)
    tensor([0., 2.])
    """
    result: Tensor = _JumpReLU.apply(logits, threshold, bandwidth)
    return result


def jump_step(
    logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, "..."], bandwidth: float
) -> Float[Tensor, "*lead N"]:
    """Return 1[a > θ], with the kernel estimate of its derivative in θ and none in a.

    >>> import torch
    >>> jump_step(torch.tensor([0.5, 2.0]), torch.tensor(1.0), 0.1)
    tensor([0., 1.])
    """
    result: Tensor = _JumpStep.apply(logits, threshold, bandwidth)
    return result


def jump_count(
    logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, "..."], bandwidth: float
) -> Float[Tensor, "*lead"]:
    """Return how many units are open, Σ 1[a > θ], the L0 norm of each example; its derivatives as :func:`jump_step`'s.

    No floating tensor of the logits' size is made, forward or backward, only masks of bytes.

    >>> import torch
    >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> count = jump_count(torch.tensor([[0.5, 1.01], [0.5, 2.0]]), theta, 0.1)
    >>> count.detach()
    tensor([1., 1.])
    >>> count.sum().backward()
    >>> theta.grad                                                    # one logit within ε/2 of θ, −1/ε
    tensor([ -0., -10.])
    """
    result: Tensor = _JumpCount.apply(logits, threshold, bandwidth)
    return result


def near_threshold(logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, "..."], bandwidth: float) -> Tensor:
    """Return K((a − θ)/ε) = 1[|a − θ| ≤ ε/2], booleans: where the threshold's pseudo-derivative is not zero."""
    theta = threshold.to(logits.dtype)
    return (logits >= theta - bandwidth / 2) & (logits <= theta + bandwidth / 2)


class _JumpReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return torch.where(logits > threshold.to(logits.dtype), logits, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.bandwidth = inputs[2]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        logits, threshold = ctx.saved_tensors
        for_logits = for_threshold = None
        if ctx.needs_input_grad[0]:
            for_logits = torch.where(logits > threshold.to(logits.dtype), slope, 0.0)
        if ctx.needs_input_grad[1]:
            for_threshold = _for_threshold(slope, logits, threshold, ctx.bandwidth) * threshold
        return for_logits, for_threshold, None


class _JumpStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return (logits > threshold.to(logits.dtype)).to(logits.dtype)

    setup_context = staticmethod(_JumpReLU.setup_context)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None]:
        logits, threshold = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        return (
            torch.zeros_like(logits),
            _for_threshold(slope, logits, threshold, ctx.bandwidth) if wanted else None,
            None,
        )


class _JumpCount(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return (logits > threshold.to(logits.dtype)).sum(-1).to(logits.dtype)

    setup_context = staticmethod(_JumpReLU.setup_context)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor | None, None]:
        logits, threshold = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        return None, _for_threshold(slope.unsqueeze(-1), logits, threshold, ctx.bandwidth), None


def _for_threshold(slope: Tensor, logits: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return −(1/ε)·Σ slope·K((a − θ)/ε), of the threshold's shape."""
    heard = torch.where(near_threshold(logits, threshold, bandwidth), slope, 0.0)
    total = heard.sum_to_size(threshold.shape) if threshold.dim() else heard.sum()
    return (total / -bandwidth).to(threshold.dtype)
