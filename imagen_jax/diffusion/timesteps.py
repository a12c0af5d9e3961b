"""The times of the denoising steps: a grid of [0, 1], or a list of discrete timesteps.

A stage trained in continuous time visits `sampling.steps` times, evenly spaced or by noise levels
(GRIDS). A stage trained on 1000 discrete timesteps (Ho et al. 2020; DeepFloyd IF) visits some of
these: timestep k is time k / 1000 of the stage's schedule, and the step after the last one ends at
the clean image. A new grid is one function and one row of GRIDS, of discrete timesteps of
SPACINGS, a new list one row of LISTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import process

COUNT = process.DISCRETE_STEPS
CONTINUOUS = "time"
# Time of the clean image in a list of discrete timesteps, as timestep -1, and its logsnr in nats:
# alpha is 1 and sigma 4e-18 in float32.
CLEAN, CLEAN_LOGSNR = -1.0 / COUNT, 80.0


def leading(steps: int) -> np.ndarray:
    """Multiples of 1000 // steps from 0 on (arXiv:2305.08891, Table 2); IF's default."""
    return (np.arange(steps) * (COUNT // steps))[::-1]


def linspace(steps: int) -> np.ndarray:
    """Evenly spaced from 999 to 0 (arXiv:2305.08891, Table 2)."""
    return np.linspace(0, COUNT - 1, steps).round()[::-1]


def trailing(steps: int) -> np.ndarray:
    """Evenly spaced from 999 on, without 0 (arXiv:2305.08891, Table 2)."""
    return np.round(np.arange(COUNT, 0, -COUNT / steps)) - 1


SPACINGS: dict[str, Callable[[int], np.ndarray]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
}
# Lists of DeepFloyd IF, by the names of diffusers (pipelines/deepfloyd_if/timesteps.py).
# fmt: off
LISTS: dict[str, tuple[int, ...]] = {
    "fast27": (
        999, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222, 200, 199,
        177, 155, 133, 111, 88, 66, 44, 22, 0,
    ),
    "smart100": (
        999, 995, 992, 989, 985, 981, 978, 975, 971, 967, 964, 961, 957, 956, 951, 947, 942, 937,
        933, 928, 923, 919, 914, 913, 908, 903, 897, 892, 887, 881, 876, 871, 870, 864, 858, 852,
        846, 840, 834, 828, 827, 820, 813, 806, 799, 792, 785, 784, 777, 770, 763, 756, 749, 742,
        741, 733, 724, 716, 707, 699, 698, 688, 677, 666, 656, 655, 645, 634, 623, 613, 612, 598,
        584, 570, 569, 555, 541, 527, 526, 505, 484, 483, 462, 440, 439, 396, 395, 352, 351, 308,
        307, 264, 263, 220, 219, 176, 132, 88, 44, 0,
    ),
    "smart185": (
        999, 997, 995, 992, 990, 988, 986, 984, 981, 979, 977, 975, 972, 970, 968, 966, 964, 961,
        959, 957, 956, 954, 951, 949, 946, 944, 941, 939, 936, 934, 931, 929, 926, 924, 921, 919,
        916, 914, 913, 910, 907, 905, 902, 899, 896, 893, 891, 888, 885, 882, 879, 877, 874, 871,
        870, 867, 864, 861, 858, 855, 852, 849, 846, 843, 840, 837, 834, 831, 828, 827, 824, 821,
        817, 814, 811, 808, 804, 801, 798, 795, 791, 788, 785, 784, 780, 777, 774, 770, 766, 763,
        760, 756, 752, 749, 746, 742, 741, 737, 733, 730, 726, 722, 718, 714, 710, 707, 703, 699,
        698, 694, 690, 685, 681, 677, 673, 669, 664, 660, 656, 655, 650, 646, 641, 636, 632, 627,
        622, 618, 613, 612, 607, 602, 596, 591, 586, 580, 575, 570, 569, 563, 557, 551, 545, 539,
        533, 527, 526, 519, 512, 505, 498, 491, 484, 483, 474, 466, 457, 449, 440, 439, 428, 418,
        407, 396, 395, 381, 366, 352, 351, 330, 308, 307, 286, 264, 263, 242, 220, 219, 176, 175,
        132, 131, 88, 44, 0,
    ),
    "smart27": (
        999, 976, 952, 928, 905, 882, 858, 857, 810, 762, 715, 714, 572, 429, 428, 286, 285, 238,
        190, 143, 142, 118, 95, 71, 47, 24, 0,
    ),
    "smart50": (
        999, 988, 977, 966, 955, 944, 933, 922, 911, 900, 899, 879, 859, 840, 820, 800, 799, 766,
        733, 700, 699, 650, 600, 599, 500, 499, 400, 399, 350, 300, 299, 266, 233, 200, 199, 179,
        159, 140, 120, 100, 99, 88, 77, 66, 55, 44, 33, 22, 11, 0,
    ),
    "super100": (
        999, 996, 992, 989, 985, 982, 979, 975, 972, 968, 965, 961, 958, 955, 951, 948, 944, 941,
        938, 934, 931, 927, 924, 920, 917, 914, 910, 907, 903, 900, 899, 891, 884, 876, 869, 861,
        853, 846, 838, 830, 823, 815, 808, 800, 799, 788, 777, 766, 755, 744, 733, 722, 711, 700,
        699, 688, 677, 666, 655, 644, 633, 622, 611, 600, 599, 585, 571, 557, 542, 528, 514, 500,
        499, 485, 471, 457, 442, 428, 414, 400, 399, 379, 359, 340, 320, 300, 299, 279, 259, 240,
        220, 200, 199, 166, 133, 100, 99, 66, 33, 0,
    ),
    "super27": (
        999, 991, 982, 974, 966, 958, 950, 941, 933, 925, 916, 908, 900, 899, 874, 850, 825, 800,
        799, 700, 600, 500, 400, 300, 200, 100, 0,
    ),
    "super40": (
        999, 992, 985, 978, 971, 964, 957, 949, 942, 935, 928, 921, 914, 907, 900, 899, 879, 859,
        840, 820, 800, 799, 766, 733, 700, 699, 650, 600, 599, 500, 499, 400, 399, 300, 299, 200,
        199, 100, 99, 0,
    ),
}
# fmt: on

# Noise levels that the grids of GRIDS run between, logsnr in nats: sigma / alpha of 80 and 0.002
# (arXiv:2206.00364, Table 1), or the stage's own ends where these are nearer.
NOISIEST, CLEANEST = -2.0 * math.log(80.0), -2.0 * math.log(0.002)


def even_logsnr(noisiest: float, cleanest: float, steps: int) -> np.ndarray:
    """Levels that are evenly spaced in logsnr."""
    return np.linspace(noisiest, cleanest, steps + 1)


def karras(noisiest: float, cleanest: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Levels whose (sigma / alpha)^(1 / rho) is evenly spaced (arXiv:2206.00364, Eq. 5)."""
    first, last = np.exp(-0.5 * np.array([noisiest, cleanest]) / rho).tolist()
    return -2.0 * rho * np.log(np.linspace(first, last, steps + 1))


GRIDS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "logsnr": even_logsnr,
    "karras": karras,
}

# Names of `sampling.spacing`.
NAMES = (CONTINUOUS, *GRIDS, *SPACINGS, *LISTS)


def step_times(settings: SamplingConfig, config: DiffusionConfig) -> tuple[float, ...]:
    """The times that the steps start from, and where the last one ends; (): evenly spaced.

    Args:
      settings: `timesteps`, or `spacing` with `steps`. Discrete timesteps end at CLEAN.
      config: the stage's process, by which noise levels become times.
    """
    if not settings.timesteps and settings.spacing == CONTINUOUS:
        return ()
    if not settings.timesteps and settings.spacing in GRIDS:
        return tuple(_times_of(GRIDS[settings.spacing], settings.steps, config).tolist())
    found = settings.timesteps or LISTS.get(settings.spacing)
    if found is None:
        found = SPACINGS[settings.spacing](settings.steps).astype(int).tolist()
    return (*(step / COUNT for step in found), CLEAN)


def _times_of(
    grid: Callable[[float, float, int], np.ndarray], steps: int, config: DiffusionConfig
) -> np.ndarray:
    """Times of the levels of a grid, by bisection of the schedule, which falls with time."""
    with jax.ensure_compile_time_eval():  # The levels are constants of the program that asks.
        low_end, high_end = (float(process.logsnr_at(jnp.float32(t), config)) for t in (1.0, 0.0))
        levels = grid(max(NOISIEST, low_end), min(CLEANEST, high_end), steps)
        low, high = np.zeros(len(levels)), np.ones(len(levels))
        for _ in range(40):
            middle = 0.5 * (low + high)
            logsnr = np.asarray(process.logsnr_at(jnp.asarray(middle, jnp.float32), config))
            low, high = (
                np.where(logsnr > levels, middle, low),
                np.where(logsnr > levels, high, middle),
            )
    return 0.5 * (low + high)


def logsnr_of(times: Float[Array, " n"], config: DiffusionConfig) -> Float[Array, " n"]:
    """`process.logsnr_at` in nats; that of CLEAN is CLEAN_LOGSNR."""
    logsnr = process.logsnr_at(jnp.maximum(times, 0.0), config)
    return jnp.where(times < 0.0, CLEAN_LOGSNR, logsnr)


def step_levels(settings: SamplingConfig, config: DiffusionConfig) -> Float[Array, " steps_plus_1"]:
    """logsnr in nats of all steps from noise, noisiest first."""
    times = step_times(settings, config)
    if not times:
        times = np.linspace(1.0, 0.0, settings.steps + 1)
    return logsnr_of(jnp.asarray(np.asarray(times, np.float32)), config)
