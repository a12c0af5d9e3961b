"""The estimates of x0 over the steps of every stage, as a strip or a GIF."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.inference.cascade import Progress
from imagen_jax.inference.sample_folder import Sample
from imagen_jax.io import atomic, images

KINDS = ("png", "gif")
COLUMNS = 8
# Shortest side of a frame, pixels; duration of a frame of a GIF and of its last one, ms.
SIDE, FRAME, LAST_FRAME = 128, 120, 1500


class Trace:
    """Collects the estimates of one call of `Cascade.sample`, as its on_progress."""

    def __init__(self, kind: str):
        """`kind`: "png", a row of steps per stage, or "gif", one after the other."""
        self.kind = kind
        # By stage, then by image of the call: estimates of the steps that are shown.
        self._seen: dict[str, dict[int, list[np.ndarray]]] = {}

    def __call__(self, progress: Progress) -> None:
        shown = _shown(progress.steps)
        if progress.step not in shown:
            return
        estimates = images.to_uint8(np.asarray(progress.x0[: len(progress.rows)]))
        seen = self._seen.setdefault(progress.stage, {})
        for row, estimate in zip(progress.rows.tolist(), estimates, strict=True):
            seen.setdefault(row, []).append(estimate)

    def write(
        self, folder: pathlib.Path, samples: Sequence[Sample], texts: Sequence[Mapping[str, str]]
    ) -> None:
        """Writes FOLDER/PPPPP_KK.png or .gif for the samples of the call, in their order."""
        folder.mkdir(parents=True, exist_ok=True)
        stages = [
            np.stack([np.stack(steps) for _, steps in sorted(seen.items())])
            for seen in self._seen.values()
        ]
        side = max(SIDE, stages[-1].shape[2])
        for index, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            rows = [_upsampled(steps[index], side) for steps in stages]
            path = folder / sample.file
            if self.kind == "png":
                blank = np.full_like(rows[0][0], 255)
                cells = [[*row, *[blank] * (COLUMNS - len(row))] for row in rows]
                images.save_png(path, images.grid(np.concatenate(cells), COLUMNS), text)
            else:
                _save_gif(path.with_suffix(".gif"), np.concatenate(rows), text["prompt"])


def _shown(steps: int) -> set[int]:
    """At most COLUMNS of the steps 1 to `steps`, evenly, the first and the last among them."""
    return {int(step) for step in np.linspace(1, steps, min(steps, COLUMNS)).round()}


def _upsampled(
    pixels: UInt8[np.ndarray, "n h w 3"], side: int
) -> UInt8[np.ndarray, "n side side 3"]:
    """Images upsampled to `side` pixels, nearest neighbour."""
    nearest = [Image.fromarray(p).resize((side, side), Image.Resampling.NEAREST) for p in pixels]
    return np.stack([np.asarray(image) for image in nearest])


def _save_gif(path: pathlib.Path, frames: UInt8[np.ndarray, "n h w 3"], comment: str) -> None:
    first, *others = (Image.fromarray(frame) for frame in frames)
    durations = [FRAME] * len(others) + [LAST_FRAME]
    with atomic.file(path) as temporary:
        first.save(
            temporary,
            format="gif",
            save_all=True,
            append_images=others,
            duration=durations,
            loop=0,
            comment=comment.encode(),
        )
