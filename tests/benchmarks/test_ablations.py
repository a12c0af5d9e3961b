"""Tables of benchmarks/ablations.py: means and intervals over seeds, and paired differences."""

import functools
import pathlib
import sys

import jax
import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import ablation_curves
import ablation_runs
import ablations
import contrastive_text
import drawbench_arms
from ablation_runs import Training

from imagen_jax.config.overrides import load
from imagen_jax.stages.network import init_params

ABLATION = ablations.Ablation(
    {"off": ablations.Arm(()), "on": ablations.Arm(())},
    {"arm": "off", "sr.aug_level": 0.0},
    ("single",),
    3,
    {"right": "all.exact", "order": "relation.order", "distance": "distance"},
)


def cell(arm, level, seed, exact, order, distance):
    kinds = {"all": {"exact": {"mean": exact}}, "relation": {}}
    if order is not None:
        kinds["relation"]["order"] = {"mean": order}
    numbers = {"alignment": kinds, "distance": distance}
    return {"arm": arm, "values": {"sr.aug_level": level}, "seed": seed, "numbers": numbers}


@pytest.fixture
def rows():
    cells = []
    for seed, (off, on) in enumerate([(0.2, 0.4), (0.5, 0.8), (0.5, 0.6)]):
        cells.append(cell("off", 0.0, seed, off, None if seed else 0.5, 2.0))
        for level in (0.0, 0.1):
            cells.append(cell("on", level, seed, on - level, 0.75, 1.0 + seed))
    return ablations.tabulate(ABLATION, cells)


def test_rows_have_the_student_interval_over_the_seeds(rows):
    assert [row["choice"] for row in rows] == [
        {"arm": "off", "sr.aug_level": 0.0},
        {"arm": "on", "sr.aug_level": 0.0},
        {"arm": "on", "sr.aug_level": 0.1},
    ]
    found = rows[1]["measures"]["right"]
    assert found["seeds"] == [0.4, 0.8, 0.6]
    expected = stats.ttest_1samp([0.4, 0.8, 0.6], 0).confidence_interval(0.95)
    np.testing.assert_allclose(found["mean"] - found["half"], expected.low)
    np.testing.assert_allclose(found["mean"] + found["half"], expected.high)


def test_differences_from_the_reference_arm_are_paired_by_seed(rows):
    assert rows[0]["differences"] == {}
    np.testing.assert_allclose(rows[1]["differences"]["right"]["seeds"], [0.2, 0.3, 0.1])
    np.testing.assert_allclose(rows[2]["differences"]["right"]["seeds"], [0.1, 0.2, 0.0])
    # Pairing removes the variance shared by a seed's arms, so the interval is narrower.
    paired, alone = (rows[1][part]["right"]["half"] for part in ("differences", "measures"))
    assert paired < alone


def test_measures_without_applicable_images_are_omitted(rows):
    order = rows[0]["measures"]["order"]
    assert order == {"seeds": [0.5, None, None], "mean": 0.5, "half": None}
    assert rows[1]["differences"]["order"]["seeds"] == [0.25, None, None]
    assert ablations.summary([None, None]) == {"seeds": [None, None], "mean": None, "half": None}
    table = ablations.format_table(rows).splitlines()
    assert table[0] == "| arm | sr.aug_level | right | order | distance |"
    assert table[2].startswith("| off | 0 | 0.40 ± 0.43 | 0.50 | 2.000 ± 0.000 |")
    assert "(+0.20 ± 0.25)" in table[3] and "(+0.25)" in table[3]


def test_choices_may_be_lists():
    cells = [cell("off", level, 0, 0.5, None, 1.0) for level in ((), (-100.0, 1.0))]
    ablation = ABLATION._replace(against={"sr.aug_level": ()}, measures={"right": "all.exact"})
    table = ablations.format_table(ablations.tabulate(ablation, cells)).splitlines()
    assert table[2:] == ["| all | 0.50 |", "| (-100.0, 1.0) | 0.50 (+0.00) |"]


def test_costs_have_no_differences_and_a_single_seed_has_no_interval():
    cells = [
        {**cell(arm, 0.0, 0, 0.5, None, 1.0), "cost": {"parameters": count}}
        for arm, count in (("off", 1_500_000), ("on", 990))
    ]
    measures = {"parameters": "cost.parameters", "right": "all.exact"}
    found = ablations.tabulate(ABLATION._replace(measures=measures), cells)
    table = ablations.format_table(found).splitlines()
    assert table[2:] == ["| off | 1,500,000 | 0.50 |", "| on | 990 | 0.50 (+0.00) |"]


def test_arms_differ_only_in_the_field_of_their_ablation():
    differs = {
        "encoder_size": {"encoder"},
        "thresholding": set(),
        "thresholding_v": set(),
        "noise_conditioning": {"variant"},
        "noise_conditioning_worse_base": {"variant"},
        "unet_size": {"variant"},
        "conditioning": {"variant"},
        "efficient_unet": {"variant"},
        "text_objective": {"encoder"},
    }
    for name, ablation in ablations.ABLATIONS.items():
        arm_names, arms = list(ablation.arms), list(ablation.arms.values())
        assert ablation.against.get("arm", arm_names[0]) in ablation.arms
        assert len({arm.stages for arm in arms}) == len(arms)
        for arm in arms:
            assert [training.stage for training in arm.stages] == ["base", "sr"][: len(arm.stages)]
            # All arms share the seeds and the stages before the last one.
            assert arm.stages[:-1] == arms[0].stages[:-1]
            own, first = arm.stages[-1]._asdict(), arms[0].stages[-1]._asdict()
            assert {field for field in own if own[field] != first[field]} <= differs[name]
        # Every arm must have the reference setting among its choices.
        choices = [
            {
                f"{stage}.{field}": values
                for stage, of in arm.grid.items()
                for field, values in of.items()
            }
            for arm in arms
        ]
        for field, value in ablation.against.items():
            assert field == "arm" or all(value in choice[field] for choice in choices)


@pytest.fixture
def runs(tmp_path):
    """Runs on a corpus of one line; commands are recorded and create only their output files."""

    class Dry(ablation_runs.Runs):
        def _imagen(self, verb, training, *flags):
            self.commands.append((verb, training, flags))
            for flag in flags:
                if flag.startswith("--out="):
                    folder = pathlib.Path(flag.removeprefix("--out="))
                    folder.mkdir(parents=True)
                    (folder / "config.json").write_text("{}")
                    (folder / "params.safetensors").write_text("")
            if verb == "embed":
                self.embeddings(training.encoder).mkdir(parents=True)
                (self.embeddings(training.encoder) / "manifest.json").write_text("{}")

    (tmp_path / "paraphrases.jsonl").write_text('["a red cross", "one red cross"]\n')
    dry = Dry(str(tmp_path / "out"), str(tmp_path), {"text": 7, "base": 8, "sr": 9})
    dry.commands = []
    return dry


TRAININGS = {
    training
    for ablation in ablations.ABLATIONS.values()
    for arm in ablation.arms.values()
    for training in arm.stages
}


def test_trainings_are_shared_and_named_by_their_settings(runs):
    every = {training._replace(seed=seed) for training in TRAININGS for seed in (0, 1)}
    folders = {runs.stage(training) for training in every}
    assert len(folders) == len(every)
    verbs = [verb for verb, _, _ in runs.commands]
    encoders = {training.encoder for training in every}
    assert verbs.count("train") == verbs.count("export") == len(every)
    assert verbs.count("embed") == len(encoders)
    assert encoders == {*ablation_runs.ENCODERS, *ablation_runs.GIVEN_ENCODERS}
    # One encoder is trained on images.
    assert verbs.count("pretrain_text") == len(ablation_runs.ENCODERS) - 1
    assert verbs.count("contrastive_text") == 1
    before = len(runs.commands)
    assert {runs.stage(training) for training in every} == folders
    assert len(runs.commands) == before


@pytest.mark.parametrize("encoder", [*ablation_runs.ENCODERS, *ablation_runs.GIVEN_ENCODERS])
def test_configurations_of_all_arms_are_accepted(runs, encoder):
    for training in TRAININGS:
        if training.encoder == encoder:
            config, *flags = runs._flags(training)
            sizes = ablation_runs.ENCODERS.get(encoder, {})
            changes = [flag.removeprefix("--config.") for flag in flags]
            changes += [f"pretrain_text.{field}={value}" for field, value in sizes.items()]
            load(config.removeprefix("--config="), changes)


def test_every_variant_is_used():
    assert {training.variant for training in TRAININGS} == set(ablation_runs.VARIANTS)


@pytest.mark.parametrize(
    ("stage", "variant"), sorted({(training.stage, training.variant) for training in TRAININGS})
)
def test_every_variant_has_a_valid_configuration(runs, stage, variant):
    flags = runs._flags(Training(stage, variant=variant, seed=3))
    changes = [flag.removeprefix("--config.") for flag in flags[1:]]
    config = load(flags[0].removeprefix("--config="), [*changes, "model.text_dim=8"])
    share = ablation_runs.SHARES.get(variant, 1.0)
    assert config.seed == 3 and config.train.steps == round(runs.steps[stage] * share)
    assert jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    for field, value in ablation_runs.VARIANTS[variant].items():
        section, name = field.split(".")
        assert getattr(getattr(config, section), name) == value


def test_another_corpus_gives_another_folder(runs, tmp_path):
    (tmp_path / "paraphrases.jsonl").write_text('["a red cross"]\n')
    assert ablation_runs.Runs(str(tmp_path / "out"), str(tmp_path)).folder != runs.folder


def test_the_contrastive_loss_is_minimal_for_matching_pairs():
    eye, scale = np.eye(4, dtype=np.float32), np.float32(np.log(50.0))
    matched = contrastive_text.contrast(3 * eye, eye, scale)
    assert 0 <= matched < 1e-6 < contrastive_text.contrast(eye, eye[::-1], scale)
    alike = contrastive_text.contrast(np.ones((4, 2), np.float32), np.ones((4, 2)), scale)
    np.testing.assert_allclose(alike, np.log(4), rtol=1e-5)


def curve_record(scores, flops):
    """A record with one measure of two seeds per arm."""
    rows = [
        {
            "choice": {"arm": arm},
            "measures": {
                "one object": {"seeds": seeds},
                "U-Net, GFLOP": {"mean": flops[arm][0]},
                "encoder, GFLOP": {"mean": flops[arm][1]},
            },
        }
        for arm, seeds in scores.items()
    ]
    return {"rows": rows}


def test_points_of_a_curve_are_paired_differences_over_added_flops():
    record = curve_record(
        {"larger": [0.75, 0.5], "small": [0.5, 0.25], "none": [0.25, 0.25]},
        {"larger": (1.0, 0.5), "small": (1.0, 0.125), "none": (0.5, 0.0)},
    )
    none, small, larger = ablation_curves.points(record, "small", "one object")
    assert (larger.arm, larger.added, larger.mean, larger.half) == ("larger", 0.375, 0.25, 0.0)
    assert (small.added, small.mean) == (0.0, 0.0)
    assert (none.added, none.mean) == (-0.625, -0.125) and none.half > 1.5  # t(1) = 12.7
    lines = {"encoder_size": [none, small, larger], "unet_size": [small]}
    text = ablation_curves.table({"one object": lines}).splitlines()
    assert text[-2] == "| text encoder | larger | +0.375 | +0.25 ± 0.00 |"
    assert len(text) == 2 + 4


def test_drawbench_compares_arms_by_category():
    scores = {"a": {"Colors": [0.5, 0.25]}, "b": {"Colors": [0.75, 0.5]}}
    assert drawbench_arms.table(scores).splitlines() == [
        "| category | a | b |",
        "|---|---|---|",
        "| Colors | 0.38 ± 1.59 | 0.62 ± 1.59 (+0.25 ± 0.00) |",
    ]


def test_the_image_tower_has_the_size_of_its_images():
    assert contrastive_text.tower_of(32).image_size == 32
