"""Leave-one-out with learned control variates from a discrete Stein operator."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_count
from gatelet.estimators._base import Evaluating, Objective, carry, evaluate
from gatelet.estimators._noise import wide
from gatelet.estimators.double_control import others_mean


class RODEO(Evaluating):
    """Leave-one-out whose baseline and score have control variates A c, of mean zero for any function c.

    A is the Stein operator of single flips, (A c)(x) = (1/N) Σ_i q_i(x)·(c(x^i) − c(x)): x^i is x with unit i flipped,
    q_i the probability of that other value; E[(A c)(h)] = 0. With l_k(x) = mean_{j≠k}[L_j + ∂L/∂h(h_j)·(x − h_j)] and a
    network (r, t) of l_k(x) − mean_{j≠k} L_j and mean_{j≠k} L_j, p = σ(a):
    ĝ = (1/K) Σ_k [(L_k − mean_{j≠k}(L_j + (A r_j)(h_j)))·(h_k − p) + (A (t_k·(x − p)))(h_k)].

    Bias: none, whatever the network says: the control variate of sample k is made of the other samples.
    Variance: that of leave-one-out at the start, where the network is 0, and less after training: its parameters (give
    ``parameters()`` to the optimiser) receive the gradient of the mean of ĝ² and nothing else.
    (Of the source's operators the one of single flips with Gibbs' rates is taken, of its control functions the one with
    extrapolated losses, both as in its code by default.)

    Cost: K evaluations, and K with a gradient; no evaluation at the flipped gates.

    Args:
        hidden: tanh units of the network, which the units share.

    >>> import torch
    >>> unit = RODEO()
    >>> a = torch.zeros(5, 3, requires_grad=True)
    >>> loss = unit.surrogate(lambda h: (h - 0.45).square().sum(-1), a, unit.draw_noise(a.expand(4, 5, 3)))
    >>> loss.mean().backward()
    >>> a.grad.shape, unit.out.grad.shape
    (torch.Size([5, 3]), torch.Size([2, 10]))

    Reference: J. Shi, Y. Zhou, J. Hwang, M. K. Titsias, L. Mackey, "Gradient Estimation with Discrete Stein Operators",
    2022, arXiv:2202.09497.
    """

    unbiased = True
    replicas = 2
    reference = "Shi, Zhou, Hwang, Titsias, Mackey 2022, arXiv:2202.09497"

    def __init__(self, hidden: int = 10) -> None:
        super().__init__()
        self.hidden = check_count(hidden, "hidden")
        self.weight = nn.Parameter(torch.stack([torch.linspace(-1, 1, hidden), torch.full((hidden,), 0.1)], -1))
        self.shift = nn.Parameter(torch.linspace(1, -1, hidden))
        self.out = nn.Parameter(torch.zeros(2, hidden))

    def surrogate(
        self, objective: Objective, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "*batch"]:
        """Return the mean loss over the replicas, with the estimate as gradient of the logits."""
        replicas, gates, losses = self.begin(objective, logits, noise)
        fixed = {name: value.detach().to(wide(logits)) for name, value in self.named_parameters()}
        slope = torch.func.grad(lambda h: evaluate(objective, h, self.event_dims).sum())(gates.detach())
        exact, drawn, level, tilt = (each.detach().to(wide(logits)) for each in (replicas[:1], gates, losses, slope))

        def square(some: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            estimate = self._estimate(exact, drawn, level, tilt, some)
            return estimate.mean(0).square().sum() / max(1, estimate[0].numel()), estimate

        with torch.no_grad():
            slopes, value = torch.func.grad(square, has_aux=True)(fixed)
        total = losses + carry(value, replicas, losses)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                inner = (slopes[name].to(parameter.dtype) * parameter).sum()
                total = total + (inner - inner.detach()).to(losses.dtype)
        return total.mean(0)

    def _estimate(
        self, logits: Tensor, gates: Tensor, losses: Tensor, slope: Tensor, values: Mapping[str, Tensor]
    ) -> Float[Tensor, "K *lead N"]:
        """Return each replica's part of ĝ, differentiable in the network's parameters ``values``."""
        p, units = logits.contiguous().sigmoid(), max(1, gates.shape[-1])
        level, tilt = others_mean(losses), others_mean(slope)
        here = others_mean(losses - (slope * gates).sum(-1)) + (tilt * gates).sum(-1)  # l_k(h_k)
        there = here.unsqueeze(-1) + tilt * (1 - 2 * gates)  # l_k(h_k with unit i flipped)
        baseline, factor = self._network(here, level, values)
        baselines, factors = self._network(there, level.unsqueeze(-1).expand(there.shape), values)
        rate = torch.where(gates > 0, 1 - p, p)
        score = gates - p
        change = (rate * (baselines - baseline.unsqueeze(-1))).sum(-1) / units
        # Σ_i q_i·(t(x^i)·(x^i − p) − t(x)·(x − p)): x^i differs from x in unit i alone.
        whole = (rate * (factors - factor.unsqueeze(-1))).sum(-1, keepdim=True) * score
        control = (whole + rate * factors * (1 - 2 * gates)) / units
        signal = losses - others_mean(losses + change)
        return score * signal.unsqueeze(-1) + control

    def _network(self, at: Tensor, level: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return r and t of extrapolated losses, given the level that they are extrapolated from."""
        features = torch.stack([at - level, level], -1)
        both = torch.tanh(features @ values["weight"].t() + values["shift"]) @ values["out"].t()
        return both[..., 0], both[..., 1]
