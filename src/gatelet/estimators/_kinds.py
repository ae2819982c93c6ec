"""The kinds of unit: independent gates, one-hot classes, exactly k of N. Each answers what the methods need to know."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatelet._checks import check_choice, check_count
from gatelet.estimators import _subset
from gatelet.estimators._noise import GUMBEL, LOGISTIC, NONE, Noise, below

KindName = Literal["bernoulli", "categorical", "subset"]


Parts = tuple[tuple[float, Tensor], ...]


class Kind:
    """What a unit can be, and how probable. A gate's mean is its probability, so ∂log P(h)/∂a = h − ``probability``.

    Attributes:
        name: as the argument ``kind`` has it.
        event_dims: how many of the logits' last dimensions one loss spans: units, or variables and classes.
        rated: whether the share of open gates is a matter of the logits.
    """

    name: ClassVar[str]
    event_dims: ClassVar[int] = 1
    rated: ClassVar[bool] = True

    def noise(self, law: Noise) -> Noise:
        """Return the law that takes the place of this one of a Bernoulli unit."""
        return law

    def probability(self, logits: Tensor) -> Tensor:
        """Return P(h = 1) of every gate, differentiable in the logits."""
        raise NotImplementedError

    def sample(self, logits: Tensor, noise: Tensor, probability: Tensor | None = None) -> Tensor:
        """Return gates of 0 and 1 from noise of the law ``noise(UNIFORM)``; they carry no gradient.

        ``probability``, if it is known already, spares computing it.
        """
        raise NotImplementedError

    def harden(self, z: Tensor) -> Tensor:
        """Return the gates of perturbed logits, a + noise of the law ``noise(LOGISTIC)``, without gradient."""
        raise NotImplementedError

    def threshold(self, logits: Tensor) -> Tensor:
        """Return the most probable gates, without gradient."""
        return self.harden(logits)

    def relax(self, z: Tensor, temperature: float | Tensor) -> Tensor:
        """Return the relaxed gates of perturbed logits."""
        raise NotImplementedError

    def condition(self, logits: Tensor, gates: Tensor, noise: Tensor) -> Tensor:
        """Return perturbed logits drawn from their law given the gates, differentiable in the logits."""
        raise NotImplementedError(f"kind: perturbed logits given the gates are not known for {self.name} units")

    def log_probability(self, logits: Tensor, gates: Tensor) -> Tensor:
        """Return log P(h) of each example's gates together, differentiable in the logits."""
        raise NotImplementedError

    def count(self, shape: torch.Size) -> int:
        """Return how many outcomes the gates of logits (..., N) or (..., N, C) have."""
        raise NotImplementedError

    def describe(self, shape: torch.Size) -> str:
        """Return how many outcomes there are, and of what, in words."""
        values = 2 if self.event_dims == 1 else shape[-1]
        return f"{shape[-self.event_dims]} units have {values}^{shape[-self.event_dims]}"

    def outcomes(self, shape: torch.Size, index: Tensor) -> Tensor:
        """Return the outcomes of these numbers, (Q, 1, ..., N[, C]), as ``torch.get_default_dtype()``."""
        raise NotImplementedError

    def variables(self, shape: torch.Size) -> int:
        """Return how many of an example's variables are independent of each other."""
        return shape[-self.event_dims]

    def values(self, shape: torch.Size) -> int:
        """Return how many values such a variable has."""
        return shape[-1] if self.event_dims == 2 else 2

    def nodes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise (M, *lead, V, ...) that stands for each outcome of a variable, and its mass (M, *lead, V)."""
        raise NotImplementedError

    def spread(self, values: Float[Tensor, "*batch"]) -> Tensor:
        """Return one value per example with dimensions of 1 for its gates."""
        return values.reshape(*values.shape, *(1,) * self.event_dims)

    def linear(self, logits: Tensor, jacobians: Parts = (), outers: Parts = ()) -> Tensor:
        """Return Σ w·J(p)·a over (w, p) of ``jacobians`` plus Σ w·vvᵀa over (w, v) of ``outers``: linear in a.

        J(p) is the derivative that ``probability`` has where it is p.
        """
        raise NotImplementedError(f"kind: {self.name} units have no such form")

    def second_order(self, logits: Tensor, gates: Tensor, probability: Tensor) -> Tensor:
        """Return ½(J(p) + (h − p)(h − p)ᵀ)·a, linear in a: the trapezoid rule between any two outcomes."""
        return self.linear(logits, ((0.5, probability),), ((0.5, gates - probability),))


@dataclass(frozen=True)
class Bernoulli(Kind):
    """Gates that open by themselves, each with probability σ(a)."""

    name: ClassVar[str] = "bernoulli"

    def probability(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def sample(self, logits: Tensor, noise: Tensor, probability: Tensor | None = None) -> Tensor:
        """Return 1[u < σ(a)]. (The paper's eq. 3 prints 1[z > σ(a)], which would fire with 1 − σ(a).)"""
        p = logits.detach().to(noise.dtype).sigmoid() if probability is None else probability
        return below(noise, p, logits.dtype)

    def harden(self, z: Tensor) -> Tensor:
        return below(torch.zeros_like(z), z, z.dtype)

    def relax(self, z: Tensor, temperature: float | Tensor) -> Tensor:
        # Contiguous: the vectorised sigmoid and the plain one, which strides choose between, differ in the last bit.
        return (z.contiguous() / temperature).sigmoid()

    def condition(self, logits: Tensor, gates: Tensor, noise: Tensor) -> Tensor:
        """Return z̃ = ±log(1 + e^λ (1 + e^{±a})), + where h = 1, λ logistic (Tucker et al. 2017, appendix C)."""
        sign = 2 * gates - 1
        return sign * softplus(noise + softplus(sign * logits))

    def log_probability(self, logits: Tensor, gates: Tensor) -> Tensor:
        return torch.where(gates > 0, F.logsigmoid(logits), F.logsigmoid(-logits)).sum(-1)

    def count(self, shape: torch.Size) -> int:
        return int(2 ** shape[-1])

    def outcomes(self, shape: torch.Size, index: Tensor) -> Tensor:
        digits = index[:, None] // 2 ** torch.arange(shape[-1], device=index.device) % 2
        return digits.reshape(len(index), *(1,) * (len(shape) - 1), shape[-1])

    def linear(self, logits: Tensor, jacobians: Parts = (), outers: Parts = ()) -> Tensor:
        slopes = [weight * (p - p * p) for weight, p in jacobians] + [weight * v * v for weight, v in outers]
        return logits * sum(slopes[1:], start=slopes[0])

    def second_order(self, logits: Tensor, gates: Tensor, probability: Tensor) -> Tensor:
        """Return ½|h − p|·a, which is the same for gates of 0 and 1."""
        return logits * ((gates - probability).abs() / 2)


@dataclass(frozen=True)
class Categorical(Kind):
    """Variables of C classes: logits (..., V, C), gates one-hot with probability softmax(a)."""

    name: ClassVar[str] = "categorical"
    event_dims: ClassVar[int] = 2
    rated: ClassVar[bool] = False

    def noise(self, law: Noise) -> Noise:
        return NONE if law is NONE else GUMBEL

    def probability(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def sample(self, logits: Tensor, noise: Tensor, probability: Tensor | None = None) -> Tensor:
        """Return one-hot argmax(a + g)."""
        return one_hot((logits.detach().to(noise.dtype) + noise).argmax(-1), logits)

    def harden(self, z: Tensor) -> Tensor:
        return one_hot(z.detach().argmax(-1), z)

    def relax(self, z: Tensor, temperature: float | Tensor) -> Tensor:
        return (z.contiguous() / temperature).softmax(-1)

    def condition(self, logits: Tensor, gates: Tensor, noise: Tensor) -> Tensor:
        """Return, i the open class, z̃_i = g_i + log Σ e^a, z̃_j = −log(e^{−(a_j + g_j)} + e^{−z̃_i})."""
        top = (noise * gates).sum(-1, keepdim=True) + logits.logsumexp(-1, keepdim=True)
        return torch.where(gates > 0, top, -torch.logaddexp(-(noise + logits), -top))

    def log_probability(self, logits: Tensor, gates: Tensor) -> Tensor:
        return (gates * logits.log_softmax(-1)).sum((-1, -2))

    def count(self, shape: torch.Size) -> int:
        return int(shape[-1] ** shape[-2])

    def outcomes(self, shape: torch.Size, index: Tensor) -> Tensor:
        units, classes = shape[-2:]
        digits = index[:, None] // classes ** torch.arange(units, device=index.device) % classes
        return F.one_hot(digits, classes).reshape(len(index), *(1,) * (len(shape) - 2), units, classes)

    def nodes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        # Any Gumbel noise under which class c wins stands for all of it.
        wins = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        wins = wins.reshape(-1, *(1,) * (logits.dim() - 1), logits.shape[-1])
        return wins - logits, logits.softmax(-1).movedim(-1, 0)

    def linear(self, logits: Tensor, jacobians: Parts = (), outers: Parts = ()) -> Tensor:
        terms = [weight * p * (logits - (p * logits).sum(-1, keepdim=True)) for weight, p in jacobians]
        terms += [weight * v * (v * logits).sum(-1, keepdim=True) for weight, v in outers]
        return sum(terms[1:], start=terms[0])


@dataclass(frozen=True)
class Subset(Kind):
    """Exactly k of an example's N gates: Bernoulli units given that their sum is k, P(h) ∝ exp(Σ a_i h_i).

    Sampled from that law (uniform noise), or, by methods that perturb the logits, as the k largest a + Gumbel noise,
    whose law is another for k > 1 (that of drawing k times without replacement).
    """

    k: int
    name: ClassVar[str] = "subset"
    rated: ClassVar[bool] = False

    def noise(self, law: Noise) -> Noise:
        return GUMBEL if law is LOGISTIC else law

    def probability(self, logits: Tensor) -> Tensor:
        """Return the marginals P(h_i = 1), which sum to k."""
        return _subset.marginals(self._checked(logits), self.k)

    def sample(self, logits: Tensor, noise: Tensor, probability: Tensor | None = None) -> Tensor:
        return _subset.sample(self._checked(logits).detach().to(noise.dtype), noise, self.k).to(logits.dtype)

    def harden(self, z: Tensor) -> Tensor:
        index = self._checked(z).detach().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter(-1, index, 1.0)

    def relax(self, z: Tensor, temperature: float | Tensor) -> Tensor:
        """Return Σ of k softmaxes, each without what the earlier ones took (Xie, Ermon 2019, arXiv:1901.10517)."""
        return _subset.relax(self._checked(z).contiguous(), self.k, temperature)

    def log_probability(self, logits: Tensor, gates: Tensor) -> Tensor:
        return (gates * logits).sum(-1) - _subset.log_normaliser(self._checked(logits), self.k)

    def count(self, shape: torch.Size) -> int:
        return math.comb(shape[-1], self.k)

    def describe(self, shape: torch.Size) -> str:
        return f"the choices of {self.k} of {shape[-1]} units are {self.count(shape)}"

    def outcomes(self, shape: torch.Size, index: Tensor) -> Tensor:
        chosen = torch.tensor(list(itertools.combinations(range(shape[-1]), self.k)), device=index.device)[index]
        gates = torch.zeros(len(index), shape[-1], device=index.device).scatter(-1, chosen, 1.0)
        return gates.reshape(len(index), *(1,) * (len(shape) - 1), shape[-1])

    def variables(self, shape: torch.Size) -> int:
        return 1

    def values(self, shape: torch.Size) -> int:
        return self.count(shape)

    def nodes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.arange(self.count(logits.shape), device=logits.device)
        gates = self.outcomes(logits.shape, every).to(logits.dtype).expand(-1, *logits.shape)
        noise = _subset.noise_for(logits, gates, self.k)
        return noise.unsqueeze(-2), self.log_probability(logits, gates).exp().unsqueeze(-1)

    def _checked(self, logits: Tensor) -> Tensor:
        if self.k > logits.shape[-1]:
            raise ValueError(f"logits: k = {self.k} gates shall be open, but there are {logits.shape[-1]}")
        return logits


_KINDS: dict[str, Callable[[], Kind]] = {"bernoulli": Bernoulli, "categorical": Categorical}


def make_kind(kind: "KindName | Kind", k: int | None = None) -> Kind:
    """Return the kind of this name, or the kind itself.

    Raises:
        ValueError: for an unknown name, a ``k`` without subset units, or subset units without it.
    """
    if not isinstance(kind, Kind):
        check_choice(kind, (*_KINDS, "subset"), "kind")
        if kind == "subset":
            if k is None:
                raise ValueError("k: subset units need it, the number of gates that are open")
            return Subset(check_count(k, "k"))
    if k is not None and getattr(kind, "k", None) != k:
        raise ValueError(f"k: is for kind='subset', not {getattr(kind, 'name', kind)!r}")
    return kind if isinstance(kind, Kind) else _KINDS[kind]()


def one_hot(index: Tensor, like: Float[Tensor, "*lead C"]) -> Float[Tensor, "*lead C"]:
    """Return one-hot vectors in the classes of ``like``."""
    return torch.zeros_like(like).scatter(-1, index.unsqueeze(-1), 1.0)


def softplus(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Return log(1 + e^x) to the last digit; PyTorch's becomes the identity above 20, an error of 2e-9."""
    return torch.logaddexp(x, torch.zeros_like(x))
