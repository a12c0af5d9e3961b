"""The library: a chain of trained stages with its text encoder, from prompts to pictures.

    cascade = Cascade.load(["stages/base", "stages/sr"])
    pictures = cascade.sample(["a red circle"], seed=1)  # uint8 [1, 64, 64, 3]

The base stage draws from noise; each following stage upsamples the picture before it, noises it to
its fixed aug_level and draws the larger picture (Imagen, Sec. 2.4 and Fig. A.4). Each picture's
noise follows from (seed, prompt index, sample index) alone, so it is the same whatever else is in
the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from imagen_jax import config_io, drawing, images, partitioning
from imagen_jax.config import Config, ConfigError, SamplingConfig, unknown_name
from imagen_jax.drawing import picture_keys, sample_stage
from imagen_jax.stage_folder import Stage, StageError, check_chain, load_stage
from imagen_jax.text import TextEncoder, embed_prompts, load_text_encoder

__all__ = [
    "Cascade",
    "Progress",
    "RequestError",
    "Stage",
    "StageError",
    "check_chain",
    "load_stage",
    "picture_keys",
    "sample_stage",
    "with_settings",
]

# Prompts per forward pass of the text encoder: the same whatever the batch of pictures, so that
# neither their embeddings nor what is compiled depend on it.
TEXT_BATCH = 8
MAX_SEED = 2**32 - 1


class RequestError(ValueError):
    """What was asked for cannot be drawn; the message gives field, got, expected and fix."""


class Progress(NamedTuple):
    """How far a call has come.

    Attributes:
      stage: name of the stage that draws.
      stage_index: its place in the chain.
      stages: how many there are.
      step: its steps that are done.
      steps: its steps in all.
      rows: the pictures of the call that are being drawn, [first, end).
      x0: estimate of these pictures by the last step, in [-1, 1], on the device, with rows of
        filling behind them.
    """

    stage: str
    stage_index: int
    stages: int
    step: int
    steps: int
    rows: tuple[int, int]
    x0: Array


class Cascade:
    """Trained stages, base first, with the text encoder that they learned from.

    Attributes:
      configs: of the stages; `sampling` says how each draws unless a call says otherwise.
      encoder: the text encoder; None: callers give embeddings.
    """

    def __init__(self, stages: Sequence[Stage], encoder: TextEncoder | None = None):
        """Chains stages whose parameters are in memory.

        Raises:
          StageError: they do not follow from each other.
        """
        self.configs = [stage.config for stage in stages]
        self.encoder = encoder
        given = stages[0].config.data.lowres_size if stages else 0
        check_chain(self.configs, given)
        placed = [partitioning.copy_everywhere(stage.params) for stage in stages]
        self._params: list[Callable[[], Any]] = [lambda p=params: p for params in placed]

    @classmethod
    def load(
        cls,
        dirs: Sequence[str],
        *,
        text_encoder: str | None = "",
        keep: Literal["all", "one"] = "all",
    ) -> Cascade:
        """Loads stage folders, base first; or super-resolution stages alone, for given pictures.

        Args:
          dirs: stage folders as `export` writes them.
          text_encoder: folder of the text encoder; "": where it lay when the first stage was
            trained; None: none is loaded, and callers give embeddings.
          keep: "all" stages stay on the devices, or "one" at a time, read anew for each call.

        Raises:
          StageError: a folder is no stage, or they do not follow from each other.
          ConfigError: the text encoder is not the one that a stage learned from, or is not there.
        """
        if isinstance(dirs, str) or not dirs:
            raise StageError(f"dirs={dirs!r} must be a list of stage folders, base first")
        if keep not in ("all", "one"):
            raise RequestError(unknown_name("keep", keep, ["all", "one"]))
        stages = [load_stage(path) for path in dirs]
        check_chain([stage.config for stage in stages], stages[0].config.data.lowres_size)
        encoder = None
        if text_encoder is not None:
            text = stages[0].config.text
            text = dataclasses.replace(text, path=text_encoder or text.path)
            encoder = load_text_encoder(text)
            _check_encoder([stage.config for stage in stages], encoder, text.path)
        if keep == "all":
            return cls(stages, encoder)
        cascade = cls([stage._replace(params={}) for stage in stages], encoder)
        read = lambda path: partitioning.copy_everywhere(load_stage(path).params)  # noqa: E731
        cascade._params = [functools.partial(read, path) for path in dirs]
        return cascade

    def embed(
        self, prompts: Sequence[str]
    ) -> tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]:
        """Embeddings and mask of prompts; of equal ones only the first is computed."""
        if self.encoder is None:
            raise RequestError("prompts need a text encoder; load one, or give text_emb, text_mask")
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        text_emb, text_mask = embed_prompts(
            self.encoder,
            list(rows),
            batch_size=TEXT_BATCH,
            max_len=self.configs[0].data.max_text_len,
        )
        order = [rows[prompt] for prompt in prompts]
        return text_emb[order], text_mask[order]

    def sample(self, prompts: Sequence[str] = (), **arguments: Any) -> UInt8[np.ndarray, "n h w 3"]:
        """The last stage's pictures; takes what `sample_stages` takes."""
        return self.sample_stages(prompts, **arguments)[-1]

    def sample_stages(
        self,
        prompts: Sequence[str] = (),
        *,
        seed: int | Sequence[int] = 0,
        prompt_indices: Sequence[int] | None = None,
        sample_indices: Sequence[int] | None = None,
        stage_settings: Mapping[str, Mapping[str, Any]] | None = None,
        text_emb: Float[np.ndarray, "n l d"] | None = None,
        text_mask: Bool[np.ndarray, "n l"] | None = None,
        batch_size: int = 32,
        on_progress: Callable[[Progress], None] | None = None,
        report_every: int = 1,
    ) -> list[UInt8[np.ndarray, "n h w 3"]]:
        """Draws N pictures through all stages, each stage over all batches before the next one.

        Args:
          prompts: N texts; may be left out where text_emb is given.
          seed: of all pictures, or one for each, 0 to 2**32 - 1.
          prompt_indices: with seed and sample index all that a picture's noise depends on; None:
            0, 1, ... N - 1.
          sample_indices: tell pictures of one prompt and seed apart; None: zeros.
          stage_settings: fields of `SamplingConfig` by stage name, for this call.
          text_emb: embeddings to use instead of the prompts', zero at padding.
          text_mask: True at their real tokens.
          batch_size: pictures drawn at a time, rounded up to a multiple of the devices; the last
            batch is filled up, so that one shape is compiled.
          on_progress: called while the devices work on the next steps.
          report_every: steps between two calls of on_progress, at most; the last step is reported.

        Returns:
          The pictures of each stage.

        Raises:
          RequestError, ConfigError: an argument cannot be; nothing has been computed.
        """
        configs = with_settings(self.configs, stage_settings or {})
        count = len(prompts) if text_emb is None else len(text_emb)
        _check_request(prompts, count, text_emb, text_mask, configs[0])
        keys = _keys(count, seed, prompt_indices, sample_indices)
        for name, value in (("batch_size", batch_size), ("report_every", report_every)):
            if value < 1:
                raise RequestError(f"{name}={value} must be at least 1")
        if text_emb is None:
            text_emb, text_mask = self.embed(prompts)

        devices = jax.local_device_count()
        size = -(-min(batch_size, count) // devices) * devices
        wanted = configs[0].data.lowres_size
        if wanted:
            raise RequestError(f"stage {configs[0].name!r} wants a {wanted} px picture")
        drawn, lowres = [], None
        for index, config in enumerate(configs):
            params, parts = self._params[index](), []
            stage_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
            for first in range(0, count, size):
                rows = np.minimum(np.arange(first, first + size), count - 1)
                end = min(first + size, count)

                def report(step, x0, index=index, config=config, span=(first, end)):
                    at = (config.name, index, len(configs), step, config.sampling.steps)
                    on_progress(Progress(*at, span, x0))

                part = draw_batch(
                    params,
                    config,
                    *(v[rows] for v in (text_emb, text_mask, stage_keys)),
                    None if lowres is None else lowres[rows],
                    report=report if on_progress else None,
                    report_every=report_every,
                )
                parts.append(part[: end - first])
            lowres = np.concatenate(parts)
            drawn.append(images.to_uint8(lowres))
        return drawn


def with_settings(
    configs: Sequence[Config],
    settings: Mapping[str, Mapping[str, Any]],
    where: str = "stage_settings",
) -> list[Config]:
    """Configurations with sampling fields replaced.

    Args:
      configs: of stages.
      settings: fields of `SamplingConfig` by stage name.
      where: what messages call it.

    Raises:
      ConfigError: no such stage or field, or a value that it cannot have.
    """
    names = [config.name for config in configs]
    for name in settings:
        if name not in names:
            raise ConfigError(unknown_name(f"{where}: stage", name, names))
    changed = []
    for config in configs:
        values = dataclasses.asdict(config.sampling) | dict(settings.get(config.name, {}))
        sampling = config_io.from_dict(SamplingConfig, values, f"{where}: {config.name}")
        changed.append(dataclasses.replace(config, sampling=sampling))
    return changed


def draw_batch(
    params: Any,
    config: Config,
    text_emb: Float[np.ndarray, "b l d"],
    text_mask: Bool[np.ndarray, "b l"],
    keys: Key[Array, " b"],
    lowres: Float[np.ndarray, "b h w 3"] | None,
    *,
    report: Callable[[int, Array], None] | None = None,
    report_every: int = 1,
) -> Float[np.ndarray, "b size size 3"]:
    """One stage's pictures of one batch, over the devices of this process.

    Args:
      params: plain parameters, on all these devices.
      config: the stage, with how it draws.
      text_emb: text embeddings, padded.
      text_mask: True at real tokens.
      keys: one key per picture.
      lowres: SR stages: the pictures of the stage before, in [-1, 1].
      report: given the number of steps done and their x0, while the next steps run.
      report_every: steps between two reports.
    """
    program, levels = drawing.shared(config), drawing.levels(config)
    aug_level = None
    if lowres is not None:
        aug_level = np.full(len(lowres), config.sampling.aug_level, np.float32)
    given = partitioning.spread((text_emb, text_mask, keys, lowres, aug_level))
    told, at = drawing.begin(program, *given)
    waiting: tuple[int, Array] | None = None
    stride = report_every if report else levels.count
    for first in range(0, levels.count, stride):
        last = min(first + stride, levels.count)
        at = drawing.advance(params, program, told, at, levels[:2], first, last)
        if report:
            if waiting:
                report(waiting[0], jax.block_until_ready(waiting[1]))
            waiting = last, at.x0
    if report and waiting:
        report(waiting[0], jax.block_until_ready(waiting[1]))
    return drawing.picture(at)


def _check_request(
    prompts: Sequence[str],
    count: int,
    text_emb: Float[np.ndarray, "n l d"] | None,
    text_mask: Bool[np.ndarray, "n l"] | None,
    config: Config,
) -> None:
    """Raises RequestError when prompts or embeddings are none, or not of one number and width."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(f"prompts={prompts!r} must be a list of texts; try [{prompts!r}]")
    if not count:
        raise RequestError("prompts=[] must hold at least one text, or text_emb one row")
    if text_emb is None and text_mask is None:
        return
    if text_emb is None or text_mask is None or text_emb.shape[:2] != text_mask.shape:
        shapes = [None if v is None else v.shape for v in (text_emb, text_mask)]
        raise RequestError(f"text_emb, text_mask of shapes {shapes} must be [N, L, D] and [N, L]")
    if text_emb.shape[2] != config.model.text_dim:
        raise RequestError(
            f"text_emb of width {text_emb.shape[2]} must have width {config.model.text_dim}, that "
            f"of stage {config.name!r}; use the text encoder that it was trained with"
        )
    if prompts and len(prompts) != count:
        raise RequestError(f"prompts are {len(prompts)}, text_emb has {count} rows; give as many")


def _keys(
    count: int,
    seed: int | Sequence[int],
    prompt_indices: Sequence[int] | None,
    sample_indices: Sequence[int] | None,
) -> Key[Array, " n"]:
    """The keys of `count` pictures. Raises RequestError."""
    given = {
        "seed": [seed] * count if isinstance(seed, int) else list(seed),
        "prompt_indices": list(range(count) if prompt_indices is None else prompt_indices),
        "sample_indices": [0] * count if sample_indices is None else list(sample_indices),
    }
    for name, values in given.items():
        if len(values) != count:
            raise RequestError(
                f"{name} has {len(values)} values, not one for each of {count} pictures"
            )
        for value in values:
            if not 0 <= value <= MAX_SEED or int(value) != value:
                raise RequestError(f"{name}={value} must be a whole number from 0 to {MAX_SEED}")
    return picture_keys(*given.values())


def _check_encoder(configs: Sequence[Config], encoder: TextEncoder, path: str) -> None:
    """Raises ConfigError when a stage learned from the embeddings of another encoder."""
    given = config_io.fingerprint(encoder.fingerprint())
    for config in configs:
        learned = config.text.fingerprint
        if learned and learned != given:
            raise ConfigError(
                f"--stages: stage {config.name!r} was trained with text encoder {learned}, "
                f"{path} is {given}; give the right one by --text_encoder=DIR"
            )
