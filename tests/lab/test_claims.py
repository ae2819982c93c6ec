"""The claims: counted in pairs of equal seeds, resumable, and the variance is that of the baselines."""

import json

import pytest
import torch
from rich.console import Console

from gatelet_lab import data
from gatelet_lab.commands import claims
from gatelet_lab.training import jobs
from gatelet_lab.training.paper import PaperTrainer

SMALL = {"dataset": "digits", "epochs": 1, "seeds": 1, "train_images": 200, "jobs": 2}
SETTINGS = ("experts=30", "bottleneck=8")


def result(name, seed, **figures):
    return {"row": name, "seed": seed, **figures}


def test_a_claim_is_counted_in_pairs_of_runs_with_the_same_seed():
    claim = claims.Claim("a beats b and c", ("a",), ("b", "c"))
    results = [
        result("a", 0, test_error=1.0),
        result("a", 1, test_error=3.0),
        result("b", 0, test_error=2.0),
        result("b", 1, test_error=2.0),
        result("c", 0, test_error=4.0),
    ]
    verdict = claims.verdict(claim, results)
    assert (verdict["holds_in"], verdict["of"]) == (2, 3)
    assert verdict["mean_gain"] == pytest.approx((1 - 1 + 3) / 3)


def test_a_claim_with_a_limit_asks_every_run():
    claim = claims.Claim("a trains", ("a",), limit=2.0)
    verdict = claims.verdict(claim, [result("a", 0, test_error=1.0), result("a", 1, test_error=3.0)])
    assert (verdict["holds_in"], verdict["of"]) == (1, 2)


def test_every_claim_names_variants_and_every_variant_has_a_recipe():
    options = claims.Claims(**SMALL)
    for claim in claims.CLAIMS:
        assert {*claim.better, *claim.worse} <= set(claims.VARIANTS)
    recipes = {name: claims.variant(options, name) for name in claims.VARIANTS}
    assert recipes["sbn_frozen_gater"].optimiser.gater_rate == 0
    assert recipes["straight_through_slope"].model.options == {"slope": "sigmoid"}
    assert {each.optimiser.epochs for each in recipes.values()} == {1}
    assert {each.optimiser.rate_decay for each in recipes.values()} == {0.88}
    dropped = {(each.augmentation.input_dropout, each.augmentation.hidden_dropout) for each in recipes.values()}
    assert dropped == {(0.2, 0)}
    noisy, plain = recipes["noisy_rectifier"], recipes["rectifier"]
    named = {"row": noisy.row, "title": noisy.title, "paper": noisy.paper, "estimator": noisy.model.estimator}
    assert plain.but(**named) == noisy  # noise is all they differ in
    assert (recipes["sbn"].model.experts, recipes["sbn"].gater.bottleneck) == (500, 100)
    assert (recipes["sigmoid"].model.experts, recipes["sigmoid"].gater.bottleneck) == (
        50,
        10,
    )  # still a tenth of the sparse ones


def test_undecided_is_the_share_between_a_twentieth_and_a_fifth():
    histogram = [0.0] * 100
    histogram[4], histogram[5], histogram[19], histogram[20] = 0.4, 0.1, 0.2, 0.3
    assert claims.undecided(histogram) == pytest.approx(0.3)


def test_the_variance_is_that_of_the_estimator():
    options = claims.Claims(**SMALL, settings=(*SETTINGS, "gate_scale=1", "gate_bias=0"))
    trainer = PaperTrainer(claims.variant(options, "sbn"), 0, options.load())
    found = {name: claims._variance(trainer, name) for name in claims.BASELINES}
    # Without a baseline: E[(h − σ)² L²] summed over the gates, here about N/4 · L², as gates are near ½.
    with torch.no_grad():
        index = torch.randperm(200, generator=torch.Generator().manual_seed(0))[32 * 5 :]
        _, _, losses = claims._draw(trainer, index, torch.Generator().manual_seed(5))
    assert found["none"] == pytest.approx(30 / 4 * losses.square().mean().item(), rel=0.5)
    assert found["per_unit"] < 0.5 * found["none"]
    assert found["running_mean"] < 0.5 * found["none"]


def test_the_variance_leaves_the_model_as_it_was():
    options = claims.Claims(**SMALL, settings=SETTINGS)
    trainer = PaperTrainer(claims.variant(options, "sbn"), 0, options.load())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    claims._variance(trainer, "per_unit")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_command_writes_everything_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_DRAWS", 3)
    options = claims.Claims(**SMALL, settings=SETTINGS, out=tmp_path / "out")
    claims.run(options, Console(quiet=True))
    found = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert len(found["runs"]) == len(claims.VARIANTS)
    assert len(found["claims"]) == len(claims.CLAIMS)
    assert {point["epoch"] for point in found["baseline_variance"]} == {0, 1}
    text = (tmp_path / "out" / "claims.md").read_text()
    assert "--rows score_function --set gater_rate=0 --set momentum=0 |" in text
    for name in ("claims_gates.png", "claims_variance.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(jobs, "train_all", lambda *_: pytest.fail("trained again"))
    claims.run(claims.Claims(**SMALL, settings=SETTINGS, out=tmp_path / "out", resume=True), Console(quiet=True))
    assert json.loads((tmp_path / "out" / "claims.json").read_text()) == found
    with pytest.raises(ValueError, match="epochs 1, not 2"):
        claims.run(
            claims.Claims(**SMALL | {"epochs": 2}, settings=SETTINGS, out=tmp_path / "out", resume=True), Console()
        )


@pytest.mark.parametrize("name", ["seeds", "epochs", "train_images"])
def test_no_count_of_zero(name, tmp_path):
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        claims.run(claims.Claims(**SMALL | {name: 0}, out=tmp_path / "out"), Console())


@pytest.mark.parametrize("setting", ["members=2", "layers=2"])
def test_no_other_network(setting, tmp_path):
    with pytest.raises(ValueError, match="--set: members, layers and kind"):
        claims.run(claims.Claims(**SMALL, settings=(setting,), out=tmp_path / "out"), Console())
    assert not (tmp_path / "out").exists()


def test_no_width_of_zero(tmp_path):
    with pytest.raises(ValueError, match="--width"):
        claims.run(claims.Claims(**SMALL, width=0.0, out=tmp_path / "out"), Console())


def test_fewer_images_are_the_first_ones():
    split = claims.Claims(**SMALL).load()
    whole = data.load("digits")
    assert torch.equal(split.train_images, whole.train_images[:200])
    assert torch.equal(split.test_labels, whole.test_labels)
