"""`plan`: memory, FLOPs and communication of a run, from compiling it without its devices.

A `Program` is the train step, the sampler of a stage or the text encoder, traced with the shapes
and shardings of the run. `compile_program` reads memory and communication from the compiler. FLOPs
are counted from the trace (`flops`), because the compiler counts the body of a loop once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.config.text import T5Config
from imagen_jax.inference import placement, stage_sampler
from imagen_jax.inference.stage_sampler import SamplerInputs
from imagen_jax.models import t5
from imagen_jax.parallel import compiled as compiled_lib
from imagen_jax.parallel import flops, hlo, partitioning
from imagen_jax.parallel.topology import Slice
from imagen_jax.planning import step_time
from imagen_jax.planning.step_time import StepTime
from imagen_jax.stages.conditioning import Text
from imagen_jax.text import frozen_encoder
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.step import jit_train_step, model_flops

# XLA's effort level O0, by its number, which JAX 0.10 and 0.11 both accept. Compilation is five to
# twenty times faster, and the program takes somewhat more memory than that of the run.
QUICK = {"optimization_level": 9}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA's messages for a program that is too large: "Used 20.1G of 15.7G hbm", or its temporaries.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds")


class Program(NamedTuple):
    """One program of a run, traced for a slice.

    Attributes:
      kind: train, sample or embed.
      config: the configuration it was traced from.
      batch: images (embed: captions) per run, over all devices.
      params: number of parameters of its network.
      traced: the traced program.
      arguments: bytes of its arguments, per device.
      flops: FLOPs of one run over all devices, including recomputation in the backward pass.
      model_flops: FLOPs without recomputation, as counted by MFU.
      steps: iterations of its loop where they are an argument.
    """

    kind: str
    config: Config
    batch: int
    params: int
    traced: jax.stages.Traced
    arguments: int
    flops: float
    model_flops: float
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and communication of one run of a program, per chip.

    Attributes:
      program: the program.
      slice: the devices it was compiled for.
      arguments: bytes of HBM of the arguments (train: state and batch).
      temporaries: bytes of HBM of temporaries.
      outputs: bytes of HBM of results that do not alias an argument.
      code: bytes of HBM of the program.
      peak: bytes of HBM at the maximum; from the compiler's message if the program does not fit.
      collectives: by kind; None if the program does not fit.
      compile_seconds: duration of the compilation.
      compiled: the executable; None if the program does not fit.
      sends: what crosses between slices.
      time: predicted; None if the program does not fit, or the chip's bandwidths are unknown.
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
    sends: Sequence[hlo.Send] = ()
    time: StepTime | None = None

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.peak <= self.slice.hbm

    @property
    def flops_per_chip(self) -> float:
        return self.program.flops / self.slice.chips

    def as_json(self) -> dict[str, Any]:
        """The numbers of the plan, bytes and FLOPs, as `--json` writes them."""
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
            "dcn": self._between_slices(),
            "predicted": self.time and {**self.time._asdict(), "seconds": self.time.seconds},
            "fits": self.fits,
        }

    def _between_slices(self) -> dict[str, Any]:
        """Bytes that a device sends between slices: gradients, and everything else by name."""
        others = [send for send in self.sends if not send.is_gradient]
        total = sum(send.count * send.bytes for send in self.sends)
        other = sum(send.count * send.bytes for send in others)
        return {
            "gradients": total - other,
            "other": other,
            "others": [send._asdict() for send in sorted(others, key=lambda s: -s.bytes)],
        }


def train_program(config: Config, where: Slice) -> Program:
    """The train step of `config` as in `train`.

    Raises:
      ConfigError: mesh or batch size do not match the slice.
    """
    mesh = partitioning.make_mesh(config.mesh, where.devices)
    partitioning.check_batch_size(config.data.batch_size, mesh, config.train.accumulation)
    partitioning.check_tensor(config.model, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    _, state = abstract_state(config, optimizer, mesh)
    batch = _with_sharding(batch_shapes(config), partitioning.batch_sharding(mesh))
    if config.distill.teacher:
        batch["teacher"] = state.params

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
    """The sampler of one stage with all its denoising steps, as in `sample`.

    Args:
      config: the stage; `sampling.dtype`, `fsdp` and `height` say how it is placed. Where fsdp is
        None, it is as for a stage alone.
      where: the slice; all its devices belong to one process.
      batch: images at a time.
    """
    # A stage trained on crops samples whole images.
    config = dataclasses.replace(config, data=config.data.uncropped())
    devices = where.as_devices()
    config = placement.with_dtype(config, devices.platform)
    size = placement.param_bytes(config)
    (config,) = placement.with_placement([config], [size], "one", devices)
    settings = config.sampling
    mesh = partitioning.sampling_mesh(
        where.devices, fsdp=settings.fsdp or 1, height=settings.height
    )
    rows = _rows(mesh, batch)
    shapes = batch_shapes(
        dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes["keys"] = jax.ShapeDtypeStruct((batch,), key.dtype)
    for name in ("guidance_weight", *(("aug_level",) if "lowres" in shapes else ())):
        shapes[name] = jax.ShapeDtypeStruct((batch,), jnp.float32)
    del shapes["image"]
    given = _with_sharding(shapes, rows)
    text = Text(given.pop("text_emb"), given.pop("text_mask"))
    params = placement.abstract_params(config, mesh)
    traced, inputs, count = _trace_sampler(config, params, SamplerInputs(text, **given), mesh)
    made = program("sample", config, batch, traced, params, (params, *inputs))
    every = made.flops * count
    return made._replace(steps=count, flops=every, model_flops=every)


def _trace_sampler(
    config: Config, params: Any, arrays: SamplerInputs, mesh: Mesh
) -> tuple[jax.stages.Traced, Any, int]:
    """`run_steps` as `sample` runs it, its arguments but the parameters, and its steps."""
    levels = stage_sampler.noise_levels(config)
    key = stage_sampler.jit_cache_config(config)
    run = jax.jit(stage_sampler.run_steps, static_argnames="config")
    sharded = placement.make_mesh(config.sampling, list(mesh.devices.flat)) is not None
    with jax.set_mesh(mesh) if sharded else contextlib.nullcontext():
        init = jax.eval_shape(functools.partial(stage_sampler.init_denoising, key), arrays)
        step_inputs, state = _with_sharding(init, partitioning.batch_sharding(mesh))
        ends = _with_sharding(tuple(levels[:2]), partitioning.replicated(mesh))
        traced = run.trace(params, key, step_inputs, state, ends, 0, levels.count)
    return traced, (step_inputs, state), levels.count


def encoder_shape(config: Config) -> T5Config:
    """Shape of the text encoder `text.preset`. Raises ConfigError: there is no such encoder."""
    if config.text.preset not in t5.T5_PRESETS:
        raise ConfigError(
            unknown_name("config.text.preset", config.text.preset, list(t5.T5_PRESETS))
        )
    return dataclasses.replace(t5.T5_PRESETS[config.text.preset], dtype=config.text.dtype)


def embed_program(config: Config, where: Slice, batch: int, fsdp: int = 0) -> Program:
    """The text encoder's forward pass over captions of the greatest length.

    Args:
      config: `text` gives the encoder.
      where: the slice.
      batch: captions at a time.
      fsdp: devices that share the parameters in sampling; 0: sharded as in `embed`, by
        `config.mesh`.

    Raises:
      ConfigError: `text.preset` is not an encoder, or mesh or batch size do not match the slice.
    """
    shape = encoder_shape(config)
    if fsdp:
        mesh = partitioning.sampling_mesh(where.devices, fsdp=fsdp, height=1)
    else:
        mesh = partitioning.make_mesh(config.mesh, where.devices)
    rows = _rows(mesh, batch)
    boxed = t5.boxed_shapes(shape)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, shape.dtype, sharding=sharding),
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
    """Sharding of a batch over the devices. Raises ConfigError if it is not divisible."""
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
      name: its kind.
      config: the configuration it was traced from.
      batch: images or captions per run.
      traced: the traced program.
      params: the network's parameters among the inputs, arrays or shapes.
      inputs: all arguments, arrays or shapes, with their shardings.
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


def compile_program(
    program: Program, where: Slice, options: Mapping[str, Any] | None = None
) -> Plan:
    """Compiles a program; a program that does not fit also gives a plan.

    Args:
      program: a program of this module.
      where: the slice it was traced for.
      options: compiler options, such as QUICK.
    """
    per_chip = len(where.devices) // where.chips
    begin = time.monotonic()
    try:
        with compiled_lib.without_cache():
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
    text = compiled.as_text() or ""
    peak = (arguments + temporaries + outputs + code) * per_chip
    return Plan(
        program,
        where,
        arguments=arguments * per_chip,
        temporaries=temporaries * per_chip,
        outputs=outputs * per_chip,
        code=code * per_chip,
        peak=peak,
        collectives=[
            c._replace(count=c.count * per_chip, bytes=c.bytes * per_chip)
            for c in hlo.collectives(text, program.steps)
        ],
        compile_seconds=seconds,
        compiled=compiled,
        sends=hlo.sends(text) if where.slices > 1 else (),
        time=step_time.of_slice(text, where, _mesh_devices(compiled), program.steps, peak),
    )


def _mesh_devices(compiled: jax.stages.Compiled) -> Iterable[Any]:
    """Devices of a program in the order of its mesh; () if it has none."""
    shardings = jax.tree.leaves(compiled.input_shardings)
    meshes = [one.mesh for one in shardings if isinstance(one, NamedSharding)]
    return list(meshes[0].devices.flat) if meshes else ()


def _too_large(program: Program, where: Slice, message: str, seconds: float) -> Plan:
    """The plan of a program that does not fit, from the compiler's message."""
    per_chip = len(where.devices) // where.chips
    arguments = program.arguments
    used, of_temporaries = _USED.search(message), _TEMPORARIES.search(message)
    if used:
        peak = int(float(used[1]) * _UNITS[used[2]])
    elif of_temporaries:
        peak = arguments + int(float(of_temporaries[1]) * _UNITS[of_temporaries[2]])
    else:
        raise ConfigError(f"the program does not fit {where.name}; compiler message: {message}")
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
