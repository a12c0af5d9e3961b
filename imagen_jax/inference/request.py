"""A request for samples, checked in one place before anything is computed.

`SampleRequest` has everything that a call of `Cascade.sample` depends on. Errors are one line with
field, got, expected and fix, so that a server can return them. (HTTP requests are validated in
`serving.http_request`, which makes a `SampleRequest` of each.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import samplers
from imagen_jax.diffusion.editing import Edit
from imagen_jax.inference import adapters, stage_sampler
from imagen_jax.inference.stage_sampler import Noise
from imagen_jax.io import text
from imagen_jax.stages.classifier import ClassifierConfig
from imagen_jax.stages.conditioning import aug_noise_side
from imagen_jax.stages.denoiser import check_guide
from imagen_jax.stages.folder import StageError
from imagen_jax.stages.names import check_names

MAX_SEED = 2**32 - 1


class RequestError(ValueError):
    """The request cannot be sampled; the message gives field, got, expected and fix."""


@dataclasses.dataclass(frozen=True, eq=False)
class SampleRequest:
    """N images to sample.

    Attributes:
      prompts: N texts; may be left out where text_emb is given.
      seed: of all images, or one for each, 0 to 2**32 - 1.
      prompt_indices: with seed and sample index all that an image's noise depends on; None:
        0, 1, ... N - 1.
      sample_indices: distinguish images of one prompt and seed; None: zeros.
      stage_settings: fields of `SamplingConfig` by stage name.
      negative_prompts: N texts that guidance moves away from; None: the null text.
      classes: N class names by attribute, for the cascade's classifier; None: no classifier guides.
      classifier_scale: of the classifier's gradient (arXiv:2105.05233), at least 0.
      text_emb: [N, L, D] embeddings in place of the prompts', zero at padding.
      text_mask: [N, L], True at their real tokens.
      negative_emb: [N, L, D] embeddings in place of the negative prompts'.
      negative_mask: [N, L], True at their real tokens.
      lowres: where the first stage is a super-resolution stage: the N images that it upsamples,
        uint8, or float32 in [-1, 1].
      noise: by stage name, noise that is given instead of sampled; for parity and debugging.
      edit: N images to start from, and which part of them to keep; None: from noise.
      batch_size: images sampled at a time, rounded up to a multiple of the devices; the last batch
        is padded, so that one shape is compiled.
    """

    prompts: Sequence[str] = ()
    seed: int | Sequence[int] = 0
    prompt_indices: Sequence[int] | None = None
    sample_indices: Sequence[int] | None = None
    stage_settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    negative_prompts: Sequence[str] | None = None
    classes: Sequence[Mapping[str, str]] | None = None
    classifier_scale: float = 1.0
    text_emb: Float[np.ndarray, "n l d"] | None = None
    text_mask: Bool[np.ndarray, "n l"] | None = None
    negative_emb: Float[np.ndarray, "n l d"] | None = None
    negative_mask: Bool[np.ndarray, "n l"] | None = None
    lowres: UInt8[np.ndarray, "n low low 3"] | Float[np.ndarray, "n low low 3"] | None = None
    noise: Mapping[str, Noise] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None
    batch_size: int = 32

    @property
    def count(self) -> int:
        """N."""
        return len(self.prompts) if self.text_emb is None else len(self.text_emb)

    def check(self, configs: Sequence[Config]) -> None:
        """Raises RequestError where the stages of `configs` cannot sample this request.

        Args:
          configs: of the stages, base first, with `stage_settings` applied.
        """
        check_sizes(batch_size=self.batch_size)
        self._check_text(configs[0])
        self._check_negative(configs[0])
        negative = self.negative_emb is not None or any(self.negative_prompts or ())
        check_guided(configs, negative=negative)
        self._check_classes()
        self._check_images(configs)
        self._check_noise(configs)
        self.identities()

    def _check_text(self, config: Config) -> None:
        """Raises RequestError unless prompts or embeddings fit each other and the first stage."""
        prompts, text_emb, text_mask = self.prompts, self.text_emb, self.text_mask
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError(f"prompts={prompts!r} must be a list of texts; try [{prompts!r}]")
        for prompt in (*prompts, *(self.negative_prompts or ())):
            if isinstance(prompt, str) and "surrogate" in (fault := text.fault(prompt)):
                raise RequestError(f"prompts: {ascii(prompt[:80])} is no text: it has {fault}")
        if not self.count:
            raise RequestError("prompts=[] must hold at least one text, or text_emb one row")
        if text_emb is None and text_mask is None:
            return
        if text_emb is None or text_mask is None or text_emb.shape[:2] != text_mask.shape:
            shapes = [None if v is None else v.shape for v in (text_emb, text_mask)]
            raise RequestError(
                f"text_emb, text_mask of shapes {shapes} must be [N, L, D] and [N, L]"
            )
        if text_emb.shape[2] != config.model.text_dim:
            raise RequestError(
                f"text_emb of width {text_emb.shape[2]} must have width {config.model.text_dim}, "
                f"that of stage {config.name!r}; use the text encoder that it was trained with"
            )
        if prompts and len(prompts) != self.count:
            raise RequestError(
                f"prompts are {len(prompts)}, text_emb has {self.count} rows; give as many"
            )

    def _check_negative(self, config: Config) -> None:
        """Raises RequestError unless negative prompts are N texts that fit the embeddings."""
        if (self.negative_emb is None) != (self.negative_mask is None):
            raise RequestError("negative_emb and negative_mask go together; give both")
        if self.negative_emb is not None and self.negative_mask is not None:
            emb, mask = self.text_emb, self.text_mask
            fits = emb is not None and emb.shape == self.negative_emb.shape
            if not fits or mask is None or mask.shape != self.negative_mask.shape:
                raise RequestError(
                    f"negative_emb of shape {self.negative_emb.shape} and its mask must have the "
                    "shapes of text_emb and text_mask"
                )
            if self.negative_prompts is not None:
                raise RequestError("negative_prompts and negative_emb exclude each other")
        if self.negative_prompts is None:
            return
        if isinstance(self.negative_prompts, str) or len(self.negative_prompts) != self.count:
            raise RequestError(
                f"negative_prompts={self.negative_prompts!r} must be a list of {self.count} texts, "
                'one for each image; "" is the empty text'
            )
        length = config.data.max_text_len
        if self.text_emb is not None and self.text_emb.shape[1] != length:
            raise RequestError(
                f"text_emb of {self.text_emb.shape[1]} tokens must have {length}, as negative "
                "prompts have"
            )

    def _check_classes(self) -> None:
        """Raises RequestError unless classes are N mappings and their scale is one."""
        if not 0.0 <= self.classifier_scale < float("inf"):
            raise RequestError(f"classifier_scale={self.classifier_scale} must be at least 0")
        if self.classes is not None and len(self.classes) != self.count:
            raise RequestError(
                f"classes of {len(self.classes)} images must be one mapping for each of "
                f"{self.count} texts, such as {{'colour': 'red'}}"
            )

    def _check_images(self, configs: Sequence[Config]) -> None:
        """Raises RequestError when given images are missing, unused or of another size."""
        lowres_size, first = configs[0].data.lowres_size, configs[0].name
        if lowres_size and self.lowres is None and self.edit is None:
            raise RequestError(
                f"stage {first!r} takes a {lowres_size} px image; give lowres, or put the base "
                "stage first"
            )
        if self.lowres is not None and not lowres_size:
            raise RequestError(
                f"lowres: stage {first!r} is a base stage and takes no image; load the "
                "super-resolution stages alone"
            )
        size = configs[-1].data.image_size
        for name, array, side in (
            ("lowres", self.lowres, lowres_size),
            ("edit.images", self.edit and self.edit.images, size),
        ):
            if array is not None and array.shape != (self.count, side, side, 3):
                raise RequestError(
                    f"{name} of shape {array.shape} must be {(self.count, side, side, 3)}, an "
                    "image for each text; see images.center_crop_resize"
                )

    def _check_noise(self, configs: Sequence[Config]) -> None:
        """Raises RequestError where given noise is of no stage or of another shape."""
        stages = {config.name: config for config in configs}
        if self.noise and self.edit is not None:
            raise RequestError("noise and edit exclude each other; leave either out")
        for name, noise in self.noise.items():
            if name not in stages:
                raise RequestError(unknown_name("noise: stage", name, list(stages)))
            config = stages[name]
            image = (config.data.image_size, config.data.image_size, 3)
            side = aug_noise_side(config)
            count = stage_sampler.noise_levels(config).count
            # Heun's method adds noise before it evaluates the network, also in the last step.
            counts = (count,) if config.sampling.sampler == "heun" else (count - 1, count)
            for field, array, shapes in (
                ("start", noise.start, [(self.count, *image)]),
                ("steps", noise.steps, [(self.count, n, *image) for n in counts]),
                ("lowres", noise.lowres, [(self.count, side, side, 3)]),
            ):
                if array is not None and np.shape(array) not in shapes:
                    raise RequestError(
                        f"noise[{name!r}].{field} of shape {np.shape(array)} must be "
                        + " or ".join(map(str, shapes))
                    )
            if noise.steps is not None and not samplers.takes_noise(config.sampling):
                raise RequestError(
                    f"noise[{name!r}].steps has no effect with sampler="
                    f"{config.sampling.sampler!r}; leave it out"
                )
            if noise.lowres is not None and not config.model.lowres:
                raise RequestError(f"noise[{name!r}].lowres: a base stage takes none")

    def identities(self) -> Int[np.ndarray, "three n"]:
        """Seed, prompt index and sample index of each image. Raises RequestError."""
        count, seed = self.count, self.seed
        prompts, samples = self.prompt_indices, self.sample_indices
        fields = {
            "seed": [seed] * count if isinstance(seed, int) else list(seed),
            "prompt_indices": list(range(count) if prompts is None else prompts),
            "sample_indices": [0] * count if samples is None else list(samples),
        }
        for name, values in fields.items():
            if len(values) != count:
                raise RequestError(
                    f"{name} has {len(values)} values, not one for each of {count} images"
                )
            for value in values:
                if not 0 <= value <= MAX_SEED or int(value) != value:
                    raise RequestError(
                        f"{name}={value} must be a whole number from 0 to {MAX_SEED}"
                    )
        return np.array(list(fields.values()), np.int64).reshape(3, count)


def with_settings(
    configs: Sequence[Config],
    settings: Mapping[str, Mapping[str, Any]],
    where: str = "stage_settings",
) -> list[Config]:
    """Configurations with sampling fields replaced.

    Args:
      configs: of stages.
      settings: fields of `SamplingConfig` by stage name.
      where: the name of `settings` in messages.

    Raises:
      ConfigError: no such stage or field, or an invalid value.
    """
    names = [config.name for config in configs]
    for name in settings:
        if name not in names:
            raise ConfigError(unknown_name(f"{where}: stage", name, names))
    changed = []
    for config in configs:
        sampling = config.sampling
        if own := settings.get(config.name):
            values = dataclasses.asdict(sampling) | dict(own)
            sampling = overrides.from_dict(SamplingConfig, values, f"{where}: {config.name}")
        adapters.weights(sampling.loras, config.sampling.loras, f"{where}: {config.name}.loras")
        highest = config.diffusion.aug_level_max
        if not 0.0 <= sampling.aug_level <= highest:
            raise ConfigError(
                f"{where}: {config.name}.aug_level={sampling.aug_level} must be from 0 to "
                f"{highest}, the stage's config.diffusion.aug_level_max in training"
            )
        # A new configuration would be checked again.
        changed.append(dataclasses.replace(config, sampling=sampling) if own else config)
        check_names(changed[-1], where)
    return changed


def check_guided(
    configs: Sequence[Config], *, negative: bool = False, guides: Sequence[Config] = ()
) -> None:
    """Checks that what only guidance uses has an effect.

    Args:
      configs: of the stages, with the settings of the request.
      negative: whether there is a negative prompt.
      guides: configurations of guiding checkpoints.

    Raises:
      RequestError: guidance is off in every stage (negative prompt), or in a guide's stage.
    """
    guided = [config.sampling.guided for config in configs]
    weights = ", ".join(f"{c.name} {c.sampling.guidance_weight:g}" for c in configs)
    if negative and not any(guided):
        raise RequestError(
            f"a negative prompt has no effect without guidance (guidance_weight: {weights}); set a "
            "guidance_weight other than 1 in stage_settings, or leave the negative prompt out"
        )
    for guide in guides:
        if not guided[guided_stage(guide, configs)]:
            raise RequestError(
                f"guide {guide.name!r} has no effect without guidance (guidance_weight: {weights});"
                " set a guidance_weight other than 1 in stage_settings, or leave the guide out"
            )


def check_sizes(**sizes: int) -> None:
    """Raises RequestError unless all are at least 1."""
    for name, value in sizes.items():
        if value < 1:
            raise RequestError(f"{name}={value} must be at least 1")


def guided_stage(guide: Config, configs: Sequence[Config]) -> int:
    """Index of the stage with the image size of `guide`. Raises StageError."""
    for index, config in enumerate(configs):
        if config.data.image_size == guide.data.image_size:
            check_guide(config, guide)
            return index
    raise StageError(
        f"guide {guide.name!r} has image_size {guide.data.image_size}, which no stage has; give "
        "an earlier or smaller checkpoint of one of the stages"
    )


def check_classifier(classifier: ClassifierConfig, configs: Sequence[Config]) -> None:
    """Raises StageError unless a stage has the image size of the classifier."""
    sizes = [config.data.image_size for config in configs]
    if classifier.image_size not in sizes:
        raise StageError(
            f"classifier: image_size {classifier.image_size} is that of no stage ({sizes}); train "
            "one on images of a stage's size"
        )
