"""What a client may ask for: JSON, checked field by field before anything is queued.

Everything in a body is a stranger's: each message is one line and names field, got and expected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.config.fields import unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.inference.request import MAX_SEED

FIELDS = ("prompt", "negative_prompt", "seed", "samples", "stages")
SETTINGS = ("steps", "guidance_weight")
SHOWN = 60  # characters of a wrong value that a message repeats


class ClientRequestError(ValueError):
    """A request that is refused; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request, and of the server.

    Attributes:
      samples: pictures of a request.
      steps: denoising steps of a stage.
      guidance_weight: largest weight.
      prompt: characters.
      body: bytes of a request.
      queue: requests that wait; more are answered 429.
      batch: pictures in one call of the model.
      pictures: pictures kept in the folder; older ones are deleted.
    """

    samples: int = 8
    steps: int = 256
    guidance_weight: float = 30.0
    prompt: int = 1000
    body: int = 16 * 1024
    queue: int = 64
    batch: int = 8
    pictures: int = 1000


@dataclasses.dataclass(frozen=True)
class Order:
    """A checked request.

    Attributes:
      prompt: what to draw.
      negative_prompt: what to lead away from; "": nothing.
      seed: 0 to MAX_SEED.
      samples: pictures.
      stages: sampling fields by stage, all of SETTINGS for all stages.
    """

    prompt: str
    negative_prompt: str
    seed: int
    samples: int
    stages: Mapping[str, Mapping[str, Any]]


def parse(body: bytes, configs: Sequence[Config], limits: Limits) -> Order:
    """Reads and checks a body.

    Args:
      body: JSON object with `prompt` and, if wanted, the other FIELDS.
      configs: of the stages; what a request does not say is as they have it.
      limits: of one request.

    Raises:
      ClientRequestError: it is not JSON, a field is unknown, or a value cannot be.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ClientRequestError("the body must be JSON, in UTF-8") from None
    if not isinstance(values, dict):
        raise ClientRequestError("the body must be a JSON object")
    _check_names("", values, FIELDS)
    prompt = _text("prompt", values.get("prompt", ""), limits)
    if not prompt:
        raise ClientRequestError("prompt must be a text that is not empty")
    stages = values.get("stages", {})
    if not isinstance(stages, dict):
        raise ClientRequestError(f"stages={_shown(stages)} must be an object, settings by stage")
    _check_names("stages.", stages, [config.name for config in configs])
    seed = values.get("seed")
    return Order(
        prompt=prompt,
        negative_prompt=_text("negative_prompt", values.get("negative_prompt", ""), limits),
        seed=secrets.randbelow(MAX_SEED + 1)
        if seed is None
        else _integer("seed", seed, 0, MAX_SEED),
        samples=_integer("samples", values.get("samples", 1), 1, limits.samples),
        stages={c.name: _settings(c, stages.get(c.name, {}), limits) for c in configs},
    )


def _settings(config: Config, values: Any, limits: Limits) -> dict[str, Any]:
    where = f"stages.{config.name}"
    if not isinstance(values, dict):
        raise ClientRequestError(
            f"{where}={_shown(values)} must be an object with {', '.join(SETTINGS)}"
        )
    _check_names(f"{where}.", values, SETTINGS)
    defaults = config.sampling
    steps = values.get("steps", min(defaults.steps, limits.steps))
    weight = values.get("guidance_weight", min(defaults.guidance_weight, limits.guidance_weight))
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or not 0 <= weight <= limits.guidance_weight:
        raise ClientRequestError(
            f"{where}.guidance_weight={_shown(weight)} must be a number from 0 to "
            f"{limits.guidance_weight:g}"
        )
    steps = _integer(f"{where}.steps", steps, 1, limits.steps)
    return {"steps": steps, "guidance_weight": float(weight)}


def _check_names(where: str, values: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in values:
        if name not in names:
            raise ClientRequestError(unknown_name(f"{where}field", _short(name), names))


def _text(field: str, value: Any, limits: Limits) -> str:
    """A text of one line, its white space collapsed."""
    if not isinstance(value, str):
        raise ClientRequestError(f"{field}={_shown(value)} must be a text")
    if len(value) > limits.prompt:
        raise ClientRequestError(
            f"{field} has {len(value)} characters, at most {limits.prompt} are read"
        )
    text = " ".join(value.split())
    # Control characters are nothing to draw, and half of a surrogate pair is no text.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ClientRequestError(f"{field} has control characters, or half of a surrogate pair")
    return text


def _integer(field: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ClientRequestError(
            f"{field}={_shown(value)} must be a whole number from {low} to {high}"
        )
    return value


def _shown(value: Any) -> str:
    """A value in a message, cut short."""
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return "a huge number"
    return _short(json.dumps(value))


def _short(text: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= SHOWN else printable[:SHOWN] + "..."
