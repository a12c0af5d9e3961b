"""Programs over several TPU slices, compiled by libtpu: what crosses between the slices."""

import dataclasses

import jax
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from imagen_jax.parallel import hlo, partitioning, topology
from imagen_jax.planning import plan

DEVICES = 8  # of a slice


@pytest.fixture(scope="module")
def slices():
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; install imagen_jax[tpu]")
    return topology.open_slice("v5e-8x2")


@pytest.fixture(scope="module")
def config(base_config) -> Config:
    model = ModelConfig(
        channels=(64,),
        num_res_blocks=(1,),
        self_attention=(True,),
        cross_attention=(True,),
        head_dim=64,
        text_dim=64,
        dtype="bfloat16",
    )
    return dataclasses.replace(
        base_config,
        data=dataclasses.replace(base_config.data, image_size=8, batch_size=32),
        model=model,
        optimizer=OptimizerConfig(name="adafactor"),
        mesh=MeshConfig(fsdp=2),
    )


def compiled(config: Config, where: topology.Slice) -> plan.Plan:
    return plan.compile_program(plan.train_program(config, where), where, plan.QUICK)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_gradients_alone_cross_between_slices(slices, config, dtype):
    """And in the dtype of `train.reduce_dtype`, read from the compiled program."""
    config = dataclasses.replace(config, train=TrainConfig(reduce_dtype=dtype))
    found = compiled(config, slices)
    text = found.compiled.as_text()
    grouped = [line for line in text.splitlines() if "replica_groups=" in line]
    assert grouped and all(hlo.group_size(line) for line in grouped), "a format of groups unknown"
    sends = hlo.sends(text)
    gradients = [send for send in sends if send.is_gradient]
    others = sum(send.count * send.bytes for send in sends if send not in gradients)
    assert others <= 16 * 1024, [send for send in sends if send not in gradients]
    # A device sends its share of the gradients; arrays too small to divide are sent by all.
    width = {"float32": 4, "bfloat16": 2}[dtype]
    total = sum(send.count * send.bytes for send in gradients)
    share = found.program.params * width / DEVICES
    assert 0.95 * share <= total <= share * DEVICES / config.mesh.fsdp
    # The noise embedding is float32 in any stage.
    kernels = [send for send in gradients if "conv_general" in send.op_name]
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert kernels and all(send.result.startswith(short) for send in kernels)
    (between,) = [c for c in found.collectives if c.network == "dcn"]
    assert between.bytes == total + others
    values = found.as_json()
    assert values["collectives"][-1]["network"] == "dcn"
    assert (values["dcn"]["gradients"], values["dcn"]["other"]) == (total, others)


def test_a_hybrid_mesh_enumerates_slice_by_slice(slices):
    mesh = partitioning.make_mesh(MeshConfig(fsdp=2, tensor=2), slices.devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    of_slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (of_slices[:2] == 0).all() and (of_slices[2:] == 1).all()
    mesh = partitioning.make_mesh(MeshConfig(dcn_data=1, dcn_fsdp=2, fsdp=4), slices.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 1}
    with pytest.raises(
        ConfigError, match=r"dcn_data\*dcn_fsdp=3\*1 must be the number of slices, 2"
    ):
        partitioning.make_mesh(MeshConfig(dcn_data=3), slices.devices)


def test_one_slice_has_no_other(base_config):
    with pytest.raises(
        ConfigError, match=r"dcn_data\*dcn_fsdp=2\*1 must be the number of slices, 1"
    ):
        partitioning.make_mesh(MeshConfig(dcn_data=2), jax.devices())
    assert partitioning.make_mesh(MeshConfig(), jax.devices()).size == len(jax.devices())
