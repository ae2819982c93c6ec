"""A layer used twice, skipped, only looked at; padding that holds anything; masks around generate()."""

import copy

import pytest
import torch
from torch import nn

import gatelet
from gatelet.nn import ConditionalFFN, ConditionalLinear, masking
from gatelet.sparsity import AdaptiveL1, FiringRateBias, calibrate_thresholds, penalty

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["straight_through", "score_function", "rectifier"])
def test_a_layer_used_twice_counts_twice(name):
    layer = ConditionalLinear(24, 24, 4, estimator=name)
    terms = []
    with gatelet.Tape():
        torch.manual_seed(0)
        first = layer(X)
        terms.append(penalty(layer))
        second = layer(first)
        terms.append(penalty(layer))
        torch.manual_seed(0)
        y = layer(layer(X))
        total = penalty(layer)
    torch.testing.assert_close(total, sum(terms), rtol=0.25 if name == "rectifier" else 1e-3, atol=0)  # λ has moved
    del first, second, y
    gradients = torch.autograd.grad(total, layer.gater.gates.weight)[0]
    assert gradients.isfinite().all()


def test_a_forward_pass_that_was_dropped_or_gone_back_through_counts_no_more():
    layer = ConditionalLinear(24, 24, 4)
    kept = layer(X)
    kept.sum().backward()  # its penalty was not wanted
    layer(X + 1)  # a look with gradients, its output dropped
    layer(X)
    alone = copy.deepcopy(layer)
    alone(X)
    torch.testing.assert_close(penalty(layer), penalty(alone))


def test_penalties_that_nobody_takes_keep_no_graph():
    import gc
    import weakref

    layer, graphs = ConditionalLinear(24, 24, 4), []
    for _ in range(3):
        y = layer(X)
        graphs.append(weakref.ref(y))
        del y
    gc.collect()
    assert all(use() is None for use in layer._uses)
    assert all(graph() is None for graph in graphs)


def test_a_layer_that_was_skipped_counts_nothing():
    net = nn.ModuleList([ConditionalLinear(24, 24, 4) for _ in range(2)])
    y = net[1](X)
    term = penalty(net)
    assert term > 0
    (y.sum() + term).backward()
    assert net[0].gater.gates.weight.grad is None
    with pytest.raises(RuntimeError, match="has not run in training"):
        penalty(net)


def scribble(control):
    return [value.clone() for value in control.state_dict().values()]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [lambda: FiringRateBias(0.9, step=1.0), lambda: AdaptiveL1(0.9, weight=0.1)])
def test_a_look_at_a_layer_in_training_moves_nothing(context, make):
    layer = ConditionalFFN(24, 64, 4, sparsity=[make()])
    layer(X)
    y, before = layer(X), scribble(layer.sparsity)
    with context():
        layer(X + 1)
    assert all(torch.equal(a, b) for a, b in zip(scribble(layer.sparsity), before, strict=True))
    assert not any(value.is_inference() for value in [*layer.buffers(), layer.opened])
    (y.sum() + penalty(layer)).backward()  # that of the pass with gradients
    assert layer.gater.gates.weight.grad.isfinite().all()
    layer(X).sum().backward()
    assert not all(torch.equal(a, b) for a, b in zip(scribble(layer.sparsity), before, strict=True))
    layer.eval()
    assert int(layer.tokens) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [lambda: ConditionalFFN(24, 64, 4), lambda: ConditionalLinear(24, 64, 4)])
def test_what_stands_at_padding_is_not_looked_at(make, training, bad):
    layer, x = make(), torch.randn(2, 5, 24)
    calibrate_thresholds(layer, [x])
    layer.train(training)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    dirty = torch.where(mask[..., None], x, bad).requires_grad_()
    found = []
    for each in (x, dirty):
        torch.manual_seed(0)
        found.append(layer(each, mask=mask))
        with masking(layer, mask):
            torch.manual_seed(0)
            found.append(layer(each))
    assert all(torch.equal(found[0], other) for other in found)
    found[-1].sum().backward()
    assert dirty.grad.isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer(dirty)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=64))
    gatelet.convert(model, 0.25, bottleneck=2)
    calibrate_thresholds(model, [torch.randint(11, (4, 8))])
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_generate_with_a_padding_mask(llama, options):
    ids, mask = torch.randint(1, 11, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    ids = ids * mask
    named = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0} | options
    with masking(llama, mask):
        torch.manual_seed(0)
        padded = llama.generate(ids, **named)
    torch.manual_seed(0)
    assert torch.equal(padded, llama.generate(ids, **named))  # padding is attended by nobody
    first = torch.randint(1, 11, (2, 5))
    with masking(llama, mask), pytest.raises(ValueError, match="mask must be one boolean per token"):
        llama(first)
