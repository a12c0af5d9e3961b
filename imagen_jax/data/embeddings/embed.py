"""`embed`: encodes every distinct caption once and stores the result (Imagen, Sec. 2.5).

Captions are grouped by token count rounded up to a multiple of 8 and sorted by hash; a unit of
`unit_size` captions of one group is encoded in one call of fixed shape and written as one file. The
bytes of a unit depend only on its captions, the encoder and the kind of device, so a killed run
resumes with the missing units. Any number of workers on any number of hosts may share the folder:
each claims a unit before encoding it (claims.py), and takes over the units of dead workers.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from imagen_jax.data.embeddings import packs, plan_file, remote, shared_plan, store, unit_file
from imagen_jax.data.embeddings.claims import BucketClaims, Claims
from imagen_jax.data.embeddings.plan_file import Part, Plan, UnitOfWork
from imagen_jax.data.embeddings.shared_plan import AnyCaptions
from imagen_jax.io import buckets, mirrors, paths
from imagen_jax.text.encoders import TextEncoder

BUCKET = 8  # Tokens; compiled lengths are its multiples.
CHUNK = 4096  # Captions tokenized at a time, which bounds memory.
REPORT_EVERY = 20.0  # Seconds between progress lines.
POLL_EVERY = 0.5  # Seconds between checks for units of other workers.


def write_plan(
    folder: pathlib.Path, captions: AnyCaptions, encoder: TextEncoder, unit_size: int
) -> None:
    """Writes the plan of the distinct captions; independent of the order of `captions`.

    Args:
      folder: an empty folder; see `plan_file.py`.
      captions: repeated ones are planned once.
      encoder: tokenizes.
      unit_size: captions per unit.
    """
    unique = sorted(set(captions), key=store.caption_hash)
    parts = [
        tokenized(unique[start : start + CHUNK], encoder) for start in range(0, len(unique), CHUNK)
    ]
    plan_file.write(folder, lambda: parts, unit_size)


def tokenized(captions: Sequence[str], encoder: TextEncoder) -> Part:
    """A part of a plan; `captions` are distinct and in ascending order of their hashes."""
    counts, truncated = [np.zeros(0, np.int32)], 0
    for start in range(0, len(captions), CHUNK):
        batch = encoder.tokenize(captions[start : start + CHUNK])
        truncated += len(batch.truncated)
        counts.append(np.asarray(batch.mask).sum(axis=1))
    tokens = np.concatenate(counts)
    lengths = np.minimum(-(-tokens // BUCKET) * BUCKET, encoder.max_len)
    return plan_file.make_part(captions, tokens, lengths, truncated)


def settings_of(encoder: TextEncoder, unit_size: int) -> dict[str, Any]:
    """What a plan and the names of the units depend on, beside the captions."""
    return {"unit_size": unit_size, "encoder": encoder.fingerprint()}


def _describe(
    captions: AnyCaptions, plan: Plan, encoder: TextEncoder, unit_size: int, dtype: str
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
    captions: AnyCaptions, encoder: TextEncoder, unit_size: int, dtype: str = "bfloat16"
) -> dict[str, int | float]:
    """Estimates the work of `embed` without encoding.

    Returns:
      captions, unique (distinct captions), truncated (captions), tokens, padded_tokens (inputs of
      the encoder), units, bytes (of embeddings) and flops (of the encoder).
    """
    with tempfile.TemporaryDirectory() as name:
        write_plan(pathlib.Path(name), captions, encoder, unit_size)
        plan = plan_file.read(pathlib.Path(name))
        return _describe(captions, plan, encoder, unit_size, dtype)


def embed(
    captions: AnyCaptions,
    encoder: TextEncoder,
    out: str,
    unit_size: int,
    log: Callable[[str], None] = print,
    *,
    dtype: str = "bfloat16",
    patience: float = 60.0,
) -> dict[str, int | float]:
    """Writes the embedding store of `captions`; skips units that exist.

    Args:
      captions: repeated ones are encoded once.
      encoder: a frozen text encoder.
      out: folder of the store, or address of one in a bucket.
      unit_size: captions per unit, the batch size of the encoder.
      log: called with progress lines.
      dtype: of the stored values, bfloat16 or int8.
      patience: seconds without a sign of life after which a unit is taken over.

    Returns:
      The result of `estimate`, and computed (units encoded by this worker).

    Raises:
      EmbeddingError: no captions, or the encoder returns NaN or infinite values.
      PathError: a path with a scheme other than gs:// and s3://.
      BucketError: a bucket cannot be read or written.
    """
    if not len(captions):
        raise store.EmbeddingError("there are no captions to embed; check config.data")
    in_bucket = buckets.is_address(out)
    folder = mirrors.folder(out) if in_bucket else paths.local(out, "config.data.embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    own_claims = BucketClaims if in_bucket else Claims
    fingerprint = encoder.fingerprint()
    settings = settings_of(encoder, unit_size)
    plan = shared_plan.get(
        folder,
        captions,
        settings,
        make=lambda path: write_plan(path, captions, encoder, unit_size),
        patience=patience,
    )
    if plan.truncated:
        log(f"{plan.truncated} captions are longer than {encoder.max_len} tokens and are cut")
    if dtype != "bfloat16":
        settings["dtype"] = dtype
    names = [
        unit_file.unit_name_of(unit.hashes.tobytes(), length=unit.length, **settings)
        for unit in plan.units
    ]
    work = dict(zip(names, plan.units, strict=True))
    progress = _Progress(folder, work, log)

    def encode(name: str) -> None:
        unit = work[name]
        texts = list(unit.captions)
        rows = _encode_unit(encoder, texts, unit.length, unit_size)
        store.write_unit(folder / name, texts, rows, dtype)
        if in_bucket:
            remote.publish_unit(folder / name)
        progress.add(unit)

    plan_hash = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
    if in_bucket or len(names) <= packs.MAX_LOOSE:
        finished = remote.RemoteFinished(folder) if in_bucket else packs.Finished(folder)
        with own_claims(folder, patience) as claims:
            _share(names, finished, claims, encode, progress.wait)
        _complete(folder, names, fingerprint, in_bucket=in_bucket)
    elif store.plan_of(folder) != plan_hash:
        with Claims(folder, patience) as claims:
            _share(names, packs.Finished(folder), claims, encode, progress.wait)
            while store.plan_of(folder) != plan_hash:
                if claims.take(store.MANIFEST):
                    store.write_packed(folder, names, fingerprint=fingerprint, plan=plan_hash)
                    claims.release(store.MANIFEST)
                else:
                    time.sleep(POLL_EVERY)
    _clean_up(folder, names)
    report = _describe(captions, plan, encoder, unit_size, dtype)
    log(
        f"{out}: {plan.unique:,} distinct captions of {len(captions):,}, {plan.tokens:,} tokens, "
        f"{report['bytes'] / 1e6:,.1f} MB of {dtype} in {len(names)} units; {progress.summary()}"
    )
    return {**report, "computed": progress.units}


def _complete(
    folder: pathlib.Path, names: Sequence[str], fingerprint: dict, *, in_bucket: bool
) -> None:
    """Writes the tables and the manifest of a store whose units are files of their own."""
    if in_bucket:
        remote.fetch_heads(folder, names)
    rows = [store.describe_unit(folder / name) for name in names]
    store.write_manifest(folder, rows, fingerprint)
    if in_bucket:
        store.publish_tables(folder)


def _share(
    names: Sequence[str],
    finished: packs.Finished,
    claims: Claims,
    encode: Callable[[str], None],
    wait: Callable[[Sequence[str]], None],
) -> None:
    """Encodes the units that no other worker claims, until all `names` are finished."""
    # Workers start at random units, so they rarely compete for one.
    first = int.from_bytes(os.urandom(4), "little") % len(names)
    pending = [*names[first:], *names[:first]]
    while pending:
        for name in pending:
            if name in finished or not claims.take(name):
                continue
            # Checked again: another worker may have finished or packed it just before the claim.
            if not finished.check(name):
                encode(name)
            claims.release(name)
        finished.refresh()
        pending = [name for name in pending if name not in finished]
        if pending:
            wait(pending)


class _Progress:
    """Counts the units of this worker; reports throughput and remaining time of all workers."""

    def __init__(
        self, folder: pathlib.Path, work: dict[str, UnitOfWork], log: Callable[[str], None]
    ):
        self._folder, self._work, self._log = folder, work, log
        self._started = self._reported = time.monotonic()
        self.units = self._captions = self._tokens = 0
        self._left_at_start = self._left()[1]

    def _left(self) -> tuple[int, int]:
        """Number of units missing in the folder, and their tokens."""
        written, finished = set(os.listdir(self._folder)), packs.Finished(self._folder)
        missing = [
            unit
            for name, unit in self._work.items()
            if name not in written and name not in finished.packed
        ]
        return len(missing), sum(unit.tokens for unit in missing)

    def add(self, unit: UnitOfWork) -> None:
        """Counts a unit; logs a line every `REPORT_EVERY` seconds."""
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
        """Sleeps `POLL_EVERY` seconds while other workers hold the pending units."""
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self._log(f"waiting for {len(pending)} units of other workers, the first: {pending[0]}")
        time.sleep(POLL_EVERY)

    def summary(self) -> str:
        """Units, seconds and throughput of this worker."""
        return f"here {self.units} units in {self._seconds():.1f} s, {self._rates()}"

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _rates(self) -> str:
        seconds = max(self._seconds(), 1e-9)
        return f"{self._captions / seconds:,.1f} captions/s, {self._tokens / seconds:,.0f} tokens/s"


def _clean_up(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Removes temporary files and claims of killed workers for units that exist."""
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
        raise store.EmbeddingError("the text encoder returns NaN or infinite values")
    return rows
