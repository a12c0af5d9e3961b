"""Fidelity against diversity of classifier and classifier-free guidance on the shapes world.

    .venv/bin/python benchmarks/classifier_guidance.py \
        --stages=runs/demo/stages/base,runs/demo/stages/sr \
        --prompts=runs/demo/data/prompts_held_out.jsonl --out=runs/classifier_guidance --docs=docs

Trains a small noise-aware classifier on images of the base stage's size (colour, shape, size,
number; no captions), then samples the same prompts with one object: the base stage without text and
with classifier guidance of scale s; the same for a base stage trained without captions
(--unconditional); the base stage with text and the classifier; and the base stage with text and
guidance weight w. Fidelity is alignment, the share of images with all attributes correct. Diversity
is the RMS distance over pixels and channels of two images of one prompt, averaged over prompts,
relative to that of real images. Both are measured at 64x64, after the super-resolution stage. Takes
about twenty minutes on one CPU core. The classifier is kept in OUT/classifier, which `sample
--classifier` takes.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import shapes_samples

from imagen_jax.diffusion import guidance, process, thresholding
from imagen_jax.evaluation import charts
from imagen_jax.evaluation.charts import Point
from imagen_jax.io import images
from imagen_jax.models import classifier
from imagen_jax.parallel import partitioning
from imagen_jax.stages.classifier import (
    ClassifierConfig,
    TrainedClassifier,
    load_classifier,
    write_classifier,
)
from imagen_jax.stages.conditioning import Conditioning, Text, null_text
from imagen_jax.stages.denoiser import predict_x0
from imagen_jax.stages.stage import Stage
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.worlds.shapes import scenes

COLORS, SHAPES, SIZES = (list(names) for names in (scenes.COLORS, scenes.SHAPES, scenes.SIZES))
MIXED = 4  # class "number" of images with different objects; otherwise number of objects minus one
NUMBERS = [*map(str, range(1, MIXED + 1)), "mixed"]
CLASSES = {"colour": COLORS, "shape": SHAPES, "size": SIZES, "number": NUMBERS}
NAMES = tuple(CLASSES)
SCENES, TEST_SCENES, BATCH = 20_000, 1_000, 32
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
WEIGHTS = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def labels_of(objects):
    """The classes of an image; -1 where its objects differ or the size is not stated."""
    kinds = {(thing["color"], thing["shape"], thing["size"]) for thing in objects}
    if len(kinds) > 1:
        return (-1, -1, -1, MIXED)
    color, shape, size = kinds.pop()
    named = -1 if size is None else SIZES.index(size)
    return (COLORS.index(color), SHAPES.index(shape), named, len(objects) - 1)


def load_images(split, count, size):
    """Rendered images [count, size, size, 3] in [-1, 1] of a split, and their classes."""
    split_scenes = [scenes.scene(split, index) for index in range(count)]
    pixels = [images.resize_host(scenes.render(scene), size) for scene in split_scenes]
    labels = [labels_of([vars(thing) for thing in scene.objects]) for scene in split_scenes]
    return images.to_float(np.stack(pixels)), np.array(labels, np.int32)


def train(config, steps):
    """A classifier for the stage of `config`, after `steps` steps on the training scenes."""
    size = config.data.image_size
    classes = tuple((name, tuple(values)) for name, values in CLASSES.items())
    described = ClassifierConfig(config.model, size, classes)
    network = described.network
    x0, labels = load_images("train", SCENES, size)
    example = jnp.zeros((1, size, size, 3)), jnp.zeros(1)
    params = partitioning.unbox(network.init(jax.random.key(0), *example)["params"])
    optimizer = make_optimizer(config.optimizer, steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(params, opt_state, x0, labels, key):
        loss, gradient = jax.value_and_grad(classifier.loss_fn)(
            params, network, x0, labels, key, config.diffusion
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, rng, losses = optimizer.init(params), np.random.default_rng(0), []
    for step in range(steps):
        rows = rng.integers(SCENES, size=BATCH)
        key = jax.random.fold_in(jax.random.key(1), step)
        params, opt_state, loss = step_fn(params, opt_state, x0[rows], labels[rows], key)
        losses.append(loss)
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}  loss {np.mean(losses[-500:]):.3f} nats", flush=True)
    return TrainedClassifier(described, jax.device_get(params))


def report_accuracy(trained, config):
    """Prints the accuracy of the classifier on test scenes by noise level."""
    x0, labels = load_images("seen_test", TEST_SCENES, config.data.image_size)
    apply = jax.jit(
        lambda z, logsnr: trained.config.network.apply({"params": trained.params}, z, logsnr)
    )
    print("logsnr  " + "  ".join(NAMES))
    for level in (-4.0, -2.0, 0.0, 2.0, 6.0):
        logsnr = jnp.full(TEST_SCENES, level)
        eps = jax.random.normal(jax.random.key(2), x0.shape)
        logits = apply(process.q_sample(jnp.asarray(x0), logsnr, eps), logsnr)
        guesses = np.stack([np.argmax(one, axis=1) for one in logits], axis=1)
        right = [np.mean((guesses == labels)[labels[:, k] >= 0, k]) for k in range(len(NAMES))]
        print(f"{level:6g}  " + "  ".join(f"{share:.2f}".rjust(6) for share in right), flush=True)


def by_classifier(params, config, text, labels, scale, classifier_params, *, with_text):
    """A denoiser of the base stage with classifier guidance, with its text or without."""
    text = Text(*text)
    text = text if with_text else null_text(text)
    classes = tuple((name, tuple(values)) for name, values in CLASSES.items())
    described = ClassifierConfig(config.model, config.data.image_size, classes)
    trained = TrainedClassifier(described, classifier_params)

    def unguided(z, logsnr):
        return predict_x0(Stage(config, params), z, logsnr, Conditioning(text), [text])[0]

    return thresholding.threshold(
        guidance.classifier(unguided, lambda z, level: trained.log_prob(z, level, labels), scale),
        config.sampling,
    )


WITHOUT_TEXT = functools.partial(by_classifier, with_text=False)
WITH_TEXT = functools.partial(by_classifier, with_text=True)


def by_text(params, config, text, weight):
    """A denoiser of the base stage with classifier-free guidance."""
    text = Text(*text)
    texts = [text, null_text(text)]

    def denoise(z, logsnr):
        pair = predict_x0(Stage(config, params), z, logsnr, Conditioning(text), texts)
        return guidance.classifier_free(*pair, jnp.full(logsnr.shape, weight))

    return thresholding.threshold(denoise, config.sampling)


def distance(samples):
    """RMS distance of images 2i and 2i + 1 in levels of 255: mean over i, standard error."""
    first, second = (samples[k::2].astype(np.float64) for k in (0, 1))
    each = np.sqrt(np.mean((first - second) ** 2, axis=(1, 2, 3)))
    return each.mean(), each.std(ddof=1) / np.sqrt(len(each))


def real_images(rows):
    """Rendered images of the same rows with new object positions."""
    rendered = []
    for index, row in enumerate(rows):
        # No object fits at the corner, so scene_from_row samples another position.
        objects = [{**thing, "x": 0.0, "y": 0.0} for thing in row["objects"]]
        rng = np.random.default_rng((0, index))
        rendered.append(scenes.render(scenes.scene_from_row({**row, "objects": objects}, rng)))
    return np.stack(rendered)


def main():
    parser = shapes_samples.parser(__doc__, 60)
    parser.add_argument("--steps", type=int, default=4_000, help="training steps")
    parser.add_argument(
        "--unconditional", default="", help="base stage folder, trained without captions"
    )
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    stages = shapes_samples.load(flags.stages)
    config = stages[0].config
    kept = out / "classifier"
    if not kept.is_dir():
        begin = time.monotonic()
        trained = train(config, flags.steps)
        print(f"trained in {time.monotonic() - begin:.0f} s")
        write_classifier(kept, trained)
    trained = load_classifier(str(kept))
    report_accuracy(trained, config)

    batch = shapes_samples.read_prompt_batch(
        stages[0], flags.prompts, ("single",), flags.count, each=2
    )
    labels = np.array([labels_of(row["objects"]) for row in batch.rows], np.int32)
    real = distance(real_images(batch.rows))[0]
    settings = []
    arms = {"classifier": (stages, WITHOUT_TEXT), "classifier and text": (stages, WITH_TEXT)}
    if flags.unconditional:
        own = [shapes_samples.load(flags.unconditional)[0], *stages[1:]]
        arms["classifier, base without captions"] = (own, WITHOUT_TEXT)
    for name, (chain, denoise_of) in arms.items():
        settings += [(name, s, chain, (denoise_of, labels, s, trained.params)) for s in SCALES]
    settings += [("classifier-free", w, stages, (by_text, w)) for w in WEIGHTS]
    print("guidance                            strength  exact  95%           diversity")
    points = []
    for name, strength, chain, (denoise_of, *numbers) in settings:
        samples = shapes_samples.sample_images(chain, batch, denoise_of, *numbers)[-1]
        share, low, high = shapes_samples.exact(samples, batch)
        diversity, error = (value / real for value in distance(samples))
        points.append(
            {"guidance": name, "strength": strength, "exact": share, "low": low, "high": high}
            | {"diversity": diversity, "diversity_error": 1.96 * error}
        )
        print(
            f"{name:35} {strength:8g} {share:6.2f}  [{low:.2f}, {high:.2f}]"
            f"  {diversity:.2f} +- {1.96 * error:.2f}",
            flush=True,
        )
        file = f"{name.replace(', ', '_').replace(' ', '_')}_{strength:g}.png"
        images.save_png(out / file, images.grid(samples[:24], 8), {})
    stage_names = shapes_samples.fingerprint(stages)
    record = {"stages": stage_names, "prompts": flags.count, "points": points}
    record["real_distance"] = real
    (out / "classifier_guidance.json").write_text(json.dumps(record, indent=1) + "\n")
    if flags.docs:
        write(record, pathlib.Path(flags.docs))


def write(record, docs):
    """Writes the chart and the table of docs/sampling.md."""
    names = dict.fromkeys(p["guidance"] for p in record["points"])
    lines = {name: "w" if name == "classifier-free" else "s" for name in names}
    chosen = {name: [p for p in record["points"] if p["guidance"] == name] for name in lines}
    chart = charts.line_chart(
        {
            name: [
                Point(
                    p["diversity"],
                    p["exact"],
                    p["low"],
                    p["high"],
                    f"{lines[name]}={p['strength']:g}",
                )
                for p in points
            ]
            for name, points in chosen.items()
        },
        title="Fidelity against diversity over the strength of guidance",
        x_label="diversity: distance of two images of a prompt, real images = 1",
        y_label=f"all attributes right, share of {2 * record['prompts']}",
    )
    (docs / "images" / "classifier_guidance.svg").write_text(charts.to_svg(chart))
    table = ["![Alignment against diversity](images/classifier_guidance.svg)", ""]
    table += ["| guidance | exact | 95% | diversity |", "|---|---|---|---|"]
    for name, points in chosen.items():
        for p in points:
            table.append(
                f"| {name}, {lines[name]} = {p['strength']:g} | {p['exact']:.2f} "
                f"| {p['low']:.2f}-{p['high']:.2f} "
                f"| {p['diversity']:.2f} ± {p['diversity_error']:.2f} |"
            )
    reporting.write_between(str(docs / "sampling.md"), "classifier_guidance", "\n".join(table))


if __name__ == "__main__":
    main()
