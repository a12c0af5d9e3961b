"""The library: a chain of trained stages with its text encoder, from prompts to images.

    cascade = Cascade.load(["stages/base", "stages/sr"])
    images = cascade.sample(["a red circle"], seed=1)  # uint8 [1, 64, 64, 3]

The base stage starts from noise. Each following stage upsamples the image before it, noises it to
its fixed aug_level and samples the larger image (Imagen, Sec. 2.4 and Fig. A.4). An image's noise
is a function of (seed, prompt index, sample index) alone, whatever else is in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import editing
from imagen_jax.inference import adapters, class_guidance
from imagen_jax.inference.adapters import LoraSpec
from imagen_jax.inference.batches import StageInputs, StepReport, sample_batches
from imagen_jax.inference.request import (
    RequestError,
    SampleRequest,
    check_classifier,
    check_guided,
    check_sizes,
    guided_stage,
    with_settings,
)
from imagen_jax.inference.stage_params import Networks, StageParams
from imagen_jax.inference.stage_sampler import Noise, image_keys, stage_keys
from imagen_jax.io import images
from imagen_jax.stages.classifier import TrainedClassifier, classifier_hash, load_classifier
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import StageError, check_chain, config_hash, load_stage, weights_hash
from imagen_jax.stages.names import check_names
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import TextEncoder, embed_prompts, load_text_encoder

# Prompts per forward pass of the text encoder. It is independent of `batch_size`, so neither the
# embeddings nor the compiled program depend on the batch of images.
TEXT_BATCH = 8


class Progress(NamedTuple):
    """Progress of a call of `Cascade.sample`.

    Attributes:
      stage: name of the stage that is sampling.
      stage_index: its position in the chain.
      stages: number of stages.
      step: its steps that are done.
      steps: its steps in all.
      rows: indices of the request's images that are being sampled.
      x0: estimate of these images by the last step, in [-1, 1], on the device, followed by rows of
        padding.
    """

    stage: str
    stage_index: int
    stages: int
    step: int
    steps: int
    rows: Int[np.ndarray, " b"]
    x0: Array


class Cascade:
    """Trained stages, base first, with the text encoder that they were trained with.

    Attributes:
      configs: of the stages; `sampling` holds the defaults of a request.
      encoder: the text encoder; None: requests give embeddings.
      weight_hashes: a short hash of each stage's parameter file and LoRAs; "" where there is none.
      guide_hashes: the same of the guiding checkpoints.
      classifier: what `classes` of a request refer to; None: there is none.
      classifier_hash: as weight_hashes; "" without one.
      keep: "all" networks stay on the devices, or "one" at a time.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        encoder: TextEncoder | None = None,
        guides: Sequence[Stage] = (),
        classifier: TrainedClassifier | None = None,
    ):
        """Chains stages whose parameters are in memory.

        Args:
          stages: base first.
          encoder: the text encoder; None: requests give embeddings.
          guides: weaker checkpoints of some of the stages, to guide them (autoguidance).
          classifier: guides the stage of its image size to `classes` of a request.

        Raises:
          StageError: the stages do not follow from each other, or a guide has another image size
            than every stage.
        """
        self.configs = adapters.with_loras([stage.config for stage in stages], ())
        self.encoder = encoder
        self.weight_hashes = [""] * len(self.configs)
        self.guide_hashes = [""] * len(guides)
        self.classifier, self.classifier_hash = classifier, ""
        for config in self.configs:
            check_names(config, f"stage {config.name!r}: config")
        check_chain(self.configs, stages[0].config.data.lowres_size if stages else 0)
        if classifier is not None:
            check_classifier(classifier.config, self.configs)
        self._guides: list[StageParams | None] = [None] * len(stages)
        for guide in guides:
            self._guides[guided_stage(guide.config, self.configs)] = StageParams(guide)
        self._set_networks([StageParams(stage) for stage in stages], "auto")

    @classmethod
    def load(
        cls,
        dirs: Sequence[str],
        *,
        text_encoder: str | None = "",
        guides: Sequence[str] = (),
        classifier: str = "",
        keep: Literal["auto", "all", "one"] = "auto",
        loras: Sequence[LoraSpec] = (),
    ) -> Cascade:
        """Loads stage folders, base first; or super-resolution stages alone, for given images.

        Args:
          dirs: stage folders as `export` writes them.
          text_encoder: folder of the text encoder; "": the one that the first stage names; None:
            no encoder is loaded, and requests give embeddings.
          guides: stage folders of weaker checkpoints, each to guide the stage of the same image
            size (autoguidance, arXiv:2406.02507).
          classifier: folder of a noise-aware classifier of the image size of one of the stages
            (classifier guidance, arXiv:2105.05233); "": none.
          keep: "all" networks stay on the devices, or "one" at a time, read again for each call;
            "auto": all where their parameters have room.
          loras: added to the parameters of the stages with their weights.

        Raises:
          StageError: a folder is no stage, or they do not follow from each other.
          WeightsError: a LoRA cannot be read, or is of another network.
          ConfigError: the text encoder is missing, or is not the one that a stage was trained with.
        """
        if isinstance(dirs, str) or not dirs:
            raise StageError(f"dirs={dirs!r} must be a list of stage folders, base first")
        if keep not in ("auto", "all", "one"):
            raise RequestError(unknown_name("keep", keep, ["auto", "all", "one"]))
        stages, weaker = ([load_stage(path) for path in paths] for paths in (dirs, guides))
        configs = [stage.config for stage in stages]
        check_chain(configs, configs[0].data.lowres_size)
        specs = adapters.of_stages(loras, configs)
        encoder = None
        if text_encoder is not None:
            text = configs[0].text
            text = dataclasses.replace(text, path=text_encoder or text.path)
            encoder = load_text_encoder(text)
        trained = load_classifier(classifier) if classifier else None
        cascade = cls(stages, encoder, weaker, trained)
        tuned = [
            StageParams(stage, adapters.read(own, stage.config))
            for stage, own in zip(stages, specs, strict=True)
        ]
        cascade.configs = adapters.with_loras(configs, loras)
        cascade._set_networks(tuned, keep)
        if encoder is not None:
            _check_encoder(configs, encoder, text_encoder or configs[0].text.path)
        cascade.weight_hashes = [
            weights_hash(path) + adapters.digest(own, config)
            for path, own, config in zip(dirs, specs, configs, strict=True)
        ]
        cascade.guide_hashes = [
            weights_hash(path) + config_hash(stage.config)
            for path, stage in zip(guides, weaker, strict=True)
        ]
        cascade.classifier_hash = classifier_hash(classifier) if classifier else ""
        return cascade

    def _set_networks(self, params: Sequence[StageParams], keep: Literal["auto", "all", "one"]):
        self._params = params
        self._networks = Networks(params, self._guides, self.encoder, keep)
        self.keep = self._networks.keep

    def placed_configs(self, settings: Mapping[str, Mapping[str, Any]]) -> list[Config]:
        """The configurations that a request with these settings samples with.

        Args:
          settings: fields of `SamplingConfig` by stage name.

        Returns:
          Configurations in which dtype and mesh of the stages are decided.
        """
        return self._networks.placed(with_settings(self.configs, settings))

    def embed(
        self, prompts: Sequence[str]
    ) -> tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]:
        """Embeddings and mask of prompts; equal prompts are computed once."""
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

    def sample(
        self, prompts: Sequence[str] | SampleRequest = (), **fields: Any
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """The last stage's images; arguments as those of `sample_stages`."""
        return self.sample_stages(prompts, **fields)[-1]

    def sample_floats(
        self, prompts: Sequence[str] | SampleRequest = (), **fields: Any
    ) -> Float[np.ndarray, "n h w 3"]:
        """As `sample`, but in [-1, 1], before the images are rounded to uint8."""
        return self.sample_stages(prompts, rounded=False, **fields)[-1]

    def sample_stages(
        self,
        prompts: Sequence[str] | SampleRequest = (),
        *,
        on_progress: Callable[[Progress], None] | None = None,
        report_every: int = 1,
        rounded: bool = True,
        **fields: Any,
    ) -> list[Any]:
        """Samples N images through all stages; each stage samples all N before the next one.

        Args:
          prompts: N texts, with further fields of `SampleRequest` by name; or a whole request.
          on_progress: called while the devices work on the next steps.
          report_every: steps between two calls of on_progress, at most; the last step is reported.
          rounded: to uint8; otherwise float32 in [-1, 1].
          **fields: of `SampleRequest`, such as seed, where `prompts` is a list.

        Returns:
          The images of each stage.

        Raises:
          RequestError, ConfigError: the request cannot be sampled; nothing has been computed.
          NotFiniteError: an image is not finite; names stage, image and step.
          OutOfMemoryError: a stage does not fit the devices; names stage, need and remedy.
        """
        if not isinstance(prompts, SampleRequest):
            request = SampleRequest(prompts=prompts, **fields)
        elif not fields:
            request = prompts
        else:
            raise TypeError(f"{', '.join(fields)}: set these fields in the SampleRequest")
        configs = self.placed_configs(request.stage_settings)
        check_sizes(report_every=report_every)
        request.check(configs)
        check_guided(configs, guides=[guide.config for guide in self._guides if guide])
        labels = class_guidance.labels_of(self.classifier, request)
        inputs, order = self._first_inputs(request, configs[0])
        keys, sampled = inputs.keys, []
        given = [request.noise.get(config.name, Noise()) for config in configs]
        noise = jax.tree.map(lambda array: np.asarray(array, np.float32)[order], given)
        for index, config in enumerate(configs):
            guide = self._guides[index]
            classifier = class_guidance.placed(self.classifier, config)
            report = None
            if on_progress:
                report = functools.partial(_report, on_progress, configs, index, order)
            own = inputs._replace(
                keys=stage_keys(keys, index),
                noise=noise[index],
                negative=inputs.negative if _uses_negative(request, config, guide) else None,
            )
            if classifier is not None and labels is not None:
                scale = np.full(len(labels), request.classifier_scale, np.float32)
                own = own._replace(labels=labels[order], classifier_scale=scale)
            with self._networks.using(index):
                lowres = sample_batches(
                    Stage(config, self._params[index].get(config)),
                    own,
                    batch_size=request.batch_size,
                    guide=guide and Stage(_placed_guide(guide, config), guide.get(config)),
                    classifier=classifier,
                    on_steps=report,
                    report_every=report_every,
                    numbers=order,
                    room=self._networks.room(configs, index),
                )
            inputs = inputs._replace(lowres=lowres)
            sampled.append((images.to_uint8(lowres) if rounded else lowres)[np.argsort(order)])
        if request.edit and rounded:
            sampled[-1] = editing.composite(request.edit, sampled[-1])
        return sampled

    def _first_inputs(
        self, request: SampleRequest, config: Config
    ) -> tuple[StageInputs, Int[np.ndarray, " n"]]:
        """Inputs of the first stage, and the order of the request's images in them.

        Rounding depends on an image's position in the batch. Sorted by seed, prompt and sample
        index, the same images are in the same batches, in whatever order they are requested.
        """
        if request.text_emb is None or request.text_mask is None:
            text = Text(*self.embed(request.prompts))
        else:
            text = Text(request.text_emb, request.text_mask)
        lowres_size, lowres = config.data.lowres_size, None
        if request.lowres is not None and request.lowres.dtype == np.uint8:
            lowres = images.to_float(request.lowres)
        elif request.lowres is not None:
            lowres = request.lowres.astype(np.float32)
        elif request.edit and lowres_size:
            lowres, _ = editing.resize_edit(request.edit, lowres_size)
        identities = request.identities()
        inputs = StageInputs(
            text=text,
            keys=image_keys(*identities.tolist()),
            lowres=lowres,
            negative=self._negative(request, text),
            edit=request.edit,
        )
        self._networks.release_encoder()
        order = np.lexsort(identities[::-1])
        return inputs.rows(order), order

    def _negative(self, request: SampleRequest, text: Text) -> Text | None:
        """What guidance moves away from; None: the null text of zeros."""
        if request.negative_emb is not None:
            return Text(request.negative_emb, request.negative_mask)
        prompts = request.negative_prompts
        configs = with_settings(self.configs, request.stage_settings)
        if prompts is None and any(
            _uses_negative(request, config, guide)
            for config, guide in zip(configs, self._guides, strict=True)
        ):
            prompts = [""] * request.count
        if prompts is None:
            return None
        negative = Text(*self.embed(prompts))
        if negative.emb.shape != text.emb.shape:
            raise RequestError(
                f"text_emb of shape {text.emb.shape} must be {negative.emb.shape}, as negative "
                "prompts and the empty caption are; or give negative_emb"
            )
        return negative


def _uses_negative(request: SampleRequest, config: Config, guide: Any) -> bool:
    """Whether a stage gets the negative text of the request, or the empty caption in its place."""
    if request.negative_prompts is not None or request.negative_emb is not None:
        return True
    return config.text.null == "empty" and config.sampling.guided and guide is None


def _placed_guide(guide: StageParams, config: Config) -> Config:
    """The configuration of a guide, in the dtype of the stage that it guides."""
    model = dataclasses.replace(guide.config.model, dtype=config.model.dtype)
    return dataclasses.replace(guide.config, model=model)


def _report(
    on_progress: Callable[[Progress], None],
    configs: Sequence[Config],
    index: int,
    order: Int[np.ndarray, " n"],
    report: StepReport,
) -> None:
    rows = order[slice(*report.rows)]
    name, count = configs[index].name, len(configs)
    on_progress(Progress(name, index, count, report.step, report.steps, rows, report.x0))


def _check_encoder(configs: Sequence[Config], encoder: TextEncoder, path: str) -> None:
    """Raises ConfigError when a stage was trained with the embeddings of another encoder."""
    found = overrides.fingerprint(encoder.fingerprint())
    for config in configs:
        expected = config.text.fingerprint
        if expected and expected != found:
            raise ConfigError(
                f"--stages: stage {config.name!r} was trained with text encoder {expected}, "
                f"{path} is {found}; give the right one by --text_encoder=DIR"
            )
