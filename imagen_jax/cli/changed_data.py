"""Data that changed since a run was trained: says what changed, and how to go on with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.index import changes
from imagen_jax.data.sources.records import AnySource
from imagen_jax.parallel import distributed
from imagen_jax.training.checkpoint import Checkpoints

FIELD = "data.fingerprint"  # Differs where the records differ.


def check(
    config: Config,
    source: AnySource,
    workdir: str,
    allowed: Collection[str],
    log: Callable[[str], None] = print,
) -> None:
    """Logs what changed in the data since the newest checkpoint.

    Args:
      config: of the run.
      source: its data.
      workdir: folder of the run; it may have no checkpoint yet.
      allowed: fields that may differ from the checkpoint's.
      log: called in the first process.

    Raises:
      ConfigError: the change is not allowed, or no step is left to train on the changed data.
    """
    saved = _newest(workdir, config)
    if saved is None or saved[1].data.records in ("", source.fingerprint):
        return
    step, before = saved
    found = changes.since(source, before.data.records)
    what = f"the data changed since step {step} of {workdir}: " + (
        str(found) if found else f"{len(source):,} images now, the index of then is gone"
    )
    fields = [FIELD]
    flags = ""
    if step >= config.train.steps:
        fields.append("train.steps")
        flags = f" --config.train.steps={2 * step}"
    missing = [name for name in fields if not overrides.matches_any_field(name, allowed)]
    if before.data.caption_lines and not config.data.caption_lines:
        flags += " (captions were read by line before: --config.data.caption_lines=true)"
    if missing or flags.startswith(" --"):
        raise ConfigError(
            f"{what}; to go on with it, compute the embeddings of new captions (`embed`) and add "
            f"--allow_changes={','.join(fields)}{flags}; or start a new --workdir"
        )
    if distributed.is_first():
        log(what)


def check_lines(config: Config, workdir: str, allowed: Collection[str]) -> None:
    """Names the field of runs that read text files by line, before there was a choice.

    Args:
      config: of the run, with the fingerprint of its data.
      workdir: folder of the run; it may have no checkpoint yet.
      allowed: fields that may differ from the checkpoint's.

    Raises:
      ConfigError: the data differ from the checkpoint's, and the field may be the reason.
    """
    saved = _newest(workdir, config)
    if saved is None or saved[1].data.records or overrides.matches_any_field(FIELD, allowed):
        return
    before = saved[1].data
    differs = before.fingerprint and before.fingerprint != config.data.fingerprint
    if differs and before.caption_lines and not config.data.caption_lines:
        raise ConfigError(
            f"config.data.caption_lines=False, but {workdir} was trained with a caption per line "
            "of a text file; add --config.data.caption_lines=true, or start a new --workdir"
        )


def _newest(workdir: str, config: Config) -> tuple[int, Config] | None:
    """Step and configuration of the newest checkpoint."""
    if not os.path.isdir(os.path.join(workdir, "checkpoints")):
        return None
    checkpoints = Checkpoints(workdir, config.checkpoint, access="read")
    step = checkpoints.latest_step()
    return None if step is None else (step, checkpoints.restore_config(step))
