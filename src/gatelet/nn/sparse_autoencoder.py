"""SparseAutoencoder: many latents, of which a few are open per example."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gatelet._checks import (
    check_choice,
    check_count,
    check_input,
    check_positive,
    check_weight,
    is_transformed,
    values_hidden,
)
from gatelet.estimators import Estimator, JumpReLU, Rectifier, TopK
from gatelet.estimators._distributed import is_distributed, sign_of_life
from gatelet.estimators.jump_relu import jump_relu, jump_step
from gatelet.kernels.ops._declare import recording
from gatelet.kernels.pattern import Lists
from gatelet.nn import _agreement, sae_lens
from gatelet.nn._largest import largest, largest_in_groups
from gatelet.nn._lists import ListedLinear, ListedSum, UnitRows, by_example
from gatelet.nn._units import ALL_HERE, Units
from gatelet.nn.sparse_code import SparseCode

SPARSITY = {"top_k": 0.0, "batch_top_k": 0.0, "jump_relu": 100.0, "relu": 5.0, "gated": 5.0}
"""The default weight of the sparsity penalty, for inputs of length √D."""
FOLLOWS = 0.3
"""The share of the way by which the threshold of "batch_top_k" moves to a batch's smallest open value in each step."""
THRESHOLDS = 10.0
"""The thresholds of "jump_relu" learn this many times faster than the weights."""
SAMPLE = 1 << 24
"""At the start, about this many pre-activations set the encoder's length and the thresholds."""
FEW = 0.05
"""Up to this share of open latents, products are formed from lists; above it, densely."""


class SAELoss(NamedTuple):
    """What :meth:`SparseAutoencoder.loss` returns; all but the last two are scalars.

    Attributes:
        total: what to differentiate, the sum of the four parts that follow.
        reconstruction: mean over the examples of Σ_d (x̂ − x)², in units in which inputs have length √D.
        sparsity: the weighted penalty of open latents.
        auxiliary: the weighted error with which dead latents reconstruct what the open ones left.
        balance: the weighted penalty of uneven groups.
        code: the open latents.
        output: the reconstruction (..., D), in the input's units, without gradient.
    """

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    balance: Tensor
    code: SparseCode
    output: Tensor


class SparseAutoencoder(nn.Module):
    """Reconstructs its input from a few open latents of many; a training step works on the open ones only.

    With x̄ = s·x, s such that inputs have length √D on average: z = W_enc (x̄ − b_dec) + b_enc, the code f = act(z), and
    x̂ = (W_decᵀ f + b_dec) / s. The rows of W_dec, one per latent, have unit length.

    After the encoder's product, the forward and backward pass read and write only the rows of open latents. The results
    are those of the dense layer, where the gradient of a closed latent is zero too.

    ============== ====================================================== ============================================
    ``activation`` f                                                      loss beside Σ (x̂ − x)²
    ============== ====================================================== ============================================
    "top_k"        the k largest z of an example, if positive
    "batch_top_k"  the k·B largest z of a batch; in ``eval()`` z·1[z > t]
    "jump_relu"    z·1[z > θ], θ learned per latent                       λ (L0/k − 1)²
    "relu"         max(0, z)                                              λ Σ f |W_dec[n]|
    "gated"        1[π > 0]·max(0, e^r·W_enc (x̄ − b_dec) + b_mag), π = z  λ Σ max(0, π), and max(0, π)'s own error
    ============== ====================================================== ============================================

    Bias and variance: the gradient is exact, but for θ, where it is the kernel estimate of
    :class:`gatelet.estimators.JumpReLU`, and for the gate of "gated", which learns from the last column alone.

    Args:
        d_in: D.
        d_sae: N, the latents.
        activation: as above.
        k: open latents per example; of "jump_relu" the number that the penalty aims at; not used by the last two.
        sparsity_weight: λ; by default 100, 5 and 5 for the last three.
        bandwidth: ε of "jump_relu", in the units of z.
        auxiliary_weight: of the auxiliary loss: the ``auxiliary_k`` strongest dead latents reconstruct what is left.
        auxiliary_k: by default D / 2.
        dead_after: a latent that none of this many examples opened counts as dead.
        groups: E. More than one: a router opens ``open_groups`` groups of N / E latents per example, computes only
            these, and scales their values by its probability ("top_k" only; Switch SAE).
        open_groups: e.
        balance_weight: of the penalty E·Σ_g (share of examples in g)·(mean probability of g) of the groups.
        unit_decoder: hold the rows of W_dec at unit length: their gradient's parallel part is taken off, and
            :meth:`normalise_decoder_` is to be called after each step (:class:`gatelet.RowAdam` does so itself).
        sparse_grad: give both weights gradients of the open latents' rows only, sparse tensors, as
            ``torch.nn.Embedding(sparse=True)`` does; for optimisers that take them, such as :class:`gatelet.RowAdam`.
            DistributedDataParallel and FSDP do not take them.
        device, dtype: of the parameters.

    Attributes:
        encoder_weight, decoder_weight: (N, D), a row per latent.
        encoder_bias: (N,).
        decoder_bias: (D,).
        input_scale: s, 1 until :meth:`start_from` sets it.
        idle: (N,), for how many examples each latent has been closed. It moves in the backward pass, once per step.
        threshold: t of "batch_top_k", a moving average of the smallest open value, moved likewise.

    Raises:
        ValueError: for sizes that are not integers of at least 1, weights that are not finite numbers of at least 0, k
            over N, an unknown activation, groups that do not divide N; at the call for an input of another width or not
            finite.

    >>> import torch
    >>> sae = SparseAutoencoder(16, 64, activation="top_k", k=4)
    >>> x = torch.randn(8, 16)
    >>> sae.encode(x).indices.shape, sae(x).shape
    (torch.Size([8, 4]), torch.Size([8, 16]))
    >>> sae.loss(x).total.backward()

    Reference: L. Gao et al., "Scaling and evaluating sparse autoencoders", 2024, arXiv:2406.04093; B. Bussmann,
    P. Leask, N. Nanda, "BatchTopK Sparse Autoencoders", 2024, arXiv:2412.06410; S. Rajamanoharan et al., "Jumping
    Ahead", 2024, arXiv:2407.14435, and "Improving Dictionary Learning with Gated Sparse Autoencoders", 2024,
    arXiv:2404.16014; A. Mudide et al., "Efficient Dictionary Learning with Switch Sparse Autoencoders", 2024,
    arXiv:2410.08201.
    """

    input_scale: Tensor
    idle: Tensor
    threshold: Tensor
    split: Units = ALL_HERE  # which latents are on this process

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: str = "top_k",
        k: int = 32,
        *,
        sparsity_weight: float | None = None,
        bandwidth: float = 0.1,
        auxiliary_weight: float = 1 / 32,
        auxiliary_k: int | None = None,
        dead_after: int = 1_000_000,
        groups: int = 1,
        open_groups: int = 1,
        balance_weight: float = 1.0,
        unit_decoder: bool = True,
        sparse_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae = check_count(d_in, "d_in"), check_count(d_sae, "d_sae")
        self.activation = check_choice(activation, SPARSITY, "activation")
        self.k = check_count(k, "k")
        if k > d_sae:
            raise ValueError(f"k must be at most d_sae: {k} of {d_sae} latents cannot be open")
        self.groups, self.open_groups = check_count(groups, "groups"), check_count(open_groups, "open_groups")
        self._check_groups()
        weight = SPARSITY[activation] if sparsity_weight is None else sparsity_weight
        self.sparsity_weight = check_weight(weight, "sparsity_weight")
        self.auxiliary_weight = check_weight(auxiliary_weight, "auxiliary_weight")
        self.auxiliary_k = max(1, d_in // 2) if auxiliary_k is None else check_count(auxiliary_k, "auxiliary_k")
        self.balance_weight = check_weight(balance_weight, "balance_weight")
        self.unit_decoder, self.sparse_grad = unit_decoder, sparse_grad
        bandwidth = check_positive(bandwidth, "bandwidth")
        self.dead_after = check_count(dead_after, "dead_after")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder_weight = nn.Parameter(torch.empty(d_sae, d_in, **factory))
        self.decoder_weight = nn.Parameter(torch.empty(d_sae, d_in, **factory))
        self.encoder_bias = nn.Parameter(torch.zeros(d_sae, **factory))
        self.decoder_bias = nn.Parameter(torch.zeros(d_in, **factory))
        if groups > 1:
            self.router_weight = nn.Parameter(torch.empty(groups, d_in, **factory))
            self.router_bias = nn.Parameter(torch.zeros(groups, **factory))
        if activation == "gated":
            self.log_magnitude = nn.Parameter(torch.zeros(d_sae, **factory))
            self.magnitude_bias = nn.Parameter(torch.zeros(d_sae, **factory))
        self.estimator: Estimator = (
            JumpReLU(torch.full((d_sae,), math.sqrt(2 * math.log(max(2, d_sae / k))), **factory), bandwidth)
            if activation == "jump_relu"
            else Rectifier()
            if activation in ("relu", "gated")
            else TopK(k)
        )
        self.register_buffer("input_scale", torch.ones((), **factory))
        self.register_buffer("idle", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.register_buffer("threshold", torch.zeros((), **factory))
        self.reset_parameters()

    def _check_groups(self) -> None:
        groups, opened = self.groups, self.open_groups
        if self.d_sae % groups:
            raise ValueError(f"groups must divide d_sae: {groups} does not divide {self.d_sae}")
        if opened > groups:
            raise ValueError(f"open_groups must be at most groups: {opened} of {groups} cannot be open")
        if groups > 1 and self.activation != "top_k":
            raise ValueError(f"groups: are for activation 'top_k', not {self.activation!r}")
        if self.k > opened * (self.d_sae // groups):
            raise ValueError(f"k: {opened} groups of {self.d_sae // groups} latents have fewer than {self.k}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw decoder rows of unit length and start the encoder as their transpose; biases start at zero."""
        self.decoder_weight.copy_(F.normalize(torch.randn_like(self.decoder_weight), dim=1))
        self.encoder_weight.copy_(self.decoder_weight)
        if self.groups > 1:
            nn.init.normal_(self.router_weight, std=self.d_in**-0.5)

    @torch.no_grad()
    def start_from(self, x: Float[Tensor, "*lead D"]) -> None:
        """Take from a sample the scale and mean of inputs, the length of the encoder, and θ or t for k open latents.

        If the encoder's rows are as long as the decoder's, reconstructions are too large, because several open latents
        describe the same part of an input. So all its rows are scaled by ⟨x̄ − b_dec, W_decᵀ f⟩ / |W_decᵀ f|² over the
        sample. They are only ever shortened, because Adam turns longer rows more slowly.

        Args:
            x: (..., D), some thousand examples.
        """
        if self.split is not ALL_HERE:
            raise RuntimeError("start_from: the latents are spread over processes; call it before gatelet.nn.spread")
        check_input(x, self.encoder_weight)
        rows = x.detach().reshape(-1, self.d_in).to(self.decoder_weight.dtype)
        length = torch.linalg.vector_norm(rows, dim=1).mean()
        if not length > 0:
            raise ValueError("x must hold examples that are not zero")
        self.input_scale.fill_(self.d_in**0.5 / length)
        self.decoder_bias.copy_(rows.mean(0) * self.input_scale)
        some = self._centred(rows[:: -(-len(rows) * self.d_sae // SAMPLE)])
        self._start_thresholds(some)
        found = self._sum(self._encode(some, some.shape[:-1])[0])
        share = (some * found).sum() / found.square().sum()
        if 0 < share < 1:  # NaN if no latent is open
            for each in self._encoder():
                each.mul_(share)
            self._start_thresholds(some)

    def _start_thresholds(self, centred: Tensor) -> None:
        """Set θ or t so that k latents open on average: halfway to the next value, against rounding."""
        if self.activation not in ("jump_relu", "batch_top_k"):
            return
        z = F.linear(centred, *self._encoder()).flatten()
        at = z.topk(min(len(z), self.k * len(centred) + 1)).values[-2:].mean().clamp(min=1e-3)
        if isinstance(self.estimator, JumpReLU):
            self.estimator.log_threshold.fill_(at.log())
        else:
            self.threshold.copy_(at)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters in groups for an optimiser: unit decoder rows are marked, thresholds learn faster.

        A step of Adam moves every number by about the rate, whatever the gradient's size. The logarithm of θ has
        further to go than a weight has: its rate is ``THRESHOLDS`` times the others'.

        Args:
            lr: the learning rate η of all but the thresholds.

        >>> groups = SparseAutoencoder(8, 32, "jump_relu", k=4).parameter_groups(1e-3)
        >>> [(len(group["params"]), group["lr"], group["unit_rows"]) for group in groups]
        [(1, 0.001, True), (3, 0.001, False), (1, 0.01, False)]
        """
        check_positive(lr, "lr")
        thresholds = list(self.estimator.parameters())
        apart = {id(self.decoder_weight), *map(id, thresholds)}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in apart]
        groups: list[dict[str, Any]] = [
            {"params": [self.decoder_weight], "lr": lr, "unit_rows": self.unit_decoder},
            {"params": rest, "lr": lr, "unit_rows": False},
        ]
        if thresholds:
            groups.append({"params": thresholds, "lr": lr * THRESHOLDS, "unit_rows": False})
        return groups

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Give the decoder's rows unit length again: after each step of an optimiser that does not do so itself."""
        if self.unit_decoder:
            rows = self.split.own(self.decoder_weight)
            rows.copy_(F.normalize(rows, dim=1))

    # ---------------------------------------------------------------- encoding and decoding

    def encode(self, x: Float[Tensor, "*lead D"]) -> SparseCode:
        """Return the code: the open latents and their values.

        Args:
            x: (..., D).

        Raises:
            ValueError: for an input of another width or not finite.
        """
        check_input(x, self.encoder_weight)
        if not (self.training or torch.compiler.is_compiling()):
            sign_of_life()
        return self.split.whole(self._encode(self._centred(x.reshape(-1, self.d_in)), x.shape[:-1])[0])

    def decode(self, code: SparseCode) -> Float[Tensor, "*lead D"]:
        """Return the reconstruction of a code, in the input's units.

        Raises:
            ValueError, TypeError: for a code of another number of latents, or whose parts do not fit each other.
        """
        if code.latents != self.d_sae:
            raise ValueError(f"code: is of {code.latents} latents, but the layer has {self.d_sae}")
        if code.single and self.split is ALL_HERE and not torch.is_autocast_enabled(self.decoder_bias.device.type):
            weight, bias = self.decoder_weight, self.decoder_bias
            if not recording(code.values, weight, bias):  # few operators, since the calls take most of the time here
                try:
                    found = torch.addmm(bias, code.values.view(1, -1), weight.index_select(0, code.indices.view(-1)))
                except (IndexError, RuntimeError):
                    code.check()  # which says what does not fit
                    raise
                return found.div_(self.input_scale).view(*code.lead, self.d_in)
        code.check()
        return ((self._sum(self.split.part(code)) + self.decoder_bias) / self.input_scale).view(*code.lead, self.d_in)

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        """Return the reconstruction of x."""
        return self.decode(self.encode(x))

    def loss(self, x: Float[Tensor, "*lead D"], sparsity: float = 1.0) -> SAELoss:
        """Return the loss and its parts.

        Args:
            x: (..., D).
            sparsity: a factor of the sparsity penalty, for its warm-up.

        Raises:
            ValueError: for an input of another width or not finite, or without examples.
        """
        check_input(x, self.encoder_weight)
        if not x.numel():
            raise ValueError("x must hold an example: without one there is no mean loss")
        centred = self._centred(x.reshape(-1, self.d_in))
        code, extra = self._encode(centred, x.shape[:-1])
        found = self._sum(code)
        left = (centred + self.decoder_bias).detach() - found - self.decoder_bias
        zero = left.new_zeros(())
        reconstruction = left.square().sum(-1).mean()
        penalty = self._sparsity(code, extra, centred) * sparsity if self.sparsity_weight else zero
        auxiliary = self._auxiliary(centred, left.detach()) if self.training and self.auxiliary_weight else zero
        balance = extra.balance * self.balance_weight if extra.balance is not None else zero
        self._note(code)
        output = ((found.detach() + self.decoder_bias.detach()) / self.input_scale).view(x.shape)
        total = reconstruction + penalty + auxiliary + balance
        return SAELoss(total, reconstruction, penalty, auxiliary, balance, self.split.whole(code), output)

    def save_sae_lens(self, directory: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the autoencoder in the format of SAELens; :func:`load_sae_lens` and SAELens read it.

        The input's scale goes into the weights. "batch_top_k" is written as SAELens has it, with its threshold.

        Args:
            directory: made if it is not there.
            metadata: further entries of ``cfg.json``, such as ``model_name`` and ``hook_name``.

        Raises:
            ValueError: with groups, for which the format has no place.
            RuntimeError: without the package safetensors.
        """
        sae_lens.save(self, directory, metadata)

    @property
    def dead(self) -> int:
        """How many latents none of the last ``dead_after`` examples opened."""
        return int((self.idle >= self.dead_after).sum())

    # ---------------------------------------------------------------- the parts

    def _centred(self, rows: Tensor) -> Tensor:
        """Return s·x − b_dec, (B, D)."""
        return self.split.enter(rows.to(self.decoder_bias.dtype) * self.input_scale - self.decoder_bias)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        """Return W_enc and b_enc of the latents that are here."""
        return self.split.own(self.encoder_weight), self.split.own(self.encoder_bias)

    @property
    def _here(self) -> int:
        """How many latents are here."""
        return self.d_sae // self.split.processes

    def _encode(self, centred: Tensor, lead: torch.Size) -> tuple[SparseCode, "_Extra"]:
        """Return the code of centred examples, and what the penalties need beside."""
        if self.sparse_grad and torch.is_grad_enabled() and DistributedDataParallel._get_active_ddp_module():
            raise RuntimeError(
                "sparse_grad: DistributedDataParallel takes gradients by row from torch's Embedding alone; leave it "
                "out, or average the gradients without it: torch.distributed.all_reduce(weight.grad.coalesce())"
            )
        with torch.autocast(centred.device.type, enabled=False):
            if self.activation == "top_k" and not values_hidden(centred):
                return self._encode_largest(centred, lead)
            z = F.linear(centred, *self._encoder())
            limit = self._limit(z.detach()) if self.activation == "batch_top_k" else None
            chosen = None if values_hidden(z) else self._chosen(z.detach(), limit)
            if chosen is None:
                f, balance = self._activate_all(centred, z, limit)
                return SparseCode.from_dense(f, lead), _Extra(z, balance)
            examples, indices, offsets = chosen
            lists = Lists(offsets, indices, self._here)
            listed = self._listed(centred, z.detach()[examples, indices], lists)
            return SparseCode(indices, self._activate(listed, lists), self._here, lead, offsets), _Extra(listed)

    def _encode_largest(self, centred: Tensor, lead: torch.Size) -> tuple[SparseCode, "_Extra"]:
        opened, scale, balance = self._route(centred) if self.groups > 1 else (None, None, None)
        with torch.no_grad():
            args = (centred, *self._encoder(), min(self.k, self._here))
            values, indices = largest(*args) if opened is None else largest_in_groups(*args, opened, self.groups)
        if self.split is not ALL_HERE:
            values, lists = self._strongest(values, indices, self.k)
            listed = self._listed(centred, values, lists)
            return SparseCode(lists.units, listed.relu(), self._here, lead, lists.starts), _Extra(listed)
        listed = values.flatten()
        if torch.is_grad_enabled():
            listed = self._listed(centred, *self._strongest(values, indices, self.k))
        f = listed.relu().view(-1, self.k)
        if scale is not None:
            f = f * scale.gather(1, indices // (self.d_sae // self.groups))
        return SparseCode(indices.view(*lead, self.k), f.view(*lead, self.k), self.d_sae, lead), _Extra(listed, balance)

    def _activate_all(self, centred: Tensor, z: Tensor, limit: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the values (B, N) and, of groups, the penalty of imbalance, where values may not be looked at."""
        if self.groups == 1:
            return self._activate(z, None, limit), None
        opened, probability, balance = self._route(centred)
        here = (opened.unsqueeze(-1) == torch.arange(self.groups, device=z.device)).any(-2)
        here, scale = (each.repeat_interleave(self.d_sae // self.groups, dim=-1) for each in (here, probability))
        return self._activate(torch.where(here, z, -1.0), None, limit) * scale, balance

    def _listed(self, centred: Tensor, values: Tensor, lists: Lists) -> Tensor:
        found: Tensor = ListedLinear.apply(centred, *self._encoder(), values, lists, self.sparse_grad)
        return found

    def _route(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each example's open groups (B, e), the groups' probabilities (B, E), and the penalty of imbalance."""
        probability = F.linear(centred, self.router_weight, self.router_bias).softmax(-1)
        opened = probability.detach().topk(self.open_groups, dim=-1, sorted=False).indices
        counts = (opened.unsqueeze(-1) == torch.arange(self.groups, device=opened.device)).sum((0, 1))
        counts = _agreement.total(torch.cat([counts, counts.new_tensor([len(centred)])])).to(probability)
        share = counts[:-1] / counts[-1].clamp(min=1)
        return opened, probability, self.groups * (share * probability.mean(0)).sum() / self.open_groups

    def _chosen(self, z: Tensor, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the pairs to compute, examples and latents, and where each example's begin; None for the dense way."""
        if limit is not None:
            mask = z > limit
        elif isinstance(self.estimator, JumpReLU):
            # In training also the closed ones for which θ's pseudo-derivative is not zero.
            below = self.estimator.bandwidth / 2 if self.training else 0.0
            mask = z > self.split.own(self.estimator.theta).detach() - below
        else:
            mask = z > 0
        counts = mask.sum(1)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        if self.split.total(offsets[-1]) > FEW * z.numel() * self.split.processes:  # all go the same way
            return None
        examples, latents = mask.nonzero(as_tuple=True)
        return examples, latents, offsets

    def _limit(self, z: Tensor) -> Tensor:
        """Return the number above which lie the k·B largest z of all processes' batches, at least 0; in eval() t."""
        if not self.training:
            return self.threshold.clamp(min=0)
        near = z[z > 0.8 * self.threshold]  # far fewer than all, and nearly always enough
        examples, known = _agreement.total(torch.tensor([len(z), len(near)], device=z.device)).tolist()
        wanted = self.k * examples // self.split.processes + 1
        near = near if known >= wanted else z.flatten()
        best = near.topk(min(wanted, len(near)), sorted=False).values
        if is_distributed():
            every = _agreement.gathered(F.pad(best, (0, wanted - len(best)), value=-math.inf))
            best = every.topk(wanted, sorted=False).values
        return best.min().clamp(min=0) if len(best) == wanted else z.new_zeros(())

    def _activate(self, z: Tensor, lists: Lists | None, limit: Tensor | None = None) -> Tensor:
        """Return the values of pre-activations, of all (B, N) or of listed ones (P,)."""

        def each(parameter: Tensor) -> Tensor:
            parameter = self.split.own(parameter)
            return parameter if lists is None else parameter[lists.units]

        if isinstance(self.estimator, JumpReLU):
            return jump_relu(z, each(self.estimator.theta), self.estimator.bandwidth)
        if self.activation == "gated":
            size = each(self.log_magnitude).exp() * (z - each(self.encoder_bias)) + each(self.magnitude_bias)
            return size.relu() * (z.detach() > 0)
        if limit is not None:
            return torch.where(z > limit, z, 0.0)
        return self.estimator(z, torch.zeros_like(z)).relu() if self.activation == "top_k" else z.relu()

    def _sum(self, code: SparseCode) -> Tensor:
        """Return Σ_n f_n W_dec[n], (B, D)."""
        weight = self.split.own(self.decoder_weight)
        if code.dense is not None:
            return self.split.total(code.dense @ (UnitRows.apply(weight) if self.unit_decoder else weight))
        values, lists = code.values.reshape(-1), code.lists()
        if not torch.is_grad_enabled():
            return self.split.total(by_example(values, weight, lists))
        return self.split.total(ListedSum.apply(values, weight, lists, self.sparse_grad, self.unit_decoder))

    def _sparsity(self, code: SparseCode, extra: "_Extra", centred: Tensor) -> Tensor:
        """Return the weighted penalty of open latents; without those that have none, zero."""
        batch, z, lists = len(centred), extra.z, None if code.dense is not None else code.lists()
        own, total = self.split.own, self.split.total
        if isinstance(self.estimator, JumpReLU):
            theta = own(self.estimator.theta)
            steps = jump_step(z, theta if lists is None else theta[lists.units], self.estimator.bandwidth)
            l0 = steps.sum(-1) if lists is None else z.new_zeros(batch).index_add(0, lists.examples(), steps)
            return self.sparsity_weight * (total(l0) / self.k - 1).square().mean()
        if self.activation == "relu":
            values = code.values if code.dense is None else code.dense
            lengths = None if self.unit_decoder else torch.linalg.vector_norm(own(self.decoder_weight), dim=1)
            if lengths is not None:
                values = values * (lengths if lists is None else lengths[lists.units])
            return self.sparsity_weight * total(values.sum()) / batch
        if self.activation == "gated":
            gate, weight = z.relu(), own(self.decoder_weight).detach()
            alone = gate @ weight if lists is None else ListedSum.apply(gate, weight, lists, self.sparse_grad, False)
            alone = total(alone)
            bias = self.decoder_bias.detach()
            error = ((centred + self.decoder_bias).detach() - alone - bias).square().sum(-1).mean()
            return self.sparsity_weight * total(gate.sum()) / batch + error
        return centred.new_zeros(())

    def _auxiliary(self, centred: Tensor, left: Tensor) -> Tensor:
        """Return the weighted error of the dead latents' reconstruction of what is left (Gao et al. 2024, A.2)."""
        dead = (self.idle >= self.dead_after).nonzero().squeeze(1)
        if not len(dead):
            return centred.new_zeros(())
        k, split, weight = min(self.auxiliary_k, len(dead)), self.split, self.split.own(self.decoder_weight)
        first = split.rank * self._here
        here = dead[(dead >= first) & (dead < first + self._here)] - first
        with torch.no_grad(), torch.autocast(centred.device.type, enabled=False):
            encoder, bias = self._encoder()
            values, at = largest(centred, encoder[here], bias[here], min(k, len(here)))
            values, lists = self._strongest(values, here[at], k)
        z = self._listed(centred, values, lists).relu()
        found = split.total(ListedSum.apply(z, weight, lists, self.sparse_grad, self.unit_decoder))
        error: Tensor = (left - found).square().sum(-1).mean()
        return self.auxiliary_weight * min(1.0, len(dead) / self.auxiliary_k) * error

    def _strongest(self, values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Lists]:
        """Return those of these values (B, k') that are among the k largest of all processes', and their lists."""
        if self.split is ALL_HERE:
            offsets = torch.arange(0, indices.numel() + 1, k, device=indices.device)
            return values.flatten(), Lists(offsets, indices.flatten(), self.d_sae)
        chosen = self.split.largest(F.pad(values, (0, k - values.shape[1]), value=-math.inf), k)[:, : values.shape[1]]
        offsets = F.pad(chosen.sum(1).cumsum(0), (1, 0))
        return values[chosen], Lists(offsets, indices[chosen], self._here)

    def _note(self, code: SparseCode) -> None:
        """Update the state when the gradient reaches the code: once per step, even if the forward pass is repeated."""
        carrier = code.dense if code.dense is not None else code.values
        if not self.training or not carrier.requires_grad or is_transformed(carrier):
            return
        opened, examples = code.opened(), code.lead.numel()
        limit = torch.full((), math.inf, dtype=carrier.dtype, device=carrier.device)
        if self.activation == "batch_top_k":
            values = carrier.detach()
            limit = torch.where(values > 0, values, limit).amin() if values.numel() else limit
        carrier.register_hook(lambda _: self._move(opened, examples, limit))

    @torch.no_grad()
    def _move(self, opened: Tensor, examples: int, limit: Tensor) -> None:
        opened = self.split.place(opened.long())
        counts = _agreement.total(torch.cat([opened, opened.new_tensor([examples])]))
        self.idle.add_(counts[-1] // self.split.processes).masked_fill_(counts[:-1] > 0, 0)
        limit = _agreement.least(limit)
        if limit.isfinite():
            start = torch.where(self.threshold == 0, limit, self.threshold)
            self.threshold.copy_(start.lerp(limit, FOLLOWS))

    def extra_repr(self) -> str:
        """Show the sizes."""
        groups = f", groups={self.groups}, open_groups={self.open_groups}" if self.groups > 1 else ""
        return f"{self.d_in}, {self.d_sae}, activation={self.activation!r}, k={self.k}{groups}"


class _Extra(NamedTuple):
    """Pre-activations, all (B, N) or the listed ones (P,), and the penalty of uneven groups."""

    z: Tensor
    balance: Tensor | None = None
