"""The paper's network, one recipe with one seed: SGD or AdamW, max-norm, early stopping, a row per epoch."""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatelet
from gatelet.kernels.choose import by_kind
from gatelet_lab.data import Split
from gatelet_lab.training.fit import Trainer
from gatelet_lab.training.model import Dense, Ensemble, PaperNet, build, group_share, multiply_adds, penalty
from gatelet_lab.training.recipe import DEFAULTS, Recipe
from gatelet_lab.training.world import ALONE, World

VERSION = 1  # of the checkpoints
_CALIBRATION = 5000  # training images that set the threshold
_EVAL_BATCH = 1000
PROBABILITY_BINS = 100


@dataclass
class Epoch:
    """The figures of one epoch; errors in per cent, open gates as a share."""

    epoch: int
    train_loss: float
    valid_error: float
    open_train: float
    open_valid: float
    seconds: float


class PaperTrainer(Trainer[tuple[Tensor, Tensor], Epoch]):
    """One recipe, one seed: :func:`gatelet_lab.training.fit.fit` until ``finished``, then ``result``.

    The order of the examples follows from the seed and the epoch, the noise from the saved random state.
    """

    row_type = Epoch

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        split: Split,
        device: str = "cpu",
        teacher: PaperNet | Ensemble | None = None,
        world: World = ALONE,
    ) -> None:
        super().__init__(world)
        share, more = recipe.augmentation.teacher_share, recipe.optimiser.more_training
        if bool(share) != (teacher is not None):
            raise ValueError(
                f"teacher: teacher_share is {share}, and a teacher was {'not given' if teacher is None else 'given'}"
            )
        self.teacher = teacher
        split = split.with_more_training(more) if more else split
        self.recipe, self.seed, self.split = recipe, seed, split
        self.device = torch.device(device)
        torch.manual_seed(seed)
        self.model = build(recipe, split.train_images.shape[1], split.classes).to(self.device)
        # The model that is validated and tested: these weights, or their moving average.
        self.averaged = copy.deepcopy(self.model) if recipe.optimiser.average else self.model
        gated = [layer for layer in self.model.layers if not isinstance(layer, Dense)]
        gater = [parameter for layer in gated for parameter in layer.gater.parameters()]
        known = {id(parameter) for parameter in gater}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        self.optimizer = self._optimizer(rest, gater)
        self.limits = self._limits(known)
        self.train_images, self.train_labels = self._put(split.train_images), self._put(split.train_labels)
        self.parts = math.ceil(len(self.train_labels) / recipe.optimiser.batch)  # steps per epoch
        self.best: dict[str, Any] = {}
        self.best_error, self.best_epoch = math.inf, -1
        self._begin_epoch()

    def _optimizer(self, rest: list[nn.Parameter], gater: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimiser = self.recipe.optimiser
        groups = [{"params": rest, "scale": 1.0}, {"params": gater, "scale": optimiser.gater_rate}]
        if optimiser.optimizer == "sgd":
            return torch.optim.SGD(
                groups, optimiser.rate, optimiser.momentum, weight_decay=optimiser.weight_decay, fused=True
            )
        return torch.optim.AdamW(groups, optimiser.rate, (0.9, 0.99), weight_decay=optimiser.weight_decay, fused=True)

    def _limits(self, gater: set[int]) -> list[tuple[Tensor, float]]:
        """Return the weights whose rows' lengths are limited, with the limit."""
        optimiser, outputs = self.recipe.optimiser, {id(network.output) for network in self.model.networks}
        limits = (
            (
                module.weight,
                optimiser.output_max_norm
                if id(module) in outputs
                else optimiser.gater_max_norm
                if id(module.weight) in gater
                else optimiser.max_norm,
            )
            for module in self.model.modules()
            if isinstance(module, nn.Linear)
        )
        return [(weight, limit) for weight, limit in limits if limit is not None]

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    # ---------------------------------------------------------------- an epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``patience`` of them brought nothing better."""
        done = len(self.history)
        return done >= self.recipe.optimiser.epochs or done - 1 - self.best_epoch >= self.recipe.optimiser.patience

    @by_kind()
    def advance(self, stop: Callable[[], bool] = lambda: False) -> Epoch:
        """Train one epoch, calibrate, validate, and keep the weights if they are the best so far."""
        self._begin_epoch()
        self.model.train()
        row = super().advance(stop)
        # A cosine schedule ends at zero, so the last weights are kept: there is no epoch to choose.
        if row.valid_error < self.best_error or self.recipe.optimiser.schedule == "cosine":
            self.best_error, self.best_epoch = row.valid_error, row.epoch
            self.best = copy.deepcopy(self.averaged.state_dict())
        return row

    def _begin_epoch(self) -> None:
        self._began, self._done, self._loss_sum, self._open_sum = time.perf_counter(), 0, 0.0, 0.0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of an epoch's batches."""
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.history))
        indices = torch.randperm(len(self.train_labels), generator=order).to(self.device)
        for index in indices.split(self.recipe.optimiser.batch):
            yield self.train_images[index], self.train_labels[index]

    def rates(self) -> list[float]:
        """Return the learning rates: the gater has its own."""
        rate = self.rate(len(self.history) + self._done / self.parts)
        return [rate * group["scale"] for group in self.optimizer.param_groups]

    def place(self) -> str:
        """Return the epoch."""
        return f"epoch {len(self.history) + 1}"

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the members' losses and sparsity penalties, for this process's part of the batch."""
        count, changes, world = len(batch[1]), self.recipe.augmentation, self.world
        rows = world.part(count)
        x, y = self._mixed(batch[0])[rows], batch[1][rows]
        if changes.adversarial:
            moved = math.ceil(changes.adversarial_share * count)
            own = world.part(moved, count)
            here = own.stop - own.start
            with world.noise(own, moved):
                x = torch.cat([self._adversary(x[:here], y[:here]), x[here:]])
        total = torch.zeros((), device=self.device)
        target = self._target(x, y)
        for network in self.model.networks:  # each learns from its own loss: they share neither weights nor a tape
            with world.noise(rows, count), self._products(), gatelet.Tape() as tape:
                scores = network(x)
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
                losses = F.cross_entropy(scores, target, reduction="none", label_smoothing=changes.label_smoothing)
            total = total + world.mean(tape.surrogate(losses), count)
            self._loss_sum += losses.detach().sum().item() / len(self.model.networks)
        self._open_sum += _of(self.model, len(y)) / count
        return total + penalty(self.model)

    def after_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Limit weights to their max-norm, and update their moving average."""
        with torch.no_grad():
            for weight, limit in self.limits:
                norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
                if (norms > limit).any():
                    weight.mul_((limit / norms).clamp(max=1))
        self._done += 1
        if self.recipe.optimiser.average:
            self._average(len(self.history) * self.parts + self._done)

    def look(self) -> Epoch:
        """Calibrate, validate, and return the epoch."""
        self.calibrate()
        error, _, share = self.evaluate(self.split.valid_images, self.split.valid_labels)
        loss, opened = self.world.sums(self._loss_sum, self._open_sum)
        return Epoch(
            epoch=len(self.history),
            train_loss=loss / max(1, len(self.train_labels)),
            valid_error=error,
            open_train=opened / max(1, self._done),
            open_valid=share,
            seconds=time.perf_counter() - self._began,
        )

    def rate(self, epoch: float) -> float:
        """Return the learning rate at a point in training, in epochs; exponential decay goes in steps of one."""
        optimiser = self.recipe.optimiser
        if optimiser.schedule == "exponential":
            return optimiser.rate * optimiser.rate_decay ** int(epoch)
        falling = max(0.0, epoch - 1) / max(1, optimiser.epochs - 1)
        return optimiser.rate * min(1.0, epoch + 0.01) * (1 + math.cos(math.pi * falling)) / 2

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Update the moving average of the weights (and running statistics) after a step."""
        keep = min(self.recipe.optimiser.average, step / (step + 10))
        for average, now in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point() and average.dim() > 0:  # a threshold may be infinite, and is not averaged
                average.lerp_(now, 1 - keep)
            else:
                average.copy_(now)

    def _mixed(self, x: Tensor) -> Tensor:
        """Return the batch with each of its last images averaged with the one before it.

        Reference: H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018,
        arXiv:1710.09412; with a teacher's probabilities as the target: L. Beyer et al., "Knowledge distillation: A good
        teacher is patient and consistent", 2022, arXiv:2106.05237.
        """
        count = round(self.recipe.augmentation.mixup_share * len(x))
        if not count:
            return x
        own = x[-count:]
        return torch.cat([x[:-count], own.roll(1, 0).lerp(own, torch.rand(count, 1).to(x))])

    def _adversary(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the images, each moved by the same length up the gradient of its loss (an ensemble's summed loss).

        Reference: T. Miyato, A. M. Dai, I. Goodfellow, "Adversarial Training Methods for Semi-Supervised Text
        Classification", 2016, arXiv:1605.07725, eqs. 1 and 4; the idea: Goodfellow, Shlens, Szegedy 2014,
        arXiv:1412.6572.
        """
        moved = x.clone().requires_grad_()
        with (
            self._products(),
            gatelet.Tape(),
        ):  # without a tape only the gradient that passes through the gates counts
            each = [F.cross_entropy(network(moved), y, reduction="sum") for network in self.model.networks]
        (gradient,) = torch.autograd.grad(each, moved)
        return x + self.recipe.augmentation.adversarial * F.normalize(gradient, dim=1)

    def _products(self) -> torch.autocast:
        """Return the context in which matrix products are taken in bfloat16, or one that does nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.optimiser.bfloat16)

    @torch.no_grad()
    def _target(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the targets: labels, or class probabilities that are partly the teacher's.

        Reference: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
        arXiv:1503.02531.
        """
        if self.teacher is None:
            return y
        with self._products():
            known = self.teacher(x).float().softmax(-1)
        target: Tensor = known.lerp(F.one_hot(y, known.shape[-1]).float(), 1 - self.recipe.augmentation.teacher_share)
        return target

    @by_kind()
    def calibrate(self) -> None:
        """Set the test-time threshold on some training images."""
        if self.recipe.gated:
            images = self.split.train_images[:_CALIBRATION]
            batches = [self._put(batch[self.world.part(len(batch))]) for batch in images.split(_EVAL_BATCH)]
            gatelet.sparsity.calibrate_thresholds(self.averaged, batches)

    @torch.no_grad()
    @by_kind()
    def evaluate(
        self, images: Tensor, labels: Tensor, samples: int = 0, model: PaperNet | Ensemble | None = None
    ) -> tuple[float, float, float]:
        """Return error (per cent), NLL and share of open gates: deterministic, or the mean of some samples.

        The network is the one trained here (its moving average if there is one), or another ``model``. Each process
        takes its part of every batch.
        """
        model = (self.averaged if model is None else model).eval()
        wrong, nll, share = 0.0, 0.0, 0.0
        for x, y in zip(images.split(_EVAL_BATCH), labels.split(_EVAL_BATCH), strict=True):
            rows, count = self.world.part(len(y)), len(y)
            x, y = self._put(x[rows]), self._put(y[rows])
            if samples == 0:
                probability = model(x).log_softmax(-1)
                share += _of(model, len(y))
            else:
                draws = []
                with gatelet.sampling(model), self.world.noise(rows, count):
                    for _ in range(samples):
                        draws.append(model(x).log_softmax(-1))
                        share += _of(model, len(y)) / samples
                probability = torch.stack(draws).logsumexp(0) - math.log(samples)
            wrong += int((probability.argmax(-1) != y).sum())
            nll += F.nll_loss(probability, y, reduction="sum").item()
        wrong, nll, share = self.world.sums(wrong, nll, share)
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
            stages = group_share(self.averaged, self.world.sums)
            sampled, _, open_sampled = self.evaluate(split.test_images, split.test_labels, samples=1)
            mean10, _, _ = self.evaluate(split.test_images, split.test_labels, samples=10)
            _, train_nll, _ = self.evaluate(split.train_images, split.train_labels)
            valid_sampled, _, _ = self.evaluate(split.valid_images, split.valid_labels, samples=1)
            valid10, _, _ = self.evaluate(split.valid_images, split.valid_labels, samples=10)
        # The median, so that an epoch during which the machine was busy or asleep does not count.
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
            "config": recipe.flat(),
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
        """Return what the first layer's gates do on the validation images; for an ensemble, those of its first network.

        How often each gate is open for each class, (classes, gates); and a histogram of the probabilities with which
        gates fire, as shares in ``PROBABILITY_BINS`` bins from 0 to 1.
        """
        layer = self.averaged.eval().layer
        assert isinstance(layer, gatelet.nn.ConditionalLinear)
        groups = self.recipe.model.experts // self.recipe.model.group_size
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

    def state(self) -> dict[str, Any]:
        """Return weights, their average, random states and what is kept so far."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.recipe.optimiser.average else None,
            "random": torch.get_rng_state(),
            "best": self.best,
            "best_error": self.best_error,
            "best_epoch": self.best_epoch,
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.model.load_state_dict(state["model"])
        if self.recipe.optimiser.average:
            self.averaged.load_state_dict(state["averaged"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.best, self.best_error, self.best_epoch = state["best"], state["best_error"], state["best_epoch"]

    def identity(self) -> dict[str, Any]:
        """Return version, recipe, seed and data."""
        recipe = {key: value for key, value in self.recipe.flat().items() if key != "title"}
        sizes = [len(self.split.train_labels), self.split.train_images.shape[1], self.split.classes]
        own = {"version": VERSION, "seed": self.seed, "data": [self.split.name, *sizes]}
        return {**own, "content": self.split.content, **recipe}

    def of_older(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the checkpoint with what earlier versions did not save: new fields, the data's content, steps."""
        known = {**DEFAULTS, "content": self.split.content, **json.loads(state["identity"])}
        epochs = state["history"]
        seconds = sum(row["seconds"] for row in epochs)
        return {"steps": len(epochs) * self.parts, "seconds": seconds, **state, "identity": json.dumps(known)}


def _of(model: PaperNet | Ensemble, examples: int) -> float:
    """Return the share of open gates times the number of examples that it was counted over (which may be 0)."""
    return model.active_fraction * examples if examples else 0.0
