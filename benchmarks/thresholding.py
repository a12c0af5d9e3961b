"""Thresholding over guidance weights (Imagen, Fig. A.9 and Sec. 4.5) on the shapes world.

    .venv/bin/python benchmarks/thresholding.py --stages=runs/demo/stages/base,runs/demo/stages/sr \
        --prompts=runs/demo/data/prompts_held_out.jsonl --out=runs/thresholding --docs=docs

Samples the same prompts with the same noise at guidance weights 1 to 10 of the base stage, without
thresholding, with static and with dynamic thresholding. Measures alignment (share of images with
all attributes correct) and saturation (share of the base samples' channel values within 2 of 0 or
255; real images have none). The super-resolution stage, which has no guidance, keeps its own
thresholding. Takes about ten minutes on one CPU core.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import reporting
import shapes_samples

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion import guidance, thresholding
from imagen_jax.evaluation import charts
from imagen_jax.evaluation.charts import Point
from imagen_jax.io import images
from imagen_jax.stages.conditioning import Conditioning, Text, null_text
from imagen_jax.stages.denoiser import predict_x0
from imagen_jax.stages.stage import Stage

MODES = ("none", "static", "dynamic")
LIMIT = 2  # levels of 255
GRID_WEIGHT, GRID_IMAGES = 8.0, 12


def guided(params, config, text, weight, *, mode):
    """A denoiser with guidance weight `weight` and thresholding `mode`."""
    text = Text(*text)
    texts = [text, null_text(text)]

    def denoise(z, logsnr):
        pair = predict_x0(Stage(config, params), z, logsnr, Conditioning(text), texts)
        return guidance.classifier_free(*pair, jnp.full(logsnr.shape, weight))

    settings = SamplingConfig(
        thresholding=mode, threshold_percentile=config.sampling.threshold_percentile
    )
    return thresholding.threshold(denoise, settings)


DENOISERS = {mode: functools.partial(guided, mode=mode) for mode in MODES}


def measure(stages, batch, mode, weight):
    """One point of the figure, and its images."""
    base, final = (
        shapes_samples.sample_images(stages, batch, DENOISERS[mode], weight)[i] for i in (0, -1)
    )
    share, low, high = shapes_samples.exact(final, batch)
    at_limits = [
        float(np.mean((samples <= LIMIT) | (samples >= 255 - LIMIT))) for samples in (base, final)
    ]
    row = {"mode": mode, "weight": weight, "exact": share, "low": low, "high": high}
    return row | {"saturated_base": at_limits[0], "saturated": at_limits[1]}, final


def main():
    parser = shapes_samples.parser(__doc__, 100)
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    stages = shapes_samples.load(flags.stages)
    batch = shapes_samples.read_prompt_batch(
        stages[0], flags.prompts, ("single", "count"), flags.count
    )
    rows = []
    print("mode      weight  exact  95%           at the limits: base, final")
    for mode in MODES:
        for weight in np.arange(1.0, 11.0):
            row, final = measure(stages, batch, mode, float(weight))
            rows.append(row)
            print(
                f"{mode:9} {weight:6.1f} {row['exact']:6.2f}  [{row['low']:.2f}, {row['high']:.2f}]"
                f"  {row['saturated_base']:.4f} {row['saturated']:.4f}",
                flush=True,
            )
            if weight == GRID_WEIGHT:
                grid = images.grid(final[:GRID_IMAGES], GRID_IMAGES)
                images.save_png(out / f"{mode}.png", grid, {})
    stage_names = shapes_samples.fingerprint(stages)
    record = {"stages": stage_names, "prompts": len(batch.rows), "points": rows}
    (out / "thresholding.json").write_text(json.dumps(record, indent=1) + "\n")
    if flags.docs:
        write(record, pathlib.Path(flags.docs), out)


def write(record, docs, out):
    """Writes the two charts, the image grid and the table of docs/sampling.md."""
    lines = {"alignment": {}, "saturation": {}}
    for mode in MODES:
        points = [p for p in record["points"] if p["mode"] == mode]
        lines["alignment"][mode] = [
            Point(p["weight"], p["exact"], p["low"], p["high"]) for p in points
        ]
        lines["saturation"][mode] = [
            Point(p["weight"], 100.0 * p["saturated_base"]) for p in points
        ]
    count = record["prompts"]
    labels = {
        "alignment": f"all attributes right, share of {count}",
        "saturation": "channel values at the limits, %",
    }
    for name, label in labels.items():
        chart = charts.line_chart(
            lines[name],
            title=f"Guidance and thresholding: {name}",
            x_label="guidance weight of the base stage",
            y_label=label,
        )
        (docs / "images" / f"thresholding_{name}.svg").write_text(charts.to_svg(chart))
    grids = [images.decode((out / f"{mode}.png").read_bytes()) for mode in MODES]

    sheet = np.concatenate(grids)
    images.save_png(docs / "images" / "thresholding_weight_8.png", sheet, {})
    table = ["| weight | " + " | ".join(MODES) + " |", "|---|---|---|---|"]
    for weight in sorted({p["weight"] for p in record["points"]}):
        cells = [
            f"{p['exact']:.2f} ({p['low']:.2f}-{p['high']:.2f}), {100 * p['saturated_base']:.1f}%"
            for mode in MODES
            for p in record["points"]
            if (p["mode"], p["weight"]) == (mode, weight)
        ]
        table.append(f"| {weight:g} | " + " | ".join(cells) + " |")
    reporting.write_between(str(docs / "sampling.md"), "thresholding", "\n".join(table))


if __name__ == "__main__":
    main()
