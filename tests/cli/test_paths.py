"""Paths on the command line: ~, commas, schemes, nothing at all; in every flag that holds one."""

import argparse
import importlib
import keyword
import os

import pytest

from imagen_jax.cli import main, path_flags

# Flags that hold a text.
TEXTS = {"prompt", "negative_prompt", "stage_settings", "grid", "title", "name", "names", "licence"}
TEXTS |= {"topology", "host", "scorer", "splits", "allow_changes", "marks"}
TEXTS |= {"match", "by", "credit", "class_prompt", "hosts", "origins", "prefix"}
TEXTS |= {"beam_options", "classes"}


def actions(verb: str) -> list[argparse.Action]:
    """The flags of a verb and of its subcommands."""
    file = f"{verb}_" if keyword.iskeyword(verb) else verb
    parser = argparse.ArgumentParser()
    importlib.import_module(f"imagen_jax.cli.{file}").add_arguments(parser)
    found, parsers = [], [parser]
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.option_strings:
                found.append(action)
    return found


def test_every_flag_that_holds_a_path_has_the_type_of_one():
    types = {path_flags.flag, path_flags.required_flag, path_flags.flag_list, path_flags.address}
    types |= {path_flags.input_flag, path_flags.required_input, path_flags.input_list}
    types |= {path_flags.output_flag, path_flags.required_output, path_flags.adapter_list}
    seen = 0
    for verb in main.VERBS:
        for action in actions(verb):
            holds_text = action.nargs != 0 and action.type is None and not action.choices
            if holds_text and action.dest not in TEXTS:
                raise AssertionError(f"{verb} {action.option_strings[0]} has no type of a path")
            seen += action.type in types
    assert seen > 40


@pytest.mark.parametrize("text", ["~/x", "~", "~/a,b", "~/x/../y"])
def test_the_home_folder_after_an_equals_sign(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_flags.flag(text) == str(tmp_path) + text[1:]
    command = ["sample", "--stages=~/a,~/b", "--prompt=~/kept", f"--out={text}"]
    _, flags = main.parse(command)
    assert flags.out == str(tmp_path) + text[1:]
    assert flags.stages == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert flags.prompt == "~/kept"


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--inputs=hdfs://x/y", "hdfs:// paths (object stores) are not supported here yet"),
        ("--out=file://bucket/x", "file:// paths"),
        ("--out=", "the path is empty"),
        ("--out=~no_such_user/x", "the home folder ~no_such_user is unknown"),
        ("--stages=a,,b", "the path is empty"),
    ],
)
def test_what_is_no_path_here(flag, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--stages=a", "--prompt=x", "--out=y"]
    command = [word for word in command if word.split("=")[0] != flag.split("=")[0]] + [flag]
    with pytest.raises(SystemExit) as exit:
        main.main(command)
    assert exit.value.code == 2 and says in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("folders", "text", "expected"),
    [
        (["a,b", "c"], "a,b,c", ["a,b", "c"]),
        (["a", "b", "c"], "a,b,c", ["a", "b", "c"]),
        (["run,1/base", "run,1/sr"], "run,1/base,run,1/sr", ["run,1/base", "run,1/sr"]),
        (["x,y,z"], "x,y,z", ["x,y,z"]),
        ([], "no,such", ["no", "such"]),
        ([], "", []),
    ],
)
def test_commas_in_names(folders, text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert path_flags.flag_list(text) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "--limit=-1", "--prompt=a"], "--limit=-1 must be at least 0"),
        (["evaluate", "sweep", "--prompts=p", "--limit=-2"], "--limit=-2 must be at least 0"),
        (["import", "if", "--src=s", "--image_size=-64"], "--image_size=-64 must be at least 0"),
    ],
)
def test_numbers_that_would_be_taken_for_everything(arguments, says, tmp_path, capsys):
    stages = [] if arguments[0] == "import" else ["--stages=a"]
    assert main.main([*arguments, *stages, f"--out={tmp_path}/x"]) == 1
    assert says in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
