"""Training one row with one seed: plain SGD, max-norm, early stopping, resumable after every epoch."""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatelet
from gatelet.kernels.choose import by_kind
from gatelet_lab.data import Split
from gatelet_lab.files import CheckpointError, read_tensors, write_atomically
from gatelet_lab.model import Dense, Ensemble, PaperNet, build, group_share, multiply_adds, penalty
from gatelet_lab.recipes import DEFAULTS, Recipe

VERSION = 1  # of the checkpoints
_CALIBRATION = 5000  # training images that set the threshold
_EVAL_BATCH = 1000
PROBABILITY_BINS = 100


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop; it resumes from its last epoch."""


@dataclass
class Epoch:
    """What one epoch showed; errors in per cent, open gates as a share."""

    epoch: int
    train_loss: float
    valid_error: float
    open_train: float
    open_valid: float
    seconds: float


class Trainer:
    """One row, one seed. ``step_epoch`` until ``finished``, then ``result``.

    The state after an epoch is all that decides the rest: the order of the examples follows from the seed and the
    epoch, the noise from the saved random state. So a resumed run gives the numbers of an uninterrupted one.
    """

    def __init__(
        self, recipe: Recipe, seed: int, split: Split, device: str = "cpu", teacher: PaperNet | Ensemble | None = None
    ) -> None:
        if bool(recipe.teacher_share) != (teacher is not None):
            raise ValueError(
                f"teacher: teacher_share is {recipe.teacher_share}, and a teacher was "
                f"{'not given' if teacher is None else 'given'}"
            )
        self.teacher = teacher
        split = split.with_more_training(recipe.more_training) if recipe.more_training else split
        self.recipe, self.seed, self.split = recipe, seed, split
        self.device = torch.device(device)
        torch.manual_seed(seed)
        self.model = build(recipe, split.train_images.shape[1], split.classes).to(self.device)
        # What is validated and tested: the weights themselves, or their moving average.
        self.averaged = copy.deepcopy(self.model) if recipe.average else self.model
        gated = [layer for layer in self.model.layers if not isinstance(layer, Dense)]
        gater = [parameter for layer in gated for parameter in layer.gater.parameters()]
        known = {id(parameter) for parameter in gater}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        groups = [{"params": rest, "scale": 1.0}, {"params": gater, "scale": recipe.gater_rate}]
        self.optimizer = (
            torch.optim.SGD(groups, recipe.rate, recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
            if recipe.optimizer == "sgd"
            else torch.optim.AdamW(groups, recipe.rate, (0.9, 0.99), weight_decay=recipe.weight_decay, fused=True)
        )
        self.limits = self._limits(known)
        self.train_images, self.train_labels = self._put(split.train_images), self._put(split.train_labels)
        self.history: list[Epoch] = []
        self.best: dict[str, Any] = {}
        self.best_error, self.best_epoch = math.inf, -1

    def _limits(self, gater: set[int]) -> list[tuple[Tensor, float]]:
        """Return the weights whose rows' lengths are limited, with the limit."""
        recipe, outputs = self.recipe, {id(network.output) for network in self.model.networks}
        limits = (
            (
                module.weight,
                recipe.output_max_norm
                if id(module) in outputs
                else recipe.gater_max_norm
                if id(module.weight) in gater
                else recipe.max_norm,
            )
            for module in self.model.modules()
            if isinstance(module, nn.Linear)
        )
        return [(weight, limit) for weight, limit in limits if limit is not None]

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``patience`` of them brought nothing better."""
        done = len(self.history)
        return done >= self.recipe.epochs or done - 1 - self.best_epoch >= self.recipe.patience

    @by_kind()
    def step_epoch(self, stop: Callable[[], bool] = lambda: False) -> Epoch:
        """Train one epoch, calibrate, validate, and remember the weights if they are the ones to keep so far."""
        began, epoch = time.perf_counter(), len(self.history)
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        indices = torch.randperm(len(self.train_labels), generator=order).to(self.device)
        loss_sum, open_sum, batches = 0.0, 0.0, 0
        self.model.train()
        parts = indices.split(self.recipe.batch)
        for index in parts:
            if stop():
                raise Stopped
            rate = self.rate(epoch + batches / len(parts))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            loss_sum += self._step(self.train_images[index], self.train_labels[index]) * len(index)
            open_sum += self.model.active_fraction
            batches += 1
            if self.recipe.average:
                self._average(epoch * len(parts) + batches)
        self.calibrate()
        error, _, share = self.evaluate(self.split.valid_images, self.split.valid_labels)
        row = Epoch(
            epoch=epoch,
            train_loss=loss_sum / max(1, len(indices)),
            valid_error=error,
            open_train=open_sum / max(1, batches),
            open_valid=share,
            seconds=time.perf_counter() - began,
        )
        self.history.append(row)
        # A cosine ends at zero, so that its last weights are the ones: there is no epoch to choose.
        if error < self.best_error or self.recipe.schedule == "cosine":
            self.best_error, self.best_epoch = error, epoch
            self.best = copy.deepcopy(self.averaged.state_dict())
        return row

    def rate(self, epoch: float) -> float:
        """Return the learning rate at a point in training, in epochs; exponential decay goes in steps of one."""
        recipe = self.recipe
        if recipe.schedule == "exponential":
            return recipe.rate * recipe.rate_decay ** int(epoch)
        falling = max(0.0, epoch - 1) / max(1, recipe.epochs - 1)
        return recipe.rate * min(1.0, epoch + 0.01) * (1 + math.cos(math.pi * falling)) / 2

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Take the weights (and running statistics) after this step into their moving average."""
        keep = min(self.recipe.average, step / (step + 10))
        for average, now in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point() and average.dim() > 0:  # a threshold may be infinite, and means nothing here
                average.lerp_(now, 1 - keep)
            else:
                average.copy_(now)

    def _adversary(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the images a step up their loss's gradient, of the same length for each; of an ensemble their sum's.

        Reference: T. Miyato, A. M. Dai, I. Goodfellow, "Adversarial Training Methods for Semi-Supervised Text
        Classification", 2016, arXiv:1605.07725, eqs. 1 and 4; the idea: Goodfellow, Shlens, Szegedy 2014,
        arXiv:1412.6572.
        """
        moved = x.clone().requires_grad_()
        with (
            self._products(),
            gatelet.Tape(),
        ):  # what needs a tape gives no gradient here: only what passes through the gates counts
            each = [F.cross_entropy(network(moved), y, reduction="sum") for network in self.model.networks]
        (gradient,) = torch.autograd.grad(each, moved)
        return x + self.recipe.adversarial * F.normalize(gradient, dim=1)

    def _step(self, x: Tensor, y: Tensor) -> float:
        if self.recipe.adversarial:
            moved = math.ceil(self.recipe.adversarial_share * len(x))
            x = torch.cat([self._adversary(x[:moved], y[:moved]), x[moved:]])
        total, value = torch.zeros((), device=self.device), 0.0
        target = self._target(x, y)
        for network in self.model.networks:  # each learns by its own losses: they share no weight, and no tape
            with self._products(), gatelet.Tape() as tape:
                scores = network(x).float()
                losses = F.cross_entropy(scores, target, reduction="none", label_smoothing=self.recipe.label_smoothing)
            total = total + tape.surrogate(losses).mean()
            value += losses.detach().mean().item() / self.recipe.members
        loss = total + penalty(self.model)
        self.optimizer.zero_grad()
        if not math.isfinite(value):
            raise FloatingPointError(f"training diverged: the loss became {value} in epoch {len(self.history) + 1}")
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for weight, limit in self.limits:
                norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
                if (norms > limit).any():
                    weight.mul_((limit / norms).clamp(max=1))
        return value

    def _products(self) -> torch.autocast:
        """Return what makes matrix products be taken in bfloat16, or does nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bfloat16)

    @torch.no_grad()
    def _target(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what is to be learned: labels, or class probabilities that are in part the teacher's.

        Reference: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
        arXiv:1503.02531.
        """
        if self.teacher is None:
            return y
        with self._products():
            known = self.teacher(x).float().softmax(-1)
        target: Tensor = known.lerp(F.one_hot(y, known.shape[-1]).float(), 1 - self.recipe.teacher_share)
        return target

    @by_kind()
    def calibrate(self) -> None:
        """Set the test-time threshold on some training images."""
        if self.recipe.target_rate is not None and self.recipe.kind == "gates":
            images = self.split.train_images[:_CALIBRATION]
            batches = [self._put(batch) for batch in images.split(_EVAL_BATCH)]
            gatelet.sparsity.calibrate_thresholds(self.averaged, batches)

    @torch.no_grad()
    @by_kind()
    def evaluate(
        self, images: Tensor, labels: Tensor, samples: int = 0, model: PaperNet | Ensemble | None = None
    ) -> tuple[float, float, float]:
        """Return error (per cent), NLL and share of open gates: deterministic, or the mean of some samples.

        Of what is trained here, its moving average if there is one; or of another ``model``.
        """
        model = (self.averaged if model is None else model).eval()
        wrong, nll, share = 0, 0.0, 0.0
        for x, y in zip(images.split(_EVAL_BATCH), labels.split(_EVAL_BATCH), strict=True):
            x, y = self._put(x), self._put(y)
            if samples == 0:
                probability = model(x).log_softmax(-1)
                opened = model.active_fraction
            else:
                with gatelet.sampling(model):
                    draws, opens = [], []
                    for _ in range(samples):
                        draws.append(model(x).log_softmax(-1))
                        opens.append(model.active_fraction)
                probability = torch.stack(draws).logsumexp(0) - math.log(samples)
                opened = sum(opens) / samples
            wrong += int((probability.argmax(-1) != y).sum())
            nll += F.nll_loss(probability, y, reduction="sum").item()
            share += opened * len(y)
        return 100 * wrong / len(labels), nll / len(labels), share / len(labels)

    @by_kind()
    def result(self) -> dict[str, Any]:
        """Restore the weights that were kept and return the row of ``table.json``."""
        self.averaged.load_state_dict(self.best)
        self.calibrate()
        split, recipe = self.split, self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            valid, _, _ = self.evaluate(split.valid_images, split.valid_labels)
            test, _, open_test = self.evaluate(split.test_images, split.test_labels)
            stages = group_share(self.averaged)
            sampled, _, open_sampled = self.evaluate(split.test_images, split.test_labels, samples=1)
            mean10, _, _ = self.evaluate(split.test_images, split.test_labels, samples=10)
            _, train_nll, _ = self.evaluate(split.train_images, split.train_labels)
            valid_sampled, _, _ = self.evaluate(split.valid_images, split.valid_labels, samples=1)
            valid10, _, _ = self.evaluate(split.valid_images, split.valid_labels, samples=10)
        # The median: a machine that was busy or asleep during an epoch must not be taken for a slow method.
        seconds = statistics.median(row.seconds for row in self.history)
        return {
            "row": recipe.row,
            "seed": self.seed,
            "train_nll": train_nll,
            "valid_error": valid,
            "valid_error_sampled": valid_sampled,
            "valid_error_mean_of_10": valid10,
            "test_error": test,
            "test_error_sampled": sampled,
            "test_error_mean_of_10": mean10,
            "open_test": open_test,
            "open_test_sampled": open_sampled,
            "open_train": self.history[self.best_epoch].open_train,
            "epochs": len(self.history),
            "best_epoch": self.best_epoch + 1,
            "seconds_per_epoch": seconds,
            "seconds": seconds * len(self.history),
            "multiply_adds": multiply_adds(recipe, split.train_images.shape[1], split.classes, open_test, stages),
            "config": {key: value for key, value in asdict(recipe).items() if key != "paper"},
            "paper": recipe.paper and asdict(recipe.paper),
            **self._of_teacher(),
        }

    def _of_teacher(self) -> dict[str, Any]:
        """Return the teacher's errors in per cent, if there is one."""
        if self.teacher is None:
            return {}
        split = self.split
        valid, _, _ = self.evaluate(split.valid_images, split.valid_labels, model=self.teacher)
        test, _, _ = self.evaluate(split.test_images, split.test_labels, model=self.teacher)
        return {"teacher": {"valid_error": valid, "test_error": test}}

    @torch.no_grad()
    def gates(self) -> tuple[Tensor, list[float]]:
        """Return what the first layer's gates do on the validation images; of an ensemble the first network's.

        How often each gate is open for each class, (classes, gates); and a histogram of the probabilities with which
        gates fire, as shares in ``PROBABILITY_BINS`` bins from 0 to 1.
        """
        layer = self.averaged.eval().layer
        assert isinstance(layer, gatelet.nn.ConditionalLinear)
        groups = self.recipe.experts // self.recipe.group_size
        counts, histogram = torch.zeros(self.split.classes, groups), torch.zeros(PROBABILITY_BINS)
        seen: list[tuple[Tensor, Tensor]] = []

        def see(unit: gatelet.StochasticUnit, args: tuple[Tensor], gates: Tensor) -> None:
            seen.append((unit.estimator.fire_probability(args[0]).cpu(), gates.cpu()))

        hook = layer.unit.register_forward_hook(see)
        try:
            images, labels = self.split.valid_images, self.split.valid_labels
            for x, y in zip(images.split(_EVAL_BATCH), labels.split(_EVAL_BATCH), strict=True):
                self.averaged(self._put(x))
                ((probability, opened),) = seen
                seen.clear()
                counts.index_add_(0, y, (opened != 0).float())
                histogram += torch.histc(probability, PROBABILITY_BINS, 0, 1)
        finally:
            hook.remove()
        shares = counts / torch.bincount(labels, minlength=self.split.classes).clamp(min=1)[:, None]
        return shares, (histogram / histogram.sum()).tolist()

    # ---------------------------------------------------------------- checkpoints

    def save(self, path: Path) -> None:
        """Write the state; a crash in the middle leaves the last good file."""
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.recipe.average else None,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "history": [asdict(row) for row in self.history],
            "best": self.best,
            "best_error": self.best_error,
            "best_epoch": self.best_epoch,
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        write_atomically(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same version, recipe, seed and data."""
        state = read_tensors(path, self.device)
        try:
            found = json.loads(state["identity"])
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
        wanted = json.loads(self._identity())
        found = DEFAULTS | found  # a field that a checkpoint does not know yet had its default
        found.setdefault("content", wanted["content"])  # nor could it tell two data sets of the same sizes apart
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            told = ", ".join(f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in differing)
            raise CheckpointError(f"{path}: belongs to another run: {told}; name another --out, or remove the file")
        self.model.load_state_dict(state["model"])
        if self.recipe.average:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)
        self.history = [Epoch(**row) for row in state["history"]]
        self.best, self.best_error, self.best_epoch = state["best"], state["best_error"], state["best_epoch"]

    def _identity(self) -> str:
        recipe = {key: value for key, value in asdict(self.recipe).items() if key not in ("paper", "title")}
        sizes = [len(self.split.train_labels), self.split.train_images.shape[1], self.split.classes]
        return json.dumps(
            {
                "version": VERSION,
                "seed": self.seed,
                "data": [self.split.name, *sizes],
                "content": self.split.content,
                **recipe,
            }
        )
