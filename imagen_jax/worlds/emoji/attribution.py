"""Licence of the images: the text that goes beside every published image, generated ones too."""

from __future__ import annotations

import pathlib

ATTRIBUTION = (pathlib.Path(__file__).parent / "ATTRIBUTION.txt").read_text()
