"""The shapes world as TFDS data sets, with prompt files and text for `pretrain_text`.

`data/sources/tfds_build.py` writes them to disk. Examples keep their order: record i of a split is
`scenes.scene(split, i)`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from imagen_jax.io import images
from imagen_jax.worlds.shapes import scenes as shapes
from imagen_jax.worlds.shapes import words as shapes_words

PROMPT_SPLITS = ("seen_test", "held_out")
MAX_LINES = 20_000  # Of a text file.
RELATION_IMAGES = 12_000


class ShapesWorld(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes with captions: single objects, counts and relations, 64x64."""

    SIZE = shapes.IMAGE_SIZE
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    # Nothing is downloaded. TFDS's search for checksums would import importlib_resources, which
    # TFDS does not require.
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
            png = images.encode_png(shapes.render(scene, self.SIZE))
            row = json.dumps(shapes.prompt_row(scene))
            yield index, {"image": png, "caption": scene.caption, "row": row}

    def text_files(self) -> Mapping[str, Iterable[Any]]:
        """Prompts of the test splits, kinds in equal parts first, and text for `pretrain_text`."""
        prompts = {f"prompts_{split}.jsonl": _prompt_rows(split) for split in PROMPT_SPLITS}
        return _limited({**prompts, "paraphrases.jsonl": _world_groups()})


class ShapesWorld256(ShapesWorld):
    """The first scenes of every split again, 256x256: `shapes_world256`.

    A quarter of the scenes: training on crops sees thousands of crops of each image, and the
    images are written in a quarter of the time.
    """

    SIZE = 256

    def _count(self, split: str) -> int:
        return shapes.SPLITS[split] // 4

    def text_files(self) -> Mapping[str, Iterable[Any]]:
        """No text files: `shapes_world` has them."""
        return {}


class ShapesRelations(ShapesWorld):
    """Additional training scenes, all of two objects in a relation: `shapes_relations`.

    Relations need more training images than single objects; the rates of a mixture with
    `shapes_world` set their share. Captions name both sizes.
    """

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(shapes.MORE_RELATIONS)}

    def _count(self, split: str) -> int:
        del split
        return RELATION_IMAGES

    def text_files(self) -> Mapping[str, Iterable[Any]]:
        """No text files: `shapes_world` has them."""
        return {}


class ShapesWords(ShapesWorld):
    """Images of words of three letters: `shapes_words`."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in shapes_words.SPLITS}

    def _count(self, split: str) -> int:
        return shapes_words.SPLITS[split]

    def _scene(self, split: str, index: int) -> shapes.Scene:
        return shapes_words.scene(split, index)

    def text_files(self) -> Mapping[str, Iterable[Any]]:
        """Held-out prompts, and text of which every fourth line is about words."""
        held_out = range(shapes_words.SPLITS["held_out"])
        scenes = (shapes_words.scene("held_out", index) for index in held_out)
        numbers, world = range(shapes_words.SPLITS["train"]), _world_groups()
        words = (shapes_words.paraphrases("train", index) for index in numbers)
        mixed = itertools.chain.from_iterable(zip(world, world, world, words, strict=False))
        rows = map(shapes.prompt_row, scenes)
        return _limited({"prompts_words.jsonl": rows, "paraphrases_words.jsonl": mixed})


def _limited(files: Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Any]]:
    return {name: itertools.islice(values, MAX_LINES) for name, values in files.items()}


def _prompt_rows(split: str) -> Iterator[dict[str, Any]]:
    """Prompt rows of all scenes of a split, kinds interleaved."""
    scenes = [shapes.scene(split, index) for index in range(shapes.SPLITS[split])]
    by_kind = [[scene for scene in scenes if scene.kind == kind] for kind in shapes.KINDS]
    interleaved = itertools.chain(*itertools.zip_longest(*by_kind))
    return (shapes.prompt_row(scene) for scene in interleaved if scene)


def _world_groups() -> Iterator[tuple[str, ...]]:
    """Text about the first training scenes, for `pretrain_text`."""
    return (
        shapes.paraphrases("train", index, round_index)
        for index in range(shapes.SPLITS["train"])
        for round_index in range(shapes.PARAPHRASE_ROUNDS[shapes.scene("train", index).kind])
    )
