"""Find the first difference between two nested structures of dicts and lists.

This module does not import torch.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple


class Difference(NamedTuple):
    """The first place where two nested structures of dicts and lists differ."""

    name: str  # such as "args/epochs"
    now: object
    before: object


def compare_values(now: object, before: object) -> Difference | None:
    """Return the first place where nested dicts and lists hold different values, or None.

    Only keys that both dicts have are compared.
    """
    return first_difference(now, before, comparable_value)


def comparable_value(value: object) -> object:
    """Return a string, a number or None unchanged, and the type of any other value.

    Only strings, numbers, None and types are compared with ==. A hostile file can hold objects
    whose comparison never ends.
    """
    return value if value is None or isinstance(value, (str, int, float)) else type(value)


def first_difference(
    now: object, before: object, summary: Callable[[object], object], name: str = ""
) -> Difference | None:
    """Return the first place where two nested structures of dicts and lists differ, or None.

    Two values differ if their `summary` differs. Only keys that both dicts have are compared.
    `before` may come from a hostile file, but `now` must be trusted: the recursion is at most as
    deep as `now`.
    """
    if isinstance(now, dict) and isinstance(before, dict):
        keys = [key for key in now if key in before]
        pairs = [(key, now[key], before[key]) for key in keys]
    elif isinstance(now, list) and isinstance(before, list):
        pairs = [(i, *pair) for i, pair in enumerate(itertools.zip_longest(now, before))]
    elif summary(now) == summary(before):
        return None
    else:
        return Difference(name, summary(now), summary(before))
    for key, new, old in pairs:
        if found := first_difference(new, old, summary, f"{name}/{key}".lstrip("/")):
            return found
    return None
