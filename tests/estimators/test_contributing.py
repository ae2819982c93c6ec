"""The worked example of CONTRIBUTING.md passes the contract, and a wrong truth beside it does not."""

import re
from pathlib import Path

import pytest
import test_contract as contract

import oracles

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
ESTIMATOR, TRUTH = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
NAME = "tanh_straight_through"


@pytest.fixture
def example(monkeypatch):
    namespace: dict = {}
    exec(ESTIMATOR + TRUTH, namespace)
    monkeypatch.setitem(oracles.EXPECTED, NAME, namespace[NAME])
    return namespace["TanhStraightThrough"]


def test_it_has_at_most_forty_lines():
    assert (ESTIMATOR + TRUTH).count("\n") <= 40


def test_the_example_passes_every_check(example):
    for check in contract.CHECKS:
        check(NAME, example)
    for objective in ("network", "table"):
        contract.check_expectation(NAME, example, objective, 1, 3)


def test_another_slope_is_rejected(example):
    class Identity(example):
        """The identity's slope."""

        def forward(self, logits, noise):
            return self.sample(logits, noise) + logits - logits.detach()

    with pytest.raises(AssertionError):
        contract.check_expectation(NAME, Identity, "network", 1, 2)
