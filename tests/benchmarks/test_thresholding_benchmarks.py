"""guidance_gap.py, thresholding_settings.py and guidance_curves.py on made-up and tiny inputs."""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import guidance_curves
import guidance_gap
import thresholding_settings

from imagen_jax.stages.conditioning import Text, null_text
from imagen_jax.stages.folder import load_stage, write_stage


def test_statistics_of_the_estimates():
    # Squared difference, squared error, divisor of two images.
    sums = np.array([[0.04, 0.01, 1.0], [0.0, 0.03, 2.0]])
    assert guidance_gap.difference(sums) == pytest.approx(0.02**0.5)
    assert guidance_gap.error(sums) == pytest.approx(0.02**0.5)
    assert guidance_gap.divisor(sums) == 1.5
    found = guidance_gap.with_interval(guidance_gap.divisor, sums)
    assert found == {"value": 1.5, "half": 0.5}


def test_the_table_ends_with_the_error_of_the_noisy_image():
    cell = {"value": 0.25, "half": 0.5}
    record = {"base": {name: [cell] * len(guidance_gap.LEVELS) for name in guidance_gap.TITLES}}
    lines = guidance_gap.table(record).splitlines()
    assert lines[2].startswith("| base | 0.250 | ")
    assert lines[3].startswith("| sigma / alpha | 54.598 | ") and "| 1.000 |" in lines[3]
    assert lines[-1].startswith("| base | 0.25 ± 0.50 | ")


def test_a_stage_without_text_has_no_difference(base_config, random_params, tmp_path):
    """Null text in place of the caption: both estimates are equal, and the error is real."""
    write_stage(tmp_path / "base", random_params(base_config), base_config, {})
    stage = load_stage(str(tmp_path / "base"))
    x = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    text = tuple(null_text(Text(jnp.zeros((3, 4, 8)), jnp.zeros((3, 4), bool))))
    key, level = jax.random.key(0), np.full(3, 2.0, np.float32)
    without = guidance_gap.compare(stage.params, stage.config, x, level, text, key, 8.0)
    text = np.ones((3, 4, 8), np.float32), np.ones((3, 4), bool)
    own = guidance_gap.compare(stage.params, stage.config, x, level, text, key, 8.0)
    assert (np.asarray(without)[:, 0] < 1e-9).all() and (np.asarray(own)[:, 0] > 1e-6).all()
    assert (np.asarray(own)[:, 1] > 0).all() and (np.asarray(own)[:, 2] >= 1).all()


def test_the_best_setting_has_the_lowest_weight_of_equals():
    names = [thresholding_settings.name_of(s) for s in thresholding_settings.SETTINGS]
    assert len(set(names)) == len(names) == 24
    scores = {name: [False, False] for name in names}
    scores["dynamic, logsnr < 1, weight 3"] = scores["dynamic, logsnr < 1, weight 8"] = [
        True,
        False,
    ]
    assert thresholding_settings.best(scores, "dynamic") == ("dynamic", "logsnr < 1", 3.0)
    assert thresholding_settings.best(scores, "none")[2] == 1.5
    table = thresholding_settings.development_table(scores).splitlines()
    assert len(table) == 2 + 8 and table[-1] == "| logsnr < 1 | 8 | 0.00 | 0.00 | 0.50 |"


def test_test_scores_are_compared_with_the_static_setting():
    chosen = [(name, "all levels", 1.5) for name in thresholding_settings.THRESHOLDINGS]
    right = {"none": [[1, 1], [1, 1]], "static": [[1, 0], [1, 0]], "dynamic": [[0, 0], [0, 0]]}
    scores = {thresholding_settings.name_of(s): right[s[0]] for s in chosen}
    none, static, dynamic = thresholding_settings.test_table(scores, chosen).splitlines()[2:]
    assert none.startswith("| none, all levels, weight 1.5 | 1.000 | +0.500 [")
    assert static.endswith("| 0.500 |  |") and "| 0.000 | -0.500 [" in dynamic


def test_prompts_of_development_and_test_are_different_scenes():
    flags = {"prompts": "", "test_prompts": "", "first_scene": 1000, "test_scene": 2000}
    args = argparse.Namespace(**flags, count=20, test_seeds=3)
    splits = [thresholding_settings.split_of(args, test) for test in (False, True)]
    assert [list(split.seeds) for split in splits] == [[0], [1, 2, 3]]
    prompts = [[str(row["objects"]) for row in split.rows] for split in splits]
    assert len(prompts[0]) == 20 and prompts[0] != prompts[1]


def test_curves_are_means_over_seeds():
    def cell(seed, weight, score):
        numbers = {"alignment": {"all": {"exact": {"mean": score}}}, "distance": 2.0 * score}
        return {
            "arm": "a",
            "seed": seed,
            "values": {"base.guidance_weight": weight},
            "numbers": numbers,
        }

    cells = [cell(s, w, 0.1 * s + 0.01 * w) for s in (0, 1) for w in guidance_curves.WEIGHTS]
    (points,) = guidance_curves.curves(cells).values()
    assert [point["weight"] for point in points] == guidance_curves.WEIGHTS
    assert points[-1]["score"] == pytest.approx(0.13)
    assert points[-1]["distance"] == pytest.approx(0.26)
    text = guidance_curves.table({"U-Net": {"a": points}}).splitlines()[-1]
    assert text == "| U-Net | a | 8 | 0.13 | 0.260 | 0.120 |"


def test_the_figure_has_a_panel_per_comparison(tmp_path):
    points = [{"weight": w, "score": 0.1 * w, "distance": w} for w in (1.0, 2.0)]
    panels = {name: {"a": points, "b": points} for name in guidance_curves.PANELS}
    guidance_curves.plot(panels, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
