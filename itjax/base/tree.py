"""Nested dicts by path: `{"layers": {"q": x}}` is `{"layers/q": x}`, and patterns choose leaves by those names."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

SEPARATOR = "/"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a/b": 1}`, in the order of the tree. Empty dicts vanish."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}{SEPARATOR}{below}": leaf for below, leaf in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(SEPARATOR)
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf
    return tree


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether any shell-style pattern (`*norm*`, `layers/*/kernel`) fits the path."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def select(tree: Mapping[str, Any], patterns: Iterable[str]) -> dict[str, bool]:
    """The same tree with True where a leaf's path fits any of the patterns."""
    patterns = tuple(patterns)
    return unflatten({path: matches(path, patterns) for path in flatten(tree)})


def num_elements(tree: Mapping[str, Any]) -> int:
    """Elements of all leaves together."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def num_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all leaves together."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flatten(tree).values())
