"""Stage parameters in shards: equal to one file, refused when a shard is missing or foreign."""

import json

import numpy as np
import pytest
import safetensors.numpy

from imagen_jax.interop import shards
from imagen_jax.interop.weights import WeightsError
from imagen_jax.stages import folder as stage_folder
from imagen_jax.stages.folder import check_stage_output, load_stage, weights_hash, write_stage


@pytest.fixture
def written(base_config, random_params, tmp_path, monkeypatch):
    """(parameters, folder in one file, folder in shards of at most 4 kB)."""
    params = random_params(base_config)
    write_stage(tmp_path / "one", params, base_config, {})
    monkeypatch.setattr(stage_folder, "MAX_SHARD_BYTES", 4000)
    write_stage(tmp_path / "many", params, base_config, {})
    return params, tmp_path / "one", tmp_path / "many"


def test_shards_hold_what_one_file_holds(written):
    _, one, many = written
    files = sorted(many.glob("params-*.safetensors"))
    assert len(files) > 3 and not (many / "params.safetensors").exists()
    expected = safetensors.numpy.load_file(one / "params.safetensors")
    found = {}
    for file in files:
        part = safetensors.numpy.load_file(file)
        assert len(part) == 1 or sum(a.nbytes for a in part.values()) <= 4000
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    index = json.loads((many / "params.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in expected.values())
    assert {name: (many / file).name for name, file in index["weight_map"].items()} == {
        name: file.name for file in files for name in safetensors.numpy.load_file(file)
    }


def test_a_stage_in_shards_is_the_same_stage(written):
    params, one, many = written
    loaded = [load_stage(str(folder)) for folder in (one, many)]
    assert loaded[0].config == loaded[1].config
    for stage in loaded:
        np.testing.assert_equal(stage.params, params)
    assert weights_hash(str(many)) == weights_hash(str(many)) != weights_hash(str(one))
    check_stage_output(str(many))
    check_stage_output(str(one))


def test_missing_damaged_and_foreign_shards_are_named(written):
    _, _, many = written
    index = many / "params.safetensors.index.json"
    first, second, *_ = sorted(many.glob("params-*.safetensors"))
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(WeightsError, match=f"names the shard {first.name}, which is missing"):
        load_stage(str(many))
    first.write_bytes(content[:-1])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        load_stage(str(many))
    first.write_bytes(second.read_bytes())  # Its own tensors are in no file now.
    with pytest.raises(WeightsError, match="and its shards differ in"):
        load_stage(str(many))
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is not an index of weight shards"):
        load_stage(str(many))


def test_an_index_reads_no_file_outside_its_folder(written, tmp_path):
    _, _, many = written
    index = many / "params.safetensors.index.json"
    values = json.loads(index.read_text())
    name = next(iter(values["weight_map"]))
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    values["weight_map"][name] = "../outside.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="names the shard outside.safetensors, which is missing"):
        load_stage(str(many))


def test_one_array_may_be_larger_than_a_shard(tmp_path):
    arrays = {name: np.full(1000, i, np.float32) for i, name in enumerate("abc")}
    shards.write_shards(tmp_path / "x.safetensors", arrays, 100)
    assert len(list(tmp_path.glob("x-0000?-of-00003.safetensors"))) == 3
    np.testing.assert_equal(shards.read_shards(tmp_path / "x.safetensors"), arrays)
