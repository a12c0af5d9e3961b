"""Parts of the parameters: which are trained, and at which multiple of the learning rate.

The state holds all parameters; gradient, optimizer slots and averages have the trained ones alone.
Patterns are those of `stages.parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.interop.weights import flatten, unflatten
from imagen_jax.stages import lora
from imagen_jax.stages.parameters import matches, select


def patterns(config: Config) -> tuple[str, ...]:
    """The patterns of the trained parameters: `train.trainable`, or those of a LoRA; (): all."""
    own = (lora.GROUP,) if config.lora.rank else ()
    return config.train.trainable or own


def multiply_updates(multipliers: Sequence[str]) -> optax.GradientTransformation:
    """Multiplies the updates of parameters by `optimizer.multipliers`; the last match counts.

    Raises:
      ConfigError: an entry has not the form PATTERN=FACTOR.
    """
    factors = [_read(text) for text in multipliers]

    def factor(path: str) -> float:
        found = [value for pattern, value in factors if matches(path, pattern)]
        return found[-1] if found else 1.0

    def update(updates: Any, params: Any) -> Any:
        del params
        return unflatten({path: u * factor(path) for path, u in flatten(updates).items()})

    return optax.stateless(update)


def _read(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern or not 0.0 <= value < float("inf"):
        raise ConfigError(
            f"config.optimizer.multipliers has {text!r}, must be PATTERN=FACTOR with a factor "
            "of at least 0, such as 'text_*=0.1'"
        )
    return pattern, value


def log_trained(config: Config, params: Any, log: Callable[[str], None]) -> None:
    """Checks the patterns of a run, and logs how much is trained, unless it is everything.

    Args:
      config: of the run.
      params: arrays or shapes of the network.
      log: called with one line.

    Raises:
      ConfigError: a pattern matches no parameter, or a frozen one is given a learning rate.
    """
    flat = flatten(params)
    trained = flatten(select(params, patterns(config)))
    checked = [("train.trainable", p, flat) for p in config.train.trainable]
    rates = [_read(text)[0] for text in config.optimizer.multipliers]
    checked += [("optimizer.multipliers", p, trained) for p in rates]
    for field, pattern, names in checked:
        if not any(matches(name, pattern) for name in names):
            groups = sorted({name.split("/")[0] for name in names})
            raise ConfigError(
                f"config.{field}: {pattern!r} matches no trained parameter; they are in "
                f"{', '.join(groups)}"
            )
    count, total = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (trained, flat))
    if count < total:
        log(f"{count:,} of {total:,} parameters are trained")
