"""Entry point of `imagen`: finds the verb, parses its flags, runs it, sets the exit status.

A verb is a module of this package with `add_arguments(parser)` and `run(flags)`. Overrides of the
configuration, `--config.a.b=VALUE` or `--config.a.b VALUE`, are split off before the flags.

Exit status: 0 done, 1 rejected or failed (one line on stderr), 2 wrong usage, 75 stopped by a
signal after saving: start the same command again.
"""

from __future__ import annotations

import argparse
import importlib
import io
import keyword
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType

from imagen_jax.cli import staging
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.parallel import xla_flags

GROUPS = {
    "configuration": {
        "config": "print every field of a configuration: value, meaning, default",
        "configs": "list the bundled configurations; copy them and the launch scripts",
    },
    "data and text": {
        "prepare": "build and index a data set; report records that cannot be used",
        "pretrain_text": "train a small T5 encoder and its vocabulary on captions alone",
        "embed": "compute the text embeddings of a data set's captions, once",
    },
    "before a run": {
        "doctor": "check configuration, data and devices",
        "plan": "memory, time and cost of a run on a TPU slice or on this machine",
    },
    "training": {
        "train": "train one stage",
        "dreambooth": "teach a cascade a subject from a few images",
        "diagnose": "contact sheets of trained stages beside real images",
        "replay": "repeat a training step that was not finite",
    },
    "stage folders": {
        "export": "write a training run as a stage folder, or in another library's format",
        "ema": "write a stage folder with an EMA width chosen after training",
        "import": "convert another library's weights to a stage folder",
    },
    "sampling": {
        "sample": "generate images for prompts with a cascade of stage folders",
        "edit": "generate from an image: image-to-image, inpainting, upsampling",
        "serve": "serve a cascade as a web page and a JSON API",
    },
    "evaluation": {
        "evaluate": "score generated images",
    },
}
VERBS = {verb: text for verbs in GROUPS.values() for verb, text in verbs.items()}
PREFIX = "--config."


def _is_for_user(error: Exception) -> bool:
    """Whether the message is written for the user: this package's errors and file errors."""
    return isinstance(error, OSError) or type(error).__module__.startswith("imagen_jax")


def _silence_other_threads() -> None:
    """Hides tracebacks of library threads, whose errors reach the main thread as well."""
    threading.excepthook = lambda _: None
    # Errors of C++ callbacks arrive here; tensorstore raises thousands when one save fails.
    main, default_hook = threading.main_thread(), sys.unraisablehook
    sys.unraisablehook = lambda error: (
        default_hook(error) if threading.current_thread() is main else None
    )
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: record.exc_info is None)


def _help() -> str:
    """The verbs by group, for `imagen --help`."""
    lines = []
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb:15}{text}" for verb, text in verbs.items())]
    return "\n".join(["verbs:", *lines[1:], "", "`imagen VERB --help` lists the flags of a verb."])


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The verb's module and flags; ends the process with status 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="imagen",
        description="Text-to-image cascades in JAX.",
        epilog=_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", help="see below")
    verb = parser.parse_args(arguments[:1]).verb
    if verb not in VERBS:
        parser.error(unknown_name("VERB", verb, list(VERBS)))

    file = f"{verb}_" if keyword.iskeyword(verb) else verb
    module = importlib.import_module(f"imagen_jax.cli.{file}")
    verb_parser = argparse.ArgumentParser(
        prog=f"imagen {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(verb_parser)
    try:
        own, overrides = split_overrides(arguments[1:])
    except ConfigError as error:
        verb_parser.error(str(error))
    flags, unknown = verb_parser.parse_known_args(own)
    if overrides and not hasattr(flags, "config"):
        unknown += [f"{PREFIX}{override}" for override in overrides]
    if unknown:
        verb_parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    flags.verb, flags.overrides = verb, overrides
    return module, flags


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the overrides of the configuration from a verb's own arguments.

    Returns:
      The verb's arguments, and the overrides as `a.b=VALUE`.

    Raises:
      ConfigError: an override without a value.
    """
    own, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(PREFIX):
            own.append(argument)
            continue
        field, equals, value = argument.removeprefix(PREFIX).partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"{argument} needs a value: {argument}=VALUE or {argument} VALUE")
        overrides.append(f"{field}={value}")
    return own, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Lines reach a log file as they are written. Names of files may be no text, and a
            # terminal may lack the letters of a caption.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    module, flags = parse(list(sys.argv[1:] if argv is None else argv))
    # JAX, a second of imports, is not needed for --help and wrong usage.
    from imagen_jax.parallel.preemption import RESTART, Preempted

    warnings.showwarning = lambda message, *_, **__: print(
        f"imagen {flags.verb}: warning: {' '.join(str(message).split())}", file=sys.stderr
    )
    _silence_other_threads()
    try:
        xla_flags.apply()
        with staging.staged(flags):
            module.run(flags)
    except Preempted as stop:
        print(f"imagen {flags.verb}: {stop}", file=sys.stderr)
        return RESTART
    except Exception as error:
        if not _is_for_user(error) or os.environ.get("IMAGEN_TRACEBACK"):
            raise
        print(f"imagen {flags.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
