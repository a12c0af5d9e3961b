"""`plan --search`: the largest batch that fits, over what is computed again and accumulation.

Memory grows with the pictures per device along nearly a straight line, so that two small programs
tell how far one can go; the answer is compiled, never only predicted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from imagen_jax.config.schema import Config
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.topology import GIB, Slice
from imagen_jax.planning.plan import Plan, Program, compile_program, train_program

REMATS = ("none", "blocks", "full")
MOST = 1024  # pictures per device: where the search ends

Log = Callable[[str], None]


def largest_batch_per_device(plan_of: Callable[[int], Plan]) -> Plan:
    """The plan with the largest power of two of pictures per device that fits.

    Args:
      plan_of: pictures per device -> plan.

    Returns:
      That plan; where not even one picture fits, the plan of that.
    """
    best, part = plan_of(1), 1
    following = 2
    while best.fits and part < following <= MOST:
        plan = plan_of(following)
        while not plan.fits and following // 2 > part:
            following //= 2
            plan = plan_of(following)
        if not plan.fits:
            break
        slope = max((plan.peak - best.peak) / (following - part), 1.0)
        room = following + (plan.slice.hbm - plan.peak) / slope
        best, part = plan, following
        while 2 * following <= min(room, MOST):
            following *= 2
    return best


def search_batch(
    program_of: Callable[[int], Program], where: Slice, options: Mapping[str, Any], log: Log
) -> Plan:
    """The largest batch of a sampler or text encoder that fits.

    Args:
      program_of: batch -> program.
      where: the slice.
      options: of the compiler.
      log: receives a line per compiled program.
    """
    log(f"{'batch':>8}{'peak GiB':>10}")

    def plan_of(part: int) -> Plan:
        plan = compile_program(program_of(part * len(where.devices)), where, options)
        log(f"{plan.program.batch:>8}{plan.peak / GIB:>10.2f}{_verdict(plan)}")
        return plan

    return largest_batch_per_device(plan_of)


def search_train(config: Config, where: Slice, options: Mapping[str, Any], log: Log) -> Plan:
    """How to train with the batch of `config`, and how much larger it could be.

    For each kind of `model.remat`: the largest batch without accumulation, then the least
    accumulation with which `data.batch_size` fits.

    Args:
      config: the stage.
      where: the slice.
      options: of the compiler.
      log: receives a line per compiled program.

    Returns:
      Of the plans for `data.batch_size` that fit the one that computes least; if none fits, the one
      that comes nearest.
    """
    wanted = config.data.batch_size
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    partitioning.check_batch_size(wanted, mesh)
    rows = partitioning.batch_devices(mesh)
    parts = wanted // rows
    log(f"{'remat':<8}{'accumulation':>13}{'batch':>8}{'peak GiB':>10}{'TFLOP/chip':>12}")

    @functools.cache
    def plan_of(remat: str, accumulation: int, batch: int) -> Plan:
        tried = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, accumulation=accumulation),
            data=dataclasses.replace(config.data, batch_size=batch),
        )
        plan = compile_program(train_program(tried, where), where, options)
        log(
            f"{remat:<8}{accumulation:>13}{batch:>8}{plan.peak / GIB:>10.2f}"
            f"{plan.flops_per_chip / 1e12:>12.2f}{_verdict(plan)}"
        )
        return plan

    answers = []
    for remat in REMATS:
        largest = largest_batch_per_device(lambda part, remat=remat: plan_of(remat, 1, part * rows))
        for accumulation in range(1, parts + 1):
            divides = parts % accumulation == 0
            if divides and wanted <= accumulation * largest.program.batch:
                answers.append(plan_of(remat, accumulation, wanted))
                if answers[-1].fits:
                    break
    fitting = [plan for plan in answers if plan.fits]
    if not fitting:
        return min(answers, key=lambda plan: plan.peak)
    return min(
        fitting, key=lambda plan: (plan.program.flops, plan.program.config.train.accumulation)
    )


def _verdict(plan: Plan) -> str:
    return "" if plan.fits else "  does not fit"
