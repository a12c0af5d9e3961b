"""Moving averages of the parameters (EMA): exponential, and power-function with post-hoc width.

A power-function average at step t weights the parameters of step tau by p(tau) ~ tau^gamma for
tau <= t. Its relative width sigma_rel = std(p) / t does not depend on the length of the run. The
train step tracks the exponential average and a few power-function averages (`names`, `decays`,
`update`). After training, `reconstruct` builds the average of any width at any step from their
snapshots: it fits the averaging profile by a weighted sum of the snapshots' profiles and sums the
parameters with the same weights ("post-hoc EMA").

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Sec. 3 and
App. C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imagen_jax.config.schema import EmaConfig, check_sigma_rel


class Profile(NamedTuple):
    """A power-function average: its relative width and its last step, counted from 1."""

    sigma_rel: float
    step: int


class Snapshot(NamedTuple):
    """A saved average: its profile and a function that reads its parameters."""

    profile: Profile
    load: Callable[[], Any]


class Reconstruction(NamedTuple):
    """Float32 parameters and the relative L2 error of the fitted averaging profile.

    error = ||p - p_target|| / ||p_target||, in the L2 norm over training time.
    """

    params: Any
    error: float


def names(config: EmaConfig) -> tuple[str, ...]:
    """Names of all averages that a run tracks; "ema" is the exponential one."""
    return ("ema", *map(power_name, config.profiles))


def power_name(sigma_rel: float) -> str:
    """Name of the power-function average of relative width `sigma_rel`, such as power_0.050."""
    return f"power_{sigma_rel:.3f}"


def decays(step: Int[Array, ""], config: EmaConfig) -> dict[str, Float[Array, ""]]:
    """Decay of every average, by name, in the update after `step` updates."""
    powers = {power_name(s): power_decay_at(step, power_exponent(s)) for s in config.profiles}
    return {"ema": decay_at(step, config), **powers}


def decay_at(step: Int[Array, ""], config: EmaConfig) -> Float[Array, ""]:
    """Decay of the exponential average at `step`, warmed up: min(decay, 1 - (1 + step)^-power).

    The first decay is 0, so the average starts at the updated parameters and not at the
    initialisation. Paper is silent: on the decay; the default 0.9999 is common practice.
    """
    return jnp.minimum(config.decay, 1.0 - (1.0 + step) ** -config.warmup_power)


def power_decay_at(step: Int[Array, ""], exponent: float) -> Float[Array, ""]:
    """beta(t) = (1 - 1/t)^(gamma + 1) at t = step + 1 (Karras et al. 2024, Sec. 3.1).

    The parameters of update k have weight (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1), which is
    the integral of p over (k-1, k]: the continuous formulas below hold for parameters that are
    piecewise constant in time. In float32 the average stops moving once its relative distance to
    the parameter is below 3e-8 t / (gamma + 1): 1% after 2.5 million steps at sigma_rel 0.1.
    """
    return jnp.exp((exponent + 1.0) * jnp.log1p(-1.0 / (step + 1.0)))


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """average <- decay * average + (1 - decay) * params for every leaf, in float32."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)


@functools.cache
def power_exponent(sigma_rel: float) -> float:
    """The exponent gamma of the power-function average of relative width `sigma_rel`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic in gamma; its largest root is
    the positive one (Karras et al. 2024, Sec. 3.1).

    Raises:
      ConfigError: sigma_rel is not in (0, 0.28).
    """
    check_sigma_rel("sigma_rel", sigma_rel)
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of p_a p_b over training, per step (Karras et al. 2024, App. C).

    With p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] it equals
    (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) / t_late * (t_early / t_late)^gamma_late.
    In this form the only power is of a ratio below 1, so it does not overflow in long runs.
    """
    early, late = sorted((a, b), key=lambda profile: profile.step)
    gamma_early, gamma_late = power_exponent(early.sigma_rel), power_exponent(late.sigma_rel)
    scale = (gamma_early + 1.0) * (gamma_late + 1.0) / (gamma_early + gamma_late + 1.0)
    return scale / late.step * (early.step / late.step) ** gamma_late


def fit(profiles: Sequence[Profile], target: Profile) -> tuple[Float[np.ndarray, " n"], float]:
    """Least-squares fit of `target` by a weighted sum of `profiles` (Karras et al. 2024, App. C).

    Differs from paper: the weights are constrained to sum to one. A parameter that is constant
    over training is then reproduced exactly; on random walks with drift the error of the others is
    up to 6 times lower.

    Returns:
      The weight of each profile, and the error as in `Reconstruction`.
    """
    gram = np.array([[inner_product(a, b) for b in profiles] for a in profiles])
    overlap = np.array([inner_product(profile, target) for profile in profiles])
    norms = np.sqrt(np.diag(gram))
    sides = np.stack([overlap / norms, 1.0 / norms], axis=1)
    solved, *_ = np.linalg.lstsq(gram / np.outer(norms, norms), sides, rcond=1e-10)
    # The second right-hand side is the Lagrange multiplier of "the weights sum to one".
    free, correction = (solved / norms[:, None]).T
    weights = free + correction * (1.0 - free.sum()) / correction.sum()
    size = inner_product(target, target)
    square = 1.0 + (weights @ gram @ weights - 2.0 * weights @ overlap) / size
    return weights, float(max(square, 0.0)) ** 0.5


def reconstruct(snapshots: Sequence[Snapshot], sigma_rel: float, step: int) -> Reconstruction:
    """The average of any width at any step, from snapshots of other averages.

    Args:
      snapshots: at least one; read one at a time.
      sigma_rel: relative width of the result, in (0, 0.28).
      step: last step of the result, at most that of the last snapshot. The error is smallest at
        the steps of the snapshots.

    Raises:
      ConfigError: sigma_rel is out of range.
    """
    weights, error = fit([s.profile for s in snapshots], Profile(sigma_rel, step))
    total = None
    for snapshot, weight in zip(snapshots, weights, strict=True):
        params = snapshot.load()
        if total is None:
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
        _add(total, params, weight)
    return Reconstruction(jax.tree.map(lambda leaf: leaf.astype(np.float32), total), error)


def _add(total: Any, params: Any, weight: float) -> None:
    """total += weight * params in float64, in place, so that only two trees are in memory."""
    jax.tree.map(
        lambda sum_, leaf: np.add(sum_, weight * np.asarray(leaf, np.float64), out=sum_),
        total,
        params,
    )
