"""The sparse autoencoder: its numbers against a dense one written out, its state, its refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gatelet
import ranks
from gatelet.nn import SparseAutoencoder, SparseCode, sparse_autoencoder

D, N, K, B = 12, 64, 4, 10
ACTIVATIONS = ("top_k", "batch_top_k", "jump_relu", "relu", "gated")


def made(activation, dtype=torch.float64, **options):
    torch.manual_seed(1)
    sae = SparseAutoencoder(D, N, activation, K, dtype=dtype, **options)
    with torch.no_grad():
        sae.encoder_weight.add_(0.2 * torch.randn(N, D))
        sae.encoder_bias.copy_(torch.randn(N) / 2)
        sae.decoder_bias.copy_(torch.randn(D) / 3)
        sae.input_scale.fill_(1.3)
        if activation == "gated":
            sae.log_magnitude.copy_(torch.randn(N) / 5)
            sae.magnitude_bias.copy_(torch.randn(N) / 5)
    return sae


def inputs(dtype=torch.float64, rows=B):
    return torch.randn(rows, D, dtype=dtype, generator=torch.Generator().manual_seed(3))


class Heard(torch.autograd.Function):
    """z·1[z > θ] or 1[z > θ], with the kernel estimate for θ: written out once more, for dense tensors."""

    @staticmethod
    def forward(ctx, z, theta, width, times):
        ctx.save_for_backward(z, theta)
        ctx.width, ctx.times = width, times
        return (z if times else 1.0) * (z > theta)

    @staticmethod
    def backward(ctx, slope):
        z, theta = ctx.saved_tensors
        kernel = ((z - theta).abs() <= ctx.width / 2) / ctx.width
        scale = theta if ctx.times else 1.0
        return slope * (z > theta) if ctx.times else None, -(slope * scale * kernel).sum(0), None, None


def dense_loss(sae, x):
    """The loss by dense products and PyTorch's derivatives."""
    scaled = x * sae.input_scale
    rows = F.normalize(sae.decoder_weight, dim=1)  # of unit rows: their value, and a gradient without parallel part
    z = (scaled - sae.decoder_bias) @ sae.encoder_weight.T + sae.encoder_bias
    extra = 0.0
    if sae.activation == "top_k":
        f = z.relu() * torch.zeros_like(z).scatter(1, z.topk(K).indices, 1.0)
    elif sae.activation == "batch_top_k":
        f = z * (z >= z.flatten().topk(K * len(x)).values.min().clamp(min=1e-30))
    elif sae.activation == "jump_relu":
        theta = sae.estimator.log_threshold.exp()
        f = Heard.apply(z, theta, sae.estimator.bandwidth, True)
        l0 = Heard.apply(z, theta, sae.estimator.bandwidth, False).sum(1)
        extra = sae.sparsity_weight * ((l0 / K - 1) ** 2).mean()
    elif sae.activation == "relu":
        f = z.relu()
        extra = sae.sparsity_weight * f.sum(1).mean()
    else:
        linear = (scaled - sae.decoder_bias) @ sae.encoder_weight.T
        f = (z > 0) * (sae.log_magnitude.exp() * linear + sae.magnitude_bias).relu()
        alone = z.relu() @ sae.decoder_weight.detach() + sae.decoder_bias.detach()
        extra = sae.sparsity_weight * z.relu().sum(1).mean() + ((scaled - alone) ** 2).sum(1).mean()
    out = f @ rows + sae.decoder_bias
    return ((scaled - out) ** 2).sum(1).mean() + extra, out / sae.input_scale


def gradients(loss, sae):
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "lists"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_output_and_gradients_are_the_dense_ones(activation, few, sparse_grad, monkeypatch):
    monkeypatch.setattr(sparse_autoencoder, "FEW", few)
    sae, x = made(activation, sparse_grad=sparse_grad, bandwidth=0.5), inputs()
    found = sae.loss(x)
    wanted, output = dense_loss(sae, x)
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(found.output, output.detach())
    mine, truth = gradients(found.total, sae), gradients(wanted, sae)
    assert any(value.abs().max() > 1e-3 for value in truth.values())
    for name, value in truth.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_gradients_agree_to_1e5(activation):
    sae, x = made(activation, torch.float32), inputs(torch.float32)
    mine, truth = gradients(sae.loss(x).total, sae), gradients(dense_loss(sae, x)[0], sae)
    for name, value in truth.items():
        assert (mine[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_decode_of_encode_and_the_input_has_its_gradient(activation):
    sae, x = made(activation).eval(), inputs().requires_grad_()
    if activation == "batch_top_k":
        sae.threshold.fill_(1.0)
    code = sae.encode(x)
    dense = code.to_dense()
    torch.testing.assert_close(sae.decode(code), (dense @ sae.decoder_weight + sae.decoder_bias) / sae.input_scale)
    torch.testing.assert_close(sae(x), sae.decode(code))
    csr = code.to_sparse_csr()
    torch.testing.assert_close(csr.to_dense(), dense.detach())
    assert torch.equal(code.l0, (dense != 0).sum(1))
    assert torch.equal(code.opened(), (dense != 0).any(0))
    (mine,) = torch.autograd.grad(sae(x).sin().sum(), x)
    step = 1e-6 * torch.ones_like(x)
    moved = (sae(x + step).sin().sum(1) - sae(x - step).sin().sum(1)) / 2e-6
    torch.testing.assert_close(mine.sum(1), moved.detach(), rtol=1e-4, atol=1e-5)


def test_leading_shapes_and_an_empty_batch():
    sae = made("top_k")
    x = inputs(rows=6).view(2, 3, D)
    assert sae(x).shape == x.shape
    assert sae.encode(x).indices.shape == (2, 3, K)
    torch.testing.assert_close(sae(x).view(6, D), sae(x.view(6, D)))
    assert sae(x[:, :0]).shape == (2, 0, D)
    assert sae(x[0, 0]).shape == (D,)


def test_batch_top_k_keeps_k_on_average_and_learns_a_threshold():
    sae, x = made("batch_top_k"), inputs()
    found = sae.loss(x)
    assert found.code.l0.sum() == K * B
    assert found.code.l0.unique().numel() > 1
    found.total.backward()
    values = found.code.to_dense()
    assert sae.threshold == values[values > 0].min()
    z = (x * sae.input_scale - sae.decoder_bias) @ sae.encoder_weight.T + sae.encoder_bias
    sae.eval()
    torch.testing.assert_close(sae.encode(x).to_dense(), z * (z > sae.threshold))
    assert sae.encode(x).l0.sum() == K * B - 1  # all but the least itself


def test_the_auxiliary_loss_lets_dead_latents_reconstruct_what_is_left():
    sae, x = made("top_k", dead_after=100, auxiliary_k=3, auxiliary_weight=0.5), inputs()
    sae.idle[40:] = 100
    found = sae.loss(x)
    centred = x * sae.input_scale - sae.decoder_bias
    z = centred @ sae.encoder_weight.T + sae.encoder_bias
    f = z.relu() * torch.zeros_like(z).scatter(1, z.topk(K).indices, 1.0)
    rows = F.normalize(sae.decoder_weight, dim=1)
    left = (centred - f @ rows).detach()
    z = z.masked_fill(sae.idle < 100, -math.inf)
    g = torch.zeros_like(z).scatter(1, z.topk(3).indices, z.topk(3).values.relu())
    wanted = 0.5 * ((left - g @ rows) ** 2).sum(1).mean()
    torch.testing.assert_close(found.auxiliary, wanted)
    mine, truth = gradients(found.auxiliary, sae), gradients(wanted, sae)
    for name, value in truth.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11)
    assert truth["encoder_weight"][40:].abs().max() > 0
    assert sae.eval().loss(x).auxiliary == 0


def test_the_state_moves_once_per_step_and_only_in_training():
    sae, x = made("top_k"), inputs()
    before = {name: value.clone() for name, value in sae.named_buffers()}
    sae.loss(x)
    sae.eval().loss(x).total.backward()
    assert all(torch.equal(value, before[name]) for name, value in sae.named_buffers())
    found = sae.train().loss(x)
    found.total.backward()
    opened = found.code.opened()
    assert torch.equal(sae.idle, torch.where(opened, 0, B))
    assert sae.dead == 0
    sae.dead_after = B
    assert sae.dead == int((~opened).sum())
    assert {n: v.shape for n, v in sae.named_buffers()} == {n: v.shape for n, v in before.items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("activation", ["top_k", "batch_top_k", "relu"])
def test_checkpointing_gives_the_same_numbers_and_moves_the_state_once(activation, reentrant):
    plain, recomputed, x = made(activation, dead_after=1), made(activation, dead_after=1), inputs()
    for _ in range(2):
        plain.loss(x).total.backward()
        source = x.clone().requires_grad_()
        checkpoint(lambda each: recomputed.loss(each).total, source, use_reentrant=reentrant).backward()
    for (name, mine), (_, truth) in zip(recomputed.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(mine, truth), name
    for (name, mine), (_, truth) in zip(recomputed.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("activation", ["jump_relu", "batch_top_k"])
def test_start_from_takes_scale_mean_and_threshold(activation):
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, N, activation, K)
    x = 7 * torch.randn(500, D) + 3
    sae.start_from(x)
    scaled = x * sae.input_scale
    torch.testing.assert_close(scaled.norm(dim=1).mean(), torch.tensor(D**0.5))
    torch.testing.assert_close(sae.decoder_bias.detach(), scaled.mean(0))
    assert sae.eval().encode(x).l0.float().mean().item() == pytest.approx(K, rel=0.01)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_start_from_gives_the_encoder_the_length_at_which_reconstructions_fit(activation):
    torch.manual_seed(0)
    sae, x = SparseAutoencoder(D, N, activation, K, dtype=torch.float64), 7 * torch.randn(500, D).double() + 3
    sae.start_from(x)
    centred, found = (each * sae.input_scale - sae.decoder_bias for each in (x, sae(x)))
    errors = [(centred - share * found).square().sum() for share in (0.99, 1.0, 1.01)]
    assert errors[1] < min(errors[0], errors[2])
    before = sae.encoder_weight.clone()
    sae.start_from(x)
    torch.testing.assert_close(sae.encoder_weight, before)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_one_example_is_decoded_as_several_are(lead):
    sae, x = made("top_k"), inputs()
    wanted = sae.decode(sae.encode(x))[0]
    assert wanted.requires_grad
    with torch.no_grad():
        code = sae.encode(x[0].view(*lead, D))
        torch.testing.assert_close(sae.decode(code), wanted.detach().view(*lead, D))


@pytest.mark.parametrize("activation", ["jump_relu", "batch_top_k"])
def test_learned_thresholds_hold_k_latents_open_on_new_examples(activation):
    torch.manual_seed(0)
    truth, k = F.normalize(torch.randn(256, 32), dim=1), 8
    examples = ((torch.rand(8192, 256) < 0.03) * torch.rand(8192, 256) * 8) @ truth
    sae = SparseAutoencoder(32, 256, activation, k, sparse_grad=True)
    sae.start_from(examples)
    optimizer = gatelet.RowAdam(sae.parameter_groups(2e-3))
    for batch in examples[:7680].split(64) * 3:
        optimizer.zero_grad()
        sae.loss(batch).total.backward()
        optimizer.step()
    assert sae.eval().encode(examples[7680:]).l0.float().mean().item() == pytest.approx(k, rel=0.15)


def test_parameter_groups_mark_the_decoder_and_hasten_thresholds():
    sae = SparseAutoencoder(D, N, "jump_relu", K)
    groups = sae.parameter_groups(1e-3)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in sae.parameters()}
    assert [group["params"] for group in groups if group["unit_rows"]] == [[sae.decoder_weight]]
    assert [group["params"] for group in groups if group["lr"] > 1e-3] == [[sae.estimator.log_threshold]]
    assert not any(group["unit_rows"] for group in SparseAutoencoder(D, N, unit_decoder=False).parameter_groups(1.0))
    with pytest.raises(ValueError, match="lr must be"):
        sae.parameter_groups(0.0)


def test_decoder_rows_keep_their_length_and_gradients_stay_tangent():
    sae, x = made("top_k"), inputs()
    sae.loss(x).total.backward()
    along = (sae.decoder_weight.grad * sae.decoder_weight).sum(1)
    torch.testing.assert_close(along, torch.zeros(N, dtype=torch.float64))
    free = made("top_k", unit_decoder=False)
    free.loss(x).total.backward()
    assert (free.decoder_weight.grad * free.decoder_weight).sum(1).abs().max() > 1e-3
    with torch.no_grad():
        sae.decoder_weight.mul_(3)
    sae.normalise_decoder_()
    torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(N, dtype=torch.float64))


def test_groups_compute_only_their_latents_and_the_router_learns():
    sae, x = made("top_k", groups=8, open_groups=2, balance_weight=0.7), inputs()
    found = sae.loss(x)
    centred = x * sae.input_scale - sae.decoder_bias
    p = (centred @ sae.router_weight.T + sae.router_bias).softmax(1)
    opened = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
    z = centred @ sae.encoder_weight.T + sae.encoder_bias
    masked = z.masked_fill(opened.repeat_interleave(8, 1) == 0, -math.inf)
    kept = torch.zeros_like(z).scatter(1, masked.topk(K).indices, 1.0)
    f = z.relu() * kept * p.repeat_interleave(8, 1)
    out = f @ F.normalize(sae.decoder_weight, dim=1)
    wanted = ((centred - out) ** 2).sum(1).mean() + 0.0
    balance = 0.7 * 8 * (opened.mean(0) / 2 * p.mean(0)).sum()
    torch.testing.assert_close(found.balance, balance)
    # x̄ does not depend on the bias, centred and output do alike
    wanted = (((centred + sae.decoder_bias).detach() - out - sae.decoder_bias) ** 2).sum(1).mean() + balance
    torch.testing.assert_close(found.total, wanted)
    mine, truth = gradients(found.total, sae), gradients(wanted, sae)
    for name, value in truth.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: name + text)
    assert truth["router_weight"].abs().max() > 0


def test_transforms_and_autocast_give_the_same_numbers(device):
    sae, x = made("top_k"), inputs()
    torch.testing.assert_close(torch.func.vmap(sae)(x), sae(x))
    single = made("top_k", torch.float32)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(single(x.float()), single(x.float()))
        lowered = single(x.bfloat16())
    torch.testing.assert_close(lowered, single(x.bfloat16().float()))


def test_state_dict_round_trip_and_copies():
    sae, x = made("batch_top_k"), inputs()
    sae.loss(x).total.backward()
    other = SparseAutoencoder(D, N, "batch_top_k", K, dtype=torch.float64)
    other.load_state_dict(sae.state_dict())
    torch.testing.assert_close(other.eval()(x), sae.eval()(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 65}, "k must be at most d_sae"),
        ({"activation": "topk"}, "unknown activation 'topk'.*did you mean 'top_k'"),
        ({"groups": 5}, "groups must divide d_sae"),
        ({"groups": 4, "open_groups": 5}, "open_groups must be at most groups"),
        ({"groups": 4, "activation": "relu"}, "groups: are for activation 'top_k'"),
        ({"groups": 64, "open_groups": 2}, "k: 2 groups of 1 latents"),
        ({"k": 0}, "k must be an integer"),
        ({"dead_after": 0}, "dead_after"),
    ],
)
def test_bad_settings_are_refused_by_name(options, told):
    with pytest.raises(ValueError, match=told):
        SparseAutoencoder(D, N, **({"k": K} | options))


def test_bad_inputs_are_refused_by_name():
    sae = made("top_k")
    with pytest.raises(ValueError, match="x must have 12 features"):
        sae(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must hold an example"):
        sae.loss(inputs()[:0])
    other = SparseAutoencoder(D, 2 * N, dtype=torch.float64)
    with pytest.raises(ValueError, match="code: is of 128 latents"):
        sae.decode(other.encode(inputs()))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("parts", "error", "told"),
    [
        ({"indices": [[1, 2], [3, 10**9]]}, ValueError, "code: its indices must lie in 0 … 63, but 1000000000"),
        ({"indices": [[-(10**9), 2], [3, 4]]}, ValueError, "code: its indices must lie in 0 … 63, but -1000000000"),
        ({"dtype": torch.int32}, TypeError, "code: its indices must be int64"),
        ({"values": (2, 1)}, ValueError, r"code: has indices \(2, 2\), but values \(2, 1\)"),
        ({"lead": (3,)}, ValueError, r"code: has indices \(2, 2\), .* examples \(3,\)"),
        ({"indices": [1, 2, 3], "offsets": [0, 9, 3]}, ValueError, "code: its offsets must ascend from 0 to .* 3"),
        ({"indices": [1, 2, 3], "offsets": [0, 3]}, ValueError, "code: has 2 offsets, but 2 examples"),
    ],
)
def test_codes_whose_parts_do_not_fit(parts, error, told, recorded):
    sae = made("top_k").cpu()
    indices = torch.tensor(parts.get("indices", [[1, 2], [3, 4]]), dtype=parts.get("dtype", torch.int64))
    values = torch.ones(parts.get("values", indices.shape), dtype=torch.float64)
    offsets = torch.tensor(parts["offsets"]) if "offsets" in parts else None
    code = SparseCode(indices, values, N, torch.Size(parts.get("lead", (2,))), offsets)
    with torch.set_grad_enabled(recorded), pytest.raises(error, match=told):
        sae.decode(code)


@pytest.mark.parametrize(
    ("indices", "values", "told"),
    [
        ([[1, 10**9]], (1, 2), "code: its indices must lie in 0 … 63, but 1000000000"),
        ([[-1, 2]], (1, 2), "code: its indices must lie in 0 … 63, but -1"),
        ([[1, 2]], (1, 1), r"code: has indices \(1, 2\), but values \(1, 1\)"),
        ([[1, 2]], (2, 1), r"code: has indices \(1, 2\), but values \(2, 1\)"),
        ([[1, 2], [3, 4]], (2, 2), r"code: has indices \(2, 2\), .* examples \(1,\)"),
    ],
)
def test_the_code_of_one_example_whose_parts_do_not_fit(indices, values, told):
    code = SparseCode(torch.tensor(indices), torch.ones(values, dtype=torch.float64), N, torch.Size((1,)))
    with torch.no_grad(), pytest.raises(ValueError, match=told):
        made("top_k").cpu().decode(code)


def test_a_code_that_was_changed_in_place_after_its_decoding():
    sae = made("top_k").cpu()
    code = SparseCode(torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2, dtype=torch.float64), N, torch.Size((2,)))
    out = sae.decode(code)
    code.indices.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        out.sum().backward()
    sae.decode(code).sum().backward()


@pytest.mark.cpu
def test_values_that_are_nan_are_counted():
    bad = inputs()
    bad[2, 3] = math.nan
    with pytest.raises(ValueError, match="x holds 1 values that are NaN"):
        made("top_k").loss(bad)


# -------------------------------------------------------------------- two processes


def steps(rank, world):
    """Parameters and state after some steps, of whose batches this process sees its part."""
    states = {}
    for activation in ("top_k", "batch_top_k", "jump_relu"):
        sae = made(activation, dead_after=15)
        if activation == "top_k":
            sae = made(activation, dead_after=15, groups=4, open_groups=2)
        model = torch.nn.parallel.DistributedDataParallel(Losses(sae)) if world > 1 else Losses(sae)
        optimizer = torch.optim.SGD(sae.parameters(), 0.01)
        for step in range(4):
            x = torch.randn(8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x.chunk(world)[rank]).backward()
            optimizer.step()
        states |= {f"{activation}.{key}": value for key, value in sae.state_dict().items()}
    return states


class Losses(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.loss(x).total


def main(rank, folder):
    """What each of the two processes runs."""
    ranks.join(rank, folder)
    torch.save(steps(rank, 2), f"{folder}/{rank}.pt")
    ranks.leave()


@pytest.mark.cpu
def test_two_processes_give_the_numbers_of_one(tmp_path):
    first, second = ranks.saved(main, tmp_path)
    whole = steps(0, 1)
    assert any(value.abs().max() >= 15 for name, value in whole.items() if name.endswith("idle"))
    for key, value in whole.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-9, msg=lambda text, key=key: key + text)
