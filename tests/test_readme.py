"""The code of the README and of the guide to the estimators runs, the loop with every estimator that fits it."""

import re
from pathlib import Path

import pytest

import gatelet

ROOT = Path(__file__).parents[1]
(LOOP,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
UNIT = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "choosing.md").read_text(), flags=re.DOTALL)[0]
MODULES = [
    name
    for name, method in gatelet.estimators.ALL.items()
    if method.needs != "objective" and "bernoulli" in method.kinds
]
REPLICATED = LOOP.replace("net(x[batch])", "net(tape.replicate(x[batch], 2))").replace(
    ", y[batch],", ", tape.replicate(y[batch], 2),"
)


def test_the_loop_has_about_twenty_lines():
    assert LOOP.count("\n") <= 22


@pytest.mark.parametrize("name", MODULES)
def test_one_word_trains_the_loop_with_another_estimator(name, capsys):
    namespace: dict[str, object] = {}
    loop = LOOP if gatelet.estimators.ALL[name].replicas == 1 else REPLICATED
    exec(loop.replace("straight_through", name), namespace)
    printed = re.fullmatch(r"error ([\d.]+)%, open gates ([\d.]+)%\n", capsys.readouterr().out)
    assert printed
    assert float(printed[1]) < 25, "the task is learned: chance is 75 %"
    expected = {"sigmoid": 100, "noisy_sigmoid": 100}.get(name, 10)
    if name in ("top_k", "simple"):  # not a matter of the rate: one of 250
        assert float(printed[2]) == 0.4
    elif name in ("jump_relu", "sparsemax", "entmax"):
        assert 0.3 < float(printed[2]) <= 100
    elif name == "rectifier":  # cannot open more gates than are above zero
        assert 5 < float(printed[2]) <= 11
    else:
        assert float(printed[2]) == pytest.approx(expected, abs=1)


def test_the_unit_example_agrees_with_the_exact_gradient(capsys):
    namespace: dict = {}
    exec(UNIT, namespace)
    exact = gatelet.exact_gradient(namespace["objective"], namespace["logits"])
    assert (namespace["logits"].grad - exact).abs().max() < 0.05
