"""Times of collectives on a torus, against counts of bytes by hand."""

import itertools
import types

import pytest

from imagen_jax.parallel import links
from imagen_jax.parallel.links import Axis
from imagen_jax.parallel.peaks import Peaks

# 1e8 bytes/s of a link in one direction; sides of 4, 8, ... are rings.
PEAK = Peaks(flops=1e12, hbm=1e9, ici=1e8, dcn=1e7, ring=4)
GATHER = "%g = f32[1000000]{0} all-gather(%p), channel_id=1, replica_groups="


def slice_of(*sides):
    """Chips in the order of the mesh, the last axis fastest."""
    positions = itertools.product(*map(range, sides))
    return links.torus([types.SimpleNamespace(coords=at) for at in positions])


@pytest.mark.parametrize(
    ("sides", "group", "axes"),
    [
        ((4, 8), range(8), [Axis(8, 2)]),  # A row, whose ends are linked.
        ((4, 8), range(4), [Axis(4, 1)]),  # Half a row.
        ((4, 8), range(0, 32, 8), [Axis(4, 2)]),  # A column.
        ((4, 8), range(16), [Axis(2, 1), Axis(8, 2)]),
        ((4, 8), range(32), [Axis(4, 2), Axis(8, 2)]),
        ((2, 6), range(12), [Axis(2, 1), Axis(6, 1)]),  # No side is a multiple of 4.
        ((4, 8), (0, 9), [Axis(2, 2)]),  # No box: taken for a ring.
    ],
)
def test_axes_of_a_group(sides, group, axes):
    assert links.axes(list(group), slice_of(*sides), ring=4) == axes


def test_without_positions_a_group_is_a_ring():
    assert links.torus([types.SimpleNamespace(id=0)]) is None
    assert links.axes(range(8), None, ring=4) == [Axis(8, 2)]


def test_several_slices_have_the_same_positions():
    """A group over two slices is no box of one slice."""
    where = slice_of(4, 4)
    twice = links.Torus(where.positions * 2, where.sides)
    assert links.axes([0, 16], twice, ring=4) == [Axis(2, 2)]


@pytest.mark.parametrize(
    ("group", "milliseconds", "microseconds"),
    [
        # 4 MB, 7/8 of it from the others, over 2 links; 4 hops.
        ("[4,8]<=[32]", 4 * 7 / 8 / 0.2, 4),
        # 3/4 of it over 1 link, the outermost chip's; 3 hops.
        ("[8,4]<=[32]", 4 * 3 / 4 / 0.1, 3),
        # 31/32 of it over 4 links; 2 + 4 hops.
        ("[1,32]<=[32]", 4 * 31 / 32 / 0.4, 6),
    ],
)
def test_an_all_gather(group, milliseconds, microseconds):
    found = links.seconds("all-gather", GATHER + group, PEAK, devices=32, where=slice_of(4, 8))
    assert found == pytest.approx(milliseconds * 1e-3 + microseconds * 1e-6)


def test_an_all_to_all_crosses_the_middle():
    """Each of 8 chips of a ring holds 4 MB. Of the 16 MB of one half, half goes to the other half.

    The halves meet at two places with a link in each direction, so 8 MB cross two links.
    """
    line = GATHER.replace("all-gather", "all-to-all") + "[4,8]<=[32]"
    found = links.seconds("all-to-all", line, PEAK, devices=32, where=slice_of(4, 8))
    assert found == pytest.approx(8 / 0.2 * 1e-3 + 4e-6)


@pytest.mark.parametrize("kind", ["all-reduce", "reduce-scatter", "all-gather"])
def test_a_group_of_one_takes_no_time(kind):
    line = GATHER.replace("all-gather", kind) + "[32,1]<=[32]"
    assert links.seconds(kind, line, PEAK, devices=32, where=slice_of(4, 8)) == 0
