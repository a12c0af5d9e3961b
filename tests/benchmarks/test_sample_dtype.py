"""benchmarks/sample_dtype.py: what it prints of marks, and a run that goes on."""

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import sample_dtype


def test_the_summary_has_the_paired_difference():
    """Of 100 prompts 4 are worse and 1 is better; the interval is Bonett & Price's."""
    exact = [True] * 60 + [False] * 40
    other = [False] * 4 + [True] * 57 + [False] * 39
    lines = sample_dtype.summary({"float32": exact, "bfloat16": other}).splitlines()
    # One pseudo-prompt in favour of each: 5 worse, 2 better of 102.
    mean, second = -3 / 102, 7 / 102
    half = 1.96 * ((second - mean**2) / 102) ** 0.5
    low, high = 100 * (mean - half), 100 * (mean + half)
    assert lines[0].startswith("float32: 60.0 % exact [")
    assert lines[1].startswith("bfloat16: 57.0 % exact [")
    assert lines[2] == (
        f"bfloat16 - float32: -3.0 points [{low:+.1f}, {high:+.1f}] over 100 prompts, 5 of which "
        "differ"
    )


class Constant:
    """A cascade whose images say which dtype and which prompts they are of."""

    def __init__(self, seen):
        self.configs, self.seen = [type("Named", (), {"name": "base"})], seen

    def sample(self, texts, *, prompt_indices, stage_settings, **_):
        dtype = stage_settings["base"]["dtype"]
        self.seen.append((dtype, list(prompt_indices), texts))
        return np.full((len(texts), 2, 2, 3), 1 if dtype == "float32" else 0, np.uint8)


@pytest.mark.parametrize("done", [0, 40])
def test_a_run_goes_on_where_it_was(done, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": str(number)} for number in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    monkeypatch.setattr(sample_dtype.Cascade, "load", lambda stages: Constant(seen))
    exact = lambda image, row: {"exact": image.max() == 1}  # noqa: E731
    monkeypatch.setattr(sample_dtype.alignment, "score", exact)
    if done:
        kept = {"float32": [True] * done, "bfloat16": [True] * done}
        (tmp_path / "marks.json").write_text(json.dumps(kept))
    flags = ["x", "--stages=a", f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", flags)
    sample_dtype.main()
    both = ("float32", "bfloat16")
    expected = [
        (d, i) for s in (0, 40) if s >= done for i in [[*range(60)][s : s + 40]] for d in both
    ]
    assert [(dtype, indices) for dtype, indices, _ in seen] == expected
    assert all(texts == list(map(str, indices)) for _, indices, texts in seen)
    wrong = 60 - done
    assert f"over 60 prompts, {wrong} of which differ" in capsys.readouterr().out
