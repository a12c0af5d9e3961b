"""The report beside the paper's tables, and DrawBench's prompts and sheets."""

import base64
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.evaluation import drawbench, report
from imagen_jax.evaluation.samples import EvaluationError

PROMPTS = pathlib.Path(__file__).parents[2] / "configs" / "drawbench.csv"
RATE = {"mean": 0.4, "low": 0.35, "high": 0.45}
RATINGS = {
    "card": "ratings",
    "study": "photorealism",
    "comparisons": [
        {
            "names": ["mine", "original"],
            "questions": {
                "photorealism": {
                    "groups": {
                        "all": {
                            "raters": 9,
                            "prompts": 7,
                            "too_few": False,
                            "rates": {"A": RATE, "B": RATE},
                        }
                    }
                }
            },
        }
    ],
}


def test_a_run_stands_at_its_place(write_samples, tmp_path, capsys):
    fid, ratings = tmp_path / "fid.json", tmp_path / "ratings.json"
    fid.write_text(json.dumps({"card": "fid30k", "fid": 9.0, "zero_shot": True}))
    ratings.write_text(json.dumps(RATINGS))
    folder = write_samples("a", [{"prompt": f"p{i}"} for i in range(3)])
    flags = [f"--cards={fid},{ratings}", "--name=<mine>", f"--samples={folder}"]
    assert main.main(["evaluate", "report", *flags, f"--out={tmp_path / 'out'}"]) == 0
    markdown = capsys.readouterr().out
    models = [line.split("|")[1].strip() for line in markdown.splitlines() if "zero-shot |" in line]
    assert models[:3] == ["Imagen", "**<mine>**", "DALL-E 2"]
    assert "| **<mine>** | all | 40.0 (35.0-45.0) | not measured |" in markdown
    assert "| Original | all | 50.0 | 91.9 ± 0.42 |" in markdown
    assert "## Photorealism by raters, photorealism, percent" in markdown
    assert "![photorealism_photorealism of <mine>](photorealism_photorealism.svg)" in markdown
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<mine>" not in html and '<tr class="own"><td>&lt;mine&gt;</td>' in html
    chart = (tmp_path / "out" / "photorealism_photorealism.svg").read_bytes()
    assert base64.b64encode(chart).decode() in html, "the page holds its charts"
    assert (tmp_path / "out" / "pictures.png").exists() and 'src="pictures.png"' in html


def test_cards_list_their_settings(tmp_path):
    fid30k = {"card": "fid30k", "fid": 12.5, "low": 12.0, "high": 13.0, "zero_shot": True}
    fid30k |= {"images": 7, "filter": "clean", "stages": [{"name": "base", "guidance_weight": 2.0}]}
    clip = {"card": "clip_score", "clip_score": 0.25, "low": None, "high": None, "images": 1}
    paths = [tmp_path / "fid30k.json", tmp_path / "clip.json"]
    for path, card in zip(paths, (fid30k, clip), strict=True):
        path.write_text(json.dumps(card))
    markdown = report.write([str(path) for path in paths], str(tmp_path / "out"), name="x")
    assert "| **x** | zero-shot | **12.50** (12.00-13.00), of 7 images |" in markdown
    assert "| filter | clean |" in markdown and "| stage base | guidance_weight=2.0 |" in markdown
    assert "| clip_score | 0.25 |" in markdown


def test_what_was_not_measured_is_said(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"card": "clip_score", "clip_score": 0.25}))
    markdown = report.write([str(path)], str(tmp_path / "out"), name="x")
    assert "| **x** | - | not measured |" in markdown
    assert "| **x** | all | not measured | not measured |" in markdown


def test_alignment_of_a_scorer_is_not_that_of_raters(tmp_path):
    path = tmp_path / "card.json"
    tally = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    group = {part: {"exact": tally} for part in ("scores", "ceiling", "chance")}
    path.write_text(json.dumps({"kinds": {"all": group}}))
    markdown = report.write([str(path)], str(tmp_path / "out"), name="x")
    assert "## Alignment, by the scorer" in markdown and "alignment by raters |" in markdown


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "card"),
        ('{"card": "fid30"}', "fid30k"),
        ('{"card": "fid30k"}', "fid"),
    ],
)
def test_files_that_are_no_cards(tmp_path, content, says):
    path = tmp_path / "card.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=says):
        report.write([str(path)], str(tmp_path / "out"), name="x")


def test_drawbench_prompts():
    rows = drawbench.read_prompts(str(PROMPTS))
    counts = {}
    for row in rows:
        counts[row["category"]] = counts.get(row["category"], 0) + 1
    assert counts == {
        "Colors": 25,
        "Conflicting": 10,
        "Counting": 19,
        "DALL-E": 20,
        "Descriptions": 20,
        "Gary Marcus et al.": 10,
        "Misspellings": 10,
        "Positional": 20,
        "Rare Words": 7,
        "Reddit": 38,
        "Text": 21,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [("Prompts\na\n", "Category"), ("Prompts,Category\na,b\na ,b\n", "row 2 repeats 'a' in b")],
)
def test_prompts_that_cannot_be_used(tmp_path, text, says):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=says):
        drawbench.read_prompts(str(path))


def test_a_sheet_per_category(write_samples):
    rows = [{"prompt": "a", "category": "X / Y"}, {"prompt": "b", "category": "Z"}]
    folder = write_samples("s", rows, level=7, count=3)
    paths = drawbench.write_sheets(folder)
    assert [path.name for path in paths] == ["x_y.png", "z.png"]
    pixels = np.asarray(Image.open(paths[0]))
    side = drawbench.SHEET_IMAGE_SIZE
    assert pixels.shape[1] == 3 * (side + 4) + 4
    for k in range(3):
        left = 4 + k * (side + 4)
        assert (pixels[4 : 4 + side, left : left + side] == 7).all()
