"""The nearest settings with which a train step fits, where it does not as configured.

Tried in this order, each as little as fits: `model.remat` costs FLOPs; `train.accumulation` costs
communication, and is none without `mesh.fsdp`; a greater `mesh.fsdp` shards the state over more
devices; a smaller `data.batch_size` trains something else, and is tried only where nothing before
it fits. Every setting that is named was compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.parallel.memory import GIB
from imagen_jax.planning.plan import Plan
from imagen_jax.planning.search import REMATS

CompilePlan = Callable[[Config], Plan]


class Change(NamedTuple):
    """A changed setting and the plan with it; `field` as after --config."""

    field: str
    value: str | int
    plan: Plan

    def __str__(self) -> str:
        return f"--config.{self.field}={self.value}"

    def as_json(self) -> dict[str, Any]:
        """The setting, bytes and FLOPs, as `--json` writes them."""
        flops = self.plan.flops_per_chip
        field = {"field": self.field, "value": self.value}
        return {**field, "peak": self.plan.peak, "flops_per_chip_step": flops}


def report(changes: list[Change]) -> list[str]:
    """A line for each setting with which the step fits, with its memory and FLOPs."""
    if not changes:
        return ["", "no single setting suffices; combine them (--search), or take a larger slice"]
    lines = ["", f"{'fits with':<34}{'peak GiB':>10}{'TFLOP per chip':>16}"]
    return lines + [
        f"  {change!s:<32}{change.plan.peak / GIB:>10.2f}{change.plan.flops_per_chip / 1e12:>16.4g}"
        for change in changes
    ]


def nearest(plan: Plan, compile_plan: CompilePlan, log: Callable[[str], None]) -> list[Change]:
    """The settings, one changed at a time, with which the train step of `plan` fits.

    Args:
      plan: of a train step that does not fit.
      compile_plan: configuration -> plan on the same slice.
      log: called with a line per compiled program.

    Returns:
      At most one change of each kind, in the order of the module; [] if no single one suffices.
    """

    def smallest(candidates: Iterator[tuple[str, str | int, Config]]) -> Change | None:
        for field, value, config in candidates:
            try:
                change = Change(field, value, compile_plan(config))
            except ConfigError:  # This mesh cannot have it.
                continue
            fits = "fits" if change.plan.fits else "does not fit"
            log(f"  {change}: {change.plan.peak / GIB:.2f} GiB, {fits}")
            if change.plan.fits:
                return change
        return None

    log("\nother settings, one changed at a time:")
    found = [smallest(kind(plan)) for kind in (_remats, _accumulations, _fsdps)]
    fitting = [change for change in found if change]
    smaller = None if fitting else smallest(_batches(plan))
    return [smaller] if smaller else fitting


def _remats(plan: Plan) -> Iterator[tuple[str, str, Config]]:
    config = plan.program.config
    for remat in REMATS[REMATS.index(config.model.remat) + 1 :]:
        model = dataclasses.replace(config.model, remat=remat)
        yield "model.remat", remat, dataclasses.replace(config, model=model)


def _accumulations(plan: Plan) -> Iterator[tuple[str, int, Config]]:
    config = plan.program.config
    images = config.data.batch_size // _rows(plan)
    for parts in _fewest_first(images, config.train.accumulation, _factor(plan)):
        train = dataclasses.replace(config.train, accumulation=parts)
        yield "train.accumulation", parts, dataclasses.replace(config, train=train)


def _fsdps(plan: Plan) -> Iterator[tuple[str, int, Config]]:
    """Greater degrees, where sharding the arguments further saves as much as is missing."""
    config = plan.program.config
    devices = len(plan.slice.devices) // plan.slice.slices
    missing, now = plan.peak - plan.slice.hbm, config.mesh.fsdp
    if config.mesh.data != -1:
        return
    for fsdp in _divisors(devices // config.mesh.tensor):
        if fsdp > now and plan.arguments * (1 - now / fsdp) >= missing:
            mesh = dataclasses.replace(config.mesh, fsdp=fsdp)
            yield "mesh.fsdp", fsdp, dataclasses.replace(config, mesh=mesh)


def _batches(plan: Plan) -> Iterator[tuple[str, int, Config]]:
    config, rows = plan.program.config, _rows(plan)
    step = rows * config.train.accumulation
    images = config.data.batch_size // step
    for parts in _fewest_first(images, 1, _factor(plan)):
        size = images // parts * step
        data = dataclasses.replace(config.data, batch_size=size)
        yield "data.batch_size", size, dataclasses.replace(config, data=data)


def _rows(plan: Plan) -> int:
    """Devices over which the batch is sharded."""
    return len(plan.slice.devices) // plan.program.config.mesh.tensor


def _factor(plan: Plan) -> float:
    """By how much the temporaries must shrink; they are nearly linear in images at a time."""
    room = plan.slice.hbm - plan.arguments
    return plan.temporaries / room if room > 0 else float("inf")


def _fewest_first(images: int, now: int, factor: float) -> Iterator[int]:
    """Divisors of `images` above `now`, from the first that promises enough on."""
    return (n for n in _divisors(images) if n > now and n >= now * min(factor, images / now))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
