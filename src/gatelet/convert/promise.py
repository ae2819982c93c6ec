"""What a block's gates promise on this machine, before anything is fitted: its time with random gates beside dense."""

from dataclasses import dataclass

import torch
from torch import nn

from gatelet.convert.block import BlockGating, affine_at
from gatelet.convert.report import timed
from gatelet.convert.run import run_block
from gatelet.sparsity import calibrate_thresholds

LITTLE = 0.95
"""Share of the dense time from which on gates are not worth their trouble."""
TOKENS = 64
"""Random tokens that set the threshold for the trial."""


@dataclass(frozen=True)
class Promise:
    """Milliseconds of a block for this many tokens, dense and with its gates at random."""

    tokens: int
    dense_ms: float
    ms: float

    @property
    def saves(self) -> bool:
        """Whether the gates save time."""
        return self.ms < LITTLE * self.dense_ms

    def __str__(self) -> str:
        """Return the times in words."""
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        times = f"{self.ms:.3f} ms for {tokens}, dense {self.dense_ms:.3f}"
        return times if self.saves else f"{times}: promises nothing"


def promise(owner: nn.Module, gating: BlockGating, tokens: int, seconds: float = 0.03) -> Promise:
    """Time the block on random tokens with gates open at its rate, gater included; its state stays what it was.

    Random gates are the worst case: those of real tokens have units in common, which several tokens read once.
    """
    weight = affine_at(owner, gating.block.up).weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(TOKENS, tokens), weight.shape[1], generator=generator).to(weight)
    threshold, training = gating.unit.threshold.clone(), gating.training
    try:
        gating.eval()
        if gating.unit.target_rate is not None:
            calibrate_thresholds(owner, [x], forward=lambda module, batch: run_block(module, gating, batch))
        return Promise(tokens, *timed(gating, x[:tokens], (owner, gating), seconds))
    finally:
        gating.unit.threshold.copy_(threshold)
        gating.train(training)
        gating.reset_statistics()
