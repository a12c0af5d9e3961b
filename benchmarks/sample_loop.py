"""What sampling costs around the evaluations of its U-Nets.

    python benchmarks/sample_loop.py --stages=DIR[,DIR...] [--batch_size=8] [--repeats=5]

The cascade draws one batch; beside it each stage's guided network alone, jitted, is evaluated as
often as the stage's steps ask for, over and over on the same input. The overhead is the share by
which the cascade takes longer: noise, sampler, thresholding, upsampling, the loop, reports of
progress, uint8. `classifier-free` compares guidance as one evaluation of a batch of 2B, which is
what runs, with two of B. Times are processor seconds of all threads, which other work on the
machine disturbs less, and, for the last two columns, seconds. Prints a table and one JSON line:
median, lowest and highest.
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
from imagen_jax.stages import stage as stage_lib
from imagen_jax.stages.folder import load_stage

# Evaluations per step; Heun's second one included.
EVALUATIONS = {"heun": 2}


def texts_of(config, batch):
    """Random embeddings of full length."""
    rng = np.random.default_rng(0)
    shape = (batch, config.data.max_text_len, config.model.text_dim)
    emb = rng.normal(size=shape).astype(np.float32)
    return emb, np.ones(shape[:2], bool)


def network_of(stage, batch, texts):
    """Evaluates the stage's network for `texts` texts (a batch of `texts` times `batch`)."""
    config = stage.config
    rng, size = np.random.default_rng(0), config.data.image_size
    z = jnp.asarray(rng.normal(size=(batch, size, size, 3)).astype(np.float32))
    given = {}
    if config.data.lowres_size:
        given = {"lowres": z, "lowres_logsnr": jnp.zeros(batch)}
    text = texts_of(config, batch)

    @jax.jit
    def evaluate(params, z):
        return stage_lib.estimates((params, config), z, jnp.zeros(batch), [text] * texts, **given)

    params = jax.device_put(stage.params)
    return lambda: evaluate(params, z)


def seconds(call, times):
    """(processor seconds, seconds) of so many calls, one after the other."""
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
        whole, watched = seconds(plain, 1), seconds(reported, 1)
        pair = seconds(double, 10) / seconds(single, 20)
        over = np.stack([whole, watched]) / networks - 1
        rows.append((networks[0], whole[0], watched[0], *over[:, 0], pair[0], *over[:, 1]))
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
    print(json.dumps(result | reporting.spread(names, rows)))


if __name__ == "__main__":
    main()
