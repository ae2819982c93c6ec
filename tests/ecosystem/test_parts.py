"""What people hang on a layer's affine maps: it acts, in training and in eval(), or is refused by name."""

import copy
import functools
import io
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import gatelet
from gatelet.nn import ConditionalFFN, ConditionalLinear
from gatelet.nn.parts import ByUnit
from gatelet.sparsity import calibrate_thresholds, penalty

X = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
HONOURED = pytest.mark.filterwarnings("ignore:gatelet.nn. a .* runs by its own forward:UserWarning")
OLD = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def linear(**options):
    return ConditionalLinear(96, 768, 8, **{"estimator": "straight_through_open"} | options)


def ffn(**options):
    return ConditionalFFN(96, 768, 8, **{"estimator": "straight_through_open"} | options)


def gated(**options):
    return ffn(gated=True, activation="silu", **options)


MAKE = {"linear": (linear, ["expert"]), "ffn": (ffn, ["up", "down"]), "gated": (gated, ["up", "glu", "down"])}
every = pytest.mark.parametrize(("make", "names"), MAKE.values(), ids=MAKE)


def by_modules(layer, x, gates):
    """What the layer means, by its modules' own forward."""
    if isinstance(layer, ConditionalLinear):
        return layer.expert(x) * gates
    hidden = nn.functional.gelu(layer.up(x)) if layer.glu is None else nn.functional.silu(layer.glu(x)) * layer.up(x)
    return layer.down(hidden * gates)


def hang(how, module):
    """Put something on a module; return the parameters that must then learn."""
    if how == "pruned":
        prune.l1_unstructured(module, "weight", 0.5)
        return [module.weight_orig]
    if how == "old weight_norm":
        weight_norm(module)
        return [module.weight_g, module.weight_v]
    if how == "weight_norm":
        parametrizations.weight_norm(module)
        return list(module.parametrizations.parameters())
    if how == "spectral_norm":
        parametrizations.spectral_norm(module)
        return list(module.parametrizations.parameters())
    if how == "hook":
        module.register_forward_hook(lambda _, __, out: 1.5 * out)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda _, args: (args[0] + 0.1,))
    else:
        plain = module.forward
        module.forward = lambda x: plain(x) - 0.2
    return [module.weight]


@HONOURED
@OLD
@every
@pytest.mark.parametrize(
    "how", ["pruned", "old weight_norm", "weight_norm", "spectral_norm", "hook", "pre-hook", "own forward"]
)
def test_what_hangs_on_a_part_acts(make, names, how):
    torch.manual_seed(0)
    layer = make()
    learn = [p for name in names for p in hang(how, getattr(layer, name))]
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    noise = torch.rand(64, 768)
    for _ in range(2):  # the second sees what the first step did
        layer.train()
        # spectral_norm moves its vectors at every look in training: both sides start from the same ones
        twin = copy.deepcopy(layer) if how not in ("old weight_norm", "pruned") else layer
        gates = (noise < layer.gater(X).sigmoid()).float()
        want = by_modules(twin, X, gates).detach()
        y = layer(X, noise=noise)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        (y.square().mean() + penalty(layer)).backward()
        assert all(p.grad is not None and p.grad.any() for p in learn)
        optimizer.step()
        calibrate_thresholds(layer, [torch.randn(64, 96)])
        layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(
                layer(X), by_modules(layer, X, layer.decide(X)[0]), rtol=1e-4, atol=1e-4, msg=f"in eval(): {how}"
            )


@HONOURED
def test_backward_hooks_run():
    layer, seen = ffn(), []
    layer.down.register_full_backward_hook(lambda *args: seen.append(1))
    layer(X.clone().requires_grad_()).sum().backward()
    assert seen


def test_it_is_announced():
    layer = ffn()
    layer.up.forward = lambda x: x @ layer.up.weight.T
    gatelet.nn.parts._announce.cache_clear()
    with pytest.warns(UserWarning, match="a Linear of a conditional layer .* because its forward was replaced"):
        layer(X)


def test_hooks_on_the_gater_run():
    layer = linear(target_rate=0.5)
    calibrate_thresholds(layer, [X])
    layer.eval()
    with torch.no_grad():
        layer.gater.gates.register_forward_hook(lambda _, __, out: torch.full_like(out, 1e6))
        layer(X)
        assert layer.active_fraction == 1
        plain = layer.gater.forward
        layer.gater.forward = lambda x: -plain(x)
        layer(X)
        assert layer.active_fraction == 0


# -------------------------------------------------------------------- adapters, quantisation, accelerate


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


@HONOURED
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_in_transformers():
    peft = pytest.importorskip("peft")
    model, ids = llama(), torch.randint(50, (2, 8))
    gatelet.convert(model, 0.25, bottleneck=4)
    target = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=target, init_lora_weights=False))
    torch.manual_seed(1)
    (adapted(input_ids=ids, labels=ids).loss + penalty(adapted)).backward()
    lora = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(lora) == 8
    assert all(p.grad is not None and p.grad.any() for p in lora.values())
    calibrate_thresholds(adapted, [ids], forward=lambda m, batch: m(input_ids=batch))
    adapted.eval()
    with torch.no_grad():
        with_adapter = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
        assert not torch.allclose(with_adapter, without)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, with_adapter, rtol=1e-4, atol=1e-5)
    before = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=target))
    with pytest.raises(ValueError, match="adapters: merge them first, or convert the model before"):
        gatelet.convert(before, 0.25, bottleneck=4)


class Adapter(nn.Module):
    """LoRA by hand, around a Linear that may hold a Sequential's gates."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.low(x)


@HONOURED
def test_adapters_in_a_sequential():
    model = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 96))
    gatelet.convert(model, 0.25, bottleneck=4)
    peft = pytest.importorskip("peft")
    with pytest.raises(AttributeError, match="gating"):  # peft looks for what was in the module that it has replaced
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0", "2"]))
    model[0], model[2] = Adapter(model[0]), Adapter(model[2])
    y = model(X)
    (y.square().mean() + penalty(model)).backward()
    assert all(model[place].low.weight.grad.any() for place in (0, 2))
    assert gatelet.report(model).layers[0].name == "0.base.gating"
    gatelet.revert(model)
    assert not any(isinstance(part, gatelet.nn.ConditionalLayer) for part in model.modules())


@HONOURED
@pytest.mark.filterwarnings("ignore:.*(quantized|torch.ao|TypedStorage).*")
@pytest.mark.parametrize("make", [linear, ffn])
def test_dynamic_quantisation_of_a_layer(make):
    layer = make(target_rate=0.3)
    calibrate_thresholds(layer, [X])
    small = torch.ao.quantization.quantize_dynamic(layer.eval(), {nn.Linear})
    want = by_modules(small, X, small.decide(X)[0])
    torch.testing.assert_close(small(X), want)
    assert (small(X) - layer(X)).norm() < 0.3 * layer(X).norm()
    assert small.active_fraction < 0.5


@pytest.mark.filterwarnings("ignore:.*(quantized|torch.ao|TypedStorage).*")
@HONOURED
def test_dynamic_quantisation_of_converted_models():
    model = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 96))
    gatelet.convert(model, 0.25, bottleneck=4)
    calibrate_thresholds(model, [X])
    model.eval()
    gone = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(RuntimeError, match=r"its '0' held the gates .* and was replaced by a Linear"):
        gone(X)
    named = {"2": torch.ao.quantization.default_dynamic_qconfig}  # as the message says
    small = torch.ao.quantization.quantize_dynamic(model, named)
    assert (small(X) - model(X)).norm() < 0.1 * model(X).norm()
    other, ids = llama().eval(), torch.randint(50, (2, 8))
    gatelet.convert(other, 0.25, bottleneck=4)
    calibrate_thresholds(other, [ids])
    small = torch.ao.quantization.quantize_dynamic(other, {nn.Linear})
    assert (small(ids).logits - other(ids).logits).norm() < 0.2 * other(ids).logits.norm()
    assert 0 < float(gatelet.report(small).layers[0].open_share) < 0.6


def test_an_instances_own_forward_is_not_converted_over():
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = llama().eval(), torch.randint(50, (2, 8))
    mlp = model.model.layers[0].mlp
    hooks.add_hook_to_module(mlp, hooks.ModelHook())
    with pytest.raises(ValueError, match=r"its forward was replaced on this module.*remove_hook_from_module"):
        gatelet.convert(model, 0.1, bottleneck=4)
    hooks.remove_hook_from_module(mlp)
    gatelet.convert(model, 0.1, bottleneck=4)
    calibrate_thresholds(model, [ids])
    with torch.no_grad():
        before = model(ids).logits
        hooks.add_hook_to_module(mlp, hooks.ModelHook())
        torch.testing.assert_close(model(ids).logits, before)
        plain = llama().eval()
        mlp = plain.model.layers[0].mlp
        mlp.forward = functools.partial(type(mlp).forward, mlp)
        with pytest.raises(ValueError, match="convert before that is done"):
            gatelet.convert(plain, 0.1, bottleneck=4)


# -------------------------------------------------------------------- layout


def changes(weight):
    """Ways in which people change a weight."""
    with torch.no_grad():
        weight.add_(1)
    yield
    weight.data.mul_(1.5)
    yield
    weight.data = weight.data + 1
    yield
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector([weight]) * 2, [weight])
    yield
    weight.detach().copy_(torch.randn_like(weight))
    yield


@pytest.mark.parametrize("make", [ffn, gated])
def test_parameters_are_contiguous_and_a_changed_weight_is_seen(make):
    layer = make()
    assert all(p.is_contiguous() for p in layer.parameters())
    layer(X).sum().backward()
    assert all(p.grad.is_contiguous() for p in layer.parameters() if p.grad is not None)
    calibrate_thresholds(layer, [X])
    layer.eval()
    with torch.no_grad():
        for _ in changes(layer.down.weight):
            torch.testing.assert_close(layer(X), by_modules(layer, X, layer.decide(X)[0]), rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(layer(X), by_modules(layer, X, layer.decide(X)[0]), rtol=1e-4, atol=1e-3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X), layer(X))
        assert all(p.is_contiguous() for p in twin.parameters())


class Scaled(nn.Module):
    """A parametrization: the weight is another tensor at every call, often at the address of the last one."""

    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("tokens", [1, 8, 64])
@torch.no_grad()
def test_one_changed_number_of_a_parametrized_weight_is_seen(tokens):
    layer = ffn()
    parametrize.register_parametrization(layer.down, "weight", Scaled())
    calibrate_thresholds(layer, [X])
    layer.eval()
    for k in range(3):
        layer.down.parametrizations.weight.original[3 + k, 7 + k] += 500
        x = X[:tokens]
        torch.testing.assert_close(layer(x), by_modules(layer, x, layer.decide(x)[0]), rtol=1e-4, atol=1e-3)


def test_another_tensor_at_the_same_address_is_copied_anew():
    laid, memory = ByUnit(), bytearray(4 * 40 * 1000)
    for k in range(3):
        weight = torch.frombuffer(memory, dtype=torch.float32).view(40, 1000)
        weight[1, 7 + k] = 5  # the same version every time, and none of the numbers that are looked at
        assert torch.equal(laid.columns("down", weight), weight)
        del weight


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer = ffn()
        calibrate_thresholds(layer, [X])
        layer.eval()
        for x in (X[:1], X):
            want = by_modules(layer, x, layer.decide(x)[0])
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_a_copy_that_a_graph_holds_is_not_written_over():
    """GPT-2's W1 is kept transposed. Its weights are frozen here, so that the graph saves the copy itself."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    mlp = transformers.GPT2Model(config).h[0].mlp.eval()
    gatelet.convert(mlp, 0.5, bottleneck=2)
    calibrate_thresholds(mlp, [torch.randn(50, 16)])
    mlp.requires_grad_(False)
    x, found = torch.randn(3, 16).requires_grad_(), []
    for change in (False, True):
        out = mlp(x).square().sum()
        if change:
            mlp.c_fc.weight.add_(1)
            mlp(x)
        found.append(torch.autograd.grad(out, x)[0])
    assert torch.equal(*found)


def test_the_copy_is_made_once(monkeypatch):
    layer = ffn()
    calibrate_thresholds(layer, [X])
    layer.eval()
    with torch.inference_mode():
        layer(X)
        kept = layer.laid._kept["down"].copy
        layer(X)
        assert layer.laid._kept["down"].copy is kept
        assert not kept.is_inference()
    layer(X.clone().requires_grad_()).sum().backward()


def test_the_copy_of_a_training_pass_stays_until_its_graph_is_gone():
    layer = ffn(estimator="straight_through_open")
    noise, found = torch.rand(len(X), layer.up.out_features), []
    x = X.clone().requires_grad_()
    want = torch.autograd.grad(layer(x, noise=noise).sum(), x)[0]
    memory = layer.laid._kept["down"].copy.data_ptr()
    first = layer(x, noise=noise)
    assert layer.laid._kept["down"].copy.data_ptr() == memory
    weight = layer.down.weight.data
    weight.zero_()  # changes no version, and the first pass's graph is still there
    found.append(layer(x, noise=noise))
    assert layer.laid._kept["down"].copy.data_ptr() != memory
    assert not (found[0] - layer.down.bias).any()
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], want)


def test_what_wants_contiguous_parameters(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = ffn()
    layer(X).sum().backward()
    assert torch.nn.utils.parameters_to_vector(layer.parameters()).isfinite().all()
    torch.optim.LBFGS(layer.parameters(), max_iter=2).step(lambda: layer(X).square().mean())
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = ffn()
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other.down.weight, layer.down.weight)
    dense = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 96))
    state = copy.deepcopy(dense.state_dict())
    gatelet.convert(dense, 0.25, bottleneck=4)
    assert all(p.is_contiguous() for p in dense.parameters())
    dense.load_state_dict(state)
    file = io.BytesIO()
    torch.save(dense.state_dict(), file)


def test_gpt2s_conv1d():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model, ids = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), torch.randint(50, (2, 8))
    gatelet.convert(model, 0.25, bottleneck=4, estimator="straight_through_open")
    assert all(p.is_contiguous() for p in model.parameters())
    (model(ids, labels=ids).loss + penalty(model)).backward()
    assert all(p.grad.is_contiguous() for p in model.parameters())
