"""DeepFloyd IF's pipelines: the images of diffusers from the same noise; refusals; round trips."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.fields import ConfigError
from imagen_jax.diffusion import process
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import RequestError, SampleRequest
from imagen_jax.inference.stage_sampler import Noise
from imagen_jax.interop import if_scheduler, weights
from imagen_jax.stages.folder import load_stage
from imagen_jax.stages.loss import check_trainable
from imagen_jax.stages.stage import Stage
from tests.interop.test_if_unet import write
from tests.reference.if_pipeline import MAX_VALUE, PROMPTS, RUNS, SCHEDULER, SIDE, T5
from tests.reference.if_pipeline import lowres_image as make_lowres_image
from tests.reference.if_unet import make_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "if_pipeline"
NAMES = {"base": "if_base", "sr": "if_sr"}
NOISING = {"beta_schedule": "squaredcos_cap_v2"}


def write_pipeline(case: str, folder: pathlib.Path, **scheduler) -> pathlib.Path:
    """The pipeline folder of a case in diffusers' layout, with fields of its scheduler changed."""
    write(case, folder / "unet", sample_size=SIDE[case])
    name = "IFPipeline" if case == "base" else "IFSuperResolutionPipeline"
    fields = {"_class_name": "DDPMScheduler", **SCHEDULER, "sample_max_value": MAX_VALUE[case]}
    files = {
        "model_index.json": {"_class_name": name},
        "scheduler/scheduler_config.json": fields | scheduler,
        "text_encoder/config.json": {"model_type": "t5", **T5},
    }
    if case == "sr":
        files["image_noising_scheduler/scheduler_config.json"] = NOISING
    for path, values in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(values))
    arrays = make_weights(json.loads((GOLDEN / "t5_shapes.json").read_text()))
    arrays.pop("encoder.embed_tokens.weight", None)
    weights.write_safetensors(folder / "text_encoder" / "model.safetensors", arrays)
    (folder / "tokenizer").mkdir()
    shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {case: write_pipeline(case, root / case) for case in NAMES}


@pytest.fixture(scope="module")
def stages(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    for case, folder in pipelines.items():
        assert main.main(["import", "if", f"--src={folder}", f"--out={root / case}"]) == 0
    return {case: root / case for case in NAMES}


def golden(case: str, run: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as file:
        prefix = f"{case}/{run}/"
        return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}


def settings(run: dict) -> dict:
    """Our sampling settings of a call of diffusers' pipeline."""
    found = {"guidance_weight": run["guidance_scale"]}
    if "timesteps" in run:
        found["timesteps"] = run["timesteps"]
    else:
        found["steps"] = run["num_inference_steps"]
    if "noise_level" in run:
        found["aug_level"] = run["noise_level"] / 1000
    return found


def given_noise(arrays: dict[str, np.ndarray]) -> Noise:
    return Noise(arrays["start"], arrays["steps"], arrays.get("lowres"))


QUICK = [("base", "negative"), ("base", "timesteps"), ("sr", "plain")]
CASES = [
    pytest.param(case, run, marks=[] if (case, run) in QUICK else pytest.mark.slow)
    for case, runs in RUNS.items()
    for run in runs
]


@pytest.mark.parametrize(("case", "run"), CASES)
def test_images_are_those_of_diffusers_from_text(stages, case, run):
    arrays, name = golden(case, run), NAMES[case]
    request = SampleRequest(
        prompts=PROMPTS,
        negative_prompts=RUNS[case][run].get("negative_prompt"),
        stage_settings={name: settings(RUNS[case][run])},
        noise={name: given_noise(arrays)},
        lowres=make_lowres_image() if case == "sr" else None,
    )
    with jax.default_matmul_precision("highest"):
        found = Cascade.load([str(stages[case])]).sample_floats(request)
    # Noise in the last step may lead far out of [-1, 1].
    assert np.abs(np.clip(found, -1, 1) - np.clip(arrays["image"], -1, 1)).max() < 2e-4
    assert arrays["image"].std() > 0.1


def test_embeddings_are_those_of_diffusers(stages):
    """Lowercased, with what the encoder gives at padding; the empty caption as null text."""
    arrays = golden("base", "plain")
    cascade = Cascade.load([str(stages["base"])])
    for prompts, expected in ((PROMPTS, "text_emb"), (["", ""], "negative_emb")):
        text_emb, text_mask = cascade.embed(prompts)
        assert text_emb.shape == (2, 77, 24) and text_mask.all()
        np.testing.assert_allclose(text_emb, arrays[expected], atol=1e-5)


@pytest.mark.parametrize("case", ["base", pytest.param("sr", marks=pytest.mark.slow)])
def test_the_command_samples_the_same_images(stages, tmp_path, case):
    arrays, name = golden(case, "plain"), NAMES[case]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    ones = np.ones(arrays["text_emb"].shape[:2], bool)
    inputs = {name: arrays[name] for name in ("text_emb", "negative_emb")}
    inputs |= {"text_mask": ones, "negative_mask": ones}
    inputs |= {f"{name}/start": arrays["start"], f"{name}/steps": arrays["steps"]}
    if case == "sr":
        inputs |= {f"{name}/lowres": arrays["lowres"], "lowres": make_lowres_image()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    flags = [f"--stages={stages[case]}", f"--prompts={tmp_path / 'prompts.txt'}"]
    flags += [f"--inputs={tmp_path / 'inputs.npz'}", "--floats", f"--out={tmp_path / 'out'}"]
    flags += [f"--stage_settings={json.dumps({name: settings(RUNS[case]['plain'])})}"]
    with jax.default_matmul_precision("highest"):
        assert main.main(["sample", *flags]) == 0
    found = np.stack([np.load(tmp_path / "out" / f"0000{i}_00.npy") for i in range(2)])
    assert np.abs(found - arrays["image"]).max() < 2e-4
    assert (tmp_path / "out" / "00001_00.png").is_file()


@pytest.mark.parametrize("case", ["base", pytest.param("sr", marks=pytest.mark.slow)])
def test_export_gives_the_pipeline_back(pipelines, stages, tmp_path, case):
    export = ["export", f"--workdir={stages[case]}", "--format=diffusers"]
    assert main.main([*export, f"--out={tmp_path / 'back'}"]) == 0
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    theirs = json.loads((pipelines[case] / "model_index.json").read_text())
    assert index["_class_name"] == theirs["_class_name"]
    for path in (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert (tmp_path / "back" / path).read_bytes() == (pipelines[case] / path).read_bytes()
    given, back = (
        json.loads((root / "scheduler" / "scheduler_config.json").read_text())
        for root in (pipelines[case], tmp_path / "back")
    )
    assert back == given
    # Imported again, it is the same stage.
    assert main.main(["import", "if", f"--src={tmp_path / 'back'}", f"--out={tmp_path / '2'}"]) == 0
    first, second = (load_stage(str(path)).config for path in (stages[case], tmp_path / "2"))
    assert (first.sampling, first.diffusion) == (second.sampling, second.diffusion)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "linear"),
        ("beta_schedule", "scaled_linear"),
        ("beta_schedule", "sigmoid"),
        ("clip_sample", "x"),
        ("num_train_timesteps", 500),
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", True),
        ("prediction_type", "flow"),
        ("prediction_type", ["epsilon"]),
        ("thresholding", None),
        ("variance_type", "learned"),
        ("variance_type", "fixed_large_log"),
        ("variance_type", {}),
        ("sample_max_value", 0.5),
        ("dynamic_thresholding_ratio", 0),
        ("timestep_spacing", "karras"),
        ("steps_offset", 1),
        ("_class_name", "EulerDiscreteScheduler"),
        ("solver_order", 2),
    ],
)
def test_schedulers_that_cannot_be_represented_are_named(tmp_path, capsys, field, value):
    folder = write_pipeline("base", tmp_path / "if", **{field: value})
    assert main.main(["import", "if", f"--src={folder}", f"--out={tmp_path / 'stage'}"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"{field}={value!r}" in error, error
    assert not (tmp_path / "stage").exists()


def test_a_clip_of_another_range_is_named(tmp_path):
    fields = SCHEDULER | {"thresholding": False, "clip_sample_range": 2.0}
    with pytest.raises(weights.WeightsError, match="clip_sample_range=2.0"):
        if_scheduler.sampling(fields, "test")


@pytest.mark.parametrize(
    "fields",
    [
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small", "prediction_type": "v_prediction"},
        {"thresholding": False},
        {"thresholding": False, "clip_sample": False, "timestep_spacing": "trailing"},
    ],
)
def test_schedulers_there_and_back(fields):
    given = SCHEDULER | fields
    diffusion, sampling = if_scheduler.process(given, "test"), if_scheduler.sampling(given, "test")
    back = if_scheduler.scheduler_config(diffusion, sampling)
    assert {name: back[name] for name in fields} == fields
    assert if_scheduler.same(given, diffusion, sampling)
    assert (diffusion.schedule, diffusion.aug_upsampling) == ("cosine_steps", "corners")


def test_every_timestep_has_the_level_of_diffusers():
    """Also the first and the last: diffusers rounds betas and their product to float32."""
    diffusion = if_scheduler.process(SCHEDULER, "test")
    found = process.logsnr_at(jnp.arange(1000, dtype=jnp.float32) / 1000, diffusion)
    expected = process.cosine_steps(dtype=np.float32).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_stage_three_is_refused_by_name(pipelines, tmp_path, capsys):
    folder = pathlib.Path(shutil.copytree(pipelines["base"], tmp_path / "x4"))
    index = {"_class_name": "StableDiffusionUpscalePipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert main.main(["import", "if", f"--src={folder}", f"--out={tmp_path / 'stage'}"]) == 1
    assert "StableDiffusionUpscalePipeline' is a latent upscaler" in capsys.readouterr().err


def shard(folder: pathlib.Path, file: str, stem: str, index: str) -> None:
    """Splits a safetensors file into two shards of float16."""
    arrays = weights.read_safetensors(folder / file)
    names = sorted(arrays)
    parts = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard_name, held in parts.items():
        half = {name: np.asarray(arrays[name]).astype(np.float16) for name in held}
        weights.write_safetensors(folder / shard_name, half)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    (folder / file).unlink()


def test_sharded_half_precision_files(pipelines, stages, tmp_path):
    folder = pathlib.Path(shutil.copytree(pipelines["base"], tmp_path / "fp16"))
    unet = "diffusion_pytorch_model"
    index = f"{unet}.safetensors.index.fp16.json"
    shard(folder / "unet", f"{unet}.safetensors", f"{unet}.fp16", index)
    index = "model.safetensors.index.fp16.json"
    shard(folder / "text_encoder", "model.safetensors", "model.fp16", index)
    assert main.main(["import", "if", f"--src={folder}", f"--out={tmp_path / 'stage'}"]) == 0
    half, full = (load_stage(str(path)) for path in (tmp_path / "stage", stages["base"]))
    for ours, theirs in zip(
        jax.tree.leaves(half.params), jax.tree.leaves(full.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs.astype(np.float16).astype(np.float32))
    emb, _ = Cascade.load([str(tmp_path / "stage")]).embed(PROMPTS[:1])
    np.testing.assert_allclose(emb, golden("base", "plain")["text_emb"][:1], atol=0.02)


def test_given_noise_is_checked(stages):
    stage = load_stage(str(stages["base"]))
    cascade = Cascade([Stage(stage.config, stage.params)])
    ones = np.ones((1, 5), bool)
    texts = {"text_emb": np.zeros((1, 5, 24), np.float32), "text_mask": ones}
    texts |= {"negative_emb": texts["text_emb"], "negative_mask": ones}
    for noise, says in [
        ({"base": Noise()}, "if_base"),
        ({"if_base": Noise(start=np.zeros((1, 4, 4, 3)))}, r"start of shape \(1, 4, 4, 3\)"),
        ({"if_base": Noise(steps=np.zeros((1, 7, 8, 8, 3)))}, r"\(1, 99, 8, 8, 3\) or \(1, 100,"),
        ({"if_base": Noise(lowres=np.zeros((1, 8, 8, 3)))}, "base stage takes none"),
    ]:
        with pytest.raises(RequestError, match=says):
            cascade.sample(noise=noise, **texts)
    with pytest.raises(RequestError, match="no effect with sampler='ddim'"):
        cascade.sample(
            noise={"if_base": Noise(steps=np.zeros((1, 1, 8, 8, 3)))},
            stage_settings={"if_base": {"sampler": "ddim", "steps": 2}},
            **texts,
        )
    # Without an encoder, the empty caption has to be given.
    with pytest.raises(RequestError, match="text encoder"):
        cascade.sample(text_emb=texts["text_emb"], text_mask=ones)


def test_programs_and_training_refuse_the_empty_caption(stages, tmp_path, capsys):
    export = ["export", f"--workdir={stages['base']}", "--format=stablehlo"]
    assert main.main([*export, f"--out={tmp_path / 'program'}"]) == 1
    assert "config.text.null='empty'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="config.text.null='empty' is for sampling"):
        check_trainable(load_stage(str(stages["base"])).config)
