"""Conditions on the metadata of a sample, as in `width>=256 and (aesthetic>5 or licence=="cc0")`.

Comparisons of fields with numbers and texts, `in` with a list of them, joined by and, or, not and
parentheses, in Python's grammar. Nothing is executed: the tree is checked here and evaluated by
pyarrow (`data/index/selection.py`).
"""

from __future__ import annotations

import ast

from imagen_jax.config.fields import ConfigError

_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.In, ast.NotIn)


def parse(text: str, field: str = "data.where") -> ast.expr:
    """The checked tree of a condition.

    Args:
      text: the condition.
      field: of the configuration, for the message.

    Raises:
      ConfigError: it is no condition.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(
            f"config.{field}={text!r} is no condition ({why}); write one such as "
            "'width>=256 and aesthetic>5'"
        ) from None
    return tree


def names(text: str) -> tuple[str, ...]:
    """The fields in a condition, sorted. Raises ConfigError: it is none."""
    if not text:
        return ()
    found = {node.id for node in ast.walk(parse(text)) if isinstance(node, ast.Name)}
    return tuple(sorted(found))


def _check(node: ast.expr) -> None:
    """Raises ValueError: the node is no condition."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand)
    elif isinstance(node, ast.Compare):
        values = [node.left, *node.comparators]
        for operator, value in zip(node.ops, node.comparators, strict=True):
            if not isinstance(operator, _COMPARISONS):
                raise ValueError("only <, <=, >, >=, ==, != and in compare")
            if isinstance(operator, ast.In | ast.NotIn):
                if not isinstance(value, ast.List | ast.Tuple):
                    raise ValueError("`in` needs a list")
                values.remove(value)
                for item in value.elts:
                    constant(item)
        for value in values:
            if not isinstance(value, ast.Name):
                constant(value)
    else:
        raise ValueError(f"{ast.unparse(node)} is no comparison")


def constant(node: ast.expr) -> float | str:
    """A number or a text. Raises ValueError: the node is neither."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, str) and sign == 1:
        return value
    if isinstance(value, int | float) and abs(value) < 2**1000:
        return sign * float(value)
    raise ValueError(f"{ast.unparse(node)} is no field, number or text")
