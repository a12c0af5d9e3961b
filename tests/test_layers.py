"""The package layout of docs/design.md: rows, import cycles, homes of libraries, worlds."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "imagen_jax"

# A package imports from rows above its own and from itself.
ROWS = [
    {"config", "io"},
    {"parallel", "diffusion"},
    {"models"},
    {"interop"},
    {"text", "stages"},
    {"data", "inference"},
    {"training", "evaluation", "serving"},
    {"planning", "export", "checks"},
    {"worlds"},
    {"cli"},
]
ROW = {package: index for index, row in enumerate(ROWS) for package in row}
# Libraries that may be imported in some places only: a package or a file of one.
HOMES = {
    "flax": {"models", "parallel/partitioning"},
    "orbax": {"training/checkpoint", "training/restore", "training/saved_trees"},
    "optax": {"training"},
    "tensorflow": {"data", "worlds"},
    "seqio": {"data"},
    "tensorflow_datasets": {"data", "worlds"},
    "argparse": {"cli"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "matplotlib": {"evaluation"},
    "torch": set(),
}
LIBRARY = {"imagen_jax/__init__.py", "imagen_jax/__main__.py"}


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, imports within functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def import_graph(package: pathlib.Path) -> dict[str, set[str]]:
    """Modules of the package, each with the modules of the package that it imports."""
    root = package.parent
    paths = {module_name(path, root): path for path in package.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        targets = set()
        for imported in imports(path):
            # `from package.module import name`: the module, unless name is a module itself.
            if imported not in paths:
                imported = imported.rpartition(".")[0]
            if imported in paths and paths[imported].name != "__init__.py":
                targets.add(imported)
        graph[name] = targets - {name}
    return graph


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    found = []
    for name, targets in graph.items():
        if name.count(".") < 2:  # imagen_jax and its __main__ stand outside the rows.
            continue
        own = name.split(".")[1]
        for target in targets:
            other = target.split(".")[1]
            if other != own and not ROW[other] < ROW[own]:
                found.append(f"{name} imports {target}, whose package is not in a row above")
    return sorted(found)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of modules, or []."""
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*trail, name]):
                return found
        finished.add(name)
        return []

    for name in sorted(graph):
        if found := visit(name, []):
            return found
    return []


def test_the_package_holds_packages_only():
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "__main__.py", *ROW}
    assert all((PACKAGE / name / "__init__.py").is_file() for name in ROW)


def test_imports_point_to_rows_above():
    assert upward_imports(import_graph(PACKAGE)) == []


def test_no_import_cycles_between_files():
    assert cycle(import_graph(PACKAGE)) == []


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(
        shutil.copytree(
            PACKAGE, tmp_path / "imagen_jax", ignore=shutil.ignore_patterns("__pycache__")
        )
    )


@pytest.mark.parametrize(
    "line",
    ["from imagen_jax.training import train", "import imagen_jax.training.train"],
)
def test_a_planted_upward_import_is_found(copy, line):
    planted = copy / "diffusion" / "process.py"
    planted.write_text(planted.read_text() + f"\n\ndef later():\n    {line}\n")
    (found,) = upward_imports(import_graph(copy))
    assert found.startswith("imagen_jax.diffusion.process imports imagen_jax.training.train")


def test_a_planted_import_of_a_sibling_is_found(copy):
    planted = copy / "data" / "batches" / "view.py"
    planted.write_text(planted.read_text() + "\nfrom imagen_jax.inference import prompts\n")
    assert len(upward_imports(import_graph(copy))) == 1


def test_a_planted_cycle_is_found(copy):
    planted = copy / "diffusion" / "process.py"
    planted.write_text(planted.read_text() + "\nfrom imagen_jax.diffusion import samplers\n")
    found = cycle(import_graph(copy))
    assert found[0] == found[-1] and "imagen_jax.diffusion.process" in found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if str(p.relative_to(ROOT)) not in LIBRARY)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_are_imported_in_their_homes(path: pathlib.Path):
    name = str(path.relative_to(PACKAGE).with_suffix(""))
    for imported in imports(path):
        homes = HOMES.get(imported.split(".")[0])
        if homes is not None:
            allowed = name in homes or name.split("/")[0] in homes
            assert allowed, f"{name} imports {imported}; its home is {homes}"


def defined_names(path: pathlib.Path) -> set[str]:
    """Names that a module itself defines."""
    body = ast.parse(path.read_text()).body
    made = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {n.name for n in body if isinstance(n, made)}
    names = (n for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name))
    return defined | {n.id for n in names if isinstance(n.ctx, ast.Store)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_are_imported_from_the_module_that_defines_them(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imagen_jax."):
            home = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
            if home.is_file():
                assert {alias.name for alias in node.names} <= defined_names(home), node.module


def test_no_package_file_holds_code():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert path.read_text() == "", path


def mentions_of_worlds(paths: Iterable[pathlib.Path]) -> list[str]:
    """Lines that name a world: its package, or one of its data sets, encoders or modules."""
    worlds = [path.name for path in (PACKAGE / "worlds").iterdir() if path.is_dir()]
    names = "|".join(name for name in worlds if name != "__pycache__")
    pattern = re.compile(
        rf"imagen_jax\.worlds\.|worlds[./](?:{names})|\b(?:{names})_\w+|\b(?:{names}) world"
    )
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if pattern.search(line)
    ]


def test_no_module_outside_worlds_and_cli_names_a_world():
    outside = [p for p in FILES if p.relative_to(PACKAGE).parts[0] not in ("worlds", "cli")]
    assert mentions_of_worlds(outside) == []


def test_everything_else_imports_without_worlds(copy):
    shutil.rmtree(copy / "worlds")
    names = [module_name(path, copy.parent) for path in sorted(copy.rglob("*.py"))]
    names = [name for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, importlib.util, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "loaded = [name for name in sys.modules if name.startswith('imagen_jax.worlds')]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_of_the_package_is_light():
    code = (
        "import sys, imagen_jax\n"
        "assert imagen_jax.__version__\n"
        "heavy = {'tensorflow', 'orbax', 'jax', 'seqio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from imagen_jax import Cascade, Config, train\n"
        "assert callable(train) and callable(Cascade.load) and Config().name is not None\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
