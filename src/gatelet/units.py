"""StochasticUnit: an estimator as a module, with its deterministic test mode."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_logits, check_noise, check_rate, is_fake
from gatelet._recompute import Passes, recomputing
from gatelet.estimators import Estimator, resolve
from gatelet.estimators._noise import UNIFORM
from gatelet.tape import Tape, check_samples

_NOT_CALIBRATED = (
    "this unit has no test-time threshold yet: call gatelet.sparsity.calibrate_thresholds(model, loader) "
    "after training, or ask for sampled gates with gatelet.sampling(model)"
)


class StochasticUnit(nn.Module):
    """Turns logits into gates; used like any activation.

    In training the gates are the estimator's, with fresh noise. In ``eval()`` they are deterministic: open
    iff the firing probability exceeds a threshold (A.3), at the estimator's open value (1 for a binary unit,
    mostly E[h] for the others); :func:`sampling` asks for noise there too.

    Args:
        estimator: a name of ``gatelet.estimators.ALL`` or an instance.
        threshold: the firing probability above which a gate is open in ``eval()``; ``None``: unknown until
            :func:`gatelet.sparsity.calibrate_thresholds` finds it, and an error in ``eval()`` before.
        target_rate: the share of open gates that calibration aims at; ``None``: calibration leaves this unit alone.

    The threshold is kept as a logit in the buffer ``threshold`` (NaN before calibration), so that probabilities
    which round to 1 can still be ranked; ``state_dict`` holds it.

    Raises:
        ValueError: for an unknown estimator or a threshold outside (0, 1).

    >>> import torch
    >>> unit = StochasticUnit("straight_through").eval()
    >>> unit(torch.tensor([-1.0, 2.0]))
    tensor([0., 1.])
    """

    threshold: Tensor

    def __init__(
        self,
        estimator: str | Estimator,
        threshold: float | None = 0.5,
        target_rate: float | None = None,
    ) -> None:
        super().__init__()
        self.estimator = resolve(estimator)
        if self.estimator.needs == "objective":
            raise ValueError(
                f"estimator: {type(self.estimator).__name__} evaluates the objective at several gates, which a "
                "module cannot do; call gatelet.surrogate(objective, logits, estimator=...)"
            )
        self.target_rate = None if target_rate is None else check_rate(target_rate)
        at = float("nan")
        if threshold is not None:
            at = self.estimator.logit_at(check_rate(threshold, "threshold"))
        self.register_buffer("threshold", torch.tensor(at))
        self.sample_in_eval = False
        self._passes = Passes()
        self.mask: Tensor | None = None  # which tokens of the next call are not padding; calibration reads it

    def forward(
        self,
        logits: Float[Tensor, "*lead N"],
        *,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead N"]:
        """Return the gates.

        Args:
            logits: (..., N).
            noise: of the same shape, instead of drawing it (see ``estimator.draw_noise`` for its law).
            generator: the source of the noise; torch's global one by default.

        Raises:
            ValueError: for logits that are not finite or noise of another shape.
            RuntimeError: when the estimator needs the loss, a gradient is being recorded, and there is no Tape;
                in ``eval()`` before a threshold was calibrated.
        """
        if not self.training and not self.sample_in_eval:
            return self.settle(logits)
        check_logits(logits)
        if self.estimator.needs == "loss":
            return self._sampled(logits, noise, generator)
        if noise is None:
            noise = self.estimator.draw_noise(logits, generator)
        else:
            check_noise(noise, self.estimator.noise_shape(logits.shape))
        gates: Tensor = self.estimator(logits, noise)
        return gates

    def settle(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the gates of ``eval()``: the estimator's deterministic ones at the calibrated threshold.

        Raises:
            ValueError: for logits that are not finite.
            RuntimeError: before a threshold was calibrated. On an accelerator the gates are then NaN.
        """
        check_logits(logits)
        self._check_calibrated()
        method, threshold = self.estimator, self.threshold
        settled = method.deterministic(logits, threshold)
        if threshold.device.type == "cpu" or not method.form.rated:
            return settled
        return torch.where(threshold.isnan(), threshold.to(settled.dtype), settled)

    def _sampled(self, logits: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return gates without gradient, and tell the tape, whose loss the estimator needs."""
        learns = logits.requires_grad and torch.is_grad_enabled()
        if self.estimator.antithetic and not learns:  # without gradients no antithetic pair is needed
            return self.estimator.sample(logits, UNIFORM.sample(logits.shape, logits, generator))
        again = learns and recomputing()  # the tape recorded the first run, and is closed
        tape = Tape.current() if learns and not again else None
        samples = 1 if tape is None else tape.samples
        if again:
            samples = self._samples_of_the_first_run(logits, noise is None and generator is None)
        elif tape is not None and not torch.compiler.is_compiling():
            self._passes.remember(logits, samples, noise is None and generator is None)
        if samples > 1 and (logits.dim() < 2 or logits.shape[0] % samples):
            raise ValueError(
                f"logits {tuple(logits.shape)}: this tape's forward pass has {samples} replicas, but the batch is no "
                "multiple of it; replicate all inputs by tape.replicate(x, samples)"
            )
        replicas = logits.unflatten(0, (samples, -1)) if samples > 1 else logits.unsqueeze(0)
        if learns:
            check_samples(self.estimator, samples, "; replicate inputs and targets by tape.replicate(x, samples)")
        if noise is None:
            noise = self.estimator.draw_noise(replicas, generator)
        else:
            expected = self.estimator.noise_shape(replicas.shape)
            check_noise(noise, expected if samples > 1 else expected[1:])
            noise = noise.reshape(expected)
        gates: Tensor = self.estimator(replicas, noise)
        if learns and not again:
            if tape is None:
                raise RuntimeError(
                    f"estimator {type(self.estimator).__name__} learns from the loss and found no tape: run the "
                    "forward pass under `with gatelet.Tape() as tape:` and call tape.surrogate(loss).mean().backward()"
                )
            tape.record(self.estimator, replicas, gates, noise)
        return gates.reshape(logits.shape)

    def _samples_of_the_first_run(self, logits: Tensor, draws: bool) -> int:
        """Return how many replicas the tape had in the pass that activation checkpointing now repeats."""
        found: int | None = self._passes.recall(logits, draws, type(self).__name__)
        if found is None:
            raise RuntimeError(
                f"estimator {type(self.estimator).__name__} learns from the loss, but no tape recorded its forward "
                "pass: activation checkpointing with use_reentrant=True runs it without gradients; call "
                "checkpoint(..., use_reentrant=False), under `with gatelet.Tape() as tape:`"
            )
        return found

    def _check_calibrated(self) -> None:
        threshold = self.threshold
        # A threshold on an accelerator is not looked at: that would synchronise. There NaN makes all gates NaN.
        if threshold.device.type != "cpu":
            return
        if torch.compiler.is_compiling():
            torch._assert_async(~threshold.isnan(), _NOT_CALIBRATED)
        elif not is_fake(threshold) and math.isnan(threshold.item()):
            raise RuntimeError(_NOT_CALIBRATED)

    def extra_repr(self) -> str:
        """Show the target rate and the threshold."""
        rate = "" if self.target_rate is None else f"target_rate={self.target_rate:g}, "
        if self.threshold.is_meta:
            return f"{rate}threshold (logit): on the meta device"
        known = "not calibrated" if self.threshold.isnan() else f"{self.threshold.item():.4g}"
        return f"{rate}threshold (logit): {known}"


@contextmanager
def sampling(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Let the stochastic units of ``model`` sample in ``eval()`` too (or, ``on=False``, not), inside the block.

    >>> import torch
    >>> unit = StochasticUnit("straight_through", threshold=None).eval()
    >>> with sampling(unit):
    ...     unit(torch.zeros(1, 4)).shape
    torch.Size([1, 4])
    """
    units = [module for module in model.modules() if isinstance(module, StochasticUnit)]
    before = [unit.sample_in_eval for unit in units]
    try:
        for unit in units:
            unit.sample_in_eval = on
        yield
    finally:
        for unit, flag in zip(units, before, strict=True):
            unit.sample_in_eval = flag
