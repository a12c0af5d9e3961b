"""metrics.jsonl across restarts, throughput, goodput and peak FLOP/s."""

import contextlib
import json

import pytest

from imagen_jax.training import metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_restart_removes_rows_after_the_restored_step(tmp_path):
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


def test_a_new_run_creates_its_workdir(tmp_path):
    writer = metrics.MetricWriter(str(tmp_path / "a" / "b"), 0)
    writer.write(1, {"loss": 0.5, "grad_norm": float("nan")})
    writer.close()
    (row,) = rows(tmp_path / "a" / "b")
    assert row["step"] == 1 and row["loss"] == 0.5 and row["seconds"] >= 0


def test_progress_counts_images_since_the_last_report(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    lines, timer = [], metrics.Timer()

    def spend(seconds: float, kind: str | None = None) -> None:
        with timer.measure(kind) if kind else contextlib.nullcontext():
            now[0] += seconds

    spend(30.0, "start")
    progress = metrics.Progress(4000, 8, timer, lines.append)
    progress.start(1, flops=2e12, devices=4, device_kind="TPU v4")
    spend(3.0)
    spend(1.0, "data")
    spend(5.0, "save")
    first = progress.report(21, {"loss": 0.5, "loss/logsnr_0_2": 0.25})
    # 20 steps in the 4 s that are not spent on saving, 1 s of them waiting for data.
    assert first["images_per_second"] == 40.0 and first["images_per_second_per_chip"] == 10.0
    assert first["tflops_per_chip"] == 10.0 and first["data_wait"] == 0.25
    assert first["mfu"] == pytest.approx(10 / 275, rel=1e-5)
    assert "step 21/4000" in lines[0] and "loss 0.5 " in lines[0] and "logsnr" not in lines[0]
    assert "MFU 4%" in lines[0] and "29:50 left" in lines[0]
    spend(1.0)
    assert progress.report(31, {"loss": 0.25})["images_per_second"] == 80.0
    assert timer.summary() == {"step": 4.0, "start": 30.0, "data": 1.0, "save": 5.0}
    line = metrics.goodput(timer.summary())
    assert line == "goodput 10% of 0:40: data 0:01, save 0:05, start 0:30, step 0:04"
