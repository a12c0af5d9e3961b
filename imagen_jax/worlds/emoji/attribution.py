"""Licence of the images: the text that goes beside every published image, generated ones too."""

from __future__ import annotations

import pathlib

FOLDER = pathlib.Path(__file__).parent  # Holds the committed tables too.
ATTRIBUTION = (FOLDER / "ATTRIBUTION.txt").read_text()
