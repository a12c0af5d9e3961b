"""LoRAs of IF's U-Nets: files of peft and diffusers give their output; ours load there."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.interop import if_lora, if_unet, weights
from imagen_jax.models.unet import UNet
from imagen_jax.stages.lora import Factors, with_adapters
from tests.interop.test_if_unet import CASES, GOLDEN, folders  # noqa: F401

LORAS = pathlib.Path(__file__).parents[1] / "golden" / "if_lora"


def output(config, params, case: str) -> np.ndarray:
    """The network's output on the inputs of the golden file, [B, channels, h, w]."""
    golden = np.load(GOLDEN / case / "golden.npz")
    logsnr = cosine_steps().astype(np.float32)
    lowres = {"lowres_logsnr": logsnr[golden["class_labels"]]} if config.lowres else {}
    z, mask = golden["x"].transpose(0, 2, 3, 1), np.ones_like(golden["mask"])
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(UNet(config).apply)
        out = apply({"params": params}, z, logsnr[golden["t"]], golden["text"], mask, **lowres)
    return np.asarray(out).transpose(0, 3, 1, 2)


def adapter(path, config):
    return {kernel: Factors(*pair) for kernel, pair in if_lora.read(path, config).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["diffusers", pytest.param("peft", marks=pytest.mark.slow)])
def test_a_lora_of_peft_gives_its_output(folders, case, kind):  # noqa: F811
    config, params = if_unet.load(folders[case])
    golden = np.load(LORAS / case / "golden.npz")["out"]
    found = adapter(LORAS / case / kind, config)
    assert np.abs(output(config, with_adapters(params, [(found, 1.0)]), case) - golden).max() < 1e-4
    assert np.abs(output(config, params, case) - golden).max() > 1e-2
    # Two of half the weight are one.
    halves = with_adapters(params, [(found, 0.5), (found, 0.5)])
    assert np.abs(output(config, halves, case) - golden).max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_reads_back_the_same_updates(folders, case, tmp_path):  # noqa: F811
    config, params = if_unet.load(folders[case])
    found = adapter(LORAS / case / "peft", config)
    if_lora.save(tmp_path, found, config)
    for path in (tmp_path / if_lora.DIFFUSERS_FILE, tmp_path):
        again = adapter(path, config)
        assert again.keys() == found.keys()
        for kernel, (a, b) in found.items():
            expected = np.tensordot(a, b, 1)
            got = np.tensordot(*again[kernel], 1)
            assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max(), kernel


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_older_names_of_diffusers_are_read(folders, case, tmp_path):  # noqa: F811
    """`X.lora.down.weight` with `X.alpha`, and those of attention processors."""
    config, _ = if_unet.load(folders[case])
    expected = adapter(LORAS / case / "peft", config)
    arrays = weights.read_safetensors(LORAS / case / "peft" / if_lora.PEFT_FILE)
    settings = json.loads((LORAS / case / "peft" / if_lora.PEFT_CONFIG).read_text())
    old = {}
    for name, array in arrays.items():
        layer, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        which = {"A.weight": "down", "B.weight": "up"}[kind]
        old[f"unet.{layer}.lora.{which}.weight"] = np.asarray(array)
        rank, alpha = settings["r"], settings["lora_alpha"]
        if layer.endswith("to_q"):
            rank, alpha = settings["rank_pattern"]["to_q"], settings["alpha_pattern"]["to_q"]
        assert np.asarray(array).shape[0 if which == "down" else 1] == rank
        old[f"unet.{layer}.alpha"] = np.array(alpha, np.float32)
    weights.write_safetensors(tmp_path / "old.safetensors", old)
    found = adapter(tmp_path / "old.safetensors", config)
    for kernel, (a, b) in expected.items():
        np.testing.assert_allclose(
            np.tensordot(*found[kernel], 1), np.tensordot(a, b, 1), rtol=1e-5, atol=1e-6
        )


def test_a_lora_of_another_network_names_the_layer(folders, tmp_path):  # noqa: F811
    config, _ = if_unet.load(folders["base"])
    with pytest.raises(weights.WeightsError, match="of another network: config.model has no layer"):
        if_lora.read(LORAS / "sr" / "peft", config)
    arrays = {"unet.mid_block.attentions.0.to_q.lora_A.weight": np.ones((1, 64), np.float32)}
    weights.write_safetensors(tmp_path / "half.safetensors", arrays)
    with pytest.raises(weights.WeightsError, match="only one of the factors"):
        if_lora.read(tmp_path / "half.safetensors", config)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ours_gives_the_same_output_in_diffusers_and_peft(folders, case, tmp_path):  # noqa: F811
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from tests.reference import if_lora as reference

    config, params = if_unet.load(folders[case])
    rng = np.random.default_rng(3)
    kernels = {
        path.removesuffix("/kernel"): array for path, array in weights.flatten(params).items()
    }
    ours = {
        path: Factors(
            rng.normal(size=(*kernels[path].shape[:-1], 4)).astype(np.float32) / 16,
            rng.normal(size=(4, kernels[path].shape[-1])).astype(np.float32) / 4,
        )
        for path in kernels
        if "attention" in path and kernels[path].ndim == 2 or path.endswith("/conv_in")
    }
    expected = output(config, with_adapters(params, [(ours, 1.0)]), case)
    assert np.abs(expected - output(config, params, case)).max() > 1e-2
    if_lora.save(tmp_path, ours, config)
    unet = reference.network(case)
    unet.load_lora_adapter(tmp_path, weight_name=if_lora.DIFFUSERS_FILE, prefix="unet")
    assert np.abs(reference.output(unet, case) - expected).max() < 1e-4
    wrapped = peft.PeftModel.from_pretrained(reference.network(case), str(tmp_path))
    assert np.abs(reference.output(wrapped, case) - expected).max() < 1e-4
