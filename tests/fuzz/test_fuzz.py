"""Hostile files: mutations of valid ones through every reader, in a process of their own."""

import json
import subprocess
import sys

import pytest

MEMORY_MB = 512  # Growth of one reader's peak; files and images here have some kilobytes.


def fuzz(*arguments: str, timeout: float) -> dict:
    """The report of tests/fuzz/run.py."""
    command = [sys.executable, "-m", "tests.fuzz.run", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert found.stdout.startswith("{"), found.stderr[-3000:]
    return json.loads(found.stdout)


def check(report: dict, count: int) -> None:
    assert report["faults"] == []
    assert report["children"] == []
    assert len(report["readers"]) >= 20
    for name, found in report["readers"].items():
        assert found["inputs"] == count
        assert found["past_header"] >= 0.3, name
        assert found["slowest_s"] < 20, name
        assert found["memory_mb"] < MEMORY_MB, name


def test_some_hundred_inputs_per_reader():
    check(fuzz("--count=200", timeout=300), 200)


@pytest.mark.slow
def test_ten_thousand_inputs_per_reader(capsys):
    """Prints the report with the branches that were taken; about ten minutes on one core."""
    report = fuzz("--count=10000", "--seed=1", "--coverage", timeout=7200)
    with capsys.disabled():
        print(json.dumps(report, indent=1))
    check(report, 10_000)


def test_the_harness_sees_a_child_process_and_an_unexpected_error(tmp_path):
    """The checks can fail: a reader that starts a process and one that raises."""
    script = """
import dataclasses, json, os, pathlib, subprocess, sys
from tests.fuzz import readers, run

def start(path):
    subprocess.run(["true"])
    return True

def fail(path):
    if path.read_bytes() != b"x" * 100:
        raise RuntimeError("unexpected")
    return True

seeds = [b"x" * 100]
readers.readers = lambda folder: {
    "start": readers.FileReader(seeds, start, ()), "fail": readers.FileReader(seeds, fail, ())
}
sys.argv = ["run", "--count=3"]
sys.exit(run.main())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    report = json.loads(found.stdout)
    assert found.returncode == 1
    assert "subprocess.Popen" in report["children"]
    assert all("RuntimeError: unexpected" in fault for fault in report["faults"])
    assert report["faults"]
