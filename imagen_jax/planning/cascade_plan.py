"""The plan of sampling with a whole cascade: text encoder, then every stage, on one slice.

The parameters are placed as `inference.placement` places them on one process with all devices of
the slice: together, or those of one network at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagen_jax.config.schema import Config
from imagen_jax.inference import placement
from imagen_jax.inference.cascade import TEXT_BATCH
from imagen_jax.inference.placement import Keep
from imagen_jax.parallel.memory import GIB
from imagen_jax.parallel.topology import Slice
from imagen_jax.planning.plan import (
    Plan,
    compile_program,
    embed_program,
    encoder_shape,
    sample_program,
)
from imagen_jax.stages.folder import check_chain


@dataclasses.dataclass(frozen=True)
class CascadePlan:
    """Plans of the programs of a cascade.

    Attributes:
      plans: of the text encoder and of each stage.
      params: bytes of the parameters of each, per chip.
      shards: chips that share the parameters of each, and an image.
      keep: whether "all" parameters are on the devices together, or those of "one" network.
      images: images of which FLOPs and communication are counted.
    """

    plans: Sequence[Plan]
    params: Sequence[int]
    shards: Sequence[tuple[int, int]]
    keep: Keep
    images: int

    @property
    def peak(self) -> int:
        """Bytes of HBM per chip at the maximum."""
        others = sum(self.params) if self.keep == "all" else 0
        own = [held if self.keep == "all" else 0 for held in self.params]
        return max(plan.peak + others - o for plan, o in zip(self.plans, own, strict=True))

    @property
    def fits(self) -> bool:
        where = self.plans[0].slice
        return all(plan.compiled is not None for plan in self.plans) and self.peak <= where.hbm

    def as_json(self) -> dict[str, Any]:
        """The numbers as `--json` writes them; those of the largest program, and all programs."""
        largest = max(self.plans, key=lambda plan: plan.peak)
        programs = [
            {"name": name, "batch": plan.program.batch, "fsdp": fsdp, "height": height}
            | plan.as_json()
            for name, plan, (fsdp, height) in zip(
                self.names(), self.plans, self.shards, strict=True
            )
        ]
        whole = largest.as_json()
        whole["hbm_per_chip"]["peak"] = self.peak
        kinds: dict[tuple[str, str], dict[str, Any]] = {}
        flops = 0.0
        for plan in self.plans:
            runs = self.images / plan.program.batch
            flops += plan.flops_per_chip * runs
            for c in plan.collectives or ():
                zeros = {**c._asdict(), "count": 0, "bytes": 0}
                row = kinds.setdefault((c.kind, c.network), zeros)
                row["count"] += round(c.count * runs)
                row["bytes"] += round(c.bytes * runs)
        return whole | {
            "params": sum(plan.program.params for plan in self.plans),
            "flops_per_chip_step": flops,
            "collectives": list(kinds.values()),
            "keep": self.keep,
            "fits": self.fits,
            "programs": programs,
        }

    def names(self) -> list[str]:
        """Of the programs."""
        first, *stages = self.plans
        return [first.program.config.text.preset, *(p.program.config.name for p in stages)]


def plan_cascade(
    configs: Sequence[Config],
    where: Slice,
    batch: int,
    options: Mapping[str, Any],
    log: Callable[[str], None],
) -> CascadePlan:
    """Plans the text encoder of the first stage and every stage.

    Args:
      configs: base first; `sampling` says how each is placed, `batch_size` its images at a time.
      where: the slice.
      batch: images at a time where `sampling.batch_size` is None.
      options: compiler options.
      log: called with a line per compiled program.

    Raises:
      ConfigError: `text.preset` is no encoder, or mesh or batch do not fit the slice.
      StageError: the stages do not follow from each other.
    """
    devices = where.as_devices()
    configs = [dataclasses.replace(c, data=c.data.uncropped()) for c in configs]
    check_chain(configs)
    encoder = encoder_shape(configs[0])
    configs = [placement.with_dtype(config, devices.platform) for config in configs]
    sizes = [placement.param_bytes(config) for config in configs]
    sizes.append(placement.encoder_bytes(encoder))
    keep = placement.choose_keep(sizes, devices)
    configs = placement.with_placement(configs, sizes, keep, devices)
    fsdp = placement.choose_fsdp(sizes[-1], sizes, keep, devices)
    programs = [embed_program(configs[0], where, max(TEXT_BATCH, devices.count), fsdp)]
    shards = [(fsdp, 1)]
    for config in configs:
        size = config.sampling.batch_size or batch
        programs.append(sample_program(config, where, size))
        shards.append((config.sampling.fsdp or 1, config.sampling.height))
    plans = []
    for program in programs:
        plans.append(compile_program(program, where, options))
        log(f"{plans[-1].program.kind} {plans[-1].peak / GIB:.2f} GiB")
    sizes = [sizes[-1], *sizes[:-1]]
    held = [size // share for size, (share, _) in zip(sizes, shards, strict=True)]
    return CascadePlan(plans, held, shards, keep, batch)


def report(plan: CascadePlan) -> str:
    """The plan as a page of text."""
    where = plan.plans[0].slice
    head = f"cascade on {where.name}, {where.chips} chips of {where.devices[0].device_kind}"
    how = {"all": "all parameters stay on the chips", "one": "one network at a time (keep=one)"}
    lines = [
        head,
        how[plan.keep],
        "",
        f"{'GiB per chip':<16}{'batch':>8}{'fsdp':>6}{'height':>8}"
        f"{'arguments':>11}{'temporaries':>13}{'peak':>8}",
    ]
    for name, each, (fsdp, height) in zip(plan.names(), plan.plans, plan.shards, strict=True):
        lines.append(
            f"{name:<16}{each.program.batch:>8}{fsdp:>6}{height:>8}{each.arguments / GIB:>11.2f}"
            f"{each.temporaries / GIB:>13.2f}{each.peak / GIB:>8.2f}"
        )
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    return "\n".join(
        [*lines, "", f"{'peak':<16}{plan.peak / GIB:>8.2f} of {where.hbm / GIB:.2f}: {verdict}"]
    )
