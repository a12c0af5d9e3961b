"""Small pipelines of DeepFloyd IF, run by diffusers: tests/golden/if_pipeline.

    python -m tests.reference.if_pipeline tests/golden/if_pipeline  # needs torch and diffusers

The U-Nets are those of tests/golden/if_unet, with a T5 and its tokenizer. All weights are seeded by
their names and shapes (`make_weights`). The noise that diffusers samples is recorded.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np

from tests.reference.if_unet import CASES, make_weights

PROMPTS = ["A red Hat on a corgi ", "two blue birds"]
NEGATIVE = ["Blurry", "a hat"]
T5 = {
    "vocab_size": 64,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "prediction_type": "epsilon",
    "clip_sample": True,
}
# case -> sample_max_value, side of the images in pixels, runs of the pipeline.
MAX_VALUE = {"base": 1.5, "sr": 1.0}
SIDE = {"base": 8, "sr": 32}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {
        # Higher weights amplify rounding in random networks beyond what a test can compare.
        "plain": {"num_inference_steps": 3, "guidance_scale": 3.0},
        "negative": {
            "num_inference_steps": 3,
            "guidance_scale": 3.0,
            "negative_prompt": NEGATIVE,
        },
        # The last step is above timestep 0, so it adds noise.
        "timesteps": {"timesteps": [999, 700, 410, 150], "guidance_scale": 2.0},
    },
    "sr": {
        "plain": {"num_inference_steps": 3, "guidance_scale": 4.0},
        "noise_level": {"timesteps": [900, 300, 0], "guidance_scale": 1.0, "noise_level": 100},
    },
}


def vocabulary() -> list[tuple[str, float]]:
    """Pieces and scores of a SentencePiece model: letters, and a few words."""
    words = ["▁a", "▁red", "▁blue", "▁hat", "▁on", "▁two", "▁birds", "▁corgi", "ur"]
    pieces = [("▁", -2.0), *((letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *((w, -5.0) for w in words)]


def seed(network: Any) -> Any:
    """The network with seeded weights."""
    import torch

    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    arrays = {name: torch.from_numpy(array) for name, array in make_weights(shapes).items()}
    if "shared.weight" in arrays:  # One parameter of two names.
        arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    network.load_state_dict(arrays)
    return network.eval()


def make_pipeline(case: str) -> Any:
    """The pipeline of stage I (base) or II (sr)."""
    import diffusers
    import transformers

    parts = {
        "tokenizer": transformers.T5Tokenizer(vocab=vocabulary(), extra_ids=0),
        "text_encoder": seed(transformers.T5EncoderModel(transformers.T5Config(**T5))),
        "unet": seed(diffusers.UNet2DConditionModel(**CASES[case])),
        "scheduler": diffusers.DDPMScheduler(**SCHEDULER, sample_max_value=MAX_VALUE[case]),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if case == "base":
        return diffusers.IFPipeline(**parts)
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return diffusers.IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)


def run(pipeline: Any, case: str, **arguments: Any) -> dict[str, np.ndarray]:
    """Image and noise of one call, NHWC, with the text embeddings that it used."""
    import torch
    from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution
    from diffusers.schedulers import scheduling_ddpm

    rng, noises = np.random.default_rng(7), []

    def randn_tensor(shape, **_: Any):
        noises.append(rng.normal(size=tuple(shape)).astype(np.float32))
        return torch.from_numpy(noises[-1])

    for module in (pipeline_if, pipeline_if_superresolution, scheduling_ddpm):
        module.randn_tensor = randn_tensor
    pipeline.set_progress_bar_config(disable=True)
    if "image" in arguments:
        image = torch.from_numpy(np.ascontiguousarray(arguments["image"].transpose(0, 3, 1, 2)))
        arguments["image"] = image
    with torch.no_grad():
        image = pipeline(
            PROMPTS, height=SIDE[case], width=SIDE[case], output_type="pt", **arguments
        ).images
        embeds = pipeline.encode_prompt(
            PROMPTS, negative_prompt=arguments.get("negative_prompt"), clean_caption=True
        )
    start, *rest = (noise.transpose(0, 2, 3, 1) for noise in noises)
    lowres = {"lowres": rest.pop(0)} if case == "sr" else {}
    return {
        "image": image.numpy().transpose(0, 2, 3, 1),
        "start": start,
        "steps": np.stack(rest, axis=1),
        "text_emb": embeds[0].numpy(),
        "negative_emb": embeds[1].numpy(),
        **lowres,
    }


def lowres_image() -> np.ndarray:
    """The images that stage II upsamples, in [-1, 1]."""
    rng = np.random.default_rng(3)
    return rng.uniform(-1, 1, (2, SIDE["sr"] // 4, SIDE["sr"] // 4, 3)).astype(np.float32)


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for case, runs in RUNS.items():
        pipeline = make_pipeline(case)
        image = {"image": lowres_image()} if case == "sr" else {}
        for name, arguments in runs.items():
            found = run(pipeline, case, **image, **arguments)
            arrays |= {f"{case}/{name}/{key}": value for key, value in found.items()}
    np.savez_compressed(out / "golden.npz", **arrays)
    pipeline.tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "t5_shapes.json").write_text(
        json.dumps({k: list(v.shape) for k, v in pipeline.text_encoder.state_dict().items()}) + "\n"
    )


if __name__ == "__main__":
    main()
