"""Prompt files of three kinds, and what is refused."""

import json

import pytest

from imagen_jax.inference import prompts


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_text_file(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeffa red circle\r\n\n  zwei Bälle  \n")
    assert prompts.read(path) == [{"prompt": "a red circle"}, {"prompt": "zwei Bälle"}]


def test_csv_keeps_its_other_columns(tmp_path):
    path = write(tmp_path, "p.csv", 'Category,Prompt\nColors,"a red, round ball"\n')
    assert prompts.read(path) == [{"category": "Colors", "prompt": "a red, round ball"}]


def test_a_quoted_prompt_may_be_blank(tmp_path):
    """Whoever writes it in JSON means it; a blank line of a .txt separates."""
    path = write(tmp_path, "p.jsonl", '{"prompt": " "}\n{"prompt": "\\n"}\n')
    assert prompts.read(path) == [{"prompt": " "}, {"prompt": "\n"}]


def test_the_column_prompt_wins(tmp_path):
    path = write(tmp_path, "p.csv", "prompts,prompt\nmany,one\n")
    assert prompts.read(path) == [{"prompts": "many", "prompt": "one"}]


def test_json_lines_keep_their_other_fields(tmp_path):
    path = write(tmp_path, "p.jsonl", '{"prompt": "x", "kind": {"a": [1]}}\n\n{"prompt": "y"}\n')
    assert prompts.read(path) == [{"prompt": "x", "kind": {"a": [1]}}, {"prompt": "y"}]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.txt", "\n \n", "holds no prompts"),
        ("empty.csv", "", "holds no prompts"),
        ("empty.jsonl", "", "holds no prompts"),
        ("p.csv", "caption\nx\n", "line 2 has no column `prompt`"),
        ("p.csv", "prompt,n\nx,1\n,2\n", "line 3"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", '["x"]\n', "line 1 has no text field `prompt`"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1 has no text field `prompt`"),
        ("p.jsonl", '{"prompt": ""}\n', "line 1"),
        ("zero_width.txt", "\u200b\n\u2060 \n", "holds no prompts"),
        ("p.csv", 'prompt\n"a\nb\n', "a quote that is never closed"),
        ("p.xlsx", "x", "must end in .txt, .csv, .jsonl"),
    ],
)
def test_what_is_refused(tmp_path, name, text, says):
    with pytest.raises(prompts.PromptError, match=name) as error:
        prompts.read(write(tmp_path, name, text))
    assert says in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(prompts.PromptError, match="no such file"):
        prompts.read(str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "mac_roman"]
)
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_the_encoding_is_detected(tmp_path, kind, encoding):
    texts = ["deux crêpes à la plage", "un café, l’été", "a plain circle"]
    lines = {
        "txt": texts,
        "csv": ["prompt", *(f'"{text}"' for text in texts)],
        "jsonl": [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts],
    }[kind]
    path = write(tmp_path, f"p.{kind}", "\n".join(lines), encoding)
    assert [row["prompt"] for row in prompts.read(path)] == texts


@pytest.mark.parametrize("encoding", ["cp1251", "koi8_r"])
def test_russian_lines_among_utf8(tmp_path, encoding):
    texts = ["красный круг на синем фоне", "кошка сидит на окне", "большая собака"]
    data = "\n".join(texts).encode(encoding) + "\nein Bär\n".encode()
    (tmp_path / "p.txt").write_bytes(data)
    log = []
    found = [row["prompt"] for row in prompts.read(str(tmp_path / "p.txt"), log.append)]
    assert found == [*texts, "ein Bär"]
    assert log == [f"--prompts={tmp_path}/p.txt: 3 read in {encoding}, such as {texts[0]!r}"]


SKIPPED = {
    "half.jsonl": (b'{"prompt": "a \\ud800 b"}\n', "line 1: a prompt with an unpaired surrogate"),
    "nul.jsonl": (b'{"prompt": "a\\u0000b"}\n', "line 1: a prompt with a NUL"),
    "nul.csv": (b"prompt\na\0b\n", "line 2: a prompt with a NUL"),
    "cut.txt": ("красный круг".encode()[:-1] + b"\n", "line 1: a prompt with damaged UTF-8"),
    "half.txt": (b"half of \xed\xa0\xbd\n", "line 1: a prompt with an unpaired surrogate"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_prompt_that_is_no_text_is_skipped_and_named(tmp_path, name):
    data, says = SKIPPED[name]
    more = {"jsonl": b'{"prompt": "a red circle"}', "csv": b"a red circle", "txt": b"a red circle"}
    path = tmp_path / name
    path.write_bytes(data + more[name.rpartition(".")[2]])
    log = []
    assert prompts.read(str(path), log.append) == [{"prompt": "a red circle"}]
    assert len(log) == 1 and says in log[0] and log[0].endswith("is skipped")
    path.write_bytes(data)
    with pytest.raises(prompts.PromptError, match="holds no prompts that can be used"):
        prompts.read(str(path))


@pytest.mark.parametrize("length", [131_071, 131_072, 140_000, 3_000_000])
def test_fields_of_any_length(tmp_path, length):
    path = write(tmp_path, "p.csv", "prompt,n\n" + "r" * length + ",1\n")
    assert prompts.read(path) == [{"prompt": "r" * length, "n": "1"}]


def test_a_row_with_too_many_fields_is_not_cut(tmp_path):
    path = write(tmp_path, "p.csv", "prompt,n\na red, round ball,1\na ball,2\n")
    log = []
    assert prompts.read(path, log.append) == [{"prompt": "a ball", "n": "2"}]
    assert "3 fields under a header of 2" in log[0]


def test_seeds_of_rows(tmp_path):
    rows = [{"prompt": "x", "seed": 7}, {"prompt": "y"}, {"prompt": "z", "seed": None}]
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    expected = [{"prompt": "x", "seed": 7}, {"prompt": "y"}, {"prompt": "z"}]
    assert prompts.read(path) == expected
    path = write(tmp_path, "p.csv", "prompt,seed\nx, 7\ny,\n")
    assert prompts.read(path) == expected[:2]
    for wrong in ("-1", "1.5", "many", "4294967296", "²"):
        path = write(tmp_path, "p.csv", f"prompt,seed\nx,{wrong}\n")
        with pytest.raises(prompts.PromptError, match="line 2 has seed=.*0 to 4294967295"):
            prompts.read(path)


def test_a_flag_that_is_not_utf8():
    with pytest.raises(prompts.PromptError, match="--prompt='a caf.udce9' is not UTF-8"):
        prompts.check(b"a caf\xe9".decode("utf-8", "surrogateescape"), "--prompt")
    assert prompts.check("a café", "--prompt") == "a café"
