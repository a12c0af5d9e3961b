"""DeepFloyd IF's pipelines and LoRAs in float64: the same function as in diffusers.

Needs torch, diffusers and peft, the extra `peers`. IF_GOLDENS names a folder of recorded calls
(tests/reference/if_precision.py), which are compared, too.
"""

import os

import pytest

from tests.reference import if_lora_precision, if_precision

for package in ("torch", "transformers", "diffusers"):
    pytest.importorskip(package)


@pytest.mark.slow
def test_pipelines_with_random_settings_are_the_same_function():
    """Custom timesteps, numbers of steps, lengths of text, guidance and noise levels."""
    rows = if_precision.compare(os.environ.get("IF_GOLDENS"))
    assert len(rows) >= 16
    worst = max(rows, key=lambda row: row["float64"])
    assert worst["float64"] < 1e-9, worst
    # In float32 both round, each in its own way.
    rounding = max(row["theirs"] for row in rows)
    assert rounding > 1e-6 and max(row["float32"] for row in rows) < 10 * rounding


@pytest.mark.slow
def test_loras_are_the_same_function():
    pytest.importorskip("peft")
    rows = if_lora_precision.compare()
    assert len(rows) == 4 and max(row["float64"] for row in rows.values()) < 1e-9, rows
