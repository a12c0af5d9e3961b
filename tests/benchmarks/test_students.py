"""benchmarks/students.py: its distances and its table."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import students

from imagen_jax.cli import main
from imagen_jax.config.text import PretrainTextConfig, TextConfig
from imagen_jax.stages.folder import write_stage
from imagen_jax.worlds.shapes import scenes


def test_the_distance_is_that_of_pairs_of_one_prompt():
    zeros = np.zeros((2, 4, 4, 3), np.uint8)
    found = students.distance([zeros, zeros + np.uint8(51), zeros + np.uint8(102)])
    np.testing.assert_allclose(found, [(0.2 + 0.2 + 0.4) / 3] * 2, rtol=1e-6)
    assert students.distance([zeros, zeros]) == [0.0, 0.0]


def test_real_images_of_a_prompt_differ_in_their_places():
    rows = [scenes.prompt_row(scenes.scene("held_out", index)) for index in range(6)]
    assert all(0.05 < value < 0.5 for value in students.real_distance(rows))


def test_the_table_pairs_students_with_their_teacher():
    right = [True] * 60 + [False] * 40
    teacher = {"right": right, "distance": [0.2, 0.2], "seconds": [4.0, 2.0, 4.0]}
    same = {"right": right, "distance": [0.1, 0.3], "seconds": [1.0, 1.0, 1.0]}
    worse = {"right": [False] * 100, "distance": [0.1, 0.1], "seconds": [2.0, 1.0, 2.0]}
    runs = [{"teacher": teacher, "4 + 2": same}, {"teacher": teacher, "4 + 2": worse}]
    lines = students.table(runs).splitlines()
    assert (
        lines[2] == "| teacher | 0.600 |  |  | 0.200 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |"
    )
    name, score, difference, of_runs, spread, relative, speed = lines[3].strip("| ").split(" | ")
    assert (name, score, spread) == ("4 + 2", "0.300", "0.150")
    assert difference.startswith("-0.300 [-0.3") and difference.endswith("]")
    assert of_runs == "-0.300 (-0.600 to +0.000)"
    assert relative == "0.75 (0.50 to 1.00)" and speed == "3.00 (2.00 to 4.00)"


def test_the_cascades_of_a_run():
    command = ["--stages=t", "--students=s", "--base_steps=4", "--sr_steps=2", "--out=o"]
    flags = students.parse(["run", *command, "--guidance_steps=8,4"])
    ddim = [{"base": {"sampler": "ddim", "steps": steps}} for steps in (8, 4)]
    assert students.cascades_of(flags) == {
        "teacher": (["t/base", "t/sr"], {}),
        "4 + 2": (["s/base_4", "s/sr_2"], {}),
        "guidance, 8 + 2": (["s/base_guidance", "s/sr_2"], ddim[0]),
        "guidance, 4 + 2": (["s/base_guidance", "s/sr_2"], ddim[1]),
    }
    flags = students.parse(["run", *command, "--base_sampler=ddpm"])
    found = students.cascades_of(flags)["4 + 2"]
    assert found == (["s/base_4", "s/sr_2"], {"base": {"sampler": "ddpm"}})
    command[2] = "--base_steps="
    command += ["--guidance_steps=8", "--guidance_sampler=ddpm"]
    assert students.cascades_of(students.parse(["run", *command])) == {
        "teacher": (["t/base", "t/sr"], {}),
        "guidance, 8 + 2": (
            ["s/base_guidance", "s/sr_2"],
            {"base": {"sampler": "ddpm", "steps": 8}},
        ),
    }


@pytest.mark.slow
def test_a_run_of_untrained_stages(
    base_config, sr_config, random_params, write_world, tmp_path, monkeypatch, capsys
):
    small = PretrainTextConfig(emb_dim=8, num_layers=1, num_heads=1, mlp_dim=8, steps=1)
    world = dataclasses.replace(base_config, pretrain_text=small)
    flags = [f"--config={write_world(tmp_path, world, steps=1, every=1)}"]
    assert main.main(["pretrain_text", *flags, f"--out={tmp_path / 'text'}"]) == 0

    def write(path: pathlib.Path, config, steps: int) -> None:
        config = dataclasses.replace(
            config,
            sampling=dataclasses.replace(config.sampling, steps=steps),
            text=TextConfig(path=str(tmp_path / "text")),
            pretrain_text=small,
        )
        write_stage(path, random_params(config), config, {})

    for name, config in (("base", base_config), ("sr", sr_config)):
        write(tmp_path / "stages" / name, config, 4)
        write(tmp_path / "distilled" / f"{name}_2", config, 2)
    out = tmp_path / "scores.json"
    places = [f"--stages={tmp_path / 'stages'}", f"--students={tmp_path / 'distilled'}"]
    flags = ["run", *places, "--base_steps=2", "--sr_steps=2", "--scenes=8", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["students.py", *flags])
    students.main()
    assert "| 2 + 2 |" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert len(result["teacher"]["right"]) == 8 and result["real"]["distance"]
    assert result["teacher"]["distance"] != result["2 + 2"]["distance"]
