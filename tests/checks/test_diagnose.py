"""Contact sheets, and the measure of a stage's colour cast."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.checks import diagnose
from imagen_jax.inference.cascade import Cascade
from imagen_jax.stages.stage import Stage


def test_a_cast_is_measured_and_detail_is_not():
    rng = np.random.default_rng(0)
    lowres = rng.integers(40, 200, (3, 4, 4, 3), dtype=np.uint8)
    large = lowres.repeat(4, axis=1).repeat(4, axis=2).astype(int)
    # Detail that averages out within a block of four by four.
    detail = np.tile([[9, -9], [-9, 9]], (3, 8, 8))[..., None]
    same = diagnose.colour_shift((large + detail).astype(np.uint8), lowres)
    assert same.mean == (0.0, 0.0, 0.0) and same.rms == 0.0
    tinted = diagnose.colour_shift((large + detail + [3, 0, -6]).astype(np.uint8), lowres)
    assert tinted.mean == pytest.approx((3.0, 0.0, -6.0))
    assert tinted.rms == pytest.approx(np.sqrt((9 + 36) / 3))


def test_sheets_of_a_cascade(base_config, sr_config, make_batch, random_params, tmp_path):
    stages = [Stage(config, random_params(config)) for config in (base_config, sr_config)]
    batches = [make_batch(base_config), make_batch(sr_config)]
    for name in ("text_emb", "text_mask"):
        batches[1][name] = batches[0][name]
    captions = [f"picture {i}" for i in range(4)]
    lines = []
    shifts = diagnose.diagnose(stages, batches, captions, str(tmp_path), log=lines.append)

    text = {name: batches[0][name] for name in ("text_emb", "text_mask")}
    chain = Cascade(stages).sample_stages(**text)
    assert shifts["sr"]["drawn"] == diagnose.colour_shift(chain[1], chain[0])
    assert shifts["sr"]["true"] != shifts["sr"]["drawn"]
    report = json.loads((tmp_path / "colour_shift.json").read_text())
    assert report["sr"]["true"]["rms"] == dataclasses.asdict(shifts["sr"]["true"])["rms"]
    base, sr = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("base", "sr"))
    # Two rows against three: the SR stage is sampled from true and from generated images.
    assert sr.shape[0] > 1.5 * base.shape[0] > 0
    assert any("colour cast" in line for line in lines)
