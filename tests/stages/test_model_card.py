"""The model card of a stage folder, and the copy of a small text encoder."""

import dataclasses
import json

import pytest

from imagen_jax.config.text import TextConfig
from imagen_jax.evaluation import report
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.stages import folder, model_card

ALIGNMENT = {
    "kinds": {
        "single": {
            "scores": {"exact": {"mean": 0.72, "low": 0.64, "high": 0.8, "n": 120}},
            "ceiling": {"exact": {"mean": 1.0}},
            "chance": {"exact": {"mean": 0.06}},
        }
    }
}


def test_the_card_has_a_row_per_known_fact(base_config, tmp_path):
    rows = [
        {"step": 10, "loss": 0.5, "x0_mse": 0.25, "skipped": 0.0},
        {"step": 20, "loss": 0.125, "x0_mse": 0.0625, "skipped": 3.0, "images_per_second": 9.0},
        {"step": 20, "goodput": 0.9},
        {"step": 30, "loss": 0.01},
    ]
    lines = [json.dumps(row) for row in rows] + ['{"step": 40, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "alignment.json").write_text(json.dumps(ALIGNMENT))
    (tmp_path / "fid.json").write_text('{"card": "fid30k", "fid": 12.25, "zero_shot": true}')
    cards = [str(tmp_path / name) for name in ("alignment.json", "fid.json")]
    text = TextConfig(path="text/", fingerprint="0123abcd")
    card = model_card.format_card(
        dataclasses.replace(base_config, text=text),
        step=25,
        average="moving average",
        params={"a": [1.0, 2.0, 3.0]},
        metrics=model_card.last_metrics(str(tmp_path), 25),
        licence="mine | not\nyours",
        scores=report.score_tables(cards),
    )
    for line in (
        "| output | 8x8 pixels |",
        "| parameters | 3 (float32, moving average) |",
        "| trained for | 25 steps of 4 images |",
        "| last report | step 20: loss 0.125, x0_mse 0.0625, skipped 3 |",
        "| text encoder | t5 `text/`, fingerprint 0123abcd |",
        "| sampling | ddim, 4 steps, guidance weight 2, dynamic thresholding |",
        "| licence | mine \\| not yours |",
        "| single | 0.72 | 0.64-0.80 | 1.00 | 0.06 | 120 |",
        "| 12.25 | zero-shot |",
    ):
        assert line in card.splitlines(), (line, card)
    assert model_card.last_metrics(str(tmp_path), 5) is None
    assert model_card.last_metrics(str(tmp_path / "none"), 5) is None

    (tmp_path / "other.json").write_text('{"card": "tarot"}')
    with pytest.raises(EvaluationError, match="tarot"):
        report.score_tables([str(tmp_path / "other.json")])
    bare = model_card.format_card(base_config, step=1, average="average", params={})
    assert "| licence | not stated |" in bare and "last report" not in bare and "##" not in bare


@pytest.fixture
def encoder(tmp_path):
    source = tmp_path / "encoder"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "spiece.model", "optimizer.bin"):
        (source / name).write_text(name)
    return source


def test_a_small_encoder_is_copied(encoder, base_config, random_params, tmp_path):
    stage = tmp_path / "stage"
    config = dataclasses.replace(base_config, text=TextConfig(path=str(encoder)))
    folder.write_stage(stage, random_params(config), config, {})
    assert folder.copy_encoder(config.text, stage).path == "text/"
    copied = {"config.json", "model.safetensors", "spiece.model"}
    assert {file.name for file in (stage / "text").iterdir()} == copied
    moved = stage.rename(tmp_path / "moved")
    assert folder.load_stage(str(moved)).config.text.path == str(moved / "text")


def test_of_a_large_encoder_only_the_vocabulary_is_copied(encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "MAX_COPIED_ENCODER_BYTES", 20)
    text = TextConfig(path=str(encoder))
    stage = tmp_path / "stage"
    stage.mkdir()
    assert folder.copy_encoder(text, stage) == text
    assert [file.name for file in (stage / "text").iterdir()] == ["spiece.model"]
    for path in ("", "gs://bucket/t5", str(tmp_path / "none")):
        assert folder.encoder_files(TextConfig(path=path)) == {}
