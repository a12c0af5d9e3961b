"""Plans: of real programs on virtual CPU devices, of a TPU slice (slow), in words and money."""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from imagen_jax.cli import main
from imagen_jax.cli import plan as plan_verb
from imagen_jax.config import overrides
from imagen_jax.config.schema import MeshConfig
from imagen_jax.parallel import partitioning, topology
from imagen_jax.parallel.memory import GIB
from imagen_jax.planning.plan import Plan, Program
from imagen_jax.planning.report import estimate, report
from imagen_jax.planning.search import largest_batch_per_device
from imagen_jax.planning.step_time import StepTime
from tests.data.conftest import DIM, write_store

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--topology=here", "--config.mesh.cpu_devices=1"]
KEYS = {"topology", "chips", "params", "hbm_per_chip", "flops_per_chip_step", "collectives"}
KEYS |= {"dcn", "fits", "predicted"}


class Chip:
    """The attributes of a JAX device that a report uses."""

    def __init__(self, device_kind: str):
        self.device_kind = device_kind


@pytest.fixture(scope="module")
def make_plan(base_config):
    """Numbers -> a plan of no program in particular."""
    traced = jax.jit(lambda: 0).trace()
    compiled = traced.lower().compile()

    def make(stage="train", *, batch=2048, useful=2048 * 4.7e12, kind="TPU v4", **changes) -> Plan:
        chips = 256
        where = topology.Slice("v4-512", [Chip(kind)] * chips, chips, 30 * GIB)
        config = dataclasses.replace(
            base_config, train=dataclasses.replace(base_config.train, steps=2_500_000)
        )
        program = Program(stage, config, batch, 2_000_000_000, traced, 0, 1.5 * useful, useful)
        values = {
            "arguments": 2 * GIB,
            "temporaries": 12 * GIB,
            "outputs": GIB // 4,
            "code": GIB // 4,
            "peak": int(14.5 * GIB),
            "collectives": [],
            "compile_seconds": 1.0,
            "compiled": compiled,
        }
        return Plan(program, where, **values | changes)

    return make


def test_time_and_cost_of_the_paper_s_base_model(make_plan):
    guess = estimate(make_plan(), mfu=0.4, price=2.0)
    # 8 images of 4.7 TFLOP on each chip of 275 TFLOP/s at 40% MFU.
    assert guess.seconds == pytest.approx(8 * 4.7 / (0.4 * 275))
    assert guess.rate / 256 == pytest.approx(0.4 * 275 / 4.7)
    assert guess.days == pytest.approx(2.5e6 * guess.seconds / 86400)
    assert guess.chip_hours == pytest.approx(24 * 256 * guess.days)
    assert guess.cost == pytest.approx(2 * guess.chip_hours)
    assert estimate(make_plan(), mfu=0.2, price=None).cost is None
    assert estimate(make_plan(kind="cpu"), mfu=0.4, price=1.0) is None


def test_the_predicted_time_replaces_an_assumed_mfu(make_plan):
    time = StepTime(
        products=0.06,
        others=0.03,
        exposed=0.01,
        hidden=0.05,
        exposed_beside=0.0018,
        between_slices=0.0,
    )
    plan = make_plan(time=time)
    assert estimate(plan, mfu=None, price=None).seconds == pytest.approx(0.1)
    assert estimate(plan, mfu=0.4, price=None).seconds > 0.1
    text = report(plan, None, None)
    # 8 images of 4.7 TFLOP in 0.1 s at 275 TFLOP/s.
    for line in (
        "MFU 137%",
        "products 60% convolutions",
        "communication 10% exposed; 0.05 s",
        "2% exposed where each collective runs beside others: 0.0918 s in all, products 65%",
    ):
        assert re.search(line.replace(" ", " +"), text), text
    assert "at 40% MFU" in report(make_plan(), None, None)
    assert plan.as_json()["predicted"]["seconds"] == pytest.approx(0.1)
    slow = make_plan(time=time._replace(between_slices=0.2))
    assert estimate(slow, mfu=None, price=None).seconds == pytest.approx(0.2)
    assert "between slices" in report(slow, None, None)
    assert re.search(
        "1% +exposed where each collective runs beside others: 0.2 s in all",
        report(slow, None, None),
    )


def test_chip_hours_of_a_thousand_images(make_plan):
    guess = estimate(make_plan("sample", batch=512, useful=512 * 1e14), mfu=0.5, price=3.0)
    assert guess.days is None
    # A thousand images of 100 TFLOP at 137.5 TFLOP/s per chip.
    assert guess.chip_hours == pytest.approx(1000 * 100 / 137.5 / 3600)
    assert guess.cost == pytest.approx(3 * guess.chip_hours)


def test_a_report_says_what_to_book(make_plan):
    text = report(make_plan(), 0.4, 3.22)
    for words in (
        "256 chips of TPU v4",
        "2048 images at a time, 8 per chip",
        "remat=none, accumulation=1",
        "it fits",
        "50% more by recomputation",
        "2,500,000 steps",
        "at 3.22 per chip-hour",
    ):
        assert words in text, text
    assert "IT DOES NOT FIT" in report(make_plan(peak=31 * GIB), 0.4, None)
    assert max(map(len, text.splitlines())) <= 100


def test_json_has_the_agreed_keys(make_plan):
    values = make_plan().as_json()
    assert set(values) == KEYS
    assert set(values["hbm_per_chip"]) == {"arguments", "temporaries", "peak", "capacity"}
    assert values["fits"] and not make_plan(compiled=None).as_json()["fits"]


@pytest.mark.parametrize("room", [0.5, 1, 1.5, 2, 3, 7.9, 8, 100, 1023, 5000])
@pytest.mark.parametrize("bend", [0.0, 0.3, -0.3])
def test_the_largest_power_of_two_that_fits(make_plan, room, bend):
    """Against an exhaustive search, also if memory is not linear in images."""
    tried = []

    def plan_of(part: int) -> Plan:
        tried.append(part)
        peak = int((4 + part * (1 + bend * math.tanh(part / 8))) * GIB)
        made = make_plan(peak=peak)
        return dataclasses.replace(made, slice=made.slice._replace(hbm=int((4 + room) * GIB)))

    fitting = [2**i for i in range(11) if plan_of(2**i).fits]
    tried.clear()
    found = largest_batch_per_device(plan_of)
    assert found.fits == bool(fitting)
    assert found.peak == plan_of(max(fitting, default=1)).peak
    assert len(tried) <= 8


@pytest.fixture(scope="module")
def on_devices(base_config):
    """What tests/reference/plan_on_devices.py found."""

    def call(*arguments: str) -> dict:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.reference.plan_on_devices",
                overrides.to_json(base_config),
                *arguments,
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return call


def test_samplers_and_collectives_on_real_devices(on_devices):
    found = on_devices()
    by_kind = {c["kind"]: c for c in found["loop"]}
    assert by_kind["all-reduce"] == {
        "kind": "all-reduce",
        "count": 5,
        "bytes": 5 * 16 * 16 * 4,
        "network": "ici",
    }
    gathered = by_kind["all-gather"]
    assert (gathered["count"], gathered["bytes"]) == (1, 32 * 16 * 4)
    assert found["sample"]["fits"] and found["sample"]["chips"] == 4
    # With replicated parameters and sharded images there is no communication.
    assert found["data_parallel"]["fits"] and found["data_parallel"]["collectives"] == []
    # Memory suffices for one more image per device, not for three more.
    assert found["largest_batch"] == 8 and found["largest"]["fits"]
    assert any("does not fit" in line for line in found["lines"]) or len(found["lines"]) == 3


@pytest.mark.slow
def test_a_train_step_on_real_devices_and_the_search_for_one(on_devices):
    found = on_devices("search")
    train = found["train"]
    assert train["hbm_per_chip"]["arguments"] == found["arguments"]
    assert 0.5 < train["flops_per_chip_step"] / found["compiler_flops"] < 1.5
    assert {"all-gather", "all-reduce"} <= {c["kind"] for c in train["collectives"]}
    # Memory suffices for 8 images and not for 16; the plan with the fewest FLOPs is the result.
    assert found["found"]["fits"] and found["found_batch"] == 8
    assert (found["found_remat"], found["found_accumulation"]) == ("none", 1)
    tried = [line.split()[:3] for line in found["lines"]]
    assert ["none", "1", "8"] in tried and ["blocks", "1", "8"] in tried
    assert not any(line.split()[2:3] == ["16"] and "fit" not in line for line in found["lines"])


def test_a_program_is_made_for_the_mesh_in_force():
    """A plan made on a CPU must trace and compile what the TPU would run."""
    abstract = partitioning.make_mesh(MeshConfig()).abstract_mesh
    assert partitioning.platform() == "cpu" and partitioning.train_step_options()
    assert partitioning.donated(0) == ()
    device = dataclasses.replace(abstract.abstract_device, platform="tpu")
    with jax.sharding.use_abstract_mesh(abstract.update(abstract_device=device)):
        assert partitioning.platform() == "tpu"
        assert partitioning.train_step_options() == partitioning.forward_options() == {}
        assert partitioning.donated(0) == (0,)


def test_only_one_cpu_alone_has_other_convolutions():
    library = "xla_cpu_experimental_ynn_fusion_type"
    one = partitioning.make_mesh(MeshConfig(), jax.devices()[:1]).abstract_mesh
    for devices in (1, 2):
        with jax.sharding.use_abstract_mesh(one.update(axis_sizes=(devices, 1, 1))):
            assert (library in partitioning.train_step_options()) == (devices == 1)
            assert (library in partitioning.forward_options()) == (devices == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v4-100"], "try v4-128"),
        (["--topology=here", "--batch=-1"], "--batch=-1 must be at least 0"),
        (["--topology=here", "--mfu=2"], "--mfu=2.0 must be above 0 and at most 1"),
        (["--topology=here", "--stage=sample", "--save=x"], "needs --stage=train"),
        ([*TINY, "--config.model.text_dim=16", "--config.mesh.fsdp=3"], "try config.mesh.fsdp=1"),
        ([*TINY, "--config.data.embeddings=none"], "config.model.text_dim=0 must be the width"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(capsys, arguments, message):
    assert main.main(["plan", "--config=configs/shapes.py:base", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error


def test_the_width_of_the_text_is_the_stores_unless_it_is_given(base_config, tmp_path):
    write_store(tmp_path / "store", ["a", "b"])
    given = base_config
    data = dataclasses.replace(given.data, embeddings=str(tmp_path / "store"))
    model = dataclasses.replace(given.model, text_dim=0)
    config = dataclasses.replace(given, data=data, model=model)
    assert plan_verb.with_text_dim(config).model.text_dim == DIM
    assert plan_verb.with_text_dim(given) == given


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chips"), [("v4-8", 4), ("v5e-16", 16), ("v5p-8", 4), ("v6e-8", 8), ("tpu7x-8", 4)]
)
def test_a_train_step_for_a_tpu_slice(tmp_path, name, chips):
    pytest.importorskip("libtpu")
    path = tmp_path / "plan.json"
    arguments = [
        "--config=configs/shapes.py:base",
        "--config.model.text_dim=16",
        "--config.mesh.fsdp=2",
        f"--config.data.batch_size={2 * chips}",
        f"--topology={name}",
        f"--json={path}",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "imagen_jax", "plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    values = json.loads(path.read_text())
    assert set(values) == KEYS and values["chips"] == chips and values["fits"]
    assert {"all-gather", "all-reduce"} <= {c["kind"] for c in values["collectives"]}
    memory = values["hbm_per_chip"]
    assert 0 < memory["arguments"] + memory["temporaries"] <= memory["peak"] < memory["capacity"]


@pytest.mark.slow
def test_a_step_that_is_too_large_for_a_slice_is_a_plan_too(tmp_path):
    pytest.importorskip("libtpu")
    path = tmp_path / "plan.json"
    arguments = [
        "--config=configs/shapes.py:base",
        "--config.model.text_dim=16",
        "--config.data.image_size=4096",
        "--config.data.batch_size=16",
        "--topology=v5e-4",
        f"--json={path}",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "imagen_jax", "plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "IT DOES NOT FIT" in result.stdout
    values = json.loads(path.read_text())
    assert (
        not values["fits"] and values["hbm_per_chip"]["peak"] > values["hbm_per_chip"]["capacity"]
    )


def test_names_are_checked_before_a_slice_is_opened(capsys):
    flags = ["--config=configs/shapes.py:base", "--topology=v5e-8"]
    assert main.main(["plan", *flags, "--config.diffusion.schedule=cosin"]) == 1
    assert "did you mean 'cosine'" in capsys.readouterr().err
