"""`evaluate drawbench` and `rate_build` on a tiny stage."""

import json

import pytest

from imagen_jax.cli import main
from imagen_jax.config import overrides
from imagen_jax.inference import cascade
from imagen_jax.interop import weights
from tests.reference.fake_encoder import FakeEncoder


@pytest.fixture
def stage_folder(base_config, random_params, tmp_path, monkeypatch):
    folder = tmp_path / "stage"
    folder.mkdir()
    flat = weights.flatten(random_params(base_config))
    weights.write_safetensors(folder / "params.safetensors", flat)
    (folder / "config.json").write_text(overrides.to_json(base_config))
    monkeypatch.setattr(cascade, "load_text_encoder", lambda config: FakeEncoder())
    return folder


def test_from_a_csv_to_a_page(stage_folder, tmp_path, capsys):
    csv = tmp_path / "prompts.csv"
    csv.write_text('Prompts,Category\n"A red, wet dog.",Colors\nTwo cats.,Counting \n')
    for seed in (0, 1):
        flags = [f"--prompts={csv}", f"--stages={stage_folder}", f"--out={tmp_path / str(seed)}"]
        assert main.main(["evaluate", "drawbench", *flags, f"--seed={seed}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "0" / "samples.jsonl").open()]
    assert [row["sample_index"] for row in rows] == [*range(8), *range(8)]
    assert {row["category"] for row in rows} == {"Colors", "Counting"}
    sheets = sorted(path.name for path in (tmp_path / "0" / "sheets").iterdir())
    assert sheets == ["colors.png", "counting.png"]
    folders = [f"--samples_a={tmp_path / '0'}", f"--samples_b={tmp_path / '1'}"]
    out = tmp_path / "study"
    flags = ["--study=drawbench", *folders, f"--out={out}", "--names=before,after"]
    assert main.main(["evaluate", "rate_build", *flags]) == 0
    assert "12 items, 10 of them controls" in capsys.readouterr().out
    assert len(list((out / "page" / "pictures").iterdir())) == 12 * 16
    assert main.main(["evaluate", "rate_build", *flags[:-1], "--names=a"]) == 1
    assert "must be 2 names" in capsys.readouterr().err


def test_rows_with_objects_are_scored(stage_folder, tmp_path, capsys):
    thing = {"shape": "circle", "color": "red", "size": None}
    content = {"kind": "single", "objects": [thing], "relation": None}
    rows = [{"prompt": f"{c} circle", "category": c, **content} for c in ("Colors", "Rare Words")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--stages={stage_folder}"]
    out = tmp_path / "samples"
    assert main.main(["evaluate", "drawbench", *flags, f"--out={out}"]) == 0
    card = json.loads((out / "alignment.json").read_text())
    assert card["pictures"] == 16 and [*card["kinds"]] == ["Colors", "Rare Words", "all"]
    assert card["kinds"]["Colors"]["scores"]["exact"]["mean"] == 0  # Random weights give noise.
    assert "Rare Words  exact" in capsys.readouterr().out
