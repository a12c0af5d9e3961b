"""Trainings of the ablations: stage folders of the shapes cascade, made with the verbs of `imagen`.

All trainings of a stage have the same length (`STEPS`, a fraction of the demo's). A training is
named by its settings, so ablations share trainings. The parent folder is named by a hash of
configs/shapes.py and the corpus. An existing stage folder is not trained again; a killed training
resumes from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from imagen_jax.config import overrides
from imagen_jax.parallel import topology
from imagen_jax.planning import plan
from imagen_jax.stages.folder import config_hash, load_stage
from imagen_jax.text.encoders import load_text_encoder

STEPS = {"text": 1_200, "base": 3_000, "sr": 600}
# Sizes of the T5, trained on the demo's paraphrases. Without layers it is a table of words: the
# caption becomes a bag of words, because the diffusion model does not see their order.
ENCODERS: dict[str, dict[str, int]] = {
    "none": {"num_layers": 0},
    "small": {},  # The demo's: 3 layers of width 128.
    "larger": {"num_layers": 6},
    "contrastive": {},  # The small one, trained on image-caption pairs: contrastive_text.py.
}
# Encoders that are not trained here: fields of the configuration.
GIVEN_ENCODERS: dict[str, dict[str, Any]] = {
    "minilm": {"text.encoder": "bert", "text.path": "minilm", "text.max_len": 24},
    "oracle": {"text.encoder": "shapes_oracle", "text.path": ""},
}
# Fields of a stage's network or training that differ from the demo's.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "augmented": {"diffusion.aug_level_max": 0.2},
    "not_augmented": {"diffusion.aug_level_max": 0.0},
    "half": {"model.channels": (24, 32)},
    "double": {"model.channels": (96, 128)},
    "concat": {"model.text_conditioning": "concat"},
    "pooled": {"model.text_conditioning": "none"},
    "mean": {"model.text_conditioning": "none", "model.text_pooling": "mean"},
    "unnormed": {"model.text_norm": "none"},
    "plain": {"model.name": "unet"},
    # 773,348 parameters, the Efficient U-Net of the demo 772,364; 0.757 GFLOP an image, it 0.788.
    "plain_parameters": {"model.name": "unet", "model.channels": (24, 48, 32)},
    "plain_flops": {"model.name": "unet", "model.channels": (24, 40, 32)},
    "v": {"diffusion.prediction": "v"},
    "third": {},
}
# Variants trained for a part of the steps.
SHARES = {"third": 1 / 3}


class Training(NamedTuple):
    """A training of one stage.

    Attributes:
      stage: "base" or "sr".
      encoder: row of ENCODERS or GIVEN_ENCODERS.
      variant: row of VARIANTS.
      seed: seed of initialisation, data order and noise.
    """

    stage: str
    encoder: str = "small"
    variant: str = ""
    seed: int = 0


class Runs:
    """The folder of all trainings."""

    def __init__(self, out: str, data: str, steps: Mapping[str, int] = STEPS):
        """Computes the folder of the trainings below `out`.

        Args:
          out: folder to write.
          data: the shapes world, as written by `imagen prepare`.
          steps: number of steps for "text" and for each stage.
        """
        self.data, self.steps = pathlib.Path(data), dict(steps)
        recipe = hashlib.sha256((self.data / "paraphrases.jsonl").read_bytes())
        for stage in ("base", "sr"):
            recipe.update(config_hash(overrides.load(f"configs/shapes.py:{stage}")).encode())
        self.folder = pathlib.Path(out) / recipe.hexdigest()[:8]
        self.compiled = self.folder / "compiled"  # All seeds of an arm share one program.

    def name(self, training: Training) -> str:
        """Name of the folders of a training."""
        parts = [training.stage, training.encoder, training.variant, training.seed]
        lengths = [self.steps["text"], self.steps[training.stage]]
        return "_".join(str(part) for part in [*parts, *lengths] if part != "")

    def stage(self, training: Training) -> str:
        """The stage folder of a training; trains it if it is missing."""
        name = self.name(training)
        folder = self.folder / "stages" / name
        if not (folder / "params.safetensors").is_file():
            self._embed(training.encoder)
            workdir = f"--workdir={self.folder / 'trainings' / name}"
            self._imagen("train", training, workdir, "--config.checkpoint.every=500")
            self._imagen("export", None, workdir, f"--out={folder}")
        return str(folder)

    def cost(self, training: Training) -> dict[str, float]:
        """Cost of a training: parameters, median steps/s, and MiB of the compiled step."""
        name, config = self.name(training), load_stage(self.stage(training)).config
        # All seeds of an arm have one program.
        file = self.folder / "plans" / f"{self.name(training._replace(seed=0))}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            width = f"--config.model.text_dim={config.model.text_dim}"
            self._imagen("plan", training, "--topology=here", f"--json={file}", width)
        planned = json.loads(file.read_text())
        return {
            "parameters": planned["params"],
            "steps_per_second": self._speed(name)[1] / config.data.batch_size,
            "mebibytes": planned["hbm_per_chip"]["peak"] / 2**20,
        }

    def minutes(self, training: Training) -> float:
        """Minutes of a core that a training took: its images at their median speed."""
        config = load_stage(self.stage(training)).config
        steps, speed = self._speed(self.name(training))
        return steps * config.data.batch_size / speed / 60

    def _speed(self, name: str) -> tuple[int, float]:
        """Steps of a training, and the median of images/s over its log lines."""
        lines = (self.folder / "trainings" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return rows[-1]["step"], statistics.median(row["images_per_second"] for row in rows)

    def gigaflops(self, training: Training) -> dict[str, float]:
        """GFLOP of a training image: of the network, and of its caption's encoder."""
        config = load_stage(self.stage(training)).config
        step = plan.train_program(config, topology.this_machine())
        caption = load_text_encoder(config.text).flops(config.data.max_text_len)
        return {"network": step.flops / config.data.batch_size / 1e9, "caption": caption / 1e9}

    def text(self, encoder: str) -> pathlib.Path:
        """The folder of a text encoder."""
        return self.folder / "text" / f"{encoder}_{self.steps['text']}"

    def embeddings(self, encoder: str) -> pathlib.Path:
        """The folder of the embeddings of all captions."""
        return self.folder / "embeddings" / f"{encoder}_{self.steps['text']}"

    def _embed(self, encoder: str) -> None:
        """Trains the text encoder of this name and computes its embeddings, if missing."""
        training = Training("base", encoder)
        given = encoder in GIVEN_ENCODERS
        if not given and not (self.text(encoder) / "config.json").is_file():
            sizes = {"steps": self.steps["text"], **ENCODERS[encoder]}
            flags = [f"--config.pretrain_text.{k}={v}" for k, v in sizes.items()]
            verb = "contrastive_text" if encoder == "contrastive" else "pretrain_text"
            self._imagen(verb, training, f"--out={self.text(encoder)}", *flags)
        if not (self.embeddings(encoder) / "manifest.json").is_file():
            self._imagen("embed", training)

    def _imagen(self, verb: str, training: Training | None, *flags: str) -> None:
        """Runs a verb of `imagen`, or the script of that name in this folder."""
        script = pathlib.Path(__file__).parent / f"{verb}.py"
        program = [str(script)] if script.is_file() else ["-m", "imagen_jax", verb]
        command = [sys.executable, *program]
        if training is not None:
            command += self._flags(training)
        print("$", " ".join([*command, *flags]), flush=True)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(self.compiled)}
        subprocess.run([*command, *flags], check=True, env=environment)

    def _flags(self, training: Training) -> list[str]:
        fields = {
            "mesh.cpu_devices": 1,
            "seed": training.seed,
            "train.steps": round(self.steps[training.stage] * SHARES.get(training.variant, 1)),
            "data.path": self.data,
            "data.embeddings": self.embeddings(training.encoder),
            "pretrain_text.corpus": self.data / "paraphrases.jsonl",
            "text.path": self.text(training.encoder),
            "text.encoder": "t5",
            **GIVEN_ENCODERS.get(training.encoder, {}),
            **VARIANTS[training.variant],
        }
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        return [f"--config=configs/shapes.py:{training.stage}", *flags]
