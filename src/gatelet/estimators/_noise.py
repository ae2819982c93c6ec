"""The laws of the noise that estimators draw: how to sample them, and what exact sums over them need."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import at_hand


@dataclass(frozen=True)
class Noise:
    """A law of one noise variable per unit.

    Attributes:
        low, high: its range; it leaves out a mass under the rounding of float64.
        long_tails: whether its density falls off only exponentially, so that quadrature stretches its nodes.
        atoms: its equally probable values, if it has no density.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    long_tails: bool = False
    atoms: tuple[float, ...] = ()

    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
        """Draw noise of this shape, in at least float32, on the device of ``like``."""
        raise NotImplementedError(f"the law {self.name!r} has no sampler: a subclass must define one")

    def density(self, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return the density at z."""
        raise NotImplementedError(f"the law {self.name!r} cannot be integrated unit by unit")

    def cdf(self, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return the mass below z."""
        raise NotImplementedError(f"the law {self.name!r} cannot be integrated unit by unit")

    def __repr__(self) -> str:
        """Show the name."""
        return self.name


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which probabilities and noise are compared: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def below(noise: Float[Tensor, "*s"], bound: Float[Tensor, "*s"], dtype: torch.dtype) -> Float[Tensor, "*s"]:
    """Return 1[noise < bound] as numbers, without gradient."""
    noise, bound = noise.detach(), bound.detach()
    alike = noise.shape == bound.shape and noise.dtype == bound.dtype and type(noise) is type(bound) is Tensor
    if alike and at_hand(noise) and at_hand(bound):  # without a boolean tensor: the same numbers, six times faster
        return torch.lt(noise, bound, out=torch.empty_like(noise)).to(dtype)
    return (noise < bound).to(dtype)


def given(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the argument if there is one. (With ``generator=None`` torch.compile cannot trace batches of any size.)"""
    return {} if generator is None else {"generator": generator}


def uniform(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Float[Tensor, "..."]:
    """Draw uniform numbers in at least float32."""
    return torch.rand(shape, dtype=wide(like), device=like.device, **given(generator))


class _None(Noise):
    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return like.new_zeros(()).expand(shape)


class _Uniform(Noise):
    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return uniform(shape, like, generator)

    def density(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def cdf(self, z: Tensor) -> Tensor:
        return z.clone()


class _Gaussian(Noise):
    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(shape, dtype=wide(like), device=like.device, **given(generator))

    def density(self, z: Tensor) -> Tensor:
        return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)

    def cdf(self, z: Tensor) -> Tensor:
        below: Tensor = torch.special.ndtr(z)
        return below


class _Logistic(Noise):
    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = uniform(shape, like, generator)
        return u.logit(eps=torch.finfo(u.dtype).tiny)

    def density(self, z: Tensor) -> Tensor:
        return z.sigmoid() * (-z).sigmoid()

    def cdf(self, z: Tensor) -> Tensor:
        return z.sigmoid()


class _Gumbel(Noise):
    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = uniform(shape, like, generator)
        tiny = torch.finfo(u.dtype).tiny
        return -(-u.clamp_min(tiny).log()).clamp_min(tiny).log()


class _Sign(Noise):
    def sample(self, shape: torch.Size, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = uniform(shape, like, generator)
        return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)


NONE = _None("none")
UNIFORM = _Uniform("uniform", 0.0, 1.0)
# The ranges leave out a mass of 2e-19 (Gaussian) and 2e-17 (logistic).
GAUSSIAN = _Gaussian("gaussian", -9.0, 9.0)
LOGISTIC = _Logistic("logistic", -39.0, 39.0, long_tails=True)
GUMBEL = _Gumbel("gumbel")
SIGN = _Sign("sign", atoms=(-1.0, 1.0))
