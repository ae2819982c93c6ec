"""`key=value` on the command line: a recipe's fields (`--set`), checked against their types; an estimator's options."""

import json
import math
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from gatelet._checks import check_choice
from gatelet.estimators import ALL, Estimator
from gatelet_lab.training.recipe import TYPES, Recipe

KEYS = tuple(key for key in TYPES if key != "options")


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return the recipe with ``key=value`` settings in place of its own; ``options.NAME`` is the estimator's.

    Raises:
        ValueError: for an unknown key, a value of another type or out of its range; it names the row and the setting.
    """
    changes: dict[str, Any] = {}
    options = dict(recipe.model.options)
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise ValueError(f"--set {setting}: must be key=value")
        if key.startswith("options."):
            options[key.removeprefix("options.")] = _option(text)
        else:
            changes[key] = value(key, text)
    return apply(recipe, changes | ({"options": options} if options != recipe.model.options else {}), "--set")


def apply(recipe: Recipe, changes: dict[str, Any], flag: str) -> Recipe:
    """Return the recipe with these fields; an error of its checks names the flag and the row."""
    try:
        return recipe.but(**changes)
    except ValueError as error:
        raise ValueError(f"{flag}: row {recipe.row}: {error}") from error


def value(key: str, text: str, flag: str = "--set") -> Any:
    """Return a field's value from its text, ``none`` where the field may be None."""
    if key not in KEYS:
        check_choice(key, [*KEYS, "options.NAME"], f"key in {flag}")
    kind = TYPES[key]
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
    kind = TYPES.get(key)
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


def estimator(spec: str, flag: str = "--estimators") -> Estimator:
    """Return the estimator that ``name`` or ``name:option=value,option=value`` describes.

    Raises:
        ValueError: for an unknown name, another syntax, or what the estimator refuses; it names the flag and the text.
    """
    name, _, rest = spec.partition(":")
    check_choice(name, ALL, "estimator")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if not equals:
            raise ValueError(f"{flag} {spec}: options are written name:option=value, not {part!r}")
        options[key] = _option(text)
    try:
        return ALL[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{flag} {spec}: {error}") from error


def _option(text: str) -> Any:
    """Return an estimator's option: what JSON makes of it, or the text itself. The estimator checks it."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
