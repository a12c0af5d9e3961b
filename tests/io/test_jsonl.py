"""Lines end at line feeds only; other Unicode line separators are ordinary characters of JSON."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.data.sources.registry import open_source
from imagen_jax.evaluation import samples
from imagen_jax.inference import prompts
from imagen_jax.io import jsonl
from imagen_jax.stages import model_card
from imagen_jax.training import metrics, text_corpus

# What `str.splitlines` splits at and JSON allows unescaped within a string.
UNESCAPED = "\x85\u2028\u2029"
# What else it splits at; JSON requires an escape for these, plain text does not.
CONTROLS = "\x0b\x0c\x1c\x1d\x1e"
TEXTS = [f"a red circle,{mark}a blue square" for mark in UNESCAPED]
ESCAPED = [f"a red circle,{mark}a blue square" for mark in CONTROLS]


def dump(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: pathlib.Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lines_and_their_numbers(tmp_path, end, encoding):
    rows = [{"a": "é"}, 1.5, ["x\u2028"], "\x85"]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = end.join([lines[0], "", " \t", *lines[1:]])
    expected = list(zip((1, 4, 5, 6), rows, strict=True))
    for last in ("", end):
        path = write(tmp_path / "a.jsonl", text + last, encoding)
        assert list(jsonl.read(path)) == expected
        assert list(jsonl.read(tmp_path / "a.jsonl")) == expected


@pytest.mark.parametrize("bad", ["{", "a\u2028b", '{"a": 1} {"a": 2}', "9" * 5000, "[" * 100_000])
def test_a_line_that_is_not_json(tmp_path, bad):
    path = write(tmp_path / "a.jsonl", f"[1]\n\n{bad}\n[2]")
    with pytest.raises(jsonl.JsonLinesError, match=r"a\.jsonl line 3 is not JSON") as error:
        list(jsonl.read(path))
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300 + len(path)
    assert list(jsonl.read(path, default=None)) == [(1, [1]), (3, None), (4, [2])]


def test_reading_is_lazy_and_keeps_undecodable_bytes_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'["a"]\n["\xff"]\n')
    assert next(iter(jsonl.read(path))) == (1, ["a"])
    with pytest.raises(UnicodeDecodeError):
        list(jsonl.read(path))
    assert list(jsonl.read(path, errors="replace")) == [(1, ["a"]), (2, ["\ufffd"])]


def test_plain_text_splits_at_the_three_line_ends_of_files():
    text = f"a{UNESCAPED}{CONTROLS}b\nc\r\nd\re\n\nf"
    expected = [f"a{UNESCAPED}{CONTROLS}b", "c", "d", "e", "", "f"]
    for last in ("", "\n", "\r\n", "\r"):
        assert jsonl.split_lines(text + last) == expected
    assert jsonl.split_lines("") == []
    assert jsonl.split_lines("\n") == [""]


def test_prompts_jsonl(tmp_path):
    path = write(tmp_path / "p.jsonl", dump({"prompt": text} for text in [*TEXTS, *ESCAPED]))
    assert [row["prompt"] for row in prompts.read(path)] == [*TEXTS, *ESCAPED]
    path = write(tmp_path / "q.jsonl", '{"prompt": "a"}\n\u2028\na\u2028b\n')
    with pytest.raises(prompts.PromptError, match=r"--prompts=.*q\.jsonl: line 3 is not JSON"):
        prompts.read(path)


def test_prompts_txt_and_csv(tmp_path):
    path = write(tmp_path / "p.txt", "\n".join([*TEXTS, *ESCAPED]) + "\r\nlast\rvery last")
    expected = [*TEXTS, *ESCAPED, "last", "very last"]
    assert [row["prompt"] for row in prompts.read(path)] == expected
    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([text] for text in [*TEXTS, *ESCAPED])])
    assert [r["prompt"] for r in prompts.read(str(tmp_path / "p.csv"))] == [*TEXTS, *ESCAPED]


def test_captions_of_a_folder(tmp_path):
    texts = [*TEXTS, *ESCAPED]
    rng = np.random.default_rng(0)
    for index in range(len(texts) + 1):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    rows = ({"file_name": f"{index}.png", "text": text} for index, text in enumerate(texts))
    write(tmp_path / "metadata.jsonl", dump(rows))
    write(tmp_path / f"{len(texts)}.txt", "\n".join(texts))
    source = open_source(DataConfig(kind="folder", path=str(tmp_path), caption_lines=True))
    assert source.report.rejected == []
    assert [source.captions(i) for i in range(len(texts))] == [(text,) for text in texts]
    assert source.captions(len(texts)) == tuple(texts)


def test_samples_jsonl(tmp_path):
    rows = [{"file": "0.png", "prompt": text} for text in [*TEXTS, *ESCAPED]]
    write(tmp_path / "samples.jsonl", dump(rows))
    assert samples.read_rows(tmp_path) == rows
    write(tmp_path / "samples.jsonl", dump(rows) + "\u2028\na\u2028\n")
    with pytest.raises(samples.EvaluationError, match=r"samples\.jsonl line 10 must be JSON"):
        samples.read_rows(tmp_path)


def test_text_corpus(tmp_path):
    groups = [[text, "the same"] for text in [*TEXTS, *ESCAPED]]
    path = write(tmp_path / "corpus.jsonl", dump(groups), "utf-8-sig")
    assert text_corpus.read(path, 100) == groups
    assert text_corpus.read(path, 2) == groups[:2]


def test_metrics_jsonl(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 0.5, "note": text} for step, text in enumerate(TEXTS, 1)]
    write(path, dump(rows) + '{"step": 4, "lo')
    assert model_card.last_metrics(str(tmp_path), 2) == rows[1]
    metrics.MetricWriter(str(tmp_path), 2).close()
    assert [row for _, row in jsonl.read(path)] == rows[:2]
