"""Prompt files of three kinds, and what is refused."""

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
        ("p.xlsx", "x", "must end in .txt, .csv, .jsonl"),
    ],
)
def test_what_is_refused(tmp_path, name, text, says):
    with pytest.raises(prompts.PromptError, match=name) as error:
        prompts.read(write(tmp_path, name, text))
    assert says in str(error.value)


def test_missing_and_not_utf8(tmp_path):
    with pytest.raises(prompts.PromptError, match="no such file"):
        prompts.read(str(tmp_path / "nothing.txt"))
    with pytest.raises(prompts.PromptError, match="UTF-8"):
        prompts.read(write(tmp_path, "latin.txt", "Bälle", "latin-1"))
