"""Files, anchors and names in the pages exist."""

import ast
import pathlib
import re

import pytest

from tests.reference.pages import PAGES, ROOT

NAMED = re.compile(r"\]\(\.\./(imagen_jax/[\w/]+\.py)\): ((?:`[\w.]+`(?:, )?)+)")


def names_in(path: pathlib.Path) -> set[str]:
    """Functions, classes, constants; methods and fields as CLASS.NAME."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n for target in targets for n in ast.walk(target)]
                found.update(prefix + n.id for n in names if isinstance(n, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_targets_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:|mailto:", target):
            continue
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page.name}: {target}; there are {slugs}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_after_a_file_are_defined_in_it(page):
    for file, names in NAMED.findall(page.read_text()):
        known = names_in(ROOT / file)
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in known, f"{page.name}: {file} has no {name}"


def test_every_question_of_the_tour_names_a_file():
    tour = (ROOT / "docs" / "tour.md").read_text()
    rows = re.findall(r"^\| (?:Where|How|What) .*\?.*$", tour, re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        assert 1 <= len(set(re.findall(r"\]\(\.\./(imagen_jax/[\w/]+\.py)\)", row))) <= 3, row


def test_what_the_paper_leaves_open_is_listed():
    """Each file with "Paper is silent" or "Differs from paper" is in docs/paper.md."""
    paper = (ROOT / "docs" / "paper.md").read_text()
    for path in sorted((ROOT / "imagen_jax").rglob("*.py")):
        if re.search(r"[Pp]aper is silent|[Dd]iffers from (the )?paper", path.read_text()):
            assert f"../{path.relative_to(ROOT)}" in paper, path


def test_index_lists_pages_that_exist_once():
    """`docs/conf.py` puts the pages that index.md does not list in the place of THE REST."""
    index = (ROOT / "docs" / "index.md").read_text().split()
    assert "REST" in index
    named = [word for word in index if (ROOT / "docs" / f"{word}.md").exists()]
    assert len(named) == len(set(named)) > 10


def design_rows() -> dict[str, str]:
    """Package -> its cell of modules in the table of docs/design.md."""
    design = (ROOT / "docs" / "design.md").read_text()
    return dict(re.findall(r"^\| \d+ \| `(\w+)/` \| [^|]+ \| ([^|]+) \|$", design, re.MULTILINE))


def test_the_design_lists_every_package_and_subpackage():
    rows = design_rows()
    packages = {p.parent for p in (ROOT / "imagen_jax").glob("*/__init__.py")}
    assert rows.keys() == {package.name for package in packages}
    for package in packages:
        for subpackage in package.glob("*/__init__.py"):
            assert f"`{subpackage.parent.name}/`" in rows[package.name], subpackage


def test_modules_in_the_design_exist():
    for package, cell in design_rows().items():
        folder = ROOT / "imagen_jax" / package
        names = re.findall(r"`(\w+)`", cell)
        assert names or package == "worlds"
        for name in names:
            assert list(folder.rglob(f"{name}.py")), f"{package}: {name}"
