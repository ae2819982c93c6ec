"""One token at a time through a feed-forward block with a gater: the kernel's arguments are packed once."""

from collections.abc import Callable

import torch
from torch import Tensor

from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.numba import team
from gatelet.kernels.backends.numba.network_kernels import HIDDEN, LIST, network
from gatelet.kernels.backends.rows import Gated

PARTS = 8
"""Units are split into this many parts, each with its own sums. So results do not depend on the number of threads."""
BYTES = 32
"""For the choice of threads, reading this many bytes counts as passing over one number."""
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


def prepare(given: Gated) -> Run:
    """Return a function from x (D,) and the counts of open units (N,) to the output (O,) and the gates (N,).

    The function returns None, and counts nothing, if a number is not finite, the threshold is NaN, or W2 has changed.
    """
    (middle, width), (units, outputs) = given.hidden.shape, given.down.shape
    words = -(-units // 64)
    stride = LIST + 16 * (64 * -(-words // PARTS) + 1) + 64
    own, shared = HIDDEN + -(-middle // 16) * 64, PARTS * (stride + 4 * outputs)
    run = network.prepare(
        *("by_network", 32),
        failed=0,
        done=0,
        x=None,
        u=given.hidden.data_ptr(),
        c=_address(given.hidden_bias),
        v=given.gates.data_ptr(),
        d=_address(given.gates_bias),
        threshold=given.threshold.data_ptr(),
        w1=given.first.data_ptr(),
        b1=_address(given.first_bias),
        w3=_address(given.third),
        b3=_address(given.third_bias),
        w2=given.down.data_ptr(),
        given=_address(given.original),
        b2=_address(given.down_bias),
        out=None,
        gates=None,
        opened=None,
        width=width,
        middle=middle,
        units=units,
        outputs=outputs,
        code=ACTIVATIONS.index(given.activation),
        scratch=None,
        stride=stride,
        parts=PARTS,
    )
    numbers = (given.first.nbytes + given.down.nbytes) // BYTES
    spare: list[Tensor] = []  # memory of earlier calls, to be used again

    def call(x: Tensor, opened: Tensor) -> tuple[Tensor, Tensor] | None:
        threads, scratch = team.threads(numbers), spare.pop() if spare else None
        if scratch is None or scratch.shape[0] < shared + threads * own:
            scratch = x.new_empty(shared + threads * own, dtype=torch.uint8)
        out, gates = x.new_empty(outputs), x.new_empty(units)
        answer = run(threads, x.data_ptr(), out.data_ptr(), gates.data_ptr(), opened.data_ptr(), scratch.data_ptr())
        spare.append(scratch)
        return None if answer[team.FIRST] else (out, gates)

    call.kept = given  # type: ignore[attr-defined]  # kept alive: the packed addresses point at it
    return call


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
