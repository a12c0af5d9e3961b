"""Lists the bundled configurations; --copy-to writes them and the launch scripts to a folder.

A wheel has no configs/ and launch/ beside it: `imagen configs --copy-to=DIR`, then run in DIR, for
example `bash launch/demo.sh`.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil

from imagen_jax.cli import config_help, path_flags
from imagen_jax.config.fields import ConfigError

FOLDERS = ("configs", "launch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--copy-to",
        "--copy_to",
        metavar="DIR",
        default="",
        type=path_flags.flag,
        help="folder to write configs/, launch/ and constraints.txt to",
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    if not flags.copy_to:
        for file, names in config_help.presets().items():
            print(f"{file}:{','.join(names)}")
        return
    target = pathlib.Path(flags.copy_to)
    for name in (*FOLDERS, "constraints.txt"):
        if (target / name).exists():
            raise ConfigError(f"--copy-to={target}: {target / name} exists; give another folder")
    bundle = config_help.bundle()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(bundle / name, target / name, ignore=ignore)
    shutil.copy(bundle / "constraints.txt", target)
    print(f"wrote configs/, launch/ and constraints.txt to {target}; start scripts in that folder:")
    print(f"  cd {target} && bash launch/demo.sh")
