"""Hugging Face T5: parity with transformers, torch and sharded files, round trip, damage."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import shutil
import struct
import sys
import types
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from imagen_jax.interop import hf_t5, weights
from imagen_jax.models.t5 import T5Encoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5_hf"
V11 = GOLDEN / "v1_1_gated_gelu_encoder"
# A whole encoder-decoder, as pytorch_model.bin; its encoder is V11's.
FULL = GOLDEN / "v1_1_gated_gelu_full"


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(shutil.copytree(V11, tmp_path / "t5"))


@pytest.mark.parametrize("name", ["v1_1_gated_gelu_encoder", "v1_0_relu_encoder"])
def test_encoder_equals_transformers(name):
    config, params = hf_t5.load(GOLDEN / name)
    golden = np.load(GOLDEN / name / "encoder_golden.npz")
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(T5Encoder(config).apply)
        encoded = np.asarray(apply({"params": params}, golden["tokens"], golden["mask"]))
    assert np.abs(encoded - golden["encoded"])[golden["mask"]].max() < 2e-5


def test_torch_file_of_the_whole_model_gives_the_same_encoder():
    config, params = hf_t5.load(FULL)
    other_config, other = hf_t5.load(V11)
    assert config == other_config
    assert_equal_trees(params, other)


def test_save_then_load_is_bit_equal(tmp_path):
    for name in (V11, GOLDEN / "v1_0_relu_encoder"):
        config, params = hf_t5.load(name)
        hf_t5.save(tmp_path / name.name, config, params)
        config_again, params_again = hf_t5.load(tmp_path / name.name)
        assert config_again == config
        assert_equal_trees(params_again, params)
        # Names, shapes and bytes are those transformers itself wrote.
        theirs = weights.read_safetensors(name / "model.safetensors")
        ours = weights.read_safetensors(tmp_path / name.name / "model.safetensors")
        assert_equal_trees(ours, theirs)


def test_shards_are_joined_and_a_missing_one_is_named(copy):
    arrays = weights.read_safetensors(copy / "model.safetensors")
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        part = {name: array for name, array in arrays.items() if files[name] == file}
        weights.write_safetensors(copy / file, part)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_equal_trees(hf_t5.load(copy)[1], hf_t5.load(V11)[1])
    (copy / "part-1.safetensors").unlink()
    with pytest.raises(weights.WeightsError, match="part-1.safetensors, which is missing"):
        hf_t5.load(copy)


def test_every_misfit_is_named(copy):
    arrays = dict(weights.read_safetensors(V11 / "model.safetensors"))
    arrays["encoder.strange.weight"] = arrays.pop("encoder.final_layer_norm.weight")
    arrays["shared.weight"] = arrays["shared.weight"][:100]
    weights.write_safetensors(copy / "model.safetensors", arrays)
    with pytest.raises(weights.WeightsError) as caught:
        hf_t5.load(copy)
    for part in (
        "missing: encoder.final_layer_norm.weight",
        "extra: encoder.strange.weight",
        "wrong shape: shared.weight is (100, 32), expected (128, 32)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, "umT5"),
        ({"model_type": "bert"}, "model_type='bert', expected 't5'"),
        ({"feed_forward_proj": "gated-swish"}, "feed_forward_proj='gated-swish'"),
    ],
)
def test_other_models_are_rejected(copy, change, message):
    values = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(weights.WeightsError, match=message):
        hf_t5.load(copy)


def test_umt5_weights_are_known_whatever_the_configuration_says(copy):
    arrays = dict(weights.read_safetensors(V11 / "model.safetensors"))
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    arrays[bias.format(1)] = arrays[bias.format(0)]
    weights.write_safetensors(copy / "model.safetensors", arrays)
    with pytest.raises(weights.WeightsError, match="umT5, which has a relative bias per layer"):
        hf_t5.load(copy)


def test_shards_of_torch_files_are_joined(tmp_path):
    shutil.copy(FULL / "config.json", tmp_path)
    shutil.copy(FULL / "pytorch_model.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    names = weights.read_torch(FULL / "pytorch_model.bin")
    files = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(files))
    assert_equal_trees(hf_t5.load(tmp_path)[1], hf_t5.load(V11)[1])


def test_an_empty_folder_is_rejected(tmp_path, copy):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        hf_t5.load(tmp_path)
    (copy / "model.safetensors").unlink()
    with pytest.raises(weights.WeightsError, match="none of model.safetensors, pytorch_model.bin"):
        hf_t5.load(copy)


@pytest.mark.parametrize("kept", [0, 5, 0.3, 0.99])
@pytest.mark.parametrize("source", [V11 / "model.safetensors", FULL / "pytorch_model.bin"])
def test_cut_files_are_one_clear_line(tmp_path, source, kept):
    content = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    read = weights.read_safetensors if source.suffix == ".safetensors" else weights.read_torch
    with pytest.raises(weights.WeightsError, match="is not a whole") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_of_a_torch_file_are_noticed(tmp_path):
    content = bytearray((FULL / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(weights.WeightsError, match="CRC"):
        weights.read_torch(tmp_path / "pytorch_model.bin")


# The bytes that the writer of earlier versions gave for float32 arrays.
FLOAT32_HEADER = (
    b'{"__metadata__":{"format":"pt"},"a/b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    b'"e":{"dtype":"F32","shape":[0,3],"data_offsets":[16,16]},'
    b'"s":{"dtype":"F32","shape":[],"data_offsets":[16,20]}}'
).ljust(208)
FLOAT32_FILE = struct.pack("<Q", 208) + FLOAT32_HEADER + struct.pack("<5f", 1, 2, 3, 4, 5)


def test_a_file_of_an_earlier_version_is_read_and_written_bit_for_bit(tmp_path):
    path = tmp_path / "params.safetensors"
    path.write_bytes(FLOAT32_FILE)
    arrays = weights.read_safetensors(path)
    assert_equal_trees(
        arrays,
        {
            "a/b": np.float32([[1, 2], [3, 4]]),
            "e": np.zeros((0, 3), np.float32),
            "s": np.float32(5),
        },
    )
    weights.write_safetensors(path, arrays)  # also onto the file that the arrays are mapped from
    assert path.read_bytes() == FLOAT32_FILE


def test_tensors_are_mapped_and_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"v": np.arange(6, dtype=np.float32), "w": np.arange(3, dtype=np.int8)}
    weights.write_safetensors(path, arrays)
    mapped = weights.read_safetensors(path, lambda name: name == "v")
    assert list(mapped) == ["v"] and isinstance(mapped["v"], np.memmap)
    assert not mapped["v"].flags.writeable
    opened = weights.open_safetensors(path)
    # Written in place after opening: the values come from the file at the time of reading.
    content = bytearray(path.read_bytes())
    content[-3:] = b"\x07\x08\x09"
    path.write_bytes(content)
    assert opened["w"].read().tolist() == [7, 8, 9] and opened["w"].shape == (3,)
    assert opened["v"].read().flags.owndata or opened["v"].read().base.flags.owndata


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", "bfloat16"])
def test_every_dtype_survives(tmp_path, dtype):
    values = np.arange(7).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weights.write_safetensors(tmp_path / "x.safetensors", {"odd": np.int8([1]), "v": values})
    mapped = weights.read_safetensors(tmp_path / "x.safetensors")["v"]
    read = weights.open_safetensors(tmp_path / "x.safetensors")["v"].read()
    assert mapped.dtype == read.dtype == values.dtype
    np.testing.assert_array_equal(mapped, values)
    np.testing.assert_array_equal(read, values)


def test_an_unknown_dtype_is_named(tmp_path):
    values = np.arange(4, dtype=np.uint64)
    safetensors.numpy.save_file({"ids": values}, tmp_path / "x.safetensors")
    with pytest.raises(weights.WeightsError, match="tensor 'ids' has dtype U64, expected one of F"):
        weights.read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"v": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"v": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        ["v"],
    ],
    ids=["size", "gap", "dtype", "shape", "list"],
)
def test_a_header_that_does_not_match_its_data_is_one_clear_line(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    for read in (weights.read_safetensors, weights.open_safetensors):
        with pytest.raises(weights.WeightsError, match="is not a whole safetensors file") as caught:
            read(path)
        assert "\n" not in str(caught.value)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


def test_a_torch_file_that_runs_code_is_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("zip.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"shared.weight": Malice()}))
    pathlib.Path("stream.bin").write_bytes(pickle.dumps(Malice()))
    for name in ("zip.bin", "stream.bin"):
        with pytest.raises(weights.WeightsError, match="is rejected: it refers to .*mkdir"):
            weights.read_torch(name)
    assert not pathlib.Path("malice").exists()


class _Stored:
    """Pickles like torch's tensor: through `torch._utils._rebuild_tensor_v2` and a storage."""

    def __init__(self, pickler_names, key, count, shape, strides, offset=0):
        self.pid = ("storage", pickler_names["FloatStorage"], key, "cpu", count, None)
        self.rebuild = pickler_names["_rebuild_tensor_v2"]
        self.layout = (offset, shape, strides, False, None)

    def __reduce__(self):
        return self.rebuild, (_Storage(self.pid), *self.layout)


class _Storage:
    def __init__(self, pid):
        self.pid = pid


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Storage) else None


@pytest.fixture
def torch_names(monkeypatch):
    """Modules with torch's names, which pickle looks up while writing."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    storage = type("FloatStorage", (), {"__module__": "torch"})

    def _rebuild_tensor_v2(*args):
        raise AssertionError("the pickle's own function must not be called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = storage, _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return {"FloatStorage": storage, "_rebuild_tensor_v2": _rebuild_tensor_v2}


def write_stream(path, state, storages):
    """The layout of torch before 1.6: magic, version, system, objects, keys, then raw storages."""
    with open(path, "wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, protocol=2)
        pickle.dump(1001, file, protocol=2)
        pickle.dump({"little_endian": True}, file, protocol=2)
        _Pickler(file, protocol=2).dump(state)
        pickle.dump(list(storages), file, protocol=2)
        for values in storages.values():
            file.write(struct.pack("<q", values.size) + values.tobytes())


def test_the_older_torch_stream_is_read(tmp_path, torch_names):
    values = np.arange(12, dtype=np.float32)
    state = {
        "w": _Stored(torch_names, "k1", 12, (3, 4), (4, 1)),
        "turned": _Stored(torch_names, "k1", 12, (4, 3), (1, 4)),
        "tail": _Stored(torch_names, "k2", 5, (2,), (1,), offset=3),
    }
    write_stream(tmp_path / "old.bin", state, {"k1": values, "k2": values[:5] * 10})
    arrays = weights.read_torch(tmp_path / "old.bin")
    expected = {"w": values.reshape(3, 4), "turned": values.reshape(3, 4).T}
    assert_equal_trees(arrays, expected | {"tail": np.float32([30, 40])})


def test_a_short_stream_is_rejected_before_anything_is_read(tmp_path, torch_names):
    state = {"w": _Stored(torch_names, "k", 4, (4,), (1,))}
    write_stream(tmp_path / "short.bin", state, {"k": np.ones(4, np.float32)})
    content = (tmp_path / "short.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(content[:-1])
    with pytest.raises(weights.WeightsError, match="is not a whole torch file.*truncated"):
        weights.open_torch(tmp_path / "short.bin")


def test_strides_beyond_the_storage_are_rejected(tmp_path, torch_names):
    state = {"w": _Stored(torch_names, "k", 4, (100, 100), (100, 1))}
    write_stream(tmp_path / "far.bin", state, {"k": np.ones(4, np.float32)})
    with pytest.raises(weights.WeightsError, match="is not a whole torch file"):
        weights.read_torch(tmp_path / "far.bin")


def assert_equal_trees(got, expected, names=None):
    got, expected = weights.flatten(got), weights.flatten(expected)
    if names is None:
        assert got.keys() == expected.keys()
    for name in names or expected:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name])
