"""Nested dicts as flat ones with joined names, and back."""

from collections.abc import Callable, Mapping
from typing import Any


def flat(tree: Mapping, separator: str = "/") -> dict[str, Any]:
    """{"obs": {"a": x}} -> {"obs/a": x}. A dict without entries stays a value."""
    result = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            below = flat(value, separator)
            result |= {f"{name}{separator}{path}": leaf for path, leaf in below.items()}
        else:
            result[str(name)] = value
    return result


def nested(
    entries: Mapping[str, Any], separator: str = "/", key: Callable[[str], Any] = str
) -> dict:
    """Undo `flat`; `key` makes the names what they were."""
    tree: dict = {}
    for path, value in entries.items():
        *parents, leaf = map(key, path.split(separator))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
