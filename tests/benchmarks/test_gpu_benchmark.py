"""benchmarks/gpu.py: results of parts that fail or are cut off, and what is run again."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import gpu

ROW = {"program": "train", "batch": 2, "seconds": {"median": 0.5}, "images_per_s": 4.0}


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Writes a script in place of a benchmark; returns its part."""

    def make(source, name="train base_64 64"):
        (tmp_path / "script.py").write_text(source)
        return gpu.Part(name, ("script.py",), instead="train base_64 ")

    monkeypatch.setattr(gpu, "HERE", tmp_path)
    return make


def printing(**values):
    return f"print({json.dumps(values)!r}, flush=True)\n"


def test_what_a_part_printed_before_its_time_was_over_is_kept(part, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", 2)
    source = printing(rows=[ROW], complete=False) + "print('# train: timing')\n"
    source += "print('{\"rows\": [', end='', flush=True)\nimport time\ntime.sleep(60)\n"
    found = gpu.run(part(source), 100.0)
    assert found["rows"] == [ROW] and not gpu.is_complete(found)
    assert found["failed"] == "took more than 2 s: # train: timing"


def test_a_part_that_fails_says_why(part):
    found = gpu.run(part("raise SystemExit('out of memory')"), 100.0)
    assert found["failed"] == "out of memory" and not gpu.is_complete(found)
    found = gpu.run(part("pass"), 100.0)
    assert found["failed"] == "no output" and not gpu.is_complete(found)


def test_a_part_is_untuned_beside_the_flags_of_the_user(part, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    source = "import os, json\nprint(json.dumps({'rows': [os.environ['XLA_FLAGS']]}))\n"
    assert gpu.run(part(source), 100.0)["rows"] == ["--xla_dump_to=x --xla_gpu_autotune_level=0"]


def test_smaller_batches_are_tried_until_one_fits_and_results_stay(
    part, tmp_path, monkeypatch, capsys
):
    counter = "import pathlib, sys\npathlib.Path('ran').open('a').write('x')\n"
    counter = counter.replace("'ran'", repr(str(tmp_path / "ran")))
    fails = part(counter + "sys.exit('does not fit')", "train base_64 64")
    (tmp_path / "script.py").rename(tmp_path / "fails.py")
    fits = part(counter + printing(rows=[ROW], complete=True), "train base_64 32")
    parts = [fails._replace(command=("fails.py",)), fits, fits._replace(name="train base_64 16")]
    monkeypatch.setattr(gpu, "parts_of", lambda out, tiny: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={tmp_path}/gpu.json"])
    for _ in range(2):
        gpu.main()
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert found["train base_64 64"]["failed"] == "does not fit"
        assert found["train base_64 32"]["rows"] == [ROW] and len(found) == 2
        assert (tmp_path / "ran").read_text() == "xx"
    assert "| train base_64 32 | train | 2 | 0.5 | 4 | - | - | 27.4 | 87 |" in (
        capsys.readouterr().out
    )


def test_models_are_those_of_the_published_figures():
    parts = [part for part in gpu.parts_of(pathlib.Path("gpu.json"), False) if part.instead]
    assert {part.name.split()[1] for part in parts} == {model.config for model in gpu.MODELS}
    # The goal is the published figure times the ratio of the peaks, H200 to A100.
    for model in gpu.MODELS:
        assert model.goal == pytest.approx(model.published * 989 / 312, rel=0.01)
