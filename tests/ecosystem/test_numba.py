"""Kernels where Numba has nowhere to keep what it compiles, and where it compiles nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gatelet

RUN = """
import sys, warnings
import torch
from gatelet.kernels import explain, gated_linear

torch.manual_seed(0)
x, weight, bias = torch.randn(64, 256), torch.randn(512, 256), torch.randn(512)
gate = (torch.rand(64, 512) < 0.1).float()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        found = gated_linear(x, weight, bias, gate)
    found64 = gated_linear(x.double(), weight.double(), bias.double(), gate.double())
torch.testing.assert_close(found, (x @ weight.t() + bias) * gate, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(found64.float(), found, atol=1e-4, rtol=1e-4)
print(explain(x, weight, gate).backend)
print(*(str(each.message) for each in said if "gatelet" in str(each.message)), sep="\\n")
"""

LISTS = """
import torch
import gatelet

code = gatelet.nn.SparseAutoencoder(16, 64, k=4)
optimizer = gatelet.RowAdam(code.parameters(), lr=0.1)
x = torch.randn(20, 16)
first = None
for _ in range(20):
    optimizer.zero_grad()
    loss = (code(x) - x).square().mean()
    first = first or loss.item()
    loss.backward()
    optimizer.step()
assert loss < 0.8 * first, (first, loss)
"""


def run(code, **environment):
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_nowhere_to_keep_what_is_compiled(tmp_path):
    """An installation that cannot be written, and no home: kernels are compiled anew, and one warning says so."""
    copy = tmp_path / "gatelet"
    shutil.copytree(Path(gatelet.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "kernels" / "backends" / "numba" / "__pycache__").touch()  # a file: no user can make this folder
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "NUMBA_CACHE_DIR": "/dev/null/numba"}
    backend, *said = run(RUN, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", **nowhere)
    assert backend == "numba"
    assert len(said) == 1, said
    assert "NUMBA_CACHE_DIR" in said[0]


def test_numba_switched_off(tmp_path):
    """With NUMBA_DISABLE_JIT=1 everything runs densely, by PyTorch's operators, and one warning says so."""
    off = {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    backend, *said = run(RUN, PYTHONPATH=str(Path(gatelet.__file__).parents[1]), **off)
    assert backend == "dense"
    assert len(said) == 1, said
    assert "NUMBA_DISABLE_JIT" in said[0]
    run(LISTS, PYTHONPATH=str(Path(gatelet.__file__).parents[1]), **off)
