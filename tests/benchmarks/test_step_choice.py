"""benchmarks/step_choice.py: its three parts of the data, and what it reads from a run."""

import argparse
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import step_choice

from imagen_jax.config.data import DataConfig
from imagen_jax.data.sources.registry import open_source


def captions(folder: pathlib.Path) -> set[str]:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return {json.loads(line)["text"] for line in lines}


def test_parts_are_of_their_sizes_and_disjoint(tmp_path, monkeypatch):
    monkeypatch.setattr(step_choice, "embed", lambda *arguments: None)
    monkeypatch.setattr(step_choice, "load_text_encoder", lambda config: None)
    step_choice.write_data(tmp_path)
    tuning, second = captions(tmp_path / "tuning"), captions(tmp_path / "second")
    assert len(tuning) == len(second) == 64 and not tuning & second
    data = DataConfig(kind="folder", path=str(tmp_path / "tuning"), image_size=16)
    source = open_source(data)
    for part, count in (("train", 48), ("held_out", 16)):
        assert len(source.part(part, step_choice.HELD_OUT)) == count


def test_the_choice_is_compared_on_the_second_split(tmp_path, monkeypatch):
    rows = [
        {"step": step, "seconds": at, "ema/validation_loss": loss, "ema/training_loss": 0.5}
        for step, at, loss in ((0, 90, 0.1), (10, 1037, 0.9), (20, 2037, 0.7), (30, 3037, 0.8))
    ]
    for step in (10, 30):
        rows.insert(0, {"step": step, "seconds": 1000 * step // 10, "loss": 1.0})
    workdir = tmp_path / "seed_3"
    workdir.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text)
    line = "goodput 90% of 1:01:40: data 0:20, evaluate 2:09, step 55:30\n"
    workdir.with_suffix(".log").write_text("goodput 1% of 0:10: step 0:01\n" + line)
    found = {10: 0.8, 20: 0.77, 30: 0.7}
    monkeypatch.setattr(step_choice, "second_losses", lambda *arguments: found)
    args = argparse.Namespace(out=tmp_path, steps=30, every=10)
    scored = step_choice.score(3, args)
    assert (scored["chosen"], scored["best"]) == (20, 30)
    assert scored["excess"] == pytest.approx(0.1) and scored["last_excess"] == 0
    assert scored["cost"] == pytest.approx(129 / 3700)
    assert scored["later_cost"] == pytest.approx(3 * 37 / 3700)
    assert "| 3 | 20 | 30 | 10.0 % | 0.0 % | 3.5 % | 3.0 % |" in step_choice.table({"3": scored})
