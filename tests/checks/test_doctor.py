"""doctor: a healthy run has no failure; each planted fault is found, with its fix."""

import dataclasses
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.checks import doctor as doctor_lib
from imagen_jax.checks.doctor import doctor
from imagen_jax.cli import main
from imagen_jax.config.overrides import load
from imagen_jax.config.schema import Config, MeshConfig
from imagen_jax.data.embeddings import store
from imagen_jax.stages.network import init_params
from imagen_jax.text.vocabulary import TokenBatch

FINGERPRINT = {"encoder": "fake", "max_len": 4}


@pytest.fixture
def healthy(write_world, base_config, tmp_path) -> Config:
    """A configuration with images and embeddings; the file is `tiny.py` beside them."""
    return load(str(write_world(tmp_path, base_config, steps=2, every=1)))


def found(config: Config, workdir=None) -> dict[str, dict[str, list[str]]]:
    """Texts by check and status."""
    table: dict[str, dict[str, list[str]]] = {}
    for status, name, text in doctor(config, workdir and str(workdir), log=lambda line: None):
        table.setdefault(name, {}).setdefault(status, []).append(text)
    return table


def only_failure(table: dict[str, dict[str, list[str]]]) -> tuple[str, str]:
    """Name and text of the one failed finding."""
    failures = [(n, t) for n, texts in table.items() for t in texts.get("failed", ())]
    assert len(failures) == 1, failures
    return failures[0]


def with_data(config: Config, **fields) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def write_store(config: Config, change=lambda rows: rows, fingerprint=FINGERPRINT) -> None:
    """Embeds the captions anew, with changed vectors."""
    folder = pathlib.Path(config.data.embeddings)
    shutil.rmtree(folder)
    folder.mkdir()
    captions = [f"image {i}" for i in range(12)]
    rng = np.random.default_rng(0)
    rows = change([rng.normal(size=(3, 8)).astype(ml_dtypes.bfloat16) for _ in captions])
    unit = folder / store.unit_name(captions)
    store.write_unit(unit, captions, rows)
    store.write_manifest(folder, [store.describe_unit(unit)], fingerprint)


def repaint(config: Config, paint) -> None:
    for path in pathlib.Path(config.data.path).glob("*.png"):
        pixels = paint(np.asarray(Image.open(path)))
        Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def trained(write_world, base_config, tmp_path_factory) -> pathlib.Path:
    """Folder of a world with `tiny.py` and a run of two steps in `run`; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    write_world(root, base_config, steps=2, every=1)
    assert main.main(["train", f"--config={root}/tiny.py", f"--workdir={root}/run"]) == 0
    return root


def test_a_healthy_run(trained, capsys):
    before = sorted((trained / "run").rglob("*"))
    assert main.main(["doctor", f"--config={trained}/tiny.py", f"--workdir={trained}/run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted((trained / "run").rglob("*")) == before, "doctor changes nothing"
    assert {line.split()[0] for line in lines} == {"ok", "warning"}
    assert [line for line in lines if line.startswith("warning")] == [
        "warning  text         no encoder given, any embeddings are used; set --config.text.path"
    ]
    text = "\n".join(lines)
    for part in ("12 usable", "levels", "12 distinct", "mask agrees", "step 2 can be read", "free"):
        assert part in text, part


def test_failures_are_counted_and_give_status_one(healthy, tmp_path, capsys):
    flags = [f"--config={tmp_path}/tiny.py", f"--config.data.path={tmp_path}/nothing"]
    assert main.main(["doctor", *flags]) == 1
    captured = capsys.readouterr()
    assert "failed   images       config.data.path=" in captured.out
    assert "failed   captions     not checked, because the images" in captured.out
    assert captured.err.startswith("imagen doctor: 4 of") and captured.err.count("\n") == 1


def test_a_batch_or_mesh_that_does_not_fit(healthy):
    config = dataclasses.replace(healthy, mesh=MeshConfig(fsdp=3))
    name, text = only_failure(found(config))
    assert name == "devices" and "config.mesh" in text


def test_images_that_broke_since_the_index(healthy, monkeypatch):
    found(healthy)
    for path in sorted(pathlib.Path(healthy.data.path).glob("*.png"))[:3]:
        status = path.stat()
        path.write_bytes(b"?" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    name, text = only_failure(found(healthy))
    assert name == "images" and "no longer decode" in text and "repair or remove" in text


@pytest.mark.parametrize(
    ("paint", "status", "says"),
    [
        (lambda p: p > 127, "failed", "multiply by 255"),
        (lambda p: p * 0 + 77, "failed", "of one colour; check image_key"),
        (lambda p: p // 3, "warning", "half of the range is unused"),
        (lambda p: p // 3 + 150, "warning", "half of the range is unused"),
    ],
)
def test_values_that_use_no_range(healthy, paint, status, says):
    repaint(healthy, paint)
    texts = found(healthy)["images"].get(status, [])
    assert any(says in text for text in texts), texts


def test_some_images_of_one_colour_and_small_ones(healthy):
    path = pathlib.Path(healthy.data.path) / "3.png"
    Image.new("RGB", (8, 8), "grey").save(path)
    table = found(with_data(healthy, image_size=16))
    texts = table["images"]["warning"]
    assert any("of one colour; remove them if they are placeholders" in text for text in texts)
    assert any("min_size=16" in text for text in texts)


def test_many_quarantined_images_are_a_warning_and_more_a_failure(healthy):
    folder = pathlib.Path(healthy.data.path)
    for i in range(4):
        (folder / f"silent_{i}.png").write_bytes((folder / "1.png").read_bytes())
    table = found(with_data(healthy, max_quarantined=0.4))
    assert "4 of 16 not; `imagen prepare` lists them" in table["images"]["warning"][0]
    assert any("4 images have none" in text for text in table["captions"]["warning"])
    table = found(with_data(healthy, max_quarantined=0.1))
    assert "max_quarantined" in table["images"]["failed"][0]


def test_one_caption_for_all(healthy):
    for path in pathlib.Path(healthy.data.path).glob("*.txt"):
        path.write_text("image 1")
    name, text = only_failure(found(healthy))
    assert name == "captions" and "1 distinct" in text and "caption_key" in text


def test_captions_of_left_and_right_are_counted(healthy):
    (pathlib.Path(healthy.data.path) / "0.txt").write_text("left of a picture")
    texts = found(with_data(healthy, flip=True))["captions"]["ok"]
    assert any("8.3% mention left or right" in text for text in texts)


def test_embeddings_that_are_not_there_or_incomplete(healthy):
    table = found(with_data(healthy, embeddings=""))
    assert "run `imagen embed`" in table["embeddings"]["failed"][0]
    (pathlib.Path(healthy.data.path) / "0.txt").write_text("a caption nobody embedded")
    text = found(healthy)["embeddings"]["failed"][0]
    assert "'a caption nobody embedded'; run `imagen embed`" in text


def test_embeddings_of_another_width(healthy):
    model = dataclasses.replace(healthy.model, text_dim=16)
    table = found(dataclasses.replace(healthy, model=model))
    assert "width 8, but config.model.text_dim=16" in table["embeddings"]["failed"][0]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_tokens_without_vectors(healthy, value):
    def spoil(rows):
        rows[5][1] = value
        return rows

    write_store(healthy, spoil)
    name, text = only_failure(found(healthy))
    assert name == "embeddings" and "zero or infinite vectors" in text


def test_captions_that_fill_the_length(healthy):
    texts = found(with_data(healthy, max_text_len=3))["embeddings"]["warning"]
    assert "fill all 3 tokens" in texts[0] and "max_text_len" in texts[0]


class Letters:
    """An encoder with one token per letter and the methods that doctor calls."""

    dim, max_len = 8, 4

    def fingerprint(self):
        return FINGERPRINT

    def token_count(self, caption):
        return len(caption)

    def tokenize(self, captions):
        ids = np.array([[ord(letter) for letter in text[: self.max_len]] for text in captions])
        return TokenBatch(ids.astype(np.int32), ids > 0, ())

    def encode(self, ids, mask):
        raise AssertionError("doctor encodes nothing")

    def flops(self, length):
        return 0.0


def test_captions_that_are_encoded_while_training(with_encoder):
    config, _ = with_encoder
    text = dataclasses.replace(config.text, on_the_fly=True)
    config = with_data(dataclasses.replace(config, text=text), embeddings="")
    table = found(config)
    assert "none stored" in table["embeddings"]["ok"][0]
    assert "text_ids [4, 4]" in table["batch"]["ok"][0]


@pytest.fixture
def with_encoder(healthy, monkeypatch):
    """(configuration with an encoder, that encoder)."""
    encoder = Letters()
    monkeypatch.setattr(doctor_lib, "load_text_encoder", lambda config, mesh: encoder)
    text = dataclasses.replace(healthy.text, path="letters")
    return dataclasses.replace(healthy, text=text), encoder


def test_another_encoder_and_masks_that_are_not_its_own(with_encoder):
    config, encoder = with_encoder
    table = found(config)
    assert "token counts differ from the encoder's" in table["embeddings"]["failed"][0]
    assert "100.0% of" in table["text"]["warning"][0] and "max_len" in table["text"]["warning"][0]
    write_store(config, lambda rows: [np.concatenate([row, row[:1]]) for row in rows])
    assert "failed" not in found(config)["embeddings"]
    write_store(config, fingerprint={"encoder": "another", "max_len": 4})
    assert "was made by another encoder" in found(config)["embeddings"]["failed"][0]


def test_an_encoder_that_is_not_there(healthy, tmp_path):
    text = dataclasses.replace(healthy.text, path=str(tmp_path / "no_t5"))
    table = found(dataclasses.replace(healthy, text=text))
    assert "no_t5" in table["text"]["failed"][0]
    (tmp_path / "no_t5").mkdir()
    (tmp_path / "no_t5" / "config.json").write_text("{}")
    table = found(dataclasses.replace(healthy, text=text))
    assert "no_t5" in table["text"]["failed"][0]


def test_a_workdir_that_cannot_be_made(healthy, tmp_path):
    (tmp_path / "file").write_text("")
    name, text = only_failure(found(healthy, tmp_path / "file" / "run"))
    assert name == "workdir" and "cannot be written" in text and "--workdir" in text
    assert "failed" not in found(healthy, tmp_path / "new")["workdir"]
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small(healthy, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage
    for free, status in ((1000, "failed"), (500_000, "warning")):
        monkeypatch.setattr(doctor_lib.shutil, "disk_usage", lambda p, f=free: usage(f, 0, f))
        texts = found(healthy, tmp_path / "run")["workdir"][status]
        assert "GB free" in texts[0] and "checkpoint.keep" in texts[0]


def test_the_room_needed_is_that_of_the_state(healthy):
    """Parameters, their average and Adam's two moments, in float32, for `keep` saves and one."""
    model = dataclasses.replace(healthy.model, text_dim=8)
    context = doctor_lib.CheckContext(
        dataclasses.replace(healthy, model=model), None, np.random.default_rng(0)
    )
    shapes = jax.eval_shape(lambda: init_params(context.config, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 0 <= doctor_lib._state_bytes(context) - 4 * 4 * count < 100
    assert doctor_lib._saves(healthy) == 4
    often = dataclasses.replace(healthy.checkpoint, keep_every=1, keep_best=3)
    assert doctor_lib._saves(dataclasses.replace(healthy, checkpoint=often)) == 4 + 3 + 2


def test_a_damaged_checkpoint_and_a_changed_configuration(trained, tmp_path):
    config = load(f"{trained}/tiny.py")
    texts = found(dataclasses.replace(config, seed=1), trained / "run")["checkpoint"]["failed"]
    assert any("config.seed=1" in text and "--allow_changes=seed" in text for text in texts)
    shutil.copytree(trained / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    name, text = only_failure(found(config, tmp_path / "run"))
    assert name == "checkpoint" and "cannot be read" in text
    assert not (tmp_path / "run" / "checkpoints" / "2.broken").exists()
