"""Makes a page on which raters compare two folders of pictures, blind (sections 4.2 and 4.3).

OUT/page is what raters get: index.html, which needs nothing but a browser, and its pictures, under
shuffled names and without metadata. OUT/key.json says which picture is whose and what the control
questions should be answered; it stays with whoever runs the study, and `rate_score` needs it.
"""

from __future__ import annotations

import hashlib
import html
import importlib.resources
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.raters.studies import STUDIES, Study
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import atomic, images

PLAIN_COLORS = {"red": (215, 30, 30), "green": (30, 150, 50), "blue": (30, 60, 215)}
CONTROL_SIZE = 256
Picture = UInt8[np.ndarray, "h w 3"]
# An item before it is laid out: its sides hold functions that load pictures.
Item = dict[str, Any]


def build(
    folder_a: str,
    folder_b: str,
    out: str,
    *,
    study: str,
    names: Sequence[str] = ("A", "B"),
    seed: int = 0,
    controls: float = 0.1,
) -> dict[str, Any]:
    """Writes OUT/page and OUT/key.json.

    Args:
      folder_a, folder_b: folders of samples; what both drew is compared. For `photorealism` and
        `alignment` B is the folder of originals.
      out: folder to write.
      study: a row of STUDIES.
      names: of the two folders, for tables and charts; raters do not see them.
      seed: of the order of items, of the sides, of picture names, of control questions.
      controls: control items per item, at least one in each category unless it is 0.

    Returns:
      The key.

    Raises:
      EvaluationError: the folders have no prompt in common, or a picture cannot be read.
    """
    if not 0 <= controls <= 1:
        raise EvaluationError(f"--controls={controls} must lie in 0..1, control items per item")
    asked, rng = STUDIES[study], np.random.default_rng(seed)
    items = _items(asked, folder_a, folder_b, rng)
    items += _control_items(asked, items, controls, rng)
    items = [items[i] for i in rng.permutation(len(items))]
    page = pathlib.Path(out) / "page"
    if page.exists() or (pathlib.Path(out) / "key.json").exists():
        raise EvaluationError(f"--out={out} holds a study already; give a new folder")
    _write_images(items, page / "pictures", rng)
    key = {
        "study": study,
        "names": list(names),
        "seed": seed,
        "questions": [question.name for question in asked.questions],
        "items": [{k: v for k, v in item.items() if k != "sides"} for item in items],
    }
    shown = [_shown(item, study) for item in items]
    key["id"] = hashlib.sha256(json.dumps([key, shown], sort_keys=True).encode()).hexdigest()[:16]
    atomic.write_json(pathlib.Path(out) / "key.json", key)
    atomic.write_text(page / "index.html", _page(key, asked, shown))
    return key


def _items(study: Study, folder_a: str, folder_b: str, rng: np.random.Generator) -> list[Item]:
    """One item per prompt that both folders drew, or one per folder where they stand alone."""
    a, b = samples.by_prompt(folder_a), samples.by_prompt(folder_b)
    common = [key for key in a if key in b]
    if not common:
        raise EvaluationError(
            f"--samples_a={folder_a} and --samples_b={folder_b} have no prompt (and category) in "
            "common; sample both from the same prompts"
        )
    # Half of the items have A on the left, so that a rater's leaning to a side cancels.
    a_left = rng.permutation(len(common)) % 2 == 0
    items = []
    for (prompt, category), left in zip(common, a_left, strict=True):
        count = min(study.pictures, len(a[prompt, category]), len(b[prompt, category]))
        sides = {
            name: [_loader(folder, row["file"]) for row in rows[prompt, category][:count]]
            for name, folder, rows in (("A", folder_a, a), ("B", folder_b, b))
        }
        about = {"prompt": prompt, "category": category, "control": {}}
        if study.side_by_side:
            order = ("A", "B") if left else ("B", "A")
            items.append({**about, "of": list(order), "sides": [sides[name] for name in order]})
        else:
            items += [{**about, "of": [name], "sides": [sides[name]]} for name in sides]
    return items


def _control_items(
    study: Study, items: Sequence[Item], share: float, rng: np.random.Generator
) -> list[Item]:
    """Items whose answer is beyond doubt, whatever the folders hold.

    Side by side: pictures of the study beside noise. Alone: a plain colour whose caption names
    it (yes) or another one (no), in turn.
    """
    controls = []
    for category in dict.fromkeys(item["category"] for item in items if share):
        members = [item for item in items if item["category"] == category]
        chosen = rng.permutation(len(members))[: max(1, round(share * len(members)))]
        for index in chosen:
            first = len(controls) % 2 == 0
            if study.side_by_side:
                prompt, real = members[index]["prompt"], members[index]["sides"][0]
                noise = [_noise(int(rng.integers(2**31)), like=real[0]) for _ in real]
                sides = [real, noise] if first else [noise, real]
                answer = "left" if first else "right"
            else:
                said, other = (str(name) for name in rng.permutation(list(PLAIN_COLORS))[:2])
                prompt, sides = f"A plain {said} picture.", [[_plain(said if first else other)]]
                answer = "yes" if first else "no"
            expected = {question.name: answer for question in study.questions}
            about = {"prompt": prompt, "category": category, "control": expected}
            controls.append({**about, "of": [], "sides": sides})
    return controls


def _loader(folder: str, file: str) -> Callable[[], Picture]:
    return lambda: samples.load(folder, file)


def _noise(seed: int, like: Callable[[], Picture]) -> Callable[[], Picture]:
    """Noise of the size of another picture."""
    return lambda: np.random.default_rng(seed).integers(0, 256, like().shape, dtype=np.uint8)


def _plain(color: str) -> Callable[[], Picture]:
    return lambda: np.full((CONTROL_SIZE, CONTROL_SIZE, 3), PLAIN_COLORS[color], np.uint8)


def _write_images(items: Sequence[Item], folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Writes every picture under a name that tells nothing, and puts it into its item."""
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
    """What the page is told about an item: not whose the pictures are, nor that it is a control."""
    caption = item["prompt"] if STUDIES[study].shows_caption else ""
    return {"caption": caption, "category": item["category"], "pictures": item["pictures"]}


def _page(key: dict[str, Any], study: Study, shown: Sequence[dict[str, Any]]) -> str:
    """index.html: the template with its style, its script and the study put in."""
    parts = importlib.resources.files("imagen_jax.evaluation") / "page"
    questions = [
        {"name": question.name, "text": question.text, "answers": question.answers}
        for question in study.questions
    ]
    data = {"id": key["id"], "questions": questions, "items": shown}
    text = parts.joinpath("page.html").read_text(encoding="utf-8")
    for mark, content in {
        "/*style*/": parts.joinpath("page.css").read_text(encoding="utf-8"),
        "/*script*/": parts.joinpath("page.js").read_text(encoding="utf-8"),
        # Inside an attribute nothing a prompt says can end the element it stands in.
        "<!--study-->": html.escape(json.dumps(data, ensure_ascii=False), quote=True),
    }.items():
        before, after = text.split(mark)
        text = before + content + after
    return text
