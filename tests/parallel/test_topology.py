"""Names of TPU slices: their meaning, and errors for unknown names."""

import sys

import jax
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.parallel import topology


@pytest.mark.parametrize(
    ("name", "family", "chips"),
    [
        ("v4-8", "v4", 4),
        ("v4-128", "v4", 64),
        ("v4-512", "v4", 256),
        ("v5p-128", "v5p", 64),
        ("v5p-12288", "v5p", 6144),
        ("v5e-1", "v5e", 1),
        ("v5e-256", "v5e", 256),
        ("v5litepod-16", "v5e", 16),
        ("v6e-64", "v6e", 64),
        ("tpu7x-128", "tpu7x", 64),
    ],
)
def test_the_number_counts_what_cloud_tpu_counts(name, family, chips):
    assert topology.parse(name) == (topology.GENERATIONS[family], chips, 1)


@pytest.mark.parametrize(
    ("name", "family", "chips", "slices"),
    [("v5e-256x2", "v5e", 256, 2), ("v6e-256x4", "v6e", 256, 4), ("v4-8x2", "v4", 4, 2)],
)
def test_several_slices(name, family, chips, slices):
    assert topology.parse(name) == (topology.GENERATIONS[family], chips, slices)


@pytest.mark.parametrize("family", topology.GENERATIONS)
def test_a_shape_has_its_chips(family):
    for chips, shape in topology.GENERATIONS[family].shapes.items():
        sides = [int(side) for side in shape.split("x")]
        product = 1
        for side in sides:
            product *= side
        assert product == chips and sides == sorted(sides) or shape in ("2x2x1",)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v4-100", "v4-128"),
        ("v4-9", "v4-8"),
        ("v5e-300", "v5e-256"),
        ("v5e", "v5e-64"),
        ("v5e-many", "v5e-64"),
        ("v5-128", "v5"),
        ("v7-64", "tpu7x-64"),
        ("v6e-512", "v6e-256"),
        ("v5e-256xtwo", "v5e-256x2"),
        ("v5e-256x0", "v5e-256x2"),
        ("", ""),
    ],
)
def test_the_nearest_that_works_is_named(name, nearest):
    with pytest.raises(ConfigError) as error:
        topology.parse(name)
    message = str(error.value)
    assert f"--topology={name!r}" in message and "\n" not in message
    named = message.rpartition("try ")[2]
    assert named.startswith(nearest)
    topology.parse(named)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(
        topology.topologies,
        "get_topology_desc",
        lambda *_, **__: (_ for _ in ()).throw(RuntimeError("JAX TPU support not installed")),
    )
    with pytest.raises(ConfigError, match=r"pip install 'imagen_jax\[tpu\]'"):
        topology.open_slice("v5e-16")


def test_this_machine_is_a_slice_too():
    here = topology.this_machine()
    assert here.devices == jax.devices() and here.chips == len(jax.devices())
    assert 2**28 < here.hbm < 2**50
