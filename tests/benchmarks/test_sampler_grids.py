"""benchmarks/sampler_grids.py: its score by a gallery, its table and chart."""

import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import sampler_grids

from imagen_jax.diffusion import samplers, timesteps


def test_every_setting_is_a_sampler_and_a_grid():
    for settings in sampler_grids.SETTINGS.values():
        assert settings["sampler"] in samplers.SAMPLERS
        assert settings["spacing"] in timesteps.NAMES


def test_the_nearest_real_image_decides(tmp_path):
    levels = {"dark": 10, "grey": 120, "white": 250}
    lines = []
    for name, level in levels.items():
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name, "key": name}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    rows = [{"prompt": "x", "key": key} for key in ("dark", "grey", "white")]
    right = sampler_grids.right_by_gallery(rows, str(tmp_path), "key")
    found = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (40, 130, 100)])
    assert right(found).tolist() == [True, True, False]


def test_the_table_marks_what_differs_from_the_own_settings():
    own = [True] * 50 + [False] * 50
    scores = {
        sampler_grids.OWN: own,
        "ddim, time/4": [False] * 100,
        "ddim, time/8": own[:99] + [True],
        "heun, karras/8": [True] * 100,
    }
    lines = sampler_grids.table(scores, own).splitlines()
    assert lines == [
        "| setting | 4 | 8 |",
        "|---|---|---|",
        "| ddim, time | 0.00- | 0.51 |",
        "| heun, karras |  | 1.00+ |",
    ]


def test_the_chart_shows_the_best_grid_of_each_sampler():
    pytest.importorskip("matplotlib")
    scores = {"ddim, time/4": [False, False], "ddim, karras/4": [True, False]}
    svg = sampler_grids.chart(scores)
    assert "ddim, karras" in svg and "ddim, time" not in svg
