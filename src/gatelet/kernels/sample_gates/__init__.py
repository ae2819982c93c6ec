"""sample_gates: stochastic binary gates, their pattern and their counts, in one pass over the logits."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice, check_count, check_noise
from gatelet.kernels import _dispatch
from gatelet.kernels._checks import check_tensor
from gatelet.kernels._pattern import OpenPattern, flat, words
from gatelet.kernels.sample_gates import _reference


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
    the i-th number of Philox 4×32-10 under a seed that is taken of the generator. So a generator gives the same noise
    with every backend and on every device of its kind. Gates carry no gradient; NaN in the logits closes a gate.

    Args:
        logits: (..., G).
        noise: (..., G), uniform on [0, 1), in at least float32.
        generator: the source of the seed; torch's global one of the logits' device by default.
        group_size: consecutive units that share a gate; the pattern is one of N = G · group_size units.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` (one kernel; ``"auto"`` takes it on CUDA devices).

    Returns:
        the gates, their pattern, and how many examples have each gate open.

    Raises:
        ValueError, TypeError: for noise of another shape or dtype, a group size under 1, an unknown backend or a device
            that it does not run on.
        RuntimeError: for a backend that is not there.

    >>> found = sample_gates(torch.tensor([[-9.0, 0.0, 9.0]]), noise=torch.tensor([[0.5, 0.4, 0.5]]))
    >>> found.gates, found.pattern.rows, found.counts
    (tensor([[0., 1., 1.]]), tensor([[6]]), tensor([0, 1, 1], dtype=torch.int32))

    Reference: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """
    check_choice(backend, ("auto", "reference", "triton"), "backend")
    _dispatch.check_backend(backend)
    check_tensor(logits, "logits")
    check_count(group_size, "group_size")
    _dispatch.refuse_transforms("sample_gates", logits, noise)
    if backend == "triton" and (reason := _dispatch.triton_cannot(logits.device, logits.dtype)):
        raise ValueError(f'backend="triton": {reason}')
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
    pattern = OpenPattern(rows, cols, logits.shape[:-1], logits.shape[-1] * group_size)
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
    if _dispatch.runs_triton(backend, logits):
        from gatelet.kernels import _triton

        return _triton.sample(logits.contiguous(), noise if noise is None else noise.contiguous(), seed, group_size)
    return _reference.sample(logits, noise, seed, group_size)


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
