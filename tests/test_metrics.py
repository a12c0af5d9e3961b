"""What a run writes about itself, above all across restarts."""

import json

from imagen_jax import metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_of_steps_that_are_run_again_are_cut_off(tmp_path):
    writer = metrics.MetricWriter(str(tmp_path), 0)
    for step in range(1, 8):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing

    writer = metrics.MetricWriter(str(tmp_path), 5)
    for step in range(6, 10):
        writer.write(step, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    assert [row["loss"] for row in rows(tmp_path)][4:7] == [0.2, 2.0, 2.0]


def test_a_new_run_makes_its_workdir(tmp_path):
    writer = metrics.MetricWriter(str(tmp_path / "a" / "b"), 0)
    writer.write(1, {"loss": 0.5, "grad_norm": float("nan")})
    writer.close()
    (row,) = rows(tmp_path / "a" / "b")
    assert row["step"] == 1 and row["loss"] == 0.5 and row["seconds"] >= 0


def test_progress_counts_pictures_since_the_last_report(monkeypatch):
    clock = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    lines = []
    progress = metrics.Progress(4000, 8, lines.append)
    progress.start(1)
    assert progress.report(21, {"loss": 0.5})["images_per_second"] == 40.0
    assert progress.report(31, {"loss": 0.25}) == {"loss": 0.25, "images_per_second": 80.0}
    assert "step 31/4000" in lines[1] and "loss 0.25" in lines[1] and "6:36 left" in lines[1]
