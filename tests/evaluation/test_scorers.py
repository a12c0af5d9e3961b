"""Scorers by name: the installed ones, a user's own, and the verbs without the worlds package."""

import json
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.fields import ConfigError
from imagen_jax.evaluation import report, scorers
from imagen_jax.worlds.shapes import scenes
from tests.reference import brightness, scene_samples

OWN = "--scorer=tests.reference.brightness:SCORER"


def test_names_of_entry_points_and_of_modules():
    row = scenes.prompt_row(scenes.scene("held_out", 3))
    shapes = scorers.find("shapes")
    assert shapes.can_score(row) and not shapes.can_score({"prompt": "a dog"})
    assert scorers.find("tests.reference.brightness:SCORER") is brightness.SCORER


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shaeps", "is not one of .*shapes"),
        ("tests.reference.brightness:NONE", "cannot be imported"),
        ("no_such_module:SCORER", "cannot be imported"),
        ("tests.reference.brightness:Brightness", "is a class; name an instance"),
        ("tests.reference.brightness:np", "has no can_score"),
    ],
)
def test_names_that_are_no_scorer(name, says):
    with pytest.raises(ConfigError, match=f"--scorer='{name}' {says}|--scorer='{name}': .*{says}"):
        scorers.find(name)


def test_a_real_image_is_that_of_its_row_and_the_same_at_every_call():
    shapes = scorers.find("shapes")
    scene = scenes.scene("held_out", 5)
    row = scenes.prompt_row(scene)
    for size in (None, 128):
        real = shapes.real_image(row, index=7, size=size)
        np.testing.assert_array_equal(real, shapes.real_image(row, index=7, size=size))
        assert real.shape == (size or scenes.IMAGE_SIZE,) * 2 + (3,)
    placed = [dict(thing, size=thing["size"] or "small") for thing in row["objects"]]
    for thing in placed:
        del thing["x"], thing["y"]
    moved = {**row, "objects": placed}
    first, second = (shapes.real_image(moved, index=index) for index in (0, 1))
    assert (first != second).any()


@pytest.fixture
def folder(write_samples):
    """Four mid-grey samples, two rows of each kind."""
    rows = [{"prompt": f"p{i}", "kind": kind} for i, kind in enumerate(("dark", "bright") * 2)]
    return write_samples("samples", rows, level=200, size=16)


def test_alignment_by_a_scorer_of_ones_own(folder, tmp_path, capsys):
    out = tmp_path / "card.json"
    assert main.main(["evaluate", "alignment", f"--samples={folder}", f"--out={out}", OWN]) == 0
    assert capsys.readouterr().out == "dark 0.00\nbright 1.00\n"
    card = json.loads(out.read_text())
    assert card["kinds"]["bright"]["scores"]["exact"]["mean"] == 1
    markdown = report.write([str(out)], str(tmp_path / "report"), name="mine")
    assert "## Brightness" in markdown and "| bright | 1.00 | 0.00-1.00 | - | - | 2 |" in markdown


def test_cards_without_a_title_are_reported(tmp_path):
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    tally = {"n": 2, "scores": {"exact": rate}, "ceiling": {}, "chance": {}}
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"pictures": 2, "kinds": {"single": tally}}))
    assert "## Alignment, by the scorer\n" in report.write(
        [str(card)], str(tmp_path / "out"), name="mine"
    )


def test_edges_against_a_scorers_real_images(folder, write_samples, tmp_path):
    rows = [{"prompt": f"p{i}", "kind": kind} for i, kind in enumerate(("dark", "bright") * 2)]
    lowres = write_samples("lowres", rows, level=200, size=8)
    out = tmp_path / "edges.json"
    flags = [f"--samples={folder}", f"--lowres={lowres}", "--crop=8", f"--out={out}"]
    assert main.main(["evaluate", "edges", *flags, OWN]) == 0
    assert "real" in json.loads(out.read_text())["sharpness"]
    assert main.main(["evaluate", "edges", *flags]) == 0
    assert "real" not in json.loads(out.read_text())["sharpness"]


@pytest.mark.parametrize("what", ["drawbench", "sweep"])
def test_rows_that_a_chosen_scorer_cannot_score_are_refused(what, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        '{"prompt": "a", "kind": "dark", "category": "c"}\n{"prompt": "b", "category": "c"}\n'
    )
    flags = [f"--prompts={prompts}", "--stages=none", f"--out={tmp_path / 'out'}", OWN]
    assert main.main(["evaluate", what, *flags]) == 1
    error = capsys.readouterr().err
    assert "cannot score row 2 of --prompts ('b')" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


WITHOUT_WORLDS = """
import sys
sys.modules["imagen_jax.worlds"] = None
from imagen_jax.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


def run_without_worlds(*flags):
    command = [sys.executable, "-c", WITHOUT_WORLDS, "evaluate", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_the_worlds_every_other_evaluation_works(tmp_path):
    """An entry point of a package that is gone: help, edges, and one line from alignment."""
    done = run_without_worlds("--help")
    assert done.returncode == 0 and "fid30k" in done.stdout
    scene = scenes.scene("held_out", 0)
    for name, size in (("large", 128), ("small", 64)):
        (tmp_path / name).mkdir()
        scene_samples.write(tmp_path / name, [scene], [scenes.render(scene, size)])
    folders = [f"--samples={tmp_path / 'large'}", f"--lowres={tmp_path / 'small'}"]
    done = run_without_worlds("edges", *folders, f"--out={tmp_path / 'edges.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("without a scorer: --scorer='shapes'")
    assert "real" not in json.loads((tmp_path / "edges.json").read_text())["sharpness"]
    done = run_without_worlds("alignment", folders[0], f"--out={tmp_path / 'card.json'}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--scorer='shapes'" in done.stderr and "cannot be imported" in done.stderr


def test_the_verb_does_not_import_a_world():
    code = (
        "import sys; from imagen_jax.cli import evaluate; "
        "print([name for name in sys.modules if name.startswith('imagen_jax.worlds')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_samples_of_shapes_are_scored_without_the_flag(tmp_path, capsys):
    scene = scenes.scene("held_out", 0)
    scene_samples.write(tmp_path, [scene] * 2, [scenes.render(scene)] * 2)
    out = tmp_path / "card.json"
    assert main.main(["evaluate", "alignment", f"--samples={tmp_path}", f"--out={out}"]) == 0
    card = json.loads(out.read_text())
    assert card["title"] == "Alignment on the shapes world"
    assert card["kinds"][scene.kind]["scores"]["exact"]["mean"] == 1
    assert "exact" in capsys.readouterr().out
