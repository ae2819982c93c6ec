"""The commands of docs/machines.md, as its readers type them."""

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "machines.md").read_text()


def command(begins, instead=()):
    """Return the page's command that begins with these words.

    ``instead`` holds pairs of what is on the page (an address, a place, a number) and what a test puts in its place.
    """
    shown = "\n".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    (line,) = (line[2:].partition("#")[0] for line in shown.splitlines() if line.startswith(f"$ {begins}"))
    for there, here in instead:
        assert there in line, (there, line)
        line = line.replace(there, str(here))
    return shlex.split(line)
