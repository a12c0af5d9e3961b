"""Alignment of a shapes cascade in bfloat16 relative to float32: the same prompts, the same noise.

    .venv/bin/python benchmarks/sample_dtype.py --stages=runs/demo/stages/base,runs/demo/stages/sr \
        --prompts=runs/demo/data/prompts_held_out.jsonl --out=runs/sample_dtype

Samples PART prompts in both dtypes, then the next ones; a killed run continues from OUT/marks.json.
Prints the share of exact images of each dtype, the difference of the pairs with its 95% interval
over prompts, and seconds per image.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from imagen_jax.evaluation import intervals
from imagen_jax.inference import prompts
from imagen_jax.inference.cascade import Cascade
from imagen_jax.io import atomic
from imagen_jax.worlds.shapes import alignment

DTYPES = ("float32", "bfloat16")
PART = 40


def summary(marks: Mapping[str, Sequence[bool]]) -> str:
    """A line per dtype and one of the difference, of whether the image of each prompt is exact."""
    rows = [np.asarray(marks[dtype], float) for dtype in DTYPES]
    lines = []
    for dtype, row in zip(DTYPES, rows, strict=True):
        low, high = intervals.wilson(float(row.sum()), float(len(row)))
        lines.append(f"{dtype}: {100 * row.mean():.1f} % exact [{100 * low:.1f}, {100 * high:.1f}]")
    difference = intervals.paired_difference(rows[1] - rows[0], np.arange(len(rows[0])))
    mean, low, high = (100 * value for value in difference)
    changed = int((rows[0] != rows[1]).sum())
    lines.append(
        f"bfloat16 - float32: {mean:+.1f} points [{low:+.1f}, {high:+.1f}] over {len(rows[0])} "
        f"prompts, {changed} of which differ"
    )
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="stage folders, separated by commas")
    flags.add_argument("--prompts", required=True, help="prompts of the shapes world")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags.add_argument("--count", type=int, default=1000, help="prompts")
    flags.add_argument("--seed", type=int, default=0, help="of the noise")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = prompts.read(args.prompts)[: args.count]
    file = args.out / "marks.json"
    marks = json.loads(file.read_text()) if file.is_file() else {dtype: [] for dtype in DTYPES}
    cascades = {dtype: Cascade.load(args.stages.split(",")) for dtype in DTYPES}
    for start in range(len(marks[DTYPES[0]]), len(rows), PART):
        part, seconds = rows[start : start + PART], []
        for dtype, cascade in cascades.items():
            begin = time.process_time()
            found = cascade.sample(
                [row["prompt"] for row in part],
                seed=args.seed,
                prompt_indices=range(start, start + len(part)),
                batch_size=PART,
                stage_settings={config.name: {"dtype": dtype} for config in cascade.configs},
            )
            seconds.append((time.process_time() - begin) / len(part))
            pairs = zip(found, part, strict=True)
            marks[dtype] += [bool(alignment.score(image, row)["exact"]) for image, row in pairs]
        atomic.write_json(file, marks)
        times = ", ".join(f"{dtype} {t:.2f}" for dtype, t in zip(DTYPES, seconds, strict=True))
        print(f"{start + len(part)}: CPU seconds per image: {times}", file=sys.stderr, flush=True)
    print(summary(marks))


if __name__ == "__main__":
    main()
