"""What computes: the backends, one package each, and the one list of them.

A new backend is a package with a class like :class:`gatelet.kernels.backends._protocol.Backend`, and a line here.
"""

from gatelet.kernels.backends._protocol import Backend, Layer, Products, Worth
from gatelet.kernels.backends.dense import Dense
from gatelet.kernels.backends.numba import Numba
from gatelet.kernels.backends.triton import Triton

BACKENDS: dict[str, Backend] = {each.name: each for each in (Dense(), Numba(), Triton())}
"""By name. ``"auto"`` asks those of the tensors' device in this order, and takes dense where none is worth it."""

NAMES = ("auto", *BACKENDS)

__all__ = ["BACKENDS", "NAMES", "Backend", "Layer", "Products", "Worth"]
