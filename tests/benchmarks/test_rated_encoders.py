"""benchmarks/rated_encoders.py: its choice of prompts, its pages and its table."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import numpy as np
import rated_encoders

from imagen_jax.evaluation.raters import build
from imagen_jax.io import images


def test_as_many_prompts_of_each_file_and_no_keywords(tmp_path):
    kinds = {"names": ["alias", "keyword", "flag"] * 20, "combinations": ["combination"] * 50}
    for name, of in kinds.items():
        rows = [json.dumps({"prompt": f"{name} {i}", "kind": kind}) for i, kind in enumerate(of)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    chosen = rated_encoders.choose([str(tmp_path / f"{name}.jsonl") for name in kinds])
    assert len({row["prompt"] for row in chosen}) == 60
    assert [row["category"] for row in chosen] == ["other names"] * 30 + ["combinations"] * 30
    assert "keyword" not in {row["kind"] for row in chosen}
    assert chosen[29]["prompt"] == "names 59" and chosen[-1]["prompt"] == "combinations 49"


def write_samples(folder: pathlib.Path, level: int) -> str:
    folder.mkdir()
    lines = []
    for i in range(8):
        images.save_png(folder / f"{i:05d}_00.png", np.full((8, 8, 3), level, np.uint8), {})
        row = {"prompt": f"p{i}", "category": "other names", "file": f"{i:05d}_00.png"}
        lines.append(json.dumps({**row, "prompt_index": i, "sample_index": 0}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_the_table_joins_two_passes_of_a_rater(tmp_path):
    """The rater prefers A by quality, twice; by alignment A once, then B."""
    folders = [write_samples(tmp_path / name, level) for name, level in (("a", 9), ("b", 200))]
    found = []
    for number in rated_encoders.PASSES:
        out = tmp_path / f"pass_{number}"
        key = build.build(
            folders[0], folders[1:], str(out), study="drawbench", names=["a", "b"], seed=number
        )
        answers = []
        for index, item in enumerate(key["items"]):
            for question in key["questions"]:
                letter = "B" if number == 2 and question == "alignment" else "A"
                side = (
                    item["control"].get(question)
                    or ("left", "right")[item["of"].index(letter) if item["of"] else 0]
                )
                answers.append({"item": index, "question": question, "answer": side})
        result = {"study": key["id"], "rater": "r", "saved": "2026-01-01T00:00:00Z"}
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({**result, "answers": answers}))
        found.append(rated_encoders.preferences(out / "key.json", str(file)))
    lines = rated_encoders.table(["a", "b"], found).splitlines()
    assert lines[2].startswith("| fidelity | all | 8 | 100% | 0% | 0% | +1.00 [")
    assert lines[2].endswith("| 100% |")
    assert lines[4].startswith("| alignment | all | 8 | 50% | 0% | 50% | +0.00 [")
    assert lines[4].endswith("| 0% |")
