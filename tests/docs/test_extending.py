"""docs/extending.md: its examples run, in order, as one program; the schema knows all rows."""

import inspect
import re
import subprocess
import sys

from imagen_jax.config import data, schema
from imagen_jax.config import sampling as config_sampling
from imagen_jax.data.sources import registry
from imagen_jax.diffusion import process as diffusion
from imagen_jax.diffusion import samplers as config_sampling
from imagen_jax.diffusion import thresholding
from imagen_jax.stages import stage
from tests.reference.pages import ALL, ROOT


def test_the_examples_run():
    code = "\n\n".join(
        b.code for b in ALL if b.page == "docs/extending.md" and b.language == "python"
    )
    assert code.count("assert ") >= 8
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def choices(section: type, field: str) -> set[str]:
    """The names that the schema accepts for a field."""
    source = inspect.getsource(section)
    call = re.search(rf'check_choice\(\s*"[\w.]*\.{field}",[^()]*\(([^)]*)\)', source)
    assert call, f"{section.__name__} does not check {field}"
    return set(re.findall(r'"(\w+)"', call[1]))


def test_the_schema_accepts_the_rows_that_there_are():
    process, drawing = schema.DiffusionConfig, config_sampling.SamplingConfig
    assert choices(process, "schedule") == set(diffusion.SCHEDULES)
    assert choices(process, "aug_schedule") == set(diffusion.SCHEDULES)
    assert choices(process, "loss_weight") == set(diffusion.LOSS_WEIGHTS)
    assert choices(drawing, "sampler") == set(sampling.SAMPLERS)
    assert choices(drawing, "thresholding") == set(thresholding.THRESHOLDS)
    assert choices(schema.ModelConfig, "name") == set(stage.MODELS)
    assert set(data.KINDS) == set(registry.SOURCES)
