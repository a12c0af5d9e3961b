"""Intervals of ratings: coverage on simulated panels, and the variance on tables worked by hand."""

import numpy as np
import pytest
from scipy import stats

from imagen_jax.evaluation.intervals import crossed_mean

PREFERENCE = 0.70
PANELS = [  # raters, prompts, spread of raters and of prompts (an answer's own is 1), share missing
    (25, 20, 0.5, 0.5, 0.0),
    (25, 20, 1.0, 0.3, 0.4),
    (25, 20, 0.3, 1.0, 0.0),
    (25, 10, 0.5, 0.5, 0.4),
    (25, 38, 1.0, 1.0, 0.0),
    (10, 38, 0.5, 0.5, 0.0),
]


def panels(seed, count, raters, prompts, by_rater, by_prompt, missing):
    """Answers 0 or 1 whose rate over all raters and prompts is PREFERENCE exactly (probit)."""
    rng = np.random.default_rng(seed)
    threshold = stats.norm.ppf(PREFERENCE) * np.sqrt(1 + by_rater**2 + by_prompt**2)
    liking = rng.normal(size=(count, raters, prompts))
    liking += by_rater * rng.normal(size=(count, raters, 1))
    liking += by_prompt * rng.normal(size=(count, 1, prompts))
    answers = (liking + threshold > 0).astype(float)
    answers[rng.random(answers.shape) < missing] = np.nan
    return answers


def coverage(count, *panel):
    interval = crossed_mean(panels(0, count, *panel))
    return float(np.mean((interval.low <= PREFERENCE) & (interval.high >= PREFERENCE)))


@pytest.mark.parametrize("panel", PANELS)
def test_coverage_over_4000_panels(panel):
    got = coverage(4000, *panel)
    print(f"\nraters, prompts, spreads, missing {panel}: coverage {got:.3f}")
    assert 0.92 <= got <= 0.98


def test_without_any_effect_it_is_wide_rather_than_narrow():
    assert coverage(1500, 25, 20, 0.0, 0.0, 0.0) >= 0.95


def test_ratings_as_if_independent_would_not_cover():
    """The binomial interval fails on the same panels."""
    answers = panels(0, 1500, 25, 20, 0.5, 0.5, 0.0)
    mean = answers.mean((1, 2))
    half = 1.96 * np.sqrt(mean * (1 - mean) / 500)
    assert np.mean(np.abs(mean - PREFERENCE) <= half) < 0.75


def test_a_complete_table_is_the_analysis_of_variance():
    """Half-width against mean squares computed from row and column means."""
    table = panels(3, 1, 12, 9, 0.8, 0.8, 0.0)[0]
    raters, prompts = table.shape
    mean, rows, columns = table.mean(), table.mean(1), table.mean(0)
    by_rater = prompts * rows.var(ddof=1)
    by_prompt = raters * columns.var(ddof=1)
    rest = (table - rows[:, None] - columns + mean) ** 2
    rest = rest.sum() / ((raters - 1) * (prompts - 1))
    assert by_rater > rest and by_prompt > rest
    variance = (by_rater + by_prompt - rest) / table.size
    freedom = (variance * table.size) ** 2 / (
        by_rater**2 / (raters - 1)
        + by_prompt**2 / (prompts - 1)
        + rest**2 / ((raters - 1) * (prompts - 1))
    )
    # Wilson's ends solve (mean - p)^2 = t^2 p (1 - p) / n.
    n, t = mean * (1 - mean) / variance, stats.t.ppf(0.975, freedom)
    ends = np.sort(np.roots([1 + t**2 / n, -2 * mean - t**2 / n, mean**2]).real)
    got = crossed_mean(table)
    np.testing.assert_allclose([got.mean, got.low, got.high], [mean, *ends], rtol=1e-9)


def test_many_tables_at_once_and_one_by_one():
    tables = panels(1, 5, 6, 7, 0.5, 0.5, 0.3)
    together = crossed_mean(tables)
    for i, table in enumerate(tables):
        alone = crossed_mean(table)
        for part in ("mean", "low", "high"):
            np.testing.assert_allclose(getattr(together, part)[i], getattr(alone, part))


def test_all_the_same_answer_is_not_certainty():
    got = crossed_mean(np.ones((25, 20)))
    assert got.mean == 1 and got.high == 1 and 0.75 < got.low < 0.9
    assert crossed_mean(np.zeros((25, 20))).high == pytest.approx(1 - got.low)


@pytest.mark.parametrize("shape", [(1, 20), (20, 1)])
def test_one_rater_or_one_prompt_says_nothing_of_others(shape):
    got = crossed_mean(np.random.default_rng(0).integers(0, 2, shape).astype(float))
    assert (got.low, got.high) == (0, 1)
