"""Scores drawn pictures. `alignment`: does a picture of the shapes world show what it was asked?"""

from __future__ import annotations

import argparse

from imagen_jax.evaluation import alignment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("what", choices=["alignment"], help="which evaluation")
    parser.add_argument("--samples", required=True, help="folder written by `imagen sample`")
    parser.add_argument("--out", required=True, help="JSON report to write")


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    report = alignment.evaluate(flags.samples)
    alignment.write_report(report, flags.out)
    print(alignment.format_table(report))
