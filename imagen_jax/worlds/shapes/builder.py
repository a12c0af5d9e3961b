"""The shapes world as a TFDS data set, and the one command that puts any TFDS data set on disk.

`prepare` is the start of the data flow: what it writes (TFRecord files and, for the shapes world,
prompt files for `sample`) is all that the later steps read. Examples keep their order, so that
record i of a split is `shapes.scene(split, i)`.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from imagen_jax.config.fields import ConfigError
from imagen_jax.io import atomic, images
from imagen_jax.worlds.shapes import scenes as shapes
from imagen_jax.worlds.shapes import words as shapes_words

PROMPT_SPLITS = ("seen_test", "held_out")
CORPUS_LINES = 20_000  # Lines of paraphrases.jsonl.
RELATION_IMAGES = 12_000


class ShapesWorld(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes with captions: single objects, counts and relations, 64x64."""

    SIZE = shapes.PICTURE
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    # There is nothing to download; looking for checksums, TFDS would import a package
    # (importlib_resources) that it does not require.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.SIZE
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(doc="One English sentence."),
                    "row": tfds.features.Text(doc="The prompt row (JSON), see shapes.prompt_row."),
                }
            ),
            supervised_keys=("caption", "image"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in shapes.SPLITS}

    def _count(self, split: str) -> int:
        return shapes.SPLITS[split]

    def _scene(self, split: str, index: int) -> shapes.Scene:
        return shapes.scene(split, index)

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(self._count(split)):
            scene = self._scene(split, index)
            png = images.encode_png(shapes.draw(scene, self.SIZE))
            row = json.dumps(shapes.prompt_row(scene))
            yield index, {"image": png, "caption": scene.caption, "row": row}


class ShapesWorld256(ShapesWorld):
    """The first scenes of every split again, 256x256: `shapes_world256`.

    A stage that learns from crops has thousands of each picture; a quarter of the scenes is drawn
    in a quarter of the time.
    """

    SIZE = 256

    def _count(self, split: str) -> int:
        return shapes.SPLITS[split] // 4


class ShapesRelations(ShapesWorld):
    """More scenes to train on, all of two objects in a relation: `shapes_relations`.

    Two different objects and who is where take more pictures to learn than what is alone; a mixture
    with `shapes_world` has the share of them that its rates say. Captions name both sizes.
    """

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(shapes.MORE_RELATIONS)}

    def _count(self, split: str) -> int:
        del split
        return RELATION_IMAGES


class ShapesWords(ShapesWorld):
    """Pictures of words of three letters: `shapes_words`."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in shapes_words.SPLITS}

    def _count(self, split: str) -> int:
        return shapes_words.SPLITS[split]

    def _scene(self, split: str, index: int) -> shapes.Scene:
        return shapes_words.scene(split, index)


def prepare(data_dir: str, name: str) -> None:
    """Writes a TFDS data set to disk; what is there already is kept.

    Args:
      data_dir: folder for the files; for the shapes world also `prompts_seen_test.jsonl` and
        `prompts_held_out.jsonl`, whose first N rows hold the kinds of prompt in equal parts, and
        `paraphrases.jsonl`, text for `pretrain_text`; for its words `prompts_words.jsonl`, held-out
        ones, and `paraphrases_words.jsonl`, every fourth line of words, the others of the world.
      name: registered name of a builder, e.g. shapes_world.

    Raises:
      ConfigError: no builder of that name.
    """
    tfds.disable_progress_bar()
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"config.data.name={name!r} is no TFDS data set; try shapes_world, "
            "or import the module that defines the builder"
        ) from error
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        file_format=tfds.core.FileFormat.TFRECORD,
    )
    for file, values in _TEXTS.get(name, dict)().items():
        lines = (json.dumps(value) + "\n" for value in itertools.islice(values, CORPUS_LINES))
        atomic.write_text(pathlib.Path(data_dir) / file, "".join(lines))


def _world_texts() -> dict[str, Iterable[Any]]:
    """Files of prompts and of text for `pretrain_text`, by name, a value for every line."""
    prompts = {f"prompts_{split}.jsonl": _prompt_rows(split) for split in PROMPT_SPLITS}
    return {**prompts, "paraphrases.jsonl": _world_groups()}


def _words_texts() -> dict[str, Iterable[Any]]:
    """The same of `shapes_words`."""
    held_out = range(shapes_words.SPLITS["held_out"])
    scenes = (shapes_words.scene("held_out", index) for index in held_out)
    numbers, world = range(shapes_words.SPLITS["train"]), _world_groups()
    words = (shapes_words.paraphrases("train", index) for index in numbers)
    mixed = itertools.chain.from_iterable(zip(world, world, world, words, strict=False))
    rows = map(shapes.prompt_row, scenes)
    return {"prompts_words.jsonl": rows, "paraphrases_words.jsonl": mixed}


_TEXTS = {ShapesWorld.name: _world_texts, ShapesWords.name: _words_texts}


def _prompt_rows(split: str) -> Iterator[dict[str, Any]]:
    """Of all scenes of a split, the kinds in turns."""
    scenes = [shapes.scene(split, index) for index in range(shapes.SPLITS[split])]
    by_kind = [[scene for scene in scenes if scene.kind == kind] for kind in shapes.KINDS]
    taken_in_turns = itertools.chain(*itertools.zip_longest(*by_kind))
    return (shapes.prompt_row(scene) for scene in taken_in_turns if scene)


def _world_groups() -> Iterator[tuple[str, ...]]:
    """Text about the first training scenes, for `pretrain_text`."""
    return (
        shapes.paraphrases("train", index, turn)
        for index in range(shapes.SPLITS["train"])
        for turn in range(shapes.PARAPHRASE_ROUNDS[shapes.scene("train", index).kind])
    )
