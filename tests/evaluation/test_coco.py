"""From TFDS's mocked `coco_captions` to a trained stage: prepare, pretrain_text, embed, train.

The mock makes examples but no files. Here they go through TFDS's own writer and COCO's own features
into the files that the real data set consists of, which are then read like it.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.overrides import load
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import images

tfds = pytest.importorskip("tensorflow_datasets")
COUNT = 12
TINY = [
    "train.steps=3",
    "train.log_every=1",
    "model.channels=(16,16)",
    "data.batch_size=4",
    "data.min_size=0",
    "data.max_quarantined=0.5",
    "mesh.cpu_devices=1",
    "pretrain_text.steps=2",
    "pretrain_text.emb_dim=16",
    "pretrain_text.mlp_dim=16",
    "pretrain_text.num_layers=1",
    "embed.unit_size=512",
]


def write_mocked(
    data_dir: pathlib.Path,
    file_format: str,
    *,
    splits: dict[str, slice] | None = None,
    smallest: int = 0,
) -> list[dict]:
    """Mocked examples as prepared files; returns them.

    Args:
      data_dir: where the data set's folder is made.
      file_format: tfrecord or array_record.
      splits: which examples are in which split; None: all in `train`.
      smallest: images with a shorter side are omitted, pixels.
    """
    splits = splits or {"train": slice(None)}
    with tfds.testing.mock_data(num_examples=COUNT):
        builder = tfds.builder("coco_captions")
        examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
        features, version = builder.info.features, str(builder.version)
    examples = [e for e in examples if min(e["image"].shape[:2]) >= smallest]
    folder = data_dir / "coco_captions" / "2014" / version
    folder.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="coco_captions",
            config_name="2014",
            version=version,
            data_dir=str(folder),
            module_name="coco_captions",
        ),
        features=features,
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=5, file_format=file_format)
    writer.initialize_splits(list(splits))
    for example in examples:
        # The mock samples the length of each list separately; real ones are equal.
        for name in ("captions", "objects"):
            length = min(map(len, example[name].values()))
            example[name] = {key: value[:length] for key, value in example[name].items()}
        boxes = example["objects"]["bbox"]
        example["objects"]["bbox"] = [tfds.features.BBox(*sorted(box.tolist())) for box in boxes]
    writer.add_examples({name: examples[part] for name, part in splits.items()})
    writer.close_all()
    return examples


@pytest.fixture(scope="module")
def mocked(tmp_path_factory):
    """(data_dir, the examples as TFDS's mock gives them)."""
    data_dir = tmp_path_factory.mktemp("coco")
    return data_dir, write_mocked(data_dir, "tfrecord")


def overrides(data_dir: pathlib.Path, run_dir: pathlib.Path) -> list[str]:
    paths = [f"data.path={data_dir}", f"data.embeddings={run_dir}/embeddings"]
    return [*TINY, *paths, f"text.path={run_dir}/text"]


def assert_same_records(source, examples) -> None:
    """The records are the examples with images that are not tiny, with their captions and sizes."""
    large = [e for e in examples if min(e["image"].shape[:2]) >= 8]
    assert len(source) == len(large) > COUNT / 2
    for i, example in enumerate(large):
        texts = [text.decode().strip() for text in example["captions"]["text"]]
        assert source.captions(i) == tuple(text for text in texts if text)
        assert source.record(i).image.shape == example["image"].shape


def test_images_equal_those_of_tfds(mocked, tmp_path):
    data_dir, examples = mocked
    source = open_source(load("configs/coco.py:base", overrides(data_dir, tmp_path)).data)
    assert_same_records(source, examples)
    folder = next(data_dir.glob("coco_captions/2014/*"))
    rows = tfds.builder_from_directory(folder).as_dataset(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    decoded = [images.decode(row["image"]) for row in tfds.as_numpy(rows)]
    for i, image in enumerate(p for p in decoded if min(p.shape[:2]) >= 8):
        np.testing.assert_array_equal(source.record(i).image, image)


@pytest.mark.slow
def test_from_mocked_coco_to_a_trained_stage(mocked, tmp_path, capsys):
    fields = overrides(mocked[0], tmp_path)
    flags = ["--config=configs/coco.py:base", *(f"--config.{field}" for field in fields)]
    assert main.main(["prepare", *flags]) == 0
    assert main.main(["pretrain_text", *flags, f"--out={tmp_path}/text"]) == 0
    assert main.main(["embed", *flags]) == 0
    assert main.main(["train", *flags, f"--workdir={tmp_path}/run"]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(json.loads(row)["loss"]) for row in rows)
    assert main.main(["doctor", *flags, f"--workdir={tmp_path}/run"]) == 0
    out = capsys.readouterr().out
    assert "step 3 can be read" in out


def test_array_record_files_give_the_same_records(mocked, tmp_path):
    pytest.importorskip("array_record")
    examples = write_mocked(tmp_path, "array_record")
    fields = overrides(tmp_path, tmp_path)
    data = load("configs/coco.py:base", fields).data
    source = open_source(data, log=lambda line: None)
    assert_same_records(source, examples)
    config = load("configs/coco.py:base", overrides(mocked[0], tmp_path))
    other = open_source(config.data, log=lambda line: None)
    for i in range(len(source)):
        np.testing.assert_array_equal(source.record(i).image, other.record(i).image)


def test_a_builder_with_several_configurations_needs_a_name(mocked, tmp_path):
    for name in ("2014", "2017"):
        shutil.copytree(mocked[0] / "coco_captions" / "2014", tmp_path / "coco_captions" / name)
    data = load("configs/coco.py:base", overrides(mocked[0], tmp_path)).data
    unnamed = dataclasses.replace(data, name="coco_captions")
    assert len(open_source(unnamed, log=lambda line: None)) > 0
    with pytest.raises(ConfigError, match="coco_captions/2014, coco_captions/2017"):
        open_source(dataclasses.replace(unnamed, path=str(tmp_path)))
