"""Emoji as the TFDS data set `emoji`, with prompt files and a folder of all images.

`data/sources/tfds_build.py` writes them to disk. Beside the data set:

- `prompts_train.jsonl`: the training captions in an order given by a hash;
- `prompts_combinations_{dev,test}.jsonl`: captions of the held-out images;
- `prompts_names_{dev,test}.jsonl`: other names of training emoji, see `other_names`;
- `gallery/`: a PNG file of every emoji, held-out ones included, with `metadata.jsonl` (file_name,
  text and the metadata of a prompt row). It is a captioned folder like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from imagen_jax.worlds.emoji import catalogue, other_names, rendering, shorter, splits
from imagen_jax.worlds.emoji.attribution import ATTRIBUTION

# Of a prompt by the split of its emoji; those of other names have `other_names.OtherName.kind`.
KINDS = {"train": "train", "combinations_dev": "combination", "combinations_test": "combination"}


class Emoji(tfds.core.GeneratorBasedBuilder):
    """OpenMoji's colour emoji with Unicode's English names, 64x64 on white."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {
        "1.0.0": "First release: OpenMoji 17.0.0.",
        "1.1.0": "Shorter captions.",
    }
    url_infos = None  # Nothing is downloaded.

    def _info(self) -> tfds.core.DatasetInfo:
        size = rendering.SIZE
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(doc="The name of the emoji."),
                    "short": tfds.features.Sequence(
                        tfds.features.Text(), doc="The caption in fewer words, see shorter."
                    ),
                    "row": tfds.features.Text(doc="The prompt row (JSON), see prompt_row."),
                }
            ),
            supervised_keys=("caption", "image"),
            disable_shuffling=True,
            homepage="https://openmoji.org",
            license=ATTRIBUTION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in splits.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        short = shorter.shorter({e.key: e.caption for e in catalogue.entries() if not e.tone})
        chosen = (entry for entry in catalogue.entries() if entry.split == split)
        for index, entry in enumerate(chosen):
            yield (
                index,
                {
                    "image": rendering.png(entry.key),
                    "caption": entry.caption,
                    "short": short.get(entry.key, ()),
                    "row": json.dumps(prompt_row(entry)),
                },
            )

    def text_files(self) -> Mapping[str, Iterable[Any]]:
        """Prompts of the splits, each in an order given by a hash."""
        images = {f"prompts_{split}.jsonl": image_prompts(split) for split in splits.SPLITS}
        names = {f"prompts_{split}.jsonl": name_prompts(split) for split in splits.NAMES_SPLITS}
        return {**images, **names}

    def folders(self) -> Mapping[str, Iterable[tuple[str, bytes]]]:
        """The captioned folder of all images."""
        return {"gallery": _gallery()}


def prompt_row(entry: catalogue.Entry) -> dict[str, Any]:
    """Fields of a prompt.

    Args:
      entry: the emoji.

    Returns:
      `prompt`, the caption, with `key`, `untoned`, `group`, `subgroup`, `tone`, `person` of the
      emoji (see `catalogue.Entry`), `kind` (of KINDS) and `new_word` (see `other_names`). Of
      another name, `untoned` is what the right images share: it says nothing about the tone.
    """
    return {
        "prompt": entry.caption,
        "key": entry.key,
        "untoned": entry.untoned,
        "kind": KINDS[entry.split],
        "group": entry.group,
        "subgroup": entry.subgroup,
        "tone": entry.tone,
        "person": entry.person,
        "new_word": False,
    }


def image_prompts(split: str) -> list[dict[str, Any]]:
    """Prompt rows of a split of the images."""
    return _in_hash_order(prompt_row(e) for e in catalogue.entries() if e.split == split)


def name_prompts(split: str) -> list[dict[str, Any]]:
    """Prompt rows of a split of the other names."""
    training = {entry.key: entry for entry in catalogue.entries() if entry.split == "train"}
    rows = []
    for name in other_names.usable({key: entry.caption for key, entry in training.items()}):
        if splits.names_split(name.key) == split:
            more = {"prompt": name.name, "kind": name.kind, "new_word": name.new_word}
            rows.append({**prompt_row(training[name.key]), **more})
    return _in_hash_order(rows)


def _in_hash_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: splits.share("order", f"{row['key']}|{row['prompt']}"))


def _gallery() -> Iterator[tuple[str, bytes]]:
    lines = []
    for entry in catalogue.entries():
        yield f"{entry.key}.png", rendering.png(entry.key)
        row = prompt_row(entry)
        del row["new_word"]
        lines.append({"file_name": f"{entry.key}.png", "text": row.pop("prompt"), **row})
    yield "ATTRIBUTION.txt", ATTRIBUTION.encode()
    yield "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()
