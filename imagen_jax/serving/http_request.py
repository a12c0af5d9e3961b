"""Validation of HTTP requests: headers, size and time of the body, and its JSON, field by field.

Every message is one line with field, got and expected, and repeats at most SHOWN characters of a
wrong value, all printable. Nothing is queued before a request has passed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.inference import adapters
from imagen_jax.inference.request import MAX_SEED

MAX_HEADER_BYTES = 16 * 1024
BODY_SECONDS = 10.0  # time within which the whole body must arrive
DRAIN_FACTOR = 256  # of a body that is too large, this many times the limit is read and discarded
FIELDS = ("prompt", "negative_prompt", "seed", "samples", "stages")
SETTINGS = ("steps", "guidance_weight")
LORAS = "loras"  # A further one of stages with LoRAs.
SHOWN = 60

CLOSE = {"connection": "close"}


class ClientRequestError(ValueError):
    """A request that is refused; the message says why.

    Attributes:
      status: of the HTTP response.
      headers: further headers of the response.
    """

    def __init__(self, message: str, status: int = 400, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request and of the server.

    Attributes:
      samples: images of a request.
      steps: denoising steps of a stage.
      guidance_weight: largest weight.
      prompt: characters.
      body: bytes of a request's body.
      queue: requests that wait; further ones are answered 429.
      batch: images in one call of the model.
      kept_images: images kept in the folder; older ones are deleted.
      patience: seconds after which a job that no client asks about is dropped.
    """

    samples: int = 8
    steps: int = 256
    guidance_weight: float = 30.0
    prompt: int = 1000
    body: int = 16 * 1024
    queue: int = 64
    batch: int = 8
    kept_images: int = 1000
    patience: float = 120.0


@dataclasses.dataclass(frozen=True)
class ClientRequest:
    """A validated request; the field names are those of the JSON API.

    Attributes:
      prompt: text to generate images for.
      negative_prompt: text that guidance moves away from; "": none.
      seed: 0 to MAX_SEED.
      samples: number of images.
      stages: values of all SETTINGS, and of LORAS where there are some, for every stage by name.
    """

    prompt: str
    negative_prompt: str
    seed: int
    samples: int
    stages: Mapping[str, Mapping[str, Any]]


def error_body(message: str) -> bytes:
    """The JSON body of a refusal."""
    return json.dumps({"error": message}, ensure_ascii=False, separators=(",", ":")).encode()


async def read_request(
    headers: Mapping[str, str],
    receive: Callable[[], Awaitable[Mapping[str, Any]]],
    configs: Sequence[Config],
    limits: Limits,
) -> ClientRequest:
    """Reads and validates a request for images.

    Args:
      headers: of the request.
      receive: ASGI callable that returns the next message.
      configs: of the stages.
      limits: of one request.

    Raises:
      ClientRequestError: the content type, the body or a value is refused.
    """
    content_type = headers.get("content-type", "").split(";")[0].strip()
    if content_type != "application/json":
        raise ClientRequestError(
            f"content-type={short(content_type)} must be application/json", 415
        )
    return parse(await _read_body(receive, limits.body), configs, limits)


async def _read_body(receive: Callable[[], Awaitable[Mapping[str, Any]]], limit: int) -> bytes:
    """Returns the body; at most `limit` bytes of it are held in memory at any time."""
    body, size, more = b"", 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            # Excess bytes are drained up to a limit, so that the client can read the response.
            while more and size <= DRAIN_FACTOR * limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientRequestError("the client disconnected", headers=CLOSE)
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                body = body + part if size <= limit else b""
    except TimeoutError:
        raise ClientRequestError(
            f"the body must arrive within {BODY_SECONDS:g} s", 408, CLOSE
        ) from None
    if size > limit:
        raise ClientRequestError(f"the body must have at most {limit} bytes", 413, CLOSE)
    return body


def parse(body: bytes, configs: Sequence[Config], limits: Limits) -> ClientRequest:
    """Parses and validates a body.

    Args:
      body: JSON object with `prompt` and any of the other FIELDS.
      configs: of the stages; their sampling settings are the defaults.
      limits: of one request.

    Raises:
      ClientRequestError: the body is not JSON, a field is unknown, or a value is invalid.
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
        raise ClientRequestError("prompt must be a string that is not empty")
    stages = values.get("stages", {})
    if not isinstance(stages, dict):
        raise ClientRequestError(f"stages={_shown(stages)} must be an object, settings by stage")
    _check_names("stages.", stages, [config.name for config in configs])
    seed = values.get("seed")
    return ClientRequest(
        prompt=prompt,
        negative_prompt=_text("negative_prompt", values.get("negative_prompt", ""), limits),
        seed=secrets.randbelow(MAX_SEED + 1)
        if seed is None
        else _integer("seed", seed, 0, MAX_SEED),
        samples=_integer("samples", values.get("samples", 1), 1, limits.samples),
        stages={c.name: _settings(c, stages.get(c.name, {}), limits) for c in configs},
    )


def _settings(config: Config, values: Any, limits: Limits) -> dict[str, Any]:
    """Values of all SETTINGS of one stage."""
    where = f"stages.{config.name}"
    if not isinstance(values, dict):
        raise ClientRequestError(
            f"{where}={_shown(values)} must be an object with {', '.join(SETTINGS)}"
        )
    defaults = config.sampling
    _check_names(f"{where}.", values, (*SETTINGS, LORAS) if defaults.loras else SETTINGS)
    steps = values.get("steps", min(defaults.steps, limits.steps))
    weight = values.get("guidance_weight", min(defaults.guidance_weight, limits.guidance_weight))
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 <= weight <= limits.guidance_weight:  # NaN and infinity are not.
        raise ClientRequestError(
            f"{where}.guidance_weight={_shown(weight)} must be a number from 0 to "
            f"{limits.guidance_weight:g}"
        )
    steps = _integer(f"{where}.steps", steps, 1, limits.steps)
    settings = {"steps": steps, "guidance_weight": float(weight)}
    if not defaults.loras:
        return settings
    return settings | {LORAS: _loras(f"{where}.{LORAS}", values, defaults.loras)}


def _loras(where: str, values: Mapping[str, Any], loaded: Sequence[str]) -> list[str]:
    """The LoRAs of one stage, NAME@WEIGHT; those that are left out are off."""
    chosen = values.get(LORAS, list(loaded))
    try:
        if not isinstance(chosen, list) or not all(isinstance(text, str) for text in chosen):
            raise ConfigError("no list of texts")
        found = adapters.weights(chosen, loaded, where)
    except ConfigError:
        raise ClientRequestError(
            f"{where}={_shown(chosen)} must be a list of NAME@WEIGHT with the names of "
            f"{', '.join(loaded)}"
        ) from None
    return [f"{name}@{weight}" for name, weight in found.items()]


def _check_names(where: str, values: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in values:
        if name not in names:
            raise ClientRequestError(unknown_name(f"{where}field", short(name), names))


def _text(field: str, value: Any, limits: Limits) -> str:
    """A string, each run of white space replaced by one space."""
    if not isinstance(value, str):
        raise ClientRequestError(f"{field}={_shown(value)} must be a string")
    if len(value) > limits.prompt:
        raise ClientRequestError(
            f"{field} has {len(value)} characters, expected at most {limits.prompt}"
        )
    text = " ".join(value.split())
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ClientRequestError(f"{field} must not have control characters or lone surrogates")
    return text


def _integer(field: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ClientRequestError(f"{field}={_shown(value)} must be an integer from {low} to {high}")
    return value


def _shown(value: Any) -> str:
    """A value as JSON, shortened for a message."""
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return "a huge number"
    return short(json.dumps(value))


def short(text: str) -> str:
    """The text, printable, at most SHOWN characters of it."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= SHOWN else printable[:SHOWN] + "..."
