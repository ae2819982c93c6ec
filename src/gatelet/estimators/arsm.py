"""ARM for classes: the loss where two classes exchange their noise."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import AnyKind, Evaluating, Objective, evaluate
from gatelet.estimators._kinds import one_hot
from gatelet.estimators._noise import wide


class ARSM(Evaluating):
    """Losses at gates whose noise is swapped between two classes, weighted by it (augment, REINFORCE, swap, merge).

    π = softmax(−g) for Gumbel noise g, which is Dirichlet(1), so h = argmin_i π_i·exp(−a_i). With h^{c⇌j} the gates
    where every variable's π_c and π_j change places,
    ĝ_c = (1/C) Σ_j (L(h^{c⇌j}) − (1/C) Σ_m L(h^{m⇌j}))·(1 − C·π_j), averaged over replicas.
    (All references j are used, all variables swap the same pair of classes.)

    Bias: none, for one layer of independent variables.
    Variance: what the losses at all swaps have in common cancels; with two classes it is ARM of a_1 − a_2. No state.

    Cost: C(C − 1)/2 + 1 evaluations per replica, for any number of variables.

    Args:
        kind: ``"categorical"``, the only form.

    >>> import torch
    >>> a = torch.zeros(1, 1, 2, requires_grad=True)                  # one example, one variable, two classes
    >>> noise = torch.tensor([[[[3.0, 1.0]]]]).log()                  # π = (¼, ¾): h is the first class
    >>> price = torch.tensor([1.0, 3.0])
    >>> ARSM().surrogate(lambda h: (h * price).sum((-1, -2)), a, noise).sum().backward()
    >>> a.grad                                                        # ±(1 − 3)·(½ − ¼)
    tensor([[[-0.5000,  0.5000]]])

    Reference: M. Yin, Y. Yue, M. Zhou, "ARSM: Augment-REINFORCE-Swap-Merge Estimator for Gradient Backpropagation
    Through Categorical Variables", 2019, arXiv:1905.01413.
    """

    unbiased = True
    kinds = ("categorical",)
    reference = "Yin, Yue, Zhou 2019, arXiv:1905.01413"

    def __init__(self, kind: AnyKind = "categorical") -> None:
        super().__init__(kind)

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead V C"],
        gates: Float[Tensor, "K *lead V C"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead V C"]:
        """Return (1/C) Σ_j (L at c⇌j, less its mean over c)·(1 − C·π_j)."""
        exact = logits.to(torch.promote_types(noise.dtype, wide(logits)))
        classes = exact.shape[-1]
        pairs = list(itertools.combinations(range(classes), 2))
        at = losses.unsqueeze(0)  # the first row: nothing is swapped
        if pairs:
            swapped = noise[..., _swaps(classes, noise.device)].movedim(-2, 0)  # (pairs, K, *lead, V, C)
            elsewhere = one_hot((exact + swapped).argmax(-1), swapped).to(gates.dtype)
            others = evaluate(objective, elsewhere.flatten(0, 1), self.event_dims).unflatten(0, swapped.shape[:2])
            at = torch.cat([at, others.to(losses.dtype)])
        row = torch.zeros(classes, classes, dtype=torch.long, device=logits.device)
        for index, (one, other) in enumerate(pairs, start=1):
            row[one, other] = row[other, one] = index
        each = at[row].to(exact.dtype)  # (c, j, K, *lead)
        centred = (each - each.mean(0)).movedim((0, 1), (-2, -1))  # (K, *lead, c, j)
        weight = 1 / classes - (-noise).softmax(-1).to(exact.dtype)  # (K, *lead, V, j)
        return weight @ centred.transpose(-1, -2)


def _swaps(classes: int, device: torch.device) -> Tensor:
    """Return for every pair of classes the order of all classes in which these two changed places."""
    orders = torch.arange(classes, device=device).repeat(classes * (classes - 1) // 2, 1)
    for order, (one, other) in zip(orders, itertools.combinations(range(classes), 2), strict=True):
        order[one], order[other] = other, one
    return orders
