"""The section `lora` of the schema: low-rank updates of a stage's kernels."""

from __future__ import annotations

import dataclasses

from imagen_jax.config.fields import ConfigError, doc


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A LoRA: kernels W + alpha / rank * A B, of which A and B alone are trained."""

    rank: int = doc(0, "Rank of the updates; 0: no LoRA, all parameters are trained.")
    alpha: float | None = doc(None, "Scale of the updates times the rank; None: the rank.")
    targets: tuple[str, ...] = doc(
        ("*attention*",),
        "Kernels with an update, by patterns of their paths; ('*',): all of them.",
    )

    def __post_init__(self) -> None:
        if self.rank and not self.targets:
            raise ConfigError(
                "config.lora.targets=() leaves nothing to train; try ('*attention*',)"
            )

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without a LoRA."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank
