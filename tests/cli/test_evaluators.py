"""`train` with the rows of cli.evaluators, in one and in two processes."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
import scipy.linalg

from imagen_jax.cli import distance_evaluator, main
from imagen_jax.cli.evaluators import make_evaluators
from imagen_jax.cli.wiring import open_pipeline
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.overrides import load
from imagen_jax.config.train import EvaluateConfig
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.evaluation.features import networks
from imagen_jax.io import images
from tests.reference.byte_encoder import write_byte_encoder
from tests.reference.processes import finish, start

CLIP = pathlib.Path(__file__).parents[1] / "golden" / "clip"
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
        raise AssertionError("train calls score_folder, which needs no yardsticks")

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


def test_distances_need_networks_and_images(world):
    def make(*assignments):
        values = ["model.text_dim=8", "evaluate.every=2", "data.held_out=0.4"]
        rows = ["evaluate.evaluators=('distances',)", *assignments]
        config = load(str(world), [*values, *rows])
        return make_evaluators(config, open_pipeline(config), "")

    with pytest.raises(ConfigError, match=r"config.evaluate.features=\(\) must name networks"):
        make()
    with pytest.raises(ConfigError, match="held-out records must be at least 50"):
        make("evaluate.features=('random_convolutions',)")


class Network:
    """A stage whose samples are given."""

    def __init__(self, monkeypatch, sampled):
        self.calls = []

        def sample(params, config, text, keys, lowres):
            assert lowres is None and text.emb.shape[0] == len(keys)
            start = 16 * len(self.calls)
            self.calls.append(params)
            return sampled[start : start + 16]

        monkeypatch.setattr(distance_evaluator, "sample_stage", sample)


def test_distances_are_those_of_the_features(base_config, make_batch, tmp_path, monkeypatch):
    """The Frechet distance by SciPy's matrix square root, the CMMD by its kernel."""
    config = dataclasses.replace(
        base_config,
        data=dataclasses.replace(base_config.data, batch_size=16),
        evaluate=EvaluateConfig(
            every=1,
            examples=60,
            evaluators=("distances",),
            features=("random_convolutions", f"clip={CLIP}"),
        ),
    )
    rng = np.random.default_rng(0)
    side = config.data.image_size
    real, sampled = rng.uniform(-1, 1, (2, 64, side, side, 3)).astype(np.float32)
    sampled *= 0.7

    class HeldOut(Pipeline):
        def __init__(self):
            self.source = range(60)

        def encode(self, batch):
            return batch

    def batches(pipeline, start):
        for first in range(16 * start, 64, 16):
            yield {**make_batch(config), "image": real[first : first + 16]}

    monkeypatch.setattr(distance_evaluator.loaders, "batches", batches)
    Network(monkeypatch, sampled)
    evaluator = distance_evaluator.FeatureDistances(config, HeldOut(), str(tmp_path))
    assert evaluator.metrics == {"frechet_random_convolutions": "lower", "cmmd": "lower"}
    found = evaluator({}, 0, "ema", lambda: None).scalars

    a, b = (images.to_uint8(part[:60]) for part in (real, sampled))

    def features_of(network):
        inputs = (np.stack([network.prepare(image) for image in part]) for part in (a, b))
        return [np.asarray(network.apply(network.params, x), np.float64) for x in inputs]

    features = features_of(networks.random_convolutions())
    means, covariances = [x.mean(0) for x in features], [np.cov(x.T) for x in features]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert found["frechet_random_convolutions"] == pytest.approx(expected, rel=1e-3)

    clip, _ = networks.load("clip", str(CLIP))
    embedded = features_of(clip)
    x, y = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in embedded)

    def kernel(u, v):
        return np.exp(-((u[:, None] - v[None]) ** 2).sum(-1) / 200).mean(dtype=np.float64)

    assert found["cmmd"] == pytest.approx(
        1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=0.02
    )
