"""Copies finished runs into the repository: their JSON to results/, their tables and pictures to docs/.

    python benchmarks/results.py runs/paper runs/best runs/claims runs/frontier

A run's name is its directory's. ``docs/results.md`` has a place for each, between ``<!-- NAME -->`` and
``<!-- /NAME -->``; what stands there is replaced.
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURES = {
    "table": ("curves", "gates"),
    "claims": ("claims_gates", "claims_variance"),
    "frontier": ("frontier",),
}


def take(run: Path, root: Path = ROOT) -> None:
    """Copy one finished run."""
    kind = next((kind for kind in PICTURES if (run / f"{kind}.json").is_file()), None)
    if kind is None:
        sys.exit(f"{run}: holds none of {', '.join(f'{kind}.json' for kind in PICTURES)}")
    page = root / "docs" / "results.md"
    place = re.compile(rf"(<!-- {re.escape(run.name)} -->\n).*?(<!-- /{re.escape(run.name)} -->)", re.DOTALL)
    text = page.read_text()
    if not place.search(text):
        sys.exit(f"{page}: has no place <!-- {run.name} -->")
    # What a run printed, without its headline: the page has its own.
    printed = re.sub(r"\A# .*\n+", "", (run / f"{kind}.md").read_text()).strip()
    pictures = []
    for name in PICTURES[kind]:
        if (run / f"{name}.png").is_file():
            picture = f"{run.name}_{name}.png" if kind == "table" else f"{run.name}{name.removeprefix(kind)}.png"
            shutil.copyfile(run / f"{name}.png", root / "docs" / picture)
            pictures.append(f"![{name.replace('_', ' ')}]({picture})")
    filling = "\n\n".join([printed, *pictures])
    page.write_text(place.sub(lambda found: f"{found[1]}{filling}\n{found[2]}", text))
    (root / "results").mkdir(exist_ok=True)
    content = json.loads((run / f"{kind}.json").read_text())
    (root / "results" / f"{run.name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        take(Path(argument))
