"""Training the blocks of a converted model together, so that its output comes close to the dense model's."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_count, check_positive
from gatelet.convert.block import BlockGating, at, module_path
from gatelet.convert.fitting import (
    Distillation,
    Fit,
    Forward,
    Mask,
    Plan,
    calibrate,
    check_teacher,
    converted_blocks,
    default_mask,
    first_of,
    in_eval,
    run_on,
)
from gatelet.convert.progress import Progress
from gatelet.nn.conditional_layer import masking


def distil_output(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 100,
    lr: float = 1e-4,
    held_out: int = 4,
    every: int = 20,
    patience: int = 5,
    calibration: int = 8,
    autocast: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Distillation:
    """Train the weights of a converted model's blocks, with their present gates, towards the dense model's output.

    The loss is the divergence of the output's distribution, mean over tokens,

        KL(teacher ‖ model) = Σ_c p_c · (log p_c − log q_c),

    p and q the softmax of teacher's and model's ``logits``. Where a model's output has no attribute of that name the
    loss is ‖model − teacher‖² / the teacher's variance. Only the blocks' W1, W2 (and W_g) and biases learn. Gaters stay
    as they are: this comes after :func:`gatelet.distil`, which fits them and calibrates the thresholds. Through hard
    gates no gradient passes, and a closed unit receives none.

    Blocks that are fitted each by itself, as ``distil(weights=True)`` does it, cannot make up for each other; here
    they can, at the price of a backward pass through the whole model.

    The weights move what the thresholds are compared with: these are calibrated anew at each measurement, on the first
    batch, which takes one pass, and at the end on ``calibration`` batches.

    Args:
        model: from :func:`gatelet.convert`, calibrated; trained in place, in ``eval()``; its mode stays as it was.
        teacher: the dense model; gives an output of the same shape.
        loader: yields batches; must allow several passes (a list or a DataLoader, no generator).
        steps: the most steps; the learning rate falls to 0 along a cosine over them.
        lr: Adam's learning rate.
        held_out: this many of the loader's first batches are not trained on; their divergence decides about early
            stopping and about which state is kept.
        every: steps between two measurements of it.
        patience: stop after this many measurements without a better one.
        calibration: this many of the loader's first batches serve to calibrate the thresholds at the end.
        autocast: the precision of the steps, ``torch.bfloat16``; measurements and calibration are in the model's own.
        checkpoint: file to write the state to at every measurement, and to continue from if it exists.
        forward: runs a model on a batch and returns its output; as for :func:`gatelet.distil`.
        mask: gives a batch's padding mask, as for :func:`gatelet.distil`. Padding is not trained on.
        progress: show phases and time left.

    Returns:
        the held-out divergence before and after, under the name ``output``, and the open shares; print it.

    Raises:
        ValueError: for a model without converted blocks, a teacher that is converted or shares trained weights, outputs
            of different shapes, a loader that is an iterator or yields too few batches.
        FloatingPointError: for a loss or a held-out divergence that is NaN or infinite; the model then has the best
            state so far.

    >>> import copy, torch, gatelet
    >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    >>> model, batches = copy.deepcopy(teacher), torch.randn(20, 64, 16).unbind()
    >>> _ = gatelet.convert(model, target_rate=0.25, gater="preview")
    >>> _ = gatelet.distil(model, teacher, batches, steps=1)
    >>> found = distil_output(model, teacher, batches, steps=60, lr=1e-3)
    >>> found.errors["output"] < found.first_errors["output"]
    True

    Reference: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """
    if isinstance(loader, Iterator):
        raise ValueError("loader: must allow several passes; give a list or a DataLoader, not a generator")
    check_count(calibration, "calibration")
    check_positive(lr, "lr")
    plan = Plan(steps=steps, held_out=held_out, every=every, patience=patience, name="distil output")
    found, begin = converted_blocks(model), time.perf_counter()
    run, masked = forward or run_on, mask or default_mask
    weights = list({p: None for owner, gating in found.values() for p in _maps(owner, gating)})
    check_teacher(teacher, weights)
    with in_eval(model, teacher), _frozen(model):
        pair = _Pair(model, teacher, run, masked, autocast)
        tuned = _Fit(pair, weights, lr, loader, plan, checkpoint, Progress(progress))
        result = tuned.run()
        result.open_share = tuned.calibrate(calibration, Progress(progress))
    result.seconds = time.perf_counter() - begin
    return result


def _maps(owner: nn.Module, gating: BlockGating) -> Iterator[nn.Parameter]:
    """Yield the parameters of a block's own maps."""
    for path in dict.fromkeys(module_path(path) for path in gating.block.maps):
        yield from at(owner, path).parameters(False)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters inside the block; those to be trained are turned on later."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


class _Pair:
    """The model beside its teacher."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, run: Forward, mask: Mask, autocast: torch.dtype | None
    ) -> None:
        self.model, self.teacher, self.run, self.mask, self.dtype = model, teacher, run, mask, autocast

    def divergence(self, batch: Any, cast: bool) -> Tensor:
        """Return how far the model's output is from the teacher's, over tokens that are not padding."""
        mask = self.mask(batch)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype) if cast and self.dtype is not None else contextlib.nullcontext():
            with torch.no_grad():
                want, are_logits = _output(self.run(self.teacher, batch))
            with masking(self.model, mask):
                have, _ = _output(self.run(self.model, batch))
        if have.shape != want.shape:
            raise ValueError(f"teacher: gives an output of {tuple(want.shape)}, the model of {tuple(have.shape)}")
        if mask is not None and mask.shape == want.shape[:-1]:
            have, want = have[mask.bool()], want[mask.bool()]
        have, want = have.flatten(0, -2).float(), want.flatten(0, -2).float()
        if are_logits:
            return F.kl_div(have.log_softmax(-1), want.log_softmax(-1), reduction="batchmean", log_target=True)
        variance = want.var(0, correction=0).mean().clamp_min(torch.finfo(want.dtype).tiny)
        return (have - want).square().mean() / variance


def _output(out: Any) -> tuple[Tensor, bool]:
    """Return the tensor that a model gives, and whether it is said to be logits."""
    if isinstance(out, Tensor):
        return out, False
    logits = getattr(out, "logits", None)
    return (out[0], False) if logits is None else (logits, True)


class _Fit(Fit):
    """All blocks' weights together."""

    def __init__(
        self,
        pair: _Pair,
        weights: list[nn.Parameter],
        lr: float,
        loader: Iterable[Any],
        plan: Plan,
        checkpoint: str | Path | None,
        progress: Progress,
    ) -> None:
        self.pair = pair
        thresholds = [gating.unit.threshold for _, gating in converted_blocks(pair.model).values()]
        super().__init__([{"params": weights, "lr": lr}], thresholds, loader, plan, checkpoint, progress)

    def calibrate(self, batches: int, progress: Progress) -> dict[str, float]:
        """Set the thresholds for the weights as they are; return the open shares."""
        loader = list(first_of(self.loader, batches))
        return calibrate(self.pair.model, loader, self.pair.run, self.pair.mask, progress)

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Return the held-out divergence."""
        self.calibrate(1, Progress(on=False))
        batches = list(first_of(self.loader, self.plan.held_out))
        value = sum(self.pair.divergence(batch, cast=False).item() for batch in batches) / max(1, len(batches))
        if not batches:
            raise ValueError("loader: yielded no batch")
        if not math.isfinite(value):
            raise FloatingPointError(f"the held-out divergence is {value}")
        return {"output": value}

    def gradients(self, batch: Any) -> float:
        """Return the divergence of this batch."""
        loss = self.pair.divergence(batch, cast=True)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        loss.backward()
        return loss.item()
