"""A cascade larger than a device's share: sharded parameters, planned memory, the same images."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.reference import sharded_cascade

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["1", "4"], ids=["whole images", "height=4"])
def found(request, tmp_path_factory):
    """(what tests/reference/sharded_cascade.py wrote, its images)."""
    out = tmp_path_factory.mktemp("sharded") / "found"
    script = [sys.executable, "-m", "tests.reference.sharded_cascade", str(out), request.param]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(f"{out}.npz") as arrays:
        images = [arrays[name] for name in arrays.files]
    return json.loads(pathlib.Path(f"{out}.json").read_text()), images


@pytest.fixture(scope="module")
def unsharded():
    """The images of each stage on one device."""
    return sharded_cascade.make_cascade().sample_stages(sharded_cascade.PROMPTS, seed=3)


@pytest.mark.slow
def test_programs_stay_within_the_plan_and_gather_a_layer_at_a_time(found):
    result, _ = found
    height = result["height"]
    assert result["keep"] == "all" and result["encoder_shards"] == 8
    assert result["fsdp"] == [8, 8 if height == 1 else 1]
    encoder, *stages = result["plan"]["programs"]
    planned = {"embed": encoder["hbm_per_chip"]}
    limit = {n: p["arguments"] + p["temporaries"] for n, p in planned.items()}
    runs = [program for program in result["programs"] if program["name"] == "run"]
    assert [s["name"] for s in stages] == ["base", "sr"] and len(runs) == 2
    for program, stage in zip(runs, stages, strict=True):
        of_plan = stage["hbm_per_chip"]["arguments"] + stage["hbm_per_chip"]["temporaries"]
        used = program["arguments"] + program["temporaries"]
        assert used <= of_plan, (stage["name"], program, stage["hbm_per_chip"])
    for program in result["programs"]:
        if program["name"] == "embed":
            assert program["arguments"] + program["temporaries"] <= limit["embed"]
        assert program["gather"] <= result["largest_layer"], program
    # Each device holds an eighth of the parameters, but all of a stage whose images are sharded.
    sharded = [p["arguments"] for p in runs[: 2 if height == 1 else 1]]
    assert max(sharded) < result["total"] / 4
    # With all parameters of a stage on each device there is no room for its images.
    assert result["plan"]["fits"] == (height == 1)


@pytest.mark.slow
def test_images_are_those_of_one_device_within_a_level(found, unsharded):
    _, images = found
    for ours, expected in zip(images, unsharded, strict=True):
        assert expected.std() > 10 and ours.shape == expected.shape
        assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
