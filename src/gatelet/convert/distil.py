"""Fitting the gaters of a converted model to the dense model that it came from."""

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatelet._checks import check_count, check_positive
from gatelet.convert.fitting import (
    Distillation,
    Fit,
    Forward,
    Mask,
    Plan,
    but_first,
    calibrate,
    check_teacher,
    converted_blocks,
    default_mask,
    first_of,
    in_eval,
    run_on,
)
from gatelet.convert.progress import Progress
from gatelet.convert.student import Student, recording


def distil(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 1000,
    weights: bool = False,
    lr: float = 3e-3,
    weights_lr: float = 3e-4,
    held_out: int = 4,
    every: int = 100,
    patience: int = 5,
    calibration: int = 32,
    checkpoint: str | Path | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Distillation:
    """Fit a converted model's gaters (and, on request, its blocks' weights) to the dense model, then calibrate.

    Every block is fitted by itself, on the inputs x that it has in the teacher. The gater learns which units matter:
    closing unit n costs about c_n = (hidden_n · ‖W2 column n‖)² of the output; the units of highest cost should be
    open, as many as the target rate says over the batch's tokens. With t the cost at that limit, the loss is

        mean √|c_n − t| · softplus(∓ logit_n) / mean √|c − t|,

    a logistic regression in which mistakes weigh by what they cost (a middle layer of MiniLM, half open, a gater of 64:
    held-out error 0.029; 0.034 with |c_n − t| itself, 0.044 without weights, 0.012 if the gater knew). With ``weights``
    the block's W1, W2 (and W_g) and biases are trained too, so that the block gives the teacher's output through the
    gates that are open now, by ‖FFN(x) − FFN_teacher(x)‖² / variance.

    Fitting begins at the gater that least squares give for the targets sign(c − t) √|c − t|, an affine map of rank M
    (:class:`gatelet.convert.gater_regression.GaterRegression`), where that is better than the present gater.

    The first ``held_out`` batches are kept for the held-out error, which decides about early stopping and about which
    state is kept. At the end the thresholds are calibrated, on the model's own inputs to its blocks.

    Args:
        model: from :func:`gatelet.convert`; fitted in place; its mode stays as it was.
        teacher: the dense model, of the same structure and names.
        loader: yields batches; must allow several passes (a list or a DataLoader, no generator).
        steps: the most steps; the learning rates fall to 0 along a cosine over them.
        weights: fit the blocks' weights too.
        lr, weights_lr: Adam's learning rates of gaters and of weights.
        held_out: this many of the loader's first batches are not trained on.
        every: steps between two measurements of the held-out error.
        patience: stop after this many measurements without a better one.
        calibration: this many of the loader's first batches serve to calibrate the thresholds, in a few passes.
        checkpoint: file to write the state to at every measurement, atomically, and to continue from if it exists.
        forward: runs a model on a batch; by default ``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple
            or list, otherwise ``model(batch)``.
        mask: gives a batch's padding mask (true at tokens); by default its ``"attention_mask"`` if it is a mapping
            that has one. Padding is not trained on.
        progress: show phases and time left: a line on a terminal, elsewhere one every 30 seconds.

    Returns:
        held-out errors and open shares; print it.

    Raises:
        ValueError: for a model without converted blocks, a teacher that is converted, shares weights that are to be
            trained or does not run a block of that name, a loader
            that is an iterator, yields nothing, too few batches, or one without a token.
        FloatingPointError: for a loss, a held-out error, or an input or output of the teacher's block that is NaN or
            infinite; the model then has the best state so far, which is also what the checkpoint holds.

    >>> import copy, torch, gatelet
    >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    >>> model = copy.deepcopy(teacher)
    >>> _ = gatelet.convert(model, target_rate=0.25, bottleneck=8)
    >>> found = gatelet.distil(model, teacher, torch.randn(20, 64, 16).unbind(), steps=100)
    >>> found.errors["0.gating"] < found.first_errors["0.gating"]
    True
    """
    if isinstance(loader, Iterator):
        raise ValueError("loader: must allow several passes; give a list or a DataLoader, not a generator")
    check_count(calibration, "calibration")
    rates = {"lr": check_positive(lr, "lr"), "weights_lr": check_positive(weights_lr, "weights_lr")}
    plan = Plan(steps=steps, held_out=held_out, every=every, patience=patience)
    run, masked = forward or run_on, mask or default_mask
    students = [Student(name, owner, gating, teacher) for name, (owner, gating) in converted_blocks(model).items()]
    check_teacher(teacher, [p for student in students for p in student.weights()] if weights else ())
    shown, begin = Progress(progress), time.perf_counter()
    with in_eval(model, teacher):
        batches = _Batches(teacher, students, loader, run, masked)
        found = _Fit(students, batches, weights, rates, plan, checkpoint, shown).run()
        found.open_share = calibrate(model, list(first_of(loader, calibration)), run, masked, shown)
    found.seconds = time.perf_counter() - begin
    return found


class _Batches:
    """The loader's batches as the teacher's blocks see them."""

    def __init__(
        self, teacher: nn.Module, students: list[Student], loader: Iterable[Any], run: Forward, mask: Mask
    ) -> None:
        self.teacher, self.students, self.loader, self.run, self.mask = teacher, students, loader, run, mask

    def examples(self, batch: Any) -> Iterator[tuple[Student, Tensor, Tensor]]:
        """Yield each student with its twin's inputs and outputs on this batch."""
        with torch.no_grad(), recording(self.students):
            self.run(self.teacher, batch)
        for student in self.students:
            yield (student, *student.examples(self.mask(batch)))

    def held_out_errors(self, count: int) -> dict[str, float]:
        """Return each student's error on the loader's first batches."""
        sums = dict.fromkeys((student.name for student in self.students), 0.0)
        batches = 0
        for batch in first_of(self.loader, count):
            batches += 1
            for student, x, y in self.examples(batch):
                with torch.no_grad():
                    found = student.losses(x, y, gater=False, error=True, weights=False)
                sums[student.name] += found["error"].item()
        if not batches:
            raise ValueError("loader: yielded no batch")
        for name, value in sums.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the held-out error of {name} is {value}")
        return {name: value / batches for name, value in sums.items()}


class _Fit(Fit):
    """Each block by itself: its gater and, on request, its weights."""

    def __init__(
        self,
        students: list[Student],
        batches: _Batches,
        weights: bool,
        rates: dict[str, float],
        plan: Plan,
        checkpoint: str | Path | None,
        progress: Progress,
    ) -> None:
        self.students, self.batches, self.weights = students, batches, weights
        gaters = [p for student in students for p in student.gater()]
        maps = [p for student in students for p in student.weights()] if weights else []
        groups = [{"params": gaters, "lr": rates["lr"]}, {"params": maps, "lr": rates["weights_lr"]}]
        scales = [buffer for student in students for buffer in student.gating.gater.buffers()]
        super().__init__(groups, scales, batches.loader, plan, checkpoint, progress)

    def errors(self) -> dict[str, float]:
        """Return each block's."""
        return self.batches.held_out_errors(self.plan.held_out)

    def gradients(self, batch: Any) -> float:
        """Return the mean loss of the blocks."""
        total, weights = 0.0, self.weights
        for student, x, y in self.batches.examples(batch):
            terms = student.losses(x, y, gater=bool(student.gater()), error=weights, weights=weights)
            loss = torch.stack(list(terms.values())).sum()
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"the loss of {student.name} is {loss.item()}")
            loss.backward()
            total += loss.item() / len(self.students)
        return total

    def begin(self) -> dict[str, float]:
        """Start each gater at its regression, if that is better than its present state; return the errors then."""
        first, held_out = self.found.first_errors, self.plan.held_out
        beginnings = {student: student.beginning() for student in self.students}
        fits = {student: fit for student, fit in beginnings.items() if fit is not None}
        if not fits:
            return dict(first)
        for batch in self.progress.phase("begin", but_first(self.batches.loader, held_out)):
            for student, x, _ in self.batches.examples(batch):
                if student in fits:
                    student.add_to(fits[student], x)
            if all(fit.enough for fit in fits.values()):
                break
        written = [(student, fit) for student, fit in fits.items() if fit.write()]
        errors = self.batches.held_out_errors(held_out)
        for student, fit in written:
            if not errors[student.name] < first[student.name]:
                fit.undo()
        return {name: min(error, first[name]) for name, error in errors.items()}
