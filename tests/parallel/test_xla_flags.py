"""Flags of XLA: the installed compilers know each of them, and every verb sets them."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from imagen_jax.cli import main
from imagen_jax.parallel import xla_flags
from imagen_jax.parallel.xla_flags import GPU, TPU

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
ON_CPU = "import jax; jax.numpy.zeros(1).block_until_ready(); print('done')"
# A chip of a described slice; libtpu parses its flags when it is loaded.
ON_TPU = """
import jax, jax.numpy as jnp
from imagen_jax.parallel.topology import open_slice
chip = jax.sharding.SingleDeviceSharding(open_slice("v5e-4").devices[0])
x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=chip)
jax.jit(lambda x: x @ x).lower(x).compile()
print("done")
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    """A child process: a compiler that does not know a flag aborts."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_xla_knows_each_flag_of_gpus():
    found = run(ON_CPU, XLA_FLAGS=" ".join(map(str, GPU)))
    assert found.stdout == "done\n", found.stderr[-500:]


def test_an_unknown_flag_of_xla_fails():
    found = run(ON_CPU, XLA_FLAGS=f"{GPU[0]} --xla_gpu_enable_latency_hidden_scheduler=true")
    assert found.returncode and "latency_hidden_scheduler" in found.stderr


@pytest.mark.slow
@needs_libtpu
def test_libtpu_knows_each_flag_of_tpus():
    found = run(ON_TPU, LIBTPU_INIT_ARGS=" ".join(map(str, TPU)))
    assert found.stdout == "done\n", found.stderr[-500:]


@pytest.mark.slow
@needs_libtpu
def test_an_unknown_flag_of_libtpu_fails():
    found = run(ON_TPU, LIBTPU_INIT_ARGS=f"{TPU[0]} --xla_tpu_enable_latency_hidden_scheduler=true")
    assert found.returncode and "done" not in found.stdout


@pytest.mark.parametrize("flags", [TPU, GPU])
def test_each_flag_stands_once_with_its_reason(flags):
    assert len({flag.name for flag in flags}) == len(flags)
    assert all(len(flag.reason.split()) > 4 for flag in flags)


def test_flags_of_the_user_stay_and_repeats_add_nothing(monkeypatch):
    monkeypatch.setattr(xla_flags, "_CUDA_PLUGINS", ("json",))
    given = {"LIBTPU_INIT_ARGS": f"--{TPU[0].name}=false --xla_mine=1", "OTHER": "x"}
    xla_flags.apply(given)
    once = dict(given)
    words = once["LIBTPU_INIT_ARGS"].split()
    assert words == [*map(str, TPU[1:]), f"--{TPU[0].name}=false", "--xla_mine=1"]
    assert once["XLA_FLAGS"].split() == [*map(str, GPU)] and once["OTHER"] == "x"
    xla_flags.apply(given)
    assert given == once


@pytest.mark.parametrize("names", [(TPU[1].name,), (TPU[0].name, GPU[0].name)])
def test_flags_that_another_compiler_does_not_know_can_be_omitted(monkeypatch, names):
    monkeypatch.setattr(xla_flags, "_CUDA_PLUGINS", ("json",))
    given = {"IMAGEN_NO_XLA_FLAGS": ",".join(names)}
    xla_flags.apply(given)
    for variable, flags in (("LIBTPU_INIT_ARGS", TPU), ("XLA_FLAGS", GPU)):
        assert given[variable].split() == [str(flag) for flag in flags if flag.name not in names]


def test_all_flags_can_be_omitted():
    given = {"IMAGEN_NO_XLA_FLAGS": "all", "LIBTPU_INIT_ARGS": "--xla_mine=1"}
    before = dict(given)
    xla_flags.apply(given)
    assert given == before


def test_an_unknown_name_of_a_flag_to_omit(monkeypatch, capsys):
    monkeypatch.setenv("IMAGEN_NO_XLA_FLAGS", TPU[0].name[:-1])
    assert main.main(["configs"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"did you mean '{TPU[0].name}'?" in error


def test_without_cuda_nothing_is_set_for_gpus(monkeypatch):
    monkeypatch.setattr(xla_flags, "_CUDA_PLUGINS", ("no_such_module",))
    given: dict[str, str] = {}
    xla_flags.apply(given)
    assert list(given) == ["LIBTPU_INIT_ARGS"]


def test_what_doctor_prints(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_mine=1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert xla_flags.in_force("tpu") == "LIBTPU_INIT_ARGS=--xla_mine=1"
    assert xla_flags.in_force("cpu") == "no flags of XLA for cpu"


def test_every_launcher_runs_imagen_which_sets_them():
    """A training is started in one place; `imagen` sets the flags in its own process."""
    launch = pathlib.Path(__file__).parents[2] / "launch"
    assert '"$1" -m imagen_jax' in (launch / "lib.sh").read_text()
    assert not any("xla_" in path.read_text() for path in launch.iterdir() if path.is_file())
    program = "import os; from imagen_jax.cli import main; main.main(['configs']); "
    program += "print(os.environ['LIBTPU_INIT_ARGS'])"
    assert run(program, LIBTPU_INIT_ARGS="").stdout.splitlines()[-1].split() == [*map(str, TPU)]
