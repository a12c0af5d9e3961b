"""The site builds without a warning and works from the disk without a network."""

import subprocess
import sys

import pytest

from tests.reference.pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages."""
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    doctrees = ["-d", tmp_path_factory.mktemp("doctrees")]
    done = subprocess.run(
        [*command, *doctrees, "docs", out], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_and_module_has_a_page(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    for path in (ROOT / "imagen_jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] not in ("__init__", "__main__"):
            assert (site / "generated" / "api" / f"{'.'.join(parts)}.html").is_file(), path
    fields = (site / "generated" / "configuration.html").read_text()
    assert "guidance_oscillate_after" in fields and "crop_from" in fields


def test_the_pages_load_nothing_from_a_network(site, browser):
    for name in ("index", "troubleshooting", "generated/api/imagen_jax.diffusion.guidance"):
        browser.open(site / f"{name}.html")
    assert browser.requests and not [
        r for r in browser.requests if not r.startswith(("file:", "data:"))
    ]
    browser.open(site / "search.html")
    browser.value("location.search = '?q=thresholding'")
    browser.wait("document.querySelectorAll('#search-results li').length > 2")
    assert not browser.problems
