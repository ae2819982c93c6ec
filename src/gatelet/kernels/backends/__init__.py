"""The backends, which compute the products: one package each, and the list of them.

A new backend is a package with a class like :class:`gatelet.kernels.backends._protocol.Backend`, and a line here.
"""

from gatelet.kernels.backends._protocol import Backend as Backend
from gatelet.kernels.backends._protocol import Layer as Layer
from gatelet.kernels.backends._protocol import Products as Products
from gatelet.kernels.backends._protocol import Worth as Worth
from gatelet.kernels.backends.dense import Dense
from gatelet.kernels.backends.numba import Numba
from gatelet.kernels.backends.triton import Triton

BACKENDS: dict[str, Backend] = {each.name: each for each in (Dense(), Numba(), Triton())}
"""By name. ``"auto"`` asks those of the tensors' device in this order, and takes dense where none is expected to be
faster."""

NAMES = ("auto", *BACKENDS)
