"""benchmarks/dreambooth.py: its subjects, combinations, scores and table."""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import dreambooth

from imagen_jax.io import images
from imagen_jax.worlds.shapes import scenes


def test_subjects_differ_and_are_in_no_training_image():
    subjects = [dreambooth.subject_of(seed) for seed in range(3)]
    assert len(set(subjects)) == 3
    for index in range(300):
        shown = {(o.shape, o.color, o.size) for o in scenes.scene("train", index).objects}
        assert not shown & {(o.shape, o.color, o.size) for o in subjects}


def test_real_images_of_the_combinations_show_the_subject(tmp_path):
    subject, rng = dreambooth.subject_of(1), np.random.default_rng(0)
    rows = dreambooth.combinations(subject, dreambooth.WORD, 40, rng)
    assert len({row["prompt"] for row in rows}) == 40
    assert all(f"a sks {subject.shape}" in row["prompt"] for row in rows)
    for shown, hits in ((rows, 40), ([without(row, subject) for row in rows], 0)):
        lines = []
        for index, row in enumerate(shown):
            pixels = scenes.render(scenes.scene_from_row(row, rng))
            images.save_png(tmp_path / f"{index}.png", pixels, {})
            lines.append(json.dumps({**row, "file": f"{index}.png"}) + "\n")
        (tmp_path / "samples.jsonl").write_text("".join(lines))
        assert dreambooth.subject_hits(tmp_path, subject) == hits


def without(row, subject):
    """The row with its subject in another size."""
    size = next(size for size in scenes.SIZES if size != subject.size)
    own = dreambooth.named(subject)
    return row | {"objects": [o | {"size": size} if o == own else o for o in row["objects"]]}


def test_the_table_has_all_seeds():
    counts = {"subject": [90, 100], "other word": [5, 100], "before": [120, 240]}
    scores = {f"{seed}/{arm}": counts for seed in "01" for arm in dreambooth.ARMS}
    lines = dreambooth.table(scores, ["0", "1"]).splitlines()
    assert len(lines) == 2 + len(dreambooth.ARMS)
    assert "0.900 [0.851, 0.934] (0.90, 0.90)" in lines[-1] and "0.500" in lines[-1]
