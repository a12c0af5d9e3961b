"""The section `distill` of the schema: a student that samples like a teacher, in fewer steps."""

from __future__ import annotations

import dataclasses

from imagen_jax.config.fields import ConfigError, doc, section
from imagen_jax.config.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation of guidance (`steps` None), then of sampling steps."""

    teacher: str = doc(
        "",
        "Stage folder of the teacher, from whose parameters the student starts; '': the stage "
        "learns from images.",
        learns=False,  # The fingerprint covers it.
    )
    steps: int | None = doc(
        None,
        "Sampling steps of the student: each learns two DDIM steps of the teacher "
        "(arXiv:2202.00512). None: each evaluation learns one guided evaluation of the teacher "
        "(arXiv:2210.03142, at one guidance weight).",
    )
    sampling: SamplingConfig = section(
        SamplingConfig, "Set by `train`: the teacher's guidance and thresholding."
    )
    fingerprint: str = doc(
        "",
        "Set by `train`: of the teacher's parameters and configuration; a run resumes with the "
        "same teacher, wherever its folder is.",
        compiled=False,
    )

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"config.distill.steps={self.steps} must be at least 1, or None")
        if self.steps is not None and not self.teacher:
            raise ConfigError(
                f"config.distill.steps={self.steps} needs config.distill.teacher, a stage folder"
            )
