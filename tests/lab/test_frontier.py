"""The frontier: a point per method and share, resumable, and timed from the weights that were kept."""

import json

import pytest
from rich.console import Console

from gatelet_lab.commands import frontier
from gatelet_lab.training import jobs

SMALL = {
    "dataset": "digits",
    "epochs": 1,
    "jobs": 2,
    "methods": ("straight_through", "noisy_rectifier", "mixture", "narrow"),
    "shares": (0.1, 1.0),
    "settings": ("experts=100", "bottleneck=10", "batch=64"),
}


def test_without_a_constraint_all_gates_are_one_network():
    names = [job.name for job in frontier.plan(frontier.Frontier(**SMALL | {"settings": ()}))]
    assert names == [
        "straight_through-0.1-seed0",
        "noisy_rectifier-0.1-seed0",
        "mixture-0.1-seed0",
        "narrow-0.1-seed0",
        "dense-1-seed0",
        "mixture-1-seed0",
        "narrow-1-seed0",
    ]


def test_a_narrow_dense_network_costs_what_the_gates_network_does():
    jobs_ = {job.recipe.row: job.recipe for job in frontier.plan(frontier.Frontier(**SMALL))}
    gated = 64 * 10 + 10 * 100 + (64 + 10) * 10  # gater, open units and their output
    assert jobs_["narrow-0.1"].model.kind == "dense"
    assert jobs_["narrow-0.1"].model.experts == round(gated / (64 + 10))
    assert jobs_["narrow-1"].model.experts == 100


def test_the_command_writes_everything_resumes_and_times(tmp_path, monkeypatch):
    small = SMALL | {"settings": ("experts=100", "bottleneck=10", "batch=64", "group_size=1"), "out": tmp_path / "out"}
    frontier.run(frontier.Frontier(**small), Console(quiet=True))
    path = tmp_path / "out" / "frontier.json"
    found = json.loads(path.read_text())
    by_name = {point["point"]: point for point in found["points"]}
    gates = ["straight_through-0.1", "noisy_rectifier-0.1"]
    assert list(by_name) == [*gates, "mixture-0.1", "narrow-0.1", "dense-1", "mixture-1", "narrow-1"]
    cost = by_name["straight_through-0.1"]["multiply_adds"]
    assert by_name["narrow-0.1"]["multiply_adds"] == pytest.approx(cost, abs=64 + 10)
    assert by_name["straight_through-0.1"]["open_test"] == pytest.approx(0.1, abs=0.03)
    assert by_name["mixture-0.1"]["open_test"] == pytest.approx(0.1)
    assert by_name["dense-1"]["open_test"] == 1
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(jobs, "train_all", lambda *_: pytest.fail("trained again"))
    frontier.run(frontier.Frontier(**small, resume=True), Console(quiet=True))
    assert json.loads(path.read_text()) == found
    frontier.run(frontier.Frontier(**small, time=True), Console(quiet=True))
    timed = json.loads(path.read_text())
    assert timed["points"] == found["points"]
    assert set(timed["inference"]["milliseconds"]) == {*by_name, "reference"}
    assert "| – |" not in (tmp_path / "out" / "frontier.md").read_text()
    frontier.run(frontier.Frontier(**small, resume=True), Console(quiet=True))
    assert json.loads(path.read_text()) == timed  # times are kept


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": ("straight_thru",)}, "'straight_through'"),
        ({"methods": ("local_expectation",)}, "unknown method"),
        ({"methods": ()}, "--methods"),
        ({"shares": (0.0,)}, "--shares"),
        ({"shares": (1.5,)}, "--shares"),
        ({"seeds": 0}, "--seeds"),
        ({"epochs": 0}, "--epochs"),
        ({"settings": ("expert=3",)}, "'experts'"),
        ({"time": True}, "not trained yet: straight_through-0.1-seed0"),
    ],
)
def test_bad_calls_name_the_argument(changes, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        frontier.run(frontier.Frontier(**SMALL | {"out": tmp_path / "out"} | changes), Console())
