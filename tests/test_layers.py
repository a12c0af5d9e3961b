"""Imports point down only: the table of docs/design.md, enforced."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "imagen_jax"

LAYERS = [
    {"config", "config_data", "config_fields", "config_io", "config_sampling", "images", "outputs"}
    | {"diffusion", "distributed", "flops", "hlo", "stablehlo_loader"},
    {"guidance", "models", "sampling", "optimizer", "ema", "metrics", "partitioning"}
    | {"preemption", "profiling", "thresholding", "topology", "vocabulary", "editing"},
    {"interop", "train_state", "checkpoint", "ema_snapshots", "compiled", "frozen_encoder"}
    | {"shapes_oracle"},
    {"text", "stage", "stage_folder", "faults"},
    {"data", "drawing", "prompts"},
    {
        "batches",
        "cascade",
        "request",
        "evaluation",
        "train",
        "train_step",
        "diagnose",
        "doctor",
        "replay",
        "embed",
        "pretrain_text",
        "text_corpus",
        "plan",
        "plan_report",
        "plan_search",
        "sample",
        "sample_folder",
        "trace",
        "export",
        "export_check",
        "model_card",
        "stablehlo",
        "serving",
        "convert",
    },
    {"cli", "__main__"},
]
# Packages that may be imported in some places only.
HOMES = {
    "flax": {"models", "partitioning"},
    "orbax": {"checkpoint"},
    "optax": {"optimizer", "train_state", "train", "train_step", "pretrain_text"},
    "tensorflow": {"data/tasks", "data/feature_converter", "data/shapes_builder"},
    "seqio": {"data/tasks", "data/feature_converter", "data/shapes_builder"},
    "tensorflow_datasets": {"data/tasks", "data/feature_converter", "data/shapes_builder"},
    "argparse": {"cli"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "torch": set(),
}
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE) != pathlib.Path("__init__.py")
)


def unit(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: pathlib.Path):
    own = unit(path)
    name = str(path.relative_to(PACKAGE)).removesuffix(".py")
    for imported in imports(path):
        root, *rest = imported.split(".")
        if root == "imagen_jax" and rest[0] != "__version__":
            other = rest[0]
            allowed = other == own or layer(other) < layer(own)
            # What text and stage, data and drawing are to each other: strangers.
            allowed |= layer(other) == layer(own) and layer(own) not in (3, 4)
            assert allowed, f"{name} imports {imported}, which is not below it"
        if root in HOMES:
            homes = HOMES[root]
            assert own in homes or name in homes, f"{name} imports {root}; its home is {homes}"


def made_in(path: pathlib.Path) -> set[str]:
    """Names that a module itself defines."""
    body = ast.parse(path.read_text()).body
    defined = {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    names = (n for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name))
    return defined | {n.id for n in names if isinstance(n.ctx, ast.Store)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_come_from_where_they_are_made(path: pathlib.Path):
    """So that a reader follows an import once; the schema alone is one name for several files."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imagen_jax."):
            home = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
            if home.is_file() and home.stem != "config":
                assert {alias.name for alias in node.names} <= made_in(home), node.module


def test_no_package_file_holds_code():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert path.read_text() == "", path
