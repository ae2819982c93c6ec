"""`--set key=value`: a recipe's fields from the command line, checked against their types."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gatelet._checks import check_choice
from gatelet_lab.recipes import Recipe

_FIXED = ("row", "title", "paper")
KEYS = tuple(each.name for each in fields(Recipe) if each.name not in (*_FIXED, "options"))
_TYPES = get_type_hints(Recipe)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return the recipe with ``key=value`` settings in place of its own; ``options.NAME`` is the estimator's.

    Raises:
        ValueError: for an unknown key, a value of another type or out of its range; it names the row and the setting.
    """
    changes: dict[str, Any] = {}
    options = dict(recipe.options)
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise ValueError(f"--set {setting}: must be key=value")
        if key.startswith("options."):
            options[key.removeprefix("options.")] = _guess(text)
        else:
            changes[key] = value(key, text)
    return apply(recipe, changes | ({"options": options} if options != recipe.options else {}), "--set")


def apply(recipe: Recipe, changes: dict[str, Any], flag: str) -> Recipe:
    """Return the recipe with these fields; an error of its checks names the flag and the row."""
    try:
        return replace(recipe, **changes)
    except ValueError as error:
        raise ValueError(f"{flag}: row {recipe.row}: {error}") from error


def value(key: str, text: str, flag: str = "--set") -> Any:
    """Return a field's value from its text, ``none`` where the field may be None."""
    if key not in KEYS:
        check_choice(key, [*KEYS, "options.NAME"], f"key in {flag}")
    kind = _TYPES[key]
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if NoneType in members and text.lower() == "none":
        return None
    (kind,) = (member for member in members if member is not NoneType)
    try:
        return _parse(kind, text)
    except ValueError as error:
        name = " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else kind.__name__
        also = " (or none)" if NoneType in members else ""
        raise ValueError(f"{flag} {key}={text}: must be {name}{also}, not {text!r}") from error


def number(key: str) -> type | None:
    """Return int or float, if that is what the field holds (or it may be None); None otherwise."""
    kind = _TYPES.get(key)
    members = [each for each in (get_args(kind) or (kind,)) if each is not NoneType]
    return members[0] if members in ([int], [float]) else None


def _parse(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    parsed = kind(text)
    if kind is float and not math.isfinite(parsed):
        raise ValueError
    return parsed


def _guess(text: str) -> Any:
    """Return an estimator's option: what JSON makes of it, or the text itself. The estimator checks it."""
    try:
        return json.loads(text)
    except ValueError:
        return text
