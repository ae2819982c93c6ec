"""sample_gates: stochastic binary gates, their pattern and their counts, in one pass over the logits."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice, check_count, check_noise
from gatelet.kernels import choose
from gatelet.kernels.backends import Layer
from gatelet.kernels.ops._checks import check_tensor
from gatelet.kernels.ops._declare import refuse_transforms
from gatelet.kernels.pattern import Bits, OpenPattern, bits_of, flat, spread, words


class SampledGates(NamedTuple):
    """What :func:`sample_gates` returns.

    Attributes:
        gates: (..., G), 0 or 1.
        pattern: of these gates; goes to :func:`gatelet.kernels.gated_linear` and the other ops.
        counts: (G,) int32, how many examples have each gate open.
    """

    gates: Tensor
    pattern: OpenPattern
    counts: Tensor


def sample_gates(
    logits: Float[Tensor, "*lead G"],
    *,
    noise: Float[Tensor, "*lead G"] | None = None,
    generator: torch.Generator | None = None,
    group_size: int = 1,
    backend: str = "auto",
) -> SampledGates:
    """Draw gates h = 1[u < σ(a)] (eq. 3 of the paper, corrected), with their pattern and counts.

    The uniform noise u is given, or drawn where it is used and never written: number i of the gates, in order, gets
    the i-th number of Philox 4×32-10 under a seed that is taken from the generator. So a generator gives the same noise
    with every backend and on every device of its kind. Gates carry no gradient; NaN in the logits closes a gate.

    Args:
        logits: (..., G).
        noise: (..., G), uniform on [0, 1), in at least float32.
        generator: the source of the seed; torch's global one of the logits' device by default.
        group_size: consecutive units that share a gate; the pattern is one of N = G · group_size units.
        backend: ``"auto"``, ``"dense"``, ``"triton"`` (one kernel; ``"auto"`` takes it on CUDA devices).

    Returns:
        the gates, their pattern, and how many examples have each gate open.

    Raises:
        ValueError, TypeError: for noise of another shape or dtype, a group size under 1, an unknown backend or a device
            that it does not run on.
        RuntimeError: for a backend that is not available.

    >>> found = sample_gates(torch.tensor([[-9.0, 0.0, 9.0]]), noise=torch.tensor([[0.5, 0.4, 0.5]]))
    >>> found.gates, found.pattern.rows, found.counts
    (tensor([[0., 1., 1.]]), tensor([[6]]), tensor([0, 1, 1], dtype=torch.int32))

    Reference: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """
    check_choice(backend, ("auto", "dense", "triton"), "backend")
    choose.check_backend(backend)
    check_tensor(logits, "logits")
    check_count(group_size, "group_size")
    refuse_transforms("sample_gates", logits, noise)
    choose.settled(backend, _layer(logits))
    seed = None
    if noise is None:
        source = logits.device if generator is None else generator.device
        seed = torch.randint(1 << 62, (), device=source, generator=generator).to(logits.device, non_blocking=True)
    else:
        check_noise(noise, logits.shape)
        wanted = torch.promote_types(logits.dtype, torch.float32)
        if noise.dtype != wanted:
            raise TypeError(f"noise must have dtype {wanted} for logits of {logits.dtype}, not {noise.dtype}")
        noise = flat(noise.detach())
    gates, rows, cols, counts = torch.ops.gatelet.sample_gates(flat(logits.detach()), noise, seed, group_size, backend)
    pattern = OpenPattern(Bits(rows, cols, group_size), logits.shape[:-1], logits.shape[-1] * group_size)
    return SampledGates(gates.view(logits.shape), pattern, counts)


@torch.library.custom_op(
    "gatelet::sample_gates",
    mutates_args=(),
    schema="(Tensor logits, Tensor? noise, Tensor? seed, int group_size, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _sample_gates(
    logits: Tensor, noise: Tensor | None, seed: Tensor | None, group_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = choose.builder(backend, _layer(logits))
    draw = getattr(run, "sample", naive)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = draw(logits, noise, seed, group_size)
    return found


def _layer(logits: Tensor) -> Layer:
    return Layer(0, 0, 0, 1, logits.dtype, logits.device, False)


def naive(
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


@_sample_gates.register_fake
def _(
    logits: Tensor, noise: Tensor | None, seed: Tensor | None, group_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, gates = logits.shape
    units = gates * group_size
    return (
        logits.new_empty((batch, gates)),
        logits.new_empty((batch, words(units)), dtype=torch.int64),
        logits.new_empty((units, words(batch)), dtype=torch.int64),
        logits.new_empty((gates,), dtype=torch.int32),
    )


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
