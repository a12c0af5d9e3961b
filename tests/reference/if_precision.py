"""DeepFloyd IF's pipelines in float64 and float32, here and in diffusers: the same function.

    python -m tests.reference.if_precision [--goldens=DIR]  # needs torch and diffusers

In float32, networks with random weights amplify rounding to 1e-4 and more; float64 shows whether
anything else differs. Each line is one call of a pipeline with its own timesteps, guidance weight,
length of the text and noise level: the largest difference of the images in float64, in float32, and
of diffusers from itself in the two. `--goldens` adds recorded calls: DIR/if_unet/CASE holds a
`unet` folder, DIR/if_pipeline/CASE_pipeline.npz the arrays (NCHW), and the line ends with the
differences of the recorded image from diffusers here in float64 and in float32.

What both sides keep in float32 in any precision is replaced for float64: the sinusoids of the
timesteps, diffusers' softmax of the pooling and its table of the schedule, and this package's
`jnp.float32`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float64", "float32")
SEED, CALLS = 11, 8  # Random calls of each stage.
MOST_STEPS = 6
LENGTHS = {"base": (77, 7), "sr": (77, 20)}  # Tokens; few, as each compiles anew.


class Call(NamedTuple):
    """One call of a pipeline.

    Attributes:
      name: of the call.
      case: base or sr.
      unet: diffusers' folder; None: the seeded network of tests/golden/if_unet.
      arguments: of diffusers' pipeline.
      arrays: text_emb and negative_emb [B, L, D]; start [B, h, w, 3], steps [B, T or T - 1, h, w,
        3]; sr: lowres, its noise, and lowres_image [B, h / 4, w / 4, 3] in [-1, 1].
      image: the recorded result; None: none.
    """

    name: str
    case: str
    unet: str | None
    arguments: dict[str, Any]
    arrays: dict[str, np.ndarray]
    image: np.ndarray | None = None


def random_calls() -> list[Call]:
    """Random settings at random inputs for the seeded networks."""
    from tests.reference.if_pipeline import SIDE
    from tests.reference.if_unet import CASES

    rng, calls = np.random.default_rng(SEED), []

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    for case, lengths in LENGTHS.items():
        for index in range(CALLS):
            length, side = lengths[index % len(lengths)], SIDE[case]
            dim = CASES[case]["encoder_hid_dim"]
            weight = [1.0, 3.0, round(float(rng.uniform(1.5, 9.0)), 1)][index % 3]
            count = int(rng.integers(2, MOST_STEPS + 1))
            chosen = sorted(rng.choice(1000, count, replace=False).tolist(), reverse=True)
            if index % 4 == 0:
                arguments: dict[str, Any] = {"num_inference_steps": count}
                chosen = [0] * count
            else:
                chosen = [*chosen[:-1], 0] if index % 2 else chosen
                arguments = {"timesteps": chosen}
            arguments["guidance_scale"] = weight
            noises = count - (chosen[-1] == 0)
            arrays = {
                "text_emb": normal(2, length, dim),
                "negative_emb": normal(2, length, dim),
                "start": normal(2, side, side, 3),
                "steps": normal(2, noises, side, side, 3),
            }
            if case == "sr":
                arguments["noise_level"] = int(rng.integers(0, 1000))
                arrays["lowres"] = normal(2, side, side, 3)
                arrays["lowres_image"] = np.clip(normal(2, side // 4, side // 4, 3), -1, 1)
            calls.append(Call(f"{case} {index}", case, None, arguments, arrays))
    return calls


def recorded_calls(goldens: str) -> list[Call]:
    """The calls in the folder of `--goldens`."""
    calls, names = [], {"prompt_embeds": "text_emb", "negative_prompt_embeds": "negative_emb"}
    names |= {"start": "start", "image_in": "lowres_image", "lowres_noise": "lowres"}
    for case in LENGTHS:
        root = pathlib.Path(goldens)
        with np.load(root / "if_pipeline" / f"{case}_pipeline.npz") as file:
            found = {new: file[old] for old, new in names.items() if old in file}
            found["steps"] = np.moveaxis(file["noises"], 0, 1)
            arguments = {"num_inference_steps": len(file["timesteps"])}
            arguments["guidance_scale"] = float(file["guidance_scale"])
            if case == "sr":
                arguments["noise_level"] = int(file["noise_level"])
            image = np.moveaxis(file["image"], 1, -1)
        arrays = {n: a if a.ndim == 3 else np.moveaxis(a, -3, -1) for n, a in found.items()}
        unet = str(root / "if_unet" / case)
        calls.append(Call(f"{case} recorded", case, unet, arguments, arrays, image))
    return calls


def sinusoids(position: Any, dim: int) -> Any:
    """`conditioning.sinusoidal` in float64."""
    import jax.numpy as jnp

    angle = position[:, None] * np.exp(-np.log(1e4) * np.arange(dim // 2) / (dim // 2))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def use_float64() -> None:
    """Both sides compute in float64 from here on; before the import of this package's modules."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

    import torch
    from diffusers.models import embeddings

    from imagen_jax.diffusion import thresholding
    from imagen_jax.models import conditioning

    def embedding(timesteps: torch.Tensor, dim: int, **_: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(sinusoids(timesteps.numpy().astype(np.float64), dim)))

    embeddings.get_timestep_embedding = embedding
    torch.Tensor.float = torch.Tensor.double
    conditioning.sinusoidal = sinusoids
    thresholding.percentile_of = lambda values, percentile: jnp.percentile(
        values.reshape(len(values), -1), percentile, axis=1
    )


def their_network(call: Call) -> Any:
    """The U-Net of a call in diffusers."""
    import diffusers

    from tests.reference.if_lora import network

    if call.unet is None:
        return network(call.case)
    return diffusers.UNet2DConditionModel.from_pretrained(call.unet).eval()


def theirs(call: Call, network: Any, dtype: str) -> np.ndarray:
    """The images of diffusers, NHWC."""
    import diffusers
    import torch
    from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution
    from diffusers.schedulers import scheduling_ddpm

    from tests.reference.if_pipeline import MAX_VALUE, SCHEDULER

    def tensor(array: np.ndarray, channels: int = -1) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, channels), dtype))

    arrays = call.arrays
    first = [tensor(arrays[name], 1) for name in ("start", "lowres") if name in arrays]
    noises = iter(first + [tensor(step, 1) for step in np.moveaxis(arrays["steps"], 1, 0)])
    for module in (pipeline_if, pipeline_if_superresolution, scheduling_ddpm):
        module.randn_tensor = lambda *_, **__: next(noises)
    parts = dict.fromkeys(
        ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    )
    maximum = MAX_VALUE[call.case]
    parts["scheduler"] = diffusers.DDPMScheduler(**SCHEDULER, sample_max_value=maximum)
    image = {}
    if call.case == "sr":
        noising = diffusers.DDPMScheduler(beta_schedule=SCHEDULER["beta_schedule"])
        parts["image_noising_scheduler"] = noising
        image = {"image": tensor(arrays["lowres_image"], 1)}
    if dtype == "float64":
        for name in {"scheduler", "image_noising_scheduler"} & set(parts):
            for field in ("alphas_cumprod", "one"):
                setattr(parts[name], field, getattr(parts[name], field).double())
    kind = {"base": "IFPipeline", "sr": "IFSuperResolutionPipeline"}[call.case]
    pipeline = getattr(diffusers, kind)(**parts, unet=network, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    height, width = arrays["start"].shape[1:3]
    with torch.no_grad():
        found = pipeline(
            prompt_embeds=tensor(arrays["text_emb"]),
            negative_prompt_embeds=tensor(arrays["negative_emb"]),
            height=height,
            width=width,
            output_type="pt",
            **call.arguments,
            **image,
        ).images
    return found.numpy().transpose(0, 2, 3, 1)


def our_stage(call: Call, folder: pathlib.Path) -> Any:
    """The imported U-Net of a call with the sampling of IF's pipelines."""
    from imagen_jax.export import convert
    from imagen_jax.interop import if_scheduler
    from imagen_jax.stages.folder import load_stage
    from tests.interop.test_if_unet import write
    from tests.reference.if_pipeline import MAX_VALUE, SCHEDULER

    size = {} if call.unet else {"sample_size": call.arrays["start"].shape[1]}
    unet = call.unet or write(call.case, folder / "unet", **size)
    convert.import_if(str(unet), str(folder / "stage"), log=lambda line: None)
    stage = load_stage(str(folder / "stage"))
    scheduler = SCHEDULER | {"sample_max_value": MAX_VALUE[call.case]}
    config = dataclasses.replace(
        stage.config,
        diffusion=if_scheduler.process(scheduler, "call"),
        sampling=if_scheduler.sampling(scheduler, "call"),
    )
    return stage._replace(config=config)


def ours(call: Call, stage: Any, dtype: str) -> np.ndarray:
    """The images of this package, NHWC."""
    import jax
    import jax.numpy as jnp

    from imagen_jax.inference import stage_sampler
    from imagen_jax.inference.request import with_settings
    from imagen_jax.stages.conditioning import Text
    from tests.interop.test_if_pipeline import settings

    (config,) = with_settings([stage.config], {stage.config.name: settings(call.arguments)})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    arrays = {name: jnp.asarray(array, dtype) for name, array in call.arrays.items()}
    count, masks = len(arrays["start"]), np.ones(arrays["text_emb"].shape[:2], bool)
    levels, steps = stage_sampler.noise_levels(config), arrays["steps"]
    last_adds = steps.shape[1] == levels.count
    # The program is the same for all numbers of steps.
    missing = max(MOST_STEPS, levels.count) - steps.shape[1]
    steps = jnp.pad(steps, [(0, 0), (0, missing), (0, 0), (0, 0), (0, 0)])
    weight, level = config.sampling.guidance_weight, config.sampling.aug_level
    inputs = stage_sampler.SamplerInputs(
        Text(arrays["text_emb"], masks),
        stage_sampler.image_keys(0, [0] * count, range(count)),
        lowres=arrays.get("lowres_image"),
        aug_level=jnp.full(count, level, dtype) if "lowres" in arrays else None,
        negative=Text(arrays["negative_emb"], masks),
        guidance_weight=jnp.full(count, weight, dtype),
        noise=stage_sampler.Noise(arrays["start"], steps, arrays.get("lowres")),
    )
    config = stage_sampler.jit_cache_config(config)
    step_inputs, state = stage_sampler.init_denoising(config, inputs)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), stage.params)
    first, last = (jnp.asarray(n) for n in (0, levels.count))
    found = run_steps(params, config, step_inputs, state, levels[:2], first, last)
    return np.asarray(found.z if last_adds else found.x0)


def run_steps(params: Any, config: Any, *arrays: Any) -> Any:
    """`stage_sampler.run_steps`, compiled once for each configuration and shape."""
    import jax

    from imagen_jax.inference import stage_sampler

    if "compiled" not in _PROGRAMS:
        run = jax.jit(stage_sampler.run_steps, static_argnames="config")
        _PROGRAMS["compiled"] = run
    return _PROGRAMS["compiled"](params, config, *arrays)


_PROGRAMS: dict[str, Any] = {}


def generate(dtype: str, out: str, goldens: str | None) -> None:
    """Writes the images of both sides in one precision: OUT holds "ours/NAME", "theirs/NAME"."""
    import jax
    import torch

    if dtype == "float64":
        use_float64()
    images, networks = {}, {}
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        for call in random_calls() + (recorded_calls(goldens) if goldens else []):
            network = call.case, call.unet
            if network not in networks:
                stage = our_stage(call, pathlib.Path(folder) / str(len(networks)))
                networks[network] = stage, their_network(call).to(getattr(torch, dtype))
            stage, theirs_network = networks[network]
            images[f"ours/{call.name}"] = ours(call, stage, dtype)
            images[f"theirs/{call.name}"] = theirs(call, theirs_network, dtype)
    for name, image in images.items():
        assert image.dtype == dtype, (name, image.dtype)
    np.savez(out, **images)


def compare(goldens: str | None = None) -> list[dict[str, Any]]:
    """Runs both precisions, each in its own process, and compares.

    Returns:
      Of every call: name, arguments, tokens, and the largest differences of the images clipped to
      [-1, 1]: float64, float32, theirs; recorded_float64, recorded_float32 with `goldens`.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = {}
        for dtype in DTYPES:
            out = f"{folder}/{dtype}.npz"
            command = [sys.executable, "-m", "tests.reference.if_precision", "--dtype", dtype]
            command += ["--out", out] + (["--goldens", goldens] if goldens else [])
            subprocess.run(command, check=True, cwd=pathlib.Path(__file__).parents[2])
            with np.load(out) as file:
                images[dtype] = {name: np.clip(file[name], -1, 1) for name in file}
    rows, (double, single) = [], (images[dtype] for dtype in DTYPES)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a.astype(np.float64) - b).max())

    for call in random_calls() + (recorded_calls(goldens) if goldens else []):
        mine, other = f"ours/{call.name}", f"theirs/{call.name}"
        row = {
            "name": call.name,
            "arguments": call.arguments,
            "tokens": call.arrays["text_emb"].shape[1],
            "float64": distance(double[mine], double[other]),
            "float32": distance(single[mine], single[other]),
            "theirs": distance(single[other], double[other]),
        }
        if call.image is not None:
            row["recorded_float64"] = distance(call.image, double[other])
            row["recorded_float32"] = distance(call.image, single[other])
        rows.append(row)
    return rows


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--goldens", help="folder of recorded calls")
    flags.add_argument("--dtype", choices=DTYPES, help="write the images of one precision")
    flags.add_argument("--out", help="file to write with --dtype")
    args = flags.parse_args()
    if args.dtype:
        generate(args.dtype, args.out, args.goldens)
        return
    print("| call | tokens | ours - diffusers, float64 | float32 | diffusers, float32 - float64 |")
    print("|---|---|---|---|---|")
    for row in compare(args.goldens):
        said = ", ".join(f"{name}={value}" for name, value in row["arguments"].items())
        cells = [f"{row['name']}: {said}", str(row["tokens"])]
        cells += [f"{row[name]:.1e}" for name in ("float64", "float32", "theirs")]
        recorded = [f"{name}: {row[name]:.1e}" for name in row if name.startswith("recorded")]
        print(f"| {' | '.join(cells)} |", *recorded)


if __name__ == "__main__":
    main()
