"""`doctor`: checks configuration, data and devices before a run.

Every check uses the code of the run, on a random subset if the whole takes too long, and yields
lines with the status ok, warning or failed; the latter two name the fix.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np

from imagen_jax.checks.bucket import check_bucket
from imagen_jax.checks.regions import check_regions
from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.batches.view import mentions_side
from imagen_jax.data.embeddings.on_the_fly import TokenSource
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.embeddings.unit_file import EmbeddingError
from imagen_jax.data.sources.records import AnySource
from imagen_jax.data.sources.registry import open_source
from imagen_jax.interop.weights import WeightsError
from imagen_jax.io import images, mirrors
from imagen_jax.parallel import partitioning, xla_flags
from imagen_jax.text.encoders import TextEncoder, load_text_encoder
from imagen_jax.training.checkpoint import Checkpoints, newest
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer, with_defaults
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.train import with_data

SAMPLE_SIZE = 100  # Images that are decoded.
CAPTIONS = 5_000  # Captions that are tokenized.
MAX_PIXEL_VALUE = 255
# Errors that become a line of the report; any other exception is a bug.
EXPECTED_ERRORS = (ConfigError, EmbeddingError, CheckpointError, WeightsError, OSError)


class DoctorError(ValueError):
    """A check failed; the lines printed before name the fix."""


Status = Literal["ok", "warning", "failed"]
Lines = Iterator[tuple[Status, str]]


class Finding(NamedTuple):
    """One line of the report."""

    status: Status
    name: str
    text: str


@dataclasses.dataclass
class CheckContext:
    """Objects that earlier checks have opened; None if that failed."""

    config: Config
    workdir: str | None
    rng: np.random.Generator
    source: AnySource | None = None
    encoder: TextEncoder | None = None
    store: EmbeddingStore | TokenSource | None = None
    pipeline: Pipeline | None = None


def doctor(
    config: Config, workdir: str | None = None, log: Callable[[str], None] = print
) -> list[Finding]:
    """Runs all checks.

    Args:
      config: configuration of the run.
      workdir: folder of the run; None: its checks are skipped with a warning.
      log: called with each line.

    Returns:
      All findings in the order of the checks.
    """
    context = CheckContext(config, workdir, np.random.default_rng(0))
    findings = []
    for name, check in CHECKS.items():
        try:
            found: list[tuple[Status, str]] = list(check(context))
        except EXPECTED_ERRORS as error:
            found = [("failed", " ".join(str(error).split()))]
        for status, text in found:
            findings.append(Finding(status, name, text))
            log(f"{status:7}  {name:11}  {text}")
    return findings


def check_devices(context: CheckContext) -> Lines:
    """Devices, mesh, and whether the batch size is divisible."""
    config = context.config
    devices = jax.devices()
    kinds = {device.device_kind for device in devices}
    yield "ok", f"{len(devices)} x {', '.join(sorted(kinds))}, {jax.process_count()} process(es)"
    mesh = partitioning.make_mesh(config.mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh, config.train.accumulation)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    per_device = config.data.batch_size // partitioning.batch_devices(mesh)
    yield "ok", f"mesh {axes}; {per_device} images of a batch per device"
    yield "ok", xla_flags.in_force(devices[0].platform)


def check_images(context: CheckContext) -> Lines:
    """The source opens; random images decode and use the range of values."""
    data = context.config.data
    context.source = source = open_source(data, log=lambda line: None)
    report = source.report
    # Above the limit the source does not open; a warning from half of it.
    limit = max([data.max_quarantined, *(s.max_quarantined for s in data.mixture.values())])
    status = "warning" if report.share > limit / 2 else "ok"
    hint = "; `imagen prepare` lists them" if report.rejected else ""
    yield status, f"{len(source):,} usable, {len(report.rejected)} of {report.total} not{hint}"

    before = len(report.rejected)
    chosen = context.rng.integers(0, len(source), SAMPLE_SIZE)
    begin = time.perf_counter()
    pixels = [source.record(int(i)).image for i in chosen]
    each = (time.perf_counter() - begin) / SAMPLE_SIZE * 1e3
    broken = source.report.rejected[before:]
    if broken:
        first, error = broken[0]
        text = f"{len(broken)} of {SAMPLE_SIZE} no longer decode, such as {first}: {error}"
        yield "failed", f"{text}; repair or remove them, the next start rebuilds the index"
    else:
        yield "ok", f"{SAMPLE_SIZE} random ones decode, {each:.1f} ms each"
    sides = [min(p.shape[:2]) for p in pixels]
    needed = data.crop_from or data.image_size
    too_small = float(np.mean([side < needed for side in sides]))
    if too_small:
        yield (
            "warning",
            f"{too_small:.0%} have a shorter side below {needed} px and are upsampled; exclude "
            f"them with --config.data.min_size={needed}",
        )
    yield from _value_range(pixels)


def _value_range(pixels: list[np.ndarray]) -> Lines:
    low, high = min(p.min() for p in pixels), max(p.max() for p in pixels)
    flat = float(np.mean([p.max() - p.min() <= 2 for p in pixels]))
    floats = images.to_float(np.stack([low, high] * 3).reshape(2, 3))
    as_float = f"as float {floats.min():.2f}..{floats.max():.2f}"
    span = f"levels {low}..{high} of {MAX_PIXEL_VALUE}, {as_float}"
    if high <= 2:
        yield "failed", f"{span}: nearly black; if saved from floats in [0, 1], multiply by 255"
    elif flat > 0.5:
        yield "failed", f"{flat:.0%} are of one colour; check image_key and how they were saved"
    elif high < 128 or low > 127:
        yield "warning", f"{span}: half of the range is unused; check how they were saved"
    elif flat > 0.02:
        yield "warning", f"{flat:.0%} are of one colour; remove them if they are placeholders"
    else:
        yield "ok", span


def check_captions(context: CheckContext) -> Lines:
    """Number of captions, of distinct ones, and their lengths."""
    config, source = context.config, _opened(context.source, "the images")
    hashes = source.hashes()
    unique = len(np.unique(hashes))
    text = f"{len(hashes):,} captions of {len(source):,} images, {unique:,} distinct"
    if unique == 1 and len(source) > 1:
        yield "failed", f"{text}; check --config.data.caption_key"
    else:
        yield ("warning" if unique < len(source) / 100 else "ok"), text

    chosen = context.rng.integers(0, len(source), min(CAPTIONS, 4 * len(source)))
    texts = list(dict.fromkeys(t for i in chosen for t in source.captions(int(i))))
    missing = source.report.counts()
    empty = missing.get("no caption", 0) + missing.get("empty caption", 0)
    words = np.quantile([len(t.split()) for t in texts], [0.5, 0.9, 0.99, 1.0]).round().astype(int)
    yield (
        "warning" if empty > 0.01 * source.report.total else "ok",
        f"words: median {words[0]}, 90% up to {words[1]}, 99% up to {words[2]}, longest "
        f"{words[3]}; {empty} images have none",
    )
    if config.data.flip:
        share = np.mean([mentions_side(t) for t in texts])
        yield "ok", f"{share:.1%} mention left or right and are never mirrored"


def check_text(context: CheckContext) -> Lines:
    """The encoder loads; share of captions that it cuts."""
    config = context.config
    if not config.text.path:
        yield (
            "warning",
            "no encoder given, any embeddings are used; set --config.text.path",
        )
        return
    # As in `train`: only an encoder that runs during training is placed on the mesh.
    mesh = partitioning.make_mesh(config.mesh) if config.text.on_the_fly else None
    context.encoder = encoder = load_text_encoder(config.text, mesh)
    yield "ok", f"{config.text.path}: width {encoder.dim}, up to {encoder.max_len} tokens"
    length = min(encoder.max_len, config.data.max_text_len)
    if context.source is None:
        return
    texts = _some_captions(context, CAPTIONS)
    over = float(np.mean([encoder.token_count(text) > length for text in texts]))
    line = f"{over:.1%} of {len(texts):,} captions have more than {length} tokens and are cut"
    fix = "; raise --config.text.max_len and --config.data.max_text_len together"
    yield ("warning", line + fix) if over > 0.05 else ("ok", line)


def check_embeddings(context: CheckContext) -> Lines:
    """The store is complete, has the encoder and width of the run, and has every caption."""
    config = context.config
    if config.text.on_the_fly:
        context.store = store = TokenSource(_opened(context.encoder, "the text encoder"))
    else:
        expected = context.encoder.fingerprint() if context.encoder else None
        context.store = store = EmbeddingStore.open(config.data.embeddings, expected)
    if config.model.text_dim and config.model.text_dim != store.dim:
        yield (
            "failed",
            f"width {store.dim}, but config.model.text_dim={config.model.text_dim}; set it to 0 "
            "(that of the store) or embed with the intended encoder",
        )
    source = _opened(context.source, "the images")
    context.pipeline = Pipeline(source, store, config.data, config.seed)
    if isinstance(store, TokenSource):
        yield "ok", f"none stored, captions are encoded during training, width {store.dim}"
        return
    encoder = "of the configured encoder" if context.encoder else "of an unchecked encoder"
    yield "ok", f"{store.captions:,} captions, width {store.dim}, {encoder}"
    yield "ok", "has every caption of the images"
    yield from _check_mask(context, store)


def _check_mask(context: CheckContext, store: EmbeddingStore) -> Lines:
    """Mask and vectors agree: real tokens have vectors, others are zero."""
    length = context.config.data.max_text_len
    texts = _some_captions(context, 256)
    text_emb, mask = store.lookup(texts, length)
    text_emb = text_emb.astype(np.float32)
    counts = mask.sum(axis=1)
    if not np.isfinite(text_emb).all() or (np.abs(text_emb).max(axis=-1)[mask] == 0).any():
        yield "failed", "some tokens have zero or infinite vectors; delete the store, embed again"
    elif text_emb[~mask].any() or (counts == 0).any():
        yield "failed", "mask and vectors disagree; delete the store, embed again"
    elif context.encoder and any(
        count != min(context.encoder.token_count(text), context.encoder.max_len, length)
        for count, text in zip(counts, texts, strict=True)
    ):
        yield "failed", "token counts differ from the encoder's; delete the store, embed again"
    else:
        full = float((counts == length).mean())
        median = f"{np.median(counts):.0f} of {length}"
        yield "ok", f"mask agrees with the vectors; median {median} tokens"
        if full > 0.2:
            yield (
                "warning",
                f"{full:.0%} of the captions fill all {length} tokens, so many are cut; raise "
                "--config.data.max_text_len",
            )


def check_batch(context: CheckContext) -> Lines:
    """A batch can be made; images per second of one thread."""
    pipeline = _opened(context.pipeline, "the embeddings")
    pipeline.batch_at(0)
    begin = time.perf_counter()
    batch = pipeline.batch_at(1)
    rate = len(batch["image"]) / (time.perf_counter() - begin)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
    low, high = float(batch["image"].min()), float(batch["image"].max())
    if low < -1 or high > 1:
        yield "failed", f"images in [{low:.2f}, {high:.2f}], expected [-1, 1]"
    yield "ok", f"{shapes}; {rate:.0f} images/s in one thread"


def check_workdir(context: CheckContext) -> Lines:
    """The workdir is writable and has space for the run."""
    if context.workdir is None:
        yield "warning", "not checked; give --workdir"
        return
    if address := mirrors.origin(context.workdir):
        yield check_bucket(address)
        return
    folder = pathlib.Path(context.workdir)
    probe = folder / f".doctor_{uuid.uuid4().hex}"
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        os.replace(probe, f"{probe}.2")
        os.unlink(f"{probe}.2")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield "failed", f"{folder} cannot be written ({error.strerror}); name another --workdir"
        return
    finally:
        if not existed and folder.is_dir():
            folder.rmdir()
    yield "ok", f"{folder} is writable"
    state = _state_bytes(context)
    if state is None:
        yield "warning", "space is not checked; set config.model.text_dim or repair the embeddings"
        return
    needed = state * _saves(context.config)
    line = f"{free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.3g} GB"
    fix = "; free space, lower --config.checkpoint.keep or keep_best, or raise keep_every"
    if free < needed:
        yield "failed", line + fix
    else:
        yield ("warning", line + fix) if free < 2 * needed else ("ok", line)


def _saves(config: Config) -> int:
    """Largest number of checkpoints on disk, including the one being written."""
    settings = config.checkpoint
    permanent = config.train.steps // settings.keep_every if settings.keep_every else 0
    return settings.keep + 1 + settings.keep_best + permanent


def _state_bytes(context: CheckContext) -> int | None:
    """Bytes of the state of the run; None if the width of the text is unknown."""
    config = _with_width(context)
    if not config.model.text_dim:
        return None
    mesh = partitioning.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config, make_optimizer(config.optimizer, 1), mesh)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def check_checkpoint(context: CheckContext) -> Lines:
    """The newest checkpoint of the workdir is complete and the configuration can resume it."""
    if context.workdir is None or not (pathlib.Path(context.workdir) / "checkpoints").is_dir():
        yield "ok", "none yet"
        return
    config = _with_width(context)
    checkpoints = Checkpoints(context.workdir, config.checkpoint)
    if not checkpoints.steps():
        yield "ok", "none yet"
        return
    saved = checkpoints.newest_config()
    changes = overrides.changes(with_defaults(saved), with_defaults(config))
    for field, (old, new) in changes.items():
        yield (
            "failed",
            f"config.{field}={new!r}, but {context.workdir} was trained with {old!r}; set it back "
            f"or allow the change with --allow_changes={field}",
        )
    mesh = partitioning.make_mesh(saved.mesh if config.mesh != saved.mesh else config.mesh)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(
            saved, make_optimizer(saved.optimizer, saved.train.steps), mesh
        )
        step = checkpoints.read(newest, lambda step: (checkpoints.restore(step, abstract), step)[1])
    yield "ok", f"step {step} can be read"


def _with_width(context: CheckContext) -> Config:
    """The configuration with the fields that `train` fills in."""
    config, pipeline = context.config, context.pipeline
    if pipeline is None or context.store is None:
        return config
    return with_data(config, context.store.dim, context.store.fingerprint, pipeline.fingerprint())


def _some_captions(context: CheckContext, count: int) -> list[str]:
    source = _opened(context.source, "the images")
    chosen = context.rng.integers(0, len(source), count)
    return list(dict.fromkeys(source.captions(int(i))[0] for i in chosen))


def _opened(part, name: str):
    if part is None:
        raise ConfigError(f"not checked, because {name} could not be opened; see above")
    return part


CHECKS: dict[str, Callable[[CheckContext], Lines]] = {
    "devices": check_devices,
    "buckets": lambda context: check_regions(context.config, context.workdir),
    "images": check_images,
    "captions": check_captions,
    "text": check_text,
    "embeddings": check_embeddings,
    "batch": check_batch,
    "workdir": check_workdir,
    "checkpoint": check_checkpoint,
}
