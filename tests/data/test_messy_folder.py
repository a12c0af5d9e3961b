"""A folder with 3% broken or odd files trains, and the report lists each one."""

import io
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.data.embeddings import store as embeddings

COUNT, DIM = 400, 8


def png(*shape: int, seed: int = 0, kind: str = "png", mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def spoil(folder: pathlib.Path) -> dict[str, str]:
    """Twelve broken or odd files: name -> start of the reason or note in the report."""
    exif = Image.Exif()
    exif[0x0112] = 3
    grey = io.BytesIO()
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(grey, "png")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    gif = io.BytesIO()
    frames[0].save(gif, "gif", save_all=True, append_images=frames[1:])
    files = {
        "bad/truncated.jpg": (png(64, 64, kind="jpeg")[:1500], "unreadable"),
        "bad/zero.png": (b"", "unreadable (empty)"),
        "bad/named_wrongly.jpg": (png(16, 16), "wrong extension"),
        "bad/cmyk.jpg": (png(16, 16, kind="jpeg", mode="CMYK"), "converted from CMYK"),
        "bad/sixteen.png": (grey.getvalue(), "converted from 16 bits"),
        "bad/moving.gif": (gif.getvalue(), "first frame alone"),
        "bad/pixel.png": (png(1, 1), "too small"),
        "bad/turned.jpg": (png(16, 16, kind="jpeg", exif=exif), "rotated by EXIF"),
        "bad/silent.png": (png(16, 16, seed=1), "no caption"),
        "bad/long.png": (png(16, 16, seed=2), "long caption (5000 words"),
        "bad/кот.png": (png(16, 16, seed=3), "name not in ASCII"),
    }
    (folder / "bad").mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
        if name != "bad/silent.png":
            text = "word " * 5000 if "long" in name else f"a picture, {name}"
            (folder / name).with_suffix(".txt").write_text(text)
    (folder / "bad" / "loop").symlink_to(folder, target_is_directory=True)
    return {name: says for name, (_, says) in files.items()} | {"bad/loop": "symlink loop"}


@pytest.fixture
def messy(tmp_path, base_config, write_world) -> tuple[pathlib.Path, dict[str, str]]:
    """(configuration file, name -> note) of a folder of 400 files, twelve broken or odd."""
    folder = tmp_path / "messy"
    folder.mkdir()
    for i in range(COUNT - 12):
        (folder / f"{i:03}.png").write_bytes(png(16, 16, seed=i))
        (folder / f"{i:03}.txt").write_text(f"picture {i}")
    expected = spoil(folder)
    captions = sorted({path.read_text().strip() for path in folder.glob("**/*.txt")})
    store = tmp_path / "store"
    store.mkdir()
    rows = [np.full((2, DIM), 0.5, ml_dtypes.bfloat16) for _ in captions]
    unit = store / embeddings.unit_name(captions)
    embeddings.write_unit(unit, captions, rows)
    embeddings.write_manifest(store, [embeddings.describe_unit(unit)], {"encoder": "fake"})
    config = write_world(tmp_path, base_config, steps=2, every=2)
    return config, expected


def test_a_folder_with_three_percent_of_broken_files_trains(messy, tmp_path, capsys):
    config, expected = messy
    flags = [f"--config={config}", f"--config.data.path={tmp_path}/messy"]
    flags += [f"--config.data.embeddings={tmp_path}/store", "--config.data.max_quarantined=0.05"]
    assert main.main(["prepare", *flags]) == 0
    out = capsys.readouterr().out
    assert "5 of 400 records quarantined" in out and "395 usable images" in out
    assert main.main(["train", *flags, f"--workdir={tmp_path}/run"]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(row)["loss"]) for row in rows) and len(rows) == 2

    written = json.loads((tmp_path / "messy/.imagen_index/quarantine.json").read_text("utf-8"))
    said = {row["name"]: row["reason"] for row in written["records"]}
    said |= {row["name"]: row["note"] for row in written["notes"]}
    assert said.keys() == expected.keys()
    for name, text in expected.items():
        assert said[name].startswith(text), (name, said[name])
