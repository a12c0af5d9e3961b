"""Contact sheets of each stage beside real images, and the colour shift of SR stages.

A super-resolution stage is sampled twice: from true low-resolution images and from samples of the
stage before it. A defect of the second row only is due to the earlier stage, or to too little noise
conditioning augmentation (Imagen, Sec. 2.4).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from imagen_jax.inference import stage_sampler
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import SampleRequest
from imagen_jax.io import atomic, images
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.stage import Stage


@dataclasses.dataclass(frozen=True)
class ColourShift:
    """Difference of an SR stage's images from their conditioning, in levels of 255.

    Images are averaged to the low resolution first.

    Attributes:
      mean: mean difference per channel, image minus conditioning.
      rms: root mean square over images, pixels and channels.
    """

    mean: tuple[float, float, float]
    rms: float


def colour_shift(
    generated: UInt8[np.ndarray, "n h w 3"], lowres: UInt8[np.ndarray, "n l l 3"]
) -> ColourShift:
    """Compares images, averaged to the low resolution, with their low-resolution images."""
    count, side = len(lowres), lowres.shape[1]
    factor = generated.shape[1] // side
    blocks = generated.astype(np.float64).reshape(count, side, factor, side, factor, 3)
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
      examples: for each stage a batch of the same images: image [N,H,W,3] in [-1, 1], text_emb,
        text_mask and, for an SR stage, lowres.
      captions: captions of the N images.
      out: folder to write.
      seed: seed of all noise.
      log: called with a line per sheet.

    Returns:
      By SR stage, the shift for "true" low-resolution images and for "drawn" (generated) ones.
    """
    folder, count = pathlib.Path(out), len(captions)
    keys = stage_sampler.image_keys(seed, range(count), [0] * count)
    text = Text(examples[0]["text_emb"], examples[0]["text_mask"])
    request = SampleRequest(seed=seed, batch_size=count, text_emb=text.emb, text_mask=text.mask)
    chain = Cascade(stages).sample_stages(request)
    shifts: dict[str, dict[str, ColourShift]] = {}
    for index, (stage, example) in enumerate(zip(stages, examples, strict=True)):
        name = stage.config.name
        rows = [images.to_uint8(example["image"]), chain[index]]
        if index:
            true_lowres = images.to_uint8(example["lowres"])
            own = stage_sampler.stage_keys(keys, index)
            generated = stage_sampler.sample_stage(
                stage.params, stage.config, text, own, example["lowres"]
            )
            rows.insert(1, images.to_uint8(np.asarray(generated)))
            shifts[name] = {
                "true": colour_shift(rows[1], true_lowres),
                "drawn": colour_shift(rows[2], chain[index - 1]),
            }
        sheet = images.grid(np.concatenate(rows), columns=count, captions=[*captions] * len(rows))
        images.save_png(folder / f"{name}.png", sheet, {})
        kinds = "real, from true low-res, from generated low-res" if index else "real, generated"
        log(f"{folder / name}.png: rows are {kinds}")
    for name, by_source in shifts.items():
        for source, shift in by_source.items():
            cast = ", ".join(f"{value:+.2f}" for value in shift.mean)
            log(f"{name} from {source} low-res: colour cast {cast}, rms {shift.rms:.2f} of 255")
    report = {n: {s: dataclasses.asdict(v) for s, v in by.items()} for n, by in shifts.items()}
    atomic.write_json(folder / "colour_shift.json", report)
    return shifts
