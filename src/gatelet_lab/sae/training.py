"""Training a sparse autoencoder on cached activations, resumable, in one process or several."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gatelet import RowAdam
from gatelet.nn import SparseAutoencoder
from gatelet_lab.sae.activations import Cache
from gatelet_lab.training.fit import Trainer
from gatelet_lab.training.world import ALONE, World

if TYPE_CHECKING:
    from gatelet_lab.commands.train_sae import TrainSAE

VERSION = 1
SAMPLE = 20_000
"""Activations that scale, mean and thresholds start from."""
COOL = 0.2
"""The last share of the steps, over which the learning rate falls to zero."""


@dataclass
class Row:
    """Means over the steps since the last row, on the batches that were trained on."""

    step: int
    tokens: int
    loss: float
    explained: float
    l0: float
    dead: int
    seconds: float


class SAETrainer(Trainer[Tensor, Row]):
    """An autoencoder on cached activations. What a step does follows from the state and the step's number.

    Of several processes each sees its part of every batch; rows of weights without a gradient stay untouched.
    """

    row_type = Row

    def __init__(self, options: "TrainSAE", cache: Cache, world: World = ALONE) -> None:
        super().__init__(world)
        self.options, self.cache = options, cache
        self.total = options.tokens // options.batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.sae = SparseAutoencoder(
                cache.width,
                options.latents,
                options.activation,
                options.k,
                sparsity_weight=options.sparsity,
                dead_after=options.dead_after,
                groups=options.groups,
                open_groups=options.open_groups,
                sparse_grad=True,
            )
        self.sae.start_from(cache.sample(SAMPLE))
        self.optimizer = RowAdam(self.sae.parameter_groups(options.rate))
        self._full_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._stream: Iterator[Tensor] | None = None

    @property
    def finished(self) -> bool:
        """Whether all tokens were trained on."""
        return self.steps >= self.total

    def batches(self) -> Iterator[Tensor]:
        """Yield this process's part of each batch, up to the next row."""
        if self._stream is None:
            self._stream = self.cache.batches(self.options.batch, self.options.seed, self.steps)
        count = min(self.options.every - self.steps % self.options.every, self.total - self.steps)
        for batch in islice(self._stream, count):
            yield batch[self.world.rank :: self.world.size]

    def rates(self) -> list[float]:
        """Return the learning rates: they grow in the warm-up and fall in the last fifth."""
        total = max(1, self.total)
        rise = min(1.0, (self.steps + 1) / max(1, self.options.warm_up))
        share = rise * min(1.0, (total - self.steps) / max(1.0, COOL * total))
        return [rate * share for rate in self._full_rates]

    def loss(self, batch: Tensor) -> Tensor:
        """Return the autoencoder's loss."""
        self.sae.train()
        found = self.sae.loss(batch, sparsity=min(1.0, (self.steps + 1) / max(1, self.options.warm_up)))
        left, spread = (batch - found.output).square().sum(), (batch - batch.mean(0)).square().sum()
        l0 = found.code.l0.float().mean()
        self._sums += torch.stack([found.total.detach(), left.detach(), spread, l0.detach(), torch.ones(())]).double()
        total: Tensor = found.total
        return total

    def look(self) -> Row:
        """Return the means over the steps since the last row."""
        loss, left, spread, l0, count = self.world.sums(*self._sums.tolist())
        self._sums.zero_()
        tokens = self.steps * self.options.batch
        explained = 1 - left / max(spread, 1e-30)
        return Row(self.steps, tokens, loss / count, explained, l0 / count, self.sae.dead, self.seconds)

    # ---------------------------------------------------------------- checkpoints

    def identity(self) -> dict[str, Any]:
        """Return version, settings and activations."""
        from gatelet_lab.commands.train_sae import FREE

        told = {key: str(value) for key, value in asdict(self.options).items() if key not in FREE}
        return {"version": VERSION, "activations": self.cache.identity, **told}

    def state(self) -> dict[str, Any]:
        """Return the autoencoder's state."""
        return {"sae": self.sae.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the autoencoder's state."""
        self.sae.load_state_dict(state["sae"])
