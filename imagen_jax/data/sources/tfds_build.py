"""Writes a TFDS data set to disk: the only module of `data/` that imports TFDS.

A builder is found by its TFDS name, as an entry point of `plugins.TFDS_BUILDERS`, or as
`package.module:ClassName`. Its class may have a method `text_files() -> Mapping[str, Iterable]`:
file name -> JSON values, one per line, for example prompts for `sample` or a corpus for
`pretrain_text`. It may have a method `folders() -> Mapping[str, Iterable[tuple[str, bytes]]]`:
folder name -> file names and contents, for example images beside the data. `prepare` writes these
files to the data_dir.
"""

from __future__ import annotations

import difflib
import json
import pathlib
import re

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from imagen_jax.config import plugins
from imagen_jax.config.fields import ConfigError
from imagen_jax.io import atomic


def prepare(data_dir: str, name: str) -> None:
    """Builds a data set as TFRecord files, and its text files; an existing data set stays.

    Args:
      data_dir: folder of the data sets.
      name: BUILDER or BUILDER/CONFIG.

    Raises:
      ConfigError: no builder of that name.
    """
    tfds.disable_progress_bar()
    builder = _builder(data_dir, name)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        file_format=tfds.core.FileFormat.TFRECORD,
    )
    text_files = getattr(builder, "text_files", dict)
    for file, values in text_files().items():
        lines = (json.dumps(value) + "\n" for value in values)
        atomic.write_text(pathlib.Path(data_dir) / file, "".join(lines))
    for folder, contents in getattr(builder, "folders", dict)().items():
        with atomic.folder(pathlib.Path(data_dir) / folder) as temporary:
            for file, content in contents:
                (temporary / file).write_bytes(content)


def _builder(data_dir: str, name: str) -> tfds.core.DatasetBuilder:
    base, _, config = name.partition("/")
    if plugins.is_path(base) or base in plugins.names(plugins.TFDS_BUILDERS):
        cls = plugins.find("config.data.name", base, plugins.TFDS_BUILDERS, {})
        if not (isinstance(cls, type) and issubclass(cls, tfds.core.DatasetBuilder)):
            raise ConfigError(f"config.data.name={name!r}: {cls!r} is not a TFDS builder class")
        folder = base
        if plugins.is_path(base):
            folder = naming.camelcase_to_snakecase(re.split(r"[:.]", base)[-1])
        if cls.name != folder:
            raise ConfigError(
                f"config.data.name={name!r}: the builder writes to the folder {cls.name!r}, "
                f"expected {folder!r}; remove the class's own `name`, or rename the entry point"
            )
        return cls(data_dir=data_dir, config=config or None)
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:  # pyright: ignore[reportAttributeAccessIssue]
        known = [
            *plugins.names(plugins.TFDS_BUILDERS),
            *tfds.list_builders(with_community_datasets=False),
        ]
        near = difflib.get_close_matches(base, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"config.data.name={name!r} is no TFDS data set, no entry point of the group "
            f"{plugins.TFDS_BUILDERS!r} and not package.module:ClassName{hint}"
        ) from error
