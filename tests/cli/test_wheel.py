"""A user who has only the wheel: configurations, training, export, sampling and serving."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "MANIFEST.in")
FOLDERS = ("imagen_jax", "configs", "launch")

pytestmark = pytest.mark.slow


def check(*command: object, cwd: pathlib.Path) -> str:
    """Output of a command that must succeed, without this checkout on any path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """Folder bin/ of an environment with the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    check(*pip, "wheel", *options, "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)

    check(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # The .pth files of that folder are not read, so that an editable install stays unknown.
    (pathlib.Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    check(*pip, f"--python={python}", "install", *options, wheel, cwd=folder)
    where = check(python, "-c", "import imagen_jax; print(imagen_jax.__file__)", cwd=folder)
    assert pathlib.Path(where).is_relative_to(folder / "venv"), where
    return python.parent


@pytest.fixture(scope="module")
def project(installed, tmp_path_factory) -> pathlib.Path:
    """The folder that `imagen configs --copy-to` writes."""
    folder = tmp_path_factory.mktemp("user") / "project"
    check(installed / "imagen", "configs", f"--copy-to={folder}", cwd=folder.parent)
    return folder


def test_the_wheel_has_its_data_and_entry_points(installed, project):
    code = (
        "from imagen_jax.config import plugins; from imagen_jax.worlds.shapes import letters; "
        "from imagen_jax.worlds.emoji import attribution; assert attribution.ATTRIBUTION; "
        "assert len([*attribution.FOLDER.glob('*.tsv')]) == 2; "
        "assert letters.FONT.is_file(); print(plugins.names(plugins.TEXT_ENCODERS))"
    )
    assert "shapes_oracle" in check(installed / "python", "-c", code, cwd=project)
    listed = check(installed / "imagen", "configs", cwd=project)
    assert "configs/shapes.py:base,sr,sr2" in listed
    for name in ("configs", "launch"):
        assert {p.name for p in (project / name).iterdir()} == {
            p.name for p in (ROOT / name).iterdir() if p.name != "__pycache__"
        }


def test_a_copied_launch_script_starts_the_installed_package(installed, project):
    path = f"PATH={installed}:{os.environ['PATH']}"
    found = check(
        *("env", path, "bash", "launch/cascade.sh", "--config=configs/shapes.py"),
        *("--stages=base", "--workdir=runs/c", "--dry_run"),
        cwd=project,
    )
    assert " python -m imagen_jax train --config=configs/shapes.py:base " in found


@pytest.fixture(scope="module")
def stage(installed, project) -> pathlib.Path:
    """A stage folder of the shapes world after four steps, from the copied configuration."""
    run = project / "run"
    flags = ["--config=configs/shapes.py:base", "--config.data.path", run / "data"]
    flags += [f"--config.data.embeddings={run}/embeddings", f"--config.text.path={run}/text"]
    flags += [f"--config.pretrain_text.corpus={run}/data/paraphrases.jsonl"]
    flags += ["--config.pretrain_text.steps", "2", "--config.train.steps", "4"]
    flags += ["--config.pretrain_text.num_layers=1", "--config.mesh.cpu_devices=1"]
    for verb, *rest in (
        ("prepare", *flags),
        ("pretrain_text", *flags, f"--out={run}/text"),
        ("embed", *flags),
        ("train", *flags, f"--workdir={run}/base"),
        ("export", f"--workdir={run}/base", f"--out={run}/stages/base"),
    ):
        check(installed / "imagen", verb, *rest, cwd=project)
    return run / "stages" / "base"


def test_sample(installed, project, stage):
    out = project / "samples"
    prompts = ["--prompt=a large red circle", "--samples_per_prompt=2"]
    flags = [f"--stages={stage}", *prompts, f"--out={out}"]
    check(installed / "imagen", "sample", *flags, cwd=project)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000_00.png", "00000_01.png"]
    assert all((out / name).is_file() for name in ("00000_00.png", "00000_01.png", "grid.png"))


def test_serve(installed, project, stage):
    pytest.importorskip("starlette")
    flags = [f"--stages={stage}", f"--out={project}/served", "--port=0"]
    server = subprocess.Popen(
        [installed / "imagen", "serve", *flags], cwd=project, stdout=subprocess.PIPE, text=True
    )
    try:
        address = re.fullmatch(r"(http://127\.0\.0\.1:\d+)\n", server.stdout.readline())[1]
        while (line := server.stdout.readline()) != "ready\n":
            assert line, "the server has exited"
        with urllib.request.urlopen(address, timeout=60) as page:
            assert "<script" in page.read().decode()
        request = urllib.request.Request(
            f"{address}/api/jobs",
            json.dumps({"prompt": "a large red circle"}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status in (200, 202)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
