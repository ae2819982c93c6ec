"""What `import gatelet` costs, brings along, and leaves alone."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gatelet

ROOT = Path(gatelet.__file__).parent

PROBE = """
import json, sys, time
def snapshot():
    import torch
    owners = [torch, torch.Tensor, torch.nn, torch.nn.functional, torch.nn.Module, torch.nn.Linear, torch.autograd]
    return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]
def switches():
    return [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.get_rng_state().sum().item(), torch.are_deterministic_algorithms_enabled(), list(sys.meta_path)]
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
import torch.autograd, torch.nn.functional
before, switched, modules = snapshot(), switches(), set(sys.modules)
start = time.perf_counter()
import gatelet
gatelet_seconds = time.perf_counter() - start
after = snapshot()
changed = [name for old, new in zip(before, after) for name in old if new.get(name) != old[name]]
added = [name for old, new in zip(before, after) for name in new if name not in old]
print(json.dumps({"torch": torch_seconds, "gatelet": gatelet_seconds, "changed": changed, "added": added,
                  "switched": switched != switches(), "modules": sorted(set(sys.modules) - modules)}))
"""


@pytest.fixture(scope="module")
def probe() -> dict:
    """A fresh process that imports torch, then gatelet. Isolated: no PYTHON* variable reaches it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}){PROBE}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_is_cheaper_than_that_of_torch(probe):
    assert probe["gatelet"] < probe["torch"]


def test_import_patches_nothing(probe):
    assert probe["changed"] == []
    # a submodule of torch that gatelet imports becomes an attribute of torch; nothing else may appear
    submodules = {name.rpartition(".")[2] for name in probe["modules"] if name.startswith("torch.")}
    assert set(probe["added"]) <= submodules
    assert not probe["switched"]


@pytest.mark.parametrize(
    "name",
    ["gatelet_lab", "numba", "triton", "matplotlib", "sklearn", "scipy", "pandas", "tensorboard", "tyro", "beartype"],
)
def test_import_brings_nothing_heavy(probe, name):
    assert not [module for module in probe["modules"] if module.split(".")[0] == name]


def test_typed():
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize("package", ["", "estimators", "sparsity", "nn"])
def test_public_names_are_reexported_explicitly(package):
    """`X as X`: type checkers and editors see these names as public, and no others."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.col_offset == 0]
    module = __import__(f"gatelet.{package}".rstrip("."), fromlist=["_"])
    names = [alias for node in imports for alias in node.names if node.module.startswith("gatelet")]
    public = [alias.name for alias in names if alias.asname is not None]
    assert public
    for alias in names:
        assert alias.asname in (None, alias.name)
        if alias.asname:
            assert hasattr(module, alias.name)
            assert not alias.name.startswith("_")
    assert len(set(public)) == len(public)
    # in the packages that only re-export, everything is
    if package != "estimators":
        assert all(alias.asname for alias in names)
        assert all(node in imports or ast.unparse(node).startswith("__version__ = ") for node in tree.body[1:])


def test_the_documented_surface():
    for name in ("StochasticUnit", "Tape", "surrogate", "exact_gradient", "sampling", "estimators", "nn", "sparsity"):
        assert hasattr(gatelet, name), name
    for name in ("KLRate", "AdaptiveL1", "FiringRateBias", "BetaNoise", "penalty", "calibrate_thresholds"):
        assert hasattr(gatelet.sparsity, name), name
    for name in ("ConditionalLinear", "Gater"):
        assert hasattr(gatelet.nn, name), name
    with pytest.raises(TypeError):
        gatelet.estimators.ALL["mine"] = gatelet.estimators.Estimator


COMPILED = {f"{kind}kernels.py" for kind in ("", "list_", "narrow_", "few_", "decode_")} | {"vector.py"}
"""Files of Numba's and Triton's kernels: a factory holds all functions that it compiles together."""


def test_functions_are_short():
    """At most 60 lines without their docstrings, kernels apart."""
    long = []
    for path in sorted(path for folder in (ROOT, ROOT.parent / "gatelet_lab") for path in folder.rglob("*.py")):
        if path.name in COMPILED and "backends" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                told = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1 - (told.end_lineno - told.lineno + 1 if told else 0)
                long += [f"{path.name}: {node.name} has {lines}"] if lines > 60 else []
    assert not long


def test_the_package_says_its_version():
    assert gatelet.__version__ == importlib.metadata.version("gatelet")
