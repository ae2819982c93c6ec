"""distil: what it reaches, resumes, keeps, refuses."""

import copy
import math

import pytest
import torch
import transformers
from jaxtyping import config
from torch import nn

import gatelet
from gatelet.convert import blocks


@pytest.fixture
def as_user():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pair(rate=0.25, group_size=1, seed=0, **options):
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 16), nn.Linear(16, 64), nn.GELU())
    teacher.append(nn.Linear(64, 4))
    with torch.no_grad():  # half of the units are rarely above zero, and units come in like pairs
        teacher[0].bias[:64] -= 2.0
        teacher[0].weight[1::2] = teacher[0].weight[::2]
    model = copy.deepcopy(teacher)
    gatelet.convert(model, target_rate=rate, bottleneck=8, group_size=group_size, **options)
    return model, teacher


def data(batches=20):
    return list(torch.randn(batches, 64, 16, generator=torch.Generator().manual_seed(5)))


def distil(model, teacher, loader=None, **options):
    return gatelet.distil(model, teacher, loader or data(), **{"steps": 150, "every": 50, **options})


@pytest.mark.parametrize("group_size", [1, 2])
def test_open_are_the_units_that_matter(group_size):
    model, teacher = pair(group_size=group_size)
    found = distil(model.train(), teacher)
    assert model.training
    assert list(found.errors) == ["0.gating", "3.gating"]
    for name, (_, gating) in blocks(model).items():
        assert found.errors[name] < 0.8 * found.first_errors[name]
        assert found.open_share[name] == pytest.approx(0.25, abs=0.02)
        assert int(gating.tokens) == 20 * 64
    model.eval()
    # against gates that are opened by chance, as many
    x = data(30)[-1]
    with torch.no_grad():
        want = teacher(x)
        have = (model(x) - want).square().mean()
        for _, gating in blocks(model).values():
            gating.gater.gates.weight.normal_()
            gating.gater.hidden.weight.normal_()
            gating.gater.gates.bias.zero_()  # it knows which units matter for most tokens
            gating.gater.hidden.bias.zero_()
        gatelet.sparsity.calibrate_thresholds(model, data())
        assert have < 0.8 * (model(x) - want).square().mean()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model.parameters(), strict=True))
    assert repr(found).splitlines()[0].split() == ["block", "error", "before", "error", "now", "open"]


def test_only_gaters_change_and_nothing_of_the_teacher():
    model, teacher = pair()
    before, dense = copy.deepcopy(model.state_dict()), copy.deepcopy(teacher.state_dict())
    distil(model, teacher, steps=5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".gater." in name or name.endswith("threshold")}
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])


def test_weights_too_are_better():
    gaters, both = (distil(*pair(0.1), weights=weights, weights_lr=3e-3) for weights in (False, True))
    assert sum(both.errors.values()) < 0.8 * sum(gaters.errors.values())


def test_frozen_weights_stay_frozen():
    model, teacher = pair()
    model[0].weight.requires_grad_(False)
    distil(model, teacher, steps=2, weights=True)
    assert not model[0].weight.requires_grad


def test_early_stopping_keeps_the_best_state():
    model, teacher = pair()
    found = distil(model, teacher, steps=1000, every=1, patience=2, lr=3.0)
    assert found.steps < 1000
    assert found.why_stopped == "no better in 2 measurements"
    assert sum(found.errors.values()) <= sum(found.first_errors.values())


def test_resumes(tmp_path):
    class StopError(Exception):
        pass

    def stopping(after):
        runs = 0

        def run(module, batch):
            nonlocal runs
            runs += 1
            if runs > after:
                raise StopError
            return module(batch)

        return run

    file = tmp_path / "distil.pt"
    loader = data(9)
    straight, teacher = pair()
    want = distil(straight, teacher, loader, steps=30, every=10)
    model, _ = pair()
    with pytest.raises(StopError):
        distil(model, teacher, loader, steps=30, every=10, checkpoint=file, forward=stopping(35))
    assert [each.name for each in tmp_path.iterdir()] == ["distil.pt"]
    at = torch.load(file)["step"]
    assert 0 < at < 30
    model, _ = pair()
    have = distil(model, teacher, loader, steps=30, every=10, checkpoint=file)
    assert have.errors == pytest.approx(want.errors, rel=1e-4)
    assert have.first_errors == want.first_errors
    for a, b in zip(model.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="is of another model or of other options; remove it"):
        distil(pair()[0], teacher, loader, steps=31, checkpoint=file)


def test_checkpoints_that_are_none(tmp_path):
    model, teacher = pair()
    other, damaged = tmp_path / "other.pt", tmp_path / "damaged.pt"
    torch.save({"weights": torch.ones(2)}, other)
    damaged.write_bytes(other.read_bytes()[:200])
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, told in (
        ("nowhere/distil.pt", "there is no directory .*nowhere"),
        ("other.pt", "other.pt holds something else"),
        ("damaged.pt", "damaged.pt cannot be read"),
        ("text.pt", "text.pt cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint: .*{told}"):
            distil(model, teacher, checkpoint=tmp_path / name)


def test_nan_stops_at_the_best_state(tmp_path):
    file, (model, teacher) = tmp_path / "distil.pt", pair()
    loader = data(8)

    def run(module, batch):
        run.calls += 1
        if run.calls == 25:
            with torch.no_grad():
                model[0].weight[0] = math.nan
        return module(batch)

    run.calls = 0
    with pytest.raises(FloatingPointError, match=r"the loss of 0.gating is nan at step .*which .*distil.pt holds"):
        distil(model, teacher, loader, every=5, forward=run, checkpoint=file)
    best = torch.load(file)["best"]
    gaters = [p for _, gating in blocks(model).values() for p in gating.gater.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(best, gaters, strict=True))
    assert all(p.isfinite().all() for p in gaters)
    assert not model[0].gating.gater.hidden.weight.grad


@pytest.mark.usefixtures("as_user")
def test_what_is_not_finite_in_the_data_stops_at_the_best_state(tmp_path):
    file, (model, teacher) = tmp_path / "distil.pt", pair()
    loader = [*data(20), torch.full((64, 16), math.nan)]
    with pytest.raises(FloatingPointError, match=r"gives is not finite at step 17; .*distil.pt holds"):
        distil(model, teacher, loader, every=2, patience=50, checkpoint=file)
    gaters = [p for _, gating in blocks(model).values() for p in gating.gater.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(torch.load(file)["best"], gaters, strict=True))


def test_a_teacher_that_is_not_finite_is_refused_at_once():
    model, teacher = pair()
    teacher[2].bias.data[0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"what the teacher's block of 0.gating takes or gives is not finite"):
        distil(model, teacher)
    torch.testing.assert_close(model.state_dict(), before, equal_nan=True)


def test_weights_that_diverge_stop_at_the_best_state():
    model, teacher = pair()
    with pytest.raises(FloatingPointError, match="is back at its best state"):
        distil(model, teacher, weights=True, weights_lr=1e30)
    assert all(p.isfinite().all() for p in model.parameters())


def test_padding_is_not_trained_on():
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    teacher = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64)).eval()
    ids = torch.randint(11, (10, 4, 12))
    mask = torch.arange(12) < torch.randint(3, 12, (10, 4, 1))
    found = []
    for fill in (0, 10):
        model = copy.deepcopy(teacher)
        torch.manual_seed(1)
        gatelet.convert(model, target_rate=0.25, bottleneck=4)
        loader = [
            {"input_ids": torch.where(m, i, fill), "attention_mask": m.long()} for i, m in zip(ids, mask, strict=True)
        ]
        found.append(distil(model, teacher, loader, steps=10))
        assert int(model.encoder.layer[0].gating.tokens) == int(mask.sum())
    assert found[0].errors == pytest.approx(found[1].errors)
    assert found[0].open_share == pytest.approx(found[1].open_share)
    assert found[0].open_share["encoder.layer.0.gating"] == pytest.approx(0.25, abs=0.02)


class Empty:
    def __iter__(self):
        return iter(())


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("loader", "options", "says"),
    [
        (Empty(), {}, "loader: yielded no batch"),
        (iter(data()), {}, "loader: must allow several passes"),
        (data(4), {}, "loader: must yield more than the 4 batches that are held out"),
        ([torch.zeros(0, 16)] * 9, {}, "loader: a batch holds no token for the block '0.gating'"),
        (data(), {"steps": 0}, "steps must be an integer of at least 1"),
        (data(), {"lr": 0.0}, "lr must be a finite number above 0"),
        (data(), {"patience": 0}, "patience must be"),
    ],
)
def test_bad_arguments(loader, options, says):
    model, teacher = pair()
    with pytest.raises(ValueError, match=says):
        gatelet.distil(model, teacher, loader, **options)


def test_bad_models():
    model, teacher = pair()
    with pytest.raises(ValueError, match="model: holds no converted block; call gatelet"):
        distil(teacher, teacher)
    with pytest.raises(ValueError, match="teacher: has no block"):
        distil(model, teacher[:2])
    with pytest.raises(ValueError, match=r"teacher: its block .* is converted too"):
        distil(model, model)
    tied = copy.deepcopy(teacher)
    tied[3].weight = model[3].weight
    with pytest.raises(ValueError, match="teacher: shares weights with the model"):
        distil(model, tied, weights=True)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="distil: it trains; call it outside"):
        distil(model, teacher)
    with torch.no_grad():
        assert distil(model, tied, steps=1).steps == 1
    with pytest.raises(ValueError, match=r"teacher: does not run the block '3\.gating' in a forward pass"):
        distil(model, teacher, forward=lambda module, batch: module[:3](batch))


def test_estimators_without_a_rate():
    model, teacher = pair(estimator="sigmoid")
    found = distil(model, teacher, steps=3)
    assert found.open_share["0.gating"] == 1
