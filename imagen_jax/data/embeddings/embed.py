"""`embed`: encodes every distinct caption once and stores the result (Imagen, Sec. 2.5).

Captions are grouped by token count rounded up to a multiple of 8 and then ordered by hash; a unit
of `unit_size` captions of one group is encoded in one call of fixed shape and written as one file.
A unit's bytes thus depend on nothing but its captions, the encoder and the kind of devices, so that
a killed run goes on where it stopped. Any number of workers on any number of hosts may share the
folder: each claims a unit before it encodes it (`data.claims`), and takes over what dead ones held.
"""

from __future__ import annotations

import collections
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from imagen_jax.data.embeddings import store, unit_file
from imagen_jax.data.embeddings.claims import Claims
from imagen_jax.text.encoders import TextEncoder

BUCKET = 8  # Tokens: the step between the lengths that are compiled.
CHUNK = 4096  # Captions tokenized at a time, to bound the memory.
REPORT_EVERY = 20.0  # Seconds between progress lines.
POLL_EVERY = 0.5  # Seconds between two looks at the units that others hold.


class UnitOfWork(NamedTuple):
    """A unit of work: padded length in tokens, captions and their real tokens."""

    length: int
    captions: list[str]
    tokens: int


class Plan(NamedTuple):
    """Units of work, and what is known before encoding."""

    units: list[UnitOfWork]
    unique: int
    tokens: int
    truncated: int


def plan_units(captions: Sequence[str], encoder: TextEncoder, unit_size: int) -> Plan:
    """Splits the distinct captions into units; the same ones whatever the order of `captions`."""
    unique = sorted(set(captions), key=store.caption_hash)
    groups: dict[int, list[tuple[str, int]]] = collections.defaultdict(list)
    truncated = 0
    for start in range(0, len(unique), CHUNK):
        chunk = unique[start : start + CHUNK]
        batch = encoder.tokenize(chunk)
        truncated += len(batch.truncated)
        for caption, count in zip(chunk, np.asarray(batch.mask).sum(axis=1).tolist(), strict=True):
            groups[min(-(-count // BUCKET) * BUCKET, encoder.max_len)].append((caption, count))
    units = []
    for length in sorted(groups):
        for start in range(0, len(groups[length]), unit_size):
            texts, counts = zip(*groups[length][start : start + unit_size], strict=True)
            units.append(UnitOfWork(length, list(texts), sum(counts)))
    return Plan(units, len(unique), sum(unit.tokens for unit in units), truncated)


def _describe(
    captions: Sequence[str], plan: Plan, encoder: TextEncoder, unit_size: int, dtype: str
) -> dict[str, int | float]:
    return {
        "captions": len(captions),
        "unique": plan.unique,
        "truncated": plan.truncated,
        "tokens": plan.tokens,
        "padded_tokens": unit_size * sum(unit.length for unit in plan.units),
        "units": len(plan.units),
        "bytes": sum(unit_file.bytes_of_rows(u.tokens, encoder.dim, dtype) for u in plan.units),
        "flops": unit_size * sum(encoder.flops(unit.length) for unit in plan.units),
    }


def estimate(
    captions: Sequence[str], encoder: TextEncoder, unit_size: int, dtype: str = "bfloat16"
) -> dict[str, int | float]:
    """What `embed` will do, before it does anything.

    Returns:
      captions, unique (distinct captions), truncated (captions), tokens, padded_tokens (that go
      through the encoder), units, bytes (of embeddings) and flops (of the encoder).
    """
    return _describe(captions, plan_units(captions, encoder, unit_size), encoder, unit_size, dtype)


def embed(
    captions: Sequence[str],
    encoder: TextEncoder,
    out: str,
    unit_size: int,
    log: Callable[[str], None] = print,
    *,
    dtype: str = "bfloat16",
    patience: float = 60.0,
) -> dict[str, int | float]:
    """Writes the embedding store of `captions`; finished units are kept.

    Args:
      captions: texts; repeated ones are encoded once.
      encoder: a frozen text encoder.
      out: folder of the store.
      unit_size: captions per unit, the batch of one call of the encoder.
      log: receives progress lines.
      dtype: of the stored numbers, bfloat16 or int8.
      patience: seconds of silence after which another worker takes over a unit.

    Returns:
      What `estimate` returns, and computed (units that this worker encoded).

    Raises:
      EmbeddingError: no captions, or the encoder gives NaN or infinite values.
    """
    if not captions:
        raise store.EmbeddingError("there are no captions to embed; check config.data")
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_units(captions, encoder, unit_size)
    if plan.truncated:
        log(f"{plan.truncated} captions are longer than {encoder.max_len} tokens and are cut")
    fingerprint = encoder.fingerprint()
    settings = {"unit_size": unit_size, "encoder": fingerprint}
    if dtype != "bfloat16":
        settings["dtype"] = dtype
    names = [store.unit_name(unit.captions, length=unit.length, **settings) for unit in plan.units]
    work = dict(zip(names, plan.units, strict=True))
    progress = _Progress(folder, work, log)

    def do(name: str) -> None:
        unit = work[name]
        rows = _encode_unit(encoder, unit.captions, unit.length, unit_size)
        store.write_unit(folder / name, unit.captions, rows, dtype)
        progress.add(unit)

    with Claims(folder, patience) as claims:
        _share(names, folder, claims, do, progress.wait)
    rows = [store.describe_unit(folder / name) for name in names]
    store.write_manifest(folder, rows, fingerprint)
    _clean_up(folder, names)
    report = _describe(captions, plan, encoder, unit_size, dtype)
    log(
        f"{out}: {plan.unique:,} distinct captions of {len(captions):,}, {plan.tokens:,} tokens, "
        f"{report['bytes'] / 1e6:,.1f} MB of {dtype} in {len(names)} units; {progress.summary()}"
    )
    return {**report, "computed": progress.units}


def _share(
    names: Sequence[str],
    folder: pathlib.Path,
    claims: Claims,
    do: Callable[[str], None],
    wait: Callable[[Sequence[str]], None],
) -> None:
    """Does what no other worker does, until all of `names` are in the folder."""
    # Workers begin at different units, so that they rarely meet.
    first = int.from_bytes(os.urandom(4), "little") % len(names)
    pending = [*names[first:], *names[:first]]
    while pending:
        for name in pending:
            if (folder / name).exists() or not claims.take(name):
                continue
            # Looked at again: it may have been finished just before it was claimed.
            if not (folder / name).exists():
                do(name)
            claims.release(name)
        pending = [name for name in pending if not (folder / name).exists()]
        if pending:
            wait(pending)


class _Progress:
    """What this worker did, how fast, and when all workers together will be done."""

    def __init__(
        self, folder: pathlib.Path, work: dict[str, UnitOfWork], log: Callable[[str], None]
    ):
        self._folder, self._work, self._log = folder, work, log
        self._started = self._reported = time.monotonic()
        self.units = self._captions = self._tokens = 0
        self._left_at_start = self._left()[1]

    def _left(self) -> tuple[int, int]:
        """Units and tokens that are not in the folder yet."""
        there = set(os.listdir(self._folder))
        missing = [unit for name, unit in self._work.items() if name not in there]
        return len(missing), sum(unit.tokens for unit in missing)

    def add(self, unit: UnitOfWork) -> None:
        """Counts a unit; prints a line now and then."""
        self.units += 1
        self._captions += len(unit.captions)
        self._tokens += unit.tokens
        now = time.monotonic()
        if now - self._reported < REPORT_EVERY:
            return
        self._reported = now
        units, tokens = self._left()
        rate = (self._left_at_start - tokens) / (now - self._started)
        self._log(
            f"{len(self._work) - units} of {len(self._work)} units, here {self._rates()}, "
            f"{tokens / max(rate, 1e-9):,.0f} s left"
        )

    def wait(self, pending: Sequence[str]) -> None:
        """Waits a moment for units that other workers hold."""
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self._log(f"waiting for {len(pending)} units of other workers, the first: {pending[0]}")
        time.sleep(POLL_EVERY)

    def summary(self) -> str:
        """This worker's part."""
        return f"here {self.units} units in {self._seconds():.1f} s, {self._rates()}"

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _rates(self) -> str:
        seconds = max(self._seconds(), 1e-9)
        return f"{self._captions / seconds:,.1f} captions/s, {self._tokens / seconds:,.0f} tokens/s"


def _clean_up(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Removes what killed workers left of units that are there: half files, claims."""
    done = set(names)
    for path in folder.glob(".unit_*.bin.*"):
        if path.name[1:].partition(".bin.")[0] + ".bin" in done:
            path.unlink(missing_ok=True)
    for path in folder.glob(f".{store.MANIFEST}.*.tmp"):
        path.unlink(missing_ok=True)


def _encode_unit(
    encoder: TextEncoder, captions: list[str], length: int, unit_size: int
) -> list[np.ndarray]:
    """Embeddings of the real tokens of each caption, float32."""
    batch = encoder.tokenize(captions)
    ids = np.zeros((unit_size, length), np.int32)
    mask = np.zeros((unit_size, length), bool)
    ids[: len(captions)] = np.asarray(batch.ids)[:, :length]
    mask[: len(captions)] = np.asarray(batch.mask)[:, :length]
    encoded = np.asarray(jax.device_get(encoder.encode(ids, mask)))
    rows = [row[m] for row, m in zip(encoded[: len(captions)], mask, strict=False)]
    if not all(np.isfinite(row).all() for row in rows):
        raise store.EmbeddingError("the text encoder gives NaN or infinite values")
    return rows
