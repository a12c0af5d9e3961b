"""DeepFloyd IF's pipelines against diffusers itself: folders that it saves, exports that it loads.

Needs torch, transformers and diffusers, the extra `peers`.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import SampleRequest
from tests.interop.test_if_pipeline import NAMES, given_noise, settings
from tests.reference import if_pipeline as reference

pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

ARGUMENTS = {
    "base": {"num_inference_steps": 5, "guidance_scale": 3.0},
    "sr": {"timesteps": [999, 640, 200, 0], "guidance_scale": 2.0, "noise_level": 300},
}


@pytest.mark.parametrize("case", NAMES)
def test_import_and_export_against_diffusers(tmp_path, case):
    pipeline = reference.make_pipeline(case)
    pipeline.unet.register_to_config(sample_size=reference.SIDE[case])
    pipeline.save_pretrained(tmp_path / "theirs")
    arguments = ARGUMENTS[case] | {"negative_prompt": reference.NEGATIVE}
    image = reference.lowres_image() if case == "sr" else None
    given = {} if image is None else {"image": image}
    expected = reference.run(pipeline, case, **arguments, **given)

    stage, back = tmp_path / "stage", tmp_path / "back"
    assert main.main(["import", "if", f"--src={tmp_path / 'theirs'}", f"--out={stage}"]) == 0
    request = SampleRequest(
        prompts=reference.PROMPTS,
        negative_prompts=reference.NEGATIVE,
        stage_settings={NAMES[case]: settings(arguments)},
        noise={NAMES[case]: given_noise(expected)},
        lowres=image,
    )
    with jax.default_matmul_precision("highest"):
        found = Cascade.load([str(stage)]).sample_floats(request)
    assert np.abs(found - expected["image"]).max() < 2e-4

    export = ["export", "--format=diffusers", f"--workdir={stage}", f"--out={back}"]
    assert main.main(export) == 0
    loaded = diffusers.DiffusionPipeline.from_pretrained(back)
    assert type(loaded) is type(pipeline)
    again = reference.run(loaded, case, **arguments, **given)
    np.testing.assert_array_equal(again["image"], expected["image"])
