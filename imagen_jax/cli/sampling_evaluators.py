"""Evaluators that sample images in training: a grid of held-out captions, and a scorer's rates."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.evaluation import scorers
from imagen_jax.inference import prompts
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import atomic, copies, images
from imagen_jax.parallel import distributed, partitioning
from imagen_jax.stages.conditioning import Text
from imagen_jax.text.encoders import embed_prompts, load_text_encoder
from imagen_jax.training.batch_streams import Batches, Encode, closing_stream
from imagen_jax.training.evaluations import Evaluation, Proceed
from imagen_jax.training.preview import sampled_grid

# Folder of the images that a scorer reads, of the last evaluation.
FOLDER = "scored_samples"


class HeldOutSamples:
    """The image `held_out_samples`: held-out images above samples of their captions."""

    metrics: Mapping[str, Literal["lower", "higher"]] = {}

    def __init__(self, config: Config, held_out: Batches, encode: Encode):
        """Args: as those of `ValidationLoss`."""
        self._config, self._held_out, self._encode = config, held_out, encode

    def __call__(self, params: Any, step: int, name: str, proceed: Proceed) -> Evaluation:
        """See `evaluations.Evaluator`."""
        del step, name
        proceed()
        mesh = partitioning.make_mesh(self._config.mesh)
        with closing_stream(iter(self._held_out(0))) as stream:
            batch = partitioning.place_batch(next(stream), mesh, self._config.data.batch_size)
        grid = sampled_grid(self._config, [params], self._encode(batch))
        return Evaluation({}, {"held_out_samples": grid})


class ScoredSamples:
    """Rates of `evaluate.scorer` on samples of `evaluate.prompts`, KIND/ATTRIBUTE and `exact`.

    A super-resolution stage gets the scorer's real images at its low resolution. The images of the
    last evaluation stay in WORKDIR/scored_samples.
    """

    metrics: Mapping[str, Literal["lower", "higher"]] = {"exact": "higher"}

    def __init__(self, config: Config, workdir: str):
        """Reads and embeds the prompts. Raises ConfigError: no scorer, or it cannot score one."""
        settings = config.evaluate
        for field in ("prompts", "scorer"):
            if not getattr(settings, field):
                raise ConfigError(f"config.evaluate.{field}='' must be set for the row scorer")
        self._config = dataclasses.replace(config, data=config.data.uncropped())
        self._folder = pathlib.Path(workdir) / FOLDER
        self._scorer = scorers.find(settings.scorer)
        self._rows = prompts.read(copies.local(settings.prompts))[: settings.examples]
        for number, row in enumerate(self._rows, 1):
            if not self._scorer.can_score(row):
                raise ConfigError(
                    f"config.evaluate.scorer={settings.scorer!r} cannot score row {number} of "
                    f"config.evaluate.prompts={settings.prompts!r} ({row['prompt']!r})"
                )
        self._text = Text(
            *embed_prompts(
                load_text_encoder(config.text),
                [row["prompt"] for row in self._rows],
                batch_size=8,
                max_len=config.data.max_text_len,
            )
        )

    def __call__(self, params: Any, step: int, name: str, proceed: Proceed) -> Evaluation:
        """See `evaluations.Evaluator`."""
        sampled = np.concatenate([*self._sample(params, proceed)])[: len(self._rows)]
        scalars: dict[str, float] = {}
        if distributed.is_first():
            scalars = self._score(sampled, self._folder / name)
        return Evaluation(json.loads(distributed.share(json.dumps(scalars))[0]))

    def _sample(self, params: Any, proceed: Proceed) -> Any:
        """uint8 images of all rows, batch by batch; the last batch is padded."""
        size, count = self._config.data.batch_size, len(self._rows)
        for start in range(0, count, size):
            proceed()
            indices = np.minimum(np.arange(start, start + size), count - 1)
            keys = image_keys(self._config.seed, indices.tolist(), [0] * size)
            text = Text(*(jax.numpy.asarray(part[indices]) for part in self._text))
            low = self._lowres(indices) if self._config.data.lowres_size else None
            sampled = sample_stage(params, self._config, text, keys, low)
            yield images.to_uint8(partitioning.fetch(sampled))

    def _lowres(self, indices: np.ndarray) -> np.ndarray:
        side = self._config.data.lowres_size
        real = [
            self._scorer.real_image(self._rows[i], index=int(i), size=side)
            for i in indices.tolist()
        ]
        return images.to_float(np.stack(real))

    def _score(self, sampled: np.ndarray, folder: pathlib.Path) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, (row, image) in enumerate(zip(self._rows, sampled, strict=True)):
            file = f"{index:05d}_00.png"
            images.save_png(folder / file, image, {"prompt": row["prompt"]})
            lines.append({**row, "file": file, "prompt_index": index, "sample_index": 0})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        atomic.write_text(folder / "samples.jsonl", text)
        rates = self._scorer.score_folder(folder)
        whole = rates["all"] if "all" in rates else next(iter(rates.values()))
        found = {
            f"{kind}/{attribute}": rate["mean"]
            for kind, by_attribute in rates.items()
            for attribute, rate in by_attribute.items()
        }
        return {"exact": whole["exact"]["mean"], **found}
