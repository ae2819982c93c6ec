"""How a per-example loss reaches the units: ``Tape`` for modules, ``surrogate`` for a function of the gates."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gatelet._checks import check_count, check_logits, check_noise
from gatelet.estimators import ALL, Estimator, Objective, resolve


class _Current(threading.local):
    """The innermost open tape of this thread. (Not a ContextVar: torch.compile cannot trace one.)"""

    tape: "Tape | None" = None


_current = _Current()


class _Record(NamedTuple):
    estimator: Estimator
    logits: Tensor  # (K, B, ..., N)
    gates: Tensor
    noise: Tensor


class Tape:
    """Remembers the score-function units of a forward pass, and later gives them the loss of each example.

    Theorem 1: a unit needs only the loss, broadcast to it; no gradient passes through its gates.
    :meth:`surrogate` adds to each example's loss a zero whose gradient to the logits is the estimator's,
    (h − σ(a))·(L − L̄) for :class:`~gatelet.estimators.ScoreFunction`. Units of other kinds do not use the
    tape and are not touched by it, so a training loop may always use one.

    A unit uses the innermost open tape of the thread that runs the forward pass; ``torch.compile`` sees through it.

    >>> import torch, gatelet
    >>> unit = gatelet.StochasticUnit("score_function")
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 4), unit, torch.nn.Linear(4, 3))
    >>> x, y = torch.randn(8, 5), torch.randint(3, (8,))
    >>> with gatelet.Tape() as tape:
    ...     loss = torch.nn.functional.cross_entropy(net(x), y, reduction="none")
    >>> tape.surrogate(loss).mean().backward()
    >>> net[0].weight.grad.shape
    torch.Size([4, 5])
    """

    def __init__(self) -> None:
        self._records: list[_Record] | None = []  # None: already used
        self.samples = 1
        self._open = False
        self._outer: Tape | None = None
        self._owned: list[object] = []

    def __enter__(self) -> "Tape":
        if self._records is None or self._open:
            raise RuntimeError("a Tape serves one forward pass: open a new one with `with gatelet.Tape() as tape:`")
        self._outer, _current.tape, self._open = _current.tape, self, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.tape, self._outer, self._open = self._outer, None, False

    @staticmethod
    def current() -> "Tape | None":
        """Return the innermost open tape, or None."""
        return _current.tape

    def replicate(self, x: Tensor, samples: int) -> Tensor:
        """Return ``x`` (B, ...) K times, (K·B, ...), so that one forward pass draws K samples of every example.

        Replicate everything that has a batch, inputs and targets, with the same K. Estimators that compare
        replicas (``leave_one_out``, ``disarm``, ...) need at least two; the others average them.

        >>> import torch, gatelet
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 4), gatelet.StochasticUnit("leave_one_out"))
        >>> x = torch.randn(8, 5)
        >>> with gatelet.Tape() as tape:
        ...     loss = net(tape.replicate(x, 3)).square().sum(-1)                 # (3·8,)
        >>> tape.surrogate(loss).mean().backward()
        """
        if check_count(samples, "samples") != self.samples and (self.samples > 1 or self._records):
            raise ValueError(
                f"samples: this tape's forward pass has {self.samples} replicas, not {samples}; replicate all "
                "inputs and targets alike, before the first unit runs"
            )
        self.samples = samples
        return x.expand(samples, *x.shape).flatten(0, 1)

    def record(
        self,
        estimator: Estimator,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        noise: Float[Tensor, "..."],
    ) -> None:
        """Remember what a unit drew (``StochasticUnit`` calls this)."""
        assert self._records is not None, "an open tape is not spent"
        self._records.append(_Record(estimator, logits, gates, noise))

    def own(self, thing: object) -> None:
        """Keep something of this forward pass alive as long as the tape."""
        self._owned.append(thing)

    def surrogate(self, loss: Shaped[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """Return the loss, with the gradient of every recorded unit's estimator added to its own.

        Args:
            loss: one loss per example (B,), or (K·B,) where the inputs were replicated: the shape of the units' logits
                (B, ..., N) without N, and without any middle dimensions in which one example's units acted several
                times.

        Returns:
            a tensor equal to ``loss``, floating if the loss was boolean or integer. Reduce it as you would the loss:
            ``.mean().backward()``.

        Raises:
            ValueError: if the loss was already reduced, or does not fit a recorded unit's shape; if an estimator for a
                single stochastic layer met several.
            RuntimeError: inside the ``with`` block, or if the surrogate of this tape was taken before (its units'
                moving averages have seen the loss).
        """
        if self._open:
            raise RuntimeError("tape.surrogate(loss) belongs after the `with Tape() as tape:` block, not inside it")
        if self._records is None:
            raise RuntimeError("the surrogate of this tape was taken before: open a new Tape for every forward pass")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a torch.Tensor, not {type(loss).__name__}")
        if loss.is_complex():
            raise TypeError(f"loss must be real, not {loss.dtype}")
        if not loss.is_floating_point():  # a count or a boolean: its sum could carry no gradient
            loss = loss.to(self._records[0].logits.dtype if self._records else torch.get_default_dtype())
        for record in self._records:
            self._check(record, loss)
        records, self._records = self._records, None
        if not records:
            return loss
        # An estimator that ran several times is called once: its baseline must not see this loss between two uses.
        uses: dict[tuple[int, int], list[_Record]] = {}
        for record in records:
            uses.setdefault((id(record.estimator), record.logits.shape[-1]), []).append(record)
        losses = loss.reshape(self.samples, -1, *loss.shape[1:]) if self.samples > 1 else loss.unsqueeze(0)
        total = losses
        for group in uses.values():
            logits = _join([record.logits for record in group], losses.dim())
            gates = _join([record.gates for record in group], losses.dim())
            total = total + group[0].estimator.signal(logits, gates, losses, group[0].noise)
        return total.reshape(loss.shape)

    def _check(self, record: _Record, loss: Tensor) -> None:
        """Raise unless the loss fits this unit and the unit's estimator fits the network."""
        samples, batch, *rest = (*record.logits.shape[:-1], 1) if record.logits.dim() == 2 else record.logits.shape[:-1]
        lead = () if record.logits.dim() == 2 else (samples * batch, *rest)
        if (loss.dim() == 0 and lead) or loss.shape != lead[: loss.dim()]:
            shapes = " or ".join(str(lead[:n]) for n in range(min(1, len(lead)), len(lead) + 1))
            raise ValueError(
                f"loss must hold one loss per example, shape {shapes} for units with "
                f"logits {(*lead, record.logits.shape[-1])}, but has shape {tuple(loss.shape)}"
                + ("; it was already reduced: compute it with reduction='none'" if loss.dim() == 0 else "")
            )
        if record.estimator.several_layers:
            return
        assert self._records is not None
        # An accelerator's logits are not looked at: that would synchronise.
        if len(self._records) > 1 or (record.logits.device.type == "cpu" and not _equal_replicas(record.logits)):
            fit = [name for name, method in ALL.items() if method.needs == "loss" and method.several_layers]
            raise ValueError(
                f"estimator {type(record.estimator).__name__} is for a single stochastic layer, whose logits are the "
                f"same in all replicas; in a deeper network take one of {', '.join(fit)}"
            )


_COMPARED = 4096  # about this many logits of each replica are compared


def _equal_replicas(logits: Tensor) -> bool:
    """Whether (K, B, ..., N) is K times the same up to rounding (a product may sum its rows in different orders)."""
    if not logits.numel():
        return True
    # A layer of gates below makes replicas differ almost everywhere, so comparing a few thousand numbers is enough.
    each = logits.detach().flatten(1)
    some = each[:, :: each.shape[1] // _COMPARED | 1]
    if torch.equal(some, some[:1].expand_as(some)):
        return True
    apart = (some - some[:1]).abs().max()
    return bool(apart <= 100 * torch.finfo(logits.dtype).eps * some.abs().max())


def _join(tensors: Sequence[Tensor], lead: int) -> Tensor:
    """Concatenate (K, B, ..., N) along one middle dimension, behind the ``lead`` dimensions of the losses."""
    if len(tensors) == 1:
        return tensors[0]
    middle = [tensor.flatten(lead, -2) if tensor.dim() > lead + 1 else tensor.unsqueeze(-2) for tensor in tensors]
    return torch.cat(middle, dim=-2)


def surrogate(
    objective: Objective,
    logits: Float[Tensor, "*lead N"],
    estimator: str | Estimator,
    samples: int | None = None,
    *,
    noise: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    """Monte-Carlo loss of stochastic gates whose gradient is the chosen estimator's.

    The value is (1/K) Σ_k L(h_k); its gradient is the estimator's for the logits and the ordinary one for
    everything else the objective uses.

    Args:
        objective: maps gates (K, B, N) to losses (K, B).
        logits: (B, N), any leading shape; (B, N, C) for categorical units.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance. A stateful estimator (one with a
            moving-average baseline) must be passed as an instance to keep its state between calls.
        samples: K, the number of replicas; by default the least that the estimator works with, mostly 1.
        noise: of the shape ``estimator.noise_shape((K, B, N))``, instead of drawing it; gives K where ``samples`` is
            left out.
        generator: the source of the noise; torch's global one by default.

    Returns:
        (B,), the mean loss over the replicas.

    Raises:
        ValueError: for logits that are not finite, an unknown estimator, noise of another shape, an objective
            that does not return one loss per replica and example.

    >>> import torch, gatelet
    >>> logits = torch.zeros(2, 3, requires_grad=True)
    >>> loss = gatelet.surrogate(lambda h: ((h - 0.45) ** 2).sum(-1), logits, "straight_through", samples=8)
    >>> loss.shape
    torch.Size([2])
    >>> loss.mean().backward()
    """
    method = resolve(estimator)
    check_logits(logits)
    if samples is None:
        given = isinstance(noise, Tensor) and noise.dim() == logits.dim() + 1 + bool(method.more)
        samples = noise.shape[0] * (1 + method.antithetic) if given and noise is not None else method.replicas
    check_samples(method, check_count(samples, "samples"))
    replicas = logits.detach().expand(samples, *logits.shape)
    if noise is None:
        noise = method.draw_noise(replicas, generator)
    else:
        check_noise(noise, method.noise_shape(replicas.shape))
    return method.surrogate(objective, logits, noise)


def check_samples(method: Estimator, samples: int, hint: str = "") -> None:
    """Raise unless the estimator can work with this number of replicas."""
    if samples < method.replicas or (method.antithetic and samples % 2):
        wanted = "an even number of samples" if method.antithetic else f"at least {method.replicas} samples"
        raise ValueError(f"samples: {type(method).__name__} needs {wanted} per example, not {samples}{hint}")
