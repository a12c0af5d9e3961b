"""Merges raters' result files into preference rates with intervals (Sec. 4.2 and 4.3).

Rules: a rater is excluded with fewer than 80% of the control items answered as expected, or with so
few that a rater who guesses between two answers does as well in one of twenty cases. If two files
of a rater answer the same question, the file saved last counts. Intervals are over new raters and
new prompts (`intervals.crossed_mean`).
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from imagen_jax.config.fields import unknown_name
from imagen_jax.evaluation.intervals import crossed_mean
from imagen_jax.evaluation.raters.studies import STUDIES, VALUE, Study, letters, names_people
from imagen_jax.evaluation.samples import EvaluationError

MIN_CONTROLS = 0.8
MAX_BY_CHANCE = 0.05
# Fewer raters or prompts say next to nothing of new ones: the interval spans most of 0..1.
MIN_RATERS, MIN_PROMPTS = 2, 5
ALL_PROMPTS, NO_PEOPLE = "all", "no people"


class Rating(NamedTuple):
    """One answer of one rater; `answer` is a key of studies.VALUE, `of` the rated folder."""

    rater: str
    item: int
    question: str
    answer: str
    of: str


def score(key_file: str, result_files: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """The card of a study.

    Args:
      key_file: key.json of `rate_build`.
      result_files: result files of raters, or folders of them.

    Returns:
      `comparisons`: for each folder compared with the first, `names` (of the two) and `questions`,
      which maps each question to `agreement` and to `groups` (all, the no-people subset if it
      differs, every category), each with numbers of raters, prompts and ratings, with `too_few`
      (an interval would say nothing) and with `rates`: for side-by-side studies the shares of A
      (the first folder), indifferent and B (the other), otherwise the mean of yes / somewhat / no
      as 1 / 0.5 / 0 for A and for B. A rate is `mean`, `low`, `high` in 0..1.

    Raises:
      EvaluationError: a file belongs to another study, or every rater is excluded.
    """
    key = _read_key(key_file)
    answers = _merge([_read_result(path, key) for path in _expand(result_files)])
    excluded = _excluded(key, answers)
    ratings = _ratings(key, {k: v for k, v in answers.items() if k[0] not in excluded})
    if not ratings:
        raise EvaluationError(
            f"--results: no rater counts; excluded: {json.dumps(excluded, ensure_ascii=False)}"
        )
    raters = {rating.rater for rating in ratings}
    return {
        "card": "ratings",
        "study": key["study"],
        "id": key["id"],
        "rule": f"at least {MIN_CONTROLS:.0%} of the control items as expected, and more than "
        f"guesses give in {MAX_BY_CHANCE:.0%} of cases",
        "raters": len(raters),
        "excluded": excluded,
        "comparisons": [
            _score_comparison(key, ratings, number) for number in range(1, len(key["names"]))
        ],
    }


def _score_comparison(
    key: Mapping[str, Any], ratings: Sequence[Rating], number: int
) -> dict[str, Any]:
    """Rates of the first folder and another, by question and group, as A and B."""
    names = key["names"]
    renamed = {"A": "A", letters(len(names))[number]: "B"}
    # An item of a study of single images shows one folder, another one two.
    of_both = [
        rating._replace(
            answer=renamed.get(rating.answer, rating.answer), of=renamed.get(rating.of, "")
        )
        for rating in ratings
        if set(key["items"][rating.item]["of"]) <= set(renamed)
    ]
    return {
        "names": [names[0], names[number]],
        "questions": {
            name: _score_question(key, [r for r in of_both if r.question == name])
            for name in key["questions"]
            if any(r.question == name for r in of_both)
        },
    }


def _read_key(path: str) -> dict[str, Any]:
    try:
        key = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if {"id", "study", "names", "questions", "items"} <= set(key) and _is_key(key):
            return key
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise EvaluationError(f"--key={path} is not a key.json of `evaluate rate_build`")


def _is_key(key: Mapping[str, Any]) -> bool:
    """Whether the fields of a key have the types that `rate_build` writes."""
    names, texts = key["names"], (key["id"], key["study"], *key["names"], *key["questions"])
    pairs = [["A", other] for other in letters(len(names))[1:]]
    allowed = [*pairs, *(pair[::-1] for pair in pairs), ["A"], ["B"]]
    return (
        key["study"] in STUDIES
        and len(names) >= 2
        and all(isinstance(text, str) for text in texts)
        and all(
            isinstance(item["prompt"], str)
            and isinstance(item["category"], str)
            and isinstance(item["control"], dict)
            and (item["control"] or item["of"] in allowed)
            for item in key["items"]
        )
    )


def _expand(paths: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
    files = []
    for path in map(pathlib.Path, paths):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EvaluationError(f"--results={','.join(map(str, paths))} has no .json files")
    return files


def _read_result(path: pathlib.Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a result file and checks every answer against the study."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        study, rater, answers = result["study"], result["rater"], list(result["answers"])
        result["saved"] = datetime.datetime.fromisoformat(result["saved"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise EvaluationError(f"{path} is not a result file of a rater ({error!r})") from error
    if study != key["id"]:
        raise EvaluationError(f"{path} is of study {study}, the key of {key['id']}")
    if not isinstance(rater, str) or not rater.strip():
        raise EvaluationError(f"{path}: rater={rater!r} must be a name")
    questions = {question.name: question for question in STUDIES[key["study"]].questions}
    for answer in answers:
        try:
            item, name, value = answer["item"], answer["question"], answer["answer"]
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{path}: {answer} lacks {error}") from error
        if not isinstance(item, int) or not 0 <= item < len(key["items"]):
            raise EvaluationError(f"{path}: item={item} must be 0..{len(key['items']) - 1}")
        if not isinstance(name, str) or name not in questions:
            raise EvaluationError(f"{path}: {unknown_name('question', str(name), list(questions))}")
        allowed = [known for known, _ in questions[name].answers]
        if value not in allowed:
            raise EvaluationError(f"{path}: {unknown_name('answer', str(value), allowed)}")
    return result


Answers = dict[tuple[str, int, str], str]


def _merge(results: Sequence[Mapping[str, Any]]) -> Answers:
    """(rater, item, question) -> answer; a later file overrides an earlier one."""
    merged: Answers = {}
    for result in sorted(results, key=lambda result: result["saved"].timestamp()):
        for answer in result["answers"]:
            merged[result["rater"].strip(), answer["item"], answer["question"]] = answer["answer"]
    return merged


def _excluded(key: Mapping[str, Any], answers: Answers) -> dict[str, str]:
    """Excluded raters with the reason.

    An item counts once, whatever the number of its questions: their answers are not independent.
    """
    right: dict[str, dict[int, bool]] = {rater: {} for rater, _, _ in answers}
    for (rater, item, question), answer in answers.items():
        if expected := key["items"][item]["control"].get(question):
            right[rater][item] = right[rater].get(item, True) and answer == expected
    if not any(item["control"] for item in key["items"]):
        return {}
    excluded = {}
    for rater, of_items in sorted(right.items()):
        marks = list(of_items.values())
        by_chance = stats.binom.sf(sum(marks) - 1, len(marks), 0.5)
        if not marks:
            excluded[rater] = "no control item answered"
        elif sum(marks) < MIN_CONTROLS * len(marks):
            excluded[rater] = f"{sum(marks)} of {len(marks)} control items as expected"
        elif by_chance > MAX_BY_CHANCE:
            excluded[rater] = (
                f"{sum(marks)} of {len(marks)} control items as expected, as guesses give in "
                f"{by_chance:.0%} of cases"
            )
    return excluded


def _ratings(key: Mapping[str, Any], answers: Answers) -> list[Rating]:
    """Answers to all questions but controls, with sides mapped back to folders."""
    ratings = []
    for (rater, number, question), answer in sorted(answers.items()):
        item = key["items"][number]
        if not item["control"]:
            sides: dict[str, str] = dict(zip(("left", "right"), item["of"], strict=False))
            of = item["of"][0] if len(item["of"]) == 1 else ""
            ratings.append(Rating(rater, number, question, sides.get(answer, answer), of))
    return ratings


def _score_question(key: Mapping[str, Any], ratings: Sequence[Rating]) -> dict[str, Any]:
    items = key["items"]
    groups = {ALL_PROMPTS: list(ratings)}
    without = [r for r in ratings if not names_people(items[r.item]["prompt"])]
    if 0 < len(without) < len(ratings):
        groups[NO_PEOPLE] = without
    for category in sorted({items[r.item]["category"] for r in ratings} - {""}):
        groups[category] = [r for r in ratings if items[r.item]["category"] == category]
    study = STUDIES[key["study"]]
    return {
        "agreement": _agreement(ratings),
        "groups": {name: _score_group(members, study) for name, members in groups.items()},
    }


def _score_group(ratings: Sequence[Rating], study: Study) -> dict[str, Any]:
    """Rates of a group of ratings with their intervals."""
    if study.side_by_side:
        given = [value for value, _ in study.questions[0].answers if value == "indifferent"]
        series = {
            answer: [(r.rater, r.item, float(r.answer == answer)) for r in ratings]
            for answer in ("A", *given, "B")
        }
    else:
        series = {
            of: [(r.rater, r.item, VALUE[r.answer]) for r in ratings if r.of == of] for of in "AB"
        }
    rates = {}
    for name, cells in series.items():
        if cells:
            interval = crossed_mean(_table(cells))
            rates[name] = {k: float(v) for k, v in interval._asdict().items()}
    raters = len({r.rater for r in ratings})
    prompts = max(len({item for _, item, _ in cells}) for cells in series.values())
    return {
        "raters": raters,
        "prompts": prompts,
        "ratings": len(ratings),
        "too_few": raters < MIN_RATERS or prompts < MIN_PROMPTS,
        "rates": rates,
    }


def _table(cells: Sequence[tuple[str, int, float]]) -> Float[np.ndarray, "raters items"]:
    """Values by rater and item, NaN if missing."""
    raters = {rater: i for i, rater in enumerate(sorted({rater for rater, _, _ in cells}))}
    items = {item: i for i, item in enumerate(sorted({item for _, item, _ in cells}))}
    table = np.full((len(raters), len(items)), np.nan)
    for rater, item, value in cells:
        table[raters[rater], items[item]] = value
    return table


def _agreement(ratings: Sequence[Rating]) -> dict[str, float | None]:
    answers = sorted({r.answer for r in ratings})
    codes = _table([(r.rater, r.item, float(answers.index(r.answer))) for r in ratings])
    return agreement(codes)


def agreement(codes: Float[np.ndarray, "raters items"]) -> dict[str, float | None]:
    """Agreement of raters.

    Args:
      codes: a number per answer, NaN for a missing answer.

    Returns:
      `pairs`: share of equal pairs of ratings of an item, items weighted by their ratings; `alpha`:
      Krippendorff's nominal alpha (2011, "Computing Krippendorff's Alpha-Reliability"): 1 is full
      agreement, 0 is chance. None if no item has two ratings, or, for alpha, if all answers are
      equal.
    """
    kinds = np.unique(codes[~np.isnan(codes)])
    counts = np.stack([(codes == kind).sum(0) for kind in kinds], -1).astype(float)
    counts = counts[counts.sum(-1) >= 2]
    total = counts.sum()
    if not total:
        return {"pairs": None, "alpha": None}
    per_item = counts.sum(-1, keepdims=True)
    same = float((counts * (counts - 1) / (per_item - 1)).sum() / total)
    shares = counts.sum(0)
    by_chance = float((shares * (shares - 1)).sum() / (total * (total - 1)))
    return {"pairs": same, "alpha": 1 - (1 - same) / (1 - by_chance) if by_chance < 1 else None}
