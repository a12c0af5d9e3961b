"""A noise-aware classifier guides a cascade: folder, library and command line."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import sample as sample_verb
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import ModelConfig
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.given_inputs import GivenInputs
from imagen_jax.inference.request import RequestError
from imagen_jax.inference.sample import SampleOptions, sample
from imagen_jax.inference.sample_folder import SampleError
from imagen_jax.interop.weights import WeightsError
from imagen_jax.io import images
from imagen_jax.parallel import partitioning
from imagen_jax.stages import folder as stage_folder
from imagen_jax.stages.classifier import (
    ClassifierConfig,
    TrainedClassifier,
    classifier_hash,
    load_classifier,
    write_classifier,
)
from imagen_jax.stages.folder import StageError
from imagen_jax.stages.network import init_params
from imagen_jax.stages.stage import Stage

CLASSES = (("colour", ("red", "green", "blue")), ("shape", ("disc", "cross")))
MODEL = ModelConfig(
    channels=(8,),
    num_res_blocks=(1,),
    self_attention=(True,),
    cross_attention=(False,),
    head_dim=8,
    num_groups=4,
    embed_dim=16,
    patch_size=2,
)
RED, BLUE = {"colour": "red"}, {"colour": "blue", "shape": "cross"}


def random_params(shapes, scale):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32),
        partitioning.unbox(shapes),
    )


@pytest.fixture(scope="module")
def trained():
    config = ClassifierConfig(MODEL, 8, CLASSES)
    example = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    shapes = jax.eval_shape(lambda: config.network.init(jax.random.key(0), *example)["params"])
    return TrainedClassifier(config, random_params(shapes, 0.5))


@pytest.fixture(scope="module")
def stages(base_config, sr_config):
    """Both tiny stages with random parameters, unguided."""
    found = []
    for config in (base_config, sr_config):
        unguided = dataclasses.replace(config.sampling, guidance_weight=1.0)
        config = dataclasses.replace(config, sampling=unguided)
        shapes = jax.eval_shape(lambda c=config: init_params(c, jax.random.key(0)))
        found.append(Stage(config, random_params(shapes, 0.1)))
    return found


@pytest.fixture(scope="module")
def texts():
    emb = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    return {"text_emb": emb, "text_mask": np.ones((2, 4), bool)}


@pytest.fixture(scope="module")
def guided(stages, trained):
    return Cascade(stages, classifier=trained)


@pytest.fixture
def folder(trained, tmp_path):
    write_classifier(tmp_path / "classifier", trained)
    return tmp_path / "classifier"


def test_the_folder_holds_network_and_classes(trained, folder):
    again = load_classifier(str(folder))
    assert again.config == trained.config
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    labels = again.config.labels([RED, BLUE, {"shape": "disc"}])
    assert labels.tolist() == [[0, -1], [2, 1], [-1, 0]]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "classifier.json").unlink(), "has no classifier.json"),
        (lambda f: (f / "params.safetensors").unlink(), "has no params.safetensors"),
        (
            lambda f: (f / "classifier.json").write_text('{"model": {}}'),
            "classifier.json: KeyError",
        ),
        (lambda f: (f / "classifier.json").write_text("["), "classifier.json: JSONDecodeError"),
        (lambda f: change(f, classes={"colour": "red"}), "'red' must be a list of names"),
        (lambda f: change(f, classes={"colour": ["red"]}), "does not match its config.*shape: "),
    ],
)
def test_a_damaged_folder_is_named(folder, damage, says):
    damage(folder)
    with pytest.raises((ConfigError, WeightsError), match=says):
        load_classifier(str(folder))


def change(folder, **values):
    found = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps({**found, **values}))


def test_a_large_classifier_is_written_in_shards(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_folder, "MAX_SHARD_BYTES", 1000)
    write_classifier(tmp_path / "large", trained)
    again = load_classifier(str(tmp_path / "large"))
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_the_hash_is_of_the_classes_too(folder):
    before = classifier_hash(str(folder))
    assert before == classifier_hash(str(folder))
    change(folder, classes={"colour": ["green", "red", "blue"], "shape": ["disc", "cross"]})
    assert before != classifier_hash(str(folder))


def test_images_follow_their_classes(stages, guided, trained, texts):
    free = Cascade(stages).sample_stages(seed=3, **texts)[0]
    scale = 300.0
    off = guided.sample_stages(seed=3, classes=[RED, BLUE], classifier_scale=0.0, **texts)[0]
    on = guided.sample_stages(seed=3, classes=[RED, BLUE], classifier_scale=scale, **texts)[0]
    np.testing.assert_allclose(off.astype(int), free.astype(int), atol=1)
    labels = jnp.asarray(trained.config.labels([RED, BLUE]))
    before, after = (
        np.asarray(trained.log_prob(jnp.asarray(images.to_float(found)), jnp.full(2, 6.0), labels))
        for found in (free, on)
    )
    assert (after > before + 0.05).all()


def test_the_classes_of_an_image_are_its_own(guided, texts):
    # Rows are sorted by seed before they are sampled.
    both = guided.sample(seed=[9, 1], classes=[RED, BLUE], classifier_scale=20.0, **texts)
    for row, (seed, classes) in enumerate([(9, RED), (1, BLUE)]):
        one = {name: array[[row]] for name, array in texts.items()}
        alone = guided.sample(
            seed=seed, prompt_indices=[row], classes=[classes], classifier_scale=20.0, **one
        )
        np.testing.assert_allclose(alone[0].astype(int), both[row].astype(int), atol=1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "classes and a classifier go together"),
        ({"classes": [RED]}, "classes of 1 images must be one mapping for each of 2"),
        ({"classes": [RED, {"color": "red"}]}, "attribute.*color.*did you mean 'colour'"),
        ({"classes": [RED, {"colour": "pink"}]}, "pink.*red"),
        ({"classes": [RED, RED], "classifier_scale": -1.0}, "classifier_scale=-1.0 must be"),
    ],
)
def test_wrong_classes_are_one_line(guided, texts, fields, says):
    with pytest.raises((RequestError, ConfigError), match=says):
        guided.sample(**fields, **texts)


def test_classes_need_a_classifier_of_a_stage_size(stages, trained, texts):
    with pytest.raises(RequestError, match="classes and a classifier go together"):
        Cascade(stages).sample(classes=[RED, BLUE], **texts)
    other = trained._replace(config=dataclasses.replace(trained.config, image_size=32))
    with pytest.raises(StageError, match=r"image_size 32 is that of no stage \(\[8, 16\]\)"):
        Cascade(stages, classifier=other)


def test_an_image_records_its_classes(stages, guided, tmp_path, texts):
    rows = [{"prompt": "a", "classes": RED}, {"prompt": "b", "classes": BLUE}]
    options = SampleOptions(batch_size=2, classifier_scale=2.0, given=GivenInputs(texts, 2))
    sample(guided, rows, str(tmp_path), options, log=lambda line: None)
    found = Image.open(tmp_path / "00001_00.png").info
    assert json.loads(found["classes"]) == BLUE
    assert json.loads(found["settings"])["classifier"] == {"weights": "", "scale": 2.0}
    sample(guided, rows, str(tmp_path), options, log=lambda line: None)
    exchanged = [{**rows[0], "classes": BLUE}, rows[1]]
    with pytest.raises(
        SampleError, match="00000_00.png was sampled with classes.colour='red', this run has 'blue'"
    ):
        sample(guided, exchanged, str(tmp_path), options, log=lambda line: None)
    with pytest.raises(SampleError, match="prompt 'a' has no classes"):
        sample(guided, [{"prompt": "a"}], str(tmp_path), options, log=lambda line: None)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--classifier=DIR"], "classes of prompt 0 are {}, must name a class of at least one"),
        (["--classes={}"], ""),
        (["--classes={", "--classifier=DIR"], "--classes is not JSON"),
        (["--classes=[1]", "--classifier=DIR"], "--classes=.1. must be a JSON object"),
        (['--classes={"colour": "red"}'], "need --classifier"),
        (["--classifier_scale=2"], "need --classifier"),
        (['--classes={"colour": "red"}', "--classifier=DIR"], ""),
    ],
)
def test_flags(folder, flags, says):
    parser = argparse.ArgumentParser()
    sample_verb.add_arguments(parser)
    flags = [flag.replace("DIR", str(folder)) for flag in flags]
    parsed = parser.parse_args(["--prompt=a", "--stages=base", "--out=out", *flags])
    rows = [{"prompt": "a"}, {"prompt": "b", "classes": BLUE}]
    if says:
        with pytest.raises(ConfigError, match=says):
            sample_verb.with_classes(rows, parsed)
        return
    found = sample_verb.with_classes(rows, parsed)
    if parsed.classifier:
        assert [row["classes"] for row in found] == [RED, BLUE]
    else:
        assert found == rows
