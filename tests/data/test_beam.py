"""data/beam: index, duplicates and plan by Apache Beam are those of the local commands.

`make test_beam` runs these tests in an environment of its own, because Beam needs earlier versions
of some packages (constraints_beam.txt). Elsewhere the tests with a pipeline are skipped.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import beam_flag, main
from imagen_jax.config.data import ComponentConfig, DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import TextConfig
from imagen_jax.data.beam import captions as captions_pipeline
from imagen_jax.data.beam import index, pipeline
from imagen_jax.data.embeddings import embed, plan_file, shared_plan
from imagen_jax.data.embeddings.plan_file import Plan
from imagen_jax.data.index import duplicates, repeats
from imagen_jax.data.index.repeats import Keyed
from imagen_jax.data.sources import registry
from imagen_jax.text.encoders import load_text_encoder
from tests.data.conftest import add_sample
from tests.data.test_embed import CAPTIONS, LetterEncoder

ROOT = pathlib.Path(__file__).parents[2]
ONE_PROCESS = "runner=FnApiRunner,direct_running_mode=in_memory"
TWO_WORKERS = "runner=FnApiRunner,direct_running_mode=multi_processing,direct_num_workers=2"
ENCODER = TextConfig(encoder="imagen_jax.worlds.shapes.oracle_encoder:load")
SHARDS, SAMPLES = 4, 30


def photo(seed: int, quality: int = 90) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((48, 48), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def write_shard(path: pathlib.Path, number: int, samples: int = SAMPLES) -> None:
    """A third repeats images or captions of other shards, or their content in other bytes."""
    rng = np.random.default_rng(number)
    with tarfile.open(path, "w") as shard:
        for i in range(samples):
            own = 1000 * number + i
            image = photo(int(rng.integers(8)) if i % 3 == 0 else own, 60 if i % 6 else 90)
            text = f"a red circle {rng.integers(5)}" if i % 4 == 0 else f"a blue square {own}"
            row = {"caption": text, "aesthetic": float(rng.integers(10))}
            parts = {"jpg": image, "txt": text.encode(), "json": json.dumps(row).encode()}
            if i == 7:
                parts["jpg"] = b"no image"
            add_sample(shard, f"{number:03d}{i:05d}", parts)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    path = tmp_path / "data"
    path.mkdir()
    for number in range(SHARDS):
        write_shard(path / f"{number:05d}.tar", number)
    return path


def config_of(path: pathlib.Path, **options) -> DataConfig:
    options = {"kind": "webdataset", "max_quarantined": 0.9, **options}
    return DataConfig(path=str(path), **options)


def index_files(path: pathlib.Path) -> dict[str, bytes]:
    found = sorted(path.rglob(".imagen_index/**/*"))
    return {str(p.relative_to(path)): p.read_bytes() for p in found if p.is_file()}


def local(data: DataConfig) -> None:
    """What `prepare --duplicates` computes."""
    source = registry.open_source(data, log=lambda line: None)
    for part in source.sources.values() if data.mixture else [source]:
        for kind in duplicates.KINDS:
            part.duplicates(kind)


def clear(path: pathlib.Path) -> None:
    for found in [*path.rglob(".imagen_index")]:
        shutil.rmtree(found)


def random_keys(count: int) -> np.ndarray:
    """A third equal, a third with few other bits; many share their first bytes."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (count, 32), np.uint8)
    keys[: count // 2, :6] = 7
    repeated = rng.integers(0, count // 3, count // 3)
    keys[count // 3 : 2 * (count // 3)] = keys[repeated]
    bits = np.unpackbits(keys[repeated], axis=1)
    bits[:, rng.choice(96, 10, replace=False)] ^= 1
    keys[2 * (count // 3) : 3 * (count // 3)] = np.packbits(bits, axis=1)
    return np.ascontiguousarray(keys).view("S32")[:, 0]


@pytest.mark.parametrize("kind", ["bytes", "pixels"])
def test_groups_find_what_one_group_finds(tmp_path, kind):
    """The steps of the pipeline, grouped here: Beam is not needed."""
    found, bits = random_keys(600), 4
    every = repeats.resolve(repeats.pairs(Keyed(np.arange(600), found), kind))
    assert len(every.numbers) > 300
    groups: dict = {}
    for numbers in np.array_split(np.random.default_rng(1).permutation(600), 7):
        records = Keyed(numbers, found[numbers])
        for name, part in index._divided(records, index._hashes(records.keys, bits)):
            groups.setdefault(name, []).append(part)
    assert len(groups) == 16
    bands: dict = {}
    for group in groups.items():
        index._equal(group, tmp_path)
        for name, part in index._bands(group, bits) if kind == "pixels" else ():
            bands.setdefault(name, []).append(part)
    for group in bands.items():
        index._near(group, tmp_path)
    pairs = np.concatenate([np.load(path) for path in tmp_path.iterdir()])
    for one, other in zip(repeats.resolve(pairs), every, strict=True):
        np.testing.assert_array_equal(one, other)


def same_plan(one: pathlib.Path, other: pathlib.Path) -> None:
    names = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in one.iterdir()) == names and len(names) == 7
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_plan_of_parts_is_that_of_all_captions(tmp_path):
    texts, encoder = [*CAPTIONS, "", "куб"], LetterEncoder()
    groups = dict(sorted(captions_pipeline._divided(texts, 4)))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole").mkdir()
    parts = [
        embed.tokenized(sorted(group, key=embed.store.caption_hash), encoder)
        for group in groups.values()
    ]
    plan_file.write(tmp_path / "parts", lambda: parts, 4)
    embed.write_plan(tmp_path / "whole", texts, encoder, 4)
    same_plan(tmp_path / "parts", tmp_path / "whole")
    plan: Plan = plan_file.read(tmp_path / "parts")
    found = [text for unit in plan.units for text in unit.captions]
    assert sorted(found) == sorted(set(texts)) and plan.unique == len(set(texts))
    assert all(len(unit.captions) <= 4 for unit in plan.units)
    for unit in plan.units:
        assert unit.hashes.tolist() == [embed.store.caption_hash(t) for t in unit.captions]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"check": "header", "unique": "captions"},
        {"where": "aesthetic>3", "unique": "pixels"},
    ],
)
def test_a_pipeline_writes_the_files_of_the_local_command(folder, options):
    pytest.importorskip("apache_beam")
    data = config_of(folder, **options)
    local(data)
    expected = index_files(folder)
    clear(folder)
    beam_flag.build_index(data, ONE_PROCESS, repeats=True)
    made = index_files(folder)
    assert {name for name in expected if "/shards/" in name or "unique" in name} <= set(made)
    local(data)
    assert index_files(folder) == expected


def test_sources_of_a_mixture_are_indexed_too(folder, tmp_path):
    pytest.importorskip("apache_beam")
    other = tmp_path / "data2"
    other.mkdir()
    write_shard(other / "0.tar", 9)
    parts = {
        "a": ComponentConfig(kind="webdataset", path=str(folder), unique="bytes"),
        "b": ComponentConfig(kind="webdataset", path=str(other), max_quarantined=0.9),
    }
    parts["a"] = dataclasses.replace(parts["a"], max_quarantined=0.9)
    data = DataConfig(mixture=parts)
    local(data)
    expected = index_files(tmp_path)
    clear(tmp_path)
    beam_flag.build_index(data, ONE_PROCESS, repeats=True)
    local(data)
    assert index_files(tmp_path) == expected


def test_a_pipeline_writes_the_plan_of_embed(folder, tmp_path):
    pytest.importorskip("apache_beam")
    encoder = load_text_encoder(ENCODER)
    data = config_of(folder, embeddings=str(tmp_path / "text"), captions={"caption": 0.9, "": 0.1})
    source = registry.open_source(data, log=lambda line: None)
    captions = shared_plan.SourceCaptions(source)
    assert len(captions) == len(list(captions))
    captions_pipeline.write_plan(
        data, ENCODER, captions, encoder=encoder, unit_size=8, further=[""], options=ONE_PROCESS
    )
    (made,) = (tmp_path / "text").iterdir()
    (tmp_path / "whole").mkdir()
    embed.write_plan(tmp_path / "whole", list(captions), encoder, 8)
    same_plan(made, tmp_path / "whole")
    expected = shared_plan.path_of(tmp_path / "text", captions, embed.settings_of(encoder, 8))
    assert made == expected


def test_options_are_checked(tmp_path):
    pytest.importorskip("apache_beam")
    with pytest.raises(ConfigError, match="direct_num_worker.*direct_num_workers"):
        pipeline.run("direct_num_worker=2", lambda beam, start: None, tmp_path)

    def fail(beam, start):
        return start | beam.Create([1]) | beam.Map(lambda x: 1 // 0)

    with pytest.raises(ConfigError, match="modulo by zero.*run the same command again"):
        pipeline.run(ONE_PROCESS, fail, tmp_path)


def test_without_beam_the_flag_says_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = ["prepare", f"--config={write_config(folder, tmp_path)}", "--beam_options=a=b"]
    assert main.main(command) == 1
    assert "--beam_options needs the module 'apache_beam'" in capsys.readouterr().err
    address = [*command, "--config.data.path=gs://bucket/data"]
    assert main.main(address) == 1
    assert "mounted" in capsys.readouterr().err


def write_config(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "config.py"
    path.write_text(
        "from imagen_jax.config import overrides\n"
        "from imagen_jax.config.schema import Config\n"
        "def get_config(name=''):\n"
        "    c = overrides.to_config_dict(Config())\n"
        f"    c.data.kind, c.data.path = 'webdataset', {str(folder)!r}\n"
        "    c.data.max_quarantined = 0.9\n"
        "    return c\n"
    )
    return path


def workers(parent: int) -> list[int]:
    """The worker processes of a command."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        own = f"IMAGEN_TEST_RUN={parent}".encode() in environment
        if own and b"apache_beam.runners.worker.sdk_worker_main" in words:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_killed_worker_and_the_command_again(folder, tmp_path):
    """Two workers; one is killed while shards are checked."""
    pytest.importorskip("apache_beam")
    for number in range(SHARDS, 40):
        write_shard(folder / f"{number:05d}.tar", number, 60)
    config = write_config(folder, tmp_path)
    command = [sys.executable, "-m", "imagen_jax", "prepare", f"--config={config}", "--duplicates"]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    said = subprocess.run(command, **run).stdout
    expected = index_files(folder)
    clear(folder)
    command.append(f"--beam_options={TWO_WORKERS}")
    environment = {**os.environ, "IMAGEN_TEST_RUN": str(os.getpid())}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    shards = folder / ".imagen_index" / "shards"
    while len(list(shards.glob("*.safetensors"))) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.kill(workers(os.getpid())[0], signal.SIGKILL)
    error = first.communicate()[1]
    assert first.returncode == 1 and "run the same command again" in error
    known = list(shards.glob("*.safetensors"))
    assert 3 <= len(known) < 40
    times = {path: path.stat().st_mtime_ns for path in known}
    again = subprocess.run(command, **run)
    assert again.returncode == 0, again.stderr
    assert again.stdout == said and "duplicates by pixels" in said
    assert index_files(folder) == expected
    assert times == {path: path.stat().st_mtime_ns for path in known}
