"""Sources and their index: broken files are reported; TFRecords read as by TFDS."""

import json
import os
import pathlib
import shutil
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.sources import registry, tfds_files, tfrecord
from imagen_jax.worlds.shapes import scenes as shapes


def write_image(path: pathlib.Path, size: int = 16, caption: str | None = "a caption", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def folder_config(path: pathlib.Path, **options) -> DataConfig:
    return DataConfig(kind="folder", path=str(path), **{"max_quarantined": 0.9, **options})


@pytest.fixture
def zoo(tmp_path):
    """Good and bad files, one of each kind."""
    write_image(tmp_path / "good.png")
    write_image(tmp_path / "кошка.png", caption="кошка на окне\n\n a cat \n")
    (tmp_path / "deep").mkdir()
    write_image(tmp_path / "deep" / "good.webp")
    write_image(tmp_path / "png_inside.jpg", format="png")
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(tmp_path / "deep16.png")
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("cmyk", "deep16", "moving"):
        (tmp_path / f"{name}.txt").write_text(f"a {name} picture")

    write_image(tmp_path / "cut.jpg", size=64)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "photo.heic").write_bytes(b"something")
    (tmp_path / "photo.psd").write_bytes(b"something")
    write_image(tmp_path / "dot.png", size=1)
    write_image(tmp_path / "small.png", size=12)
    write_image(tmp_path / "silent.png", caption=None)
    write_image(tmp_path / "blank.png", caption="  \n ")
    (tmp_path / "deep" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "deep" / "metadata.jsonl").write_text(
        '{"file_name": "lost.png", "text": "x"}\nnot json\n'
    )
    return tmp_path


def test_good_files_are_kept_and_bad_ones_listed(zoo):
    lines = []
    config = folder_config(zoo, min_size=14, caption_lines=True)
    source = registry.open_source(config, log=lines.append)
    records = {r.key: r for r in map(source.record, range(len(source)))}
    names = "cmyk.jpg deep/good.webp deep16.png good.png moving.gif png_inside.jpg кошка.png"
    assert list(records) == names.split()
    assert records["кошка.png"].captions == ("кошка на окне", "a cat")
    assert (records["deep16.png"].image == 255).all()
    assert (records["moving.gif"].image == [255, 0, 0]).all()

    expected = {
        "cut.jpg": "unreadable",
        "zero.png": "unreadable (empty)",
        "page.jpg": "wrong type (not an image)",
        "photo.heic": "wrong type (not an image)",
        "photo.psd": "wrong type (.psd)",
        "dot.png": "too small",
        "small.png": "too small (12 px",
        "silent.png": "no caption",
        "blank.png": "empty caption",
        "deep/again": "symlink loop",
        "self.png": "symlink loop",
        "gone.png": "unreadable",
        "deep/metadata.jsonl:1": "missing file (deep/lost.png)",
        "deep/metadata.jsonl:2": "bad row (not JSON",
    }
    reasons = dict(source.report.rejected)
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reasons[name].startswith(reason), (name, reasons[name])
    assert len(lines) == 1 and "14 of 21" in lines[0] and "3 unreadable" in lines[0]

    written = json.loads((zoo / ".imagen_index" / "quarantine.json").read_text("utf-8"))
    assert {row["name"]: row["reason"] for row in written["records"]} == reasons
    assert written["total"] == 21


def test_an_image_of_one_pixel_is_rejected_without_a_limit(zoo):
    source = registry.open_source(folder_config(zoo), log=lambda line: None)
    assert "small.png" not in dict(source.report.rejected)
    assert "dot.png" in dict(source.report.rejected)


def test_too_many_bad_files_stop_the_run(zoo):
    with pytest.raises(ConfigError) as error:
        registry.open_source(folder_config(zoo, max_quarantined=0.05), log=lambda line: None)
    message = str(error.value)
    assert "max_quarantined=0.05" in message and "61.9%" in message and "13 of 21" in message
    assert "cut.jpg" in message or "blank.png" in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["", "/no/such/folder"])
def test_a_wrong_folder_is_named(path):
    with pytest.raises(ConfigError, match="config.data.path"):
        registry.open_source(DataConfig(kind="folder", path=path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no images"):
        registry.open_source(folder_config(tmp_path))


def test_metadata_of_the_imagefolder_layout(tmp_path):
    (tmp_path / "train").mkdir()
    for name in "abc":
        write_image(tmp_path / "train" / f"{name}.png", caption=None)
    rows = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "b.png", "caption": ["two", " ", "three"]},
        {"file_name": "./c.png", "text": "four"},
        {"file_name": "c.png", "text": "five"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "train" / "metadata.jsonl").write_text(lines)
    source = registry.open_source(folder_config(tmp_path))
    captions = [source.captions(i) for i in range(3)]
    assert captions == [("one",), ("two", "three"), ("four", "five")]


def test_the_index_is_cached_until_a_file_or_a_limit_changes(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    first = registry.open_source(folder_config(tmp_path))
    with monkeypatch.context() as blocked:
        blocked.setattr(registry.scan, "_build_index", None)
        again = registry.open_source(folder_config(tmp_path))
    assert again.fingerprint == first.fingerprint
    assert again.record(1).captions == first.record(1).captions

    os.utime(tmp_path / "a.txt", (1, 1))
    (tmp_path / "a.txt").write_text("another caption")
    changed = registry.open_source(folder_config(tmp_path))
    assert changed.captions(0) == ("another caption",)
    assert changed.fingerprint != first.fingerprint
    with pytest.raises(ConfigError, match="too small"):
        registry.open_source(folder_config(tmp_path, min_size=17))


def test_the_index_of_a_read_only_folder_is_in_the_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    write_image(data / "a.png")
    (data / ".imagen_index").write_text("a file where the folder would be")
    assert len(registry.open_source(folder_config(data))) == 1
    assert len(list((tmp_path / "cache").rglob("index_*"))) == 1


def test_a_record_damaged_after_indexing_is_replaced_and_logged(tmp_path):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", caption=f"caption {name}")
    source = registry.open_source(folder_config(tmp_path))
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").unlink()
    assert [source.record(i).key for i in range(3)] == ["a.png"] * 3
    assert source.record(1).captions == ("caption a",)
    assert [name for name, _ in source.report.rejected] == ["b.png", "c.png"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data set of 7 images in three TFRecord files, and the examples that TFDS reads."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)

    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "caption": tfds.features.Text(),
        "number": tfds.features.Scalar(np.int64),
        "texts": tfds.features.Sequence(tfds.features.Text()),
    }
    folder = root / "tiny_world" / "1.2.0"
    folder.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="tiny_world", version="1.2.0", data_dir=str(folder), module_name="tiny_world"
        ),
        features=tfds.features.FeaturesDict(features),
    )
    examples = [
        {
            "image": image,
            "caption": f"число {i}" * (40 if i == 3 else 1),
            "number": i,
            "texts": [f"text {i}.{k}" for k in range(1 + i % 2)],
        }
        for i, image in enumerate(pixels)
    ]
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=3)
    writer.initialize_splits(["train"])
    writer.add_examples({"train": examples})
    writer.close_all()
    read = tfds.builder_from_directory(folder).as_dataset(split="train")
    return root, list(tfds.as_numpy(read))


def tfds_config(root: pathlib.Path, **options) -> DataConfig:
    return DataConfig(kind="tfds", path=str(root), **{"name": "tiny_world", **options})


def test_tfrecords_read_as_tfds_reads_them(prepared):
    root, truth = prepared
    source = registry.open_source(tfds_config(root))
    assert len(source) == len(truth) == 7
    for record, row in zip(map(source.record, range(7)), truth, strict=True):
        np.testing.assert_array_equal(record.image, row["image"])
        assert record.captions == (row["caption"].decode(),)
    again = registry.open_source(tfds_config(root, name="tiny_world:1.2.0"))
    assert again.fingerprint == source.fingerprint


def test_all_captions_of_a_record_are_kept(prepared):
    root, truth = prepared
    source = registry.open_source(tfds_config(root, caption_key="texts"))
    for i, row in enumerate(truth):
        assert source.captions(i) == tuple(text.decode() for text in row["texts"])


def test_default_file_names_and_the_newest_version(prepared, tmp_path):
    root, truth = prepared
    for version in ("1.2.0", "1.10.0"):
        copy = tmp_path / "tiny_world" / version
        shutil.copytree(root / "tiny_world" / "1.2.0", copy)
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info = (copy / "dataset_info.json").read_text()
        info = info.replace("{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}", template)
        (copy / "dataset_info.json").write_text(info)
        for path in copy.glob("*.tfrecord-*"):
            path.rename(f"{path}-of-00003")
    config = tfds_config(tmp_path)
    assert tfds_files.find(config).name == "1.10.0"
    np.testing.assert_array_equal(registry.open_source(config).record(6).image, truth[6]["image"])
    (tmp_path / "tiny_world" / "1.10.0" / "tiny_world-train.tfrecord-00001-of-00003").unlink()
    with pytest.raises(ConfigError, match="00001-of-00003 is missing"):
        registry.open_source(config)


def test_tfds_errors(prepared):
    root, _ = prepared
    with pytest.raises(ConfigError, match="config.data.split='tran'.*did you mean 'train'"):
        registry.open_source(tfds_config(root, split="tran"))
    with pytest.raises(ConfigError, match="config.data.caption_key='captio'.*did you mean 'captio"):
        registry.open_source(tfds_config(root, caption_key="captio"))


def test_tfds_images_are_rejected_by_their_header(prepared):
    root, _ = prepared
    with pytest.raises(ConfigError, match="tiny_world-train.tfrecord-00000__0: too small"):
        registry.open_source(tfds_config(root, min_size=20), log=lambda line: None)


def test_a_truncated_tfrecord_is_refused(prepared, tmp_path):
    path = next(prepared[0].glob("tiny_world/1.2.0/*.tfrecord-00000*"))
    whole = path.read_bytes()
    copy = tmp_path / path.name
    for cut in (1, 5, len(whole) // 2):
        copy.write_bytes(whole[:-cut])
        with pytest.raises(ConfigError, match="truncated or damaged at byte"):
            list(tfrecord.read_frames(copy))
    first = 16 + struct.unpack("<Q", whole[:8])[0]
    copy.write_bytes(whole[:first])
    with pytest.raises(ConfigError, match="holds 1 records, expected 3"):
        list(tfrecord.TFRecords(tfds_config(tmp_path), {copy: 3}).scan())


def test_a_missing_data_set_is_built(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(shapes, "SPLITS", dict.fromkeys(shapes.SPLITS, 5))
    config = tfds_config(tmp_path, name="shapes_world", split="held_out")
    source = registry.open_source(config)
    scenes = [shapes.scene("held_out", i) for i in range(5)]
    assert [source.captions(i) for i in range(5)] == [(scene.caption,) for scene in scenes]
    for i, scene in enumerate(scenes):
        np.testing.assert_array_equal(source.record(i).image, shapes.render(scene))


def test_without_tensorflow_the_error_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "imagen_jax.data.sources.tfds_build", raising=False)
    monkeypatch.delattr("imagen_jax.data.sources.tfds_build", raising=False)
    with pytest.raises(ConfigError, match="tensorflow_datasets.*install tensorflow"):
        registry.open_source(tfds_config(tmp_path))
