"""Predicted times against counts by hand, and FLOPs of compiled programs against those traced."""

import importlib.util
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax.config.schema import MeshConfig
from imagen_jax.parallel import flops, hlo, instructions, partitioning, peaks, topology
from imagen_jax.parallel.peaks import Peaks
from imagen_jax.planning import plan, step_time

PROGRAMS = pathlib.Path(__file__).parent / "programs"
# 1e12 FLOP/s, 1e9 bytes/s of memory, 1e8 bytes/s of a link in one direction.
PEAK = Peaks(flops=1e12, hbm=1e9, ici=1e8, dcn=1e7)

# A product [1000, 500] x [500, 2000]: 2e9 FLOP, 2 ms; it moves (.5 + 1 + 2) * 2 = 7 MB, 7 ms. A sum
# of two arrays of 4 MB: 12 MB, 12 ms. One array lies on the chip, so only 8 MB of it: 8 ms.
SERIAL = (PROGRAMS / "serial.txt").read_text()

# An all-gather over 4 devices to 4 MB: 3/4 of it over 2 links, 15 ms, and 2 hops, 2 us. A product
# of 10 ms runs meanwhile, so 5.002 ms are exposed. An all-reduce of 2 MB over all 8: 2 * 7/8 * 2 MB
# over 2 links, 17.5 ms, and 4 hops, all of it exposed.
OVERLAPPED = (PROGRAMS / "overlapped.txt").read_text()

# Ten times: a convolution 3x3 with padding 1 of an image 4x4, 8 channels to 16, batch 1000. Of the
# 4 * 3 pairs of position and tap on an axis 2 are padding, so 10 * 10 * 8 * 16 * 1000 * 2 = 25.6
# MFLOP, 25.6 us on the chip's memory. A reduce-scatter of 1 MB over 2 devices: 1/2 of it over 2
# links, 2.5 ms, and 1 hop, exposed. Then 1 of 100 rows of an array of 4 MB is read and written: 80
# kB, 80 us.
LOOP = (PROGRAMS / "loop.txt").read_text()


def test_operations_in_turn():
    found = step_time.predict(SERIAL, PEAK)
    assert found.products == pytest.approx(7e-3)
    # 4 + 4 MB read and 0 written to HBM; 0 + 4 read and 4 written.
    assert found.others == pytest.approx(8e-3 + 8e-3)
    assert found.exposed == found.hidden == 0
    assert found.seconds == pytest.approx(23e-3)


def test_a_collective_while_others_run():
    found = step_time.predict(OVERLAPPED, PEAK, devices=8)
    assert found.products == pytest.approx(10e-3)
    assert found.hidden == pytest.approx(10e-3)
    assert found.exposed == pytest.approx(5.002e-3 + 17.504e-3)
    assert found.seconds == pytest.approx(32.506e-3)


def test_a_loop():
    found = step_time.predict(LOOP, PEAK, devices=8)
    assert found.products == pytest.approx(10 * 25.6e-6)
    assert found.exposed == pytest.approx(10 * 2.501e-3)
    assert found.others == pytest.approx(80e-6, rel=1e-3)


def test_a_loop_of_unknown_length():
    unknown = LOOP.replace(
        "%n = s32[] constant(10)", "%n = s32[] get-tuple-element(%state), index=0"
    )
    found = step_time.predict(unknown, PEAK, devices=8, unknown_trips=3)
    assert found.products == pytest.approx(3 * 25.6e-6)


def test_what_waits_at_once_hides_nothing():
    """All-reduces whose times are no sums of powers of two; their sum was 3e-17 s too small."""
    given = "".join(f"  %g{i} = f32[{1000 + 7 * i}]{{0}} parameter({i})\n" for i in range(40))
    steps = "".join(
        f"  %r{i} = f32[{1000 + 7 * i}]{{0}} all-reduce(%g{i}), channel_id=1, to_apply=%add\n"
        f"  %c{i} = f32[{1000 + 7 * i}]{{0}} copy(%r{i})\n"
        for i in range(40)
    )
    root = "  ROOT %end = f32[] constant(0)\n"
    text = f"HloModule many\n\nENTRY %main (g: f32[]) -> f32[] {{\n{given}{steps}{root}}}\n"
    assert step_time.predict(text, PEAK, devices=8).hidden == 0


def test_waiting_for_a_copy_is_no_communication():
    """2 MB to the chip's memory take 2 ms; a product of 1 ms runs meanwhile."""
    text = """HloModule copy, is_scheduled=true

ENTRY %main (w: f32[500000], x: f32[1000,500], y: f32[500,1000]) -> f32[500000] {
  %w = f32[500000]{0} parameter(0)
  %x = f32[1000,500]{1,0:S(1)} parameter(1)
  %y = f32[500,1000]{1,0:S(1)} parameter(2)
  %start = (f32[500000]{0:S(1)}, f32[500000]{0}, u32[]{:S(2)}) copy-start(%w)
  %product = f32[1000,1000]{1,0:S(1)} dot(%x, %y), lhs_contracting_dims={1}
  ROOT %done = f32[500000]{0:S(1)} copy-done(%start)
}
"""
    found = step_time.predict(text, PEAK)
    assert found.exposed == found.hidden == 0
    assert (found.products, found.others) == (pytest.approx(1e-3), pytest.approx(1e-3))


def test_a_collective_in_steps():
    """On TPUs an all-gather can be several fusions on one channel, with others between them."""
    text = (PROGRAMS / "steps.txt").read_text()
    found = step_time.predict(text, PEAK, devices=4)
    assert found.exposed == pytest.approx(5.002e-3)
    assert found.hidden == pytest.approx(10e-3)


def test_merged_scatters_on_one_channel_are_several():
    """1 MB each over 4 devices: 3/4 of it over 2 links, 3.75 ms, and 2 hops."""
    text = """HloModule scatters, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""
    entry, groups = "", "channel_id=1, replica_groups={{0,1,2,3}}"
    for number in (1, 2):
        text += f"""
%all-reduce-scatter.{number} (g: f32[250000]) -> f32[62500] {{
  %g = f32[250000]{{0:S(1)}} parameter(0)
  %r{number} = f32[250000]{{0:S(1)}} all-reduce(%g), {groups}, to_apply=%sum
  ROOT %part = f32[62500]{{0:S(1)}} dynamic-slice(%r{number}), dynamic_slice_sizes={{62500}}
}}
"""
        called = f"kind=kCustom, calls=%all-reduce-scatter.{number}"
        entry += (
            f"  {'ROOT ' * (number == 2)}%f{number} = f32[62500]{{0:S(1)}} fusion(%g0), {called}\n"
        )
    text += "\nENTRY %main (g0: f32[250000]) -> f32[62500] {\n"
    text += f"  %g0 = f32[250000]{{0:S(1)}} parameter(0)\n{entry}}}\n"
    found = step_time.predict(text, PEAK, devices=4)
    assert found.exposed == pytest.approx(2 * 3.752e-3)
    assert found.exposed == pytest.approx(step_time.predict(text, PEAK, devices=4).seconds)
    (sent,) = hlo.collectives(text)
    assert (sent.kind, sent.count, sent.bytes) == ("reduce-scatter", 2, 2_000_000)


# A convolution 3x3 with padding 1 of an image 4x4, 8 channels to 16: 16 windows of 72 elements,
# and 16 * 72 * 16 * 2 = 36864 FLOP with the zeros of padding. Then 256 elements: an addition,
# an exp and a division, and their sum over 256.
CPU = """HloModule cpu

%plus (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%silu (p: f32[1,4,4,16]) -> f32[] {
  %p = f32[1,4,4,16]{3,2,1,0} parameter(0)
  %e = f32[1,4,4,16]{3,2,1,0} exponential(%p)
  %t = f32[1,4,4,16]{3,2,1,0} add(%e, %e)
  %d = f32[1,4,4,16]{3,2,1,0} divide(%p, %t)
  %z = f32[] constant(0)
  ROOT %r = f32[] reduce(%d, %z), dimensions={0,1,2,3}, to_apply=%plus
}

ENTRY %main (x: f32[1,4,4,8], k: f32[3,3,8,16]) -> f32[] {
  %x = f32[1,4,4,8]{3,2,1,0} parameter(0)
  %k = f32[3,3,8,16]{3,2,1,0} parameter(1)
  %c = f32[1,4,4,16]{3,2,1,0} convolution(%x, %k), WINDOW
  ROOT %f = f32[] fusion(%c), kind=kLoop, calls=%silu
}
""".replace("WINDOW", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f")


def test_what_a_cpu_pays():
    peak = Peaks(
        flops=1e6, hbm=1e12, ici=1, dcn=1, plain=1e4, functions=1e3, windows=1e5, start=0.5
    )._replace(argument=0.02, result=0.3)
    found = step_time.predict(CPU, peak)
    assert found.products == pytest.approx(0.5 + 36864 / 1e6 + 16 * 72 / 1e5)
    calling = 2 * 0.02 + 0.3
    assert found.others == pytest.approx(0.5 + 3 * 256 / 1e4 + 256 / 1e3 + calling, rel=1e-4)


def downsampled_and_back(x, down, up, dense):
    """A strided convolution, a transposed one (dilated input), and a product over channels."""
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, down, (2, 2), "SAME", dimension_numbers=dims)
    h = jax.lax.conv_transpose(h, up, (2, 2), "SAME", dimension_numbers=dims)
    return jnp.sum(jnp.tanh(h @ dense))


def test_flops_of_a_compiled_gradient_equal_those_traced():
    shapes = ((2, 16, 16, 8), (3, 3, 8, 12), (4, 4, 12, 8), (8, 24))
    arguments = [jnp.ones(shape) for shape in shapes]
    step = jax.jit(jax.grad(downsampled_and_back, argnums=(0, 1, 2, 3)))
    traced = step.trace(*arguments)
    program = instructions.parse(traced.lower().compile().as_text())
    entry = program.computations[program.entry]
    results = {one.name: one.result for one in entry}
    compiled = sum(instructions.flops(one, program, results) for one in entry)
    # XLA merges or transposes products, which changes what is padding by a few taps.
    assert compiled == pytest.approx(flops.count(traced.jaxpr), rel=0.02)


def test_peaks():
    assert peaks.of("TPU v5 lite") == Peaks(197e12, 819e9, 50e9, 3.125e9, 16)
    assert peaks.of("cpu") is None
    for kind in peaks._BANDWIDTHS:
        assert peaks.of(kind).flops == peaks.peak_flops(kind)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_positions_of_a_compiled_program():
    """Groups of 4 chips are squares of a slice of 2x4: two axes with one link each, two hops."""
    where = topology.open_slice("v5e-8")
    mesh = partitioning.make_mesh(MeshConfig(fsdp=4), where.devices)
    rows, parts = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("data", "fsdp"), "fsdp"))
    x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16, sharding=rows)
    y = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16, sharding=parts)
    run = jax.jit(jnp.dot, out_shardings=rows).lower(x, y).compile(plan.QUICK)
    devices = plan._mesh_devices(run)
    assert list(devices) == list(mesh.devices.flat)
    found = step_time.of_slice(run.as_text(), where, devices, 1, where.hbm // 2)
    gathered = 3 / 4 * 1024 * 2048 * 2
    assert found.exposed == pytest.approx(gathered / (2 * 50e9) + 2e-6)


def test_results_ahead_have_half_of_the_free_memory(monkeypatch):
    seen = []
    monkeypatch.setattr(step_time, "predict", lambda *_, ahead, **__: seen.append(ahead))
    chip = SimpleNamespace(device_kind="TPU v4")
    where = topology.Slice("v4-16", [chip] * 8, 8, 32 * 2**30)
    for used in (20 * 2**30, 40 * 2**30):
        step_time.of_slice("", where, (), 1, used)
    assert seen == [6 * 2**30, 0.0]


def beside(collectives: str, ahead: float = 1e9) -> float:
    """Exposed seconds, if collectives run beside other operations, of a program with a product.

    The product takes 10 ms. An all-gather to 4 MB takes 15.002 ms.
    """
    text = f"""HloModule beside, is_scheduled=true

ENTRY %main (w: f32[250000], v: f32[250000], x: f32[1000,5000], y: f32[5000,1000]) -> f32[] {{
  %w = f32[250000]{{0:S(1)}} parameter(0)
  %v = f32[250000]{{0:S(1)}} parameter(1)
  %x = f32[1000,5000]{{1,0:S(1)}} parameter(2)
  %y = f32[5000,1000]{{1,0:S(1)}} parameter(3)
  %product = f32[1000,1000]{{1,0:S(1)}} dot(%x, %y), lhs_contracting_dims={{1}}
{collectives}
  ROOT %end = f32[]{{:S(1)}} constant(0)
}}
"""
    return step_time.predict(text, PEAK, devices=4, ahead=ahead).exposed_beside


def gather(name: str, operand: str) -> str:
    groups = "replica_groups={{0,1,2,3}}, dimensions={0}"
    return f"  %{name} = f32[1000000]{{0}} all-gather(%{operand}), channel_id=1, {groups}\n"


def use(name: str, operand: str) -> str:
    return f"  %{name} = f32[]{{:S(1)}} copy(%{operand})\n"


def test_a_collective_beside_what_does_not_need_it():
    assert beside(gather("g", "w") + use("u", "g")) == pytest.approx(5.002e-3)


def test_a_collective_of_what_is_computed_waits_for_it():
    name = "  %flat = f32[250000]{0:S(1)} bitcast(%product)\n"
    program = name + gather("g", "flat") + use("u", "g")
    assert beside(program) == pytest.approx(15.002e-3)


def test_a_collective_whose_result_nothing_uses_ends_with_the_program():
    assert beside(gather("g", "w")) == pytest.approx(5.002e-3)


def test_collectives_ahead_have_limited_room():
    """Two that the product does not need; their uses read 4 MB each, 4 ms."""
    two = gather("g", "w") + use("u", "g") + gather("h", "v") + use("t", "h")
    # With room for both the links work for 30.004 ms at once, the device 10 + 4 ms meanwhile.
    assert beside(two) == pytest.approx(30.004e-3 - 14e-3)
    # With room for one the second starts after the use of the first, at 19.002 ms.
    assert beside(two, ahead=4e6) == pytest.approx(5.002e-3 + 15.002e-3)
    # One that is larger than the room starts where it is compiled.
    assert beside(two, ahead=3e6) == pytest.approx(15.002e-3 + 15.002e-3)


def more(name: str) -> str:
    """A product of 10 ms that needs no collective."""
    return f"  %{name} = f32[1000,1000]{{1,0:S(1)}} dot(%x, %y), lhs_contracting_dims={{1}}\n"


def test_what_follows_a_deferred_operation_runs_before_it():
    program = gather("g", "w") + use("u", "g") + more("next")
    # The product before and the one after take 20 ms, the all-gather 15.002.
    assert beside(program) == 0.0
    # The use of the use is deferred with it.
    again = gather("g", "w") + use("u", "g") + "  %v2 = f32[] add(%u, %u)\n" + more("next")
    assert beside(again) == 0.0
    # What runs is used up: three all-gathers and two products.
    three = gather("g", "w") + use("u", "g") + gather("h", "v") + use("t", "h") + more("next")
    assert beside(three) == pytest.approx(30.004e-3 - 24e-3)


def test_a_gradient_is_reduced_beside_the_next_one():
    """The slice of the reduced gradient follows it at once."""
    flat = "  %flat = f32[250000]{0:S(1)} bitcast(%product)\n"
    program = flat + gather("g", "flat") + use("u", "g") + more("next") + use("t", "next")
    # It starts after 10 ms; the next product and its use, which reads the chip, take 10 of 15.002.
    assert beside(program) == pytest.approx(5.002e-3)
    # Without room the device waits for it before the next collective alone.
    program += gather("h", "w") + use("s", "h")
    assert beside(program) == pytest.approx(30.004e-3 + 10e-3 - 24e-3)
    assert beside(program, ahead=4e6) == pytest.approx(5.002e-3 + 15.002e-3)


def test_beside_is_what_is_compiled_where_all_is_scheduled():
    found = step_time.predict(OVERLAPPED, PEAK, devices=8)
    # The all-reduce follows the all-gather on the links: 15.002 + 17.504 - 10 ms of the product.
    assert found.exposed_beside == pytest.approx(22.506e-3)
