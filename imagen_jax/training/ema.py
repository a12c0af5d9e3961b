"""Averages of the parameters over training: the ordinary one, and ones whose width is chosen later.

The ordinary average forgets exponentially. A power-function average gives the parameters of time
tau the weight p(tau) ~ tau^gamma up to the step t it is taken at, so that its relative width,
sigma_rel = (standard deviation of p) / t, stays the same however long the run is. The train step
tracks some of them (`names`, `decays`, `update`); from their snapshots the average of any other
width, at any step, is put together after training (`reconstruct`): its weights are fitted by a sum
of the snapshots' weights, and the parameters are summed likewise.

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
    """A power-function average: its relative width and the step it ends at, counted from 1."""

    sigma_rel: float
    step: int


class Snapshot(NamedTuple):
    """An average as it was saved: its profile, and how to read its parameters."""

    profile: Profile
    load: Callable[[], Any]


class Reconstruction(NamedTuple):
    """Float32 parameters; distance of their weights over training from the wanted ones, relative.

    An `error` of 0.01 says that ||p - p_wanted|| = 0.01 ||p_wanted|| in the L2 norm over time.
    """

    params: Any
    error: float


def names(config: EmaConfig) -> tuple[str, ...]:
    """Names of all averages that a run tracks; "ema" is the ordinary one."""
    return ("ema", *map(power_name, config.profiles))


def power_name(sigma_rel: float) -> str:
    """Name of the power-function average of a relative width, for example power_0.050."""
    return f"power_{sigma_rel:.3f}"


def decays(step: Int[Array, ""], config: EmaConfig) -> dict[str, Float[Array, ""]]:
    """Decay of every average, by name, in the update that follows `step` updates."""
    powers = {power_name(s): power_decay_at(step, power_exponent(s)) for s in config.profiles}
    return {"ema": decay_at(step, config), **powers}


def decay_at(step: Int[Array, ""], config: EmaConfig) -> Float[Array, ""]:
    """Decay of the ordinary average at `step`, warmed up: min(decay, 1 - (1 + step)^-power).

    The first average is then the parameters themselves rather than the initialisation, and a short
    run forgets its start. Paper is silent on the decay; 0.9999 is the field's custom.
    """
    return jnp.minimum(config.decay, 1.0 - (1.0 + step) ** -config.warmup_power)


def power_decay_at(step: Int[Array, ""], exponent: float) -> Float[Array, ""]:
    """beta(t) = (1 - 1/t)^(gamma + 1) at t = step + 1 (Karras et al. 2024, Sec. 3.1).

    The parameters of update k then weigh (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1), which is
    the integral of p over (k-1, k]: to the continuous maths below the parameters are a staircase.
    In float32 a parameter that is within 3e-8 t / (gamma + 1) of its average, relatively, no longer
    moves it: 1% after 2.5 million steps at sigma_rel 0.1.
    """
    return jnp.exp((exponent + 1.0) * jnp.log1p(-1.0 / (step + 1.0)))


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """average <- decay * average + (1 - decay) * params, leaf by leaf, in float32."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)


@functools.cache
def power_exponent(sigma_rel: float) -> float:
    """The exponent gamma of the average of relative width sigma_rel.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic in gamma; its largest root
    is the one above zero (Karras et al. 2024, Sec. 3.1).

    Raises:
      ConfigError: sigma_rel is not in (0, 0.28).
    """
    check_sigma_rel("sigma_rel", sigma_rel)
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of p_a p_b over training, per step (Karras et al. 2024, App. C).

    With p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] it is, in powers of no more than
    the ratio of the two steps,
    (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) / t_late * (t_early / t_late)^gamma_late.
    """
    early, late = sorted((a, b), key=lambda profile: profile.step)
    gamma_early, gamma_late = power_exponent(early.sigma_rel), power_exponent(late.sigma_rel)
    scale = (gamma_early + 1.0) * (gamma_late + 1.0) / (gamma_early + gamma_late + 1.0)
    return scale / late.step * (early.step / late.step) ** gamma_late


def fit(profiles: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " n"], float]:
    """Least-squares fit of one profile by a sum of others (Karras et al. 2024, App. C).

    Differs from paper: the shares also add up to one. A parameter that training did not move is
    then reproduced as it is, and the others come up to 6 times closer (random walks with drift).

    Returns:
      The share of each profile, and the error as in `Reconstruction`.
    """
    gram = np.array([[inner_product(a, b) for b in profiles] for a in profiles])
    overlap = np.array([inner_product(profile, wanted) for profile in profiles])
    norms = np.sqrt(np.diag(gram))
    sides = np.stack([overlap / norms, 1.0 / norms], axis=1)
    solved, *_ = np.linalg.lstsq(gram / np.outer(norms, norms), sides, rcond=1e-10)
    # The second side is the Lagrange multiplier's: it moves the sum to one at the least cost.
    free, correction = (solved / norms[:, None]).T
    shares = free + correction * (1.0 - free.sum()) / correction.sum()
    size = inner_product(wanted, wanted)
    square = 1.0 + (shares @ gram @ shares - 2.0 * shares @ overlap) / size
    return shares, float(max(square, 0.0)) ** 0.5


def reconstruct(snapshots: Sequence[Snapshot], sigma_rel: float, step: int) -> Reconstruction:
    """The average of any width at any step, from snapshots of others.

    Args:
      snapshots: at least one; they are read one after another.
      sigma_rel: wanted relative width, in (0, 0.28).
      step: wanted end of the average, at most that of the last snapshot; one at which there are
        snapshots is reproduced best.

    Raises:
      ConfigError: sigma_rel is out of range.
    """
    shares, error = fit([s.profile for s in snapshots], Profile(sigma_rel, step))
    total = None
    for snapshot, share in zip(snapshots, shares, strict=True):
        part = snapshot.load()
        if total is None:
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), part)
        _add(total, part, share)
    return Reconstruction(jax.tree.map(lambda leaf: leaf.astype(np.float32), total), error)


def _add(total: Any, part: Any, share: float) -> None:
    """total += share * part in float64, in place: two trees are all there is."""
    jax.tree.map(
        lambda sum_, leaf: np.add(sum_, share * np.asarray(leaf, np.float64), out=sum_), total, part
    )
