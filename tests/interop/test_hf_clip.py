"""CLIP's text tower: parity with transformers, including its vocabulary; rejected files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import TextConfig
from imagen_jax.interop import hf_clip, weights
from imagen_jax.text import encoders
from imagen_jax.text.frozen_encoder import encode_tokens

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "clip_text"
CONFIG = TextConfig(encoder="clip", path=str(GOLDEN), max_len=32)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "encoder_golden.npz"))


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("tokenizers")
    return encoders.load_text_encoder(CONFIG)


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "clip"))


def test_penultimate_layer_equals_transformers(encoder, golden):
    mask = golden["mask"]
    with jax.default_matmul_precision("highest"):
        encoded = np.asarray(encoder.encode(golden["tokens"].astype(np.int32), mask))
    assert np.abs(golden["penultimate"][mask]).max() > 5
    assert np.abs(encoded - golden["penultimate"])[mask].max() < 1e-4
    assert not encoded[~mask].any()


def test_tokens_equal_transformers(encoder, golden):
    batch = encoder.tokenize(golden["captions"].tolist())
    np.testing.assert_array_equal(batch.mask, golden["mask"])
    np.testing.assert_array_equal(batch.ids[batch.mask], golden["tokens"][batch.mask])
    # Two captions are cut and keep their end mark.
    assert batch.truncated == (2, 5) and batch.ids[5, -1] == golden["tokens"].max()
    assert encoder.token_count("") == 2
    assert encoder.tokenize(["\udcff"]).mask.sum() == 3


def test_padding_is_inert(encoder):
    short, long = (encoder.tokenize([t]) for t in ("a red circle", "a red circle, then more"))
    count = int(short.mask.sum()) - 1
    other = short.ids.copy()
    other[~short.mask] = 7
    first = np.asarray(encoder.encode(short.ids, short.mask))
    np.testing.assert_array_equal(first, np.asarray(encoder.encode(other, short.mask)))
    # Causal: what follows does not reach a token.
    after = np.asarray(encoder.encode(long.ids, long.mask))
    np.testing.assert_allclose(first[:, :count], after[:, :count], atol=1e-5)


def test_tokenizer_json_is_read_as_well(encoder, copy):
    tokenizer = encoder._vocabulary._tokenizer
    (copy / "vocab.json").unlink()
    with pytest.raises(ConfigError, match="neither vocab.json with merges.txt nor tokenizer.json"):
        encoders.load_text_encoder(dataclasses.replace(CONFIG, path=str(copy)))
    tokenizer.save(str(copy / "tokenizer.json"))
    other = encoders.load_text_encoder(dataclasses.replace(CONFIG, path=str(copy)))
    captions = ["A red circle's", "café 12"]
    np.testing.assert_array_equal(other.tokenize(captions).ids, encoder.tokenize(captions).ids)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="has no CLIP vocabulary"):
        encoders.load_text_encoder(dataclasses.replace(CONFIG, path=str(copy)))


def test_whole_models_and_bare_towers_are_read(copy):
    arrays = {name: np.array(a) for name, a in weights.read_folder(copy).items()}
    theirs = {path: t.read() for path, t in hf_clip.open_tensors(copy)[1].items()}
    bare = {name.removeprefix("text_model."): array for name, array in arrays.items()}
    del bare["text_projection.weight"]
    whole = arrays | {"vision_model.x": arrays["text_projection.weight"]}
    whole["text_model.embeddings.position_ids"] = np.arange(32)[None]
    whole["logit_scale"] = np.float32(4.6)
    config = json.loads((copy / "config.json").read_text())
    for content, kind in (
        (bare, config),
        (whole, {"model_type": "clip", "text_config": config}),
    ):
        weights.write_safetensors(copy / "model.safetensors", content)
        (copy / "config.json").write_text(json.dumps(kind))
        ours = hf_clip.open_tensors(copy)[1]
        assert ours.keys() == theirs.keys()
        for path, tensor in ours.items():
            np.testing.assert_array_equal(tensor.read(), theirs[path])


def test_every_misfit_is_named(copy):
    arrays = {name: np.array(a) for name, a in weights.read_folder(copy).items()}
    arrays["text_model.strange"] = arrays.pop("text_model.final_layer_norm.bias")
    arrays.pop("text_model.encoder.layers.2.mlp.fc1.weight")
    arrays["text_model.embeddings.position_embedding.weight"] = np.zeros((5, 32), np.float32)
    weights.write_safetensors(copy / "model.safetensors", arrays)
    with pytest.raises(weights.WeightsError) as caught:
        hf_clip.open_tensors(copy)
    for part in (
        "missing: encoder.layers.2.mlp.fc1.weight, final_layer_norm.bias",
        "extra: strange",
        "wrong shape: embeddings.position_embedding.weight is (5, 32), expected (32, 32)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5', expected 'clip'"),
        ({"hidden_act": "swish"}, "hidden_act='swish', expected one of quick_gelu, gelu"),
    ],
)
def test_other_models_are_rejected(copy, change, message):
    values = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(weights.WeightsError, match=message):
        hf_clip.open_tensors(copy)


def test_more_tokens_than_positions_are_rejected():
    with pytest.raises(ConfigError, match="config.text.max_len=33 must be at most 32"):
        encoders.load_text_encoder(dataclasses.replace(CONFIG, max_len=33))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_full_size_tower_equals_transformers(activation, tmp_path):
    """ViT-L/14's own shape, with transformers beside it (extra `peers`)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, hidden_act=activation
    )
    model = transformers.CLIPTextModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    shape, tensors = hf_clip.open_tensors(tmp_path)
    params = weights.unflatten({path: tensor.read() for path, tensor in tensors.items()})
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49406, (2, 77))
    ids[:, 0], ids[0, 76], ids[1, 20:] = 49406, 49407, 49407
    mask = np.arange(77) <= np.array([[76], [20]])
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    expected = out.hidden_states[-2].numpy()
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(encode_tokens(params, ids.astype(np.int32), mask, config=shape))
    error = np.abs(ours - expected)[mask].max()
    print(f"{activation}: max abs {error:.2g}, rms of the vectors {expected[mask].std():.2g}")
    assert error < 1e-4
