"""What relaxed units share: a temperature, the relaxation itself, and the noise given its outcome."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_positive, is_transformed
from gatelet.estimators._base import Kind


def keep(module: nn.Module, value: float | Tensor, name: str = "temperature", positive: bool = True) -> None:
    """Store a number on the module: a float as it is, a tensor as a buffer, an ``nn.Parameter`` to be learned.

    Raises:
        ValueError: for a number that is not above 0 (unless ``positive`` is False), a tensor that is not a floating
            scalar, or one that requires a gradient and is no ``nn.Parameter``: its gradient would be lost.
    """
    if not isinstance(value, Tensor):
        setattr(module, name, check_positive(value, name) if positive else float(value))
        return
    if value.dim() or not value.is_floating_point():
        raise ValueError(f"{name} must be a floating scalar, not a tensor of shape {tuple(value.shape)}, {value.dtype}")
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif value.requires_grad:
        raise ValueError(f"{name} requires a gradient: pass an nn.Parameter, which the module can own")
    else:
        module.register_buffer(name, value.clone())
    if positive:
        _check_above_zero(value, name)


def _check_above_zero(value: Tensor, name: str) -> None:
    # As for the logits: the value is looked at where that is free of a synchronisation.
    if value.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed(value):
        return
    check_positive(value.item(), name)


def at(value: float | Tensor, dtype: torch.dtype, name: str = "temperature") -> float | Tensor:
    """Return a temperature in this dtype, after the check that learning has not moved it to 0 or below."""
    if isinstance(value, Tensor):
        _check_above_zero(value, name)
        return value.to(dtype)
    return value


def relax(z: Float[Tensor, "*lead N"], temperature: float | Tensor, kind: Kind) -> Float[Tensor, "*lead N"]:
    """Return σ(z/τ), or softmax(z/τ): the relaxed gates of perturbed logits z."""
    # Contiguous: the vectorised sigmoid and the plain one, which strides choose between, differ in the last bit.
    scaled = z.contiguous() / at(temperature, z.dtype)
    return scaled.sigmoid() if kind == "bernoulli" else scaled.softmax(-1)


def harden(z: Float[Tensor, "*lead N"], kind: Kind) -> Float[Tensor, "*lead N"]:
    """Return 1[z > 0], or one-hot argmax(z), without gradient: the gates of perturbed logits z."""
    if kind == "bernoulli":
        return (z.detach() > 0).to(z.dtype)
    return torch.zeros_like(z).scatter(-1, z.detach().argmax(-1, keepdim=True), 1.0)


def condition(
    logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "*lead N"], noise: Float[Tensor, "*more N"], kind: Kind
) -> Float[Tensor, "*more N"]:
    """Return perturbed logits z̃ drawn from their law given the gates, differentiable in the logits.

    Bernoulli, λ logistic: z̃ = ±log(1 + e^λ (1 + e^{±a})), + where h = 1 (Tucker et al. 2017, appendix C).
    Categorical, g Gumbel, i the open class: z̃_i = g_i + log Σ e^a, z̃_j = −log(e^{−(a_j + g_j)} + e^{−z̃_i}).
    """
    if kind == "bernoulli":
        sign = 2 * gates - 1
        return sign * softplus(noise + softplus(sign * logits))
    top = (noise * gates).sum(-1, keepdim=True) + logits.logsumexp(-1, keepdim=True)
    return torch.where(gates > 0, top, -torch.logaddexp(-(noise + logits), -top))


def softplus(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Return log(1 + e^x) to the last digit; PyTorch's becomes the identity above 20, an error of 2e-9."""
    return torch.logaddexp(x, torch.zeros_like(x))
