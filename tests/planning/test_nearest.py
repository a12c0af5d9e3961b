"""The nearest settings that fit: on a model of memory, and of a real step on this machine."""

import dataclasses
import json

import jax
import pytest

from imagen_jax.cli import main
from imagen_jax.config.fields import ConfigError
from imagen_jax.parallel import topology
from imagen_jax.parallel.memory import GIB
from imagen_jax.planning.nearest import nearest, report
from imagen_jax.planning.plan import Plan, Program

KEPT = {"none": 1.0, "blocks": 0.5, "full": 0.25}  # Share of the activations.


@pytest.fixture(scope="module")
def model(base_config):
    """(bytes of the state, bytes per image, bytes per chip) -> configuration -> plan."""
    compiled = jax.jit(lambda: 0).trace().lower().compile()

    def make(state: float, per_image: float, hbm: float, images=512, devices=16, **mesh):
        mesh = dataclasses.replace(base_config.mesh, fsdp=1, **mesh)
        data = dataclasses.replace(base_config.data, batch_size=images)
        config = dataclasses.replace(base_config, data=data, mesh=mesh)
        where = topology.Slice("v4-32", [None] * devices, devices, int(hbm * GIB))

        def plan_of(config) -> Plan:
            rows = devices // config.mesh.tensor
            at_a_time = config.data.batch_size / rows / config.train.accumulation
            arguments = state / config.mesh.fsdp
            temporaries = per_image * at_a_time * KEPT[config.model.remat]
            program = Program("train", config, config.data.batch_size, 1, None, 0, 1e12, 1e12)  # pyright: ignore[reportArgumentType]
            peak = arguments + temporaries
            return Plan(
                program,
                where,
                arguments=int(arguments * GIB),
                temporaries=int(temporaries * GIB),
                outputs=0,
                code=0,
                peak=int(peak * GIB),
                collectives=[],
                compile_seconds=0.0,
                compiled=compiled if peak <= hbm else None,
            )

        return config, plan_of

    return make


def changes(made, compile_plan=None):
    config, plan_of = made
    lines: list[str] = []
    found = nearest(plan_of(config), compile_plan or plan_of, lines.append)
    assert all(change.plan.fits for change in found)
    assert all(any(str(change) in line for line in lines) for change in found)
    assert len(report(found)) >= 2
    return [str(change).removeprefix("--config.") for change in found], lines


@pytest.mark.parametrize(
    ("state", "per_image", "hbm", "expected"),
    [
        # 32 images on a device: 2 + 64 of 40.
        (2, 2, 40, ["model.remat=blocks", "train.accumulation=2"]),
        # 2 + 64 of 20: half is too much, so is a second part.
        (2, 2, 20, ["model.remat=full", "train.accumulation=4"]),
        # The state alone is too large: 30 + 32 of 34, where 8 devices save 26.25 of 28.
        (30, 1, 34, ["train.accumulation=8", "mesh.fsdp=16"]),
        # 60 + 0.32 of 20: only sharding helps.
        (60, 0.01, 20, ["mesh.fsdp=4"]),
        # 2 + 64 of 2.1: one image at a time takes 2.
        (2, 2, 2.1, []),
        # 1 + 64 of 3: remat never, one image at a time.
        (1, 2, 3, ["train.accumulation=32"]),
    ],
)
def test_each_kind_changes_as_little_as_fits(model, state, per_image, hbm, expected):
    found, lines = changes(model(state, per_image, hbm))
    assert found == expected
    assert len(lines) <= 8


def test_a_smaller_batch_is_the_last_resort(model):
    """Where the network allows nothing else, and the mesh is given."""
    assert changes(model(2, 20, 12, images=32, data=16))[0] == ["model.remat=full"]
    made, plan_of = model(2, 20, 30, images=32, data=16)

    def only_batches(config):
        if (config.model.remat, config.train.accumulation) != ("none", 1):
            raise ConfigError("not with this network")
        return plan_of(config)

    assert changes((made, plan_of), only_batches)[0] == ["data.batch_size=16"]


def test_where_nothing_fits_the_report_says_so():
    assert "larger slice" in report([])[1]


@pytest.mark.slow
def test_a_step_on_this_machine(monkeypatch, tmp_path, capsys):
    """A real step with less memory than it takes: a named setting then fits in another plan."""
    here = topology.this_machine()
    command = ["plan", "--config=configs/shapes.py:base", "--config.model.text_dim=16"]
    command += ["--config.mesh.cpu_devices=1", "--topology=here", "--config.data.batch_size=64"]
    path = tmp_path / "plan.json"
    assert main.main([*command, f"--json={path}"]) == 0
    whole = json.loads(path.read_text())["hbm_per_chip"]
    limit = whole["arguments"] + (whole["peak"] - whole["arguments"]) * 2 // 3
    small = lambda: here._replace(hbm=limit)  # noqa: E731
    monkeypatch.setattr(topology, "this_machine", small)
    capsys.readouterr()
    assert main.main([*command, f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    out = capsys.readouterr().out
    assert not found["fits"] and "fits with" in out
    kinds = [change["field"] for change in found["nearest"]]
    assert "train.accumulation" in kinds
    for change in found["nearest"]:
        assert change["peak"] <= limit
    first = found["nearest"][0]
    again = [*command, f"--config.{first['field']}={first['value']}", f"--json={path}"]
    assert main.main(again) == 0
    found = json.loads(path.read_text())
    assert found["fits"] and found["hbm_per_chip"]["peak"] == first["peak"]
