"""benchmarks/dreambooth.py: its subjects, combinations, scores and table."""

import argparse
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


def test_words_differ_in_the_prompt_alone():
    subject = dreambooth.subject_of(1)
    sets = [dreambooth.combinations(subject, word, 60, 0) for word in dreambooth.WORDS.values()]
    own = f"{subject.size} {subject.color} {subject.shape}"
    assert len({row["prompt"] for row in sets[0]}) > 40
    for rare, other, described in zip(*sets, strict=True):
        assert {**rare, "prompt": ""} == {**described, "prompt": ""} == {**other, "prompt": ""}
        assert own in described["prompt"]
        assert rare["prompt"] == described["prompt"].replace(own, f"zwop {subject.shape}")
        assert other["prompt"] == rare["prompt"].replace("zwop", dreambooth.OTHER_WORD)
        assert subject.color not in rare["prompt"] or rare["kind"] == "relation"
    assert [row["kind"] for row in sets[0][:4]] == ["count", "count", "count", "relation"]


def test_real_images_of_the_combinations_show_the_subject(tmp_path, monkeypatch):
    subject, rng = dreambooth.subject_of(1), np.random.default_rng(0)
    rows = [row | {"set": "own"} for row in dreambooth.combinations(subject, "zwop", 40, 0)]
    rows += [without(row, subject) | {"set": "another size"} for row in rows]

    def render(verb, stages, prompts, out):
        folder = pathlib.Path(out.removeprefix("--out="))
        folder.mkdir()
        lines = pathlib.Path(prompts.removeprefix("--prompts=")).read_text().splitlines()
        with (folder / "samples.jsonl").open("w") as file:
            for index, row in enumerate(map(json.loads, lines)):
                pixels = scenes.render(scenes.scene_from_row(row, rng))
                images.save_png(folder / f"{index}.png", pixels, {})
                file.write(json.dumps({**row, "file": f"{index}.png"}) + "\n")

    monkeypatch.setattr(dreambooth, "imagen", render)
    marks = dreambooth.sample("STAGES", rows, tmp_path / "out", subject)
    assert marks["own"] == [(kind, True, True) for kind in dreambooth.KINDS] * 10
    assert marks["another size"] == [(kind, False, True) for kind in dreambooth.KINDS] * 10


def without(row, subject):
    """The row with its subject in another size."""
    size = next(size for size in scenes.SIZES if size != subject.size)
    own = {"shape": subject.shape, "color": subject.color, "size": subject.size}
    return row | {"objects": [o | {"size": size} if o == own else o for o in row["objects"]]}


def test_tuned_cascades_sample_prompts_of_before_at_the_same_places(tmp_path, monkeypatch):
    """The noise of an image depends on the place of its prompt."""
    (tmp_path / "before.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    args = argparse.Namespace(
        out=tmp_path,
        stages="x/base,x/sr",
        prompts=tmp_path / "before.jsonl",
        limit=2,
        count=3,
        others=2,
        settings=["train.steps=7"],
        class_prompts=["a {x}", "two {xs}"],
    )
    sampled, commands = [], []

    def sample(stages, rows, out, subject):
        sampled.append((stages, rows))
        return {}

    monkeypatch.setattr(dreambooth, "sample", sample)
    monkeypatch.setattr(dreambooth, "imagen", lambda verb, *flags: commands.append(flags))
    for arm in dreambooth.ARMS:
        dreambooth.score(1, arm, args)
    (untuned, before), (same, described), (tuned, rows), (plain, _) = sampled
    assert untuned == same == args.stages
    work = tmp_path / "seed_1"
    assert tuned == f"{work / 'with_prior' / 'stages' / 'base'},x/sr"
    assert plain == tuned.replace("with_prior", "without_prior")
    assert [row["prompt"] for row in before] == ["a", "b"] and rows[:2] == before
    assert {row["set"] for row in described} == {"rare word", "described"}
    assert {row["set"] for row in rows[2:]} == {"rare word", "another rare word"}
    assert len(list((work / "images").iterdir())) == 5
    first, second = (set(flags) for flags in commands)
    shape = dreambooth.subject_of(1).shape
    plural = shape + ("es" if shape.endswith("s") else "s")
    for flags in commands:
        asked = [flag for flag in flags if flag.startswith("--class_prompt=")]
        assert asked == [f"--class_prompt=a {shape}", f"--class_prompt=two {plural}"]
        assert [flag for flag in flags if "train.steps" in flag][-1] == "--config.train.steps=7"


def test_the_table_has_all_seeds():
    def marks(found, right):
        return [(("relation", "count")[i % 2], i < found, i < right) for i in range(100)]

    def scored(exact):
        return {
            "rare word": marks(90, 50),
            "another rare word": marks(5, 5),
            dreambooth.BEFORE: marks(0, exact),
        }

    scores = {f"{seed}/{arm}": scored(80) for seed in "01" for arm in dreambooth.ARMS}
    scores |= {f"{seed}/with prior": scored(78) for seed in "01"}
    scores |= {"0/without prior": scored(70), "1/without prior": scored(60)}
    lines = dreambooth.table(scores, ["0", "1"]).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + 3 * 3
    assert "0.90 [0.85, 0.93] (0.90, 0.90)" in rows[1] and "(0.50, 0.50)" in rows[1]
    assert "| 0.80 [0.71, 0.87] (0.80) |" in rows[3]
    assert "(0.70, 0.60)" in rows[9]
    changes = [line for line in lines if "changes by" in line]
    assert changes[0].startswith("with prior: exact of before changes by -2.0 ± ")
    assert changes[1].startswith("without prior: exact of before changes by -15.0 ± ")
