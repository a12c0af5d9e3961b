"""benchmarks/predicted_times.py: the table of a folder, and one program from start to end."""

import json
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import predicted_times

from imagen_jax.parallel.peaks import Peaks

SOURCE = pathlib.Path(__file__).parents[2]
# A product [1000, 500] x [500, 2000], 2 GFLOP.
PROGRAM = """HloModule product

ENTRY %main (x: f32[1000,500], y: f32[500,2000]) -> f32[1000,2000] {
  %x = f32[1000,500]{1,0} parameter(0)
  %y = f32[500,2000]{1,0} parameter(1)
  ROOT %z = f32[1000,2000]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_the_table_is_of_the_best_peaks(tmp_path, capsys):
    slow = Peaks(flops=1e9, hbm=1e12, ici=1.0, dcn=1.0, start=0.5)
    fast = slow._replace(flops=2e9, hbm=1e11, start=1.0)
    (tmp_path / "peaks.json").write_text(json.dumps([slow._asdict(), fast._asdict()]))
    row = {"config": "a.py:base", "program": "forward", "batch": 3, "steps": 1}
    for number, measured in ((0, 1.8), (4, 3.0)):
        (tmp_path / f"{number}.json").write_text(json.dumps(row | {"measured": measured}))
        (tmp_path / f"{number}.hlo").write_text(PROGRAM)
    predicted_times.report(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    # 2 GFLOP at 2 GFLOP/s and half a second.
    assert lines[2] == "| a.py:base forward | 3 | 1.5 | 100% | 1.8 | 1.2 |"
    assert lines[3].endswith("| 3 | 2 |")
    assert lines[4].startswith("1 of 2 within a factor of 1.5")


@pytest.mark.slow
def test_a_program_is_measured_once(tmp_path):
    command = [sys.executable, "benchmarks/predicted_times.py", "--repeats=1", f"--out={tmp_path}"]
    run = [*command, "--only=0"]
    first = subprocess.run(run, cwd=SOURCE, capture_output=True, text=True, check=True)
    again = subprocess.run(run, cwd=SOURCE, capture_output=True, text=True, check=True)
    assert "'measured'" in first.stdout and "'measured'" not in again.stdout
    table = [line for line in first.stdout.splitlines() if line.startswith("| shapes.py:base")]
    assert len(table) == 1 and table[0] in again.stdout
