"""`plan --search`: the largest batch that fits, over `model.remat` and accumulation.

Memory is nearly linear in images per device: two small compilations predict the largest batch, and
the result is verified by compiling it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from imagen_jax.config.schema import Config
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.memory import GIB
from imagen_jax.parallel.topology import Slice
from imagen_jax.planning.plan import Plan, Program, compile_program, train_program

REMATS = ("none", "blocks", "full")
MAX_IMAGES_PER_DEVICE = 1024  # End of the search.

Log = Callable[[str], None]


def largest_batch_per_device(plan_of: Callable[[int], Plan]) -> Plan:
    """The plan with the largest power of two of images per device that fits.

    Args:
      plan_of: images per device -> plan.

    Returns:
      That plan; the plan of one image if that does not fit.
    """
    best, part = plan_of(1), 1
    following = 2
    while best.fits and part < following <= MAX_IMAGES_PER_DEVICE:
        plan = plan_of(following)
        while not plan.fits and following // 2 > part:
            following //= 2
            plan = plan_of(following)
        if not plan.fits:
            break
        slope = max((plan.peak - best.peak) / (following - part), 1.0)
        room = following + (plan.slice.hbm - plan.peak) / slope
        best, part = plan, following
        while 2 * following <= min(room, MAX_IMAGES_PER_DEVICE):
            following *= 2
    return best


def search_batch(
    program_of: Callable[[int], Program], where: Slice, options: Mapping[str, Any], log: Log
) -> Plan:
    """The largest batch of a sampler or text encoder that fits.

    Args:
      program_of: batch -> program.
      where: the slice.
      options: compiler options.
      log: called with a line per compiled program.
    """
    log(f"{'batch':>8}{'peak GiB':>10}")

    def plan_of(part: int) -> Plan:
        plan = compile_program(program_of(part * len(where.devices)), where, options)
        log(f"{plan.program.batch:>8}{plan.peak / GIB:>10.2f}{_verdict(plan)}")
        return plan

    return largest_batch_per_device(plan_of)


def search_train(config: Config, where: Slice, options: Mapping[str, Any], log: Log) -> Plan:
    """How to train with the batch size of `config`, and the largest batch that fits.

    For each `model.remat`: the largest batch without accumulation, then the smallest accumulation
    with which `data.batch_size` fits.

    Args:
      config: the stage.
      where: the slice.
      options: compiler options.
      log: called with a line per compiled program.

    Returns:
      The plan for `data.batch_size` with the fewest FLOPs of those that fit; if none fits, the plan
      with the lowest peak.
    """
    batch_size = config.data.batch_size
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    partitioning.check_batch_size(batch_size, mesh)
    rows = partitioning.batch_devices(mesh)
    parts = batch_size // rows
    log(f"{'remat':<8}{'accumulation':>13}{'batch':>8}{'peak GiB':>10}{'TFLOP/chip':>12}")

    @functools.cache
    def plan_of(remat: str, accumulation: int, batch: int) -> Plan:
        candidate = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, accumulation=accumulation),
            data=dataclasses.replace(config.data, batch_size=batch),
        )
        plan = compile_program(train_program(candidate, where), where, options)
        log(
            f"{remat:<8}{accumulation:>13}{batch:>8}{plan.peak / GIB:>10.2f}"
            f"{plan.flops_per_chip / 1e12:>12.2f}{_verdict(plan)}"
        )
        return plan

    plans = []
    for remat in REMATS:
        largest = largest_batch_per_device(lambda part, remat=remat: plan_of(remat, 1, part * rows))
        for accumulation in range(1, parts + 1):
            divides = parts % accumulation == 0
            if divides and batch_size <= accumulation * largest.program.batch:
                plans.append(plan_of(remat, accumulation, batch_size))
                if plans[-1].fits:
                    break
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak)
    return min(
        fitting, key=lambda plan: (plan.program.flops, plan.program.config.train.accumulation)
    )


def _verdict(plan: Plan) -> str:
    return "" if plan.fits else "  does not fit"
