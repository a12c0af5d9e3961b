"""Collectives read from compiled programs; the CPU's real ones are in test_plan.py."""

import pytest

from imagen_jax.parallel import hlo
from imagen_jax.parallel.hlo import Collective

# As libtpu writes them: a reduce-scatter as a fusion, a loop without a stated trip count.
TPU = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (input: f32[64,32]) -> f32[16,32] {
  %input = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,32]{1,0:T(8,128)} all-reduce(%input), channel_id=2, to_apply=%add
  ROOT %slice = f32[16,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,32}
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %part = bf16[2,4]{1,0:T(8,128)(2,1)} fusion(%state), kind=kLoop, calls=%nothing
  %all-gather.7 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=3, dimensions={0}
  ROOT %out = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%state, %all-gather.7)
}

%condition (state.1: (s32[], bf16[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %state.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%index, %bound), direction=LT
}

ENTRY %main (p0: f32[64,32], p1: bf16[8,4]) -> f32[16,32] {
  %p0 = f32[64,32]{1,0:T(8,128)} parameter(0)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%p0), condition=%condition, body=%body
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%p0), channel_id=5, dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %both = (f32[4]{0}, s8[4]{0}) all-reduce(%p0, %p0), channel_id=6, to_apply=%add
  ROOT %scatter = f32[16,32]{1,0:T(8,128)} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_tpu_program():
    assert hlo.collectives(TPU) == [
        Collective("all-gather", 5 + 1, 5 * 64 + 64),
        Collective("all-reduce", 1, 20),
        Collective("reduce-scatter", 1, 64 * 32 * 4),
    ]


def test_a_trip_count_that_is_stated_is_taken():
    known = TPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert hlo.collectives(known)[0] == Collective("all-gather", 9 + 1, 9 * 64 + 64)


def test_an_overlapped_operation_is_one():
    """Its start, steps and end are instructions on one channel."""
    fusions, calls = "", ""
    for part in ("start", "step", "done"):
        gather = "f32[16]{0} all-gather(%q), channel_id=9, dimensions={0}"
        fusions += f"%f_{part} (q: f32[4]) -> f32[16] {{\n  ROOT %g_{part} = {gather}\n}}\n\n"
        calls += f"  %c_{part} = f32[16]{{0}} fusion(%p0), kind=kCustom, calls=%f_{part}\n"
    head, entry, body = TPU.partition("ENTRY ")
    line, _, rest = body.partition("\n")
    text = f"{head}{fusions}{entry}{line}\n{calls}{rest}"
    assert hlo.collectives(text)[0] == Collective("all-gather", 7, 5 * 64 + 64 + 64)


@pytest.mark.parametrize(
    "groups",
    ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}"]
    + ["mesh['axis_0'=2,'axis_1'=4,'axis_2'=2], device_ids=([2,4,2]T(1,0,2)) {'axis_1'}"]
    + ["mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_0','axis_2'}"],
)
def test_a_reduce_scatter_counts_what_goes_in(groups):
    line = f"  ROOT %r = f32[2]{{0}} reduce-scatter(%p), channel_id=1, replica_groups={groups}"
    text = f"ENTRY %main (p: f32[8]) -> f32[2] {{\n{line}\n}}"
    assert hlo.collectives(text) == [Collective("reduce-scatter", 1, 8 * 4)]


def test_a_program_without_any():
    assert hlo.collectives("ENTRY %main (p: f32[]) -> f32[] {\n  %p = f32[] parameter(0)\n}") == []


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("{}", ()),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        # 0 to 7 in two rows of four, transposed to four rows of two: 0 4, 1 5, 2 6, 3 7.
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("[2,4]<=[2,4]T(1,0)", (0, 4, 1, 5)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
    ],
)
def test_devices_of_the_first_group(groups, first):
    assert hlo.first_group(f"all-gather(%p), replica_groups={groups}, dimensions={{0}}") == first
