"""Overhead of sampling beyond the evaluations of the U-Nets.

    python benchmarks/sample_loop.py --stages=DIR[,DIR...] [--batch_size=8] [--repeats=5]

The cascade samples one batch. For comparison, the jitted guided network of each stage alone is
evaluated on one input as often as the sampler does. The overhead is the relative extra time of the
cascade: noise, sampler, thresholding, upsampling, loop, progress reports, uint8. Classifier-free
guidance as one evaluation of a batch of 2B, as in the cascade, is compared with two of B. Times are
processor seconds of all threads, which other processes disturb less, and wall-clock seconds in the
last two columns. Prints a table and one JSON line: median, lowest and highest.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import reporting

from imagen_jax.cli.wiring import set_up_devices
from imagen_jax.inference.cascade import Cascade
from imagen_jax.stages.conditioning import Conditioning, Text
from imagen_jax.stages.denoiser import predict_x0
from imagen_jax.stages.folder import load_stage
from imagen_jax.stages.stage import Stage

# Network evaluations per step of samplers with more than one.
EVALUATIONS = {"heun": 2}


def texts_of(config, batch):
    """Random text embeddings without padding."""
    rng = np.random.default_rng(0)
    shape = (batch, config.data.max_text_len, config.model.text_dim)
    emb = rng.normal(size=shape).astype(np.float32)
    return Text(emb, np.ones(shape[:2], bool))


def network_of(stage, batch, texts):
    """A call that evaluates the stage's network on a batch of `texts` times `batch`."""
    config = stage.config
    rng, size = np.random.default_rng(0), config.data.image_size
    z = jnp.asarray(rng.normal(size=(batch, size, size, 3)).astype(np.float32))
    text = texts_of(config, batch)
    conditioning = Conditioning(text)
    if config.data.lowres_size:
        conditioning = Conditioning(text, lowres=z, lowres_logsnr=jnp.zeros(batch))

    @jax.jit
    def evaluate(params, z):
        stage = Stage(config, params)
        return predict_x0(stage, z, jnp.zeros(batch), conditioning, [text] * texts)

    params = jax.device_put(stage.params)
    return lambda: evaluate(params, z)


def seconds(call, times):
    """Processor seconds and wall-clock seconds of `times` consecutive calls, as an array."""
    begin = time.process_time(), time.perf_counter()
    for _ in range(times):
        result = jax.block_until_ready(call())
    del result
    return np.array([time.process_time() - begin[0], time.perf_counter() - begin[1]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", required=True, metavar="DIR[,DIR...]")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu_devices", type=int, default=1)
    flags = parser.parse_args()
    set_up_devices(flags.cpu_devices)
    stages = [load_stage(path) for path in flags.stages.split(",")]
    cascade, batch = Cascade(stages), flags.batch_size
    emb, mask = texts_of(stages[0].config, batch)
    words = {"text_emb": emb, "text_mask": mask, "batch_size": batch}
    plain = lambda: cascade.sample(**words)  # noqa: E731
    reported = lambda: cascade.sample(**words, on_progress=lambda progress: None)  # noqa: E731
    parts = []
    for stage in stages:
        settings = stage.config.sampling
        texts = 1 if settings.guidance_weight == 1.0 else 2
        count = settings.steps * EVALUATIONS.get(settings.sampler, 1)
        parts.append((network_of(stage, batch, texts), count))
    single, double = (network_of(stages[0], batch, texts) for texts in (1, 2))
    for call in (plain, reported, single, double, *(call for call, _ in parts)):
        jax.block_until_ready(call())

    rows = []
    print("evaluations, cascade, with progress; overheads; 2B / 2 of B; overheads by the clock")
    for _ in range(flags.repeats):
        networks = sum(seconds(call, count) for call, count in parts)
        sampled, with_progress = seconds(plain, 1), seconds(reported, 1)
        pair = seconds(double, 10) / seconds(single, 20)
        over = np.stack([sampled, with_progress]) / networks - 1
        totals = (networks[0], sampled[0], with_progress[0])
        rows.append((*totals, *over[:, 0], pair[0], *over[:, 1]))
        print(
            "{:8.3f} {:8.3f} {:8.3f} {:+7.1%} {:+7.1%} {:7.3f} {:+7.1%} {:+7.1%}".format(*rows[-1])
        )
    names = ["evaluations", "cascade", "with_progress", "overhead", "overhead_with_progress"]
    names += ["one_of_2b_by_two_of_b", "overhead_clock", "overhead_with_progress_clock"]
    result = {
        "benchmark": "sample_loop",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "batch_size": batch,
        "steps": {stage.config.name: stage.config.sampling.steps for stage in stages},
    }
    print(json.dumps(result | reporting.median_and_range(names, rows)))


if __name__ == "__main__":
    main()
