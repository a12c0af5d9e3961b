"""The paper's result tables as data, for comparison with a run; all from arXiv:2205.11487."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "Imagen, arXiv:2205.11487, as reported there"


class FidRow(NamedTuple):
    """FID-30K on COCO at 256x256 (Table 1); lower is better."""

    model: str
    zero_shot: bool
    fid: float


FID = (
    FidRow("AttnGAN", False, 35.49),
    FidRow("DM-GAN", False, 32.64),
    FidRow("DF-GAN", False, 21.42),
    FidRow("DM-GAN + CL", False, 20.79),
    FidRow("XMC-GAN", False, 9.33),
    FidRow("LAFITE", False, 8.12),
    FidRow("Make-A-Scene", False, 7.55),
    FidRow("DALL-E", True, 17.89),
    FidRow("LAFITE (zero-shot)", True, 26.94),
    FidRow("GLIDE", True, 12.24),
    FidRow("DALL-E 2", True, 10.39),
    FidRow("Imagen", True, 7.27),
)


class HumanRow(NamedTuple):
    """Raters on 200 COCO captions (Table 2): percent and half of its 95% interval.

    Real images beside real images would be chosen in 50% by definition, without an interval.
    """

    model: str
    subset: str
    photorealism: tuple[float, float]
    alignment: tuple[float, float]


HUMAN = (
    HumanRow("Original", "all", (50.0, 0.0), (91.9, 0.42)),
    HumanRow("Imagen", "all", (39.5, 0.75), (91.4, 0.44)),
    HumanRow("Original", "no people", (50.0, 0.0), (92.2, 0.54)),
    HumanRow("Imagen", "no people", (43.9, 1.01), (92.1, 0.55)),
)
