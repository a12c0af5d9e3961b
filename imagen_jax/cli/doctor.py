"""Checks a configuration, its data and its workdir before a run; every failure names its fix.

Exit status 1 when a check failed.
"""

from __future__ import annotations

import argparse

from imagen_jax.checks.doctor import DoctorError, doctor
from imagen_jax.cli import path_flags, wiring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    parser.add_argument(
        "--workdir", type=path_flags.workdir_flag, help="folder of the run to start or resume"
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    findings = doctor(wiring.load_config(flags), flags.workdir)
    failed = [finding for finding in findings if finding.status == "failed"]
    if failed:
        names = ", ".join(dict.fromkeys(finding.name for finding in failed))
        raise DoctorError(f"{len(failed)} of {len(findings)} findings failed ({names})")
