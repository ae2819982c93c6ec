"""What a backend is: cheap questions about what it can run and how fast, and the products that every op is made of."""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from gatelet.kernels.pattern import Form

Kernel = Literal["dense", "unit", "group"]


class Layer(NamedTuple):
    """The layer for which a backend is wanted.

    Attributes:
        batch: B, examples.
        width: D, features of each product.
        units: N.
        group: consecutive units that share a gate.
        dtype: of the numbers.
        device: where they are.
        gradients: whether a backward pass follows.
        rate: the share of open gates, if the caller declares it; else None.
    """

    batch: int
    width: int
    units: int
    group: int
    dtype: torch.dtype
    device: torch.device
    gradients: bool
    rate: float | None = None


class Worth(NamedTuple):
    """What a backend expects of a layer.

    Attributes:
        below: the share of open gates below which it is faster than dense: 0 for never, 1 for always.
        yes: the reason for taking it below that share, in words.
        no: the reason for not taking it above.
    """

    below: float
    yes: str = ""
    no: str = ""


class Products(Protocol):
    """The products on a pattern of open (example, unit) pairs; x (B, D), W (N, D), a coefficient C.

    A number per pair, such as C, is (B, N) where the pattern is :class:`~gatelet.kernels.pattern.Bits` or None, and
    (P,) in the pattern's order where it is :class:`~gatelet.kernels.pattern.Lists`. Without a pattern the pairs are
    those whose gate is not zero. Closed pairs count as zero, whatever is stored there. A weight may have any strides.

    A backend may also have ``ffn(x, w1, b1, gate, activation, w2, b2)``, W2 by unit. It returns the result of both
    layers of ``gated_ffn`` in one pass without gradients, or None for a layer it cannot take.

    It may have ``gradients(upper, pre, gate, x, w1, w2, pattern, need, activation)``, W2 by unit or None. It returns
    the gradients of x, w1, b1, the gates and w2 in one pass, or None if the products have to form them.
    """

    def pattern(self, gate: Tensor, units: int) -> Form | None:
        """Return the pattern of gates (B, G), both orders written."""

    def promise(self, gate: Tensor, units: int, keep: bool) -> Form | None:
        """Return the pattern of gates for the next ``dots``, which may fill it in; None if ``dots`` reads no pattern.

        ``keep`` says that a backward pass will read it too.
        """

    def dots(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        pattern: Form | None,
        *,
        keep: bool = False,
        activation: str = "identity",
        fill: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return act(x Wᵀ + b) ∘ gate at open pairs and, to ``keep``, x Wᵀ + b there (else an empty tensor).

        Closed pairs are zero in the first, and with ``fill`` in both; without ``fill`` they may hold anything.
        """

    def by_example(
        self,
        coefficient: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Form | None,
        gate: Tensor | None = None,
        *,
        own: bool = False,
    ) -> Tensor:
        """Return y (B, D), y[b] = bias + Σ_n C[b, n] W[n] over open n.

        ``own`` says that C is what these products' own ``dots`` or ``pointwise`` returned, with the same pattern.
        """

    def by_unit(
        self,
        coefficient: Tensor,
        x: Tensor,
        pattern: Form | None,
        *,
        need_rows: bool = True,
        need_sum: bool = False,
        transposed: bool = False,
        own: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return V, V[n] = Σ_b C[b, n] x[b] over open b, and the sums Σ_b C[b, n]; None for what is not needed.

        V is (N, D) or, ``transposed``, (D, N), in any strides.
        """

    def pointwise(
        self,
        upper: Tensor,
        pre: Tensor,
        gate: Tensor,
        pattern: Form | None,
        wide: Form | None = None,
        *,
        need_gate: bool,
        need_coefficient: bool,
        activation: str = "identity",
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return, from the gradient g of act(z) ∘ gate: C = g · gate · act'(z) at open pairs, and the gate's gradient.

        The second, Σ g · act(z) over a group's units, is formed on the ``wide`` pattern if there is one. It may be
        written to ``into``.
        """


class Backend(ABC):
    """A backend as the chooser sees it: asking imports and compiles nothing.

    Attributes:
        name: what users write for ``backend=``.
        device: the type of device for which ``"auto"`` considers it; empty for any.
        by_gate: whether its products read only the gates, so that no pattern is needed.
        looks: whether ``"auto"`` may look at the gates (not where the host would wait for a device).
        spares: from this many bytes of a matrix (B, N) on, a second pass is taken to save its memory; None for never.
    """

    name: str
    device: str
    by_gate: bool
    looks: bool
    spares: int | None

    @abstractmethod
    def missing(self) -> str | None:
        """Return why the backend cannot run in this process, or None if it can."""

    @abstractmethod
    def cannot(self, layer: Layer) -> str | None:
        """Return why the backend cannot run this layer, or None if it can."""

    @abstractmethod
    def worth(self, layer: Layer) -> Worth:
        """Return the share of open gates below which it is expected to be faster than dense."""

    @abstractmethod
    def kernel(self, layer: Layer) -> Kernel:
        """Return which of its kernels runs."""

    def measure(self, enabled: bool) -> None:  # noqa: B027 (few backends have anything to time)
        """Let ``worth`` use costs timed on this machine, or (``False``) again the fixed ones."""

    @property
    @abstractmethod
    def products(self) -> Any:
        """The products (:class:`Products`): a module, imported at the first use."""
