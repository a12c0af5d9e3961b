"""The kinds of source by name, and opening the source that a configuration names.

A new kind is a reader such as folder.py (`records.Reader`) and a row of SOURCES; outside the
package, `package.module:Reader` or an entry point (`config.plugins`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from imagen_jax.config import plugins
from imagen_jax.config.data import DataConfig, SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index import scan
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.sources.folder import Folder
from imagen_jax.data.sources.mixture import Mixture
from imagen_jax.data.sources.parquet import ParquetReader
from imagen_jax.data.sources.records import Reader
from imagen_jax.data.sources.remote_folder import RemoteFolder
from imagen_jax.data.sources.synthetic import Synthetic
from imagen_jax.data.sources.tfds_files import open_tfds, parse_name
from imagen_jax.data.sources.tfrecord import TFRecords
from imagen_jax.data.sources.webdataset import WebDatasetReader
from imagen_jax.io import buckets, mirrors, paths

Log = Callable[[str], None]

SOURCES: dict[str, Callable[[SourceConfig], Reader]] = {
    "folder": Folder,
    "parquet": ParquetReader,
    "synthetic": Synthetic,
    "tfds": open_tfds,
    "tfrecord": TFRecords,
    "webdataset": WebDatasetReader,
}


def open_source(
    data: DataConfig, log: Log = print, *, fresh: bool = False, share: scan.Share | None = None
) -> IndexedSource | Mixture:
    """Opens the images and captions that a configuration names; builds a missing index.

    Args:
      data: a source, or a mixture of several.
      log: called with one line when records are rejected or have notes.
      fresh: list the objects of a bucket again.
      share: see `scan.cached_index`.

    Raises:
      ConfigError: no data, damaged files, or a share of rejected records above `max_quarantined`.
      PathError: a path with a scheme other than gs:// and s3://.
      BucketError: a bucket cannot be read.
    """
    if not data.mixture:
        return open_one(data, "config.data", log, fresh=fresh, share=share)
    parts = {
        name: open_one(source, f"config.data.mixture.{name}", log, fresh=fresh, share=share)
        for name, source in data.sources().items()
    }
    return Mixture(parts, {name: source.rate for name, source in data.mixture.items()})


def open_one(
    source: SourceConfig,
    field: str = "config.data",
    log: Log = print,
    *,
    fresh: bool = False,
    share: scan.Share | None = None,
) -> IndexedSource:
    """Opens one source; `field`: its name in error messages, the others as of `open_source`."""
    make_reader = plugins.find(f"{field}.kind", source.kind, plugins.SOURCES, SOURCES)
    if not source.path and make_reader is not Synthetic:
        raise ConfigError(f"{field}.path is empty; give the {source.kind} data's folder")
    if buckets.is_address(source.path):
        address = source.path.rstrip("/")
        if source.kind == "tfds":
            address = buckets.join(address, parse_name(source.name).folder)
        path = str(mirrors.files(address, fresh=fresh))
        make_reader = RemoteFolder if make_reader is Folder else make_reader
    else:
        path = str(paths.local(source.path, f"{field}.path")) if source.path else ""
    try:
        reader = make_reader(dataclasses.replace(source, path=path))
        located = dataclasses.replace(source, path=path)
        table, report, report_file = scan.cached_index(reader, located, make_reader, log, share)
    except ConfigError as error:
        # Readers do not know the name of their source in a mixture; they write config.data.
        text = str(error).replace("config.data.", f"{field}.")
        raise type(error)(text.replace(path, source.path) if path else text) from error
    if report.rejected or report.noted or report.ignored:
        log(f"{source.path}: {report.summary()} (all in {report_file})")
    report.check(source.max_quarantined, field)
    return IndexedSource(
        table=table,
        reader=reader,
        report=report,
        log=log,
        max_broken=source.max_quarantined,
        window=source.shuffle == "window",
        weights=source.captions,
    )
