"""What a run has written to its workdir so far, also while it writes."""

import json
import pathlib


def rows(workdir: pathlib.Path) -> list[dict]:
    """The complete rows of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest checkpoint; 0: none."""
    folders = (workdir / "checkpoints").glob("*")
    return max((int(folder.name) for folder in folders if folder.name.isdigit()), default=0)
