"""Learning-rate schedule and optax optimizer of a run, from `config.optimizer`."""

from __future__ import annotations

import optax

from imagen_jax.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then `config.schedule`; maps step to learning rate.

    Args:
      config: peak rate, warm-up steps and schedule.
      total_steps: length of the run; `cosine` and `linear_tail` reach zero there.
    """
    peak = config.learning_rate
    warmup = min(config.warmup_steps, total_steps)
    rest = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif config.schedule == "linear_tail":
        tail = min(max(int(config.decay_fraction * total_steps), 1), rest)
        after = optax.linear_schedule(peak, 0.0, tail, rest - tail)
    elif config.schedule == "rsqrt":
        start = max(warmup, 1)
        after = lambda step: peak * (start / (step + start)) ** 0.5  # noqa: E731
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then the update rule `config.name` on the schedule.

    The defaults of Adam and Adafactor are those of Imagen, App. F. Differs from paper: its printed
    configuration leaves optax.adafactor's `multiply_by_parameter_scale` on, which makes 1e-4 a
    relative step; here it is a configuration field and off by default.
    """
    rate = learning_rate(config, total_steps)
    rules = {
        "adam": lambda: optax.adam(rate, config.b1, config.b2, config.eps),
        "adamw": lambda: optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        ),
        "adafactor": lambda: optax.adafactor(
            rate, multiply_by_parameter_scale=config.multiply_by_parameter_scale
        ),
        "lion": lambda: optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay),
    }
    rule = rules[config.name]()
    if config.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    return rule
