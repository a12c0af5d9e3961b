"""An image that is not finite is an error with stage, image and step, never a black file."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.text import TextConfig
from imagen_jax.inference.batches import NotFiniteError
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.stage_sampler import Noise
from imagen_jax.interop import weights
from imagen_jax.stages.folder import write_stage
from imagen_jax.stages.stage import Stage
from tests.reference.byte_encoder import write_byte_encoder

COUNT = 5


@pytest.fixture(scope="module")
def stages(base_config, sr_config, random_params):
    return [Stage(config, random_params(config)) for config in (base_config, sr_config)]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(COUNT, 4, 8)).astype(np.float32)
    return {"text_emb": emb, "text_mask": np.ones((COUNT, 4), bool)}


def broken(stage: Stage, value: float, name: str = "") -> tuple[Stage, str]:
    """The stage with one value replaced, and the parameter's name; the first one unless named."""
    flat = {k: np.array(v) for k, v in weights.flatten(stage.params).items()}
    name = name or sorted(flat)[0]
    flat[name].reshape(-1)[0] = value
    return stage._replace(params=weights.unflatten(flat)), name


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_stage_and_the_parameter_are_named(stages, texts, value):
    wrong, name = broken(stages[1], value)
    with pytest.raises(NotFiniteError) as error:
        Cascade([stages[0], wrong]).sample(seed=3, batch_size=2, **texts)
    says = str(error.value)
    assert "stage 'sr': image 0 is not finite from step 1 of 4 on" in says
    assert f"the parameter {name} is not" in says and len(says.splitlines()) == 1


def test_image_and_step_are_named_with_finite_parameters(stages, texts):
    """The noise of the third step of one image is infinite."""
    steps = stages[0].config.sampling.steps
    size = stages[0].config.data.image_size
    noise = np.random.default_rng(1).normal(size=(COUNT, steps - 1, size, size, 3))
    noise[3, 1] = np.inf
    with pytest.raises(NotFiniteError, match="stage 'base': image 3 is not finite from step 3 of"):
        Cascade(stages).sample(
            seed=3,
            batch_size=2,
            stage_settings={"base": {"sampler": "ddpm"}},
            noise={"base": Noise(steps=noise)},
            **texts,
        )


def test_the_command_writes_no_image(stages, tmp_path, capsys):
    wrong, name = broken(stages[0], np.nan)
    text = TextConfig(encoder="bytes", path=write_byte_encoder(tmp_path / "text"), max_len=16)
    config = dataclasses.replace(wrong.config, text=text)
    write_stage(tmp_path / "stage", wrong.params, config, {})
    flags = ["--prompt=x", f"--out={tmp_path / 'out'}"]
    assert main.main(["sample", f"--stages={tmp_path / 'stage'}", *flags]) == 1
    assert f"the parameter {name} is not" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out/**/*.png"))
