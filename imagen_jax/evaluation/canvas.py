"""A sheet of lines, marks and words that is written as SVG or drawn as pixels: for charts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont

SCALE = 2  # Pixels of a picture per unit of the sheet.
_FINER = 2  # Pictures are drawn larger and made smaller: smooth lines.
Number = float | int
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


class _Path(NamedTuple):
    points: tuple[tuple[Number, Number], ...]
    color: str
    width: Number


class _Box(NamedTuple):
    left: Number
    top: Number
    width: Number
    height: Number
    color: str


class _Dot(NamedTuple):
    x: Number
    y: Number
    radius: Number
    color: str


class _Words(NamedTuple):
    x: Number
    y: Number
    text: str
    size: int
    anchor: str
    color: str
    turned: bool


class Canvas:
    """What was put on it, in order; units are pixels of the SVG, y points down."""

    def __init__(self, width: Number, height: Number):
        """An empty white sheet."""
        self.width, self.height = width, height
        self._parts: list[_Path | _Box | _Dot | _Words] = []

    def path(self, points: Sequence[tuple[Number, Number]], color: str, width: Number = 1) -> None:
        """A line through points; of one point nothing is seen."""
        self._parts.append(_Path(tuple(points), color, width))

    def box(self, left: Number, top: Number, width: Number, height: Number, color: str) -> None:
        """A filled rectangle."""
        self._parts.append(_Box(left, top, width, height, color))

    def dot(self, x: Number, y: Number, radius: Number, color: str) -> None:
        """A filled circle."""
        self._parts.append(_Dot(x, y, radius, color))

    def words(
        self,
        x: Number,
        y: Number,
        text: str,
        *,
        size: int = 12,
        anchor: str = "start",
        color: str = "#000",
        turned: bool = False,
    ) -> None:
        """A line of text whose baseline starts, ends or has its middle at (x, y).

        Args:
          x, y: where.
          text: any characters.
          size: of the letters.
          anchor: start, middle or end.
          color: of the letters.
          turned: read from below.
        """
        self._parts.append(_Words(x, y, text, size, anchor, color, turned))

    def svg(self) -> str:
        """The sheet as an SVG file."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" '
            f'height="{self.height:g}" font-family="sans-serif">',
            '<rect width="100%" height="100%" fill="white"/>',
            *map(_element, self._parts),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The sheet as a picture, `SCALE` pixels to a unit."""
        scale = SCALE * _FINER
        sheet = Image.new("RGB", (round(scale * self.width), round(scale * self.height)), "white")
        for part in self._parts:
            _draw(sheet, part, scale)
        return np.asarray(sheet.reduce(_FINER))


def _element(part: _Path | _Box | _Dot | _Words) -> str:
    match part:
        case _Path(points, color, width):
            line = "L".join(f"{x:g} {y:g}" for x, y in points)
            return f'<path d="M{line}" stroke="{color}" stroke-width="{width:g}" fill="none"/>'
        case _Box(left, top, width, height, color):
            where = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
            return f'<rect {where} fill="{color}"/>'
        case _Dot(x, y, radius, color):
            return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{color}"/>'
        case _Words(x, y, text, size, anchor, color, turned):
            turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
            return (
                f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
                f'fill="{color}"{turn}>{html.escape(text)}</text>'
            )


def _draw(sheet: Image.Image, part: _Path | _Box | _Dot | _Words, scale: int) -> None:
    pen = ImageDraw.Draw(sheet)
    match part:
        case _Path(points, color, width):
            line = [(scale * x, scale * y) for x, y in points]
            pen.line(line, fill=color, width=round(scale * width), joint="curve")
        case _Box(left, top, width, height, color):
            ends = left, top, left + width, top + height
            pen.rectangle([scale * end for end in ends], fill=color)
        case _Dot(x, y, radius, color):
            pen.circle((scale * x, scale * y), scale * radius, fill=color)
        case _Words(x, y, text, size, anchor, color, turned):
            font = ImageFont.load_default(size=scale * size)
            at = (scale * x, scale * y)
            if not turned:
                pen.text(at, text, fill=color, font=font, anchor=_ANCHORS[anchor])
                return
            left, top, right, bottom = map(round, font.getbbox(text, anchor=_ANCHORS[anchor]))
            letters = Image.new("L", (right - left, bottom - top))
            ink = ImageDraw.Draw(letters)
            ink.text((-left, -top), text, fill=255, font=font, anchor=_ANCHORS[anchor])
            letters = letters.transpose(Image.Transpose.ROTATE_90)
            # A quarter turn takes (x, y) to (y, -x).
            corner = (round(at[0] + top), round(at[1] - right))
            sheet.paste(ImageColor.getrgb(color), corner, letters)
