"""Looking at stages: what they draw beside what is real, and where a cascade loses its colours.

For each stage a contact sheet. A super-resolution stage is shown twice, from true low-resolution
pictures and from those the stage before it draws: what is good in the first and bad in the second
is the earlier stage's fault or a lack of noise conditioning augmentation (Imagen, Sec. 2.4).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from imagen_jax.inference import stage_sampler
from imagen_jax.inference.cascade import Cascade
from imagen_jax.io import images
from imagen_jax.stages.folder import Stage


@dataclasses.dataclass(frozen=True)
class ColourShift:
    """How a stage changes what it should only refine, at the low resolution, in levels of 255.

    Attributes:
      mean: by channel, drawn minus conditioning; a cast of colour.
      rms: root mean square over pictures, pixels and channels.
    """

    mean: tuple[float, float, float]
    rms: float


def colour_shift(
    drawn: UInt8[np.ndarray, "n h w 3"], lowres: UInt8[np.ndarray, "n l l 3"]
) -> ColourShift:
    """Compares pictures, averaged down to the low resolution, with what they were made from."""
    count, side = len(lowres), lowres.shape[1]
    factor = drawn.shape[1] // side
    blocks = drawn.astype(np.float64).reshape(count, side, factor, side, factor, 3)
    difference = blocks.mean(axis=(2, 4)) - lowres
    red, green, blue = (float(value) for value in difference.mean(axis=(0, 1, 2)))
    return ColourShift((red, green, blue), float(np.sqrt(np.square(difference).mean())))


def diagnose(
    stages: Sequence[Stage],
    examples: Sequence[Mapping[str, Float[np.ndarray, "..."]]],
    captions: Sequence[str],
    out: str,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, ColourShift]]:
    """Writes OUT/NAME.png for each stage, and OUT/colour_shift.json.

    Args:
      stages: base first.
      examples: for each stage a batch of the same pictures: image [N,H,W,3] in [-1, 1], text_emb,
        text_mask and, for an SR stage, lowres.
      captions: of the N pictures.
      out: folder to write.
      seed: of all noise.
      log: receives one line per sheet.

    Returns:
      By SR stage, the shift from "true" and from "drawn" low-resolution pictures.
    """
    folder, count = pathlib.Path(out), len(captions)
    keys = stage_sampler.image_keys(seed, range(count), [0] * count)
    text = (examples[0]["text_emb"], examples[0]["text_mask"])
    words: dict[str, Any] = {"text_emb": text[0], "text_mask": text[1]}
    chain = Cascade(stages).sample_stages(seed=seed, batch_size=count, **words)
    shifts: dict[str, dict[str, ColourShift]] = {}
    for index, (stage, example) in enumerate(zip(stages, examples, strict=True)):
        name = stage.config.name
        rows = [images.to_uint8(example["image"]), chain[index]]
        if index:
            true_lowres = images.to_uint8(example["lowres"])
            own = stage_sampler.stage_keys(keys, index)
            drawn = stage_sampler.sample_stage(
                stage.params, stage.config, *text, own, example["lowres"]
            )
            rows.insert(1, images.to_uint8(np.asarray(drawn)))
            shifts[name] = {
                "true": colour_shift(rows[1], true_lowres),
                "drawn": colour_shift(rows[2], chain[index - 1]),
            }
        sheet = images.grid(np.concatenate(rows), columns=count, captions=[*captions] * len(rows))
        images.save_png(folder / f"{name}.png", sheet, {})
        what = "real, from true low-res, from drawn low-res" if index else "real, drawn"
        log(f"{folder / name}.png: rows are {what}")
    for name, by_source in shifts.items():
        for source, shift in by_source.items():
            cast = ", ".join(f"{value:+.2f}" for value in shift.mean)
            log(f"{name} from {source} low-res: colour cast {cast}, rms {shift.rms:.2f} of 255")
    report = {n: {s: dataclasses.asdict(v) for s, v in by.items()} for n, by in shifts.items()}
    (folder / "colour_shift.json").write_text(json.dumps(report, indent=2) + "\n")
    return shifts
