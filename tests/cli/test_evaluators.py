"""`train` with the rows of cli.evaluators, in one and in two processes."""

import json
import sys

import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.cli.evaluators import make_evaluators
from imagen_jax.cli.wiring import open_pipeline
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.overrides import load
from tests.reference.byte_encoder import write_byte_encoder
from tests.reference.processes import finish, start

FLAGS = [
    "--config.data.held_out=0.4",
    "--config.evaluate.every=2",
    "--config.evaluate.examples=8",
    "--config.train.steps=2",
]


class Darkness:
    """A scorer for the tests: an image is exact if its mean is below the middle."""

    def can_score(self, row):
        return "prompt" in row

    def real_image(self, row, *, index, size=None):
        return np.full((size, size, 3), index, np.uint8)

    def evaluate(self, samples_dir, by="kind"):
        raise NotImplementedError

    def score_folder(self, samples_dir):
        rows = [json.loads(line) for line in (samples_dir / "samples.jsonl").open()]
        assert all((samples_dir / row["file"]).is_file() for row in rows)
        return {"dark": {"exact": {"mean": len(rows) / 4, "n": len(rows)}}}

    def format_table(self, report):
        return ""


SCORER = Darkness()


@pytest.fixture(scope="module")
def world(base_config, write_world, tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), base_config, steps=2, every=2)


def evaluated(workdir) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" not in row]


@pytest.mark.slow
def test_train_writes_the_validation_loss_of_held_out_records(world, tmp_path):
    assert main.main(["train", f"--config={world}", f"--workdir={tmp_path}", *FLAGS]) == 0
    found = evaluated(tmp_path)
    assert [row["step"] for row in found] == [0, 2]
    for name in ("ema", "params"):
        for row in found:
            gap = row[f"{name}/validation_loss"] - row[f"{name}/training_loss"]
            assert row[f"{name}/loss_gap"] == pytest.approx(gap) and gap != 0


def test_rows_and_their_needs_are_checked(world):
    def make(*assignments):
        config = load(str(world), ["model.text_dim=8", "evaluate.every=2", *assignments])
        return make_evaluators(config, open_pipeline(config), "")

    assert list(make("data.held_out=0.4")) == ["validation_loss"]
    with pytest.raises(ConfigError, match="need held-out data, but config.data.held_out=0"):
        make()
    with pytest.raises(ConfigError, match="evaluators='validation_los'.*did you mean 'validation"):
        make("evaluate.evaluators=('validation_los',)")
    with pytest.raises(ConfigError, match="config.evaluate.prompts='' must be set"):
        make("evaluate.evaluators=('scorer',)")
    assert make("evaluate.every=0") == {}


@pytest.mark.slow
def test_two_processes_equal_one(world, tmp_path):
    """Validation loss and sample grid; the numbers up to the order of summation."""
    rows = "--config.evaluate.evaluators=('validation_loss','samples')"
    command = [sys.executable, "-m", "imagen_jax", "train", f"--config={world}", rows, *FLAGS]
    finish(start([*command, f"--workdir={tmp_path / 'one'}"], 1, 1))
    finish(start([*command, f"--workdir={tmp_path / 'two'}"], 2, 1))
    one, two = evaluated(tmp_path / "one"), evaluated(tmp_path / "two")
    assert len(one) == len(two) == 2
    for row, expected in zip(two, one, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    grids = sorted(path.name for path in (tmp_path / "two").glob("held_out_samples_*"))
    assert grids == ["held_out_samples_ema", "held_out_samples_params"]


@pytest.mark.slow
def test_a_scorer_rates_samples_of_prompts(world, tmp_path):
    text = write_byte_encoder(tmp_path / "text")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    flags = [
        f"--config.text.path={text}",
        "--config.text.encoder=bytes",
        "--config.text.on_the_fly=true",
        "--config.text.max_len=4",
        "--config.evaluate.evaluators=('scorer',)",
        f"--config.evaluate.prompts={tmp_path / 'prompts.txt'}",
        "--config.evaluate.scorer=tests.cli.test_evaluators:SCORER",
        "--config.checkpoint.keep_best=1",
        "--config.checkpoint.best_metric=ema/exact",
    ]
    workdir = tmp_path / "run"
    command = ["train", f"--config={world}", f"--workdir={workdir}", *FLAGS, *flags]
    assert main.main(command) == 0
    assert evaluated(workdir)[-1]["ema/exact"] == 0.75
    assert evaluated(workdir)[-1]["params/dark/exact"] == 0.75
    assert len(list((workdir / "scored_samples" / "ema").glob("*.png"))) == 3
