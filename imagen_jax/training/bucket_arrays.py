"""A sharded tree of arrays as objects in a bucket.

Every process writes its shards to a few large objects and lists them in `PROCESS.json`. The first
process waits for all lists and then writes `commit.json`, so a tree without it is incomplete. Each
shard has a CRC-32C. A reader reads the lists and the ranges that its devices need, on any mesh.

Orbax, which writes the same trees on disks, has no driver for s3://, and for gs:// depends on
TensorFlow's or fsspec's file systems.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import google_crc32c
import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from imagen_jax.io import buckets

COMMIT = "commit.json"
PART_BYTES = 256 << 20  # Of an object; a larger shard has one of its own.
GAP_BYTES = 1 << 20  # Unneeded bytes that are read rather than asking twice.
WAIT_FOR_OTHERS = 900.0  # Seconds for the slowest process.


class ShardError(ValueError):
    """The content of a saved tree is damaged."""


class Shard(NamedTuple):
    """A shard of an array.

    Attributes:
      path: of the array in the tree.
      starts: of the shard in the array.
      data: its values, on the host.
    """

    path: str
    starts: list[int]
    data: np.ndarray


class Saved(NamedTuple):
    """Where a shard is saved: as `Shard`, its shape, dtype, object, offset and CRC-32C."""

    path: str
    starts: list[int]
    shape: list[int]
    dtype: str
    part: str
    offset: int
    crc: int

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def own_shards(tree: Any) -> list[Shard]:
    """Copies on the host of the shards that this process writes: one replica of each."""
    found = []
    for path, leaf in _leaves(tree):
        if not isinstance(leaf, jax.Array):
            if jax.process_index() == 0:
                found.append(Shard(path, [0] * np.ndim(leaf), np.array(leaf)))
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                starts = [part.start or 0 for part in shard.index]
                # A copy: a later step may donate the buffer.
                found.append(Shard(path, starts, np.array(shard.data)))
    return found


def describe(tree: Any) -> dict[str, Any]:
    """Dtype and shape of every array by path, as JSON values."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in _leaves(tree)}


def write_shards(address: str, process: int, shards: list[Shard], token: str) -> None:
    """Writes the shards of a process and their list.

    Args:
      address: of the tree.
      process: index of this process.
      shards: `own_shards`.
      token: of this save; the list holds it.

    Raises:
      BucketError: the store does not answer.
    """
    parts: list[list[Shard]] = [[]]
    for shard in shards:
        if parts[-1] and sum(s.data.nbytes for s in [*parts[-1], shard]) > PART_BYTES:
            parts.append([])
        parts[-1].append(shard)

    def write(number: int) -> list[Saved]:
        name, content, rows = f"{process:05d}.{number:05d}.bin", bytearray(), []
        for path, starts, data in parts[number]:
            raw = np.ascontiguousarray(data).tobytes()
            crc = google_crc32c.value(raw)
            rows.append(
                Saved(path, starts, list(data.shape), str(data.dtype), name, len(content), crc)
            )
            content += raw
        if content:
            buckets.write(buckets.join(address, name), bytes(content))
        return rows

    with ThreadPoolExecutor(4) as pool:
        rows = [list(row) for part in pool.map(write, range(len(parts))) for row in part]
    content = json.dumps({"token": token, "rows": rows}).encode()
    buckets.write(buckets.join(address, f"{process:05d}.json"), content)


def commit(address: str, processes: int, content: Mapping[str, Any], token: str) -> None:
    """Waits for the lists of all processes, then completes a tree.

    Args:
      address: of the tree.
      processes: their number.
      content: JSON values that are kept with the tree.
      token: of this save.

    Raises:
      BucketError: a process does not write its list, or the store does not answer.
    """
    for process in range(processes):
        wait_for(buckets.join(address, f"{process:05d}.json"), token)
    text = json.dumps({**content, "processes": processes})
    buckets.write(buckets.join(address, COMMIT), text.encode())


def wait_for(address: str, token: str) -> None:
    """Waits for an object in JSON that holds a token. Raises BucketError: it does not come."""
    end, wait = time.monotonic() + WAIT_FOR_OTHERS, 0.05
    while True:
        try:
            if json.loads(buckets.read(address).data)["token"] == token:
                return
        except buckets.MissingError:
            pass
        if time.monotonic() > end:
            raise buckets.BucketError(f"{address} is not written by another process")
        time.sleep(wait)
        wait = min(2 * wait, 1.0)


def read_commit(address: str) -> dict[str, Any]:
    """The content of `commit`. Raises BucketError: there is none."""
    return json.loads(buckets.read(buckets.join(address, COMMIT)).data)


def shapes(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `describe` as nested dicts of shapes."""
    tree: dict[str, Any] = {}
    for path, (dtype, shape) in content.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    return tree


def read(address: str, abstract: Any) -> Any:
    """Reads a tree, or a part of it.

    Args:
      address: of the tree.
      abstract: shapes; arrays without a sharding are returned as NumPy arrays.

    Raises:
      ShardError: a checksum or a shard is wrong.
      BucketError: the store does not answer.
    """
    processes = read_commit(address)["processes"]

    def list_of(process: int) -> list[Saved]:
        content = buckets.read(buckets.join(address, f"{process:05d}.json")).data
        return [Saved(*row) for row in json.loads(content)["rows"]]

    with ThreadPoolExecutor(buckets.THREADS) as pool:
        saved: dict[str, list[Saved]] = {}
        for rows in pool.map(list_of, range(processes)):
            for row in rows:
                saved.setdefault(row.path, []).append(row)
    leaves = _leaves(abstract)
    wanted = {path: _boxes(leaf) for path, leaf in leaves}
    needed = [
        row
        for path, boxes in wanted.items()
        for row in saved.get(path, ())
        if any(_overlap(row, box) is not None for box in boxes)
    ]
    data = _load(address, needed)
    made = [_array(leaf, path, saved.get(path, []), data) for path, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), made)


Box = tuple[tuple[int, int], ...]  # Start and end along each axis.


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _boxes(leaf: Any) -> set[Box]:
    """The parts of an array that the devices of this process need."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return {tuple((0, n) for n in leaf.shape)}
    indices = sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    return {_box(index, leaf.shape) for index in indices}


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _overlap(row: Saved, box: Box) -> list[tuple[int, int]] | None:
    """The part that a shard and a box have in common; None: nothing."""
    common = [
        (max(start, first), min(start + n, last))
        for start, n, (first, last) in zip(row.starts, row.shape, box, strict=True)
    ]
    return common if all(a < b for a, b in common) else None


def _load(address: str, rows: list[Saved]) -> dict[tuple[str, int], np.ndarray]:
    """The values of shards by object and offset; neighbours are read together."""
    spans: list[list[Saved]] = []
    for row in sorted(rows, key=lambda row: (row.part, row.offset)):
        last = spans[-1][-1] if spans else None
        near = last and last.part == row.part and row.offset - last.offset - last.size <= GAP_BYTES
        spans[-1].append(row) if near else spans.append([row])

    def load(span: list[Saved]) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
        start, end = span[0].offset, span[-1].offset + span[-1].size
        part = buckets.join(address, span[0].part)
        data = memoryview(buckets.read(part, start, end - start).data if end > start else b"")
        for row in span:
            raw = data[row.offset - start : row.offset - start + row.size]
            if google_crc32c.value(bytes(raw)) != row.crc:
                raise ShardError(f"{part}: the checksum of {row.path} is wrong")
            yield (row.part, row.offset), np.frombuffer(raw, row.dtype).reshape(row.shape)

    with ThreadPoolExecutor(4) as pool:
        loaded = pool.map(lambda span: list(load(span)), spans)
        return {key: value for pairs in loaded for key, value in pairs}


def _array(
    leaf: Any, path: str, rows: list[Saved], data: Mapping[tuple[str, int], np.ndarray]
) -> Any:
    """The array of a leaf, from the shards that hold it."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        box = _box(index, leaf.shape)
        result = np.empty([b - a for a, b in box], leaf.dtype)
        filled = 0
        for row in rows:
            common = _overlap(row, box)
            if common is None:
                continue
            to = tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(common, box, strict=True))
            of = tuple(slice(a - s, b - s) for (a, b), s in zip(common, row.starts, strict=True))
            result[to] = data[row.part, row.offset][of]
            filled += result[to].size
        if filled != result.size:
            raise ShardError(f"{path} is not saved as a whole")
        return result

    sharding = getattr(leaf, "sharding", None)
    whole = tuple(slice(None) for _ in leaf.shape)
    if sharding is None:
        return part(whole)
    made: dict[Box, np.ndarray] = {}  # Replicas on several devices are assembled once.

    def once(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or whole
        box = _box(index, leaf.shape)
        if box not in made:
            made[box] = part(index)
        return made[box]

    return jax.make_array_from_callback(tuple(leaf.shape), sharding, once)
