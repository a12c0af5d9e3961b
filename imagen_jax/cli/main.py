"""The command line: one verb, its flags, `--config.a.b=value` overrides, and one-line errors.

Exit codes: 0 done, 1 refused or failed (one line on stderr), 2 wrong usage, 75 asked to stop and
saved: start the same command again.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType

from imagen_jax.parallel.preemption import RESTART, Preempted

VERBS = {
    "prepare": "make a data set ready: build it, index it, report what cannot be used",
    "pretrain_text": "train a small T5 encoder and its vocabulary on captions alone",
    "doctor": "look for what would fail or spoil a run before it starts",
    "embed": "compute the text embeddings of a data set's captions, once",
    "plan": "memory, time and cost of a run on a TPU slice, before it is booked",
    "train": "train one stage",
    "diagnose": "look at what trained stages draw beside real pictures",
    "replay": "look again at a training step that was not finite",
    "export": "turn a training run into a stage folder, or into another library's",
    "import": "turn another library's weights into a stage folder",
    "ema": "turn a run's snapshots into a stage folder, with an EMA width chosen now",
    "sample": "draw pictures for prompts with a cascade of stage folders",
    "edit": "draw from a picture of your own: anew, in part, or larger",
    "serve": "a page and a JSON API that draw with a cascade",
    "evaluate": "score drawn pictures",
}


def _own_error(error: Exception) -> bool:
    """Whether the message was written for the user: our own error classes and file errors."""
    return isinstance(error, OSError) or type(error).__module__.startswith("imagen_jax")


def _silence_other_threads() -> None:
    """A library's thread hands its error on to the main thread, which says it in one line."""
    threading.excepthook = lambda _: None
    # What a callback of C++ raises comes here, tensorstore's a thousandfold when a save fails.
    main, said_by_python = threading.main_thread(), sys.unraisablehook
    sys.unraisablehook = lambda error: (
        said_by_python(error) if threading.current_thread() is main else None
    )
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: record.exc_info is None)


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The verb's module and flags; ends the process with status 2 where these are wrong."""
    parser = argparse.ArgumentParser(prog="imagen", description="Text-to-image cascades in JAX.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verbs.add_parser(name, help=text, add_help=False)
    verb = parser.parse_known_args(arguments[:1])[0].verb

    file = f"{verb}_" if keyword.iskeyword(verb) else verb
    module = importlib.import_module(f"imagen_jax.cli.{file}")
    verb_parser = argparse.ArgumentParser(
        prog=f"imagen {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(verb_parser)
    flags, rest = verb_parser.parse_known_args(arguments[1:])
    overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown or (overrides and not hasattr(flags, "config")):
        verb_parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    flags.verb, flags.overrides = verb, overrides
    return module, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    module, flags = parse(list(sys.argv[1:] if argv is None else argv))
    warnings.showwarning = lambda message, *_, **__: print(
        f"imagen {flags.verb}: warning: {' '.join(str(message).split())}", file=sys.stderr
    )
    _silence_other_threads()
    try:
        module.run(flags)
    except Preempted as told:
        print(f"imagen {flags.verb}: {told}", file=sys.stderr)
        return RESTART
    except Exception as error:
        if not _own_error(error) or os.environ.get("IMAGEN_TRACEBACK"):
            raise
        print(f"imagen {flags.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
