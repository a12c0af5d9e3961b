"""How the documentation is built (`make docs`): Markdown pages, and the reference from docstrings.

The first page is the README. Links of the Markdown files are those that work in the repository;
`_links` leads the ones to modules to their page of the reference. Pages that no list in index.md
names take the place of THE REST there.
"""

import dataclasses
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from imagen_jax import __version__, config  # noqa: E402

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
# Nothing of the pages is asked of a network.
html_static_path = []

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
autodoc_default_options = {"members": True}
# Extras that the reference can do without; the modules that import them are read all the same.
autodoc_mock_imports = ["tensorflow", "seqio", "tensorflow_datasets"]
napoleon_use_rtype = False
# As fields: members that are also described one by one would be described twice.
napoleon_use_ivar = True


def _links(text: str) -> str:
    """Links to modules, as links to their pages of the reference."""

    def page(match: re.Match) -> str:
        module = match[1].removesuffix("/__init__").replace("/", ".")
        return f"](generated/api/imagen_jax.{module}.rst)"

    return re.sub(r"\]\(\.\./imagen_jax/([\w/]+)\.py\)", page, text)


def _read(app, name: str, source: list[str]) -> None:
    """A page as it is written, with the README in the first one."""
    if name == "index":
        readme = (DOCS.parent / "README.md").read_text()
        readme = re.sub(r"\]\((?!https?:|#)", "](../", readme).replace("](../docs/", "](")
        listed = set(source[0].split())
        rest = sorted(p.stem for p in DOCS.glob("*.md") if p.stem not in listed | {"index"})
        source[0] = source[0].replace("THE REST", "\n".join(rest)).replace("README", readme)
    source[0] = _links(source[0])


def _docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Our docstrings are plain text with `code` in backticks; reStructuredText reads more into it.

    Code is marked as such, other marks are taken by the letter, and what is indented after a blank
    line at the top level is code.
    """
    text, before = [], ""
    for line in lines:
        if line.startswith("    ") and not before.strip() and text and _at_margin(text):
            text += ["::", ""]
        parts = re.split(r"(`[^`]+`)", line)
        plain = [re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
        code = [f"`{part}`" for part in parts[1::2]] + [""]
        literal = line.startswith("    ") and text and _in_code(text)
        text.append(line if literal else "".join(a + b for a, b in zip(plain, code, strict=True)))
        before = line
    lines[:] = text


def _at_margin(text: list[str]) -> bool:
    """Whether the last line that is not blank begins at the margin."""
    said = [line for line in text if line.strip()]
    return bool(said) and not said[-1].startswith(" ")


def _in_code(text: list[str]) -> bool:
    """Whether an indented line after these belongs to a block of code."""
    for line in reversed(text):
        if line and not line.startswith("    "):
            return line == "::"
    return False


def _fields(app) -> None:
    """Writes the table of all fields of the configuration."""
    sections = [("config", config.Config)]
    sections += [
        (f"config.{field.name}", field.default_factory)
        for field in dataclasses.fields(config.Config)
        if field.default_factory is not dataclasses.MISSING
    ]
    text = ["# Configuration", "", "Every field, from `imagen_jax/config.py`. Overrides are"]
    text += ["`--config.section.field=value`."]
    for name, section in sections:
        text += ["", f"## `{name}`", "", section.__doc__.strip(), "", "| field | default | |"]
        text += ["|---|---|---|"]
        for field in dataclasses.fields(section):
            if field.default_factory is not dataclasses.MISSING and name == "config":
                continue
            default = {} if field.default is dataclasses.MISSING else field.default
            about = re.sub(r"([*|<])", r"\\\1", field.metadata["doc"])
            text.append(f"| `{field.name}` | `{default!r}` | {about} |")
    (DOCS / "generated").mkdir(exist_ok=True)
    (DOCS / "generated" / "configuration.md").write_text("\n".join(text) + "\n")


def setup(app) -> None:
    """What Sphinx calls."""
    app.connect("builder-inited", _fields, priority=1)
    app.connect("source-read", _read)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", _docstring, priority=1)
