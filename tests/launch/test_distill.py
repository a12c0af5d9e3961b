"""launch/distill.sh on a tiny cascade: students of students, sampled as any stage."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax import Cascade
from imagen_jax.stages import folder

REPOSITORY = pathlib.Path(__file__).parents[2]
BOTH = """
from imagen_jax.config.overrides import from_json, to_config_dict

CONFIGS = ("base", "sr")
STAGES = {"base": '''BASE''', "sr": '''SR'''}

def get_config(name="base"):
    return to_config_dict(from_json(STAGES[name]))
"""


@pytest.mark.slow
def test_students_of_both_stages(base_config, sr_config, random_params, write_world, tmp_path):
    write_world(tmp_path, base_config, 2, 2)
    data = {
        "kind": "folder",
        "path": str(tmp_path / "images"),
        "embeddings": str(tmp_path / "embeddings"),
        "loader": "numpy",
        "max_quarantined": 0.5,
    }
    text, stages = BOTH, tmp_path / "stages"
    for config in (base_config, sr_config):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        text = text.replace(config.name.upper(), json.dumps(dataclasses.asdict(config)))
        folder.write_stage(stages / config.name, random_params(config, 1), config, {})
    (tmp_path / "tiny.py").write_text(text)
    command = ["bash", "launch/distill.sh", tmp_path / "tiny.py", stages, tmp_path / "out"]
    given = {
        "BASE_STEPS": "guidance 4 2",
        "SR_STEPS": "2",
        "TRAIN_STEPS": "2",
        "SR_TRAIN_STEPS": "1",
    }
    environment = {**os.environ, **given, "PYTHON": sys.executable}
    for _ in range(2):  # The second time everything is there.
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
        )
    assert "Train" not in done.stdout
    teacher = str(stages / "base")
    for name, steps in (("base_guidance", None), ("base_4", 4), ("base_2", 2)):
        config = folder.load_stage(str(tmp_path / "out" / name)).config
        assert (config.distill.teacher, config.distill.steps) == (teacher, steps)
        assert config.sampling.guidance_weight == 1.0 and config.train.steps == 2
        assert f"of the teacher `{teacher}`" in (tmp_path / "out" / name / "card.md").read_text()
        teacher = str(tmp_path / "out" / name)
    config = folder.load_stage(str(tmp_path / "out" / "sr_2")).config
    assert (config.sampling.steps, config.train.steps) == (2, 1)
    emb = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    students = [str(tmp_path / "out" / name) for name in ("base_2", "sr_2")]
    cascade = Cascade.load(students, text_encoder=None)
    images = cascade.sample(seed=1, text_emb=emb, text_mask=np.ones((2, 4), bool))
    assert images.shape == (2, 16, 16, 3) and images.std() > 0
