"""benchmarks/seams.py: edges and seams of a stage on real low-resolution images."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import seams

from imagen_jax.worlds.shapes import scenes


class Perfect:
    """A perfect stage; with step > 0, every other patch of 4 pixels is brighter by `step`."""

    configs = (types.SimpleNamespace(data=types.SimpleNamespace(lowres_size=64)),)

    def __init__(self, rows, step):
        self.rows, self.step = rows, step

    def sample(self, prompts, lowres):
        assert prompts == [row["prompt"] for row in self.rows]
        np.testing.assert_array_equal(lowres, seams.real(self.rows, 64))
        checks = np.indices((64, 64)).sum(0) % 2 * self.step
        patches = checks.repeat(4, axis=0).repeat(4, axis=1)[..., None]
        return [
            (image + patches).clip(0, 255).astype(np.uint8) for image in seams.real(self.rows, 256)
        ]


@pytest.mark.parametrize(("step", "least", "most"), [(0, 0.99, 1.01), (2, 1.1, 10.0)])
def test_seams_are_measured_if_the_stage_has_them(tmp_path, monkeypatch, step, least, most):
    rows = [scenes.prompt_row(scenes.scene("held_out", index)) for index in range(6)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    monkeypatch.setattr(seams, "set_up_devices", lambda count: None)
    monkeypatch.setattr(seams.Cascade, "load", lambda stages: Perfect(rows, step))
    flags = ["--stage=sr2", f"--prompts={prompts}", "--limit=6", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["seams.py", *flags])
    seams.main()

    card = json.loads((tmp_path / "out" / "edges.json").read_text())
    assert card["pictures"] == 6
    assert least <= card["seams"]["4"]["drawn"]["flat"]["mean"] <= most
    assert card["seams"]["4"]["real"]["flat"]["mean"] == pytest.approx(1, abs=0.01)
    if step == 0:  # The samples are the real images.
        assert card["seams"]["4"]["drawn"] == card["seams"]["4"]["real"]
