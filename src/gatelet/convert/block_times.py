"""The time of one converted block on this machine, with random gates and dense, before anything is fitted."""

from dataclasses import dataclass

import torch
from torch import nn

from gatelet.convert.block import BlockGating, affine_at
from gatelet.convert.report import in_turns
from gatelet.convert.rows import RowsFFN, all_open
from gatelet.convert.run import run_block
from gatelet.nn.conditional_layer import fully_open
from gatelet.sparsity import calibrate_thresholds

LITTLE = 0.95
"""Gates save time if they take less than this share of the dense time."""
TOKENS = 64
"""How many random tokens set the thresholds for the measurement."""


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of a block for some tokens, with random gates: as converted, and as ``keep_rows`` would decode."""

    tokens: int
    dense_ms: float
    ms: float
    kept_open_ms: float | None = None
    """With float32 rows kept (:func:`gatelet.convert.keep_rows`) and all units open; None where that is impossible."""
    kept_ms: float | None = None
    """With float32 rows kept, and with gates."""

    @property
    def saves(self) -> bool:
        """Whether the gates save time in the converted block."""
        return self.ms < LITTLE * self.dense_ms

    @property
    def saves_kept(self) -> bool:
        """Whether the gates save time compared with the same kernels and all units open."""
        kept, kept_open = self.kept_ms, self.kept_open_ms
        return kept is not None and kept_open is not None and kept < LITTLE * kept_open

    def __str__(self) -> str:
        """Return the times in words."""
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        said = f"{self.ms:.3f} ms for {tokens}, dense {self.dense_ms:.3f}" + (": saves no time" * (not self.saves))
        if self.kept_ms is None:
            return said
        nothing = ": saves no time" * (not self.saves_kept)
        return f"{said}; with keep_rows {self.kept_ms:.3f}, all units open {self.kept_open_ms:.3f}{nothing}"


def time_block(
    owner: nn.Module, gating: BlockGating, tokens: int, others: int = 0, seconds: float = 0.03
) -> BlockTimes:
    """Time the block on random tokens, gater included, with gates open at its rate; its state does not change.

    Random gates are the worst case: real tokens often open the same units, whose weights are then read once for all.
    ``others``: bytes of other weights that are read between two runs.
    """
    block = gating.block
    weight = affine_at(owner, block.up).weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(TOKENS, tokens), weight.shape[1], generator=generator).to(weight)
    threshold, training, some = gating.unit.threshold.clone(), gating.training, x[:tokens]
    try:
        gating.eval()
        if gating.unit.target_rate is not None:
            calibrate_thresholds(owner, [x], forward=lambda module, batch: run_block(module, gating, batch))

        def dense() -> None:
            with fully_open(gating):
                run_block(owner, gating, some)

        runs = {"dense": dense, "gated": lambda: run_block(owner, gating, some)}
        if _can_be_kept(owner, gating):
            kept, kept_open = RowsFFN(owner, gating, "float32"), RowsFFN(owner, all_open(owner, block), "float32")
            runs |= {"kept": lambda: kept(some), "kept open": lambda: kept_open(some)}
        found = in_turns(runs, seconds, others, x)
        return BlockTimes(tokens, found["dense"], found["gated"], found.get("kept open"), found.get("kept"))
    finally:
        gating.unit.threshold.copy_(threshold)
        gating.train(training)
        gating.reset_statistics()


def _can_be_kept(owner: nn.Module, gating: BlockGating) -> bool:
    block = gating.block
    on_cpu = affine_at(owner, block.up).weight.device.type == "cpu"
    return on_cpu and block.kind == "module" and gating.unit.estimator.settles() and gating.unit.target_rate is not None
