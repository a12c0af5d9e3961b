"""Learning-rate schedule and optax optimizer of a run, from `config.optimizer`.

A rule is a row of RULES: a function and the fields of `OptimizerConfig` that it uses, with its own
defaults. A field that a rule does not use is refused when it is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config, OptimizerConfig
from imagen_jax.stages.network import with_defaults as with_network_defaults
from imagen_jax.training.trainable import multiply_updates

# Fields that only some rules or schedules use: their value without effect, and the default of
# configurations saved before it was None.
_SPECIFIC: dict[str, tuple[Any, ...]] = {
    "b1": (None, 0.9),
    "b2": (None, 0.999),
    "eps": (None, 1e-8),
    "weight_decay": (0.0,),
    "multiply_by_parameter_scale": (False,),
    "decay_fraction": (None, 0.3),
}


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then `config.schedule`; maps step to learning rate.

    Args:
      config: peak rate, warm-up steps and schedule.
      total_steps: length of the run; `cosine` and `linear_tail` reach zero there.

    Raises:
      ConfigError: no such schedule.
    """
    config = with_rule_defaults(config)
    warmup = min(config.warmup_steps, total_steps)
    after = SCHEDULES[config.schedule].make(config, warmup, total_steps)
    warm = optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1))
    return optax.join_schedules([warm, after], [warmup])


def _constant(config: OptimizerConfig, warmup: int, total_steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


def _cosine(config: OptimizerConfig, warmup: int, total_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, max(total_steps - warmup, 1))


def _linear_tail(config: OptimizerConfig, warmup: int, total_steps: int) -> optax.Schedule:
    rest = max(total_steps - warmup, 1)
    tail = min(max(int((config.decay_fraction or 0.0) * total_steps), 1), rest)
    return optax.linear_schedule(config.learning_rate, 0.0, tail, rest - tail)


def _rsqrt(config: OptimizerConfig, warmup: int, total_steps: int) -> optax.Schedule:
    start = max(warmup, 1)
    return lambda step: config.learning_rate * (start / (step + start)) ** 0.5


class Row(NamedTuple):
    """An update rule or a schedule.

    Attributes:
      make: makes it from the configuration.
      fields: the fields of `_SPECIFIC` that it uses, with its own defaults.
    """

    make: Callable[..., Any]
    fields: Mapping[str, Any]


SCHEDULES: dict[str, Row] = {
    "constant": Row(_constant, {}),
    "cosine": Row(_cosine, {}),
    "linear_tail": Row(_linear_tail, {"decay_fraction": 0.3}),
    "rsqrt": Row(_rsqrt, {}),
}


def _decay_weights(weight_decay: float) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the updates of kernels; norms and biases do not decay."""

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: u + weight_decay * p if p.ndim > 1 else u, updates, params)

    return optax.stateless(update)


def _adam(config: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(rate, config.b1, config.b2, config.eps)


def _adamw(config: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        _decay_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _adafactor(config: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    scale = config.multiply_by_parameter_scale
    if not config.weight_decay:
        return optax.adafactor(rate, multiply_by_parameter_scale=scale)
    # Without a rate, optax.adafactor returns minus the step; the decay is added to it.
    return optax.chain(
        optax.adafactor(None, multiply_by_parameter_scale=scale),
        _decay_weights(-config.weight_decay),
        optax.scale_by_schedule(rate),
    )


def _lion(config: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_lion(config.b1, config.b2),
        _decay_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


RULES: dict[str, Row] = {
    "adam": Row(_adam, {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
    "adamw": Row(_adamw, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
    "adafactor": Row(_adafactor, {"multiply_by_parameter_scale": False, "weight_decay": 0.0}),
    # arXiv:2302.06675, Sec. 4.1.
    "lion": Row(_lion, {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0}),
}


def with_rule_defaults(config: OptimizerConfig) -> OptimizerConfig:
    """The same with the rule's and the schedule's own values in place of None.

    Raises:
      ConfigError: no such rule or schedule, or a field is set that neither uses.
    """
    for field, name, rows in (
        ("name", config.name, RULES),
        ("schedule", config.schedule, SCHEDULES),
    ):
        if name not in rows:
            raise ConfigError(unknown_name(f"config.optimizer.{field}", name, list(rows)))
    used = {**RULES[config.name].fields, **SCHEDULES[config.schedule].fields}
    values: dict[str, Any] = {}
    for field, neutral in _SPECIFIC.items():
        value = getattr(config, field)
        if field in used:
            values[field] = used[field] if value is None else value
        elif value in neutral:
            values[field] = neutral[0]
        else:
            raise ConfigError(
                f"config.optimizer.{field}={value} is not used by {config.name!r} with the "
                f"schedule {config.schedule!r}; leave it at {neutral[0]}" + _users(field)
            )
    return dataclasses.replace(config, **values)


def _users(field: str) -> str:
    rows = [
        name for table in (RULES, SCHEDULES) for name, row in table.items() if field in row.fields
    ]
    return f", or choose {' or '.join(rows)}"


def with_defaults(config: Config) -> Config:
    """The configuration with the defaults of its network, rule and schedule filled in."""
    optimizer = with_rule_defaults(config.optimizer)
    return dataclasses.replace(with_network_defaults(config), optimizer=optimizer)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, the update rule `config.name` on the schedule, the multipliers.

    The defaults of Adam and Adafactor are those of Imagen, App. F. Differs from paper: its printed
    configuration leaves optax.adafactor's `multiply_by_parameter_scale` on, which makes 1e-4 a
    relative step; here it is a configuration field and off by default.

    Raises:
      ConfigError: see `with_rule_defaults`.
    """
    config = with_rule_defaults(config)
    parts = [RULES[config.name].make(config, learning_rate(config, total_steps))]
    if config.clip_norm > 0:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.multipliers:
        parts.append(multiply_updates(config.multipliers))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]
