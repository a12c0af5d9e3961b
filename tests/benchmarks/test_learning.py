"""benchmarks/learning.py: scores of a base stage's kept checkpoints, as a table and a chart."""

import pathlib
import sys
import types

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import learning
from ablations import ALL_KINDS, Ablation, tabulate

from imagen_jax.config.schema import Config


def cell(step, seed, exact):
    kinds = {kind: {"exact": {"mean": exact}} for kind in ALL_KINDS}
    return {"arm": step, "seed": seed, "values": {}, "numbers": {"alignment": kinds}}


def test_every_kept_checkpoint_is_scored_in_order_of_steps(tmp_path, monkeypatch):
    run = tmp_path / "demo"
    for name in ("2500", "10000", "5000", "9.tmp"):
        (run / "base" / "checkpoints" / name).mkdir(parents=True)
    (run / "data").mkdir()
    (run / "data" / "prompts_held_out.jsonl").write_text('{"prompt": "a red circle"}\n')
    monkeypatch.setattr(learning, "exported", lambda run, step, out: f"{out}/{run.name}_{step}")
    stage = types.SimpleNamespace(config=Config(seed=7))
    monkeypatch.setattr(learning, "load_stage", lambda folder: stage)
    stage_sets = []

    def run_sweep(cell_sweep, out):
        stage_sets.append(cell_sweep.stage_sets)
        return [{"values": {}}]

    monkeypatch.setattr(learning.sweep, "run", run_sweep)
    cells = list(learning.measure([run], tmp_path, 3))
    assert [(cell["arm"], cell["seed"]) for cell in cells] == [(2500, 7), (5000, 7), (10_000, 7)]
    sr = str(run / "stages" / "sr")
    assert [sets[0].folders for sets in stage_sets] == [
        (f"{tmp_path}/demo_{step}", sr) for step in (2500, 5000, 10_000)
    ]


def test_the_chart_has_a_point_for_every_step_and_intervals_within_0_and_1():
    cells = [cell(step, seed, exact) for step, exact in ((10, 0.2), (20, 0.9)) for seed in (0, 1)]
    cells[-1]["numbers"]["alignment"]["single"]["exact"]["mean"] = 1.0
    rows = tabulate(Ablation({}, {}, ALL_KINDS, 6, learning.MEASURES), cells)
    assert [row["choice"] for row in rows] == [{"arm": 10}, {"arm": 20}]
    found = rows[1]["measures"]["one object"]
    assert found["mean"] == 0.95 and found["mean"] + found["half"] > 1.0
    assert rows[1]["measures"]["order"]["mean"] is None  # No image has the right colours.

    (axes,) = learning.chart(rows).axes
    points = {line.get_label(): len(line.get_xdata()) for line in axes.get_lines()}
    for title, path in learning.MEASURES.items():
        assert points[title] == (2 if "exact" in path else 0)
    ends = [end for bars in axes.collections for bar in bars.get_segments() for _, end in bar]
    assert len(ends) > 0 and min(ends) >= 0 and max(ends) <= 1
