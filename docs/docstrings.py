"""Docstrings as the site shows them: doctests as code, the roles of Sphinx as links. An extension of griffe."""

import re

import griffe

ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
DOCTEST = re.compile(r"^( *)(>>> .*(?:\n.*\S.*)*)", re.MULTILINE)


def link(role: re.Match[str]) -> str:
    """`~package.name` is shown as `name`; names without a page stay code."""
    shown = role[2].rpartition(".")[2] if role[1] else role[2]
    return f'<autoref identifier="{role[2]}" optional><code>{shown}</code></autoref>'


def rewrite(text: str) -> str:
    """Fence doctests, link roles."""
    text = DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    return ROLE.sub(link, text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)
