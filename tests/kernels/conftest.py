"""One Numba cache for the whole session, so that every process compiles a kernel at most once."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"gatelet-numba-{os.getuid()}"))
