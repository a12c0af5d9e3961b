"""docs/extending.md: its examples run, in order, as one program; the schema knows all rows."""

import inspect
import re
import subprocess
import sys

from imagen_jax.config import data, schema
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.data.sources import registry
from imagen_jax.diffusion import process, samplers, thresholding
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
    diffusion = schema.DiffusionConfig
    assert choices(diffusion, "schedule") == set(process.SCHEDULES)
    assert choices(diffusion, "aug_schedule") == set(process.SCHEDULES)
    assert choices(diffusion, "loss_weight") == set(process.LOSS_WEIGHTS)
    assert choices(SamplingConfig, "sampler") == set(samplers.SAMPLERS)
    assert choices(SamplingConfig, "thresholding") == set(thresholding.THRESHOLDS)
    assert choices(schema.ModelConfig, "name") == set(stage.MODELS)
    assert set(data.KINDS) == set(registry.SOURCES)
