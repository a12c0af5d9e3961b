"""Every reader of files from outside: valid files, how it reads one, what it may raise."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_jax.config import overrides
from imagen_jax.config.data import SourceConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.embeddings import unit_file
from imagen_jax.data.index import scan
from imagen_jax.data.sources.registry import SOURCES
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import frechet
from imagen_jax.evaluation.raters import score
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.inference import prompts
from imagen_jax.interop import weights
from imagen_jax.io import images
from tests.fuzz import embedding_files, image_files, mutate
from tests.reference import tfrecords

Mutation = Callable[[bytes, random.Random], bytes]


@dataclasses.dataclass(frozen=True)
class FileReader:
    """A reader of one kind of file.

    Attributes:
      seeds: valid files.
      read: reads the file at a path; returns whether its header was accepted.
      errors: what it may raise for a damaged file.
      suffix: of the file's name.
      mutation: changes a file.
      header: whether the header of a file is valid; None: `read` says so.
    """

    seeds: Sequence[bytes]
    read: Callable[[pathlib.Path], bool]
    errors: tuple[type[Exception], ...]
    suffix: str = ""
    mutation: Mutation = mutate.mutate
    header: Callable[[bytes], bool] | None = None


def read_image(path: pathlib.Path) -> bool:
    """As the index and the pipeline read it."""
    data = path.read_bytes()
    images.inspect_image(data, "header")
    try:
        info = images.inspect_image(data, "decode")
    except images.ImageError:
        return True
    assert images.decode(data).shape == (info.size[1], info.size[0], 3)
    return True


def _source(kind: str, **fields) -> Callable[[pathlib.Path], bool]:
    def read(path: pathlib.Path) -> bool:
        source = SourceConfig(kind=kind, path=str(path), max_quarantined=1.0, **fields)
        reader = SOURCES[kind](source)
        table, report = scan.build(reader, source)
        for i in range(len(table)):
            images.decode(reader.read(table.key(i), table.location(i)))
            assert all(table.captions(i))
        return len(table) > 0 or report.total > 1

    return read


def _folder(path: pathlib.Path) -> bool:
    """The file as a caption or table beside two images."""
    folder = path.parent / "folder"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "a.png").write_bytes(_PNG)
    (folder / "b.png").write_bytes(_PNG)
    name = {".txt": "a.txt"}.get(path.suffix, f"metadata{path.suffix}")
    (folder / name).write_bytes(path.read_bytes())
    return _source("folder")(folder)


def _records() -> bytes:
    return tfrecords.record(tfrecords.example(_PNG, b"a red circle")) * 4


def _tar(format: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        row = json.dumps({"caption": "a red circle"}).encode()
        for name in ("a", "b", "c" * 90):
            for part, data in ((".png", _PNG), (".txt", b"a red circle"), (".json", row)):
                info = tarfile.TarInfo(f"folder/{name}{part}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _parquet(compression: str) -> bytes:
    table = pa.table({"image": [_PNG] * 4, "caption": [f"number {i}" for i in range(4)]})
    file = io.BytesIO()
    pq.write_table(table, file, compression=compression, row_group_size=2)
    return file.getvalue()


def _read_weights(opened: Callable) -> Callable[[pathlib.Path], bool]:
    def read(path: pathlib.Path) -> bool:
        tensors = opened(path)
        try:
            for tensor in tensors.values():
                tensor.read()
        except weights.WeightsError:
            return True
        return True

    return read


def _safetensors(folder: pathlib.Path) -> bytes:
    arrays = {f"layer.{i}.weight": np.arange(12.0).reshape(3, 4) for i in range(3)}
    weights.write_safetensors(folder / "x.safetensors", arrays)
    return (folder / "x.safetensors").read_bytes()


def _pickled_state(names: int) -> bytes:
    """The pickle of a `state_dict`, as torch writes it, in protocol 2."""
    out = b"\x80\x02}q\x00("
    for k in range(names):
        key = str(k).encode()
        storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key
        storage += b"X\x03\0\0\0cpuK\x0ctQ"
        tensor = (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\x03K\x04\x86K\x04K\x01\x86"
        )
        tensor += b"\x89ccollections\nOrderedDict\n)RtR"
        out += b"X\x02\0\0\0w" + key + tensor
    return out + b"u."


def _torch_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled_state(3))
        archive.writestr("archive/byteorder", "little")
        for k in range(3):
            archive.writestr(f"archive/data/{k}", np.arange(12, dtype=np.float32).tobytes())
    return file.getvalue()


def _torch_stream() -> bytes:
    head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."
    data = struct.pack("<q", 12) + np.arange(12, dtype=np.float32).tobytes()
    keys = b"\x80\x02](X\x01\0\0\x000X\x01\0\0\x001X\x01\0\0\x002e."
    return head + _pickled_state(3) + keys + data * 3


def _read_stage(path: pathlib.Path) -> bool:
    overrides.from_json(path.read_text(errors="replace"))
    return True


def _read_samples(path: pathlib.Path) -> bool:
    folder = path.parent / "samples"
    folder.mkdir(exist_ok=True)
    (folder / "00000_00.png").write_bytes(_PNG)
    (folder / "samples.jsonl").write_bytes(path.read_bytes())
    rows = samples.read_rows(folder)
    samples.by_prompt(folder)
    for row in rows:
        try:
            samples.load(folder, row["file"])
        except EvaluationError:
            return True
    return True


def _key() -> dict:
    items = [
        {"prompt": f"p{i}", "category": "", "control": {}, "of": ["A", "B"], "item": i}
        for i in range(6)
    ]
    names = ["fidelity", "alignment"]
    return {
        "id": "x",
        "study": "drawbench",
        "names": ["A", "B"],
        "questions": names,
        "items": items,
    }


def _read_result(path: pathlib.Path) -> bool:
    (path.parent / "key.json").write_text(json.dumps(_key()))
    score.score(str(path.parent / "key.json"), [path])
    return True


def _read_key(path: pathlib.Path) -> bool:
    (path.parent / "result.json").write_bytes(_result())
    score.score(str(path), [path.parent / "result.json"])
    return True


def _result() -> bytes:
    answers = [
        {"item": i, "question": question, "answer": "left"}
        for i in range(6)
        for question in ("fidelity", "alignment")
    ]
    saved = "2026-01-01T00:00:00Z"
    content = {"study": "x", "rater": "r", "saved": saved, "answers": answers}
    return json.dumps(content).encode()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, mu=np.zeros(6), sigma=np.eye(6), count=9, about="{}")
    return file.getvalue()


def _read_npz(path: pathlib.Path) -> bool:
    frechet.load(path)
    return True


def _is_json(data: bytes) -> bool:
    """Whether the file, or one of its lines, is JSON."""
    for part in (data, *data.split(b"\n")):
        try:
            json.loads(part)
        except (ValueError, RecursionError):
            continue
        return True
    return False


def _starts(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(starts)


def _is_safetensors(data: bytes) -> bool:
    size = int.from_bytes(data[:8], "little")
    return size < len(data) and _is_json(data[8 : 8 + size])


def _is_zip(data: bytes) -> bool:
    return zipfile.is_zipfile(io.BytesIO(data))


_PNG = image_files.encode("png")
_TABLES = {
    ".jsonl": b'{"file_name": "a.png", "text": "a red circle"}\n'
    b'{"file_name": "b.png", "text": ["one", "two"], "x": 1}\n',
    ".csv": b'file_name,text\na.png,a red circle\nb.png,"a, b"\n',
    ".txt": "a red circle\nein roter Kreis, ça va\n".encode(),
}
_ENCODINGS = ("utf-8", "utf-16", "cp1252")
_PROMPTS = {
    ".jsonl": b'{"prompt": "a red circle", "seed": 3}\n{"prompt": "b"}\n' * 8,
    ".csv": b"prompt,category,seed\na red circle,Colors,1\nb,Text,2\n" * 1,
    ".txt": "a red circle\nein roter Kreis, ça va\n".encode() * 8,
}


def readers(folder: pathlib.Path) -> dict[str, FileReader]:
    """All readers by name; `folder` is scratch space for making valid files."""
    wrong = (ConfigError,)
    png = mutate.sometimes(mutate.with_png_checksums)
    found = {
        name: FileReader(seeds, read_image, (images.ImageError,), f".{name}", mutate.mutate)
        for name, seeds in image_files.seeds().items()
    }
    text = mutate.json_or_bytes
    found["png"] = dataclasses.replace(found["png"], mutation=png)
    records = mutate.sometimes(mutate.with_record_checksums)
    tar = mutate.sometimes(mutate.with_tar_checksums)
    tars = [_tar(tarfile.USTAR_FORMAT), _tar(tarfile.PAX_FORMAT), _tar(tarfile.GNU_FORMAT)]
    tables = [_parquet("none"), _parquet("snappy")]
    found |= {
        "tfrecord": FileReader([_records()], _source("tfrecord"), wrong, ".tfrecord", records),
        "tar": FileReader(tars, _source("webdataset"), wrong, ".tar", tar),
        "parquet": FileReader(tables, _source("parquet"), wrong, ".parquet"),
    }
    for suffix, data in _TABLES.items():
        seeds = [(data.decode() * 4).encode(encoding) for encoding in _ENCODINGS]
        found[f"captions{suffix}"] = FileReader(seeds, _folder, wrong, suffix, text)
    for suffix, data in _PROMPTS.items():
        read = lambda path: bool(prompts.read(str(path), log=lambda line: None))  # noqa: E731
        header = _is_json if suffix == ".jsonl" else bool
        found[f"prompts{suffix}"] = FileReader(
            [data], read, (prompts.PromptError,), suffix, text, header
        )
    lines = b'{"file": "00000_00.png", "prompt": "a"}\n' * 4
    state = overrides.to_json(Config()).encode()
    broken, score_errors = (weights.WeightsError,), (EvaluationError,)
    key = json.dumps(_key()).encode()
    return found | {
        "safetensors": FileReader(
            [_safetensors(folder)],
            _read_weights(weights.open_safetensors),
            broken,
            header=_is_safetensors,
        ),
        "torch_zip": FileReader(
            [_torch_zip()], _read_weights(weights.open_torch), broken, header=_is_zip
        ),
        "torch_stream": FileReader(
            [_torch_stream()],
            _read_weights(weights.open_torch),
            broken,
            header=_starts(_torch_stream()[:40]),
        ),
        "config.json": FileReader([state], _read_stage, (ValueError,), "", text, _is_json),
        "samples.jsonl": FileReader([lines], _read_samples, score_errors, "", text, _is_json),
        "ratings": FileReader([_result()], _read_result, score_errors, "", text, _is_json),
        "key.json": FileReader([key], _read_key, score_errors, "", text, _is_json),
        "statistics": FileReader([_npz()], _read_npz, score_errors, ".npz", header=_is_zip),
        "embeddings": FileReader(
            embedding_files.units(folder),
            embedding_files.read_unit,
            (unit_file.EmbeddingError,),
            header=_starts(unit_file.TAG, unit_file.OLD_TAG),
        ),
        "manifest.json": FileReader(
            embedding_files.manifests(folder),
            embedding_files.read_manifest,
            (unit_file.EmbeddingError,),
            "",
            text,
            embedding_files.is_json,
        ),
    }
