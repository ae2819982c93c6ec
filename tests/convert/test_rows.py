"""keep_rows: the block's own numbers in eval(), to what the format of its weights allows; few calls, no way back."""

import copy

import pytest
import torch
import transformers
from torch import nn

import gatelet
from gatelet.convert import blocks, keep_rows
from gatelet.convert.rows import RowsFFN
from gatelet.kernels import int8_rows

CLOSE = {"float32": 1e-5, "bf16": 1e-2, "int8": 2e-2}


def llama(act="silu", bias=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, hidden_act=act, mlp_bias=bias, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).eval()


def converted(model, **options):
    gatelet.convert(model, target_rate=0.4, bottleneck=4, **options)
    ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    gatelet.sparsity.calibrate_thresholds(model, [ids])
    return model, ids


@pytest.mark.parametrize("weights", CLOSE)
@pytest.mark.parametrize("gater", ["mlp", "self"])
@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama("gelu_pytorch_tanh"), lambda: llama("relu", bias=True)])
@pytest.mark.parametrize("tokens", [1, 12])
def test_as_the_block_in_eval(make, gater, weights, tokens):
    model, ids = converted(make(), gater=gater)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for owner, gating in blocks(model).values():
            want, have = owner(x), RowsFFN(owner, gating, weights)(x)
            # A gate at its threshold may fall on the other side where the activation that decides was rounded.
            error = (have - want).norm() / want.norm()
            assert error < (CLOSE[weights] if gater == "mlp" or weights == "float32" else 0.2)
        want = model(ids).logits
        kept = keep_rows(model, weights)
        assert sum(isinstance(module, RowsFFN) for module in kept.modules()) == 2
        assert (kept(ids).logits - want).norm() / want.norm() < (1e-4 if weights == "float32" else 0.3)


def test_int8_is_the_dense_formula_with_rounded_weights():
    model, _ = converted(llama(), gater="mlp")
    block = model.model.layers[0].mlp
    kept = RowsFFN(block, block.gating, "int8")
    x = torch.randn(3, 32)
    rounded = {
        name: (lambda rows: rows.values * rows.scales[:, None])(int8_rows(weight))
        for name, weight in (
            ("g", block.gate_proj.weight),
            ("u", block.up_proj.weight),
            ("d", block.down_proj.weight.t()),
        )
    }
    with torch.no_grad():
        gate = block.gating.gater(x) > block.gating.unit.threshold
        hidden = torch.nn.functional.silu(x @ rounded["g"].t()) * (x @ rounded["u"].t()) * gate
        torch.testing.assert_close(kept(x), hidden @ rounded["d"], rtol=1e-4, atol=1e-5)


def test_the_rest_of_the_model_may_be_bfloat16():
    model, ids = converted(llama())
    want = model(ids).logits
    kept = keep_rows(copy.deepcopy(model), "bf16").to(torch.bfloat16)
    assert kept.model.layers[0].mlp.gater.hidden.weight.dtype == torch.float32
    have = kept(ids).logits
    assert have.dtype == torch.bfloat16
    assert (have.float() - want).norm() / want.norm() < 0.1


def test_refused():
    fresh = llama()
    gatelet.convert(fresh, target_rate=0.4, bottleneck=4)
    with pytest.raises(ValueError, match="model: its gates have no threshold yet"):
        keep_rows(fresh)
    with pytest.raises(ValueError, match="unknown weights 'int4'"):
        keep_rows(converted(llama())[0], "int4")
    with pytest.raises(ValueError, match="gates of NoisyRectifier are more than 0 or 1"):
        keep_rows(converted(llama(), estimator="noisy_rectifier")[0])
    with pytest.raises(ValueError, match="holds no converted block that is a module of its own"):
        keep_rows(llama())
