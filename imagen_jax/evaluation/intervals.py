"""Intervals: of proportions over prompts, of paired differences, of ratings.

`wilson` and `paired_difference` are over independent prompts.

`crossed_mean` is over raters and prompts, crossed random effects. Ratings of one rater are
correlated, and so are ratings of one prompt; an interval for independent ratings is far too narrow.
The model is exchangeable over raters and over prompts, with missing ratings. Two ratings share
both, the rater, the prompt, or nothing; the mean product of each kind of pair is an unbiased
estimate of its moment for any pattern of missing ratings. The moments give the variance of the mean
over new raters and prompts (Gallas 2006, "One-shot estimate of MRMC variance: AUC"). On complete
tables it equals the two-way analysis of variance, (MS_rater + MS_prompt - MS_rest) / N, and for
many raters and prompts the two-way cluster-robust variance of Cameron, Gelbach & Miller 2011.
Negative components are clipped to zero, which makes the interval slightly too wide if such effects
are absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.96
# Degrees of freedom of `squared_distance` at which half of the excess is removed, by simulation
# (benchmarks/score_intervals.py).
_FEW_SQUARES = 8
Mean = float | Float[np.ndarray, "*n"] | np.floating


class Interval(NamedTuple):
    """A mean in 0..1 with its 95% interval, one per table."""

    mean: Float[np.ndarray, "*n"]
    low: Float[np.ndarray, "*n"]
    high: Float[np.ndarray, "*n"]


def crossed_mean(ratings: Float[np.ndarray, "*n raters prompts"]) -> Interval:
    """Mean of ratings with its 95% interval over new raters and new prompts.

    The interval is Wilson's score interval (1927) for the number of independent ratings that has
    the estimated variance, with Student's quantile at Satterthwaite's degrees of freedom. If all
    ratings are 0 or all are 1, the variance cannot be estimated; the number of independent ratings
    is then the smaller of the numbers of raters and prompts.

    Args:
      ratings: values in 0..1, NaN for missing ratings; at least one rating.

    Returns:
      An interval per table; [0, 1] for a single rater or a single prompt.
    """
    there = ~np.isnan(ratings)
    values = np.where(there, ratings, 0.0)
    count = there.sum((-2, -1)).astype(float)
    mean = values.sum((-2, -1)) / count
    # Effective numbers of raters and prompts: N^2 over the sum of squared row (column) sizes.
    raters = count**2 / (there.sum(-1) ** 2).sum(-1)
    prompts = count**2 / (there.sum(-2) ** 2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance, freedom = _variance(values, there, raters, prompts)
        independent = mean * (1 - mean) / variance
        certain = ~np.isfinite(independent) | (variance <= 0)
        independent = np.where(certain, np.minimum(raters, prompts), independent)
        freedom = np.where(certain, np.minimum(raters, prompts) - 1, freedom)
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
        low, high = score_interval(mean, quantile**2 / independent)
    unknown = (np.minimum(raters, prompts) <= 1) | ~np.isfinite(low)
    low, high = np.where(unknown, 0.0, low), np.where(unknown, 1.0, high)
    return Interval(*map(np.asarray, (mean, low, high)))


def score_interval(mean: Mean, scale: Mean) -> tuple[Mean, Mean]:
    """Ends of Wilson's score interval (1927) of a proportion, 0..1.

    Args:
      mean: the proportion.
      scale: squared quantile over the number of independent ratings.
    """
    centre = (mean + scale / 2) / (1 + scale)
    half = np.sqrt(scale * mean * (1 - mean) + scale**2 / 4) / (1 + scale)
    return np.clip(centre - half, 0, mean), np.clip(centre + half, mean, 1)


def squared_distance(
    value: float, *, jackknife: float, second: float, bias: float, freedom: int
) -> tuple[float, float]:
    """95% interval of a squared distance of two distributions, such as the FID.

    The jackknife's variance holds the second-order part twice (Efron & Stein 1981), which is all
    that varies where the distributions are equal. That part is a sum of squares. Where it has few
    degrees of freedom, the excess stays, because the distance is then far from normal. The interval
    is symmetric for the square root, whose variance depends little on the distance.

    Args:
      value: the distance, 0 or more, with its bias.
      jackknife: its variance by the jackknife.
      second: variance of its second-order part.
      bias: its expectation where the distributions are equal.
      freedom: degrees of freedom of `jackknife`.
    """
    variance = jackknife
    if second > 0:
        squares = 2 * bias**2 / second
        variance -= min(second, jackknife / 2) * squares / (squares + _FEW_SQUARES)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    root = math.sqrt(value)
    step = half / max(2 * root, 1e-100)
    if value < bias:  # Nearer than new images would be, such as the reference's own.
        step = min(step, 3 * math.sqrt(max(second, 0) / bias) + math.sqrt(bias))
    return max(root - step, 0.0) ** 2, (root + step) ** 2


def effective_sample_size(marks: Sequence[tuple[str, bool | float]]) -> float:
    """Number of independent images with the same variance of the mean as these (prompt, mark).

    Estimated from the variance over prompts; at least the number of prompts, at most the number of
    images, and equal to it if every prompt has one image.
    """
    n, mean = len(marks), sum(mark for _, mark in marks) / len(marks)
    sums: dict[str, float] = {}
    for prompt, mark in marks:
        sums[prompt] = sums.get(prompt, 0.0) + mark - mean
    squares = sum(total**2 for total in sums.values())
    if not 0 < mean < 1:  # The variance cannot be estimated.
        return float(len(sums))
    return float(min(max(n**2 * mean * (1 - mean) / max(squares, 1e-9), len(sums)), n))


def wilson(hits: float, n: float) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927) for `hits` out of `n`, both in 0..1."""
    low, high = score_interval(hits / n, NORMAL_QUANTILE**2 / n)
    return float(low), float(high)


def paired_difference(
    differences: Float[np.ndarray, " n"], prompts: Sequence[str] | np.ndarray
) -> tuple[float, float, float]:
    """Mean of paired differences of two systems with its 95% interval over prompts.

    The differences are averaged by prompt. The interval is that of Bonett & Price 2012 ("Adjusted
    Wald confidence interval for a difference of binomial proportions based on paired data"): one
    pseudo-prompt in favour of each system is added, so it is not empty if the systems always agree.

    Args:
      differences: of the two scores of an image, each in 0..1.
      prompts: the prompt of each difference.

    Returns:
      Mean over prompts, low and high, in -1..1.
    """
    _, index = np.unique(np.asarray(prompts), return_inverse=True)
    by_prompt = np.bincount(index, differences) / np.bincount(index)
    adjusted = np.concatenate([by_prompt, [1.0, -1.0]])
    half = NORMAL_QUANTILE * adjusted.std() / np.sqrt(len(adjusted))
    low, high = adjusted.mean() - half, adjusted.mean() + half
    return float(by_prompt.mean()), max(float(low), -1.0), min(float(high), 1.0)


def _variance(
    values: np.ndarray,
    there: np.ndarray,
    raters: np.ndarray | np.floating,
    prompts: np.ndarray | np.floating,
) -> tuple[np.ndarray | np.floating, np.ndarray | np.floating]:
    """Variance of the mean and its degrees of freedom.

    Args:
      values: ratings, 0 if missing.
      there: whether a rating exists.
      raters, prompts: their effective numbers.
    """

    def pairs(x: np.ndarray) -> tuple[np.ndarray | np.floating, ...]:
        """Sums of x x' over pairs that share rater and prompt, rater, prompt, nothing."""
        same = (x**2).sum((-2, -1))
        rater = (x.sum(-1) ** 2).sum(-1) - same
        prompt = (x.sum(-2) ** 2).sum(-1) - same
        return same, rater, prompt, x.sum((-2, -1)) ** 2 - same - rater - prompt

    sums, counts = pairs(values), pairs(there.astype(float))
    same, rater, prompt, nothing = (s / n for s, n in zip(sums, counts, strict=True))
    # Negative variance components are clipped to zero.
    of_raters = np.maximum(rater - nothing, 0) / raters
    of_prompts = np.maximum(prompt - nothing, 0) / prompts
    rest = np.maximum(same - rater - prompt + nothing, 0) / counts[0]
    variance = of_raters + of_prompts + rest
    by_rater, by_prompt = of_raters + rest, of_prompts + rest
    freedom = variance**2 / (
        by_rater**2 / (raters - 1)
        + by_prompt**2 / (prompts - 1)
        + rest**2 / ((raters - 1) * (prompts - 1))
    )
    return variance, freedom
