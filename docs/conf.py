"""Sphinx configuration of `make docs`: Markdown pages, and the reference from docstrings.

The first page is the README. The Markdown files hold links that work in the repository; `_links`
redirects those to modules to their page of the reference. Pages that index.md does not list replace
THE REST there.
"""

import dataclasses
import os
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from imagen_jax import __version__  # noqa: E402
from imagen_jax.config import schema  # noqa: E402

project = "imagen_jax"
author = project
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["images"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = html_show_sphinx = html_copy_source = False
# The pages load nothing from a network.
html_static_path = []
# The search would fetch the pages it finds; a page read from a disk may not.
html_show_search_summary = False

apidoc_modules = [
    {
        "path": "../imagen_jax",
        "destination": "generated/api",
        "exclude_patterns": ["../imagen_jax/__main__.py"],
        "separate_modules": True,
        "module_first": True,
    }
]
apidoc_separate_modules = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Names in `__all__` are documented where they are defined.
autodoc_default_options = {"members": True, "ignore-module-all": True}
# Optional dependencies; the modules that import them are documented without them.
autodoc_mock_imports = ["tensorflow", "seqio", "tensorflow_datasets"]
napoleon_use_rtype = False
# Attributes as fields, because members that also have an entry would appear twice.
napoleon_use_ivar = True
# Short names in annotations may have several targets; any is accepted.
suppress_warnings = ["ref.python"]


# Pages outside docs/, and their names on the site.
OUTSIDE = {
    "README.md": "index",
    "CONTRIBUTING.md": "generated/contributing",
    "CHANGELOG.md": "generated/changelog",
    "examples/README.md": "generated/examples",
}


def _links(text: str, folder: pathlib.Path, name: str) -> str:
    """Markdown whose links are relative to `folder`, with links relative to the page `name`."""
    here = (DOCS / name).parent

    def link(match: re.Match) -> str:
        path = (folder / match[1]).resolve()
        if not path.exists():  # Not a link: an index and a call in code.
            return match[0]
        file = path.relative_to(ROOT)
        if str(file) in OUTSIDE:
            path = DOCS / f"{OUTSIDE[str(file)]}.md"
        elif file.parts[0] == "imagen_jax" and file.suffix == ".py":
            module = ".".join(file.with_suffix("").parts)
            path = DOCS / "generated" / "api" / f"{module}.rst"
        return f"]({os.path.relpath(path, here)}{match[2] or ''})"

    return re.sub(r"\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def _read(app, name: str, source: list[str]) -> None:
    """Rewrites the links of a page and inserts the README into the first one."""
    path = app.env.doc2path(name)
    if path.suffix != ".md" or "generated" in path.parts:
        return
    source[0] = _links(source[0], DOCS, name)
    if name == "index":
        listed = set(source[0].split())
        rest = sorted(p.stem for p in DOCS.glob("*.md") if p.stem not in listed | {"index"})
        readme = _links((ROOT / "README.md").read_text(), ROOT, name)
        source[0] = (
            source[0].replace("THE REST", "\n".join(rest)).replace("\nREADME\n", f"\n{readme}\n")
        )


def _generate(app) -> None:
    """Writes the pages that are made from other files."""
    (DOCS / "generated").mkdir(exist_ok=True)
    for file, name in OUTSIDE.items():
        if name != "index":
            text = (ROOT / file).read_text()
            (DOCS / f"{name}.md").write_text(_links(text, (ROOT / file).parent, name))
    (DOCS / "generated" / "configuration.md").write_text(_fields())


def _docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Converts a docstring, plain text with `code` in backticks, to reStructuredText.

    Other markup characters are escaped. Text indented after a blank line at the top level becomes a
    block of code.
    """
    text, before = [], ""
    for line in lines:
        if line.startswith("    ") and not before.strip() and text and _at_margin(text):
            text += ["::", ""]
        parts = re.split(r"(`[^`]+`)", line)
        plain = [re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
        code = [f"`{part}`" for part in parts[1::2]] + [""]
        # A letter directly after code, as in "`Example`s".
        plain[1:] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in plain[1:]]
        literal = line.startswith("    ") and text and _in_code(text)
        text.append(line if literal else "".join(a + b for a, b in zip(plain, code, strict=True)))
        before = line
    lines[:] = text


def _signature(app, what, name, obj, options, signature, returns) -> tuple:
    """Array types by the names used in the code."""

    def short(text: str | None) -> str | None:
        text = text and text.replace("jaxlib._jax.Array", "Array")
        return text and text.replace("numpy.ndarray", "np.ndarray")

    return short(signature), short(returns)


def _at_margin(text: list[str]) -> bool:
    """Whether the last line that is not blank starts at the margin."""
    filled = [line for line in text if line.strip()]
    return bool(filled) and not filled[-1].startswith(" ")


def _in_code(text: list[str]) -> bool:
    """Whether an indented line after `text` belongs to a block of code."""
    for line in reversed(text):
        if line and not line.startswith("    "):
            return line == "::"
    return False


def _fields() -> str:
    """Tables of all fields of the configuration, in Markdown."""
    sections = {"config": schema.Config}
    for field in dataclasses.fields(schema.Config):
        if dataclasses.is_dataclass(field.default_factory):
            sections[f"config.{field.name}"] = field.default_factory
    text = [
        "# Configuration",
        "",
        "Every field of `imagen_jax/config/schema.py` and its sections.",
        "`--config.section.field=value` overrides a field.",
    ]
    for name, section in sections.items():
        text += ["", f"## `{name}`", "", section.__doc__.strip(), ""]
        text += ["| field | default | |", "|---|---|---|"]
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.default_factory):
                continue
            default = {} if field.default is dataclasses.MISSING else field.default
            about = re.sub(r"([*|<])", r"\\\1", field.metadata["doc"])
            text.append(f"| `{field.name}` | `{default!r}` | {about} |")
    return "\n".join(text) + "\n"


def setup(app) -> None:
    """Connects the functions of this file; Sphinx calls it."""
    app.connect("builder-inited", _generate, priority=1)
    app.connect("source-read", _read)
    app.connect("autodoc-process-signature", _signature)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", _docstring, priority=1)
