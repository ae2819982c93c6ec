"""More models of transformers, tiny and random: open gates are the dense model, closed units closed, saved."""

import copy
import threading
import warnings

import pytest
import torch
import transformers
from torch.nn import functional as F

import gatelet
from gatelet.convert import blocks
from gatelet.convert.block import affine_at, at
from gatelet.convert.rows import RowsFFN
from gatelet.nn.conditional_ffn import ACTIVATIONS

IDS = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 1}
ENCODER_DECODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64,
                   "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                   "vocab_size": 50}  # fmt: skip


def opt():
    config = transformers.OPTConfig(hidden_size=16, ffn_dim=64, num_hidden_layers=2, word_embed_proj_dim=16, **SIZES)
    return transformers.OPTForCausalLM(config), {"input_ids": IDS}, 2


def bart():
    config = transformers.BartConfig(max_position_embeddings=32, **ENCODER_DECODER)
    return transformers.BartForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}, 3


def whisper():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    config = transformers.WhisperConfig(**sizes, **ENCODER_DECODER, **special)
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS[:, :5]}
    return transformers.WhisperForConditionalGeneration(config), inputs, 3


def albert():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "embedding_size": 8, "num_hidden_layers": 3}
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes, **SIZES)), {"input_ids": IDS}, 1


def phi3():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **SIZES)), {"input_ids": IDS}, 2


def modernbert():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "mlp_bias": True}
    special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = transformers.ModernBertConfig(**sizes, **SIZES, **special)
    return transformers.ModernBertForMaskedLM(config), {"input_ids": IDS}, 2


ONE_MATRIX = {each.__name__: each for each in (phi3, modernbert)}
"""W_g and W1 are the halves of one map."""
MODELS = {each.__name__: each for each in (opt, bart, whisper, albert)}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, inputs, count = MODELS[request.param]()
    return model.eval(), inputs, count


@pytest.fixture(params=[*MODELS, *ONE_MATRIX])
def any_case(request):
    torch.manual_seed(0)
    model, inputs, count = (MODELS | ONE_MATRIX)[request.param]()
    return model.eval(), inputs, count


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("gater", ["mlp", "self"])
def test_open_gates_give_the_dense_model(any_case, gater, tmp_path):
    model, inputs, count = any_case
    dense, want = copy.deepcopy(model), run(model, inputs)
    found = gatelet.convert(model, target_rate=0.4, bottleneck=2, gater=gater)
    assert len(found.converted) == count
    assert not found.left
    with gatelet.nn.fully_open(model):
        torch.testing.assert_close(run(model, inputs), want)
    gatelet.sparsity.calibrate_thresholds(model, [inputs], forward=lambda module, batch: module(**batch))
    have = run(model, inputs)
    assert not torch.allclose(have, want, atol=1e-5)
    again = gatelet.convert(copy.deepcopy(dense), target_rate=0.4, bottleneck=2, gater=gater)
    assert list(again.converted) == list(found.converted)
    gatelet.save(model, tmp_path)
    assert torch.equal(run(gatelet.load(tmp_path), inputs), have)
    assert torch.equal(run(copy.deepcopy(model), inputs), have)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(run(torch.load(tmp_path / "whole.pt", weights_only=False), inputs), have)
    assert torch.equal(run(gatelet.revert(model), inputs), want)
    assert type(model) is type(dense)
    assert {type(module) for module in model.modules()} == {type(module) for module in dense.modules()}


@pytest.mark.parametrize("gater", ["mlp", "self"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_closed_is_closed(case, gater, training):
    """The owner's output is that of its own code with the hidden layer's closed units at zero."""
    model, inputs, _ = case
    gatelet.convert(model, target_rate=0.3, bottleneck=2, gater=gater, estimator="straight_through_open")
    gatelet.sparsity.calibrate_thresholds(model, [inputs], forward=lambda module, batch: module(**batch))
    owner, gating = next(iter(blocks(model).values()))
    seen = {}
    first, second = owner.get_submodule(gating.block.up), owner.get_submodule(gating.block.down)
    hooks = [
        first.register_forward_hook(lambda module, args, out: seen.update(x=args[0], pre=out)),
        second.register_forward_hook(lambda module, args, out: seen.update(hidden=args[0], out=out)),
        gating.unit.register_forward_hook(lambda module, args, out: seen.update(gates=out)),
    ]
    model.eval()
    gating.train(training)
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    gates = (seen["gates"] != 0).float()
    assert 0 < gates.mean() < 1
    torch.testing.assert_close(seen["pre"], F.linear(seen["x"], *affine_at(owner, gating.block.up)) * gates)
    assert bool((seen["hidden"][gates == 0] == 0).all())
    torch.testing.assert_close(seen["out"], F.linear(seen["hidden"], *affine_at(owner, gating.block.down)))


def test_gaters_and_weights_learn(any_case):
    model, inputs, _ = any_case
    gatelet.convert(model, target_rate=0.3, bottleneck=2)
    run_with_gradient = model.train()(**inputs).logits.square().mean() + gatelet.sparsity.penalty(model)
    run_with_gradient.backward()
    for owner, gating in blocks(model).values():
        for parameter in (*gating.gater.parameters(), at(owner, gating.block.up).weight):
            assert parameter.grad is not None
            assert bool(parameter.grad.abs().sum() > 0)


def test_distil_fits_a_pair():
    torch.manual_seed(0)
    teacher, _, _ = opt()
    model = copy.deepcopy(teacher)
    gatelet.convert(model, target_rate=0.3, bottleneck=8)
    loader = list(torch.randint(5, 50, (6, 4, 20), generator=torch.Generator().manual_seed(1)))
    found = gatelet.distil(model, teacher, loader, held_out=2, steps=20, every=10)
    assert sum(found.errors.values()) < sum(found.first_errors.values())
    assert list(found.open_share.values()) == pytest.approx([0.3, 0.3], abs=0.02)


@pytest.mark.parametrize("make", ONE_MATRIX.values())
def test_halves_of_one_matrix_are_the_formula_are_fitted_and_kept_as_rows(make):
    torch.manual_seed(0)
    teacher = make()[0].eval()
    model = copy.deepcopy(teacher)
    gatelet.convert(model, target_rate=0.4, gater="self")
    loader = list(torch.randint(5, 50, (6, 4, 20), generator=torch.Generator().manual_seed(1)))
    found = gatelet.distil(model, teacher, loader, held_out=2, steps=4, every=2, weights=True)
    assert found.steps == 4
    for owner, gating in blocks(model).values():
        x = torch.randn(3, 16)
        both, down = at(owner, gating.block.up), at(owner, gating.block.down)
        glu, up = both(x).chunk(2, -1)
        first = ACTIVATIONS[gating.block.activation](glu)
        gates = first.abs() * gating.gater.scale > gating.unit.threshold
        want = down(first * up * gates)
        with torch.no_grad():
            torch.testing.assert_close(owner(x), want)
        hook = both.register_forward_hook(lambda module, args, out: out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # announced once per process
            torch.testing.assert_close(owner(x), want)  # densely, by the map's own forward
        hook.remove()
        torch.testing.assert_close(RowsFFN(owner, gating)(x), want)


def test_gates_that_are_numbers_are_refused_before_an_activation():
    model, _, _ = opt()
    with pytest.raises(ValueError, match="its activation comes after the gates, which must be 0 or 1 then"):
        gatelet.convert(model, target_rate=0.3, bottleneck=2, estimator="noisy_rectifier")


def test_padding_reaches_layers_that_flatten_their_tokens():
    torch.manual_seed(0)
    model, inputs, _ = opt()
    model.eval()
    gatelet.convert(model, target_rate=0.3, bottleneck=2)
    gatelet.sparsity.calibrate_thresholds(model, [inputs], forward=lambda module, batch: module(**batch))
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    _, gating = next(iter(blocks(model).values()))
    gating.reset_statistics()
    with gatelet.nn.masking(model, mask):
        run(model, inputs)
    assert int(gating.tokens) == int(mask.sum())


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_a_prompt_with_padding_is_continued_as_without_it(cache):
    model = opt()[0].eval()
    gatelet.convert(model, target_rate=0.3, bottleneck=2)
    gatelet.sparsity.calibrate_thresholds(model, [IDS])
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    told = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": cache}
    alone = model.generate(IDS[:1, 4:], attention_mask=mask[:1, 4:], **told)
    with gatelet.nn.masking(model, mask):
        found = model.generate(IDS, attention_mask=mask, **told)
        assert torch.equal(found[:1, 4:], alone)
        with pytest.raises(ValueError, match=r"mask must be one boolean per token, shape \(5,\)"):
            model(IDS[:1, :5])


@pytest.mark.parametrize("gater", ["mlp", "self"])
def test_two_threads_run_one_pair_of_maps(gater):
    """W1 of one thread and W2 of another are no pair: here both threads have passed W1 when the first enters W2."""
    model = opt()[0].eval()
    gatelet.convert(model, 0.3, **({"bottleneck": 2} if gater == "mlp" else {"gater": gater}))
    gatelet.sparsity.calibrate_thresholds(model, [IDS])
    batches = [IDS, IDS.flip(1)]
    with torch.no_grad():
        want = [model(ids).logits for ids in batches]
    found, meeting = {}, threading.Barrier(2)

    def run(i):
        with torch.no_grad():
            found[i] = model(batches[i]).logits

    def meet(*_):
        meeting.wait(60)

    hooks = [layer.fc1.register_forward_hook(meet) for layer in model.model.decoder.layers]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for hook in hooks:
        hook.remove()
    for i, each in enumerate(want):
        torch.testing.assert_close(found[i], each)
    assert not any(gating.passed for _, gating in blocks(model).values())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_on_a_pair_opens_nothing():
    peft = pytest.importorskip("peft")

    def adapted(gater="mlp"):
        torch.manual_seed(0)
        model = opt()[0].eval()
        gatelet.convert(model, 0.3, **({"bottleneck": 2} if gater == "mlp" else {"gater": gater}))
        gatelet.sparsity.calibrate_thresholds(model, [IDS])
        config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    model = adapted()
    with torch.no_grad():
        have = model(IDS).logits
        torch.testing.assert_close(have, model.merge_and_unload()(IDS).logits)
    model = adapted().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)
    for make, told in ((opt, "no two affine maps"), (phi3, "has no feed-forward block")):
        config = peft.LoraConfig(r=2, target_modules="all-linear")
        with pytest.raises(ValueError, match=f"(?s)(?=.*{told}).*adapters: merge them first, or convert"):
            gatelet.convert(peft.get_peft_model(make()[0], config), bottleneck=2)
    with pytest.raises(RuntimeError, match="fc1 decides which units are open; merge its adapter first"):
        adapted("self")(IDS)


@torch.no_grad()
def test_a_hook_on_a_pair_opens_nothing():
    model = opt()[0].eval()
    gatelet.convert(model, 0.3, bottleneck=2)
    gatelet.sparsity.calibrate_thresholds(model, [IDS])
    layer = model.model.decoder.layers[0]
    layer.fc1.register_forward_hook(lambda module, args, out: out + 1)
    seen = []
    layer.fc2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(IDS)
    closed = layer.gating.opened == 0
    assert closed.any()
    assert seen[0][:, closed].eq(0).all()
    assert (seen[0] != 0).float().mean() < 0.6
