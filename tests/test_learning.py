"""benchmarks/learning.py: scores of a base stage's kept checkpoints, as a table and a picture."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import learning
from ablations import ROLES, Ablation, tabulate


def cell(step, seed, exact):
    kinds = {kind: {"exact": {"mean": exact}} for kind in ROLES}
    return {"arm": step, "seed": seed, "values": {}, "numbers": {"alignment": kinds}}


def test_checkpoints_in_the_order_of_training(tmp_path):
    for name in ("2500", "10000", "5000", "9.tmp"):
        (tmp_path / "base" / "checkpoints" / name).mkdir(parents=True)
    assert learning.steps_of(tmp_path) == [2500, 5000, 10_000]


def test_the_picture_has_a_point_for_every_step_and_no_impossible_interval():
    cells = [cell(step, seed, exact) for step, exact in ((10, 0.2), (20, 0.9)) for seed in (0, 1)]
    cells[-1]["numbers"]["alignment"]["single"]["exact"]["mean"] = 1.0
    rows = tabulate(Ablation({}, {}, ROLES, 6, learning.MEASURES), cells)
    assert [row["choice"] for row in rows] == [{"arm": 10}, {"arm": 20}]
    found = rows[1]["measures"]["one object"]
    assert found["mean"] == 0.95 and found["mean"] + found["half"] > 1.0
    assert rows[1]["measures"]["order"]["mean"] is None  # No picture had the right colours.

    svg = learning.chart(rows).svg()
    assert svg.count("<circle") == 2 * sum("exact" in path for path in learning.MEASURES.values())
    assert all(title in svg for title in learning.MEASURES)
