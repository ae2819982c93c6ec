"""A categorical variable sampled without replacement."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import AnyKind, Evaluating, Objective, carry
from gatelet.estimators._kinds import one_hot
from gatelet.estimators._noise import wide

MAX_SAMPLES = 10


class UnorderedSet(Evaluating):
    """K different classes of one categorical variable, weighted as if their order were not known.

    For the drawn set S, ĝ = Σ_{s∈S} ∇p(s)·R(S, s)·(L(s) − Σ_{s'∈S} p(s')·R_s(S, s')·L(s')). The
    leave-one-out ratio R(S, s) = P_{∖s}(S∖s)/P(S), with P the probability of drawing a set without replacement
    and P_{∖s} that of drawing it where class s does not exist; R_s is that ratio without class s, R_s(S, s) = 1.
    The ratios are exact: P is a sum over all orders of S, by dynamic programming over its subsets.

    The surrogate's value is Σ_{s∈S} p(s)R(S, s)·L(s): its weights sum to 1 and its expectation is E[L], which
    the plain mean of different classes would miss. The rest of the objective receives the gradient of that value.

    Bias: none for K ≥ 2, of the gradient and of the value.
    Variance: at most that of any estimator with the same baseline that draws without replacement and uses the order
    (this one is its conditional expectation, given the set); zero with K = C.

    One variable per example: logits (B, 1, C). The k-th replica is the argmax of a + g_k among the classes not yet
    drawn, which has the law of the k-th largest of one a + g (the Gumbel top-k). Cost: K evaluations, and
    2^K·K³ operations per example for the ratios, K ≤ 10.

    Args:
        kind: ``"categorical"``, the only form.

    Raises:
        ValueError: for more than one variable per example, or fewer classes than samples.

    >>> import torch
    >>> a = torch.zeros(1, 1, 2, requires_grad=True)                  # one example, two classes: K = 2 draws both
    >>> price = torch.tensor([1.0, 3.0])
    >>> value = UnorderedSet().surrogate(lambda h: (h * price).sum((-1, -2)), a, torch.zeros(2, 1, 1, 2))
    >>> value.sum().backward()
    >>> value.detach(), a.grad                                        # exact
    (tensor([2.]), tensor([[[-0.5000,  0.5000]]]))

    Reference: W. Kool, H. van Hoof, M. Welling, "Estimating Gradients for Discrete Random Variables by Sampling
    without Replacement", 2020, arXiv:2002.06043.
    """

    unbiased = True
    replicas = 2
    kinds = ("categorical",)
    reference = "Kool, van Hoof, Welling 2020, arXiv:2002.06043"

    def __init__(self, kind: AnyKind = "categorical") -> None:
        super().__init__(kind)

    def forward(
        self, logits: Float[Tensor, "K *lead 1 C"], noise: Float[Tensor, "K *lead 1 C"]
    ) -> Float[Tensor, "K *lead 1 C"]:
        """Return K different one-hot gates per example; they carry no gradient."""
        perturbed = logits.detach().to(noise.dtype) + noise
        taken = torch.zeros_like(perturbed[0])
        gates = []
        for row in perturbed.unbind(0):
            gates.append(one_hot(row.masked_fill(taken > 0, -torch.inf).argmax(-1), row))
            taken = taken + gates[-1]
        return torch.stack(gates).to(logits.dtype)

    def surrogate(
        self,
        objective: Objective,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "*batch"]:
        """Return the weighted mean loss of the set, with this estimator's gradient for the logits."""
        _check(logits, noise.shape[0])
        replicas, gates, losses = self.begin(objective, logits, noise)
        with torch.no_grad():
            log_p = logits.to(wide(logits)).log_softmax(-1)
            drawn = (gates * log_p).sum((-1, -2))  # (K, *batch)
            outside = log_p.masked_fill(gates.sum(0) > 0, -torch.inf).logsumexp((-1, -2))
            weights, inner = ratios(drawn, outside)
            advantage = losses - (inner * losses).sum(1)
            value = (weights * advantage)[..., None, None] * (gates - log_p.exp())
        return (weights.to(losses.dtype) * losses + carry(value, replicas, losses)).sum(0)


def ratios(
    drawn: Float[Tensor, "K *batch"], outside: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "K *batch"], Float[Tensor, "K K *batch"]]:
    """Return p(s)·R(S, s), and p(s')·R_s(S, s') for each s and s', from log p of the drawn classes.

    ``outside`` is log of the mass of the classes not drawn. It is the same for S, for S∖s where s does not exist, and
    for S∖{s, s'} where neither does: only the set itself differs.
    """
    samples = range(drawn.shape[0])
    one_less = [[j for j in samples if j != s] for s in samples]
    # On the diagonal, s' = s, any K − 2 classes will do: these entries are overwritten.
    two_less = [[[j for j in samples if j not in (s, t)][: len(samples) - 2] for t in samples] for s in samples]
    without = _log_probability(_choose(drawn, one_less), outside)  # (K, *batch)
    without_both = _log_probability(_choose(drawn, two_less), outside)  # (K, K, *batch)
    weights = (drawn + without - _log_probability(drawn, outside)).exp()
    inner = (drawn + without_both - without.unsqueeze(1)).exp()
    own = torch.eye(len(samples), dtype=torch.bool, device=drawn.device)
    own = own.reshape(*own.shape, *(1,) * (drawn.dim() - 1))
    return weights, torch.where(own, drawn.exp(), inner)


def _choose(drawn: Float[Tensor, "K *batch"], members: object) -> Float[Tensor, "n *rest"]:
    """Return the members' entries, with the members in the first dimension and the sets in the next ones."""
    index = torch.tensor(members, dtype=torch.long, device=drawn.device)
    return drawn[index].movedim(index.dim() - 1, 0)


def _log_probability(members: Float[Tensor, "n *sets"], outside: Float[Tensor, "*batch"]) -> Float[Tensor, "*sets"]:
    """Return log P(S) of drawing exactly these n classes, in any order, out of themselves and the mass outside.

    P(T) = Σ_{t∈T} P(T∖t)·p(t)/(1 − p(T∖t)), subset by subset. 1 − p(T∖t) is computed as the sum of what is left, since
    the difference would be 0 where one class has all the mass.
    """
    count, device = members.shape[0], members.device
    index = range(1 << count)
    absent = torch.tensor([[not code >> j & 1 for j in range(count)] for code in index], device=device)
    absent = absent.reshape(len(index), count, *(1,) * (members.dim() - 1)).bool()
    left = torch.where(absent, members, -torch.inf)
    left = torch.cat([left, outside.expand(len(index), 1, *members.shape[1:])], 1).logsumexp(1)
    log_mass = members.new_zeros(()).expand(len(index), *members.shape[1:])
    for size in range(1, count + 1):
        subsets = list(itertools.combinations(range(count), size))
        codes = torch.tensor([sum(1 << j for j in subset) for subset in subsets], device=device)
        last = torch.tensor(subsets, device=device)
        before = codes[:, None] - (1 << last)
        terms = log_mass[before] + members[last] - left[before]
        log_mass = log_mass.index_copy(0, codes, terms.logsumexp(1))
    return log_mass[-1]


def _check(logits: Tensor, samples: int) -> None:
    """Raise unless the logits are of one variable with at least as many classes as samples."""
    if logits.dim() < 2 or logits.shape[-2] != 1:
        raise ValueError(
            f"logits: UnorderedSet draws sets of one categorical variable per example, logits (B, 1, C), not "
            f"{tuple(logits.shape)}"
        )
    if not 2 <= samples <= min(MAX_SAMPLES, logits.shape[-1]):
        raise ValueError(
            f"samples: UnorderedSet draws 2 to {MAX_SAMPLES} different classes of {logits.shape[-1]}, not {samples}"
        )
