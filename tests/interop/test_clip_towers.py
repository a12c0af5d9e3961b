"""CLIP score: both towers, preprocessing and cosines against transformers; rejected files.

The golden files are transformers' own (tests/reference/make_clip_golden.py); with the extra `peers`
the shape of ViT-B/32 is compared too.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.evaluation.features import clip_score, extract
from imagen_jax.evaluation.features.extract import LazyImages
from imagen_jax.interop import hf_clip, weights
from imagen_jax.io import images

BATCH = 3  # In all tests, so that it is compiled once.
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "clip"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def towers():
    return hf_clip.read_towers(GOLDEN)


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "clip"))


def test_preprocessing_equals_transformers(golden):
    for i, expected in enumerate(golden["inputs"]):
        np.testing.assert_allclose(
            clip_score.preprocess(golden[f"picture_{i}"], 28), expected, atol=1e-5
        )


def test_embeddings_and_cosines_equal_transformers(golden, towers, tmp_path):
    pytest.importorskip("tokenizers")
    shown = LazyImages(3, lambda i: golden[f"picture_{i}"])
    network = clip_score.image_network(towers)
    pictures = extract.extract(shown, network, tmp_path, batch_size=BATCH).features()
    captions = clip_score.embed_captions(
        str(GOLDEN), towers, golden["captions"].tolist(), batch_size=BATCH
    )
    for ours, theirs in ((pictures, "picture_embeddings"), (captions, "text_embeddings")):
        assert np.abs(golden[theirs]).max() > 1
        assert np.abs(ours - golden[theirs]).max() < 1e-4
    for i, expected in enumerate(golden["cosines"]):
        found = clip_score.cosines(pictures[[i] * len(captions)], captions)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_folder_of_samples_has_a_score_and_goes_on_where_it_was(golden, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    from imagen_jax.cli import main

    captions, rows = golden["captions"].tolist(), []
    for i, caption in enumerate((captions[0], captions[1], captions[0])):
        images.save_png(tmp_path / "samples" / f"{i}.png", golden[f"picture_{i}"], {})
        rows.append(json.dumps({"file": f"{i}.png", "prompt": caption}))
    (tmp_path / "samples" / "samples.jsonl").write_text("\n".join(rows))
    flags = [f"--samples={tmp_path}/samples", f"--clip={GOLDEN}", f"--out={tmp_path}/clip.json"]
    flags.append(f"--batch_size={BATCH}")
    assert main.main(["evaluate", "clip_score", *flags]) == 0
    first = json.loads((tmp_path / "clip.json").read_text())
    chosen = [golden["cosines"][0, 0], golden["cosines"][1, 1], golden["cosines"][2, 0]]
    assert first["clip_score"] == pytest.approx(np.mean(chosen), abs=1e-5)
    assert first["low"] < first["clip_score"] < first["high"]
    assert (first["images"], first["prompts"]) == (3, 2)
    capsys.readouterr()
    assert main.main(["evaluate", "clip_score", *flags]) == 0
    assert json.loads((tmp_path / "clip.json").read_text()) == first
    assert "features of" not in capsys.readouterr().out


def test_images_of_one_prompt_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    by_prompt = rng.normal(0.3, 0.05, 50)
    once = clip_score.mean_over_prompts(by_prompt, np.arange(50))
    often = clip_score.mean_over_prompts(np.repeat(by_prompt, 8), np.repeat(np.arange(50), 8))
    assert often == pytest.approx(once)
    half = 2.0096 * by_prompt.std(ddof=1) / 50**0.5
    assert once["high"] - once["clip_score"] == pytest.approx(half, rel=1e-3)
    alone = clip_score.mean_over_prompts(by_prompt[:1], np.zeros(1, int))
    assert alone["low"] is None


def test_what_is_not_a_whole_clip_is_named(copy):
    text_alone = GOLDEN.parent / "clip_text"
    with pytest.raises(weights.WeightsError, match="vision_config"):
        hf_clip.read_towers(text_alone)
    arrays = {
        k: np.array(v) for k, v in weights.read_safetensors(copy / "model.safetensors").items()
    }
    arrays.pop("visual_projection.weight")
    arrays["vision_model.extra"] = np.zeros(3, np.float32)
    weights.write_safetensors(copy / "model.safetensors", arrays)
    with pytest.raises(weights.WeightsError) as caught:
        hf_clip.read_towers(copy)
    assert "missing: visual_projection.weight" in str(caught.value)
    assert "extra: vision_model.extra" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["B/32", "L/14"])
def test_public_shapes_equal_transformers(form, tmp_path):
    """Of ViT-B/32 all layers, of ViT-L/14 its widths and first layers, saved as a torch file."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text, vision, dim = {}, {}, 512
    if form == "L/14":
        dim = 768
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        vision |= {"patch_size": 14, "num_hidden_layers": 3}
        text["num_hidden_layers"] = 3
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    towers = hf_clip.read_towers(tmp_path)
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    ids = rng.integers(1, 49000, (2, 77)).astype(np.int32)
    ids[:, -1] = 49407
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids.astype(np.int64)),
            pixel_values=torch.tensor(pictures.transpose(0, 3, 1, 2)),
        )
    with jax.default_matmul_precision("highest"):
        network = clip_score.image_network(towers)
        seen = np.asarray(network.apply(network.params, pictures))
        read = np.asarray(
            clip_score._embed_text(
                towers.text_params, ids, ids > 0, config=towers.text, dim=towers.projection_dim
            )
        )
    for ours, expected in ((seen, theirs.image_embeds), (read, theirs.text_embeds)):
        ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        gap = np.abs(ours - expected.numpy()).max()
        print(f"{form}: largest difference {gap:.1e}")
        assert gap < 1e-4
