"""Ranges of the numeric fields: the only place that says which numbers a field accepts.

`Config` checks itself against the table, so a value out of range fails before anything is computed,
wherever it comes from: a file, an override or a saved run. NaN and infinities are refused in every
field. Relations between fields are checked by their sections; so is the section `sampling`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from imagen_jax.config.fields import ConfigError


class Bound(NamedTuple):
    """A range of numbers.

    Attributes:
      low, high: the ends.
      open_low, open_high: whether the end itself is excluded.
      also: a value outside the range with a meaning of its own.
    """

    low: int | float
    high: int | float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: int | float | None = None

    def holds(self, value: int | float) -> bool:
        """Whether the range includes `value`."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return value == self.also or (above and below)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.open_high else f"at most {self.high:.10g}"
        also = "" if self.also is None else f", or {self.also:g}"
        return low + (f" and {high}" if self.high < math.inf else "") + also


_COUNT, _NATURAL = Bound(1), Bound(0)
_POSITIVE = Bound(0, open_low=True)
_SHARE = Bound(0, 1)
_DECAY = Bound(0, 1, open_high=True)
_AXIS = Bound(1, also=-1)

BOUNDS: dict[str, Bound] = {
    "seed": Bound(0, 2**32 - 1),
    "data.min_size": _NATURAL,
    "data.max_quarantined": _SHARE,
    "data.mixture.*.min_size": _NATURAL,
    "data.mixture.*.max_quarantined": _SHARE,
    "data.held_out": _DECAY,
    "data.image_size": _COUNT,
    "data.lowres_size": _NATURAL,
    "data.crop_from": _NATURAL,
    "data.batch_size": _COUNT,
    "data.max_text_len": _COUNT,
    "data.prefetch": _NATURAL,
    "data.reads": _COUNT,
    "text.max_len": Bound(2),
    "pretrain_text.vocab_size": _COUNT,
    "pretrain_text.emb_dim": _COUNT,
    "pretrain_text.num_layers": _NATURAL,
    "pretrain_text.num_heads": _COUNT,
    "pretrain_text.mlp_dim": _COUNT,
    "pretrain_text.steps": _COUNT,
    "pretrain_text.batch_size": _COUNT,
    "pretrain_text.learning_rate": _POSITIVE,
    "pretrain_text.context": _COUNT,
    "pretrain_text.max_groups": _COUNT,
    "embed.unit_size": _COUNT,
    "embed.patience": _POSITIVE,
    "model.channels": _COUNT,
    "model.num_res_blocks": _NATURAL,
    "model.pooling_heads": _COUNT,
    "model.text_width": _NATURAL,
    "model.residual_divisor": _POSITIVE,
    "model.head_dim": _COUNT,
    "model.num_groups": _COUNT,
    "model.patch_size": _COUNT,
    "model.embed_dim": _NATURAL,
    "model.skip_scale": _POSITIVE,
    "model.dropout": _DECAY,
    "model.text_dim": _NATURAL,
    "model.out_channels": Bound(3),
    "lora.rank": _NATURAL,
    "lora.alpha": _POSITIVE,
    "diffusion.cond_drop_prob": _SHARE,
    "diffusion.text_noise": _NATURAL,
    "diffusion.vlb_weight": _NATURAL,
    "diffusion.aug_level_max": _SHARE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _NATURAL,
    "optimizer.decay_fraction": _SHARE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _NATURAL,
    "optimizer.weight_decay": _NATURAL,
    "optimizer.clip_norm": _NATURAL,
    "ema.decay": _SHARE,
    "ema.warmup_power": _POSITIVE,
    "ema.profiles": Bound(0, 0.28, open_low=True, open_high=True),
    "ema.snapshot_every": _NATURAL,
    "train.steps": _COUNT,
    "train.accumulation": _COUNT,
    "train.nan_patience": _COUNT,
    "train.spike_factor": Bound(1, open_low=True),
    "train.rollbacks": _NATURAL,
    "train.hang_timeout": _NATURAL,
    "train.heartbeat_timeout": _COUNT,
    "train.checksum_every": _NATURAL,
    "train.profile_at": _NATURAL,
    "train.log_every": _COUNT,
    "train.sample_every": _NATURAL,
    "evaluate.every": _NATURAL,
    "evaluate.examples": _COUNT,
    "checkpoint.every": _COUNT,
    "checkpoint.keep": _COUNT,
    "checkpoint.keep_every": _NATURAL,
    "checkpoint.keep_best": _NATURAL,
    "checkpoint.grace": _POSITIVE,
    "mesh.data": _AXIS,
    "mesh.fsdp": _COUNT,
    "mesh.tensor": _COUNT,
    "mesh.dcn_data": _AXIS,
    "mesh.dcn_fsdp": _COUNT,
    "mesh.cpu_devices": _COUNT,
}


def check(section: Any, name: str = "") -> None:
    """Checks every number of a configuration, or of one section before it computes with them.

    Args:
      section: a `schema.Config`, or a section of it.
      name: of the section; "": the whole configuration.

    Raises:
      ConfigError: a number is out of its range, NaN or infinite.
    """
    for path, row, value in _numbers(section, name, name):
        bound = BOUNDS.get(row)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{path}={value} must be a finite number")
        if bound is not None and not bound.holds(value):
            raise ConfigError(f"config.{path}={value} must be {bound}")


def _numbers(value: Any, path: str, row: str) -> Iterator[tuple[str, str, int | float]]:
    """(path, row of BOUNDS, number) of every number in a section, a dict of sections or a tuple."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path, row, value
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{path}[{index}]", row)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{path}.{name}", f"{row}.*")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            parts = (f"{prefix}.{field.name}".removeprefix(".") for prefix in (path, row))
            yield from _numbers(getattr(value, field.name), *parts)
