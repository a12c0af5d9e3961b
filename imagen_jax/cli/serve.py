"""Serves a cascade as a web page and a JSON API; see docs/serving.md.

It listens on loopback by default. Without --token_file everyone who reaches the address can sample.
"""

from __future__ import annotations

import argparse

from imagen_jax.cli import path_flags, wiring
from imagen_jax.config.fields import ConfigError
from imagen_jax.inference.cascade import Cascade
from imagen_jax.serving.http_request import Limits

# flag -> (field of Limits, help)
LIMITS = {
    "batch_size": ("batch", "images sampled at a time"),
    "max_queue": ("queue", "requests that may wait; further ones are answered 429"),
    "max_samples": ("samples", "images of one request"),
    "max_steps": ("steps", "denoising steps of a stage"),
    "keep": ("kept_images", "images kept in --out; older ones are deleted"),
    "patience": ("patience", "seconds after which a job that no client asks about is dropped"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_stages(parser)
    wiring.add_loras(parser)
    path_flags.required(parser, "--out", "folder for the images")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    wiring.add_cpu_devices(parser)
    parser.add_argument(
        "--text_encoder",
        default="",
        type=path_flags.address,
        help="encoder folder, if it has moved",
    )
    for flag, (field, text) in LIMITS.items():
        default = getattr(Limits, field)
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--hosts",
        default="",
        help="further names of the server in the header Host, comma-separated",
    )
    parser.add_argument(
        "--origins", default="", help="addresses of a proxy, https://name, by commas"
    )
    parser.add_argument("--prefix", default="", help="path that a proxy puts before all others")
    path_flags.optional(parser, "--token_file", "file with the token that clients must send")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    wiring.check_least(flags, 1, *LIMITS, "cpu_devices")
    if not 0 <= flags.port < 65536:
        raise ConfigError(f"--port={flags.port} must be from 0 to 65535")
    try:
        from imagen_jax.serving.access import Access, read_token
        from imagen_jax.serving.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise ConfigError(
            "serve needs starlette, uvicorn and prometheus-client; install imagen_jax[serve]"
        ) from None
    access = Access(
        hosts=_names(flags.hosts),
        origins=_names(flags.origins),
        token=read_token(flags.token_file) if flags.token_file else "",
        prefix=flags.prefix,
    )
    wiring.set_up_devices(flags.cpu_devices)
    cascade = Cascade.load(
        flags.stages, text_encoder=flags.text_encoder, loras=wiring.read_loras(flags)
    )
    limits = Limits(**{field: getattr(flags, flag) for flag, (field, _) in LIMITS.items()})
    serve(
        cascade,
        flags.out,
        host=flags.host,
        port=flags.port,
        limits=limits,
        access=access,
        checkpoint=path_flags.recorded(flags.stages),
        log=lambda line: print(line, flush=True),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
