"""`imagen plan --stage=sample --cascade`: all stages with their text encoder, on this machine."""

import dataclasses
import json

import jax
import pytest

from imagen_jax.cli import main
from imagen_jax.parallel.hlo import Collective
from imagen_jax.parallel.topology import Slice
from imagen_jax.planning.cascade_plan import CascadePlan
from imagen_jax.planning.plan import Plan, Program

SHAPES = [
    "--config=configs/shapes.py:base",
    "--config.model.text_dim=512",
    "--config.mesh.cpu_devices=1",
    "--topology=here",
    "--stage=sample",
    "--cascade=configs/shapes.py:sr",
]


@pytest.mark.slow
def test_a_cascade_on_this_machine(tmp_path, capsys):
    path = tmp_path / "plan.json"
    encoder = "--config.text.preset=t5_v1_1_small"
    assert main.main(["plan", *SHAPES, encoder, "--batch=8", f"--json={path}"]) == 0
    assert "it fits" in capsys.readouterr().out
    found = json.loads(path.read_text())
    names = [program["name"] for program in found["programs"]]
    assert names == ["t5_v1_1_small", "base", "sr"] and found["keep"] == "all" and found["fits"]
    sizes = [program["hbm_per_chip"] for program in found["programs"]]
    held = [4 * program["params"] for program in found["programs"]]
    peaks = [s["peak"] + sum(held) - own for s, own in zip(sizes, held, strict=True)]
    assert found["hbm_per_chip"]["peak"] == pytest.approx(max(peaks), rel=0.01)


@pytest.fixture
def make_plan(base_config):
    """(peak, params) of programs -> CascadePlan of them, on one chip with 100 bytes."""

    traced = jax.jit(lambda: 0).trace()
    compiled = traced.lower().compile()

    def make(programs, keep) -> CascadePlan:
        where = Slice("v5e-1", [], 1, 100)
        plans = [
            Plan(
                Program("sample", base_config, 8, 1, traced, 0, 80.0, 80.0),
                where,
                arguments=held,
                temporaries=peak - held,
                outputs=0,
                code=0,
                peak=peak,
                collectives=[],
                compile_seconds=0.0,
                compiled=compiled,
            )
            for peak, held in programs
        ]
        params = [held for _, held in programs]
        return CascadePlan(plans, params, [(1, 1)] * len(plans), keep, 8)

    return make


@pytest.mark.parametrize(("keep", "peak", "fits"), [("all", 140, False), ("one", 90, True)])
def test_other_parameters_count_where_they_stay(make_plan, keep, peak, fits):
    """The second program, 90, beside the parameters of the others, 40 and 10."""
    plan = make_plan([(50, 40), (90, 60), (20, 10)], keep)
    assert plan.peak == peak and plan.fits == fits
    failed = dataclasses.replace(plan.plans[0], compiled=None)
    assert not dataclasses.replace(plan, plans=[failed, *plan.plans[1:]]).fits


def test_flops_and_communication_are_of_all_images(make_plan):
    """Eight images; the second program runs once for two of them."""
    plan = make_plan([(50, 40), (90, 60)], "all")
    first, second = plan.plans
    sent = [Collective("all-gather", 3, 100), Collective("all-gather", 1, 7, network="dcn")]
    first = dataclasses.replace(first, collectives=sent[:1])
    two = second.program._replace(batch=2)
    second = dataclasses.replace(second, program=two, collectives=sent)
    found = dataclasses.replace(plan, plans=[first, second]).as_json()
    assert found["flops_per_chip_step"] == 80 + 4 * 80
    rows = {row["network"]: (row["count"], row["bytes"]) for row in found["collectives"]}
    assert rows == {"ici": (3 + 4 * 3, 100 + 4 * 100), "dcn": (4, 28)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage=train", '--stage_settings={"base": {"steps": 2}}'], "needs --stage=sample, got"),
        (["--search"], "--cascade goes with --stage=sample, without --search"),
        (['--stage_settings={"x": {}}'], "stage_settings: stage='x' is not one of base, sr"),
        ([], "config.text.preset='' is not one of"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(capsys, arguments, message):
    assert main.main(["plan", *SHAPES, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error


def test_a_stage_that_trains_on_crops_samples_whole_images(capsys):
    """The paper's last stage: 64 -> 256 px in training, 256 -> 1024 px in a cascade."""
    stages = [f"configs/imagen.py:{name}" for name in ("base_64", "sr_256", "sr_1024")]
    flags = [f"--config={stages[0]}", "--config.mesh.cpu_devices=1", "--topology=here"]
    chain = f"--cascade={','.join(stages[1:])}"
    # The cascade is accepted; what is missing is the encoder.
    assert main.main(["plan", *flags, "--stage=sample", chain]) == 1
    assert "config.text.preset='' is not one of" in capsys.readouterr().err
    without_first = f"--cascade={stages[2]}"
    assert main.main(["plan", *flags, "--stage=sample", without_first]) == 1
    assert "stage 'sr_1024' gets an image of 64 px, expected an image of 256 px" in (
        capsys.readouterr().err
    )
