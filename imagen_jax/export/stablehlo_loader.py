"""Samples images with stages exported as StableHLO; needs only jax and numpy.

    import load
    base, sr = load.Stage("base"), load.Stage("sr")
    which = {"seed": 7, "prompt_index": [0, 1], "sample_index": [0, 0]}
    lowres = base(text_emb, text_mask, **which)
    images = sr(text_emb, text_mask, **which, lowres=lowres)
    pixels = load.to_uint8(images)

A stage's folder holds sampler.jaxexport (StableHLO, with its signature), params.safetensors (or its
shards) and signature.json, which describes inputs and output. These files are data; this module is
the only code. `imagen export --format=stablehlo` puts a copy of it, load.py, into every folder.
"""

from __future__ import annotations

import json
import pathlib
import struct
import sys
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_FLOAT32 = np.dtype("<f4")


class Stage:
    """The sampler of one stage."""

    def __init__(self, folder: str | pathlib.Path):
        """Reads the folder and places the weights on JAX's first device.

        The program is compiled at the first call of a batch size.

        Raises:
          ValueError: the weights are not a complete safetensors file of float32.
        """
        folder = pathlib.Path(folder)
        self.signature = json.loads((folder / "signature.json").read_text())
        try:
            import flatbuffers  # noqa: F401
        except ImportError:
            _install_flatbuffers_reader()
        from jax import export

        program = export.deserialize(bytearray((folder / "sampler.jaxexport").read_bytes()))
        self._sample = jax.jit(program.call)
        self._params = jax.device_put(read_params(folder / "params.safetensors"))

    def __call__(
        self,
        text_emb: np.ndarray,
        text_mask: np.ndarray,
        *,
        seed: int,
        prompt_index: Sequence[int],
        sample_index: Sequence[int],
        stage_index: int | None = None,
        lowres: Any = None,
    ) -> jax.Array:
        """Samples B images.

        Args:
          text_emb: text embeddings [B, L, D]; L and D are in signature.json.
          text_mask: bool [B, L], True at real tokens.
          seed: below 2**32; it and the three indices determine the noise of an image.
          prompt_index: B numbers below 2**32.
          sample_index: B numbers below 2**32.
          stage_index: position in the cascade; None: 0, or 1 for a stage that takes `lowres`.
          lowres: images of the stage before in [-1, 1], [B, h, h, 3]; None: a base stage.

        Returns:
          Images in [-1, 1], float32 [B, size, size, 3].

        Raises:
          ValueError: `lowres` is missing, or given to a base stage.
        """
        inputs = {
            "text_emb": np.asarray(text_emb, np.float32),
            "text_mask": np.asarray(text_mask, bool),
            "seed": np.uint32(seed),
            "prompt_index": np.asarray(prompt_index, np.uint32),
            "sample_index": np.asarray(sample_index, np.uint32),
            "stage_index": np.uint32((lowres is not None) if stage_index is None else stage_index),
        }
        if (lowres is not None) != ("lowres" in self.signature["inputs"]):
            got, expected = ("none", "an array") if lowres is None else ("an array", "none")
            raise ValueError(
                f"stage {self.signature['stage']!r}: lowres={got}, expected {expected}"
            )
        if lowres is not None:
            inputs["lowres"] = jax.numpy.asarray(lowres, np.float32)
        return self._sample(self._params, inputs)


def to_uint8(pixels: Any) -> np.ndarray:
    """Converts images in [-1, 1] to levels 0..255."""
    return np.clip(np.round((np.asarray(pixels) + 1.0) * 127.5), 0.0, 255.0).astype(np.uint8)


def read_params(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Memory-maps a safetensors file, or the shards that PATH.index.json names.

    Raises:
      ValueError: as `read_safetensors`.
    """
    if path.is_file():
        return read_safetensors(path)
    index = json.loads(path.with_name(f"{path.name}.index.json").read_text())
    arrays = {}
    for file in sorted(set(index["weight_map"].values())):
        arrays |= read_safetensors(path.with_name(pathlib.PurePath(file).name))
    return arrays


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Memory-maps the float32 arrays of a safetensors file.

    Raises:
      ValueError: an array is not float32, or the file is cut short.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if entry["dtype"] != "F32" or end > data.size:
                raise ValueError(f"{path}: {name} is not float32, or the file is cut short")
            arrays[name] = data[start:end].view(_FLOAT32).reshape(entry["shape"])
    return arrays


def _install_flatbuffers_reader() -> None:
    """Installs a minimal reader as module `flatbuffers`, which JAX imports but does not require.

    A table is a position in the buffer; its first int32 is the distance back to its list of field
    offsets. All numbers are little-endian; a reference is a distance forward from its own position.
    """

    def get(format: struct.Struct, buffer: bytes, at: int) -> Any:
        return format.unpack_from(buffer, at)[0]

    u8, u16, i32, u32 = (struct.Struct(f"<{code}") for code in "BHiI")

    class Table:
        def __init__(self, buf: bytes, pos: int):
            self.Bytes, self.Pos = buf, pos

        def Get(self, flags: Any, at: int) -> Any:
            return flags.py_type(get(flags.format, self.Bytes, at))

        def Offset(self, field: int) -> int:
            offsets = self.Pos - get(i32, self.Bytes, self.Pos)
            known = field < get(u16, self.Bytes, offsets)
            return get(u16, self.Bytes, offsets + field) if known else 0

        def Indirect(self, at: int) -> int:
            return at + get(u32, self.Bytes, at)

        def VectorLen(self, field: int) -> int:
            return get(u32, self.Bytes, self.Indirect(self.Pos + field))

        def Vector(self, field: int) -> int:
            return self.Indirect(self.Pos + field) + 4

        def String(self, at: int) -> bytes:
            start = self.Indirect(at)
            return bytes(self.Bytes[start + 4 : start + 4 + get(u32, self.Bytes, start)])

        def GetVectorAsNumpy(self, flags: Any, field: int) -> np.ndarray:
            count, start = self.VectorLen(field), self.Vector(field)
            return np.frombuffer(self.Bytes, flags.dtype, count, start)

    kinds = {"Bool": (u8, bool), "UOffsetT": (u32, int)}
    for bits, signed, unsigned in (8, "b", "B"), (16, "h", "H"), (32, "i", "I"), (64, "q", "Q"):
        kinds[f"Int{bits}"] = struct.Struct(f"<{signed}"), int
        kinds[f"Uint{bits}"] = struct.Struct(f"<{unsigned}"), int
    flags = {
        f"{name}Flags": types.SimpleNamespace(
            py_type=kind, format=code, dtype=np.dtype(code.format)
        )
        for name, (code, kind) in kinds.items()
    }
    module = types.ModuleType("flatbuffers")
    vars(module).update(
        table=types.SimpleNamespace(Table=Table),
        encode=types.SimpleNamespace(Get=get),
        packer=types.SimpleNamespace(uoffset=u32),
        number_types=types.SimpleNamespace(**flags),
        Builder=None,  # JAX names it in annotations only; nothing is built here.
    )
    compat = types.ModuleType("flatbuffers.compat")
    vars(compat).update(import_numpy=lambda: np)
    sys.modules |= {"flatbuffers": module, "flatbuffers.compat": compat}
