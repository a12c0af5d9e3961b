"""DeepFloyd IF's U-Nets: parity with diffusers' outputs, round trips, rejected values."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.interop import if_config, if_unet, weights
from imagen_jax.models.conditioning import sinusoidal
from imagen_jax.models.unet import UNet
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import check_chain, load_stage
from imagen_jax.stages.loss import loss_fn
from imagen_jax.stages.stage import Stage
from tests.reference.if_unet import make_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "if_unet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = ["base", "sr"]


def write(case: str, folder: pathlib.Path, **fields) -> pathlib.Path:
    """The case as diffusers' folder, with fields of its config.json changed."""
    folder.mkdir(parents=True)
    values = json.loads((GOLDEN / case / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    shapes = json.loads((GOLDEN / case / "shapes.json").read_text())
    weights.write_safetensors(folder / WEIGHTS, make_weights(shapes))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("if")
    return {case: write(case, root / case) for case in CASES}


@pytest.fixture(scope="module")
def base(folders):
    return if_unet.load(folders["base"])


@pytest.mark.parametrize("case", CASES)
def test_output_equals_diffusers(folders, case):
    config, params = if_unet.load(folders[case])
    golden = np.load(GOLDEN / case / "golden.npz")
    logsnr = cosine_steps().astype(np.float32)
    z = golden["x"].transpose(0, 2, 3, 1)
    lowres = {"lowres_logsnr": logsnr[golden["class_labels"]]} if config.lowres else {}
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(UNet(config).apply)
        for name, mask in (("out", np.ones_like(golden["mask"])), ("out_masked", golden["mask"])):
            if name in golden:
                out = apply(
                    {"params": params}, z, logsnr[golden["t"]], golden["text"], mask, **lowres
                )
                assert np.abs(np.asarray(out).transpose(0, 3, 1, 2) - golden[name]).max() < 2e-5
    assert golden["out"].std() > 0.1


def test_the_mask_counts():
    golden = np.load(GOLDEN / "base" / "golden.npz")
    assert np.abs(golden["out"] - golden["out_masked"])[1:].max() > 1e-3


def test_steps_of_the_table():
    """alpha_bar of the continuous formula, but for the last steps, whose betas are capped."""
    logsnr = cosine_steps()
    assert logsnr.shape == (1000,) and (np.diff(logsnr) < 0).all()
    t = np.arange(1, 999) / 1000
    continuous = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(np.pi * 0.004 / 1.008) ** 2
    np.testing.assert_allclose(1 / (1 + np.exp(-logsnr[:998])), continuous, rtol=1e-6)
    assert logsnr[-1] == pytest.approx(np.log(2.4286e-9), abs=0.01)


@pytest.mark.parametrize("width", [192, 320])
def test_sinusoids_of_the_steps_are_those_of_torch(width):
    """torch rounds exponent, frequency and angle to float32; a last bit of a frequency is 3e-5."""
    half = width // 2
    exponent = np.float32(-np.log(1e4)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    steps = np.arange(1000, dtype=np.float32)
    angle = (steps[:, None] * frequency).astype(np.float64)
    found = np.asarray(jax.jit(sinusoidal, static_argnums=1)(steps, width))
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    assert np.abs(found - expected).max() < 2e-7


@pytest.mark.parametrize("case", CASES)
def test_import_then_export_gives_the_same_bytes(folders, case, tmp_path, capsys):
    stage, back = tmp_path / "stage", tmp_path / "back"
    assert main.main(["import", "if", f"--src={folders[case]}", f"--out={stage}"]) == 0
    export = ["export", f"--workdir={stage}", "--format=diffusers"]
    assert main.main([*export, f"--out={back}"]) == 0
    for name in ("config.json", WEIGHTS):
        assert (back / name).read_bytes() == (folders[case] / name).read_bytes(), name

    # Without the configuration it came with, ours is translated back.
    (stage / "diffusers_config.json").unlink()
    assert main.main([*export, f"--out={back}"]) == 0
    theirs = json.loads((folders[case] / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == theirs
    assert "parameters" in capsys.readouterr().out


def test_every_place_may_attend_in_its_own_way():
    """Per level and in the middle: with pixels or text alone; there and back."""
    values = json.loads((GOLDEN / "sr" / "config.json").read_text())
    values |= {"only_cross_attention": [False, True, False], "layers_per_block": 3}
    values |= {"mid_block_only_cross_attention": True, "time_embedding_dim": None}
    config = if_config.model_config(values, "test")
    assert config.self_attention == (False, False, True) and config.num_res_blocks == (3, 3, 3)
    assert config.cross_attention == (False, True, True)
    assert config.middle_attention == (False, True) and config.embed_dim == 64
    assert if_config.diffusers_config(config, values["sample_size"]) == values


def imported(folders, tmp_path) -> list[Stage]:
    stages = []
    for case in CASES:
        flags = [f"--src={folders[case]}", f"--out={tmp_path / case}"]
        flags += ["--image_size=32"] if case == "sr" else []
        assert main.main(["import", "if", *flags]) == 0
        stages.append(load_stage(str(tmp_path / case)))
    check_chain([stage.config for stage in stages])
    return stages


@pytest.mark.parametrize("index", [0, 1], ids=CASES)
def test_imported_stages_can_be_trained_and_sampled(folders, tmp_path, index):
    """By shapes alone: the learned variance must be left out of loss and samples."""
    config, params = imported(folders, tmp_path)[index]
    params = jax.tree.map(jnp.asarray, params)
    n, size, low = 2, config.data.image_size, config.data.lowres_size
    text = Text(jnp.zeros((n, 77, 24)), jnp.ones((n, 77), bool))
    batch = {"image": jnp.zeros((n, size, size, 3)), "text_emb": text[0], "text_mask": text[1]}
    lowres = {"lowres": jnp.zeros((n, low, low, 3))} if low else {}
    key = jax.random.key(0)
    loss, _ = jax.eval_shape(lambda: loss_fn(params, batch | lowres, key, config))
    assert loss.shape == ()
    keys = image_keys(0, [0, 1], [0, 0])
    sampled = jax.eval_shape(lambda: sample_stage(params, config, text, keys, **lowres))
    assert sampled.shape == (n, size, size, 3)


@pytest.mark.slow
def test_an_imported_cascade_samples(folders, tmp_path):
    text = np.random.default_rng(0).normal(size=(1, 77, 24)).astype(np.float32)
    stages = [
        s._replace(
            config=dataclasses.replace(
                s.config, sampling=dataclasses.replace(s.config.sampling, steps=2)
            )
        )
        for s in imported(folders, tmp_path)
    ]
    chain = Cascade(stages)
    small, large = chain.sample_stages(text_emb=text, text_mask=np.ones((1, 77), bool))
    assert small.shape == (1, 8, 8, 3) and large.shape == (1, 32, 32, 3) and large.std() > 1


def test_torch_files_and_missing_parameters(folders, tmp_path):
    copy = pathlib.Path(shutil.copytree(folders["base"], tmp_path / "copy"))
    arrays = dict(weights.read_safetensors(copy / WEIGHTS))
    arrays["strange.weight"] = arrays.pop("encoder_hid_proj.bias")
    weights.write_safetensors(copy / WEIGHTS, arrays)
    with pytest.raises(weights.WeightsError) as error:
        if_unet.load(copy)
    assert "missing: encoder_hid_proj.bias; extra: strange.weight" in str(error.value)
    (copy / WEIGHTS).unlink()
    with pytest.raises(weights.WeightsError, match="diffusion_pytorch_model.bin"):
        if_unet.load(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "mish"),
        ("act_fn", "relu"),
        ("addition_embed_type", None),
        ("addition_embed_type", "image"),
        ("addition_embed_type", "text_image"),
        ("addition_embed_type", "text_time"),
        ("addition_embed_type_num_heads", 5),
        ("attention_head_dim", [16, 8]),
        ("attention_type", "gated"),
        ("attention_type", "gated-text-image"),
        ("block_out_channels", [32, 64, 64]),
        ("class_embed_type", "identity"),
        ("class_embed_type", "projection"),
        ("class_embed_type", "simple_projection"),
        ("class_embeddings_concat", True),
        ("conv_in_kernel", 1),
        ("cross_attention_norm", "layer_norm"),
        ("down_block_types", ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]),
        ("encoder_hid_dim", None),
        ("in_channels", 6),
        ("layers_per_block", [1, 1, 1]),
        ("mid_block_scale_factor", 2.0),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("norm_num_groups", None),
        ("num_class_embeds", 10),
        ("resnet_skip_time_act", True),
        ("resnet_time_scale_shift", "default"),
        ("resnet_time_scale_shift", "ada_group"),
        ("time_embedding_act_fn", "silu"),
        ("time_embedding_type", "fourier"),
        ("up_block_types", ["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"]),
        ("_class_name", "SD3Transformer2DModel"),
        ("quantum_entanglement", 3),
    ],
)
def test_what_cannot_be_represented_is_named(tmp_path, capsys, field, value):
    folder = write("base", tmp_path / "if", **{field: value})
    assert main.main(["import", "if", f"--src={folder}", f"--out={tmp_path / 'stage'}"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"{field}={value!r}" in error, error
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("field", sorted(if_config._DEFAULTS))
def test_a_value_of_another_kind_is_named(field):
    """Values of JSON that no version of diffusers writes there."""
    values = json.loads((GOLDEN / "base" / "config.json").read_text())
    for value in (-1, 0, "x", {}, [None], 1e9, float("nan")):
        if (field, value) not in (("dropout", 0), ("resnet_skip_time_act", 0)):
            with pytest.raises(weights.WeightsError, match=re.escape(f"{field}=")):
                if_config.model_config(values | {field: value}, "test")


@pytest.mark.parametrize(
    "change",
    [
        {"text_pooling": "attention"},
        {"noise_embedding": "time"},
        {"text_norm": "layer"},
        {"text_conditioning": "cross"},
        {"patch_size": 2},
        {"skip_scale": 0.5},
        {"text_width": 0},
        {"cross_attention": (False, False)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_diffusers_does_not_support_is_named(base, tmp_path, change):
    config, params = base
    with pytest.raises(weights.WeightsError, match=f"config.model.{next(iter(change))}="):
        if_unet.save(tmp_path / "out", dataclasses.replace(config, **change), params, sample_size=8)
    assert not (tmp_path / "out").exists()


def test_a_skip_scale_left_to_the_network_is_that_of_diffusers(base, tmp_path):
    config, params = base
    assert config.skip_scale == 1.0
    source = if_config.diffusers_config(config, 8) | {"upcast_attention": True}
    for skip_scale in (1.0, None):
        network = dataclasses.replace(config, skip_scale=skip_scale)
        if_unet.save(tmp_path, network, params, sample_size=8, source=source)
        # The source still describes the network, so it is written with its field without effect.
        assert json.loads((tmp_path / "config.json").read_text()) == source
        assert if_unet.load(tmp_path)[0] == config


def test_bad_flags(folders, tmp_path, capsys):
    for flags, says in [
        ([f"--src={tmp_path / 'nowhere'}"], "config.json is missing"),
        ([f"--src={folders['sr']}", "--image_size=24"], "must be a multiple of 16"),
    ]:
        assert main.main(["import", "if", *flags, f"--out={tmp_path / 'stage'}"]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and says in error
