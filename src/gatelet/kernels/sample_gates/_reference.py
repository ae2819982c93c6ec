"""sample_gates in plain PyTorch."""

import torch
from torch import Tensor

from gatelet.kernels._pattern import bits_of, spread


def sample(
    logits: Tensor, noise: Tensor | None, seed: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gates (B, G), their pattern by example and by unit, and how many examples have each gate open."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if noise is None:
        assert seed is not None, "without noise there is a seed"
        noise = uniform(seed, logits.numel()).view(logits.shape)
    is_open = noise < exact.sigmoid()
    mask = spread(is_open, logits.shape[1] * group)
    return is_open.to(logits.dtype), bits_of(mask), bits_of(mask.t()), is_open.sum(0, dtype=torch.int32)


def uniform(seed: Tensor, count: int) -> Tensor:
    """Return ``count`` float32 numbers on [0, 1): the first word of Philox 4×32-10 at counters 0, 1, 2, …"""
    word = 0xFFFFFFFF

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        # int64 wraps around; its bits are those of the unsigned product.
        both = a * b
        return (both >> 32) & word, both & word

    counter = torch.arange(count, device=seed.device)
    c0, c1 = counter & word, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high2, low2 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    # 31 bits, folded, times the largest scale whose product stays under 1 in float32.
    return torch.where(c0 >= 1 << 31, word - c0, c0).float() * 4.6566127342e-10
