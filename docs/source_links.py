"""A hook of MkDocs: links to files of the repository are for its readers; on the site only their words stay."""

import re
from typing import Any

FILE = re.compile(r"\[([^\[\]]+)\]\((?:\.\./)+(?:src|tests)/[^()]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each link to a file outside of the site by its words."""
    return FILE.sub(r"\1", markdown)
