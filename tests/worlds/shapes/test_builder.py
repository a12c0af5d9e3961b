"""Records on disk equal the scenes of the world, in order."""

import collections
import json

import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.worlds.shapes import scenes as shapes
from imagen_jax.worlds.shapes import words

tfds = pytest.importorskip("tensorflow_datasets")
shapes_builder = pytest.importorskip("imagen_jax.worlds.shapes.builder")
tfds_build = pytest.importorskip("imagen_jax.data.sources.tfds_build")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 40, "seen_test": 9, "held_out": 9})
        tfds_build.prepare(str(folder), "shapes_world")
    return folder


def test_records_are_the_scenes_in_order(data_dir):
    builder = tfds.builder("shapes_world", data_dir=str(data_dir))
    assert {name: info.num_examples for name, info in builder.info.splits.items()} == {
        "train": 40,
        "seen_test": 9,
        "held_out": 9,
    }
    for split in builder.info.splits:
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        for index, example in enumerate(examples):
            scene = shapes.scene(split, index)
            np.testing.assert_array_equal(example["image"], shapes.render(scene))
            assert example["caption"].decode() == scene.caption
            assert json.loads(example["row"]) == shapes.prompt_row(scene)


def test_files_are_tfrecords(data_dir):
    files = [path.name for path in (data_dir / "shapes_world" / "1.0.0").iterdir()]
    assert any("train.tfrecord" in name for name in files)


@pytest.mark.parametrize("split", ["seen_test", "held_out"])
def test_prompt_files_hold_the_whole_split_with_kinds_in_turns(data_dir, split):
    lines = (data_dir / f"prompts_{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    scenes = [shapes.scene(split, index) for index in range(9)]
    assert sorted(row["prompt"] for row in rows) == sorted(scene.caption for scene in scenes)
    kinds = collections.Counter(scene.kind for scene in scenes)
    turns = 3 * min(kinds[kind] for kind in shapes.KINDS)
    head = collections.Counter(row["kind"] for row in rows[:turns])
    assert turns == 0 or set(head.values()) == {turns // 3}
    assert not list(data_dir.glob("*.tmp"))


def test_preparing_again_changes_nothing(data_dir):
    files = sorted((data_dir / "shapes_world").rglob("*.tfrecord*"))
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 40, "seen_test": 9, "held_out": 9})
        tfds_build.prepare(str(data_dir), "shapes_world")
    assert before == [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]


def test_the_large_world_is_the_first_scenes_again(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 9, "seen_test": 4, "held_out": 4})
        tfds_build.prepare(str(tmp_path), "shapes_world256")
        records = tfds.builder("shapes_world256", data_dir=str(tmp_path)).as_dataset(split="train")
    examples = list(tfds.as_numpy(records))
    assert len(examples) == 2
    for index, example in enumerate(examples):
        scene = shapes.scene("train", index)
        np.testing.assert_array_equal(example["image"], shapes.render(scene, 256))
        assert example["caption"].decode() == scene.caption


def test_more_relations_are_other_scenes_of_seen_combinations(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_builder, "RELATION_IMAGES", 30)
    tfds_build.prepare(str(tmp_path), "shapes_relations")
    builder = tfds.builder("shapes_relations", data_dir=str(tmp_path))
    assert list(builder.info.splits) == ["train"]
    captions = [e["caption"].decode() for e in tfds.as_numpy(builder.as_dataset(split="train"))]
    scenes = [shapes.scene("relations", index) for index in range(30)]
    assert captions == [scene.caption for scene in scenes]
    assert {scene.kind for scene in scenes} == {"relation"}
    assert all(scene.sizes_named for scene in scenes)
    assert not any(map(shapes.is_held_out, scenes))
    trained_on = {shapes.scene("train", index).caption for index in range(30)}
    assert len(set(captions) - trained_on) > 25


def test_words_are_held_out_of_images_and_text(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "SPLITS", {"train": 30, "held_out": 6})
    tfds_build.prepare(str(tmp_path), "shapes_words")
    builder = tfds.builder("shapes_words", data_dir=str(tmp_path))
    captions = {
        split: [e["caption"].decode() for e in tfds.as_numpy(builder.as_dataset(split=split))]
        for split in builder.info.splits
    }
    for split, number in words.SPLITS.items():
        scenes = [words.scene(split, index) for index in range(number)]
        assert captions[split] == [scene.caption for scene in scenes]
    lines = (tmp_path / "prompts_words.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == captions["held_out"]
    corpus = (tmp_path / "paraphrases_words.jsonl").read_text().splitlines()
    firsts = [json.loads(line)[0] for line in corpus]
    assert firsts[3::4] == captions["train"] and firsts[0] == shapes.scene("train", 0).caption
    assert len(firsts) == 120


def test_unknown_names_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="config.data.name='shapes_wrld'"):
        tfds_build.prepare(str(tmp_path), "shapes_wrld")
