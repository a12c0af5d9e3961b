"""The Dockerfile: each RUN line in a new virtual environment, with what the image would hold."""

import fnmatch
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LINES = (ROOT / "Dockerfile").read_text().splitlines()


def run_lines() -> list[str]:
    return [line.removeprefix("RUN ") for line in LINES if line.startswith("RUN ")]


def extras() -> list[str]:
    """Of the three builds that the file's head shows; the first is the default."""
    given = [re.search(r"EXTRAS=(\S+)", line) for line in LINES if "docker build" in line]
    (default,) = [line.removeprefix("ARG EXTRAS=") for line in LINES if line.startswith("ARG")]
    return [match[1] if match else default for match in given]


def copy_context(folder: pathlib.Path) -> None:
    """Copies what .dockerignore lets through."""
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for path in ROOT.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in kept):
            if path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, folder / path.name, ignore=ignore)
            else:
                shutil.copy(path, folder / path.name)


def test_the_file_has_the_builds_that_its_head_shows():
    assert extras() == ["data,serve", "data,serve,tpu", "data,serve,cuda"]
    assert len(run_lines()) == sum("RUN" in line for line in LINES if not line.startswith("#"))


@pytest.mark.slow
@pytest.mark.parametrize("build", extras())
def test_each_run_line_in_a_clean_environment(tmp_path, build):
    """The lines of TPUs and GPUs run here, too: what they install works without the chips."""
    context, venv = tmp_path / "context", tmp_path / "venv"
    context.mkdir()
    copy_context(context)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "SSL_", "http", "HTTP", "no_proxy", "NO_PROXY"))
        or name in ("HOME", "LANG", "TMPDIR")
    }
    environment |= {"PATH": f"{venv}/bin:/usr/bin:/bin", "EXTRAS": build, "JAX_PLATFORMS": "cpu"}
    for line in run_lines():
        done = subprocess.run(
            ["bash", "-ec", line], cwd=context, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "configs/shapes.py" in done.stdout
