"""A plan as text: memory, FLOPs, communication, time and cost."""

from __future__ import annotations

from typing import NamedTuple

from imagen_jax.parallel.memory import GIB
from imagen_jax.parallel.peaks import peak_flops
from imagen_jax.planning.plan import Plan
from imagen_jax.planning.step_time import StepTime

UNITS = {"train": "image", "sample": "image", "embed": "caption"}
WHAT = {"train": "train step", "sample": "sampler", "embed": "text encoder"}


ASSUMED_MFU = 0.4  # Of chips whose bandwidths are unknown.


class Estimate(NamedTuple):
    """Time and cost.

    Attributes:
      seconds: duration of one run of the program.
      rate: images (captions) per second, over all chips.
      days: duration of the training run; None for the other kinds.
      chip_hours: of the training run, of 1000 images, or of a million captions.
      cost: of these chip-hours; None without a price.
    """

    seconds: float
    rate: float
    days: float | None
    chip_hours: float
    cost: float | None


def estimate(plan: Plan, mfu: float | None, price: float | None) -> Estimate | None:
    """Time and cost; None if the chip's peak FLOP/s is unknown.

    Args:
      plan: of one program.
      mfu: model FLOPs as a share of the chips' peak, 0..1, recomputation not counted; None for the
        predicted time, or ASSUMED_MFU where there is none.
      price: cost of a chip-hour.
    """
    peak = peak_flops(plan.slice.devices[0].device_kind)
    if peak is None:
        return None
    program = plan.program
    if mfu is None and plan.time is not None:
        seconds = plan.time.seconds
    else:
        share = ASSUMED_MFU if mfu is None else mfu
        seconds = program.model_flops / (share * peak * len(plan.slice.devices))
    if program.kind == "train":
        days = program.config.train.steps * seconds / 86_400
        chip_hours = days * 24 * plan.slice.chips
    else:
        days = None
        count = 1e3 if program.kind == "sample" else 1e6
        chip_hours = count / program.batch * seconds * plan.slice.chips / 3600
    cost = None if price is None else price * chip_hours
    return Estimate(seconds, program.batch / seconds, days, chip_hours, cost)


def report(plan: Plan, mfu: float | None, price: float | None) -> str:
    """The plan as a page of text; arguments as those of `estimate`."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_work(plan, mfu, price)])


def _head(plan: Plan) -> list[str]:
    program, where = plan.program, plan.slice
    config, devices = program.config, len(where.devices)
    each = program.batch / where.chips
    lines = [
        f"{config.name}: {WHAT[program.kind]} on {where.name}, "
        f"{where.chips} chips of {where.devices[0].device_kind}"
        + (f" ({devices} devices)" if devices != where.chips else ""),
        f"{program.params:,} parameters; {program.batch} {UNITS[program.kind]}s at a time, "
        f"{each:g} per chip",
    ]
    if program.kind != "sample":
        mesh = config.mesh
        data = devices // (mesh.fsdp * mesh.tensor) if mesh.data == -1 else mesh.data
        lines.append(f"mesh data={data} fsdp={mesh.fsdp} tensor={mesh.tensor}")
    if program.kind == "train":
        lines.append(f"remat={config.model.remat}, accumulation={config.train.accumulation}")
    elif program.kind == "embed":
        lines.append(f"{config.text.preset} in {config.text.dtype}, {config.text.max_len} tokens")
    else:
        settings = config.sampling
        lines.append(
            f"{settings.steps} steps of {settings.sampler}, guidance {settings.guidance_weight:g}"
        )
    return lines


def _memory(plan: Plan) -> list[str]:
    capacity = plan.slice.hbm
    rows = [
        ("arguments", plan.arguments),
        ("temporaries", plan.temporaries),
        ("results, code", plan.outputs + plan.code),
        ("peak", plan.peak),
        ("capacity", capacity),
        ("headroom", capacity - plan.peak),
    ]
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    return [
        f"{'HBM per chip':<22}{'GiB':>10}",
        *(f"  {name:<20}{size / GIB:>10.2f}" for name, size in rows),
        f"  {verdict}",
    ]


def _work(plan: Plan, mfu: float | None, price: float | None) -> list[str]:
    program, chips = plan.program, plan.slice.chips
    unit = UNITS[program.kind]
    again = program.flops / program.model_flops - 1
    lines = [
        f"{'TFLOP per chip':<22}{plan.flops_per_chip / 1e12:>10.4g}   "
        f"{program.model_flops / program.batch / 1e12:.3g} per {unit}"
        + (f", and {again:.0%} more by recomputation" if again > 0.005 else "")
    ]
    if plan.collectives:
        for network, label in (("ici", "sent, per chip"), ("dcn", "sent between slices")):
            rows = [c for c in plan.collectives if c.network == network]
            if rows:
                lines += ["", f"{label:<22}{'GiB':>10}   operations"]
                lines += [f"  {c.kind:<20}{c.bytes / GIB:>10.4g}   {c.count}" for c in rows]
        if plan.sends:
            other = sum(s.count * s.bytes for s in plan.sends if not s.is_gradient)
            lines.append(f"  {'not gradients':<20}{other / GIB:>10.4g}   {other:,} bytes")
    guess = estimate(plan, mfu, price)
    if guess is None:
        return [*lines, "", "no time: the peak FLOP/s of this device is unknown"]
    predicted = plan.time if mfu is None else None
    lines += [
        "",
        f"at {mfu or ASSUMED_MFU:.0%} MFU" if predicted is None else "predicted",
    ]
    lines += [
        f"  {'seconds':<20}{guess.seconds:>10.3g}   "
        f"{guess.rate:,.4g} {unit}s/s, {guess.rate / chips:,.4g} per chip",
    ]
    if predicted is not None:
        lines += _shares(plan, predicted)
    if guess.days is not None:
        whole = f"{program.config.train.steps:,} steps"
        lines.append(f"  {'days':<20}{guess.days:>10.1f}   {whole}")
    else:
        whole = "1000 images" if program.kind == "sample" else "a million captions"
    hours = f"{guess.chip_hours:,.0f}" if guess.chip_hours >= 100 else f"{guess.chip_hours:.3g}"
    lines.append(f"  {'chip-hours':<20}{hours:>10}   {whole}")
    if guess.cost is not None:
        cost = f"{guess.cost:,.0f}" if guess.cost >= 100 else f"{guess.cost:.3g}"
        lines.append(f"  {'cost':<20}{cost:>10}   at {price:g} per chip-hour")
    return lines


def _shares(plan: Plan, time: StepTime) -> list[str]:
    """What the predicted time consists of."""
    peak = peak_flops(plan.slice.devices[0].device_kind)
    assert peak is not None
    mfu = plan.program.model_flops / (time.seconds * peak * len(plan.slice.devices))
    parts = [
        ("MFU", mfu, ""),
        ("products", time.products / time.seconds, "convolutions and matrix products"),
        ("other operations", time.others / time.seconds, ""),
        ("communication", time.exposed / time.seconds, f"exposed; {time.hidden:.3g} s are hidden"),
    ]
    if time.exposed_beside < time.exposed:
        whole = time.seconds_beside
        note = f"exposed where each collective runs beside others: {whole:.3g} s in all"
        note += f", products {time.products / whole:.0%}"
        parts.append(("", time.exposed_beside / whole, note))
    lines = [f"  {name:<20}{share:>10.0%}   {note}".rstrip() for name, share, note in parts]
    if time.between_slices:
        lines.append(f"  {'between slices, s':<20}{time.between_slices:>10.3g}   taken as hidden")
    return lines
