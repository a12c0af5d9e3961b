"""A compiled step as a file: same losses as without it; any other step is rejected."""

import json
import os
import pathlib
import shutil

import jax
import pytest

import imagen_jax
from imagen_jax.cli import main
from imagen_jax.config import overrides
from imagen_jax.parallel import compiled
from imagen_jax.parallel.compiled import CompiledError


def losses(workdir) -> list[float]:
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base_config, write_world):
    """A world, its configuration, and the compiled step that `plan` saved for it."""
    folder = tmp_path_factory.mktemp("compiled")
    config = write_world(folder, base_config, steps=3, every=3)
    path = folder / "step"
    assert main.main(["plan", f"--config={config}", "--topology=here", f"--save={path}"]) == 0
    return folder, config, path


def test_training_with_a_saved_step_is_training(saved, capsys):
    folder, config, path = saved
    train = ["train", f"--config={config}"]
    assert main.main([*train, f"--workdir={folder / 'with'}", f"--compiled={path}"]) == 0
    assert f"the compiled step is that of {path}" in capsys.readouterr().out
    assert main.main([*train, f"--workdir={folder / 'without'}"]) == 0
    assert losses(folder / "with") == losses(folder / "without")
    assert len(losses(folder / "with")) == 3


def test_a_step_of_another_configuration_is_rejected(saved, capsys):
    folder, config, path = saved
    arguments = [f"--config={config}", f"--workdir={folder / 'other'}", f"--compiled={path}"]
    assert main.main(["train", *arguments, "--config.optimizer.learning_rate=0.5"]) == 1
    error = capsys.readouterr().err
    assert "config.optimizer.learning_rate=0.003, here it is 0.5" in error
    assert len(error.splitlines()) == 1


@pytest.fixture
def load(saved):
    """path, changes -> what loading it with another identity raises."""

    traced = jax.jit(lambda: 0).trace()

    def load(path, **changes) -> str:
        config = overrides.load(str(saved[1]))
        step_identity = compiled.identity(config, jax.devices()) | changes
        with pytest.raises(CompiledError) as error:
            compiled.load(str(path), traced, step_identity)
        return str(error.value)

    return load


def test_versions_and_devices_are_named(saved, load):
    path = saved[2]
    assert "versions.jax=" in load(path, **{"versions.jax": "0.0"})
    assert "topology.devices=" in load(path, **{"topology.devices": 64})
    assert "versions.imagen_jax=" in load(path, **{"versions.imagen_jax": "other code"})


def test_a_file_of_another_user_is_never_unpickled(saved, load, tmp_path):
    good = saved[2].read_bytes()
    path = tmp_path / "step"

    def write(content: bytes, mode: int = 0o600):
        path.write_bytes(content)
        path.chmod(mode)
        return path

    assert "others may write to it" in load(write(good, 0o666))
    assert "is damaged" in load(write(good[:-1]))
    assert "not a file of `imagen plan --save`" in load(write(b"\x80\x05garbage\n"))
    assert "No such file" in load(tmp_path / "missing")
    assert os.stat(saved[2]).st_mode & 0o077 == 0


def test_fields_outside_the_step_are_not_part_of_its_identity(base_config):
    elsewhere = overrides.from_json(
        overrides.to_json(base_config).replace('"path": ""', '"path": "elsewhere"')
    )
    assert elsewhere != base_config
    devices = jax.devices()
    assert compiled.identity(elsewhere, devices) == compiled.identity(base_config, devices)


def test_the_identity_covers_the_code_of_every_package(base_config, tmp_path, monkeypatch):
    package = tmp_path / "imagen_jax"
    shutil.copytree(pathlib.Path(imagen_jax.__file__).parent, package)
    monkeypatch.setattr(imagen_jax, "__file__", str(package / "__init__.py"))

    def versions() -> str:
        return compiled.identity(base_config, jax.devices())["versions.imagen_jax"]

    seen = {versions()}
    for module in ("models/unet.py", "training/step.py"):
        with (package / module).open("a") as file:
            file.write("\n")
        seen.add(versions())
    assert len(seen) == 3
