"""One Numba cache for the whole session, so that every process compiles a kernel at most once."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"gatelet-numba-{os.getuid()}"))


@pytest.fixture(autouse=True)
def _backend_of_the_device(request: pytest.FixtureRequest, device: str) -> None:
    """Numba runs on the CPU alone."""
    call = getattr(request.node, "callspec", None)
    numba = call is not None and call.params.get("backend") == "numba"
    if device != "cpu" and numba:
        pytest.skip("Numba's kernels run on the CPU")
