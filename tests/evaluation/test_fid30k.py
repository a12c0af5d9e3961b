"""`evaluate fid` and `evaluate fid30k`: caption selection, errors, cards, resuming.

Inception has random weights: the tests cover the bookkeeping of a card, not the quality of images.
"""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.config import overrides
from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config
from imagen_jax.evaluation.features import fid, fid30k, frechet
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import weights
from imagen_jax.io import images
from tests.reference import fid_inception

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A folder of 9 images with one to three captions each."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for i in range(9):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("\n".join(f"caption {k} of {i}" for k in range(i % 3 + 1)))
    return folder


def test_captions_are_selected_by_the_documented_rule(captioned, monkeypatch):
    with pytest.raises(EvaluationError, match="--count=49: 49 images give no FID; at least 50"):
        fid30k.select_captions(fid30k.open_data(str(captioned)), 49, seed=3)
    monkeypatch.setattr(fid, "LEAST_IMAGES", 2)
    (source,) = sources = fid30k.open_data(str(captioned))
    rows = fid30k.select_captions(sources, 6, seed=3)
    digests = {i: hashlib.sha256(f"3/{i}".encode()).digest() for i in range(9)}
    assert [row["picture"] for row in rows] == sorted(digests, key=digests.get)[:6]
    for row in rows:
        number, i = map(int, re.findall(r"\d", row["prompt"]))
        assert i == row["picture"] and number == int.from_bytes(digests[i][-8:], "big") % (
            i % 3 + 1
        )
    # A longer list begins with a shorter one; another seed gives another.
    assert fid30k.select_captions([source], 9, seed=3)[:6] == rows
    assert fid30k.select_captions(sources, 6, seed=4) != rows
    joined = "".join(row["prompt"] + "\n" for row in rows)
    assert fid30k.captions_sha256(rows) == hashlib.sha256(joined.encode()).hexdigest()
    with pytest.raises(EvaluationError, match="9 usable images, --count=10"):
        fid30k.select_captions(sources, 10, seed=0)


def test_a_folder_of_other_captions_is_rejected(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "LEAST_IMAGES", 2)
    sources = fid30k.open_data(str(captioned))
    fid30k.write_captions(fid30k.select_captions(sources, 4, 0), tmp_path)
    fid30k.write_captions(fid30k.select_captions(sources, 4, 0), tmp_path)
    with pytest.raises(EvaluationError, match="other captions"):
        fid30k.write_captions(fid30k.select_captions(sources, 5, 0), tmp_path)


def test_reference_images_are_centred_squares_of_the_sample_size(captioned):
    real = fid30k.load_images(fid30k.open_data(str(captioned)), 16)
    assert real.count == 9
    whole = images.decode((captioned / "2.png").read_bytes())
    square = Image.fromarray(whole[:, 4:26]).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(real.load(2), np.asarray(square))
    of_folder, size = fid.load_images(str(captioned), 16)
    assert (of_folder.count, size) == (9, 16)
    np.testing.assert_array_equal(of_folder.load(2), np.asarray(square))
    assert fid.load_images(str(captioned))[1] == 20


def test_stages_trained_on_coco_are_not_zero_shot():
    coco = DataConfig(kind="tfds", name="coco_captions/2014")
    assert fid30k.trained_on_coco(Config(data=coco))
    assert fid30k.trained_on_coco(Config(data=DataConfig(kind="folder", path="data/COCO_train")))
    assert not fid30k.trained_on_coco(Config())


def test_statistics_of_other_settings_are_rejected(tmp_path):
    about = {"filter": "bicubic", "inception_sha256": "a", "size": 64}
    gaussian = frechet.Statistics.of(np.random.default_rng(0).normal(size=(9, 3))).gaussian()
    path = tmp_path / "r.npz"
    frechet.save(path, gaussian, {**about, "reference_sha256": "b", "reference_images": 9})
    read = fid.read_reference(str(path), about)
    assert (read.about["reference_sha256"], read.about["reference_images"]) == ("b", 9)
    for field, other in (("filter", "tf"), ("inception_sha256", "c"), ("size", 32)):
        with pytest.raises(EvaluationError, match=f"made with {field}={about[field]}, not {other}"):
            fid.read_reference(str(path), {**about, field: other})
    # Of others nothing is known: the card names the file by its hash.
    np.savez(path, mu=gaussian.mean, sigma=gaussian.covariance)
    read = fid.read_reference(str(path), about)
    assert read.about["reference_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.about["reference_images"] is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["fid", "--samples=none", "--reference=none", "--out=x.json"], "none.pth: no such file"),
        (["fid30k", "--data=none", "--stages=none", "--out=x", "--limit=3"], "--count"),
        (["fid30k", "--data=none", "--stages=none", "--out=x", "--count=1"], "at least 2"),
        (["fid30k", "--data=none", "--stages=none", "--out=x"], "none.pth: no such file"),
        (["fid", "--samples=a", "--reference=b", "--out=x.json", "--resamples=1"], "at least 2"),
    ],
)
def test_errors_are_one_line(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["evaluate", *flags, "--inception=none.pth"]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    weights.write_safetensors(path, fid_inception.random_weights())
    return path


@pytest.mark.slow
def test_fid_of_a_folder_with_itself_and_with_saved_statistics(
    captioned, inception_file, tmp_path, monkeypatch, capsys
):
    flags = [f"--samples={captioned}", f"--inception={inception_file}", "--batch_size=3"]
    flags += ["--resamples=3", f"--out={tmp_path}/card.json"]
    saved = f"{tmp_path}/reference.npz"
    more = [f"--reference={captioned}", f"--save_reference={saved}"]
    assert main.main(["evaluate", "fid", *flags, *more]) == 1
    assert "9 images give no FID; at least 50" in capsys.readouterr().err
    monkeypatch.setattr(fid, "LEAST_IMAGES", 2)
    assert main.main(["evaluate", "fid", *flags, *more]) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["fid"] < 1e-3 and card["low"] <= card["fid"] <= card["high"]
    assert (card["images"], card["reference_images"], card["size"]) == (9, 9, 20)
    assert card["pictures_sha256"] == card["reference_sha256"]
    assert card["precision"] == card["recall"] == 1.0
    assert main.main(["evaluate", "fid", *flags, f"--reference={saved}"]) == 0
    again = json.loads((tmp_path / "card.json").read_text())
    assert again["fid"] == card["fid"] and "kid" not in again
    assert again["reference_sha256"] == card["reference_sha256"]
    assert "| filter | bicubic |" in (tmp_path / "card.md").read_text()
    assert main.main(["evaluate", "fid", *flags, f"--reference={saved}", "--filter=tf"]) == 1


@pytest.fixture(scope="module")
def world(base_config, random_params, tmp_path_factory, inception_file):
    """Mocked COCO in three splits, a stage with random weights, a text encoder: flags."""
    pytest.importorskip("tensorflow_datasets")
    import dataclasses

    import jax

    from imagen_jax.interop import hf_t5
    from imagen_jax.models import t5
    from tests.data.test_embed_killed import TINY
    from tests.evaluation.test_coco import write_mocked

    folder = tmp_path_factory.mktemp("world")
    splits = {"val": slice(0, 2), "test": slice(2, 4), "restval": slice(4, 6)}
    write_mocked(folder / "data", "tfrecord", splits=splits, smallest=8)
    encoder = dataclasses.replace(TINY, emb_dim=8, num_layers=1)
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
        t5.parameter_shapes(encoder),
    )
    hf_t5.save(folder / "text", encoder, params)
    config = dataclasses.replace(
        base_config,
        text=dataclasses.replace(
            base_config.text, encoder="bytes", path=str(folder / "text"), max_len=16
        ),
    )
    (folder / "stage").mkdir()
    (folder / "stage" / "config.json").write_text(overrides.to_json(config))
    weights.write_safetensors(
        folder / "stage" / "params.safetensors", weights.flatten(random_params(config))
    )
    return [
        f"--data={folder}/data",
        f"--stages={folder}/stage",
        f"--inception={inception_file}",
        "--count=4",
        "--batch_size=2",
        "--resamples=3",
    ]


COMMAND = """import sys
from imagen_jax.cli import main
from imagen_jax.evaluation.features import fid
fid.LEAST_IMAGES = 2
sys.exit(main.main())"""


def start(flags, out) -> subprocess.Popen:
    """The command in its own process; later ones share its compilation cache."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "evaluate", "fid30k", *flags, f"--out={out}"],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": f"{out.parent}/xla",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_once(flags, out, pattern: str) -> int:
    """Kills the command once a file below `out` matches; returns the number of matches."""
    process = start(flags, out)
    deadline = time.monotonic() + 600
    while not list(out.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(out.glob(pattern)))


@pytest.mark.slow
def test_fid30k_on_mocked_coco_killed_and_resumed_has_the_same_card(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(world, whole)
    said = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, said
    card = json.loads((whole / "fid30k.json").read_text())
    assert (card["images"], card["captions"], card["zero_shot"]) == (4, 4, True)
    assert card["reference_images"] == 6 and card["low"] <= card["fid"] <= card["high"]
    assert card["stages"][0]["guidance_weight"] == 2.0 and "aug_level" in card["stages"][0]

    assert kill_once(world, killed, "features/reference/*.npz") < 3
    assert kill_once(world, killed, "features/samples/*.npz") < 2
    assert not (killed / "fid30k.json").exists()
    process = start(world, killed)
    said = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, said
    assert json.loads((killed / "fid30k.json").read_text()) == card
    assert (killed / "fid30k.md").read_text() == (whole / "fid30k.md").read_text()
