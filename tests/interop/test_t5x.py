"""Reading t5x checkpoints: parity with t5x, chunked, compressed and bfloat16 storage, damage."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from imagen_jax.config.text import T5Config
from imagen_jax.interop import t5x, weights
from imagen_jax.models.t5 import T5Encoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5_t5x"
CONFIG = T5Config(vocab_size=128, emb_dim=32, num_layers=3, num_heads=4, head_dim=8, mlp_dim=64)


@pytest.fixture(scope="module")
def checkpoints():
    return {n: t5x.load(GOLDEN / f"checkpoint_{n}", CONFIG)[1] for n in (1000, 2000, 3000)}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "encoder_golden.npz"))


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(GOLDEN / "checkpoint_1000", tmp_path / "checkpoint_1000")
    return tmp_path / "checkpoint_1000"


def encode(config, params, golden):
    apply = jax.jit(T5Encoder(config).apply)
    return np.asarray(apply({"params": params}, golden["tokens"], golden["mask"]))


def test_encoder_equals_t5x(checkpoints, golden):
    with jax.default_matmul_precision("highest"):
        encoded = encode(CONFIG, checkpoints[1000], golden)
    valid = golden["mask"]
    assert np.abs(encoded - golden["encoded"])[valid].max() < 2e-5


def test_bfloat16_encoder_is_as_near_as_the_reference(checkpoints, golden):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    valid = golden["mask"]
    ours = (encode(config, checkpoints[1000], golden) - golden["encoded"])[valid]
    reference = (golden["encoded_bf16"] - golden["encoded"])[valid]
    assert 0 < np.sqrt((ours**2).mean()) < 1.2 * np.sqrt((reference**2).mean())


def test_chunks_and_compression_do_not_matter(checkpoints):
    one, many = weights.flatten(checkpoints[1000]), weights.flatten(checkpoints[2000])
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])


def test_bfloat16_storage_is_widened_exactly(checkpoints):
    exact, stored = weights.flatten(checkpoints[1000]), weights.flatten(checkpoints[3000])
    for name, value in exact.items():
        assert stored[name].dtype == np.float32
        np.testing.assert_array_equal(stored[name], value.astype(jnp.bfloat16).astype(np.float32))


def test_every_misfit_is_named():
    config = dataclasses.replace(CONFIG, num_layers=4, vocab_size=100, mlp_activations=("relu",))
    with pytest.raises(weights.WeightsError) as caught:
        t5x.load(GOLDEN / "checkpoint_1000", config)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "missing: layers_0/mlp/wi/kernel",
        "layers_3/attention/out/kernel",
        "extra: layers_0/mlp/wi_0/kernel",
        "wrong shape: token_embedder/embedding is (128, 32), expected (100, 32)",
    ):
        assert part in message


def test_missing_folder_and_missing_chunk_are_named(copy):
    shutil.rmtree(copy / "target.encoder.layers_1.mlp.wo.kernel")
    with pytest.raises(weights.WeightsError, match="missing: layers_1/mlp/wo/kernel"):
        t5x.load(copy, CONFIG)
    shutil.copytree(
        GOLDEN / "checkpoint_1000" / "target.encoder.layers_1.mlp.wo.kernel",
        copy / "target.encoder.layers_1.mlp.wo.kernel",
    )
    (copy / "target.encoder.encoder_norm.scale" / "0").unlink()
    with pytest.raises(weights.WeightsError, match="encoder_norm/scale is damaged or incomplete"):
        t5x.load(copy, CONFIG)


@pytest.mark.parametrize("file", ["checkpoint", "target.token_embedder.embedding/0.0"])
def test_cut_file_is_one_clear_line(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(weights.WeightsError, match="checkpoint_1000") as caught:
        t5x.load(copy, CONFIG)
    assert "\n" not in str(caught.value)


def test_inline_arrays_are_read(copy):
    tree = msgpack.unpackb((copy / "checkpoint").read_bytes(), strict_map_key=False)
    scale = np.arange(32, dtype=np.float32)
    inline = msgpack.packb((scale.shape, "float32", scale.tobytes()), use_bin_type=True)
    tree["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = msgpack.ExtType(1, inline)
    (copy / "checkpoint").write_bytes(msgpack.packb(tree))
    shutil.rmtree(copy / "target.encoder.encoder_norm.scale")
    params = t5x.load(copy, CONFIG)[1]
    np.testing.assert_array_equal(params["encoder_norm"]["scale"], scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda encoder: {"encoder": encoder}, "stacked"),
        (
            lambda encoder: {"layers_0": {"relpos_bias": encoder["relpos_bias"]}},
            "relative bias per layer",
        ),
    ],
)
def test_umt5_layouts_are_rejected(copy, change, message):
    tree = msgpack.unpackb((copy / "checkpoint").read_bytes(), strict_map_key=False)
    target = tree["optimizer"]["target"]
    target["encoder"] = change(target["encoder"])
    (copy / "checkpoint").write_bytes(msgpack.packb(tree))
    with pytest.raises(weights.WeightsError, match=f"umT5.*{message}"):
        t5x.load(copy, CONFIG)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(weights.WeightsError, match="no file 'checkpoint'"):
        t5x.load(tmp_path, CONFIG)


def test_an_address_is_read_like_a_folder(checkpoints):
    """gs:// goes the same way through tensorstore; it was not run."""
    params = t5x.load(f"file://{GOLDEN}/checkpoint_2000/", CONFIG)[1]
    exact = weights.flatten(checkpoints[2000])
    for name, value in weights.flatten(params).items():
        np.testing.assert_array_equal(value, exact[name])
    with pytest.raises(weights.WeightsError, match="no file 'checkpoint'"):
        t5x.load("file:///nowhere/checkpoint_1", CONFIG)
    with pytest.raises(weights.WeightsError, match="s4://bucket/checkpoint_1 cannot be opened"):
        t5x.load("s4://bucket/checkpoint_1", CONFIG)
