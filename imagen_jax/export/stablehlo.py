"""The sampler of a stage as a StableHLO program, from text embeddings and seeds to images.

`OUT/sampler.jaxexport` is written by `jax.export` for a symbolic batch size, on CPU, CUDA and TPU.
The weights are arguments of the program and are stored beside it as safetensors. `OUT/load.py` is a
copy of `stablehlo_loader`, the only module that a reader needs besides jax and numpy.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import samplers
from imagen_jax.export import check, stablehlo_loader
from imagen_jax.export.export import read_source
from imagen_jax.inference import stage_sampler
from imagen_jax.interop import weights
from imagen_jax.io import atomic
from imagen_jax.models import attention
from imagen_jax.stages import model_card
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import CARD_FILE, PARAMS_FILE, copy_encoder, write_params
from imagen_jax.stages.stage import Stage

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "b"  # the symbolic batch size in signature.json

USAGE = """\
The sampler of one stage of a text-to-image cascade as StableHLO, for {platforms}, with any batch
size. `load.py` samples with it and needs only jax and numpy; `signature.json` gives shapes and
ranges of the inputs. The sampling settings above are compiled into the program.

```python
import load
stage = load.Stage("{folder}")
images = stage(text_emb, text_mask, seed=0, prompt_index=[0], sample_index=[0]{lowres})
```

Exported by JAX {jax} (calling convention {convention}).
"""


def export_stablehlo(source: str, out: str, log: Callable[[str], None] = print) -> Config:
    """Writes a folder from which the sampler of a stage runs with jax and numpy only.

    Args:
      source: folder of a training run, whose moving average is taken, or a stage folder.
      out: folder to write, atomically.
      log: receives the lines.

    Returns:
      The configuration of the stage.

    Raises:
      StageError, CheckpointError: `source` cannot be read.
      OutputError: `out` exists and is not an exported sampler.
      ExportError: the program samples other images than the live sampler.
      ConfigError: guidance needs the encoded empty caption.
    """
    folder = atomic.check_replaceable(out, "signature.json", "folder of an exported sampler")
    stage = read_source(source)
    null = stage.config.text.null
    if null != "zeros" and stage.config.sampling.guided:
        raise ConfigError(
            f"config.text.null={null!r} needs a text encoder beside the program; only stages with "
            "'zeros', or without guidance, are exported"
        )
    program = make_program(stage)
    with atomic.folder(folder) as temporary:
        (temporary / "sampler.jaxexport").write_bytes(program.serialize())
        write_params(temporary, stage.params)
        text = copy_encoder(stage.config.text, temporary)
        config = dataclasses.replace(stage.config, text=text)
        signature = describe(config, program)
        (temporary / "signature.json").write_text(json.dumps(signature, indent=1) + "\n")
        loader = pathlib.Path(stablehlo_loader.__file__).read_text()
        (temporary / "load.py").write_text(loader)
        card = _format_card(Stage(config, stage.params), folder.name, signature)
        (temporary / CARD_FILE).write_text(card)

        inputs = check.random_inputs(stage.config)
        exported = stablehlo_loader.Stage(temporary)(**inputs)
        check.compare(check.sample(stage, inputs), np.asarray(exported), "StableHLO", log)
    log(f"{folder}: the sampler of {source}, {len(program.mlir_module_serialized):,} bytes")
    return stage.config


def make_program(stage: Stage) -> jax.export.Exported:
    """Exports the sampler as (parameters by path, inputs by name) -> images in [-1, 1]."""
    config = stage.config

    def sample(params: dict[str, Any], inputs: dict[str, Any]) -> Any:
        seeds = jnp.broadcast_to(inputs["seed"], inputs["prompt_index"].shape)
        keys = stage_sampler.fold_image_keys(seeds, inputs["prompt_index"], inputs["sample_index"])
        keys = samplers.fold_in_keys(keys, inputs["stage_index"])
        text = Text(inputs["text_emb"], inputs["text_mask"])
        lowres = inputs.get("lowres")
        return stage_sampler.sample_stage(weights.unflatten(params), config, text, keys, lowres)

    shapes = {
        path: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32)
        for path, leaf in weights.flatten(stage.params).items()
    }
    (batch,) = jax.export.symbolic_shape(BATCH)
    inputs = {
        name: jax.ShapeDtypeStruct([batch if n == BATCH else n for n in shape], dtype)
        for name, (shape, dtype, _) in _inputs(config).items()
    }
    with attention.portable():
        return jax.export.export(jax.jit(sample), platforms=PLATFORMS)(shapes, inputs)


def describe(config: Config, program: jax.export.Exported) -> dict[str, Any]:
    """Returns the content of signature.json."""
    size, text = config.data.image_size, config.text
    return {
        "stage": config.name,
        "inputs": {
            name: {"shape": shape, "dtype": dtype, "meaning": meaning}
            for name, (shape, dtype, meaning) in _inputs(config).items()
        },
        "output": {
            "shape": [BATCH, size, size, 3],
            "dtype": "float32",
            "meaning": "RGB images in [-1, 1]; level = round((x + 1) * 127.5)",
        },
        "params": f"{PARAMS_FILE}, or its shards: float32 arrays, the program's first argument, by "
        "name",
        "sampling": dataclasses.asdict(config.sampling),
        "text_encoder": {
            "encoder": text.encoder,
            "path": text.path,
            "fingerprint": text.fingerprint,
            "max_len": text.max_len,
        },
        "platforms": list(program.platforms),
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }


def _inputs(config: Config) -> dict[str, tuple[list[int | str], str, str]]:
    """Shape, dtype and meaning of the sampler's inputs, by name."""
    length, low = config.data.max_text_len, config.data.lowres_size
    uint32 = "0 to 4294967295"
    inputs: dict[str, tuple[list[int | str], str, str]] = {
        "text_emb": (
            [BATCH, length, config.model.text_dim],
            "float32",
            "output of the text encoder, one vector per token, zero at padding",
        ),
        "text_mask": ([BATCH, length], "bool", "true at real tokens, at least one"),
        "seed": ([], "uint32", f"{uint32}; it and the next three determine the noise"),
        "prompt_index": ([BATCH], "uint32", f"{uint32}; position of the prompt in its list"),
        "sample_index": ([BATCH], "uint32", f"{uint32}; number of the image among its prompt's"),
        "stage_index": ([], "uint32", "position of the stage in the cascade, the base stage is 0"),
    }
    if low:
        meaning = "images of the stage before, RGB in [-1, 1]"
        inputs["lowres"] = ([BATCH, low, low, 3], "float32", meaning)
    return inputs


def _format_card(stage: Stage, folder: str, signature: Mapping[str, Any]) -> str:
    """card.md of an exported sampler; `folder` is the name to load it by."""
    config = stage.config
    rows = {
        "output": model_card.size_line(config),
        "parameters": f"{model_card.parameter_count(stage.params):,} (float32)",
        "sampling": model_card.sampling_line(config),
        "text encoder": config.text.path
        and f"{config.text.encoder} `{config.text.path}`, "
        f"fingerprint {config.text.fingerprint or 'unknown'}",
    }
    usage = USAGE.format(
        platforms=", ".join(PLATFORMS),
        folder=folder,
        lowres=", lowres=lowres_images" if config.model.lowres else "",
        jax=signature["jax"],
        convention=signature["calling_convention_version"],
    )
    return f"# {config.name}\n\n{model_card.table(rows)}\n\n{usage}"
