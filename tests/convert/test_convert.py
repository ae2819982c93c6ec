"""convert and revert: every kind of block against the dense model, state, what is refused."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from jaxtyping import config
from torch import nn
from torch.nn import functional as F

import gatelet
from gatelet.convert import Conversion, blocks
from gatelet.nn import fully_open
from gatelet.sparsity import calibrate_thresholds, penalty

IDS = torch.arange(14).view(2, 7) % 11
X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 11,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


class MLP(nn.Module):
    """A user's own: functional activation, dropout on the hidden layer."""

    def __init__(self, act=F.silu, out=10):
        super().__init__()
        self.a, self.b, self.drop, self.act = nn.Linear(32, 128), nn.Linear(128, out), nn.Dropout(0.1), act

    def forward(self, x):
        return self.b(self.drop(self.act(self.a(x))))


class Gated(nn.Module):
    def __init__(self, act=torch.tanh):
        super().__init__()
        self.one, self.two, self.down, self.act = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32), act

    def forward(self, x):
        return self.down(self.one(x) * self.act(self.two(x)))


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def gpt2():
    sizes = {"vocab_size": 11, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=4))


def encoder(nested=True, **options):
    layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


def sequential():
    first = [nn.Linear(32, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 3)]
    return nn.Sequential(nn.LayerNorm(32), *first, nn.Linear(3, 64), nn.GELU("tanh"), nn.Linear(64, 5))


def plain(m):
    return m(X)


MODELS = {
    "bert": (bert, lambda m: m(IDS).last_hidden_state, 2, "gelu"),
    "gpt2": (gpt2, lambda m: m(IDS).logits, 2, "gelu_tanh"),
    "llama": (llama, lambda m: m(IDS).logits, 2, "gated silu"),
    "encoder": (encoder, plain, 2, "relu"),
    "encoder, norm first": (lambda: encoder(nested=False, norm_first=True, activation="gelu"), plain, 2, "gelu"),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(32, 4, 128, batch_first=True, activation=F.silu),
        lambda m: m(X, X),
        1,
        "silu",
    ),
    "mlp": (lambda: nn.Sequential(MLP(), nn.Linear(10, 2)), plain, 1, "silu"),
    "mlp, relu": (lambda: MLP(F.relu), plain, 1, "relu"),
    "gated": (Gated, plain, 1, "gated tanh"),
    "gated, linear in both": (lambda: Gated(F.gelu), plain, 1, "gated gelu"),
    "sequential": (sequential, plain, 2, "relu"),
    "float64": (lambda: sequential().double(), lambda m: m(X.double()), 2, "relu"),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, run, count, activation = MODELS[request.param]
    model = make().eval()
    return model, run, count, activation


def convert(model, **options):
    return gatelet.convert(model, **{"target_rate": 0.25, "bottleneck": 4, **options})


def test_open_gates_give_the_dense_model_and_revert_gives_it_back(case):
    model, run, count, activation = case
    with torch.no_grad():
        want = run(model)
    parameters, keys, kind = dict(model.named_parameters()), list(model.state_dict()), type(model)
    dense = copy.deepcopy(model)
    done = convert(model)
    assert len(done.converted) == len(blocks(model)) == count
    assert next(iter(done.converted.values())).endswith(activation)
    assert isinstance(model, kind)
    for name, parameter in model.named_parameters():
        assert parameter is parameters.get(name, parameter)
    with torch.no_grad(), fully_open(model):
        torch.testing.assert_close(run(model), want)
    # and with the gates as they are, something else
    model.train()
    assert not torch.allclose(run(model), want)
    assert penalty(model).isfinite()
    model.eval()
    # the dense model's state loads, strictly
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(1.1)
        model.load_state_dict(dense.state_dict())
        with fully_open(model):
            torch.testing.assert_close(run(model), run(dense))
    assert gatelet.revert(model) is model
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert all(p.is_contiguous() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(dense))


def test_state_copies_and_pickles(case):
    model, run, _, _ = case
    twin = copy.deepcopy(model)
    convert(model)
    convert(twin)
    for each in blocks(model).values():
        each[1].unit.threshold.fill_(-1.0)
    with torch.no_grad():
        want = run(model)
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(run(twin), want)
        torch.testing.assert_close(run(copy.deepcopy(model)), want)
        try:
            data = pickle.dumps(model)
        except (AttributeError, pickle.PicklingError):  # the test's own lambda
            return
        torch.testing.assert_close(run(pickle.loads(data)), want)


def test_whole_module_by_torch_save():
    model = sequential().eval()
    convert(model)
    with torch.no_grad(), fully_open(model):
        want = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad(), fully_open(again):
        assert torch.equal(again(X), want)
    gatelet.revert(again)
    assert type(again) is nn.Sequential


def test_gates_do_what_they_say():
    model = bert().eval()
    convert(model, group_size=2)
    calibrate_thresholds(model, [IDS], forward=lambda m, ids: m(ids))
    owner, gating = next(iter(blocks(model).values()))
    seen = []
    hook = owner.attention.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.no_grad():
        have = owner(model.embeddings(IDS))
        hook.remove()
        (x,) = seen
        gates = gating(x).repeat_interleave(2, -1)
        assert 0.1 < gates.mean() < 0.4
        hidden = owner.intermediate(x) * gates
        want = owner.output.LayerNorm(owner.output.dense(hidden) + x)
    torch.testing.assert_close(have[0] if isinstance(have, tuple) else have, want)


def test_weights_stay_where_they_are_and_train_in_place():
    model = gpt2()
    optimizer = torch.optim.Adam(model.parameters())
    convert(model)
    mlp = model.transformer.h[0].mlp
    assert mlp.c_fc.weight.is_contiguous()
    assert mlp.c_proj.weight.is_contiguous()
    before = mlp.c_fc.weight.clone()
    (model(IDS).logits.square().mean() + penalty(model)).backward()
    optimizer.step()
    assert not torch.equal(mlp.c_fc.weight, before)
    assert mlp.c_fc.weight.is_contiguous()


def test_dropout_stays_where_it_was():
    for model, inner in ((MLP(), "drop"), (MLP(out=128), "drop"), (gpt2().transformer.h[0].mlp, None)):
        convert(model)
        assert model.gating.block.inner == inner
        assert model.gating.block.outer == (None if inner else "dropout")
    torch.manual_seed(0)
    model = MLP()
    dense = copy.deepcopy(model)
    convert(model)
    with fully_open(model):
        torch.manual_seed(1)
        have = model(X)
        torch.manual_seed(1)
        torch.testing.assert_close(have, dense(X))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_in_an_encoder():
    model, dense = encoder().eval(), encoder().eval()
    dense.load_state_dict(model.state_dict())
    convert(model)
    assert not model.use_nested_tensor
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad(), fully_open(model):
        have, want = (m(X, src_key_padding_mask=padding) for m in (model, dense))
    torch.testing.assert_close(have[~padding], want[~padding], rtol=1e-4, atol=1e-5)
    assert gatelet.revert(model).use_nested_tensor


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("encoder.layer.1", ["encoder.layer.1"]),
        ("*.0", ["encoder.layer.0"]),
        (["*.0", "*.1"], ["encoder.layer.0", "encoder.layer.1"]),
        (lambda name, module: "1" in name and type(module).__name__ == "BertLayer", ["encoder.layer.1"]),
    ],
)
def test_where(where, names):
    model = bert()
    assert list(convert(model, where=where).converted) == names
    if len(names) == 1:  # the other one follows
        done = convert(model)
        assert len(done.converted) == 1
        assert list(done.left.values()) == ["already converted: revert it first"]
    gatelet.revert(model)
    assert not blocks(model)


def test_two_blocks_of_a_sequential_one_after_the_other():
    model = sequential().eval()
    with torch.no_grad():
        want = model(X)
        convert(model, where="7")
        done = convert(model, where="*")
        assert list(done.converted) == ["1"]
        assert list(done.left) == ["7"]
        with fully_open(model):
            torch.testing.assert_close(model(X), want)
    assert repr(done) == "converted 1, left 1\n  1: 32 → 128 → 64, relu\n  7: left, already converted: revert it first"


def test_equal_neighbours_share_a_line():
    names = [
        "layers.0.mlp",
        "layers.1.mlp",
        "layers.2.mlp",
        "layers.3.mlp",
        "layers.5.mlp",
        "layers.5.other",
        "h.9",
        "h.10",
    ]
    done = Conversion(
        dict.fromkeys(names, "a") | {"layers.2.mlp": "b"}, {"x.0.y.0": "why", "x.1.y.0": "why", "x.1.y.1": "why"}
    )
    assert repr(done).splitlines() == [
        "converted 8, left 3",
        "  layers.0-1.mlp: a",
        "  layers.2.mlp: b",
        "  layers.3.mlp: a",
        "  layers.5.mlp: a",  # 4 is missing
        "  layers.5.other: a",
        "  h.9-10: a",
        "  x.0-1.y.0: left, why",
        "  x.1.y.1: left, why",  # another number counts
    ]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(12)))
    assert repr(convert(model, bottleneck=2)) == "converted 12, left 0\n  0-11.0: 16 → 64 → 16, relu"


# ---------------------------------------------------------------- what is refused


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(torch.sin(a) * b)


class Odd(MLP):
    def forward(self, x):
        return self.b(self.a(x).square())


class OddLayer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x


def tied():
    model = nn.Sequential(MLP(out=32), MLP(out=32))
    model[1].a.weight = model[0].a.weight
    return model


def converted():
    model = MLP()
    convert(model)
    return model


def odd_bert():
    model = bert()
    for each in model.encoder.layer:
        each.output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)
        each.feed_forward_chunk = lambda x: 2 * x
    return model


@pytest.fixture
def as_user():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda: nn.Linear(4, 4), {}, "model: has no feed-forward block"),
        (bert, {"where": "decoder*"}, r"where: selects no feed-forward block \(2 blocks were found: encoder.layer.0"),
        (Fused, {}, "W1 and W_g seem to be one matrix, but its halves give no gated form"),
        (Odd, {}, "its forward computes neither W2 act"),
        (lambda: OddLayer(32, 4, 128), {}, "computes the feed-forward block in its own way"),
        (
            lambda: nn.TransformerEncoderLayer(32, 4, 128, activation=torch.sin),
            {},
            r"its activation .* is unknown \(known: relu, ",
        ),
        (lambda: nn.Sequential(nn.Linear(32, 64), nn.ELU(), nn.Linear(64, 2)), {}, r"its activation ELU\(alpha=1.0\)"),
        (odd_bert, {}, "its feed_forward_chunk is not LayerNorm"),
        (lambda: MLP().to("meta"), {}, "its weights are on the meta device"),
        pytest.param(
            lambda: MLP().bfloat16(),
            {},
            r"its weights are torch.bfloat16 on the CPU, where closed units are skipped in fl",
            marks=pytest.mark.cpu,
        ),
        pytest.param(lambda: encoder().half(), {}, r"its weights are torch.float16 on the CPU", marks=pytest.mark.cpu),
        (tied, {}, "its a.weight is tied: what is fitted here would change it in its other place"),
        (converted, {}, "already converted: revert it first"),
        (MLP, {"group_size": 3}, "group_size 3 does not divide its 128 units"),
        (
            MLP,
            {"bottleneck": 64},
            r"gater: it costs 20,480 FLOPs per token, but closing 75% of the 128 units saves only 8,064 of their "
            r"10,752; take a bottleneck far under 25",
        ),
        (MLP, {"bottleneck": 0}, "bottleneck must be an integer of at least 1"),
        (MLP, {"target_rate": 1.0}, "target_rate must lie strictly between 0 and 1"),
        (MLP, {"estimator": "nothing"}, "nothing"),
    ],
)
def test_refused(make, options, says):
    model = make()
    before = type(model)
    with pytest.raises(ValueError, match=says):
        convert(model, **options)
    assert type(model) is before


def test_what_is_left_is_listed_beside_what_is_converted():
    done = convert(nn.Sequential(MLP(), Odd()))
    assert list(done.converted) == ["0"]
    assert list(done.left) == ["1"]


def test_nothing_to_revert():
    with pytest.raises(ValueError, match="holds no converted block"):
        gatelet.revert(MLP())
