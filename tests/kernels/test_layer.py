"""ConditionalLinear on the kernels: the same numbers as the dense layer, whatever the estimator."""

import copy
import functools
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import gatelet
from gatelet.estimators import ALL

CERTAIN = [name for name, method in ALL.items() if method.needs != "objective" and name != "carms"]
SKIPPING = [name for name in CERTAIN if ALL[name].support != "all"]


def dense(x, weight, bias, gates, **_):
    return F.linear(x, weight, bias) * gates.repeat_interleave(len(weight) // gates.shape[-1], -1)


def losses_and_gradients(layer, x, noise, linear):
    layer = copy.deepcopy(layer)  # moving averages and the like start alike
    leaf = x.clone().requires_grad_()
    replicas = layer.unit.estimator.replicas
    with mock.patch.object(gatelet.nn.conditional_linear, "gated_linear", wraps=linear) as op:
        with gatelet.Tape() as tape:
            loss = layer(tape.replicate(leaf, replicas), noise=noise).sin().square().sum(-1)
        total = tape.surrogate(loss).mean() + gatelet.sparsity.penalty(layer)
        total.backward()
    assert (op.call_args.args[3] == 0).any()
    return [loss, leaf.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.cpu
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("name", SKIPPING)
def test_sparse_training_has_the_dense_gradients(name, group):
    """Bit for bit it cannot be, sums run in another order; in float64 it is to 12 digits."""
    torch.manual_seed(1)
    layer = gatelet.nn.ConditionalLinear(40, 160, 12, estimator=name, group_size=group).double()
    x = torch.rand(130, 40, dtype=torch.float64)
    logits = layer.gater(x)
    method = layer.unit.estimator
    noise = method.draw_noise(logits.expand(method.replicas, *logits.shape))
    noise = noise[0] if method.replicas == 1 else noise
    have = losses_and_gradients(layer, x, noise, functools.partial(gatelet.kernels.gated_linear, backend="numba"))
    want = losses_and_gradients(layer, x, noise, dense)
    for a, b in zip(have, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CERTAIN)
def test_the_layer_skips_where_the_estimator_allows(name, monkeypatch):
    calls = []
    module = gatelet.nn.conditional_linear
    original = module.gated_linear
    monkeypatch.setattr(module, "gated_linear", lambda *args, **how: calls.append(how) or original(*args, **how))
    layer = gatelet.nn.ConditionalLinear(40, 160, 12, estimator=name)
    layer.unit.threshold.fill_(0.0)
    with gatelet.Tape() as tape:
        layer(tape.replicate(torch.rand(3, 40), ALL[name].replicas))
    assert bool(calls) == (name in SKIPPING)
    assert not calls or (calls[0]["support"] is not None) == (ALL[name].support == "sampled")
    calls.clear()
    layer.eval()
    with torch.no_grad():
        out = layer(torch.rand(3, 40))
    assert calls
    assert out.isfinite().all()


def test_a_sampled_support_computes_a_share_of_the_closed_units():
    """The cost of training is α + q: so much is in the support, and no more."""
    layer = gatelet.nn.ConditionalLinear(40, 1600, 12, estimator=gatelet.estimators.StraightThroughSampled(share=0.2))
    with mock.patch.object(gatelet.nn.conditional_linear, "gated_linear", wraps=gatelet.kernels.gated_linear) as op:
        layer(torch.rand(100, 40))
        support = op.call_args.kwargs["support"]
        share = support[op.call_args.args[3] == 0].float().mean()
        assert 0.18 < share < 0.22
        assert support[op.call_args.args[3] != 0].all()
        with torch.no_grad():  # no gradient, no need of closed units
            layer(torch.rand(100, 40))
        assert op.call_args.kwargs["support"] is None


def test_eval_equals_dense():
    layer = gatelet.nn.ConditionalLinear(40, 160, 12, group_size=4).eval()
    layer.unit.threshold.fill_(0.0)
    x = torch.rand(5, 6, 40)
    gates = layer.unit(layer.gater(x))
    torch.testing.assert_close(layer(x), dense(x, layer.expert.weight, layer.expert.bias, gates))


def test_autocast_runs_dense(device):
    layer = gatelet.nn.ConditionalLinear(40, 160, 12).eval()
    layer.unit.threshold.fill_(0.0)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        assert layer(torch.rand(3, 40)).dtype == torch.bfloat16
