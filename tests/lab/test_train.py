"""Training is resumable to the bit, its checkpoints are whole or refused, and each recipe does what it says."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import gatelet
from gatelet.kernels.backends import numba
from gatelet_lab import data, files
from gatelet_lab.files import CheckpointError
from gatelet_lab.training import fit, jobs, paper, recipes, vae
from gatelet_lab.training.model import multiply_adds
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipe import DEFAULTS
from gatelet_lab.training.recipes import ROWS, recipe

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def small(row, **changes):
    experts = 60 if ROWS[row]().sparsity.target_rate else 30
    return recipe(row, "quick").but(**{"experts": experts, "bottleneck": 20, "epochs": 4, **changes})


def history(trainer):
    return [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in trainer.history]


def run(trainer, epochs):
    for _ in range(epochs):
        trainer.advance()
    return trainer


@pytest.mark.parametrize("row", ROWS)
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(row, digits, tmp_path):
    whole = run(PaperTrainer(small(row), 3, digits), 4)
    run(PaperTrainer(small(row), 3, digits), 2).save(tmp_path / "half.pt")
    torch.manual_seed(99)  # what another process would have done to the random state
    resumed = PaperTrainer(small(row), 3, digits)
    resumed.load(tmp_path / "half.pt")
    run(resumed, 2)
    assert history(resumed) == history(whole)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    first, second = whole.result(), resumed.result()
    times = ("seconds_per_epoch", "seconds")
    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in second.items() if k not in times}


MODERN = {
    "layers": 2,
    "optimizer": "adamw",
    "schedule": "cosine",
    "average": 0.9,
    "gater_norm": True,
    "input_noise": 0.3,
    "adversarial": 0.3,
    "input_dropout": 0.1,
    "hidden_dropout": 0.1,
    "label_smoothing": 0.1,
    "weight_decay": 0.01,
    "max_norm": None,
    "gate_bias": None,
    "rate": 0.003,
}


MIXTURE = MODERN | {"kind": "mixture", "group_size": 10, "gater_norm": False}
STAGED = MODERN | {"gater": "two_stage", "layers": 1, "bfloat16": True}


@pytest.mark.parametrize("changes", [MODERN, MODERN | {"members": 2, "layers": 1}, MIXTURE, STAGED])
def test_what_the_paper_has_not_is_resumed_too(changes, digits, tmp_path):
    recipe = small("straight_through", **changes)
    whole = run(PaperTrainer(recipe, 3, digits), 3)
    run(PaperTrainer(recipe, 3, digits), 1).save(tmp_path / "part.pt")
    resumed = PaperTrainer(recipe, 3, digits)
    resumed.load(tmp_path / "part.pt")
    run(resumed, 2)
    assert history(resumed) == history(whole)
    for name, value in whole.averaged.state_dict().items():
        torch.testing.assert_close(resumed.averaged.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    first, second = whole.result(), resumed.result()
    assert first["test_error"] == second["test_error"]
    assert 0.05 < first["open_test"] < 0.2
    assert whole.history[-1].train_loss < whole.history[0].train_loss


def test_the_cosine_rises_over_an_epoch_and_ends_at_zero(digits):
    trainer = PaperTrainer(small("sigmoid", schedule="cosine", rate=1.0), 0, digits)
    rates = [trainer.rate(epoch) for epoch in (0.0, 0.5, 1.0, 2.5, 4.0)]
    assert rates == pytest.approx([0.01, 0.51, 1.0, 0.5, 0.0])


def test_a_cosine_keeps_the_last_weights_and_an_exponential_the_best(digits):
    for schedule in ("cosine", "exponential"):
        trainer = PaperTrainer(small("sigmoid", schedule=schedule), 0, digits)
        errors = iter([20.0, 10.0, 30.0])
        trainer.evaluate = lambda *_, errors=errors: (next(errors), 0.0, 1.0)
        run(trainer, 3)
        assert trainer.best_epoch == (2 if schedule == "cosine" else 1)


def test_more_training_takes_validation_images(digits):
    trainer = PaperTrainer(small("sigmoid", more_training=50), 0, digits)
    assert len(trainer.train_labels) == len(digits.train_labels) + 50
    torch.testing.assert_close(trainer.train_images[-50:], digits.valid_images[:50])
    torch.testing.assert_close(trainer.split.valid_images, digits.valid_images[50:])
    most = PaperTrainer(small("sigmoid", more_training=10_000), 0, digits).split.valid_labels
    torch.testing.assert_close(most, digits.valid_labels[len(digits.valid_labels) * 9 // 10 :])


def test_the_average_follows_the_weights_with_its_decay(digits):
    trainer = PaperTrainer(small("sigmoid", average=0.75), 0, digits)
    start = trainer.averaged.output.weight.clone()
    with torch.no_grad():
        trainer.model.output.weight.add_(1.0)
    trainer._average(1000)
    torch.testing.assert_close(trainer.averaged.output.weight, start + 0.25)


def test_the_adversary_raises_the_loss_more_than_noise_of_its_length(digits):
    trainer = run(PaperTrainer(small("sigmoid", adversarial=0.5), 0, digits), 2)
    x, y = digits.valid_images[:100], digits.valid_labels[:100]

    def loss(images):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(trainer.model.eval()(images), y).item()

    moved = trainer._adversary(x, y)
    lengths = torch.linalg.vector_norm(moved - x, dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))
    noise = torch.nn.functional.normalize(torch.randn(x.shape), dim=1) * 0.5
    assert loss(moved) - loss(x) > 3 * abs(loss(x + noise) - loss(x))


def test_the_adversary_moves_its_share_of_a_batch(digits):
    trainer = PaperTrainer(small("sigmoid", adversarial=0.5, adversarial_share=0.25, input_dropout=0.0), 0, digits)
    seen = []
    trainer.model.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = digits.train_images[:40]
    trainer.step((x, digits.train_labels[:40]))
    assert (seen[-1] != x).any(1).tolist() == [True] * 10 + [False] * 30


def test_mixed_images_lie_between_two_of_the_batch_and_learn_what_the_teacher_says_of_them(digits):
    taught = PaperTrainer(small("sigmoid"), 0, digits).model.eval()
    settings = {"teacher_share": 1.0, "mixup_share": 0.5, "input_dropout": 0.0}
    trainer = PaperTrainer(
        small("sigmoid", **settings, adversarial=0.1, adversarial_share=0.25), 0, digits, teacher=taught
    )
    seen = []
    trainer.model.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x, y = digits.train_images[:40], digits.train_labels[:40]
    trainer.step((x, y))
    assert (seen[-1] != x).any(1)[:20].tolist() == [True] * 10 + [False] * 10
    for own, mixed in zip(x[20:], seen[-1][20:], strict=True):  # on the line from its own image to another's
        along = x - own
        share = ((mixed - own) * along).sum(1) / along.square().sum(1).clamp(min=1e-9)
        off = torch.linalg.vector_norm(own + share[:, None] * along - mixed, dim=1)
        assert off.min() < 1e-4
        assert 0 < share[off.argmin()] < 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixup_share": 0.5}, "needs teacher_share=1"),
        ({"mixup_share": 1.0, "teacher_share": 1.0}, r"mixup_share must lie in \[0, 1\)"),
        ({"mixup_share": 0.6, "teacher_share": 1.0, "adversarial": 1.0, "adversarial_share": 0.5}, "exceed the batch"),
    ],
)
def test_a_share_to_mix_that_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        small("sigmoid", **settings)


def test_a_mixture_computes_the_share_and_balances_its_load(digits):
    recipe = small("straight_through", kind="mixture", group_size=6, target_rate=0.2, gate_bias=None)
    trainer = run(PaperTrainer(recipe, 0, digits), 1)
    layer = trainer.model.layer.eval()
    with torch.no_grad():
        units = layer(digits.valid_images[:50])
    groups = units.unflatten(1, (10, 6)).ne(0).any(-1)
    assert groups.sum(1).max() == 2  # of ten groups
    dense = torch.nn.functional.relu(layer.expert(digits.valid_images[:50]))
    assert (units.ne(0) <= dense.ne(0)).all()
    layer.train()(digits.valid_images[:50])
    assert layer.balance >= layer.BALANCE * (1 - 1e-5)  # its minimum, at an even load


def test_an_ensemble_gives_its_members_mean_probability(digits):
    trainer = run(PaperTrainer(small("straight_through", members=3), 0, digits), 1)
    trainer.evaluate(digits.valid_images, digits.valid_labels)
    for network in trainer.model.networks:
        assert network.active_fraction == pytest.approx(0.1, abs=0.02)  # each has a threshold of its own
    x = digits.test_images[:40]
    with torch.no_grad():
        mean = torch.stack([network(x).softmax(-1) for network in trainer.model.eval().networks]).mean(0)
        torch.testing.assert_close(trainer.model(x).exp(), mean)


def test_a_member_learns_by_its_own_loss_alone(digits):
    """Also where the estimator takes the loss itself: what another member loses must not reach this one's gates."""
    one, two = (PaperTrainer(small("score_function", members=2), 0, digits) for _ in range(2))
    with torch.no_grad():
        two.model.networks[1].output.weight.mul_(3)
    told = []
    for trainer in (one, two):
        torch.manual_seed(1)
        trainer.step((digits.train_images[:40], digits.train_labels[:40]))
        told.append(trainer._loss_sum)
    first, second = (trainer.model.networks for trainer in (one, two))
    for weight, same in zip(first[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=0)
    assert not torch.equal(first[0].layer.expert.weight, first[1].layer.expert.weight)
    assert told[0] != told[1]


def test_a_step_tells_the_mean_of_the_members_losses(digits):
    trainer = PaperTrainer(small("sigmoid", members=3, input_dropout=0.0), 0, digits)
    x, y = digits.train_images[:40], digits.train_labels[:40]
    with torch.no_grad():
        each = [torch.nn.functional.cross_entropy(network(x), y).item() for network in trainer.model.networks]
    trainer.step((x, y))
    assert trainer._loss_sum / len(x) == pytest.approx(sum(each) / 3)


def test_multiply_adds_are_counted_by_hand():
    recipe = small("straight_through", layers=2)  # 60 experts, 20 gater units
    count = multiply_adds(recipe, 64, 10, 0.1)
    assert count["gater"] == 64 * 20 + 20 * 60 + 6 * 20 + 20 * 60
    assert count["experts"] == 64 * 6 + 6 * 6
    assert count["output"] == 6 * 10
    assert count["dense"] == 64 * 60 + 60 * 60 + 60 * 10
    assert multiply_adds(recipe.but(members=3), 64, 10, 0.1) == {key: 3 * value for key, value in count.items()}
    mixed = multiply_adds(recipe.but(layers=1, kind="mixture", group_size=6), 64, 10, 0.1)
    assert mixed["gater"] == 64 * 10
    staged = multiply_adds(recipe.but(layers=1, gater="two_stage", gater_groups=6), 64, 10, 0.1, group_share=0.25)
    assert staged["gater"] == 20 * (64 + 6 + 15)
    dense = multiply_adds(recipe.but(kind="dense"), 64, 10, 1.0)
    assert dense["gater"] == 0
    assert dense["experts"] + dense["output"] == dense["dense"]


def test_the_cost_of_a_gater_in_two_stages_is_what_it_computed(digits):
    recipe = small("straight_through", gater="two_stage", gater_groups=6, gate_bias=None)
    trainer = run(PaperTrainer(recipe, 0, digits), 2)
    found = trainer.result()["multiply_adds"]["gater"]
    gater, threshold = trainer.model.layer.gater, trainer.model.layer.unit.threshold
    with torch.no_grad():
        images = torch.cat([digits.valid_images, digits.test_images])
        share = (gater.groups(gater.hidden(images).tanh()) > threshold).float().mean().item()
    assert found == pytest.approx(20 * (64 + 6 + share * 60), abs=10)
    assert found < 20 * (64 + 60)


def test_a_limit_on_the_output_layer_is_its_own(digits):
    def longest(**changes):
        trainer = PaperTrainer(small("straight_through", rate=3.0, **changes), 0, digits)
        run(trainer, 1)
        model = trainer.model
        weights = model.output.weight, model.layer.expert.weight, model.layer.gater.gates.weight
        return [torch.linalg.vector_norm(weight, dim=1).max().item() for weight in weights]

    limits = {"max_norm": 0.5, "gater_max_norm": 0.25}
    output, expert, gater = longest(output_max_norm=0.125, **limits)
    assert [output, expert, gater] == pytest.approx([0.125, 0.5, 0.25], rel=1e-5)
    free, expert, gater = longest(output_max_norm=None, **limits)
    assert free > 0.2
    assert [expert, gater] == pytest.approx([0.5, 0.25], rel=1e-5)


def test_a_dense_network_has_no_gater(digits):
    trainer = PaperTrainer(small("sigmoid", kind="dense", layers=2, norm=True, bfloat16=True), 0, digits)
    before = run(trainer, 4).history[0]
    assert trainer.history[-1].valid_error < before.valid_error
    result = trainer.result()
    assert result["open_test"] == 1
    x = digits.test_images[:5]
    with torch.no_grad():
        hidden = x
        for layer in trainer.model.eval().layers:
            hidden = layer.units.norm(torch.nn.functional.linear(hidden, layer.units.weight, layer.units.bias)).relu()
        torch.testing.assert_close(trainer.model(x), trainer.model.output(hidden))


def test_products_in_bfloat16_are_for_training_alone(digits):
    trainer = PaperTrainer(small("straight_through", bfloat16=True), 0, digits)
    layer, seen = trainer.model.layer, []
    hooks = [
        layer.expert.register_forward_hook(lambda _, __, out: seen.append(out.dtype)),
        layer.unit.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype)),
    ]
    trainer.step((digits.train_images[:40], digits.train_labels[:40]))
    assert seen == [torch.float32, torch.bfloat16]  # logits, which noise is compared with; experts
    for hook in hooks:
        hook.remove()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.calibrate()
    assert trainer.model.eval()(digits.valid_images).dtype == torch.float32


def test_a_teacher_is_learned_from(digits):
    taught = PaperTrainer(small("sigmoid"), 0, digits).model.eval()
    x, y = digits.train_images[:40], digits.train_labels[:40]
    for share in (1.0, 0.25):
        trainer = PaperTrainer(small("sigmoid", teacher_share=share), 1, digits, teacher=taught)
        with torch.no_grad():
            wanted = share * taught(x).softmax(-1) + (1 - share) * torch.nn.functional.one_hot(y, 10)
        torch.testing.assert_close(trainer._target(x, y), wanted)
    trainer.step((x, y))
    assert trainer._loss_sum > 0
    trainer.advance()
    assert trainer.result()["teacher"]["test_error"] > 50  # it was never trained
    assert PaperTrainer(small("sigmoid"), 0, digits)._target(x, y) is y


def test_a_teacher_and_its_share_go_together(digits):
    with pytest.raises(ValueError, match=r"teacher_share is 0.5, and a teacher was not given"):
        PaperTrainer(small("sigmoid", teacher_share=0.5), 0, digits)
    with pytest.raises(ValueError, match="a teacher was given"):
        PaperTrainer(small("sigmoid"), 0, digits, teacher=PaperTrainer(small("sigmoid"), 0, digits).model)


def test_gates_and_their_probabilities_are_those_of_the_calibrated_model(digits):
    trainer = run(PaperTrainer(small("smooth_times_stochastic"), 0, digits), 2)
    trainer.result()
    by_class, histogram = trainer.gates()
    _, _, share = trainer.evaluate(digits.valid_images, digits.valid_labels)
    weights = torch.bincount(digits.valid_labels) / len(digits.valid_labels)
    assert (by_class.mean(1) * weights).sum() == pytest.approx(share, rel=1e-4)
    assert sum(histogram) == pytest.approx(1)


def test_seeds_differ_and_repeat(digits):
    one, again, other = (run(PaperTrainer(small("straight_through"), seed, digits), 1) for seed in (0, 0, 1))
    assert history(one) == history(again)
    assert history(one) != history(other)


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row]().sparsity.target_rate])
def test_sparse_rows_end_at_their_target(row, digits):
    result = run(PaperTrainer(small(row), 0, digits), 4).result()
    assert result["open_test"] <= 0.12
    if row != "rectifier":  # cannot open more gates than are above zero
        assert result["open_test"] == pytest.approx(0.1, abs=0.02)


def test_weights_stay_within_their_max_norm(digits):
    trainer = run(PaperTrainer(small("score_function"), 0, digits), 1)
    limits = [limit for _, limit in trainer.limits]
    assert sorted(set(limits)) == [2.0, 6.0]
    for weight, limit in trainer.limits:
        assert torch.linalg.vector_norm(weight, dim=1).max() <= limit + 1e-4


def test_the_gater_has_its_own_rate(digits):
    rates = [group["lr"] for group in PaperTrainer(small("score_function"), 0, digits).optimizer.param_groups]
    trainer = PaperTrainer(small("score_function"), 0, digits)
    trainer.advance()
    main, gater = (group["lr"] for group in trainer.optimizer.param_groups)
    assert gater == pytest.approx(main / 200)
    assert rates[0] == main  # the first epoch runs at the full rate


def test_early_stopping_counts_epochs_without_improvement(digits):
    trainer = PaperTrainer(small("sigmoid", patience=2, rate=0.0), 0, digits)
    epochs = 0
    while not trainer.finished:
        trainer.advance()
        epochs += 1
    assert epochs == 3  # the first is the best, two more bring nothing


def test_a_checkpoint_of_another_run_is_refused_and_names_what_differs(digits, tmp_path):
    path = tmp_path / "one.pt"
    run(PaperTrainer(small("straight_through"), 0, digits), 1).save(path)
    with pytest.raises(CheckpointError, match=r"one\.pt.*seed was 0, is 1"):
        PaperTrainer(small("straight_through"), 1, digits).load(path)
    with pytest.raises(CheckpointError, match=r"rate was 0\.3, is 0\.2"):
        PaperTrainer(small("straight_through", rate=0.2), 0, digits).load(path)


def test_a_checkpoint_that_lacks_a_new_field_had_its_default(digits, tmp_path, monkeypatch):
    path = tmp_path / "one.pt"
    identity = PaperTrainer.identity
    monkeypatch.setattr(
        PaperTrainer,
        "identity",
        lambda self: {k: v for k, v in identity(self).items() if k != "momentum"},
    )
    run(PaperTrainer(small("sigmoid"), 0, digits), 1).save(path)
    monkeypatch.undo()
    PaperTrainer(small("sigmoid"), 0, digits).load(path)
    with pytest.raises(CheckpointError, match=r"momentum was 0\.0, is 0\.5"):
        PaperTrainer(small("sigmoid", momentum=0.5), 0, digits).load(path)


def test_a_checkpoint_from_before_all_trainers_were_one_is_continued(digits, tmp_path):
    """It held neither steps nor seconds, and a VAE's named job and step otherwise."""
    path = tmp_path / "one.pt"
    whole = run(PaperTrainer(small("noisy_sigmoid", average=0.9), 0, digits), 2)
    before = run(PaperTrainer(small("noisy_sigmoid", average=0.9), 0, digits), 1)
    before.save(path)
    state = torch.load(path, weights_only=True)
    steps, _ = state.pop("steps"), state.pop("seconds")
    torch.save(state, path)
    trainer = PaperTrainer(small("noisy_sigmoid", average=0.9), 0, digits)
    trainer.load(path)
    assert trainer.steps == steps == trainer.parts
    assert trainer.seconds == pytest.approx(trainer.history[0].seconds)
    assert history(run(trainer, 1)) == history(whole)
    held = {"job": {"estimator": "reinmax", "samples": 4, "seed": 0}, "step": 5, "seconds": 1.0}
    found = vae.VAETrainer.of_older(None, held)
    assert json.loads(found["identity"]) == held["job"]
    assert found["steps"] == 5


def test_a_recipe_is_nested_and_its_files_are_flat():
    recipe = ROWS["straight_through"]()
    assert recipe.but(**recipe.flat()) == recipe
    assert recipe.but(momentum=0.5, experts=50).optimiser.momentum == 0.5
    assert recipe.flat()["gate_scale"] == recipe.gater.gate_scale
    with pytest.raises(TypeError, match="no field rat"):
        recipe.but(rat=0.5)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\)"):
        recipe.but(momentum=1.0)


def test_every_kept_result_can_be_read(tmp_path):
    """Also one with fields that are no more, or from before others were there."""
    (tmp_path / "rows").mkdir()
    for name in ("paper", "paper_max_norm", "best", "best_134", "best_voting"):
        for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
            recipe = recipes.ROWS.get(row["row"], recipes.best)()
            config = {key: value for key, value in row["config"].items() if key in recipe.flat()}
            known = recipe.but(**{**DEFAULTS, **config})
            job = jobs.Job(known, row["seed"])
            (tmp_path / "rows" / f"{job.name}.json").write_text(json.dumps(row))
            assert jobs.read_result(tmp_path, job)["test_error"] == row["test_error"]


def test_a_checkpoint_of_another_version_is_refused(digits, tmp_path, monkeypatch):
    path = tmp_path / "one.pt"
    run(PaperTrainer(small("sigmoid"), 0, digits), 1).save(path)
    monkeypatch.setattr(paper, "VERSION", paper.VERSION + 1)
    with pytest.raises(CheckpointError, match="version was 1, is 2"):
        PaperTrainer(small("sigmoid"), 0, digits).load(path)


def test_a_truncated_checkpoint_is_refused(digits, tmp_path):
    path = tmp_path / "one.pt"
    run(PaperTrainer(small("sigmoid"), 0, digits), 1).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        PaperTrainer(small("sigmoid"), 0, digits).load(path)


def test_a_crash_while_writing_leaves_the_last_good_file(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, lambda file: file.write(b"good"))

    def crash(file):
        file.write(b"ba")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, crash)
    assert path.read_bytes() == b"good"


def test_divergence_is_told_by_its_epoch(digits):
    trainer = PaperTrainer(small("sigmoid", rate=1e30), 0, digits)
    with pytest.raises(FloatingPointError, match="the loss became nan in epoch 1"):
        trainer.advance()


def test_a_stop_is_noticed_within_an_epoch(digits):
    trainer = PaperTrainer(small("sigmoid"), 0, digits)
    with pytest.raises(fit.Stopped):
        trainer.advance(stop=lambda: True)


def test_samples_are_averaged_as_probabilities(digits):
    trainer = run(PaperTrainer(small("straight_through"), 0, digits), 2)
    _, single, share = trainer.evaluate(digits.test_images, digits.test_labels, samples=1)
    _, mean, _ = trainer.evaluate(digits.test_images, digits.test_labels, samples=20)
    assert mean < single  # Jensen: the mean of probabilities has the smaller NLL
    assert 0 < share < 1


def test_what_is_trained_does_not_depend_on_a_stopwatch(digits, monkeypatch):
    """With ``measure_costs()`` asked for or not, the trainer asks no clock; the switch is then as it was."""
    asked = []
    monkeypatch.setattr(numba, "measured", lambda *given: asked.append(given) or numba.Costs(0.1, 0.5))
    monkeypatch.setattr(numba, "SMALL", 0)  # so that costs are asked for at these sizes
    recipe = small("straight_through")
    without = run(PaperTrainer(recipe, 3, digits), 1)
    gatelet.kernels.measure_costs()
    try:
        measured = run(PaperTrainer(recipe, 3, digits), 1)
        assert not asked
        assert history(without) == history(measured)
        for name, value in without.model.state_dict().items():
            torch.testing.assert_close(measured.model.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
        x, weight, gate = torch.zeros(512, 256), torch.zeros(512, 256), torch.zeros(512, 512)
        gatelet.kernels.explain(x, weight, gate)
        assert asked
    finally:
        gatelet.kernels.measure_costs(False)
