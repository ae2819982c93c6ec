"""keep_rows: the block's own numbers in eval(), to what the format of its weights allows; few calls, no way back."""

import copy

import pytest
import torch
import transformers
from torch import nn

import gatelet
from gatelet.convert import blocks, keep_rows, skip_inputs, spread_rate
from gatelet.convert.rows import InputRows, RowsFFN, RowsLinear, _exceeded
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
@pytest.mark.parametrize("gater", ["mlp", "self", "preview"])
@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama("gelu_pytorch_tanh"), lambda: llama("relu", bias=True)])
@pytest.mark.parametrize("tokens", [1, 12])
def test_as_the_block_in_eval(make, gater, weights, tokens):
    model, ids = converted(make(), gater=gater)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    exact = weights == "float32" and gater != "preview"  # a preview decides by int8 copies
    with torch.no_grad():
        for owner, gating in blocks(model).values():
            want, have = owner(x), RowsFFN(owner, gating, weights)(x)
            # A gate at its threshold may fall on the other side where the activation that decides was rounded.
            error = (have - want).norm() / want.norm()
            assert error < (CLOSE[weights] if gater == "mlp" or exact else 0.2)
        want = model(ids).logits
        kept = keep_rows(model, weights)
        assert sum(isinstance(module, RowsFFN) for module in kept.modules()) == 2
        assert (kept(ids).logits - want).norm() / want.norm() < (1e-4 if exact else 0.3)


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
            ("d", block.down_proj.weight),
        )
    }
    with torch.no_grad():
        gate = block.gating.gater(x) > block.gating.unit.threshold
        hidden = torch.nn.functional.silu(x @ rounded["g"].t()) * (x @ rounded["u"].t()) * gate
        torch.testing.assert_close(kept(x), hidden @ rounded["d"].t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", CLOSE)
@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama("relu", bias=True)])
def test_a_dense_model_keeps_all_units_open(make, weights):
    model, ids = make(), torch.randint(50, (4, 12))
    with torch.no_grad():
        want, one = model(ids).logits, model(ids[:1, :1]).logits
        kept = keep_rows(model, weights, rest=True)
        assert sum(isinstance(module, RowsFFN) for module in kept.modules()) == 2
        assert not any(type(module) is nn.Linear for module in kept.modules())
        assert (kept(ids).logits - want).norm() / want.norm() < 5 * CLOSE[weights]
        assert (kept(ids[:1, :1]).logits - one).norm() / one.norm() < 5 * CLOSE[weights]


def test_blocks_left_dense_are_kept_with_all_units_open():
    model, ids = converted(llama(), gater="self", where="*layers.0*")
    with torch.no_grad():
        want = model(ids).logits
        kept = keep_rows(model, "float32", rest=True)
        assert [type(layer.mlp) for layer in kept.model.layers] == [RowsFFN, RowsFFN]
        assert (kept(ids).logits - want).norm() / want.norm() < 1e-4


def test_what_hangs_on_a_map_is_not_lost():
    """An adapter or a hook on one of a block's maps would be forgotten: its rows alone are kept."""
    model, _ = converted(llama(), gater="self")
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="down_proj is a Linear whose weight must not be read alone"):
        keep_rows(model, "float32")
    dense = llama()
    dense.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: 2 * out)
    ids = torch.randint(50, (4, 12))
    with torch.no_grad():
        want = dense(ids).logits
        assert (keep_rows(dense, "float32", rest=True)(ids).logits - want).norm() / want.norm() < 1e-4
    assert [type(layer.mlp).__name__ for layer in dense.model.layers] == ["RowsFFN", "LlamaMLP"]


def test_the_rest_of_the_model_may_be_bfloat16():
    model, ids = converted(llama())
    want = model(ids).logits
    kept = keep_rows(copy.deepcopy(model), "bf16").to(torch.bfloat16)
    assert kept.model.layers[0].mlp.gater.hidden.weight.dtype == torch.float32
    have = kept(ids).logits
    assert have.dtype == torch.bfloat16
    assert (have.float() - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize("weights", CLOSE)
def test_the_rest_of_the_model_in_rows(weights):
    """Attention's maps and the vocabulary's, all rows open; the embedding, which was tied to it, stays."""
    model, ids = converted(llama(), gater="self")
    model.lm_head.weight = model.model.embed_tokens.weight
    want, embedding = model(ids).logits, model.model.embed_tokens.weight.clone()
    kept = keep_rows(model, weights, rest=True)
    assert sum(isinstance(module, RowsLinear) for module in kept.modules()) == 2 * 4 + 1
    assert not [name for name, module in kept.named_modules() if type(module) is nn.Linear]
    assert torch.equal(kept.model.embed_tokens.weight, embedding)
    one_by_one = torch.cat([kept(ids[:1, :n]).logits[:, -1:] for n in range(1, 13)], 1)
    for have in (kept(ids).logits[:1], one_by_one):
        assert (have - want[:1]).norm() / want[:1].norm() < (1e-4 if weights == "float32" else 0.3)


def test_what_hangs_on_a_map_leaves_it_alone():
    model, _ = converted(llama(), gater="self")
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out)
    assert type(keep_rows(model, rest=True).lm_head) is nn.Linear
    hook.remove()


@pytest.mark.parametrize("gater", ["self", "preview"])
def test_copies_decode_by_their_own_weights(gater):
    """What was packed for the kernels is of the copy's tensors, also after weights were replaced."""
    model, _ = converted(llama(), gater=gater)
    block = keep_rows(model, "float32", rest=True).model.layers[0].mlp
    x = torch.randn(1, 32)
    want = block(x)
    twin = copy.deepcopy(block)
    block.down_values.zero_()
    assert block(x).eq(0).all()
    torch.testing.assert_close(twin(x), want)
    twin.load_state_dict({name: value * 0 for name, value in twin.state_dict().items()}, assign=True)
    assert twin(x).eq(0).all()


def test_a_gater_that_was_kept_stays_whole():
    model, ids = converted(llama(), gater="mlp")
    made = skip_inputs(keep_rows(model, "float32"), [ids], 0.6, rest=True)
    assert all(type(layer.mlp.gater.hidden) is nn.Linear for layer in made.model.layers)
    assert sum(isinstance(module, InputRows) for module in made.modules()) == 2 * 4 + 1


@pytest.mark.parametrize("weights", CLOSE)
def test_inputs_that_are_small_are_skipped(weights):
    """TEAL's formula, at thresholds of the share asked for; the maps that were not chosen keep all rows."""
    model, ids = llama(), torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    down = model.model.layers[0].mlp.down_proj.weight.detach()
    model(ids)
    model.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()
    made = skip_inputs(model, [ids], 0.6, weights, where=lambda name: name.endswith("down_proj"), rest=True)
    assert sum(isinstance(module, InputRows) for module in made.modules()) == 2
    assert sum(isinstance(module, RowsLinear) for module in made.modules()) == 2 * 6 + 1
    kept, x = made.model.layers[0].mlp.down_proj, seen[0]
    is_open = x.abs() > kept.limit
    assert is_open.float().mean() == pytest.approx(0.6, abs=0.01)
    with torch.no_grad():
        for token in (x, x[0, 0]):
            want = torch.where(token.abs() > kept.limit, token, 0) @ down.t()
            assert (kept(token) - want).norm() <= CLOSE[weights] * want.norm()


def test_what_skip_inputs_refuses():
    ids = torch.randint(50, (2, 5))
    with pytest.raises(ValueError, match="model: holds converted blocks"):
        skip_inputs(converted(llama())[0], [ids], 0.5)
    with pytest.raises(ValueError, match="rate must lie strictly between 0 and 1"):
        skip_inputs(llama(), [ids], 1.0)
    with pytest.raises(ValueError, match="has no linear map that could be replaced"):
        skip_inputs(llama(), [ids], 0.5, where=lambda name: False)
    with pytest.raises(ValueError, match="loader: no batch reaches"):
        skip_inputs(llama(), [], 0.5)


def test_a_preview_spares_all_rows_of_closed_units():
    model, _ = converted(llama(), gater="preview")
    block = keep_rows(model, "float32").model.layers[0].mlp
    x = torch.randn(1, 32)
    want = block(x)
    hidden = torch.nn.functional.silu(x @ block.near_first_values.float().t() * block.near_first_scales)
    hidden = hidden * (x @ block.near_up_values.float().t() * block.near_up_scales)
    closed = (hidden.abs() * block.scale <= block.limits[0])[0]
    assert 0.2 < closed.float().mean() < 0.9
    for name in ("first", "up", "down"):
        block._buffers[f"{name}_values"][closed] = torch.nan
    torch.testing.assert_close(block(x), want)


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


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_groups_of_units_share_a_gate(make):
    model, ids = converted(make(), group_size=4)
    want = model(ids).logits
    torch.testing.assert_close(keep_rows(model, "float32")(ids).logits, want)


@torch.no_grad()
def test_the_rest_may_be_replaced_later():
    model, ids = converted(llama())
    want = keep_rows(model, "float32")(ids).logits
    torch.testing.assert_close(keep_rows(model, "float32", rest=True)(ids).logits, want)
    assert all(type(layer.mlp.gater.hidden) is nn.Linear for layer in model.model.layers)
    with pytest.raises(ValueError, match="its blocks were replaced already"):
        keep_rows(model, rest=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_model_that_was_cast_before(dtype):
    model, ids = converted(llama())
    want = model(ids).logits
    have = keep_rows(model.to(dtype), "float32")(ids).logits
    assert have.dtype is dtype
    assert (have - want).norm() / want.norm() < (0.2 if dtype is torch.bfloat16 else 0.05)  # gates near the threshold


@pytest.mark.parametrize("gater", ["mlp", "self"])
@torch.no_grad()
def test_a_state_dict_brings_the_thresholds(gater):
    (model, ids), (other, _) = converted(gpt2(), gater=gater), converted(gpt2(), gater=gater)
    for _, gating in blocks(other).values():
        gating.unit.threshold.fill_(9.0)
    want = keep_rows(model, "float32")(ids).logits
    keep_rows(other, "float32").load_state_dict(model.state_dict())
    torch.testing.assert_close(other(ids).logits, want)


@pytest.mark.parametrize("rest", [False, True])
def test_a_backward_pass_is_refused(rest):
    model, ids = converted(llama())
    keep_rows(model, "float32", rest=rest)
    loss = model(ids, labels=ids).loss
    assert loss.isfinite()
    with pytest.raises(RuntimeError, match="for inference, which have no gradient"):
        loss.backward()


def test_batches_may_be_mappings():
    dense, ids = llama(), torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    for batch in ({"input_ids": ids}, (ids, "more")):
        assert spread_rate(dense, [batch], 0.4, progress=False) == spread_rate(dense, [ids], 0.4, progress=False)
        thresholds = []
        for given in (batch, ids):
            model = llama()
            gatelet.convert(model, target_rate=0.4, bottleneck=4, where="*0*", gater="self")
            gatelet.sparsity.calibrate_thresholds(model, [given])
            thresholds.append([gating.unit.threshold for _, gating in blocks(model).values()])
        assert thresholds[0] == thresholds[1]
        made = [skip_inputs(llama(), [given], 0.5) for given in (batch, ids)]
        assert torch.equal(made[0](ids).logits, made[1](ids).logits)


def test_nothing_goes_on_as_if_the_blocks_were_still_there(tmp_path):
    model, _ = converted(llama())
    keep_rows(model, "float32")
    told = "keep_rows or skip_inputs has replaced"
    for call in (lambda: gatelet.save(model, tmp_path), lambda: copy.deepcopy(model).save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=f"cannot be saved, because {told}"):
            call()
    assert not list(tmp_path.iterdir())
    for call in (gatelet.revert, lambda model: gatelet.distil(model, llama(), [torch.ones(1, 2, dtype=torch.int64)])):
        with pytest.raises(ValueError, match=f"holds no converted block: {told}"):
            call(model)


def test_a_limit_of_more_sizes_than_quantile_takes():
    sizes = torch.arange(1.0, 1001).repeat(17_000)
    assert _exceeded(sizes, 0.25) == 750
    assert _exceeded(sizes[:3], 0.999) == 1
