"""What `make release` tries in an environment that holds the wheel and not the checkout: smoke.py CHECKOUT."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import gatelet


def installed(checkout: Path) -> None:
    """What runs is the wheel, of the version that the checkout names."""
    place = Path(gatelet.__file__).resolve()
    assert "site-packages" in place.parts, place
    assert not place.is_relative_to(checkout / "src"), place
    named = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["version"]
    assert version("gatelet") == named, (version("gatelet"), named)
    assert (place.parent / "py.typed").is_file()


def readme(checkout: Path) -> None:
    """The README's code."""
    for code in re.findall(r"```python\n(.*?)```", (checkout / "README.md").read_text(), flags=re.DOTALL):
        exec(code, {})


def kernels() -> None:
    """The CPU's kernels give the dense backend's numbers."""
    x, weight, gate = torch.randn(64, 128), torch.randn(512, 128), (torch.rand(64, 512) < 0.1).float()
    ours = gatelet.kernels.gated_linear(x, weight, None, gate, backend="numba")
    torch.testing.assert_close(ours, x @ weight.T * gate, rtol=1e-4, atol=1e-4)


def conversion() -> None:
    """A model gets gates, is saved and read again."""
    model = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 32)).eval()
    gatelet.convert(model, target_rate=0.25, bottleneck=8)
    x = torch.randn(256, 32)
    gatelet.sparsity.calibrate_thresholds(model, [x])
    with TemporaryDirectory() as folder:
        gatelet.save(model, folder)
        again = gatelet.load(folder, nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 32)))
    torch.testing.assert_close(again.eval()(x), model(x))


def command_line() -> None:
    """The command says its version, and trains a row on the digits that scikit-learn brings."""
    program = str(Path(sys.executable).parent / "gatelet")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.strip() == version("gatelet"), told
    with TemporaryDirectory() as folder:
        row = ["--dataset", "digits", "--rows", "straight_through", "--epochs", "1", "--out", folder]
        subprocess.run([program, "reproduce", *row], check=True, stdout=subprocess.DEVNULL)
        assert (Path(folder) / "table.md").is_file()


def main(checkout: Path) -> None:
    assert not any(Path.cwd().iterdir()), "run it in an empty directory"
    installed(checkout)
    readme(checkout)
    kernels()
    conversion()
    command_line()
    print(f"smoke: gatelet {version('gatelet')} works from {Path(gatelet.__file__).parent}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
