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

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import editing
from imagen_jax.diffusion.editing import Edit
from imagen_jax.inference import batches, request, stage_sampler
from imagen_jax.inference.batches import Asked
from imagen_jax.inference.request import RequestError, with_settings
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import images
from imagen_jax.parallel import partitioning
from imagen_jax.stages import folder
from imagen_jax.stages.folder import Stage, StageError, check_chain, load_stage
from imagen_jax.text.encoders import TextEncoder, embed_prompts, load_text_encoder

__all__ = [
    "Cascade",
    "Progress",
    "RequestError",
    "Stage",
    "StageError",
    "check_chain",
    "load_stage",
    "image_keys",
    "sample_stage",
    "with_settings",
]

# Prompts per forward pass of the text encoder: the same whatever the batch of pictures, so that
# neither their embeddings nor what is compiled depend on it.
TEXT_BATCH = 8


class Progress(NamedTuple):
    """How far a call has come.

    Attributes:
      stage: name of the stage that draws.
      stage_index: its place in the chain.
      stages: how many there are.
      step: its steps that are done.
      steps: its steps in all.
      rows: which pictures of the call are being drawn.
      x0: estimate of these pictures by the last step, in [-1, 1], on the device, with rows of
        filling behind them.
    """

    stage: str
    stage_index: int
    stages: int
    step: int
    steps: int
    rows: Int[np.ndarray, " b"]
    x0: Array


class Cascade:
    """Trained stages, base first, with the text encoder that they learned from.

    Attributes:
      configs: of the stages; `sampling` says how each draws unless a call says otherwise.
      encoder: the text encoder; None: callers give embeddings.
      weights: a short hash of each stage's parameter file; "" where there is none.
      guides: the same of the checkpoints that guide.
      keep: "all" stages are on the devices, or "one" at a time.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        encoder: TextEncoder | None = None,
        guides: Sequence[Stage] = (),
    ):
        """Chains stages whose parameters are in memory.

        Args:
          stages: base first.
          encoder: the text encoder; None: callers give embeddings.
          guides: weaker checkpoints of some of the stages, to guide them (autoguidance).

        Raises:
          StageError: they do not follow from each other, or a guide draws what no stage does.
        """
        self.configs = [stage.config for stage in stages]
        self.encoder = encoder
        self.weights = [""] * len(self.configs)
        self.guides = [""] * len(guides)
        self.keep: Literal["all", "one"] = "all"
        given = stages[0].config.data.lowres_size if stages else 0
        check_chain(self.configs, given)
        self._params = [_held(stage.params) for stage in stages]
        self._guides: list[tuple[Callable[[], Any], Config] | None] = [None] * len(stages)
        for guide in guides:
            index = request.guided_stage(guide.config, self.configs)
            self._guides[index] = _held(guide.params), guide.config

    @classmethod
    def load(
        cls,
        dirs: Sequence[str],
        *,
        text_encoder: str | None = "",
        guides: Sequence[str] = (),
        keep: Literal["all", "one"] = "all",
    ) -> Cascade:
        """Loads stage folders, base first; or super-resolution stages alone, for given pictures.

        Args:
          dirs: stage folders as `export` writes them.
          text_encoder: folder of the text encoder; "": where it lay when the first stage was
            trained; None: none is loaded, and callers give embeddings.
          guides: stage folders of weaker checkpoints, each to guide the stage that draws the same
            pictures (autoguidance, arXiv:2406.02507).
          keep: "all" stages stay on the devices, or "one" at a time, read anew for each call.

        Raises:
          StageError: a folder is no stage, or they do not follow from each other.
          ConfigError: the text encoder is not the one that a stage learned from, or is not there.
        """
        if isinstance(dirs, str) or not dirs:
            raise StageError(f"dirs={dirs!r} must be a list of stage folders, base first")
        if keep not in ("all", "one"):
            raise RequestError(unknown_name("keep", keep, ["all", "one"]))
        stages, weaker = ([load_stage(path) for path in paths] for paths in (dirs, guides))
        check_chain([stage.config for stage in stages], stages[0].config.data.lowres_size)
        encoder = None
        if text_encoder is not None:
            text = stages[0].config.text
            text = dataclasses.replace(text, path=text_encoder or text.path)
            encoder = load_text_encoder(text)
            _check_encoder([stage.config for stage in stages], encoder, text.path)
        if keep == "one":  # Parameters are mapped from their files: none has been read so far.
            stages, weaker = ([s._replace(params={}) for s in part] for part in (stages, weaker))
        cascade = cls(stages, encoder, weaker)
        cascade.keep = keep
        cascade.weights = [folder.weights_hash(path) for path in dirs]
        cascade.guides = [folder.weights_hash(path) for path in guides]
        if keep == "one":
            cascade._params = [functools.partial(_read, path) for path in dirs]
            for path, guide in zip(guides, weaker, strict=True):
                index = request.guided_stage(guide.config, cascade.configs)
                cascade._guides[index] = functools.partial(_read, path), guide.config
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
        negative_prompts: Sequence[str] | None = None,
        text_emb: Float[np.ndarray, "n l d"] | None = None,
        text_mask: Bool[np.ndarray, "n l"] | None = None,
        lowres: UInt8[np.ndarray, "n low low 3"] | None = None,
        edit: Edit | None = None,
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
          negative_prompts: N texts to lead away from where guidance is on; None: from no text.
          text_emb: embeddings to use instead of the prompts', zero at padding.
          text_mask: True at their real tokens.
          lowres: where the first stage is a super-resolution stage: the N pictures it enlarges.
          edit: N pictures to start from, and which part of them to keep.
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
        request.check_sizes(batch_size=batch_size, report_every=report_every)
        request.check_text(prompts, count, text_emb, text_mask, configs[0])
        request.check_negative(negative_prompts, count, text_emb, configs[0])
        request.check_images(count, lowres, edit, configs)
        identities = request.identities(count, seed, prompt_indices, sample_indices)
        if text_emb is None or text_mask is None:
            text_emb, text_mask = self.embed(prompts)

        negative = None if negative_prompts is None else self.embed(negative_prompts)
        keys = image_keys(*identities.tolist())
        asked = Asked(text_emb, text_mask, keys, negative=negative, edit=edit)
        if lowres is not None:
            asked = asked._replace(lowres=images.to_float(lowres))
        elif edit and configs[0].data.lowres_size:
            pictures, _ = editing.sized(edit, configs[0].data.lowres_size)
            asked = asked._replace(lowres=pictures)
        # Networks round a little otherwise at each place of a batch; in an order of their own the
        # same pictures come in the same batches, in whatever order they are asked for.
        order = np.lexsort(identities[::-1])
        asked, drawn = asked.rows(order), []
        keys = asked.keys
        for index, config in enumerate(configs):
            own = asked._replace(keys=stage_sampler.stage_keys(keys, index))
            guide = self._guides[index]
            report = on_progress and functools.partial(_report, on_progress, configs, index, order)
            pictures = batches.draw(
                self._params[index](),
                config,
                own,
                batch_size=batch_size,
                guide=guide and (guide[0](), guide[1]),
                report=report,
                report_every=report_every,
            )
            asked = asked._replace(lowres=pictures)
            drawn.append(images.to_uint8(pictures)[np.argsort(order)])
        return [*drawn[:-1], editing.keep(edit, drawn[-1])] if edit else drawn


def _held(params: Any) -> Callable[[], Any]:
    placed = partitioning.replicate(params)
    return lambda: placed


def _read(path: str) -> Any:
    return partitioning.replicate(load_stage(path).params)


def _report(
    on_progress: Callable[[Progress], None],
    configs: Sequence[Config],
    index: int,
    order: Int[np.ndarray, " n"],
    rows: tuple[int, int],
    step: int,
    steps: int,
    x0: Array,
) -> None:
    drawing_now = order[slice(*rows)]
    on_progress(Progress(configs[index].name, index, len(configs), step, steps, drawing_now, x0))


def _check_encoder(configs: Sequence[Config], encoder: TextEncoder, path: str) -> None:
    """Raises ConfigError when a stage learned from the embeddings of another encoder."""
    given = overrides.fingerprint(encoder.fingerprint())
    for config in configs:
        learned = config.text.fingerprint
        if learned and learned != given:
            raise ConfigError(
                f"--stages: stage {config.name!r} was trained with text encoder {learned}, "
                f"{path} is {given}; give the right one by --text_encoder=DIR"
            )
