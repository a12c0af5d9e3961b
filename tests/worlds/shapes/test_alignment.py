"""The scorer accepts real images, also noisy or blurred, and rejects corrupted ones."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagen_jax.evaluation import intervals
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.worlds.shapes import alignment, outlines
from imagen_jax.worlds.shapes import scenes as shapes
from imagen_jax.worlds.shapes.reading import components, detect_objects
from tests.reference import scene_samples

PER_SPLIT = 150
BACKGROUND = np.array(shapes.BACKGROUND, np.uint8)


def _scenes(kinds=shapes.KINDS, per_split=PER_SPLIT):
    scenes = [shapes.scene(s, i) for s in ("seen_test", "held_out") for i in range(per_split)]
    return [scene for scene in scenes if scene.kind in kinds]


def _exact(rendered, scenes):
    marks = [
        alignment.score(image, shapes.prompt_row(scene))["exact"]
        for image, scene in zip(rendered, scenes, strict=True)
    ]
    return np.mean(marks)


def _with(scene, *objects):
    return shapes.render(dataclasses.replace(scene, objects=tuple(objects)))


def _bitten(scene, rng):
    """A disc is missing from the outline of every object."""
    image = shapes.render(scene)
    y, x = np.mgrid[:64, :64] + 0.5
    for thing in scene.objects:
        radius = shapes.SIZES[thing.size]
        angle = rng.uniform(0, 2 * np.pi)
        inside = np.hypot(x - thing.x, y - thing.y) < 1.5 * radius
        away = np.cos(angle) * (x - thing.x) + np.sin(angle) * (y - thing.y)
        edge = away[inside & (image != BACKGROUND).any(-1)].max()
        cx, cy = thing.x + edge * np.cos(angle), thing.y + edge * np.sin(angle)
        image[np.hypot(x - cx, y - cy) < 0.8 * radius] = BACKGROUND
    return image


def _jagged(scene, rng):
    """Every row of pixels is shifted by up to two."""
    image = shapes.render(scene)
    return np.stack([np.roll(line, rng.integers(-2, 3), axis=0) for line in image])


def _frayed(scene, rng):
    """Pixels within two of the outline are background or colour at random."""
    image = shapes.render(scene)
    for thing in scene.objects:
        dx, dy = np.arange(64) + 0.5 - thing.x, np.arange(64)[:, None] + 0.5 - thing.y
        radius = shapes.SIZES[thing.size]
        outer = outlines.coverage(thing.shape, radius + 1.5, dx, dy) > 0.5
        inner = outlines.coverage(thing.shape, radius - 1.5, dx, dy) > 0.5
        band, color = outer & ~inner, rng.random((64, 64)) < 0.5
        image[band & color] = shapes.COLORS[thing.color]
        image[band & ~color] = BACKGROUND
    return image


def _merged(scene, rng):
    """The second object is moved until it overlaps the first."""
    first, second, *rest = scene.objects
    reach = 0.7 * (shapes.SIZES[first.size] + shapes.SIZES[second.size])
    distance = np.hypot(second.x - first.x, second.y - first.y)
    share = reach / distance
    x, y = first.x + share * (second.x - first.x), first.y + share * (second.y - first.y)
    return _with(scene, first, dataclasses.replace(second, x=x, y=y), *rest)


def _wrong_color(scene, rng):
    first, *rest = scene.objects
    other = rng.choice([color for color in shapes.COLORS if color != first.color])
    return _with(scene, dataclasses.replace(first, color=str(other)), *rest)


def _two_tone(scene, rng):
    """The left half of the first object has another colour."""
    first, *_ = scene.objects
    image, other = shapes.render(scene), _wrong_color(scene, rng)
    half = int(first.x)
    reach = int(1.5 * shapes.SIZES[first.size])
    window = np.s_[max(int(first.y) - reach, 0) : int(first.y) + reach, max(half - reach, 0) : half]
    image[window] = other[window]
    return image


def _wrong_shape(scene, rng):
    first, *rest = scene.objects
    other = rng.choice([shape for shape in shapes.SHAPES if shape != first.shape])
    return _with(scene, dataclasses.replace(first, shape=str(other)), *rest)


def _extra(scene, rng):
    """One more small object at a free position; None if there is none."""
    image = shapes.render(scene)
    for x, y in rng.integers(12, 53, (500, 2)):
        if (image[y - 11 : y + 11, x - 11 : x + 11] == BACKGROUND).all():
            first = scene.objects[0]
            extra = dataclasses.replace(first, size="small", x=float(x), y=float(y))
            return _with(scene, *scene.objects, extra)
    return None


def _missing(scene, rng):
    return _with(scene, *scene.objects[1:])


def _swapped(scene, rng):
    first, second = scene.objects
    moved = dataclasses.replace(first, x=second.x, y=second.y)
    return _with(scene, moved, dataclasses.replace(second, x=first.x, y=first.y))


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_real_images_pass(kind):
    scenes = _scenes((kind,), 400)
    assert len(scenes) >= 180
    assert _exact([shapes.render(scene) for scene in scenes], scenes) >= 0.995


def _grain(image, rng):
    return np.clip(np.rint(image + rng.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)


def _blur(image, rng):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


@pytest.mark.parametrize("degrade", [_grain, _blur])
def test_noise_and_blur_are_tolerated(degrade):
    rng, scenes = np.random.default_rng(0), _scenes()
    assert _exact([degrade(shapes.render(scene), rng) for scene in scenes], scenes) >= 0.95


@pytest.mark.parametrize(
    ("corrupt", "kinds"),
    [
        (_bitten, shapes.KINDS),
        (_jagged, shapes.KINDS),
        (_frayed, shapes.KINDS),
        (_merged, ("count", "relation")),
        (_wrong_color, shapes.KINDS),
        (_two_tone, shapes.KINDS),
        (_wrong_shape, shapes.KINDS),
        (_extra, shapes.KINDS),
        (_missing, shapes.KINDS),
        (_swapped, ("relation",)),
    ],
)
def test_corrupted_images_fail(corrupt, kinds):
    rng, scenes = np.random.default_rng(1), _scenes(kinds)
    pairs = [(corrupt(scene, rng), scene) for scene in scenes]
    rendered, scenes = zip(*[pair for pair in pairs if pair[0] is not None], strict=True)
    assert len(rendered) >= 50
    assert _exact(rendered, scenes) <= 0.05


@pytest.mark.parametrize("corrupt", [_bitten, _jagged, _frayed])
def test_rough_outlines_are_detected_for_every_shape(corrupt):
    rng, scenes = np.random.default_rng(2), _scenes(("single",), 600)
    for shape in shapes.SHAPES:
        chosen = [scene for scene in scenes if scene.objects[0].shape == shape]
        assert len(chosen) >= 80
        assert _exact([corrupt(scene, rng) for scene in chosen], chosen) <= 0.05


def test_detections_recover_the_scene():
    for scene in _scenes()[::5]:
        reading = detect_objects(shapes.render(scene))
        assert len(reading.objects) == len(scene.objects)
        for thing in scene.objects:
            near = min(reading.objects, key=lambda f: np.hypot(f.x - thing.x, f.y - thing.y))
            assert (near.shape, near.color, near.size) == (thing.shape, thing.color, thing.size)
            assert max(abs(near.x - thing.x), abs(near.y - thing.y)) <= 1


def test_larger_images_are_scored_at_64_pixels():
    scenes = _scenes(per_split=30)
    assert _exact([shapes.render(scene, 256) for scene in scenes], scenes) >= 0.98
    for scene in scenes[:5]:
        small, large = (
            sorted(detect_objects(shapes.render(scene, n)).objects, key=str) for n in (64, 256)
        )
        assert [(f.color, f.shape, f.size) for f in small] == [
            (f.color, f.shape, f.size) for f in large
        ]
        assert all(abs(a.x - b.x) <= 0.5 for a, b in zip(small, large, strict=True))
    garbled = [_wrong_shape(scene, np.random.default_rng(0)) for scene in scenes]
    enlarged = [np.asarray(Image.fromarray(p).resize((256, 256), 3)) for p in garbled]
    assert _exact(enlarged, scenes) <= 0.05
    speck = shapes.render(shapes.scene("held_out", 0), 256)
    speck[240:248, 240:252] = (245, 245, 245)
    assert detect_objects(speck).strays == 1


def test_the_ceiling_has_the_size_of_the_samples(tmp_path, monkeypatch):
    scenes, sizes = [shapes.scene("held_out", i) for i in range(3)], []
    scene_samples.write(tmp_path, scenes, [shapes.render(scene, 256) for scene in scenes])
    render = shapes.render
    monkeypatch.setattr(
        shapes, "render", lambda scene, size: sizes.append(size) or render(scene, size)
    )
    report = alignment.evaluate(tmp_path)
    assert sizes == [256] * 3
    assert report["kinds"]["all"]["scores"]["exact"] == report["kinds"]["all"]["ceiling"]["exact"]


def test_specks_are_strays():
    scene = shapes.scene("held_out", 0)
    image = shapes.render(scene)
    assert detect_objects(image).strays == 0
    image[60:62, 60:63] = (245, 245, 245)
    assert detect_objects(image).strays == 1
    assert not alignment.score(image, shapes.prompt_row(scene))["exact"]


def test_components_of_two_hooks_and_a_slant():
    art = """
    #######
    ......#
    #####.#
    #...#.#
    #.#...#
    #.#####
    .......
    #......
    .##....
    """
    mask = np.array([[c == "#" for c in line] for line in art.split()])
    sizes = sorted(int(part.sum()) for part in components(mask))
    assert sizes == [3, 9, 17]
    assert components(np.zeros((3, 4), bool)) == []


def _relation_row():
    red = {"shape": "circle", "color": "red"}
    blue = {"shape": "square", "color": "blue", "size": None}
    relation = {"word": "below", "first": 0, "second": 1}
    return {"prompt": "p", "kind": "relation", "objects": [red, blue], "relation": relation}


def _red_and_blue(red, blue, shape="circle"):
    things = (
        shapes.Object(shape, "red", "small", *red),
        shapes.Object("square", "blue", "small", *blue),
    )
    return _with(shapes.scene("train", 0), *things)


def test_each_attribute_alone():
    row = _relation_row()
    good = alignment.score(_red_and_blue((30.0, 45.0), (34.0, 15.0)), row)
    unspecified = {"size", "spelling"}
    assert {k for k, v in good.items() if v is None} == unspecified
    assert all(v for k, v in good.items() if k not in unspecified)
    swapped = alignment.score(_red_and_blue((30.0, 15.0), (34.0, 45.0)), row)
    assert swapped["binding"] and swapped["count"]
    assert not (swapped["relation"] or swapped["order"] or swapped["exact"])
    beside = alignment.score(_red_and_blue((15.0, 34.0), (50.0, 30.0)), row)
    assert beside["order"] and not beside["relation"]
    other = alignment.score(_red_and_blue((30.0, 45.0), (34.0, 15.0), "triangle"), row)
    assert other["colour"] and other["order"] and not (other["shape"] or other["binding"])
    alone = alignment.score(_with(shapes.scene("train", 0)), row)
    assert alone["order"] is None and not alone["relation"] and not alone["count"]


def test_named_sizes_apply_to_their_object():
    row = _relation_row()
    row["objects"][0]["size"] = "large"
    marks = alignment.score(_red_and_blue((30.0, 45.0), (34.0, 15.0)), row)
    assert not marks["size"] and not marks["binding"] and marks["relation"]
    row["objects"][0]["size"] = "small"
    assert alignment.score(_red_and_blue((30.0, 45.0), (34.0, 15.0)), row)["exact"]


def test_evaluate_reports_scores_between_ceiling_and_chance(tmp_path):
    scenes = [shapes.scene("held_out", i) for i in range(120)]
    blank = _with(scenes[0])
    rendered = [blank if i % 6 == 0 else shapes.render(scene) for i, scene in enumerate(scenes)]
    scene_samples.write(tmp_path, scenes, rendered)
    report = alignment.evaluate(tmp_path)
    assert report["pictures"] == 120 and list(report["kinds"]) == [
        "count",
        "relation",
        "single",
        "all",
    ]
    single = report["kinds"]["single"]
    assert single["n"] == 40 and single["scores"]["exact"]["mean"] == 0.5
    low, high = single["scores"]["exact"]["low"], single["scores"]["exact"]["high"]
    assert (round(low, 3), round(high, 3)) == (0.352, 0.648)
    relation = report["kinds"]["relation"]
    assert relation["scores"]["order"] == relation["ceiling"]["order"]
    assert relation["scores"]["order"]["mean"] == 1 and relation["scores"]["order"]["n"] == 40
    assert 0.25 < relation["chance"]["order"]["mean"] < 0.75
    assert report["kinds"]["all"]["ceiling"]["exact"]["mean"] == 1
    assert report["kinds"]["all"]["chance"]["exact"]["mean"] < 0.2
    lines = alignment.format_table(report).splitlines()
    assert any(line.split()[:3] == ["single", "exact", "0.50"] for line in lines)


def test_rows_without_positions_and_sizes_have_a_ceiling_too(tmp_path):
    scenes = [shapes.scene("seen_test", i) for i in range(20)]
    scene_samples.write(tmp_path, scenes, map(shapes.render, scenes), drop=("x", "y", "size"))
    report = alignment.evaluate(tmp_path)["kinds"]["all"]
    assert report["ceiling"]["exact"]["mean"] == 1 and report["scores"]["exact"]["mean"] == 1
    alone = alignment.score_folder(tmp_path)
    assert alone == {k: t["scores"] for k, t in alignment.evaluate(tmp_path)["kinds"].items()}


def test_effective_sample_size_over_prompts():
    def independent(*prompts):
        return intervals.effective_sample_size(
            [(str(p), mark) for p, marks in enumerate(prompts) for mark in marks]
        )

    assert independent([True], [False], [True], [True]) == pytest.approx(4)
    assert independent([True] * 8, [False] * 8, [True] * 8, [True] * 8) == pytest.approx(4)
    assert independent([True] * 8, [True] * 8) == 2
    assert independent([True, False] * 4, [True, False] * 4) == 16
    # Correlated images of one prompt: 95% intervals of that sample size cover the true rate.
    rng, hits = np.random.default_rng(0), []
    for _ in range(300):
        rates = rng.beta(2, 2, 32)
        marks = [(str(p), bool(m)) for p in range(32) for m in rng.random(4) < rates[p]]
        n = intervals.effective_sample_size(marks)
        low, high = intervals.wilson(np.mean([m for _, m in marks]) * n, n)
        hits.append(low <= 0.5 <= high)
    assert 0.91 <= np.mean(hits) <= 0.99


def test_scores_are_grouped_by_any_field(tmp_path):
    scenes = [shapes.scene("seen_test", i) for i in range(4)]
    scene_samples.write(tmp_path, scenes, map(shapes.render, scenes))
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"category": f"c{i % 2}"} for i, line in enumerate(lines)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [*alignment.evaluate(tmp_path, by="category")["kinds"]] == ["c0", "c1", "all"]
    with pytest.raises(EvaluationError, match="line 1: no 'sort'"):
        alignment.evaluate(tmp_path, by="sort")


def test_invalid_rows_are_named(tmp_path):
    with pytest.raises(EvaluationError, match="no file .*samples.jsonl"):
        alignment.evaluate(tmp_path)
    scenes = [shapes.scene("seen_test", 0)]
    scene_samples.write(tmp_path, scenes, map(shapes.render, scenes))
    (tmp_path / "00000_00.png").unlink()
    with pytest.raises(EvaluationError, match="00000_00.png"):
        alignment.evaluate(tmp_path)
    row = {"file": "a.png", "prompt": "a dog", "kind": "single"}
    row["relation"] = {"word": "above", "first": 0, "second": 1}
    dog, circle = {"shape": "dog"}, {"shape": "circle", "color": "red"}
    for objects, message in (
        ([], "line 1: no 'objects'"),
        ([dog], "shape='dog' is not one of circle"),
        ([circle], "names an object that does not exist"),
    ):
        (tmp_path / "samples.jsonl").write_text(json.dumps({**row, "objects": objects}))
        with pytest.raises(EvaluationError, match=message):
            alignment.evaluate(tmp_path)
