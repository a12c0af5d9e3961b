"""Parts of a parameter tree, chosen by patterns of paths.

A pattern such as `text_*` or `*attention*` matches a parameter by its path, such as
`down_0_0/conv_in/kernel`, or by that of a group that contains it; * is any text.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from imagen_jax.interop.weights import flatten, unflatten


def matches(path: str, pattern: str) -> bool:
    """Whether a parameter, or a group that contains it, matches a pattern."""
    parts = path.split("/")
    above = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(name, pattern) for name in above)


def select(tree: Any, patterns: Sequence[str]) -> Any:
    """The part of a tree that matches one of `patterns`; (): the whole tree."""
    if not patterns:
        return tree
    flat = flatten(tree)
    return unflatten({k: v for k, v in flat.items() if any(matches(k, p) for p in patterns)})


def merge(tree: Any, part: Any) -> Any:
    """`tree` with the values of `part` in place of its own."""
    return unflatten({**flatten(tree), **flatten(part)})
