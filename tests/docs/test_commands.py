"""Every command in the pages is run by a test or names what it needs; each block has a mark."""

import ast
import re
import shlex
import subprocess

import pytest

from imagen_jax.cli import main
from tests.reference import pages
from tests.reference.pages import ALL, PAGES, ROOT, TYPED

BASH = [block for block in ALL if block.language == "bash"]
IMAGEN = [
    pytest.param(arguments, id=f"{block}-{arguments[0]}")
    for block in BASH
    for words in pages.commands(block.code)
    if (arguments := pages.arguments_of_imagen(words))
]
INLINE = sorted(
    {
        (str(page.relative_to(ROOT)), code)
        for page in PAGES
        for code in re.findall(r"`((?:\$?imagen|\S*python -m imagen_jax) [^`]+)`", page.read_text())
    }
)


def test_every_block_is_marked():
    unmarked = [str(b) for b in ALL if b.language in TYPED and not b.kind]
    assert not unmarked, f"no mark, see tests/reference/pages.py: {unmarked}"


def test_every_block_has_a_language():
    """A block without a language, or with an unknown one, would escape the other tests."""
    unknown = [f"{b} {b.language!r}" for b in ALL if b.language not in TYPED + pages.SHOWN]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_in_fences(page):
    text = page.read_text()
    for other in ("<pre", "<code", "~~~"):
        assert other not in text, f"{page.name}: commands in {other} are not tested; use ```"
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for typed in (r"^\s*\$ ", r"^ {4,}(make|bash|python|imagen|pip|launch/)\b"):
        assert not re.search(typed, outside, re.MULTILINE), f"{page.name}: {typed}"


@pytest.mark.parametrize("block", [b for b in ALL if b.kind == "tested"], ids=str)
def test_the_test_named_by_a_mark_exists_and_names_the_command(block):
    for name in block.about.split(", "):
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        names = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        assert function in names if function else any(n.startswith("test_") for n in names)
    sources = "".join((ROOT / n.partition("::")[0]).read_text() for n in block.about.split(", "))
    for words in pages.commands(block.code) if block.language == "bash" else ():
        # The test must contain the script or the verb (for `evaluate`, its sub-verb).
        arguments = pages.arguments_of_imagen(words)
        if arguments:
            command = arguments[1] if arguments[0] == "evaluate" else arguments[0]
        elif words[0] == "curl":
            command = re.search(r"/api/\w+", " ".join(words))[0]
        else:
            script = next(w for w in words if w not in ("bash", ".venv/bin/python"))
            command = script.split("/")[-1].removesuffix(".py")
        assert command == "make" or command in sources, f"{block.about} does not name {command}"


@pytest.mark.parametrize("block", [b for b in ALL if b.kind == "needs"], ids=str)
def test_a_needs_mark_says_what_is_needed(block):
    assert len(block.about.split()) > 1


@pytest.mark.parametrize("arguments", IMAGEN)
def test_flags_exist_in_the_verb(arguments):
    # Placeholders for numbers, as in --seed=SEED.
    arguments = [re.sub(r"(?<==)[A-Z]+$", "1", argument) for argument in arguments]
    try:
        main.parse(arguments)
    except SystemExit as ended:
        assert ended.code == 0 and "--help" in arguments, arguments


@pytest.mark.parametrize(("page", "code"), INLINE)
def test_verbs_and_flags_in_the_text_exist(page, code):
    """In full or in part: `imagen plan`, `$imagen replay --workdir=DIR --step=N`."""
    words = shlex.split(code)
    verb, *rest = words[words.index("imagen_jax") + 1 :] if "imagen_jax" in words else words[1:]
    if verb in ("VERB", "WHAT"):
        return
    assert verb in main.VERBS, f"{page}: {code}"
    source = (ROOT / "imagen_jax" / "cli" / f"{'import_' if verb == 'import' else verb}.py").parent
    texts = "".join(path.read_text() for path in source.glob("*.py"))
    for flag in re.findall(r"--[a-z_-]+", " ".join(rest)):
        known = flag == "--help" or flag.startswith("--config") or f'"{flag}"' in texts
        assert known, f"{page}: {code}: {flag}"


VARIABLE = re.compile(r'^(\w+)="([^"]*)"$', re.MULTILINE)
LAUNCHED = [
    pytest.param(words, pages.settings(block.code), id=f"{block}-{words[0]}")
    for block in BASH
    if block.kind == "needs" or block.about == "tests/launch/test_pod_sequence.py"
    for words in pages.commands(block.code)
    if words[0].startswith("launch/")
]


@pytest.mark.parametrize(("words", "settings"), LAUNCHED)
def test_launchers_take_the_options(words, settings):
    variables = {f"${name}": shlex.split(value) for name, value in VARIABLE.findall(settings)}
    words = [w for word in words for w in variables.get(word, [word])]
    # A script without the flag would do its work here.
    assert "dry_run" in (ROOT / words[0]).read_text()
    done = subprocess.run(
        ["bash", *words, "--dry_run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_make_help_names_every_target_of_the_pages():
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    known = [line.split()[0] for line in output.stdout.splitlines()]
    for block in BASH:
        for words in pages.commands(block.code):
            if words[0] == "make":
                assert words[1] in known, f"{block}: make {words[1]}"
