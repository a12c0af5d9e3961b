"""Learned against fixed variance on the base stage of the shapes world (docs/models.md).

    python benchmarks/learned_variance.py --demo=runs/demo --out=runs/variance_v --prediction=v

Trains two base stages of configs/shapes.py with the same steps and seed: `fixed`, as in the demo,
and `learned`, with the variational bound beside the loss (Nichol & Dhariwal 2021, Eq. 16). Each is
sampled with several numbers of DDPM steps, upsampled by the demo's `sr` stage and scored by the
alignment checker on held-out prompts. The bound is that of the chain of these steps on held-out
images. A killed run continues: trainings from their checkpoints, scores from OUT/scores.json.

Hardware: one CPU core. Time: 16 minutes for the trainings, 15 for the scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion import likelihood, process, samplers
from imagen_jax.evaluation.intervals import NORMAL_QUANTILE
from imagen_jax.inference import prompts
from imagen_jax.inference.stage_sampler import image_keys
from imagen_jax.io import atomic, images
from imagen_jax.stages.conditioning import Conditioning, Text
from imagen_jax.stages.denoiser import predict
from imagen_jax.stages.folder import load_stage
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import embed_prompts, load_text_encoder
from imagen_jax.worlds.shapes import alignment, scenes

BATCH = 32  # Images of a batch of the bound.
# Fields of a training beside those of the demo's base stage.
TRAININGS: dict[str, dict[str, Any]] = {
    "fixed": {"model.out_channels": 3},
    "learned": {"model.out_channels": 6, "diffusion.vlb_weight": 0.001},
}
# Row of the table -> its training and its fields of `sampling`.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed, smaller": ("fixed", {"variance": "fixed", "gamma": 0.0}),
    "fixed, larger": ("fixed", {"variance": "fixed", "gamma": 1.0}),
    "learned": ("learned", {"variance": "learned", "gamma": 0.0}),
}


def imagen(verb: str, *flags: str) -> None:
    """Runs a verb of `imagen`; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "imagen_jax", verb, *flags]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def train(name: str, args: argparse.Namespace) -> pathlib.Path:
    """The stage folder of a training of TRAININGS; trains it if it is missing."""
    folder = args.out / "stages" / name
    if not (folder / "params.safetensors").is_file():
        demo, workdir = args.demo, f"--workdir={args.out / name}"
        fields = {
            "data.path": demo / "data",
            "data.embeddings": demo / "embeddings",
            "text.path": demo / "text",
            "pretrain_text.corpus": demo / "data" / "paraphrases.jsonl",
            "mesh.cpu_devices": 1,
            "checkpoint.every": 500,
            "seed": args.seed,
            "train.steps": args.steps,
            "diffusion.prediction": args.prediction,
            **TRAININGS[name],
        }
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        imagen("train", f"--config={args.config}:base", workdir, *flags)
        imagen("export", workdir, f"--out={folder}")
    return folder


def align(stage: pathlib.Path, settings: dict[str, Any], args: argparse.Namespace) -> dict:
    """Share of held-out prompts whose image is exact: mean, low, high of the interval, n."""
    out = args.out / "samples" / f"{stage.name}_{settings['gamma']:g}_{settings['steps']}"
    if not (out / "grid.png").is_file():
        sample = [f"--stages={stage},{args.demo / 'stages' / 'sr'}", f"--limit={args.count}"]
        sample += [f"--prompts={args.demo / 'data' / 'prompts_held_out.jsonl'}", f"--out={out}"]
        sample += [f"--stage_settings={json.dumps({'base': settings})}", f"--seed={args.seed}"]
        imagen("sample", *sample)
    return alignment.score_folder(out)["all"]["exact"]


@functools.partial(jax.jit, static_argnames=("config", "last"))
def bound_term(
    params: Any,
    config: Any,
    x0: Float[Array, "b n n 3"],
    text: Text,
    eps: Float[Array, "b n n 3"],
    levels: Float[Array, " 3"],
    last: bool,
) -> Float[Array, " b"]:
    """The bound's term of one step, bits per dimension; see `likelihood.step_bound`.

    Args:
      params, config: of the stage; `config.sampling` gives the variance.
      x0: clean images.
      text: their captions.
      eps: the noise in z.
      levels: logsnr that the step before starts from, that this one starts from and ends at, nats.
      last: the step ends at the clean image: the likelihood of its 8-bit values.
    """
    before, logsnr_t, logsnr_s = (jnp.full(len(x0), level) for level in levels)
    z = process.q_sample(x0, logsnr_t, eps)
    ((x0_hat, gamma),) = predict(Stage(config, params), z, logsnr_t, Conditioning(text), [text])
    x0_hat = jnp.clip(x0_hat, -1.0, 1.0)
    if gamma is None or config.sampling.variance == "fixed":
        gamma = jnp.full_like(x0, config.sampling.gamma)
    if last:
        # The posterior of the last step has no variance; that of the step before takes its place.
        small = samplers.learned_log_variance(jnp.zeros_like(x0), before, logsnr_t)
        large = 2.0 * jnp.log(process.expand(process.alpha_sigma(logsnr_t)[1], x0))
        term = likelihood.discretized_nll(x0, x0_hat, gamma * large + (1.0 - gamma) * small)
    else:
        weight = -jnp.expm1(logsnr_t - logsnr_s) * process.alpha_sigma(logsnr_s)[0]
        term = likelihood.gaussian_kl(
            process.expand(weight, x0) * (x0 - x0_hat),
            samplers.learned_log_variance(jnp.zeros_like(x0), logsnr_t, logsnr_s),
            samplers.learned_log_variance(gamma, logsnr_t, logsnr_s),
        )
    return term.mean((1, 2, 3)) / jnp.log(2.0)


def bound(stage: Stage, x0: np.ndarray, text: Text, seed: int) -> Float[np.ndarray, " n"]:
    """The variational bound of the sampler's chain for each image, bits per dimension.

    Differs from the bound by KL(q(z_1 | x0) || N(0, 1)), which no training changes.
    """
    config, steps = stage.config, stage.config.sampling.steps
    levels = process.logsnr_at(jnp.linspace(1.0, 0.0, steps + 1), config.diffusion)
    # The first step has no step before it, and is never the last.
    levels = jnp.concatenate([levels[:1], levels])
    found = []
    for start in range(0, len(x0), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(x0) - 1)
        keys = image_keys(seed, rows.tolist(), [0] * BATCH)
        part = Text(text.emb[rows], text.mask[rows])
        terms = jnp.zeros(BATCH)
        for index in range(steps):
            eps = samplers.normal(samplers.fold_in_keys(keys, index), x0.shape[1:])
            three, last = levels[index : index + 3], index == steps - 1
            terms += bound_term(stage.params, config, x0[rows], part, eps, three, last)
        found.append(np.asarray(terms))
    return np.concatenate(found)[: len(x0)]


def read_images(stage: Stage, args: argparse.Namespace) -> tuple[np.ndarray, Text]:
    """Images [N, size, size, 3] of the held-out scenes, and their captions' embeddings."""
    config = stage.config
    rows = prompts.read(str(args.demo / "data" / "prompts_held_out.jsonl"))[: args.images]
    rngs = [np.random.default_rng((args.seed, index)) for index in range(len(rows))]
    rendered = [scenes.render(scenes.scene_from_row(r, g)) for r, g in zip(rows, rngs, strict=True)]
    resized = [images.resize_host(image, config.data.image_size) for image in rendered]
    emb, mask = embed_prompts(
        load_text_encoder(config.text),
        [row["prompt"] for row in rows],
        batch_size=BATCH,
        max_len=config.data.max_text_len,
    )
    return images.to_float(np.stack(resized)), Text(emb, mask)


def score(row: str, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Alignment and bound of one row of the table at one number of steps."""
    training, fields = ROWS[row]
    folder = train(training, args)
    stage = load_stage(str(folder))
    settings = {**fields, "sampler": "ddpm", "steps": steps}
    sampling = dataclasses.replace(stage.config.sampling, **settings)
    stage = stage._replace(config=dataclasses.replace(stage.config, sampling=sampling))
    found = bound(stage, *read_images(stage, args), seed=args.seed)
    half = NORMAL_QUANTILE * found.std(ddof=1) / np.sqrt(len(found))
    bits = {"mean": float(found.mean()), "half": float(half), "n": len(found)}
    return {"alignment": align(folder, settings, args), "bound": bits}


def gammas(args: argparse.Namespace) -> str:
    """Markdown: gamma of the learned variance by noise level, beside its range and the best one."""
    stage = load_stage(str(train("learned", args)))
    sampling = dataclasses.replace(stage.config.sampling, variance="learned")
    config = dataclasses.replace(stage.config, sampling=sampling)
    x0, text = read_images(stage, args)
    x0, text = jnp.asarray(x0[:BATCH]), Text(text.emb[:BATCH], text.mask[:BATCH])
    keys = image_keys(args.seed, range(len(x0)), [0] * len(x0))
    steps = int(args.sampler_steps.split(",")[0])
    levels = process.logsnr_at(jnp.linspace(1.0, 0.0, steps + 1), config.diffusion)
    lines = ["| logsnr | squared error of x0 | best gamma | gamma: 5 %, median, 95 % | "]
    lines[0] += "log variance, 0 to 1 |"
    lines += ["|---|---|---|---|---|"]
    every = max(steps // 5, 1)
    for index in range(every, steps, every):
        logsnr_t, logsnr_s = (jnp.full(len(x0), levels[index + i]) for i in (0, 1))
        eps = samplers.normal(samplers.fold_in_keys(keys, index), x0.shape[1:])
        z = process.q_sample(x0, logsnr_t, eps)
        ((mean, gamma),) = predict(
            Stage(config, jax.device_put(stage.params)), z, logsnr_t, Conditioning(text), [text]
        )
        assert gamma is not None
        low, middle, high = np.percentile(np.asarray(gamma), (5, 50, 95))
        ends = [
            float(samplers.learned_log_variance(end * jnp.ones_like(x0), logsnr_t, logsnr_s).mean())
            for end in (0.0, 1.0)
        ]
        error = float(jnp.square(mean - x0).mean())
        # Of small steps: the variance that the bound asks for adds the error to the posterior's.
        best = error * (1.0 + np.exp(float(levels[index])))
        row = (
            f"{levels[index]:.1f} | {error:.4f} | {best:.2f} | {low:.1f}, {middle:.1f}, {high:.1f}"
        )
        lines += [f"| {row} | {ends[0]:.1f} to {ends[1]:.1f} |"]
    return "\n".join(lines)


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Markdown of all scores, with 95% intervals over prompts and over images."""
    lines = ["| variance | steps | exact, of the prompts | bound, bits per dimension |"]
    lines += ["|---|---|---|---|"]
    for name, cell in scores.items():
        row, steps = name.rsplit("/", 1)
        exact, bits = cell["alignment"], cell["bound"]
        interval = f"{exact['mean']:.2f} [{exact['low']:.2f}, {exact['high']:.2f}]"
        lines += [f"| {row} | {steps} | {interval} | {bits['mean']:.2f} ± {bits['half']:.2f} |"]
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--demo", type=pathlib.Path, required=True, help="run of launch/demo.sh")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags.add_argument("--config", default="configs/shapes.py", help="file with a base stage")
    flags.add_argument("--prediction", default="x0", choices=process.PREDICTIONS, help="of both")
    flags.add_argument("--steps", type=int, default=6_500, help="training steps of each stage")
    flags.add_argument("--count", type=int, default=360, help="prompts to sample")
    flags.add_argument("--images", type=int, default=512, help="images of the bound")
    flags.add_argument("--sampler_steps", default="25,50,100", help="numbers of DDPM steps")
    flags.add_argument("--seed", type=int, default=0, help="seed of trainings, samples and bound")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}
    for name in TRAININGS:
        train(name, args)
    for steps in map(int, args.sampler_steps.split(",")):
        for row in ROWS:
            if f"{row}/{steps}" not in scores:
                scores[f"{row}/{steps}"] = score(row, steps, args)
                atomic.write_json(file, scores)
    print(table(scores))
    print(gammas(args))


if __name__ == "__main__":
    main()
