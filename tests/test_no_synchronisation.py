"""Nothing in a conditional layer's training step makes the host wait for an accelerator.

Tensors on torch's "meta" device have no values: whoever asks for one (``.item()``, ``bool(tensor)``, ``nonzero``) gets
an error. So a step that runs there looks at no value, and this is seen without an accelerator. Copies from the host are
not seen; torch's own sync-debug mode sees them where there is a GPU.
"""

import contextlib
import warnings

import pytest
import torch

import gatelet
from gatelet.estimators import ALL
from gatelet.kernels import gated_ffn, gated_input_linear, gated_linear, open_pattern, sample_gates
from gatelet.sparsity import AdaptiveL1, BetaNoise, FiringRateBias, KLRate

IN_A_LAYER = [name for name, method in ALL.items() if method.needs != "objective" and name != "carms"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def step(layer, x, replicas):
    with gatelet.Tape() as tape:
        loss = layer(tape.replicate(x, replicas)).square().sum(-1)
    (tape.surrogate(loss).mean() + gatelet.sparsity.penalty(layer)).backward()


def make(name, every_controller=False, **sizes):
    controllers = [AdaptiveL1(0.1), FiringRateBias(0.1), BetaNoise(0.1)] if every_controller else None
    return gatelet.nn.ConditionalLinear(40, 160, 12, estimator=name, group_size=8, sparsity=controllers, **sizes)


@pytest.fixture
def valueless(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # asks for a device that can autocast


@pytest.mark.usefixtures("valueless")
@pytest.mark.parametrize("every_controller", [False, True])
@pytest.mark.parametrize("name", IN_A_LAYER)
def test_a_training_step_looks_at_no_value(name, every_controller):
    layer = make(name, every_controller).to("meta")
    x = torch.rand(6, 40, device="meta", requires_grad=True)
    step(layer, x, ALL[name].replicas)
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.expert.parameters())
    layer.eval()
    with torch.no_grad():
        layer(x)


@pytest.mark.usefixtures("valueless")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["straight_through", "straight_through_sampled", "score_function"])
def test_a_feed_forward_step_looks_at_no_value(name, gated):
    layer = gatelet.nn.ConditionalFFN(40, 160, 12, estimator=name, gated=gated).to("meta")
    x = torch.rand(6, 40, device="meta", requires_grad=True)
    step(layer, x, 1)
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.up.parameters())


@pytest.mark.usefixtures("valueless")
def test_a_step_that_looks_is_seen():
    layer = make("straight_through").to("meta")
    layer.sparsity[0].register_forward_hook(lambda *_: None)
    original = KLRate.penalty
    layer.sparsity[0].penalty = lambda *given: original(layer.sparsity[0], *given) if given[-1].any() else None
    with pytest.raises(RuntimeError, match=r"item\(\)"):
        layer(torch.rand(6, 40, device="meta"))


def test_the_ops_look_at_no_value():
    def tensor(*shape):
        return torch.rand(shape, device="meta", requires_grad=True)

    x, weight, gate = tensor(6, 40), tensor(16, 40), tensor(6, 16)
    gated_linear(x, weight, None, gate).sum().backward()
    gated_ffn(x, weight, None, gate, "gelu", weight.t(), None).sum().backward()
    gated_input_linear(gate, open_pattern(gate), weight.t()).sum().backward()
    sample_gates(gate)


# -------------------------------------------------------------------- with a GPU


@contextlib.contextmanager
def synchronising_is_an_error():
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("every_controller", [False, True])
@pytest.mark.parametrize("name", IN_A_LAYER)
def test_a_training_step_does_not_synchronise(name, every_controller):
    layer = make(name, every_controller).cuda()
    x = torch.rand(600, 40, device="cuda", requires_grad=True)
    step(layer, x, ALL[name].replicas)  # kernels are loaded, buffers get their sizes
    with synchronising_is_an_error():
        step(layer, x, ALL[name].replicas)


@GPU
def test_a_step_that_synchronises_is_seen():
    x = torch.rand(6, 40, device="cuda")
    with synchronising_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@GPU
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("batch", [1, 600])
def test_a_graph_captures_an_inference_step(batch, backend, monkeypatch):
    layer = gatelet.nn.ConditionalLinear(1024, 4096, 32, group_size=64).cuda().eval()
    layer.unit.threshold.fill_(0.0)
    if backend != "auto":
        module = gatelet.nn.conditional_linear
        monkeypatch.setattr(
            module, "gated_linear", lambda *given, **named: gated_linear(*given, **named, backend=backend)
        )
    x = torch.rand(batch, 1024, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(torch.rand_like(x))
        graph.replay()
        torch.testing.assert_close(out, layer(x))
