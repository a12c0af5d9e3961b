"""Selection of records by a condition on their metadata (`data.where`), evaluated by pyarrow.

The condition is evaluated shard by shard, and the numbers of the rows that fulfil it are kept
beside the index, memory-mapped. A record without a field fulfils no comparison with it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import operator
import pathlib
from typing import Any

import numpy as np

from imagen_jax.config import where
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index.shard import Shard
from imagen_jax.data.index.table import Table
from imagen_jax.io import atomic

_OPERATORS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def select(table: Table, condition: str, cache: pathlib.Path) -> Table:
    """The records of a table that fulfil a condition.

    Args:
      table: with columns of all fields in the condition.
      condition: see `config/where.py`.
      cache: folder of the indexes.

    Raises:
      ConfigError: no record fulfils it, a text is compared with a number, or there is no pyarrow.
    """
    digest = hashlib.sha256(f"{table.fingerprint} {condition}".encode()).hexdigest()[:16]
    file = cache / f"where_{digest}.npy"
    if not file.exists():
        rows = np.flatnonzero(_mask(table, condition))
        try:
            with atomic.file(file) as temporary, temporary.open("wb") as out:
                np.save(out, rows)
        except OSError:  # A shared index may be read-only for this user.
            return _selected(table, condition, rows)
    return _selected(table, condition, np.asarray(np.load(file, mmap_mode="r")))


def _selected(table: Table, condition: str, rows: np.ndarray) -> Table:
    if not len(rows):
        raise ConfigError(
            f"config.data.where={condition!r} selects none of {len(table):,} records; see the "
            "values of their metadata, or widen it"
        )
    return table.select(rows)


def _mask(table: Table, condition: str) -> np.ndarray:
    try:
        arrow = importlib.import_module("pyarrow")
        compute = importlib.import_module("pyarrow.compute")
        importlib.import_module("pyarrow.dataset")
    except ImportError as error:
        raise ConfigError(
            f"config.data.where needs the module {error.name!r}; install pyarrow"
        ) from None
    tree, names = where.parse(condition), where.names(condition)
    masks = [np.zeros(0, bool)]
    for _, shard in table.shards():
        columns = {name: _column(arrow, shard, name) for name in names}
        try:
            masks.append(_evaluate(arrow, compute, tree, columns))
        except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, arrow.ArrowTypeError):
            kinds = ", ".join(f"{name}: {column.type}" for name, column in columns.items())
            raise ConfigError(
                f"config.data.where={condition!r} compares a text with a number ({kinds})"
            ) from None
    return np.concatenate(masks)


def _column(arrow: Any, shard: Shard, name: str) -> Any:
    values = shard.column(name)
    return arrow.array(values, from_pandas=True)  # NaN: missing.


def _evaluate(arrow: Any, compute: Any, tree: ast.expr, columns: dict[str, Any]) -> np.ndarray:
    """Whether each row fulfils the condition."""
    table = arrow.table(columns)
    expression = _expression(compute, tree, columns)
    masked = table.append_column("", arrow.array(np.arange(table.num_rows)))
    kept = masked.filter(expression)[masked.num_columns - 1].to_numpy()
    found = np.zeros(table.num_rows, bool)
    found[kept] = True
    return found


def _expression(compute: Any, node: ast.expr, columns: dict[str, Any]) -> Any:
    """The pyarrow expression of a checked tree."""
    part = functools.partial(_expression, compute, columns=columns)
    if isinstance(node, ast.BoolOp):
        join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return functools.reduce(join, (part(value) for value in node.values))
    if isinstance(node, ast.UnaryOp):
        return ~part(node.operand)
    assert isinstance(node, ast.Compare)
    left, found = node.left, []
    for kind, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(kind, ast.In | ast.NotIn):
            assert isinstance(right, ast.List | ast.Tuple)
            value = _value(compute, left)
            inside = functools.reduce(
                operator.or_, (value == where.constant(item) for item in right.elts)
            )
            found.append(~inside if isinstance(kind, ast.NotIn) else inside)
        else:
            compare = _OPERATORS[type(kind)]
            found.append(compare(_value(compute, left), _value(compute, right)))
        left = right
    return functools.reduce(operator.and_, found)


def _value(compute: Any, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return compute.field(node.id)
    return compute.scalar(where.constant(node))
