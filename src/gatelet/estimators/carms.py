"""ARMS for classes: replicas that avoid each other, weighted by how probable their pairs are."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import AnyKind, Sampled
from gatelet.estimators._kinds import one_hot


class CARMS(Sampled):
    """Leave-one-out of K antithetic samples of classes, each pair of samples weighted so that it is unbiased.

    d = softmax over k of −g_k (Dirichlet), v_k = (1 − d_k)^{K−1}, uniform and negatively dependent; h_k is the class
    into whose part of [0, 1) v_k falls, the classes in an order that is drawn from the C(C − 1)/2 in which one pair
    of classes stands at the two ends, so that any two classes can be drawn together.
    ĝ = 1/(K(K − 1)) Σ_{k≠l} ½(L_k − L_l)·(h_k − h_l)·p(h_k)p(h_l)/ρ(h_k, h_l), per variable, with ρ the
    probability of this pair of classes, mean over the orders, from P(v_k < x, v_l < y) =
    max(0, x^{1/(K−1)} + y^{1/(K−1)} − 1)^{K−1}.
    (Of the source's ways to draw classes that by the inverse distribution function, and its Dirichlet copula; all
    replicas of a variable share one order.)

    Bias: none, for one layer of independent variables.
    Variance: below that of leave-one-out where several classes are likely and K is above 2; where one class has most
    of the mass the weights, at most C(C − 1)/2, cost more than the spread gains. With two classes and K = 2 it is
    DisARM of a_1 − a_2. No state.

    Cost: K evaluations, and K²·C² operations per variable for the weights.

    Args:
        kind: ``"categorical"``, the only form.

    >>> import torch
    >>> unit = CARMS()
    >>> a = torch.zeros(2, 1, 1, 2)                                   # two replicas, one example, one variable
    >>> h = unit(a, torch.tensor([3.0, 0.2]).reshape(2, 1, 1, 1).expand(2, 1, 1, 2))
    >>> h.squeeze()
    tensor([[0., 1.],
            [1., 0.]])
    >>> unit.coefficients(a, h, torch.tensor([3.0, 1.0]).reshape(2, 1, 1))[0]      # ½(3 − 1)·(−1, 1)·(½·½)/½
    tensor([[[-0.5000,  0.5000]]])

    Reference: A. Dimitriev, M. Zhou, "CARMS: Categorical-Antithetic-REINFORCE Multi-Sample Gradient Estimator", 2021,
    arXiv:2110.14002.
    """

    unbiased = True
    replicas = 2
    several_layers = False
    kinds = ("categorical",)
    reference = "Dimitriev, Zhou 2021, arXiv:2110.14002"

    def __init__(self, kind: AnyKind = "categorical") -> None:
        super().__init__(kind)

    def forward(
        self, logits: Float[Tensor, "K *lead V C"], noise: Float[Tensor, "K *lead V C"]
    ) -> Float[Tensor, "K *lead V C"]:
        """Return the samples; they carry no gradient. A single replica is an ordinary sample."""
        if len(noise) == 1:
            return self.sample(logits, noise)
        spread = (1 - (-noise[..., 0]).softmax(0)).clamp_min(0.0).pow(len(noise) - 1)
        orders = orders_of(logits.shape[-1], logits.device)
        # One more number of the noise, as a uniform one, chooses the order.
        uniform = torch.exp(-torch.exp(-noise[0, ..., -1]))
        order = orders[(uniform * len(orders)).long().clamp_max(len(orders) - 1)].expand(logits.shape)
        p = logits.detach().to(noise.dtype).softmax(-1)
        ends = p.gather(-1, order).cumsum(-1)[..., :-1]
        place = (ends <= spread.unsqueeze(-1)).sum(-1, keepdim=True)
        return one_hot(order.gather(-1, place).squeeze(-1), logits)

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead V C"],
        gates: Float[Tensor, "K *lead V C"],
        losses: Float[Tensor, "K *lead V"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead V C"]:
        """Return 1/(K − 1) Σ_l ½(L_k − L_l)·(h_k − h_l)·p(h_k)p(h_l)/ρ, whose mean over replicas is the estimate."""
        gates = gates.to(losses.dtype)
        weight = self.weights(logits[0].to(losses.dtype).softmax(-1), gates)
        apart = (losses.unsqueeze(1) - losses) / 2 * weight / (len(losses) - 1)  # (K, K, *lead, V)
        return apart.sum(1).unsqueeze(-1) * gates - torch.einsum("kl...,l...c->k...c", apart, gates)

    def weights(
        self, p: Float[Tensor, "*lead V C"], gates: Float[Tensor, "K *lead V C"]
    ) -> Float[Tensor, "K K *lead V"]:
        """Return p(h_k)p(h_l)/ρ(h_k, h_l) for all pairs of replicas."""
        orders, count = orders_of(p.shape[-1], p.device), len(gates)
        ends = p[..., orders].cumsum(-1).gather(-1, orders.argsort(-1).expand(*p.shape[:-1], -1, -1))
        high = (ends @ gates.unsqueeze(-1)).squeeze(-1).clamp_max(1.0)  # (K, *lead, V, orders)
        own = (p * gates).sum(-1)  # (K, *lead, V)
        low = (high - own.unsqueeze(-1)).clamp_min(0.0)

        def below(one: Tensor, other: Tensor) -> Tensor:
            roots = [x.pow(1 / (count - 1)) for x in (one, other)]
            return (roots[0].unsqueeze(1) + roots[1] - 1).clamp_min(0.0).pow(count - 1)

        both = (below(high, high) - below(low, high) - below(high, low) + below(low, low)).mean(-1)
        apart = own.unsqueeze(1) * own
        # Two different classes are never less probable than this: rounding is.
        least = (apart / len(orders)).clamp_min(torch.finfo(p.dtype).tiny)
        return apart / torch.maximum(both, least)


def orders_of(classes: int, device: torch.device) -> Tensor:
    """Return orders of the classes, (C(C − 1)/2, C), each pair once at the two ends, the others between."""
    orders = [
        [one, *(c for c in range(classes) if c not in (one, other)), other]
        for one, other in itertools.combinations(range(classes), 2)
    ]
    return torch.tensor(orders or [list(range(classes))], device=device)
