"""save and load: the same outputs, whatever was converted; what does not fit is refused in words."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import gatelet
import gatelet.convert.hugging_face
from gatelet import estimators
from gatelet.convert.block import Options
from gatelet.convert.describe import _options, options_of
from gatelet.diagnose.table import facts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()


def sequential():
    torch.manual_seed(0)
    parts = [nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 128), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(128, 4)).eval()


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2).eval()


class Own(nn.Module):
    def __init__(self, rate=0.25):
        super().__init__()
        torch.manual_seed(0)
        self.ffn = gatelet.nn.ConditionalFFN(16, 64, 4, target_rate=rate)

    def forward(self, x):
        return self.ffn(x)


def x_for(model):
    torch.manual_seed(1)
    return torch.randint(50, (2, 7)) if hasattr(model, "config") else torch.randn(2, 5, 16)


def run(model, x):
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def converted(make, **options):
    model = make()
    gatelet.convert(model, **{"target_rate": 0.25, "bottleneck": 4, **options})
    x = x_for(model)
    gatelet.sparsity.calibrate_thresholds(model.eval(), [x])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("make", [llama, sequential, encoder])
@pytest.mark.parametrize("gater", ["mlp", "self"])
def test_round_trip(make, gater, tmp_path):
    model = converted(make, gater=gater)
    x = x_for(model)
    gatelet.save(model, tmp_path / "new")
    again = gatelet.load(tmp_path / "new", make())
    assert torch.equal(run(again, x), run(model, x))
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert one.stride() == two.stride(), name
    onto = converted(make, gater=gater)
    assert torch.equal(run(gatelet.load(tmp_path / "new", onto), x), run(model, x))


def test_a_hugging_face_model_builds_itself(tmp_path):
    model = converted(llama)
    x = x_for(model)
    gatelet.save(model, tmp_path)
    again = gatelet.load(tmp_path)
    assert not again.training
    assert torch.equal(run(again, x), run(model, x))
    assert "gating" in dict(again.model.layers[0].mlp.named_children())


@pytest.mark.parametrize("cls", [transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM])
def test_save_pretrained_and_from_pretrained_do_the_same(tmp_path, cls):
    model = converted(llama)
    x = x_for(model)
    model.save_pretrained(tmp_path / "one")
    again = cls.from_pretrained(tmp_path / "one")
    assert torch.equal(run(again, x), run(model, x))
    assert torch.equal(run(gatelet.load(tmp_path / "one"), x), run(model, x))
    assert again.model.layers[0].mlp.down_proj.weight.is_contiguous()
    assert not again.is_quantized
    again.to(torch.float64)
    again.float().save_pretrained(tmp_path / "two")
    assert torch.equal(run(cls.from_pretrained(tmp_path / "two"), x), run(model, x))


def test_a_reverted_model_says_nothing_of_gates(tmp_path):
    model = converted(llama)
    gatelet.revert(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(
        run(transformers.LlamaForCausalLM.from_pretrained(tmp_path), x_for(model)), run(model, x_for(model))
    )


def test_a_model_of_conditional_layers(tmp_path):
    model = Own().eval()
    gatelet.sparsity.calibrate_thresholds(model, [x_for(model)])
    gatelet.save(model, tmp_path)
    assert torch.equal(run(gatelet.load(tmp_path, Own().eval()), x_for(model)), run(model, x_for(model)))
    with pytest.raises(ValueError, match=r"model: target_rate of the layer ffn is 0.5, but 0.25 was saved"):
        gatelet.load(tmp_path, Own(0.5))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_rate": 0.5}, "target_rate of the block 0.gating is 0.5, but 0.25 was saved"),
        ({"estimator": "straight_through_open"}, "estimator of the block 0.gating is 'straight_through_open', but"),
        ({"gater": "self"}, "gater of the block 0.gating is 'self', but 'mlp' was saved"),
        ({"bottleneck": 3}, "bottleneck of the block 0.gating is 3, but 4 was saved"),
        ({"where": "4"}, None),
    ],
)
def test_other_options_than_were_saved(options, says, tmp_path):
    gatelet.save(converted(sequential), tmp_path)
    other = sequential()
    gatelet.convert(other, **{"target_rate": 0.25, "bottleneck": 4, **options})
    if says is None:
        assert torch.equal(run(gatelet.load(tmp_path, other), x_for(other)), run(converted(sequential), x_for(other)))
    else:
        with pytest.raises(ValueError, match=says):
            gatelet.load(tmp_path, other)


def test_a_block_that_was_dense_when_saved(tmp_path):
    gatelet.save(converted(sequential, where="0"), tmp_path)
    with pytest.raises(ValueError, match=r"model: its block 4.gating is converted, and was not when it was saved"):
        gatelet.load(tmp_path, converted(sequential))


def test_another_structure(tmp_path):
    gatelet.save(converted(sequential), tmp_path)
    with pytest.raises(ValueError, match=r"model: has no block for 0.gating, which was saved"):
        gatelet.load(tmp_path, encoder())


def test_another_version_and_no_model_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model of gatelet \(gatelet.json is missing\)"):
        gatelet.load(tmp_path)
    gatelet.save(converted(sequential), tmp_path)
    with pytest.raises(ValueError, match="model: must be given"):
        gatelet.load(tmp_path)
    path = tmp_path / "gatelet.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7, "gatelet": "9.0"}))
    with pytest.raises(ValueError, match=r"written by gatelet 9.0 in format 7; this is gatelet .*reads format 1"):
        gatelet.load(tmp_path, sequential())


def test_what_no_description_could_make_again(tmp_path):
    class Mine(estimators.StraightThrough):
        pass

    model = converted(llama, estimator=Mine())
    with pytest.raises(ValueError, match="estimator: Mine is not a class of gatelet's"):
        gatelet.save(model, tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved without a description of its gates: estimator: Mine"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_nothing_conditional(tmp_path):
    with pytest.raises(ValueError, match="holds no conditional layer"):
        gatelet.save(sequential(), tmp_path)


@pytest.mark.parametrize("name", sorted(set(estimators.ALL) - {"jump_relu", "relax"}))
def test_every_estimator_is_described_and_made_again(name):
    for variant in ({}, *facts(estimators.ALL[name]).variants):
        described = json.loads(json.dumps(_options(Options(0.5, 4, estimators.ALL[name](**variant), 1, "mlp"))))
        again = options_of(described).estimator
        assert type(again) is estimators.ALL[name]
        for key, value in variant.items():
            assert getattr(again, key) == value


@pytest.mark.parametrize(("name", "argument"), [("jump_relu", "threshold"), ("relax", "control")])
def test_estimators_with_parameters_are_given_by_name(name, argument):
    assert _options(Options(0.5, 4, name, 1, "mlp"))["estimator"] == name
    with pytest.raises(ValueError, match=f"estimator: {argument} of .* cannot be described"):
        _options(Options(0.5, 4, estimators.ALL[name](), 1, "mlp"))


def test_controllers_are_described_and_made_again(tmp_path):
    control = [gatelet.sparsity.FiringRateBias(0.25, step=0.02)]
    model = converted(sequential, sparsity=control, where="0")
    gatelet.save(model, tmp_path)
    again = gatelet.load(tmp_path, sequential())
    assert again[0].gating.sparsity[0].step == 0.02
    assert torch.equal(run(again, x_for(model)), run(model, x_for(model)))


def test_old_state_dicts_load(tmp_path):
    """Of the dense model, strictly, and of a converted one as torch.save wrote it."""
    model = converted(sequential)
    torch.save(model.state_dict(), tmp_path / "old.pt")
    other = sequential()
    gatelet.convert(other, target_rate=0.25, bottleneck=4)
    other.load_state_dict(torch.load(tmp_path / "old.pt"))
    assert torch.equal(run(other, x_for(model)), run(model, x_for(model)))
    other.load_state_dict(copy.deepcopy(sequential().state_dict()))


@pytest.mark.parametrize("name", ["gatelet.json", "config.json"])
def test_a_damaged_description_is_named(name, tmp_path):
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"directory: .*{name} cannot be read"):
        gatelet.load(tmp_path)
