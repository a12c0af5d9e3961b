"""The command line: exit codes, one line on stderr, never a traceback."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.cli import main, prepare
from imagen_jax.config import overrides
from imagen_jax.interop import weights

CONFIG = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

def get_config(name=""):
    c = overrides.to_config_dict(Config())
    c.data.kind = "folder"
    c.data.path = {path!r}
    c.data.loader = "numpy"
    return c
"""


@pytest.fixture
def config(tmp_path) -> str:
    """A configuration whose folder of images does not exist."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(path=str(tmp_path / "images")))
    return str(path)


@pytest.fixture
def refused(capsys):
    """argv -> the one line on stderr of a command that was rejected."""

    def call(*argv: str) -> str:
        assert main.main(argv) == 1
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"imagen {argv[0]}: "), captured.err
        return lines[0]

    return call


@pytest.fixture
def misused(capsys):
    """argv -> stderr of a command that was used wrongly."""

    def call(*argv: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main.main(argv)
        assert exit.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main([verb, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: imagen {verb}" in text and "--" in text.split("options:")[1]


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for group, verbs in main.GROUPS.items():
        start = lines.index(f"{group}:") + 1
        assert [line.split()[0] for line in lines[start : start + len(verbs)]] == list(verbs)


def test_wrong_usage(misused, config):
    assert "VERB" in misused()
    assert "VERB='trian' is not one of" in misused("trian")
    assert misused("trian").endswith("did you mean 'train'?\n")
    assert "--workdir" in misused("train", f"--config={config}")
    line = misused("train", f"--config={config}", "--workdir=x", "--wrokdir=y")
    assert "unrecognized arguments: --wrokdir=y" in line
    assert "arguments: 9" in misused(
        "train", "--config=c", "--workdir=x", "--config.seed", "8", "9"
    )
    assert "--config.seed=8" in misused("export", "--workdir=x", "--out=y", "--config.seed=8")
    assert "--prompt" in misused("sample", "--stages=x", "--out=y")
    assert "not allowed" in misused(
        "sample", "--stages=x", "--out=y", "--prompt=a", "--prompts=b.txt"
    )
    assert "invalid int" in misused("sample", "--stages=x", "--out=y", "--prompt=a", "--seed=a")


def test_a_misspelled_field_names_the_nearest(refused, config, tmp_path):
    line = refused(
        "train", f"--config={config}", f"--workdir={tmp_path}/run", "--config.data.bach_size=8"
    )
    assert "config.data.bach_size is not a field; did you mean config.data.batch_size?" in line
    assert not (tmp_path / "run").exists()


def test_missing_files(refused, config, tmp_path):
    for verb, flags in [
        ("train", [f"--workdir={tmp_path}/run"]),
        ("embed", []),
        ("embed", ["--estimate"]),
        ("prepare", []),
        ("pretrain_text", [f"--out={tmp_path}/text"]),
    ]:
        assert "nothing.py" in refused(verb, "--config=nothing.py:base", *flags)
        assert "images" in refused(verb, f"--config={config}", *flags)
    assert "holds no checkpoints" in refused("export", f"--workdir={tmp_path}", "--out=x")
    assert "nothing" in refused("evaluate", "alignment", "--samples=nothing", f"--out={tmp_path}/a")


def test_a_broken_config_file(refused, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    line = refused("train", f"--config={tmp_path}/broken.py", f"--workdir={tmp_path}/run")
    assert "broken.py" in line and "SyntaxError" in line
    (tmp_path / "config.json").write_text("{}")
    line = refused("train", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run")
    assert "config.json" in line and "is no Python file" in line


def test_sample_rejects_missing_inputs(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    out = f"--out={tmp_path}/out"
    stages = f"--stages={tmp_path}/nothing"
    line = refused("sample", stages, f"--prompts={tmp_path}/empty.txt", out)
    assert "empty.txt: holds no prompts" in line
    assert "no such file" in refused("sample", stages, f"--prompts={tmp_path}/no.txt", out)
    line = refused("sample", stages, "--prompt=a", out)
    assert "nothing has no config.json" in line and "imagen export" in line
    assert "--batch_size=0" in refused("sample", stages, "--prompt=a", out, "--batch_size=0")
    assert "must be at least 1" in refused(
        "sample", stages, "--prompt=a", out, "--samples_per_prompt=-1"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "--stage_settings"),
        ('{"base": 3}', "--stage_settings"),
        ('{"bsae": {}}', "did you mean 'base'?"),
        ('{"base": {"stepps": 3}}', "did you mean --stage_settings: base.steps?"),
        ('{"base": {"steps": "3"}}', "must be of type int"),
        ('{"base": {"sampler": "ddmp"}}', "did you mean 'ddpm'?"),
    ],
)
def test_invalid_stage_settings(refused, tmp_path, base_config, settings, says):
    weights.write_safetensors(tmp_path / "params.safetensors", {"a": np.zeros(1, np.float32)})
    (tmp_path / "config.json").write_text(overrides.to_json(base_config))
    line = refused(
        "sample",
        f"--stages={tmp_path}",
        "--prompt=a",
        f"--out={tmp_path}/out",
        f"--stage_settings={settings}",
    )
    assert says in line


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, config):
    """An error that is not this package's own is a fault of the program and is not hidden."""
    monkeypatch.setattr(prepare, "open_source", lambda data, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["prepare", f"--config={config}"])


@pytest.mark.parametrize("arguments", [["--help"], ["trian"]])
def test_help_and_wrong_verbs_need_no_jax(arguments):
    program = (
        "import sys\nfrom imagen_jax.cli import main\n"
        f"try: main.main({arguments})\nexcept SystemExit: pass\n"
        "sys.exit(10 + ('jax' in sys.modules or 'numpy' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 10


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_no_terminal_can_show_are_escaped(tmp_path, encoding):
    """A name that is no UTF-8, and a terminal without the letters of a caption."""
    for name in (b"caf\xe9.png", "\u00e9t\u00e9.png".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes(b"no image")
    command = [sys.executable, "-m", "imagen_jax", "prepare", "--config=configs/folder.py:base"]
    result = subprocess.run(
        [*command, f"--config.data.path={tmp_path}"],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": encoding, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert r"caf\udce9.png: wrong type" in result.stderr
