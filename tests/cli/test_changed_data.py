"""A folder that changed since a run: `train` says what changed; --allow_changes goes on."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import changed_data, main
from imagen_jax.config import overrides
from imagen_jax.config.data import ComponentConfig, DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config, TrainConfig
from imagen_jax.data.embeddings import store
from imagen_jax.data.index import changes
from imagen_jax.data.sources import registry
from tests.conftest import DIM


def write(path, seed: int, caption: str) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(caption)


def embed(folder, captions) -> None:
    rows = [np.full((3, DIM), 0.5, ml_dtypes.bfloat16) for _ in captions]
    unit = folder / store.unit_name(captions, encoder="fake")
    store.write_unit(unit, captions, rows)
    store.write_manifest(folder, [store.describe_unit(unit)], {"encoder": "fake", "max_len": 4})


@pytest.mark.slow
def test_train_says_what_changed_and_goes_on_when_asked(tmp_path, base_config, write_world, capsys):
    config = write_world(tmp_path, base_config, steps=2, every=2)
    images, run = tmp_path / "images", tmp_path / "run"
    command = ["train", f"--config={config}", f"--workdir={run}"]
    assert main.main(command) == 0
    write(images / "12.png", 12, "a new image")
    write(images / "13.png", 13, "another new image")
    (images / "3.txt").write_text("a corrected caption")
    (images / "5.png").unlink()
    capsys.readouterr()

    said = "2 images added, 1 removed, 0 replaced, 1 with other captions"
    assert main.main(command) == 1
    error = capsys.readouterr().err
    assert said in error and f"since step 2 of {run}" in error
    allowed = ["--allow_changes=data.fingerprint,train.steps", "--config.train.steps=4"]
    assert all(flag in error for flag in allowed)

    # Allowed, but the new captions are not embedded yet.
    assert main.main([*command, *allowed]) == 1
    captured = capsys.readouterr()
    assert said in captured.out and "lacks 3 captions" in captured.err
    captions = [f"image {i}" for i in range(12)]
    captions += ["a new image", "another new image", "a corrected caption"]
    embed(tmp_path / "embeddings", captions)
    # Without further steps nothing would be learned of the new captions.
    assert main.main([*command, allowed[0]]) == 1
    assert "--config.train.steps=4" in capsys.readouterr().err
    assert main.main([*command, *allowed]) == 0
    captured = capsys.readouterr()
    assert said in captured.out and "going on from step 2" in captured.out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps[-1] == 4
    assert main.main([*command, allowed[1]]) == 0  # The data are the same now.

    # A third time: images are removed, another caption is corrected.
    (images / "0.png").unlink()
    (images / "13.png").unlink()
    (images / "4.txt").write_text("a caption corrected later")
    said = "0 images added, 2 removed, 0 replaced, 1 with other captions"
    later = ["--config.train.steps=6"]
    assert main.main([*command, *later]) == 1
    assert said in capsys.readouterr().err
    assert main.main([*command, *later, allowed[0]]) == 1
    assert "lacks 1 captions" in capsys.readouterr().err
    embed(tmp_path / "embeddings", [*captions, "a caption corrected later"])
    assert main.main([*command, *later, allowed[0]]) == 0
    assert "going on from step 4" in capsys.readouterr().out
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    for i in range(4):
        write(path / f"{i}.png", i, f"caption {i}")
    return path


def test_changes_are_counted_per_image(folder):
    data = DataConfig(kind="folder", path=str(folder))
    first = registry.open_source(data)
    assert changes.since(first, first.fingerprint) == changes.Changes()
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    (folder / "1.txt").write_text("other")
    (folder / "2.png").rename(folder / "4.png")
    (folder / "2.txt").rename(folder / "4.txt")
    now = registry.open_source(data)
    assert changes.since(now, first.fingerprint) == changes.Changes(1, 1, 1, 1)
    assert changes.since(now, "0123456789abcdef") is None


def test_a_change_is_refused_until_it_is_allowed(folder, monkeypatch, tmp_path):
    first = registry.open_source(DataConfig(kind="folder", path=str(folder)))
    config = Config(data=DataConfig(kind="folder", path=str(folder)), train=TrainConfig(steps=9))
    data = dataclasses.replace(config.data, records=first.fingerprint)
    saved = dataclasses.replace(config, data=data)
    monkeypatch.setattr(changed_data, "_newest", lambda workdir, config: (5, saved))
    log = []
    changed_data.check(config, first, "runs/a", [], log.append)
    write(folder / "4.png", 4, "new")
    now = registry.open_source(config.data)
    with pytest.raises(ConfigError, match="1 images added.*--allow_changes=data.fingerprint; or"):
        changed_data.check(config, now, "runs/a", ["data.path"], log.append)
    assert not log
    for allowed in ("data", "data.fingerprint"):
        changed_data.check(config, now, "runs/a", [allowed], log.append)
    assert len(log) == 2 and "the data changed since step 5 of runs/a: 1 images added" in log[0]
    done = dataclasses.replace(config, train=TrainConfig(steps=5))
    with pytest.raises(ConfigError, match="train.steps --config.train.steps=10"):
        changed_data.check(done, now, "runs/a", ["data", "train"], log.append)


def test_changes_of_a_mixture_are_summed(folder):
    values = {"kind": "folder", "path": str(folder), "rate": 1.0}
    data = DataConfig(mixture={name: ComponentConfig(**values) for name in ("a", "b")})
    first = registry.open_source(data)
    (folder / "1.txt").write_text("other")
    now = registry.open_source(data)
    assert changes.since(now, first.fingerprint) == changes.Changes(captions=2)
    assert changes.since(now, first.fingerprint.split("+")[0]) is None


@pytest.mark.slow
def test_a_run_that_read_captions_by_line_names_the_field(
    tmp_path, base_config, write_world, capsys
):
    config = write_world(tmp_path, base_config, steps=2, every=2)
    (tmp_path / "images" / "0.txt").write_text("image 0\nimage 1")
    run = tmp_path / "run"
    command = ["train", f"--config={config}", f"--workdir={run}"]
    assert main.main([*command, "--config.data.caption_lines=true"]) == 0
    saved = run / "checkpoints" / "2" / "config" / "metadata"
    values = json.loads(saved.read_text())
    del values["data"]["caption_lines"], values["data"]["records"]  # As saved before.
    saved.write_text(json.dumps(values))
    embed(tmp_path / "embeddings", [*(f"image {i}" for i in range(12)), "image 0\nimage 1"])
    capsys.readouterr()
    assert main.main(command) == 1
    assert "add --config.data.caption_lines=true" in capsys.readouterr().err
    assert main.main([*command, "--config.data.caption_lines=true"]) == 0


def test_saved_configurations_keep_captions_by_line():
    values = json.loads(overrides.to_json(Config()))
    assert values["data"].pop("caption_lines") is False
    component = {"kind": "folder", "path": "x", "rate": 1.0}
    values["data"]["mixture"] = {"own": component}
    loaded = overrides.from_json(json.dumps(values))
    assert loaded.data.caption_lines and loaded.data.mixture["own"].caption_lines
    again = overrides.from_json(overrides.to_json(Config()))
    assert not again.data.caption_lines
    with pytest.raises(ConfigError):
        overrides.from_json('{"data": {"caption_line": true}}')
