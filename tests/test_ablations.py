"""Tables of benchmarks/ablations.py: means and intervals over seeds, and paired differences."""

import pathlib
import sys

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import ablation_runs
import ablations
from ablation_runs import Training

ABLATION = ablations.Ablation(
    {"off": {}, "on": {}},
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


def test_rows_have_students_interval_over_the_seeds(rows):
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


def test_differences_are_paired_by_seed_and_only_from_the_arm_compared_with(rows):
    assert rows[0]["differences"] == {}
    np.testing.assert_allclose(rows[1]["differences"]["right"]["seeds"], [0.2, 0.3, 0.1])
    np.testing.assert_allclose(rows[2]["differences"]["right"]["seeds"], [0.1, 0.2, 0.0])
    # Pairing takes what the seeds share out: the interval is narrower than that of the values.
    paired, alone = (rows[1][part]["right"]["half"] for part in ("differences", "measures"))
    assert paired < alone


def test_what_was_not_asked_in_any_picture_is_left_out(rows):
    order = rows[0]["measures"]["order"]
    assert order == {"seeds": [0.5, None, None], "mean": 0.5, "half": None}
    assert rows[1]["differences"]["order"]["seeds"] == [0.25, None, None]
    assert ablations.summary([None, None]) == {"seeds": [None, None], "mean": None, "half": None}
    table = ablations.format_table(rows).splitlines()
    assert table[0] == "| arm | sr.aug_level | right | order | distance |"
    assert table[2].startswith("| off | 0 | 0.40 ± 0.43 | 0.50 | 2.000 ± 0.000 |")
    assert "(+0.20 ± 0.25)" in table[3] and "(+0.25)" in table[3]


def test_arms_differ_in_what_they_are_named_for_and_in_nothing_else():
    for name, ablation in ablations.ABLATIONS.items():
        assert ablation.against.get("arm", "small") in ablation.grids
        pairs = {arm: ablations.arm_of(name, arm, 1) for arm in ablation.grids}
        assert len(set(pairs.values())) == len(pairs)
        for base, sr in pairs.values():
            assert (base.stage, base.seed, sr.stage, sr.encoder) == ("base", 1, "sr", base.encoder)
            if name != "encoder_size":
                assert base.encoder == "small" and sr.seed == 1
    off, on = (ablations.arm_of("noise_conditioning", arm, 2) for arm in ("off", "on"))
    assert off[0] == on[0] and off[1] == on[1]._replace(augmented=False)


def test_trainings_that_differ_have_names_that_do():
    every = [
        Training(stage, encoder, seed, augmented)
        for stage in ("base", "sr")
        for encoder in ablation_runs.ENCODERS
        for seed in (0, 1)
        for augmented in (True, False)
    ]
    assert len({training.name for training in every}) == len(every)
