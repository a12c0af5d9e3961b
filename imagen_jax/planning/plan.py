"""`plan`: what a run needs, from compiling the very programs it runs for devices that are not here.

A `Program` is the train step, one stage's sampler or the text encoder, traced with the shapes and
shardings of the real thing. `compile_program` asks the compiler for memory and communication;
FLOPs are counted from the trace (`flops`), because the compiler takes a loop's body once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config, MeshConfig
from imagen_jax.inference import stage_sampler
from imagen_jax.models import t5
from imagen_jax.parallel import flops, hlo, partitioning
from imagen_jax.parallel.topology import Slice
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.network import init_params
from imagen_jax.text import frozen_encoder
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.step import jit_train_step, model_flops
from imagen_jax.training.train import abstract_state

# XLA's effort level O0, by its number, which is the form that JAX 0.10 and 0.11 both take. The
# program is there five to twenty times sooner, and takes rather more memory than it will.
QUICK = {"optimization_level": 9}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What XLA says of a program that is too large: "Used 20.1G of 15.7G hbm", or of its temporaries.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds")


class Program(NamedTuple):
    """One program of a run, traced for a slice.

    Attributes:
      stage: train, sample or embed.
      config: the configuration it was traced from.
      batch: pictures (embed: captions) it works on at a time, over all devices.
      params: parameters of its network.
      traced: ready to be lowered.
      arguments: bytes that go in, per device.
      flops: of one run over all devices, what is computed again in the backward pass included.
      model_flops: the same without that: what MFU counts.
    """

    stage: str
    config: Config
    batch: int
    params: int
    traced: jax.stages.Traced
    arguments: int
    flops: float
    model_flops: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run of a program takes, per chip.

    Attributes:
      arguments, temporaries, outputs, code: bytes of HBM: what goes in (train: state and batch),
        what is kept only while it runs, results that have no argument's place, the program itself.
      peak: bytes at the worst moment. Where the program does not fit, what the compiler said it
        would take.
      collectives: by kind; None where the program does not fit, and there is none to look at.
      compile_seconds: how long the compiler took.
      compiled: the executable.
    """

    program: Program
    slice: Slice
    arguments: int
    temporaries: int
    outputs: int
    code: int
    peak: int
    collectives: list[hlo.Collective] | None
    compile_seconds: float
    compiled: jax.stages.Compiled | None

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.peak <= self.slice.hbm

    @property
    def flops_per_chip(self) -> float:
        return self.program.flops / self.slice.chips

    def as_json(self) -> dict[str, Any]:
        """The plan's numbers, bytes and FLOPs, as `--json` writes them."""
        return {
            "topology": self.slice.name,
            "chips": self.slice.chips,
            "params": self.program.params,
            "hbm_per_chip": {
                "arguments": self.arguments,
                "temporaries": self.temporaries,
                "peak": self.peak,
                "capacity": self.slice.hbm,
            },
            "flops_per_chip_step": self.flops_per_chip,
            "collectives": [c._asdict() for c in self.collectives or ()],
            "fits": self.fits,
        }


def train_program(config: Config, where: Slice) -> Program:
    """The train step of `config` as `train` jits it.

    Raises:
      ConfigError: mesh or batch do not fit the slice.
    """
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    partitioning.check_batch_size(config.data.batch_size, mesh, config.train.accumulation)
    partitioning.check_tensor(config.model, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    _, state = abstract_state(config, optimizer, mesh)
    batch = _with_sharding(batch_shapes(config), partitioning.batch_sharding(mesh))

    with jax.set_mesh(mesh):
        traced = jit_train_step(config, optimizer, state, mesh).trace(state, batch)
        useful = model_flops(traced, config, optimizer, state, batch, mesh)
    size = config.data.batch_size
    return program("train", config, size, traced, state.params, (state, batch))._replace(
        model_flops=useful
    )


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch's arrays, over all hosts."""
    data = config.data
    rows, side, low = data.batch_size, data.image_size, data.lowres_size
    words = (rows, data.max_text_len)
    shapes = {
        "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32),
        "text_emb": jax.ShapeDtypeStruct((*words, config.model.text_dim), jnp.float32),
        "text_mask": jax.ShapeDtypeStruct(words, jnp.bool_),
    }
    if low:
        shapes["lowres"] = jax.ShapeDtypeStruct((rows, low, low, 3), jnp.float32)
    return shapes


def sample_program(config: Config, where: Slice, batch: int) -> Program:
    """The sampler of one stage, all its denoising steps, as `sample` runs it.

    Every chip has all parameters and draws its part of the pictures.
    """
    # A stage that learned from crops draws the whole picture.
    config = dataclasses.replace(config, data=config.data.uncropped())
    mesh = partitioning.make_mesh(MeshConfig(), where.devices)
    rows, whole = _rows(mesh, batch), partitioning.replicated(mesh)
    shapes = batch_shapes(
        dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes["keys"] = jax.ShapeDtypeStruct((batch,), key.dtype)
    given = _with_sharding(shapes, rows)
    text = Text(given["text_emb"], given["text_mask"])
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(config.seed)))
    params = _with_sharding(partitioning.unbox(params), whole)
    low = given.get("lowres")
    traced = stage_sampler.sample_stage.trace(params, config, text, given["keys"], low)
    inputs = (params, text, given["keys"], low)
    return program("sample", config, batch, traced, params, inputs)


def embed_program(config: Config, where: Slice, batch: int) -> Program:
    """The text encoder's forward pass over captions of the greatest length, as `embed` lays it.

    Raises:
      ConfigError: `text.preset` names no encoder, or mesh or batch do not fit the slice.
    """
    if config.text.preset not in t5.T5_PRESETS:
        raise ConfigError(
            unknown_name("config.text.preset", config.text.preset, list(t5.T5_PRESETS))
        )
    shape = dataclasses.replace(t5.T5_PRESETS[config.text.preset], dtype=config.text.dtype)
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    rows = _rows(mesh, batch)
    boxed = t5.boxed_shapes(shape)
    params = jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, shape.dtype, sharding=lies),
        partitioning.unbox(boxed),
        partitioning.param_shardings(boxed, mesh),
    )
    words = (batch, config.text.max_len)
    tokens = (
        jax.ShapeDtypeStruct(words, jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct(words, jnp.bool_, sharding=rows),
    )
    traced = frozen_encoder.encode_tokens.trace(params, *tokens, config=shape, sharding=rows)
    return program("embed", config, batch, traced, params, (params, *tokens))


def _rows(mesh: Mesh, batch: int) -> NamedSharding:
    """How a batch is split over the devices."""
    devices = partitioning.batch_devices(mesh)
    if batch % devices:
        nearest = max(round(batch / devices), 1) * devices
        raise ConfigError(
            f"--batch={batch} must be a multiple of {devices} (data*fsdp devices); try {nearest}"
        )
    return partitioning.batch_sharding(mesh)


def program(
    name: str, config: Config, batch: int, traced: jax.stages.Traced, params: Any, inputs: Any
) -> Program:
    """A traced program with its counts.

    Args:
      name: what it is called.
      config: what it was traced from.
      batch: pictures or captions at a time.
      traced: ready to be lowered.
      params: the network's parameters among the inputs, arrays or shapes.
      inputs: all that goes in, arrays or shapes, with their shardings.
    """
    total = flops.count(traced.jaxpr)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    per_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(inputs)
    )
    return Program(name, config, batch, size, traced, per_device, total, total)


def _with_sharding(shapes: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Compiles anew: a program from JAX's cache lacks on CPU what serialising it needs."""
    used = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(used)


def _use_cache(setting: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", setting)
    compilation_cache.reset_cache()  # JAX reads the setting but once.


def compile_program(
    program: Program, where: Slice, options: Mapping[str, Any] | None = None
) -> Plan:
    """Compiles a program and reads off what it takes; a program that is too large is a plan, too.

    Args:
      program: of one of the functions above.
      where: the slice it was traced for.
      options: further options of the compiler, such as QUICK.
    """
    per_chip = len(where.devices) // where.chips
    begin = time.monotonic()
    try:
        with _no_cache():
            compiled = program.traced.lower().compile(dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        seconds = time.monotonic() - begin
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(program, where, str(error), seconds)
    seconds = time.monotonic() - begin
    memory: Any = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Plan(
        program,
        where,
        arguments=arguments * per_chip,
        temporaries=temporaries * per_chip,
        outputs=outputs * per_chip,
        code=code * per_chip,
        peak=(arguments + temporaries + outputs + code) * per_chip,
        collectives=[
            c._replace(count=c.count * per_chip, bytes=c.bytes * per_chip)
            for c in hlo.collectives(compiled.as_text() or "")
        ],
        compile_seconds=seconds,
        compiled=compiled,
    )


def _too_large(program: Program, where: Slice, message: str, seconds: float) -> Plan:
    """The plan of a program that the compiler refused, from its message."""
    per_chip = len(where.devices) // where.chips
    arguments = program.arguments
    used, of_temporaries = _USED.search(message), _TEMPORARIES.search(message)
    if used:
        peak = int(float(used[1]) * _UNITS[used[2]])
    elif of_temporaries:
        peak = arguments + int(float(of_temporaries[1]) * _UNITS[of_temporaries[2]])
    else:
        raise ConfigError(f"the program does not fit {where.name}; the compiler says: {message}")
    return Plan(
        program,
        where,
        arguments=arguments * per_chip,
        temporaries=(peak - arguments) * per_chip,
        outputs=0,
        code=0,
        peak=peak * per_chip,
        collectives=None,
        compile_seconds=seconds,
        compiled=None,
    )
