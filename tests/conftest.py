"""What every test runs under: one thread, a fixed seed, poison in uninitialised memory; and on which device."""

import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are created: cpu, or cuda (docs/gpu.md)")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    # Triton asks once, when it is imported: its kernels run in its interpreter unless there is a GPU to test on.
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    if device != "cpu":
        # Once per process, where a backward pass begins with a matrix product: torch's word to itself.
        config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")
        torch.set_default_device(device)  # for tensors alone: generators are given theirs here

        class Generator(torch.Generator):
            def __new__(cls, device: str | torch.device = device) -> "Generator":
                return super().__new__(cls, device)

        torch.Generator = Generator


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device that is tested."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _only_on_the_cpu(request: pytest.FixtureRequest, device: str) -> None:
    if device != "cpu" and request.node.get_closest_marker("cpu"):
        pytest.skip("this is about the CPU")


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def _poison_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, so that a value that was never written is seen; fix the seed."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    torch.manual_seed(0)
