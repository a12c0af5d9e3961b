"""Makes a page for blind comparison of folders of images by raters (Sec. 4.2 and 4.3).

OUT/page goes to raters: index.html, which needs only a browser, and pictures/ with shuffled names
and without metadata. OUT/key.json maps images to folders and holds the expected answers of the
control questions; it stays with the experimenter and is the input of `rate_score`.
"""

from __future__ import annotations

import hashlib
import html
import importlib.resources
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.raters.studies import STUDIES, Study, letters
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import atomic, images

PLAIN_COLORS = {"red": (215, 30, 30), "green": (30, 150, 50), "blue": (30, 60, 215)}
CONTROL_SIZE = 256
LEAST_CONTROLS = 5  # A rater who guesses between two answers has all five right in 3% of cases.
ImageArray = UInt8[np.ndarray, "h w 3"]
# An item whose `sides` hold functions that load images.
Item = dict[str, Any]


def build(
    folder: str,
    others: Sequence[str],
    out: str,
    *,
    study: str,
    names: Sequence[str],
    seed: int = 0,
    controls: float = 0.1,
) -> dict[str, Any]:
    """Writes OUT/page and OUT/key.json.

    Args:
      folder: folder of samples.
      others: folders that it is compared with, at the prompts of both; one for `photorealism` and
        `alignment`, that of the real images.
      out: folder to write.
      study: a row of STUDIES.
      names: names of all folders in tables and charts; hidden from raters.
      seed: seed of item order, sides, file names and control questions.
      controls: control items per item, at least LEAST_CONTROLS in each category unless 0.

    Returns:
      The key.

    Raises:
      EvaluationError: two folders have no prompt in common, an image cannot be read, or the study
        takes one other folder.
    """
    chosen, rng = STUDIES[study], np.random.default_rng(seed)
    if len(others) > 1 and not chosen.several:
        several = ", ".join(name for name, row in STUDIES.items() if row.several)
        raise EvaluationError(
            f"--samples_b={','.join(others)} must be one folder with --study={study}; several "
            f"folders: --study={several}"
        )
    if not 0 <= controls <= 1:
        raise EvaluationError(f"--controls={controls} must be within 0..1 (control items per item)")
    items = []
    for letter, other in zip(letters(len(names))[1:], others, strict=True):
        items += _items(chosen, {"A": folder, letter: other}, rng)
    items += _control_items(chosen, items, controls, rng)
    items = [items[i] for i in rng.permutation(len(items))]
    page = pathlib.Path(out) / "page"
    if page.exists() or (pathlib.Path(out) / "key.json").exists():
        raise EvaluationError(f"--out={out} holds a study already; give a new folder")
    _write_images(items, page / "pictures", rng)
    key = {
        "study": study,
        "names": list(names),
        "seed": seed,
        "questions": [question.name for question in chosen.questions],
        "items": [{k: v for k, v in item.items() if k != "sides"} for item in items],
    }
    shown = [_shown(item, study) for item in items]
    key["id"] = hashlib.sha256(json.dumps([key, shown], sort_keys=True).encode()).hexdigest()[:16]
    atomic.write_json(pathlib.Path(out) / "key.json", key)
    atomic.write_text(page / "index.html", _page(key, chosen, shown))
    return key


def _items(study: Study, folders: Mapping[str, str], rng: np.random.Generator) -> list[Item]:
    """One item per prompt of both folders, or one per folder in studies of single images."""
    rows = {letter: samples.by_prompt(folder) for letter, folder in folders.items()}
    first, other = folders
    common = [key for key in rows[first] if key in rows[other]]
    if not common:
        raise EvaluationError(
            f"--samples_a={folders[first]} and --samples_b={folders[other]} have no prompt (and "
            "category) in common; sample both from the same prompts"
        )
    # Half of the items have A on the left, so a rater's side bias cancels.
    a_left = rng.permutation(len(common)) % 2 == 0
    items = []
    for (prompt, category), left in zip(common, a_left, strict=True):
        count = min(study.images_per_side, *(len(of[prompt, category]) for of in rows.values()))
        sides = {
            name: [_loader(folder, row["file"]) for row in rows[name][prompt, category][:count]]
            for name, folder in folders.items()
        }
        about = {"prompt": prompt, "category": category, "control": {}}
        if study.side_by_side:
            order = (first, other) if left else (other, first)
            items.append({**about, "of": list(order), "sides": [sides[name] for name in order]})
        else:
            items += [{**about, "of": [name], "sides": [sides[name]]} for name in sides]
    return items


def _control_items(
    study: Study, items: Sequence[Item], share: float, rng: np.random.Generator
) -> list[Item]:
    """Items with a known answer.

    Side by side: images of the study beside noise. Single: a plain colour whose caption names it
    (yes) or another colour (no), alternating.
    """
    controls = []
    for category in dict.fromkeys(item["category"] for item in items if share):
        members = [item for item in items if item["category"] == category]
        # A rater may choose one category. Few members are used more than once.
        count = max(LEAST_CONTROLS, round(share * len(members)))
        chosen = np.resize(rng.permutation(len(members)), count)
        for index in chosen:
            first = len(controls) % 2 == 0
            if study.side_by_side:
                prompt, real = members[index]["prompt"], members[index]["sides"][0]
                noise = [_noise(int(rng.integers(2**31)), like=real[0]) for _ in real]
                sides = [real, noise] if first else [noise, real]
                answer = "left" if first else "right"
            else:
                named, other = (str(name) for name in rng.permutation(list(PLAIN_COLORS))[:2])
                prompt, sides = f"A plain {named} image.", [[_plain(named if first else other)]]
                answer = "yes" if first else "no"
            expected = {question.name: answer for question in study.questions}
            about = {"prompt": prompt, "category": category, "control": expected}
            controls.append({**about, "of": [], "sides": sides})
    return controls


def _loader(folder: str, file: str) -> Callable[[], ImageArray]:
    return lambda: samples.load(folder, file)


def _noise(seed: int, like: Callable[[], ImageArray]) -> Callable[[], ImageArray]:
    """Noise of the size of another image."""
    return lambda: np.random.default_rng(seed).integers(0, 256, like().shape, dtype=np.uint8)


def _plain(color: str) -> Callable[[], ImageArray]:
    return lambda: np.full((CONTROL_SIZE, CONTROL_SIZE, 3), PLAIN_COLORS[color], np.uint8)


def _write_images(items: Sequence[Item], folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Writes every image under a random name, and adds the names to the items."""
    total = sum(len(side) for item in items for side in item["sides"])
    numbers = iter(rng.permutation(total))
    for index, item in enumerate(items):
        item["item"] = index
        item["pictures"] = []
        for side in item["sides"]:
            names = [f"{next(numbers):05d}.png" for _ in side]
            for name, load in zip(names, side, strict=True):
                images.save_png(folder / name, load(), {})
            item["pictures"].append(names)


def _shown(item: Item, study: str) -> dict[str, Any]:
    """The fields of an item on the page, without its folders and expected answer."""
    caption = item["prompt"] if STUDIES[study].shows_caption else ""
    return {"caption": caption, "category": item["category"], "pictures": item["pictures"]}


def _page(key: dict[str, Any], study: Study, shown: Sequence[dict[str, Any]]) -> str:
    """index.html: the template with style, script and study inserted."""
    parts = importlib.resources.files("imagen_jax.evaluation.raters") / "page"
    questions = [
        {"name": question.name, "text": question.text, "answers": question.answers}
        for question in study.questions
    ]
    data = {"id": key["id"], "questions": questions, "items": shown}
    text = parts.joinpath("page.html").read_text(encoding="utf-8")
    for mark, content in {
        "/*style*/": parts.joinpath("page.css").read_text(encoding="utf-8"),
        "/*script*/": parts.joinpath("page.js").read_text(encoding="utf-8"),
        # Escaped inside an attribute, so a prompt cannot end the element.
        "<!--study-->": html.escape(json.dumps(data, ensure_ascii=False), quote=True),
    }.items():
        before, after = text.split(mark)
        text = before + content + after
    return text
