"""Samples with a cascade that exceeds the share of one of 8 CPU devices; writes what it found.

    python -m tests.reference.sharded_cascade OUT [HEIGHT]

OUT.npz has the images of each stage, OUT.json the memory and the largest all-gather of every
program that ran, and those of its plan. A separate program, because the number of devices is fixed
when JAX starts. With HEIGHT, the rows of an image of the last stage are sharded.
"""

import json
import re
import sys

import jax
import numpy as np

from imagen_jax.config.data import DataConfig
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config, DiffusionConfig, ModelConfig
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.inference import batches
from imagen_jax.inference.cascade import Cascade
from imagen_jax.interop import weights
from imagen_jax.models import t5
from imagen_jax.parallel import memory, partitioning, topology
from imagen_jax.planning.cascade_plan import plan_cascade
from imagen_jax.stages.network import init_params
from imagen_jax.stages.stage import Stage
from imagen_jax.text import frozen_encoder
from imagen_jax.text.frozen_encoder import FrozenEncoder
from imagen_jax.text.vocabulary import ByteVocabulary

DIM, LENGTH, COUNT = 64, 16, 8
PROMPTS = [f"prompt {i}" for i in range(COUNT)]
T5 = T5Config(vocab_size=384, emb_dim=DIM, num_layers=2, num_heads=8, head_dim=8, mlp_dim=1024)
MODEL = ModelConfig(
    name="efficient_unet",
    channels=(64, 128),
    num_res_blocks=(1, 2),
    self_attention=(False, True),
    cross_attention=(False, True),
    strided_stem=(False, True),
    head_dim=32,
    num_groups=8,
    embed_dim=256,
    text_dim=DIM,
)


def configs() -> list[Config]:
    """A base stage of 8 px and a stage of 16 px."""
    text = TextConfig(preset="tiny", max_len=LENGTH)
    base = Config(
        name="base",
        data=DataConfig(image_size=8, max_text_len=LENGTH),
        text=text,
        model=MODEL,
        diffusion=DiffusionConfig(prediction="x0", loss_weight="truncated_v"),
        sampling=SamplingConfig(sampler="ddim", steps=3, guidance_weight=2.0),
    )
    sr = Config(
        name="sr",
        data=DataConfig(image_size=16, lowres_size=8, max_text_len=LENGTH),
        text=text,
        model=ModelConfig(**{**vars(MODEL), "lowres": True}),
        diffusion=base.diffusion,
        sampling=SamplingConfig(sampler="ddpm", steps=3, guidance_weight=2.0, aug_level=0.1),
    )
    return [base, sr]


def random_tree(shapes):
    """Random float32 arrays of these shapes, without zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 4) ** 0.5).astype(
            np.float32
        ),
        partitioning.unbox(shapes),
    )


def make_cascade() -> Cascade:
    """The cascade with its text encoder, of random parameters."""
    stages = [
        Stage(c, random_tree(jax.eval_shape(lambda c=c: init_params(c, jax.random.key(0)))))
        for c in configs()
    ]
    flat = weights.flatten(random_tree(t5.boxed_shapes(T5)))
    tensors = {k: weights.Tensor(v.shape, lambda v=v: v) for k, v in flat.items()}
    encoder = FrozenEncoder(
        "bytes", T5, tensors, vocabulary=ByteVocabulary(), config=configs()[0].text
    )
    return Cascade(stages, encoder)


def total_bytes() -> int:
    """Bytes of all parameters."""
    boxed = [jax.eval_shape(lambda c=c: init_params(c, jax.random.key(0))) for c in configs()]
    leaves = jax.tree.leaves(partitioning.unbox([*boxed, t5.boxed_shapes(T5)]))
    return sum(4 * int(np.prod(leaf.shape)) for leaf in leaves)


def largest_gather(text: str) -> int:
    """Bytes of the largest result of an all-gather in a compiled program."""
    sizes = [0]
    for result in re.findall(r"= (.*?) all-gather(?:-start)?\(", text):
        for bits, dims in re.findall(r"[suf](\d+)\[([\d,]*)\]", result):
            sizes.append(int(bits) // 8 * int(np.prod([int(d) for d in dims.split(",") if d])))
    return max(sizes)


class Recorded:
    """A jitted function whose compiled programs are recorded when it is called."""

    def __init__(self, name: str, function, found: list):
        self._name, self._function, self._found = name, function, found
        self.trace = function.trace

    def __call__(self, *arguments, **options):
        compiled = self._function.lower(*arguments, **options).compile()
        memory_of = compiled.memory_analysis()
        self._found.append(
            {
                "name": self._name,
                "arguments": memory_of.argument_size_in_bytes,
                "temporaries": memory_of.temp_size_in_bytes,
                "gather": largest_gather(compiled.as_text()),
            }
        )
        return self._function(*arguments, **options)


def main(out: str, height: str = "1") -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    devices = memory.Devices("cpu", 8, total_bytes())
    memory.local_devices = lambda: devices
    t5.T5_PRESETS["tiny"] = T5
    found: list[dict] = []
    init, run = batches.programs()
    recorded = Recorded("init", init, found), Recorded("run", run, found)
    batches.programs = lambda: recorded
    frozen_encoder.encode_tokens = Recorded("embed", frozen_encoder.encode_tokens, found)

    cascade = make_cascade()
    settings = {"sr": {"height": int(height)}}
    placed = cascade.placed_configs(settings)
    images = cascade.sample_stages(PROMPTS, seed=3, stage_settings=settings)
    np.savez(f"{out}.npz", *images)

    frozen_encoder.encode_tokens = frozen_encoder.encode_tokens._function
    where = topology.Slice("here", jax.devices(), 8, devices.bytes)
    options = {"xla_cpu_multi_thread_eigen": False}  # As `batches.programs` sets it.
    plan = plan_cascade(placed, where, COUNT, options, lambda line: None)
    largest = max(
        leaf.nbytes for stage in cascade._params for leaf in jax.tree.leaves(stage._params)
    )
    result = {
        "keep": cascade.keep,
        "height": int(height),
        "fsdp": [config.sampling.fsdp for config in placed],
        "encoder_shards": cascade.encoder.shards,
        "total": devices.bytes,
        "largest_layer": largest,
        "programs": found,
        "plan": plan.as_json(),
    }
    with open(f"{out}.json", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
