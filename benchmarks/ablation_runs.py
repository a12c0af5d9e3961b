"""Trainings of the ablations: stage folders of the shapes cascade, made by the verbs of `imagen`.

All trainings of a stage are equally long (`STEPS`, shortened: the demo takes 6,500 and 6,000) and
are named by what they differ in. A stage folder that is there is not trained again, and a training
that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

STEPS = {"base": 1_500, "sr": 1_000}
# What `pretrain_text` learns from the same paraphrases. Without a layer a T5 is a table of words:
# the caption is a bag of them, since the picture model does not see their order.
ENCODERS: dict[str, dict[str, int]] = {
    "none": {"num_layers": 0},
    "tiny": {"num_layers": 1, "emb_dim": 32, "num_heads": 4, "mlp_dim": 64},
    "small": {},  # The demo's: 3 layers of width 128.
    "larger": {"num_layers": 6, "emb_dim": 192, "num_heads": 16, "mlp_dim": 384},
    "oracle": {},
}


class Training(NamedTuple):
    """A training of one stage.

    Attributes:
      stage: "base" or "sr".
      encoder: row of ENCODERS.
      seed: of initialisation, order and noise.
      augmented: SR: with noise conditioning augmentation or without.
    """

    stage: str
    encoder: str
    seed: int
    augmented: bool = True

    @property
    def name(self) -> str:
        """Of its folders, but for its length."""
        off = "" if self.augmented else "_not_augmented"
        return f"{self.stage}_{self.encoder}{off}_{self.seed}"


class Runs:
    """The folder in which everything is trained."""

    def __init__(self, out: str, data: str, steps: Mapping[str, int] = STEPS):
        """Trains below `out`.

        Args:
          out: folder to write.
          data: the shapes world that `imagen prepare` made.
          steps: of every training, by stage.
        """
        self.out, self.data, self.steps = pathlib.Path(out), data, dict(steps)

    def stage(self, training: Training) -> str:
        """The stage folder of a training, which is carried out where it is missing."""
        name = f"{training.name}_{self.steps[training.stage]}"
        folder = self.out / "stages" / name
        if not (folder / "params.safetensors").is_file():
            self._embed(training.encoder)
            workdir = f"--workdir={self.out / 'trainings' / name}"
            length = f"--config.train.steps={self.steps[training.stage]}"
            off = [] if training.augmented else ["--config.diffusion.aug_level_max=0.0"]
            self._imagen("train", training, workdir, length, "--config.checkpoint.every=500", *off)
            self._imagen("export", None, workdir, f"--out={folder}")
        return str(folder)

    def _embed(self, encoder: str) -> None:
        """The encoder of this name and its embeddings."""
        training = Training("base", encoder, 0)
        if encoder != "oracle" and not (self.out / "text" / encoder / "config.json").is_file():
            sizes = [f"--config.pretrain_text.{k}={v}" for k, v in ENCODERS[encoder].items()]
            where = f"--out={self.out / 'text' / encoder}"
            self._imagen("pretrain_text", training, where, *sizes)
        if not (self.out / "embeddings" / encoder / "manifest.json").is_file():
            self._imagen("embed", training)

    def _imagen(self, verb: str, training: Training | None, *flags: str) -> None:
        command = [sys.executable, "-m", "imagen_jax", verb]
        if training is not None:
            oracle = training.encoder == "oracle"
            text = "" if oracle else self.out / "text" / training.encoder
            command += [
                f"--config=configs/shapes.py:{training.stage}",
                "--config.mesh.cpu_devices=1",
                f"--config.seed={training.seed}",
                f"--config.data.path={self.data}",
                f"--config.data.embeddings={self.out / 'embeddings' / training.encoder}",
                f"--config.pretrain_text.corpus={self.data}/paraphrases.jsonl",
                f"--config.text.path={text}",
                f"--config.text.encoder={'shapes_oracle' if oracle else 't5'}",
            ]
        print("$", " ".join([*command, *flags]), flush=True)
        subprocess.run([*command, *flags], check=True)
