"""The contract of an estimator, and the two families' bases.

An estimator says two things: which gates a unit sends up (:meth:`Estimator.forward`) and which gradient comes
down to the logits. By what it ``needs`` for the second there are three kinds:

``"path"``
    The gates are differentiable (with whatever derivative the estimator declares); plain back-propagation
    does the rest.
``"loss"``
    The gates carry no gradient (:class:`Sampled`). The estimate is :meth:`Estimator.coefficients`, a function of
    logits, gates and each example's loss.
``"objective"``
    The estimate evaluates the objective at several gates (:class:`Evaluating`).

The noise is always an argument, so that a test can replace drawing by enumeration.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import at_hand
from gatelet.estimators._kinds import Kind, KindName, make_kind
from gatelet.estimators._noise import UNIFORM, Noise, wide

Objective = Callable[[Tensor], Tensor]
"""Maps gates (K, B, N) to a loss per replica and example (K, B)."""

AnyKind = KindName | Kind
Support = Literal["none", "open", "sampled", "all"]


class Estimator(nn.Module):
    """How a gradient crosses a discrete, stochastic or hard unit. Subclasses are the methods.

    Class attributes: ``unbiased`` (the expected gradient is the gradient of the expected loss), ``needs``
    (``"path"``, ``"loss"`` or ``"objective"``, see the module), ``support`` (which gates need ∂L/∂h:
    ``"none"``, the ``"open"`` ones, ``"sampled"`` ones too, which :meth:`computed` names, ``"all"``; a closed unit
    outside of it may be skipped in training), ``reference`` (the source).
    """

    unbiased: ClassVar[bool]
    needs: ClassVar[Literal["path", "loss", "objective"]]
    reference: ClassVar[str]
    support: ClassVar[Support] = "all"
    binary: ClassVar[bool] = True
    """Whether the gates are 0 or 1, so that the expected loss is a sum over their outcomes."""
    kinds: ClassVar[tuple[KindName, ...]] = ("bernoulli",)
    """What units there is a form for (:mod:`gatelet.estimators._kinds`)."""
    law: Noise = UNIFORM
    """The law of the noise. A class gives the law for a Bernoulli unit, and ``kind.noise`` translates it."""
    more: tuple[Noise, ...] = ()
    """Laws of further noise per unit; the noise then has a last dimension (K, B, N, 1 + more), first of it ``law``."""
    replicas: ClassVar[int] = 1
    """The least number of replicas; a number of samples is a multiple of it where ``antithetic``."""
    antithetic: ClassVar[bool] = False
    """Whether replicas come in pairs that share their noise, which then has half as many rows."""
    several_layers: ClassVar[bool] = True
    """Whether the estimate stays right where the logits of one stochastic layer depend on another's gates."""
    rated: bool = True
    """Whether a share of open gates can be held and a threshold found; not if the estimator fixes how many open."""

    def __init__(self, kind: AnyKind = "bernoulli", k: int | None = None) -> None:
        super().__init__()
        self.form = make_kind(kind, k)
        self.kind = self.form.name
        self.k: Any = getattr(self.form, "k", None)
        if self.kind not in self.kinds:
            raise ValueError(f"kind: {type(self).__name__} has no {self.kind} form")
        self.law = self.form.noise(self.law)
        self.more = tuple(self.form.noise(law) for law in self.more)
        self.rated = self.rated and self.form.rated

    # ---------------------------------------------------------------- what an estimator defines

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "*lead N"]:
        """Return the gates for this noise; differentiable in the logits iff ``needs == "path"``."""
        raise NotImplementedError

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return each replica's estimate of ∂E[L]/∂logits from the losses (estimators that need the loss)."""
        raise NotImplementedError(f"{type(self).__name__} has no coefficients: it needs the {self.needs}")

    def computed(self, noise: Float[Tensor, "..."]) -> Tensor:
        """Return which closed gates need ∂L/∂h (estimators whose support is ``"sampled"``)."""
        raise NotImplementedError(f"{type(self).__name__} samples no closed units: its support is {self.support!r}")

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return P(h ≠ 0), differentiable in the logits."""
        return self.probability(logits)

    def logit_at(self, probability: float) -> float:
        """Return the logit at which a gate fires with this probability (inverse of ``fire_probability``)."""
        return math.log(probability) - math.log1p(-probability)

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the value of an open gate in deterministic mode."""
        return torch.ones_like(logits)

    # ---------------------------------------------------------------- what all estimators share

    @property
    def event_dims(self) -> int:
        """How many of the logits' last dimensions one loss spans: units, or variables and classes."""
        return self.form.event_dims

    def probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return P(h = 1) of the units' kind: σ(a), softmax(a), or the marginals of k open gates."""
        return self.form.probability(logits)

    def sample(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return gates of 0 and 1 from this noise: 1[u < σ(a)], one-hot argmax(a + g), or k ones. No gradient."""
        return self.form.sample(logits, noise)

    def threshold(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the most probable gates, without gradient."""
        return self.form.threshold(logits)

    def noise_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the noise for replicated logits of this shape (K, *lead, N)."""
        if not (self.antithetic or self.more):
            return shape
        rows = shape[0] // 2 if self.antithetic else shape[0]
        extra = (1 + len(self.more),) if self.more else ()
        return torch.Size((rows, *shape[1:], *extra))

    def draw_noise(
        self, logits: Float[Tensor, "*lead N"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """Draw the units' noise for replicated logits (K, *lead, N), from ``generator`` or torch's global one.

        Methods with a path need no replicas: their logits may be any (*lead, N).


        Half-precision logits get float32 noise: a uniform number in bfloat16 has 8 bits, which would make
        a unit at p = 0.1 fire visibly too often or too seldom.
        """
        shape = self.noise_shape(logits.shape)
        if not self.more:
            return self.law.sample(shape, logits, generator)
        return torch.stack([law.sample(shape[:-1], logits, generator) for law in (self.law, *self.more)], -1)

    def deterministic(self, logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*lead N"]:
        """Return the test-time gates: open, at :meth:`open_value`, iff the logit exceeds ``threshold``.

        The firing probability of every unit grows with its logit, so this is the paper's rule (A.3) with
        the threshold expressed as a logit, where saturated probabilities can still be told apart. Where the kind
        settles how many open (one class, k of N), the most probable gates are.
        """
        if not self.form.rated:
            return self.threshold(logits)
        binary = type(self).open_value is Estimator.open_value  # ones: the comparison is the gate
        if binary and at_hand(logits) and logits.dtype == threshold.dtype:
            # The same numbers ten times faster: a plain number to compare with, and no booleans on the way.
            return torch.gt(logits.detach(), threshold.item(), out=torch.empty_like(logits.detach()))
        is_open = logits.to(wide(logits)) > threshold
        if binary:
            return is_open.to(logits.dtype)
        return torch.where(is_open, self.open_value(logits), torch.zeros_like(logits))

    def settles(self) -> bool:
        """Whether the test-time gates of :meth:`deterministic` are the comparison with the threshold and no more."""
        own = type(self)
        compares = own.deterministic is Estimator.deterministic and own.open_value is Estimator.open_value
        return compares and self.form.rated

    def surrogate(
        self,
        objective: Objective,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "*batch"]:
        """Return the mean loss over the replicas, with this estimator's gradient for the logits."""
        replicas, gates, losses = self.begin(objective, logits, noise)
        if self.needs == "loss":
            losses = losses + self.signal(replicas, gates, losses, noise)
        return losses.squeeze(0) if len(losses) == 1 else losses.mean(0)

    def begin(
        self, objective: Objective, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "K *lead N"], Float[Tensor, "K *lead N"], Float[Tensor, "K *batch"]]:
        """Return the replicated logits, the gates for this noise, and the objective's losses at them."""
        replicas = self.replicate(logits, noise)
        gates = self(replicas, noise)
        return replicas, gates, evaluate(objective, gates, self.event_dims, differentiable=self.needs == "path")

    def replicate(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "K *lead N"]:
        """Return the logits once per replica of this noise."""
        samples = noise.shape[0] * (2 if self.antithetic else 1)
        # One replica by unsqueeze: the backward of an expand sums, even over a single row.
        return logits.unsqueeze(0) if samples == 1 else logits.expand(samples, *logits.shape)

    def signal(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *rest"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *rest"]:
        """Return a zero whose gradient to the logits is :meth:`coefficients`.

        ``losses`` may lack trailing dimensions of ``logits.shape[:-1]``: units that act several times for
        one loss (the tokens of a sequence, the steps of an episode) all receive that loss (Theorem 1).
        """
        with torch.no_grad():
            full = losses.reshape(losses.shape + (1,) * (logits.dim() - 1 - losses.dim()))
            value = self.coefficients(logits, gates, full.expand(logits.shape[:-1]).to(wide(logits)), noise)
        return carry(value, logits, losses)


class Sampled(Estimator):
    """A family: the units send sampled gates up, and their gradient is a function of each example's loss."""

    needs: ClassVar[Literal["path", "loss", "objective"]] = "loss"
    support = "none"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "*lead N"]:
        """Return the sample; it carries no gradient."""
        return self.sample(logits, noise)

    def score(
        self, logits: Float[Tensor, "K *lead N"], gates: Float[Tensor, "K *lead N"], losses: Float[Tensor, "K *lead"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return ∂log P(h)/∂a = h − P(h = 1), in the losses' dtype."""
        return gates.to(losses.dtype) - self.probability(logits.to(losses.dtype))


class Evaluating(Sampled):
    """A family: methods that evaluate the objective several times, at gates of their own choosing."""

    needs = "objective"
    several_layers = False

    def surrogate(
        self, objective: Objective, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "*batch"]:
        """Return the mean loss over the replicas, with this estimator's gradient for the logits."""
        replicas, gates, losses = self.begin(objective, logits, noise)
        with torch.no_grad():
            value = self.estimate(objective, replicas, gates, losses, noise)
        return (losses + carry(value, replicas, losses)).mean(0)

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead N"]:
        """Return each replica's estimate. The gates and their losses are given; it evaluates further ones itself."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it estimates")


def carry(
    value: Float[Tensor, "K *lead N"], logits: Float[Tensor, "K *lead N"], losses: Float[Tensor, "K *rest"]
) -> Float[Tensor, "K *rest"]:
    """Return a zero of the losses' shape whose gradient to the logits is ``value``."""
    # The product is formed in the logits' own dtype: a coefficient is a gradient of theirs.
    value = value.detach().to(logits.dtype)
    if logits.dtype == torch.float16:  # where the products' sum might overflow: logits − logits is an exact zero
        return (value * (logits - logits.detach())).flatten(losses.dim()).sum(-1).to(losses.dtype)
    inner: Tensor = torch.linalg.vecdot(value.flatten(losses.dim()), logits.flatten(losses.dim()))
    zero = inner - inner.detach()
    return zero.to(losses.dtype)


def evaluate(
    objective: Objective, gates: Float[Tensor, "K *lead N"], event_dims: int = 1, *, differentiable: bool = False
) -> Float[Tensor, "K *batch"]:
    """Call the objective and check what it returns; counts and booleans become numbers of the gates' dtype.

    ``differentiable``: the caller takes the objective's derivative by the gates, which counts do not have.
    """
    losses = objective(gates)
    expected = gates.shape[:-event_dims]
    if not isinstance(losses, Tensor) or losses.shape != expected:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"objective must map gates {tuple(gates.shape)} to one loss per replica and example, shape "
            f"{tuple(expected)}, but returned {found}; reduce over the units only"
        )
    if losses.is_floating_point():
        return losses
    if differentiable or losses.is_complex():
        raise TypeError(
            f"objective: its losses are {losses.dtype}, which pass no gradient to the gates; take an estimator "
            "that needs the loss alone (gatelet.estimators.ALL: needs 'loss', or local_expectation, vimco, …)"
        )
    return losses.to(wide(gates))


def straight_through(value: Float[Tensor, "*s"], path: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Return ``value`` with the derivative of ``path``.

    Written as algebra, not as an autograd.Function: so torch.compile, torch.func and double backward see
    through it. ``path − path`` is an exact zero for finite numbers, so the value keeps its bits.
    """
    return value.detach() + (path - path.detach())
