"""Records held out by a hash of their key: disjoint parts, for every kind of source and loader."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.sources.mixture import Mixture


def pipeline(world, **changes) -> Pipeline:
    data, source, store = world
    return Pipeline(source, store, dataclasses.replace(data, **changes), seed=0)


def keys(source) -> set[str]:
    return {source.record(i).key for i in range(len(source))}


def test_the_parts_are_disjoint_and_complete(world):
    made = pipeline(world, held_out=0.3)
    training, held_out = keys(made.source), keys(made.held_out().source)
    assert training | held_out == keys(world[1])
    assert not training & held_out
    assert 2 <= len(held_out) <= 12
    # A larger share adds records; it moves none back.
    assert held_out < keys(pipeline(world, held_out=0.6).held_out().source)


def test_batches_read_their_own_part_alone(world):
    """Also where records turn out damaged: the next one of the same part replaces them."""
    made = pipeline(world, held_out=0.3)
    for part in (made, made.held_out()):
        mine = {part.source.record(i).image.tobytes() for i in range(len(part.source))}
        part.source._broken = {int(part.source._numbers[0])}
        assert part.source.record(0).key in keys(part.source)
        for step in range(4):
            batch = part.examples_at(step)["image"]
            assert {image.tobytes() for image in batch} <= mine


def test_a_mixture_holds_out_of_every_source(world):
    data, source, store = world
    mixture = Mixture({"a": source, "b": source}, {"a": 1.0, "b": 3.0})
    data = dataclasses.replace(data, held_out=0.3)
    held_out = Pipeline(mixture, store, data, seed=0).held_out()
    names = [held_out.source.record(i).key for i in range(len(held_out.source))]
    assert {name.split(":")[0] for name in names} == {"a", "b"}
    assert {name.split(":")[1] for name in names} == keys(source.part("held_out", 0.3))


@pytest.mark.parametrize("loader", ["numpy", "seqio"])
def test_both_loaders_give_the_held_out_batches(world, loader):
    if loader == "seqio":
        pytest.importorskip("seqio")
    made = pipeline(world, held_out=0.3, loader=loader)
    for part in (made, made.held_out()):
        stream = loaders.batches(part)
        for step in range(2):
            batch, expected = next(stream), part.batch_at(step)
            for name in expected:
                np.testing.assert_array_equal(batch[name], expected[name])


def test_the_parts_have_fingerprints_of_their_own(world):
    whole, made = pipeline(world), pipeline(world, held_out=0.3)
    found = [p.fingerprint() for p in (whole, made, made.held_out())]
    assert found[0] != found[1] != found[2] != found[0]
    assert "held_out" not in found[0]  # Runs of earlier versions resume.


def test_a_share_that_leaves_a_part_empty_is_refused(world):
    with pytest.raises(ConfigError, match="config.data.held_out=0.0 leaves no record"):
        pipeline(world).held_out()
    with pytest.raises(ConfigError, match="leaves no record to the part 'train' of a source of 23"):
        pipeline(world, held_out=0.9999)
