"""Intervals for a mean of ratings in which both the raters and the prompts are a sample.

Ratings of one rater agree more with each other than with another's, and so do ratings of one
prompt; an interval that counts every rating as independent is far too narrow. Ratings are taken as
exchangeable over raters and over prompts (crossed random effects, with gaps). Two ratings can share
both, the rater, the prompt, or nothing, and the mean product of each sort of pair is an unbiased
estimate of its moment, whatever is missing. That gives the variance of the mean over a new draw of
raters and prompts (Gallas 2006, "One-shot estimate of MRMC variance: AUC"). On complete tables it
is the two-way analysis of variance, (MS_rater + MS_prompt - MS_rest) / N, and with many of both the
two-way cluster-robust variance of Cameron, Gelbach & Miller 2011. Components below zero are taken
as zero, which without any such effects makes the interval somewhat too wide, never too narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95
Mean = float | Float[np.ndarray, "*n"] | np.floating


class Interval(NamedTuple):
    """A mean in 0..1 with its 95% interval; arrays hold one per table."""

    mean: Float[np.ndarray, "*n"]
    low: Float[np.ndarray, "*n"]
    high: Float[np.ndarray, "*n"]


def crossed_mean(ratings: Float[np.ndarray, "*n raters prompts"]) -> Interval:
    """Mean of ratings, and its 95% interval over new raters and new prompts.

    The interval is Wilson's score interval (1927) for as many independent ratings as would give the
    estimated variance, with Student's quantile at Satterthwaite's degrees of freedom. Where all
    ratings are 0 or all are 1 the variance cannot be estimated; then as many independent ratings
    are assumed as there are raters or prompts, whichever are fewer.

    Args:
      ratings: values in 0..1, NaN where a rater did not rate a prompt; at least one is there.

    Returns:
      An interval per table; [0, 1] where there is but one rater or one prompt, from which nothing
      can be said about others.
    """
    there = ~np.isnan(ratings)
    values = np.where(there, ratings, 0.0)
    count = there.sum((-2, -1)).astype(float)
    mean = values.sum((-2, -1)) / count
    # Squared sizes of raters' and of prompts' rows: N^2 over them is the number of equal ones.
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


def score_interval(mean: Mean, spread: Mean) -> tuple[Mean, Mean]:
    """Ends of Wilson's score interval (1927) of a proportion, 0..1.

    Args:
      mean: the proportion.
      spread: squared quantile over the number of independent ratings.
    """
    centre = (mean + spread / 2) / (1 + spread)
    half = np.sqrt(spread * mean * (1 - mean) + spread**2 / 4) / (1 + spread)
    return np.clip(centre - half, 0, mean), np.clip(centre + half, mean, 1)


def _variance(
    values: np.ndarray,
    there: np.ndarray,
    raters: np.ndarray | np.floating,
    prompts: np.ndarray | np.floating,
) -> tuple[np.ndarray | np.floating, np.ndarray | np.floating]:
    """Variance of the mean and its degrees of freedom.

    Args:
      values: ratings, 0 where there is none; there: where there is one.
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
    # A component below zero is rounding up from chance: it is none.
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
