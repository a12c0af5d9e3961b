"""Limits on file and function length and on suppressions; CI targets; licence and citation."""

import ast
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("imagen_jax", "tests", "benchmarks", "configs", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
SUPPRESSIONS = 20  # of types, in the whole package


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_have_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_functions_have_at_most_60_lines():
    long = []
    tests = ROOT / "tests"
    for path in (path for path in SOURCES if tests not in path.parents):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                start = (node.body[1] if documented and len(node.body) > 1 else first).lineno
                if node.end_lineno - start >= 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_type_suppressions_are_few_and_name_their_rule():
    found = [
        line.strip()
        for path in (ROOT / "imagen_jax").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"type: ignore|pyright: ", line)
    ]
    assert len(found) <= SUPPRESSIONS
    unnamed = [line for line in found if not re.search(r"ignore\[[\w-]+\]", line)]
    assert not unnamed


def test_ci_and_hooks_run_existing_targets():
    targets = set(re.findall(r"^([a-z0-9_-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [s["run"] for job in workflow["jobs"].values() for s in job["steps"] if "run" in s]
    assert "bash .ci/run" in commands
    for command in commands:
        if command.startswith("make "):
            assert set(command.split()[1:]) <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    for path in re.findall(r"tests/[\w/]+\.py", " ".join(entries)):
        assert (ROOT / path).is_file()


def test_licence_and_citation_agree():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "imagen_jax" / "__init__.py").read_text())[
        1
    ]
    assert citation["license"] == "Apache-2.0" and citation["version"] == version
