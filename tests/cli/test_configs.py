"""`imagen configs`: the bundled configurations and launch scripts, for a user who has a wheel."""

import os
import pathlib
import subprocess

from imagen_jax.cli import main
from imagen_jax.config import overrides

ROOT = pathlib.Path(__file__).parents[2]


def test_presets_are_listed(capsys):
    assert main.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "configs/shapes.py:base,sr,sr2" in lines
    assert {line.partition(":")[0] for line in lines} == {
        f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")
    }


def test_copies_are_complete_and_usable(tmp_path, capsys):
    target = tmp_path / "mine"
    assert main.main(["configs", f"--copy-to={target}"]) == 0
    assert str(target) in capsys.readouterr().out
    for folder in ("configs", "launch"):
        files = {p.name for p in (ROOT / folder).iterdir() if p.is_file()}
        assert {p.name for p in (target / folder).iterdir()} == files
        for name in files:
            assert (target / folder / name).read_bytes() == (ROOT / folder / name).read_bytes()
    assert (target / "constraints.txt").is_file()
    assert os.access(target / "launch" / "demo.sh", os.X_OK)
    copied = overrides.load(f"{target}/configs/shapes_words.py:sr")
    assert copied == overrides.load(str(ROOT / "configs" / "shapes_words.py:sr"))


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "launch").mkdir()
    assert main.main(["configs", f"--copy_to={tmp_path}"]) == 1
    assert f"{tmp_path}/launch exists; give another folder" in capsys.readouterr().err
    assert not (tmp_path / "configs").exists()


def test_a_copied_script_runs_with_the_python_on_the_path(tmp_path):
    """Without .venv beside it and without $PYTHON, a script takes `python` of the PATH."""
    assert main.main(["configs", f"--copy-to={tmp_path}/mine"]) == 0
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/bash\necho "$@" >>"$CALLS"\nexit 3\n')
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "CALLS": f"{tmp_path}/calls"}
    scripts = [
        ["demo.sh", "runs/demo"],
        ["emoji.sh", "runs/emoji"],
        ["cascade.sh", "--config=configs/shapes.py", "--stages=base", "--workdir=runs/c"],
    ]
    for script, *arguments in scripts:
        done = subprocess.run(
            ["bash", f"launch/{script}", *arguments],
            cwd=tmp_path / "mine",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 3, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls] == ["prepare", "prepare", "train"]
