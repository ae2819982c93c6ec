"""Score functions whose control variate is the loss of the relaxed gates: REBAR and RELAX."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet.estimators._base import AnyKind, Evaluating, Objective, carry, evaluate
from gatelet.estimators._noise import LOGISTIC
from gatelet.estimators._temperature import keep, relax


class REBAR(Evaluating):
    """Score function whose control variate is the loss at relaxed gates, its mean given back by their path.

    ĝ = (L(h) − η L(σ(z̃/τ)))·(h − σ(a)) + η ∂/∂a [L(σ(z/τ)) − L(σ(z̃/τ))], with z = a + ℓ, ℓ standard logistic,
    h = 1[z > 0], and z̃ drawn from the law of z given h by a second, independent noise of every unit (eq. 7;
    appendix C). Categorical: Gumbel noise, softmax in place of σ.

    Bias: none, for any η and τ: E over z̃ of the terms with η is zero, as ∂E[L(σ(z/τ))] = ∂E_h E_z̃|h[L(σ(z̃/τ))].
    Variance: less than the score function's (that of η = 0) where L at the relaxed gates follows L at the hard ones,
    and never more at the best η; with a fixed η it can be more, where L moves much between its hard gates: for
    (h − .45)² at a = −2, 1.33e-2 by default, 8.87e-3 at η = 0. The objective is evaluated three times and must
    be differentiable in its gates.

    Learned η and τ (pass ``nn.Parameter`` and give ``parameters()`` to the optimiser) minimise the variance: the
    gradient that the surrogate sends them is that of the mean of ĝ² over replicas, examples and logits, under
    ``surrogate(...).mean()``. It is sent to nothing else, and they receive no other.

    Args:
        eta: η, a float, a scalar tensor (a buffer) or an ``nn.Parameter``.
        temperature: τ, likewise.
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for a temperature that is not above 0.

    >>> import torch
    >>> a = torch.zeros(1, 1, requires_grad=True)
    >>> noise = torch.tensor([[[[1.0, 0.0]]]])                          # (K, B, N, 2): ℓ, and the noise of z̃
    >>> loss = REBAR().surrogate(lambda h: ((h - 0.45) ** 2).sum(-1), a, noise)
    >>> loss
    tensor([0.3025], grad_fn=<MeanBackward1>)
    >>> torch.autograd.grad(loss.sum(), a)[0]
    tensor([[0.1769]])

    Reference: G. Tucker, A. Mnih, C. J. Maddison, D. Lawson, J. Sohl-Dickstein, "REBAR: Low-variance, unbiased
    gradient estimates for discrete latent variable models", 2017, arXiv:1703.07370.
    """

    unbiased = True
    law = LOGISTIC
    more = (LOGISTIC,)
    several_layers = True
    kinds = ("bernoulli", "categorical")
    reference = "Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein 2017, arXiv:1703.07370"
    eta: float | Tensor
    temperature: float | Tensor

    def __init__(
        self, eta: float | Tensor = 1.0, temperature: float | Tensor = 0.5, kind: AnyKind = "bernoulli"
    ) -> None:
        super().__init__(kind)
        keep(self, eta, "eta", positive=False)
        keep(self, temperature)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N 2"]) -> Float[Tensor, "*lead N"]:
        """Return 1[a + ℓ > 0] or one-hot argmax(a + g); it carries no gradient."""
        return self.form.harden(logits.detach().to(noise.dtype) + noise[..., 0]).to(logits.dtype)

    def surrogate(
        self, objective: Objective, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "*batch"]:
        """Return the mean loss of the gates over the replicas, with the estimate as gradient of the logits."""
        replicas, gates, losses = self.begin(objective, logits, noise)
        values = {
            name: value.detach().to(noise.dtype)
            for name, value in (*self.named_parameters(), *self.named_buffers())
            if value.is_floating_point()
        }
        learned = {name: value for name, value in self.named_parameters() if value.requires_grad}

        def estimate(some: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            slope = self._estimate(objective, replicas.detach(), gates, losses.detach(), noise, {**values, **some})
            return slope.square().sum() / max(1, slope.numel()), slope

        learns = bool(learned) and torch.is_grad_enabled()
        with torch.no_grad():  # torch.func.grad differentiates all the same, and only what it is asked for
            if learns:
                slopes, value = torch.func.grad(estimate, has_aux=True)({name: values[name] for name in learned})
            else:
                slopes, value = {}, estimate({})[1]
        total = losses + carry(value, replicas, losses)
        for name, slope in slopes.items():
            inner = (slope.to(learned[name].dtype) * learned[name]).sum()
            total = total + (inner - inner.detach()).to(losses.dtype)
        return total.mean(0)

    def _estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "K *lead N 2"],
        values: Mapping[str, Tensor],
    ) -> Float[Tensor, "K *lead N"]:
        """Return each replica's ĝ, differentiable in ``values``, this module's parameters and buffers by name."""
        exact, hard = logits.to(noise.dtype).contiguous(), gates.to(noise.dtype).contiguous()
        drawn, again = (part.contiguous() for part in noise.unbind(-1))

        def difference(a: Tensor) -> tuple[Tensor, Tensor]:
            def control(z: Tensor) -> Tensor:
                return self._control(objective, z, values, logits.dtype)

            free = control(a + drawn)
            bound = control(self.form.condition(a, hard, again))
            return (free - bound).sum(), bound

        path, bound = torch.func.grad(difference, has_aux=True)(exact)
        eta = values.get("eta", self.eta)
        signal = losses.to(noise.dtype) - eta * bound
        score = hard - self.probability(exact)
        slope: Tensor = score * self.form.spread(signal) + eta * path
        return slope

    def _control(
        self,
        objective: Objective,
        z: Float[Tensor, "K *lead N"],
        values: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Float[Tensor, "K *batch"]:
        """Return the control variate of perturbed logits, L(σ(z/τ))."""
        gates = relax(z, values.get("temperature", self.temperature), self.form)
        return evaluate(objective, gates.to(dtype), self.event_dims, differentiable=True).to(z.dtype)


class RELAX(REBAR):
    """REBAR with a learned function of the perturbed logits added to its control variate.

    ĝ = (L(h) − η c(z̃))·(h − σ(a)) + η ∂/∂a [c(z) − c(z̃)], c(z) = L(σ(z/τ)) + r_φ(z) (eq. 8, section 3.3), with h, z, z̃
    as in :class:`REBAR`.

    Bias: none, for any η, τ and φ. Variance: that of REBAR at the start (the default r_φ is 0), and less after
    training: φ, and η and τ if they are an ``nn.Parameter``, receive the gradient of the mean of ĝ² and nothing
    else. The objective is evaluated three times and must be twice differentiable in its gates.

    Args:
        control: r_φ, a module of smooth operations that maps z (K, B, N) to (K, B) or (K, B, 1); z is (K, B, N, C)
            for categorical units. By default eight tanh features of every entry of z, shared by the units and
            summed with learned weights; a network of all units can do better.
        eta: η, a float, a scalar tensor (a buffer) or an ``nn.Parameter``.
        temperature: τ, likewise.
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for a temperature that is not above 0, or a control of another shape, at the call.

    >>> import torch
    >>> unit = RELAX(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
    >>> a = torch.zeros(5, 3, requires_grad=True)
    >>> loss = unit.surrogate(lambda h: (h - 0.45).square().sum(-1), a, unit.draw_noise(a.expand(4, 5, 3)))
    >>> loss.mean().backward()
    >>> a.grad.shape, unit.control[0].weight.grad.shape
    (torch.Size([5, 3]), torch.Size([8, 3]))

    Reference: W. Grathwohl, D. Choi, Y. Wu, G. Roeder, D. Duvenaud, "Backpropagation through the Void: Optimizing
    control variates for black-box gradient estimation", 2018, arXiv:1711.00123.
    """

    reference = "Grathwohl, Choi, Wu, Roeder, Duvenaud 2018, arXiv:1711.00123"

    def __init__(
        self,
        control: nn.Module | None = None,
        eta: float | Tensor = 1.0,
        temperature: float | Tensor = 0.5,
        kind: AnyKind = "bernoulli",
    ) -> None:
        super().__init__(eta, temperature, kind)
        self.control = _Features(self.event_dims) if control is None else control

    def _control(
        self,
        objective: Objective,
        z: Float[Tensor, "K *lead N"],
        values: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Float[Tensor, "K *batch"]:
        """Return L(σ(z/τ)) + r_φ(z)."""
        losses = super()._control(objective, z, values, dtype)
        mine = {name.removeprefix("control."): value for name, value in values.items() if name.startswith("control.")}
        learned: Tensor = torch.func.functional_call(self.control, mine, (z,))
        if learned.shape == (*losses.shape, 1):
            learned = learned.squeeze(-1)
        if learned.shape != losses.shape:
            raise ValueError(
                f"control must map {tuple(z.shape)} to {tuple(losses.shape)}, but returned {tuple(learned.shape)}"
            )
        return losses + learned


class _Features(nn.Module):
    """r(z) = Σ w_j tanh(s_j z − c_j) over the features j and all of one example's entries of z; 0 at first."""

    def __init__(self, event_dims: int, width: int = 8) -> None:
        super().__init__()
        self.event_dims = event_dims
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.linspace(-2, 2, width))
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, z: Tensor) -> Tensor:
        features = (z.unsqueeze(-1) * self.scale - self.shift).tanh()
        return (features * self.weight).flatten(-1 - self.event_dims).sum(-1)
