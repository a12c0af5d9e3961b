"""Samples images for prompts: NNNNN_KK.png, samples.jsonl and grid.png."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagen_jax.cli import path_flags, wiring
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.inference import adapters, given_inputs, prompts, trace
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.given_inputs import GivenInputs
from imagen_jax.inference.request import RequestError, check_guided, with_settings
from imagen_jax.inference.sample import SampleOptions, sample
from imagen_jax.parallel import distributed
from imagen_jax.stages.classifier import load_classifier
from imagen_jax.stages.folder import check_chain, load_stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_prompts(parser)
    add_sampling(parser, samples_per_prompt=1)
    path_flags.optional(
        parser,
        "--inputs",
        "embeddings, low-resolution images and noise as .npz, see inference/given_inputs.py",
        metavar="FILE",
        bucket="read",
    )
    parser.add_argument(
        "--floats", action="store_true", help="also write OUT/NNNNN_KK.npy, float32 in [-1, 1]"
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `read_prompts` reads."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", help="one prompt")
    which.add_argument(
        "--prompts",
        metavar="FILE",
        type=path_flags.required_input,
        help="prompts: .txt, .csv or .jsonl",
    )


def add_sampling(parser: argparse.ArgumentParser, *, samples_per_prompt: int) -> None:
    """Adds the flags of every verb that samples; `samples_per_prompt` is the flag's default."""
    wiring.add_stages(parser)
    wiring.add_loras(parser)
    path_flags.required(parser, "--out", "folder to write", bucket="write")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    parser.add_argument(
        "--samples_per_prompt", type=int, default=samples_per_prompt, help="images per prompt"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images sampled at a time")
    wiring.add_cpu_devices(parser)
    parser.add_argument(
        "--keep_stages",
        choices=("auto", "all", "one"),
        default="auto",
        help="networks in memory: all, or one at a time (each samples many batches before the "
        "next); auto: all where they have room",
    )
    parser.add_argument(
        "--trace",
        choices=("", *trace.KINDS),
        default="",
        metavar="png|gif",
        help="also write the estimates of x0 over the steps, OUT/trace/NNNNN_KK.png or .gif",
    )
    _add_guidance(parser)
    parser.add_argument(
        "--limit", type=int, default=0, help="sample the first N prompts only; 0: all"
    )
    parser.add_argument(
        "--text_encoder",
        default="",
        type=path_flags.address,
        help="encoder folder, if it has moved",
    )
    parser.add_argument(
        "--stage_settings",
        metavar="JSON",
        default="{}",
        help='sampling fields by stage name, e.g. \'{"base": {"guidance_weight": 3}}\'',
    )


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    """Adds what guidance moves towards or away from, beside the prompt."""
    parser.add_argument(
        "--negative_prompt",
        default="",
        help="text that guidance moves away from; empty: the null text",
    )
    parser.add_argument(
        "--guides",
        default="",
        type=path_flags.input_list,
        metavar="DIR[,DIR...]",
        help="stage folders of weaker checkpoints that guide the stages (autoguidance)",
    )
    path_flags.optional(
        parser,
        "--classifier",
        "classifier that guides the stage of its image size (classifier guidance)",
        metavar="DIR",
        bucket="read",
    )
    parser.add_argument(
        "--classifier_scale", type=float, default=1.0, help="factor on the classifier's gradient"
    )
    parser.add_argument(
        "--classes",
        metavar="JSON",
        default="{}",
        help='with --classifier: class names by attribute, e.g. \'{"colour": "red"}\'; those of '
        "a row of --prompts, in its field `classes`, replace them",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    given = given_inputs.read(flags.inputs) if flags.inputs else None
    sample_rows(flags, read_prompts(flags), given=given, floats=flags.floats)


def read_prompts(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the flags of `add_prompts`."""
    if flags.prompt is not None:
        return [{"prompt": prompts.check(flags.prompt, "--prompt")}]
    return prompts.read(flags.prompts)


def read_configs(stages: Sequence[str]) -> list[Config]:
    """The configurations of the folders of --stages."""
    return [load_stage(path).config for path in stages]


def sample_rows(
    flags: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    image_fields: Callable[[Sequence[Config]], dict[str, Any]] | None = None,
    *,
    given: GivenInputs | None = None,
    floats: bool = False,
) -> None:
    """Samples prompt rows with the flags of `add_sampling`.

    Args:
      flags: of `add_sampling`.
      rows: prompts.
      image_fields: maps the stages to the fields of `SampleOptions` that hold an image; None:
        sampling starts from noise.
      given: inputs in place of computed ones; None: none.
      floats: also write the images before they are rounded to uint8.
    """
    wiring.check_least(flags, 1, "samples_per_prompt", "batch_size", "cpu_devices")
    wiring.check_least(flags, 0, "limit")
    prompts.check(flags.negative_prompt, "--negative_prompt")
    wiring.set_up_devices(flags.cpu_devices)
    rows = rows[: flags.limit] if flags.limit > 0 else rows
    settings = read_settings(flags.stage_settings)
    rows = with_classes(rows, flags)
    configs = adapters.with_loras(read_configs(flags.stages), wiring.read_loras(flags))
    # Every check comes before the text encoder is loaded.
    given_lowres = image_fields or (given and "lowres" in given.arrays)
    check_chain(configs, configs[0].data.lowres_size if given_lowres else 0)
    if given and given.count != len(rows) * flags.samples_per_prompt:
        raise RequestError(
            f"--inputs={flags.inputs}: arrays have {given.count} rows, must have "
            f"{len(rows) * flags.samples_per_prompt}, one for each image"
        )
    with_embeddings = given is not None and "text_emb" in given.arrays
    check_guided(
        with_settings(configs, settings, "--stage_settings"),
        negative=bool(flags.negative_prompt),
        guides=read_configs(flags.guides),
    )
    fields = image_fields(configs) if image_fields else {}
    distributed.initialize()
    options = SampleOptions(
        seed=flags.seed,
        samples_per_prompt=flags.samples_per_prompt,
        batch_size=flags.batch_size,
        stage_settings=settings,
        checkpoint=path_flags.recorded(flags.stages),
        negative_prompt=flags.negative_prompt,
        classifier_scale=flags.classifier_scale,
        trace=flags.trace,
        given=given,
        floats=floats,
        **fields,
    )
    cascade = Cascade.load(
        flags.stages,
        text_encoder=flags.text_encoder or (None if with_embeddings else ""),
        guides=flags.guides,
        classifier=flags.classifier,
        keep=flags.keep_stages,
        loras=wiring.read_loras(flags),
    )
    sample(
        cascade, rows, flags.out, options, print if distributed.is_first() else lambda line: None
    )


def with_classes(
    rows: Sequence[Mapping[str, Any]], flags: argparse.Namespace
) -> list[Mapping[str, Any]]:
    """The rows with their `classes`; unchanged without --classifier. Raises ConfigError."""
    common = _parse(flags.classes, "--classes")
    if not flags.classifier:
        if common or flags.classifier_scale != 1.0:
            raise ConfigError("--classes and --classifier_scale need --classifier=DIR")
        return list(rows)
    config = load_classifier(flags.classifier).config
    labelled = [{**row, "classes": row.get("classes", common)} for row in rows]
    for number, row in enumerate(labelled):
        if not isinstance(row["classes"], dict) or not row["classes"]:
            raise ConfigError(
                f"classes of prompt {number} are {row['classes']!r}, must name a class of at least "
                f"one attribute of {[name for name, _ in config.classes]}; give --classes"
            )
    config.labels([row["classes"] for row in labelled])
    return labelled


def _parse(text: str, flag: str) -> dict[str, Any]:
    """A JSON object in a flag. Raises ConfigError."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{flag}={text} must be a JSON object")
    return found


def read_settings(text: str) -> dict[str, dict[str, Any]]:
    """The value of --stage_settings: sampling fields by stage name."""
    settings = _parse(text, "--stage_settings")
    if not all(isinstance(value, dict) for value in settings.values()):
        raise ConfigError(f"--stage_settings={text} must map stage names to mappings of fields")
    return settings
