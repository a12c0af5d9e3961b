"""Any source of captioned pictures as random access: record i is one read.

An index pass over the source (scan.py), done once and cached beside it, notes where every usable
record lies and which ones are not usable (the quarantine). From then on the order of the data is
arithmetic on positions (order.py). A new kind of source is a reader such as folder.py and a row of
SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.config.data import DataConfig, SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches.order import permute
from imagen_jax.data.index import scan
from imagen_jax.data.index.table import Table
from imagen_jax.data.sources.folder import Folder
from imagen_jax.data.sources.mixture import Mixture
from imagen_jax.data.sources.parquet import Tables
from imagen_jax.data.sources.records import Decode, Quarantine, Reader, Record
from imagen_jax.data.sources.tfds_files import open_tfds
from imagen_jax.data.sources.tfrecord import TFRecords
from imagen_jax.data.sources.webdataset import WebDatasetReader
from imagen_jax.io import images

Log = Callable[[str], None]

SOURCES: dict[str, Callable[[SourceConfig], Reader]] = {
    "folder": Folder,
    "parquet": Tables,
    "tfds": open_tfds,
    "tfrecord": TFRecords,
    "webdataset": WebDatasetReader,
}


class Source:
    """Random access to captioned pictures.

    Attributes:
      fingerprint: hash of all keys, sizes and captions, 16 hex digits.
      report: the records that are not used; grows if one fails to decode later.
    """

    def __init__(
        self, *, table: Table, reader: Reader, report: Quarantine, log: Log = print
    ) -> None:
        """Wraps the result of an index pass.

        Args:
          table: the usable records.
          reader: gives the encoded picture of one.
          report: the records that are not usable.
          log: receives a line for each record that turns out damaged later.
        """
        self._table = table
        self._reader = reader
        self._log = log
        self._broken: set[int] = set()
        self.report = report
        self.fingerprint = table.fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i; no picture is decoded."""
        return self._table.captions(i)

    def hashes(self) -> np.ndarray:
        """Hashes of the captions of all records, as the embedding store has them."""
        return self._table.hashes()

    def order(self, g: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " k"]:
        """The records that are examples g of a run: a new shuffled order in every epoch."""
        n = len(self)
        return permute(g % n, g // n, n=n, seed=seed)

    def about(self) -> dict[str, Any]:
        """What decides, beside the seed, which record an example is."""
        return {"examples": len(self), "source": self.fingerprint}

    def record(self, i: int, decode: Decode = images.decode) -> Record:
        """Record i, or the next one that decodes if it has been damaged since the index pass.

        The rule is fixed, so that positions never shift; the damaged one is named in the report.

        Args:
          i: 0..len - 1.
          decode: makes pixels of an encoded picture, all of them or those that are wanted.

        Raises:
          ConfigError: no record at all decodes.
        """
        for offset in range(len(self)):
            at = (i + offset) % len(self)
            if at in self._broken:
                continue
            key = self._table.key(at)
            try:
                data = self._reader.read(key, self._table.place(at))
                if len(data) != self._table.size(at):
                    raise images.ImageError("changed since the index was made")
                return Record(key, decode(data), self._table.captions(at))
            except (images.ImageError, OSError) as error:
                self._broken.add(at)
                self.report.add(key, str(error))
                self._log(f"{key}: {error}; the next record is used in its place")
        raise ConfigError("config.data.path: no record can be decoded any more")


def open_source(data: DataConfig, log: Log = print) -> Source | Mixture:
    """Opens the pictures and captions that a configuration names; indexes them the first time.

    Args:
      data: a source, or a mixture of them.
      log: receives a line when records are quarantined.

    Raises:
      ConfigError: nothing there, damaged files, or a share of unusable records above
        `max_quarantined`.
    """
    if not data.mixture:
        return _open(data, "config.data", log)
    parts = {
        name: _open(source, f"config.data.mixture.{name}", log)
        for name, source in data.sources().items()
    }
    return Mixture(parts, {name: source.rate for name, source in data.mixture.items()})


def _open(source: SourceConfig, field: str, log: Log) -> Source:
    if not source.path:
        raise ConfigError(f"{field}.path is empty; give the {source.kind} data's folder")
    try:
        reader = SOURCES[source.kind](source)
        table, report, report_file = scan.cached_index(reader, source)
    except ConfigError as error:
        # Readers know no mixtures and speak of config.data.
        raise type(error)(str(error).replace("config.data.", f"{field}.")) from error
    if report.rejected or report.noted:
        log(f"{source.path}: {report.summary()} (all in {report_file})")
    report.check(source.max_quarantined, field)
    return Source(table=table, reader=reader, report=report, log=log)
