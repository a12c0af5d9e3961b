"""The exported sampler: drawn with where jax and numpy are all there is, beside the live one."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.export import export, stablehlo
from imagen_jax.export.check import ExportError, compare
from imagen_jax.inference import stage_sampler
from imagen_jax.io import images
from imagen_jax.io.atomic import OutputError
from imagen_jax.stages.folder import Stage, load_stage
from imagen_jax.training.checkpoint import CheckpointError

WHICH = {"seed": 7, "prompt_index": [1, 5], "sample_index": [0, 2]}

SCRIPT = """
import json, sys
where, out, embeddings, which, *folders = sys.argv[1:]
sys.path = [p for p in sys.path if "packages" not in p] + [where, folders[0]]
import importlib.util
for name in ("imagen_jax", "flax", "orbax", "optax", "ml_collections", "PIL", "flatbuffers"):
    assert importlib.util.find_spec(name) is None, name + " can be imported"
import numpy as np
import load
text = np.load(embeddings)
which = json.loads(which)
pictures, drawn = text.get("lowres"), []
for folder in folders:
    stage = load.Stage(folder)
    pictures = stage(text["text_emb"], text["text_mask"], **which, lowres=pictures)
    drawn.append(np.asarray(pictures))
which = {key: value if key == "seed" else value[1:2] for key, value in which.items()}
lowres = text["lowres"][1:2] if "lowres" in text else None
one = load.Stage(folders[0])(text["text_emb"][1:2], text["text_mask"][1:2], **which, lowres=lowres)
np.savez(out, *drawn, one=np.asarray(one), levels=load.to_uint8(pictures))
"""


class Exported(NamedTuple):
    """Stages, the folders of their exported samplers, and what the export said."""

    stages: list[Stage]
    folders: list[pathlib.Path]
    said: list[str]


@pytest.fixture(scope="module")
def export_stages(random_params, tmp_path_factory):
    """Configurations -> what became of them."""

    def make(*configs) -> Exported:
        root, done = tmp_path_factory.mktemp("exported"), Exported([], [], [])
        for config in configs:
            # Noise in every step, and guidance.
            sampling = dataclasses.replace(config.sampling, sampler="ddpm", steps=3)
            config = dataclasses.replace(config, sampling=sampling)
            source, out = root / "stage" / config.name, root / config.name
            export.write_stage(source, random_params(config), config, {})
            stablehlo.export_stablehlo(str(source), str(out), log=done.said.append)
            done.stages.append(load_stage(str(source)))
            done.folders.append(out)
        return done

    return make


@pytest.fixture(scope="module")
def exported(export_stages, sr_config):
    return export_stages(sr_config)


@pytest.fixture(scope="module")
def only_jax(tmp_path_factory) -> pathlib.Path:
    """A folder with what `pip install jax` brings, and nothing else."""
    folder = tmp_path_factory.mktemp("only_jax")
    names, seen = ["jax"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        needs = importlib.metadata.requires(name) or []
        names += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def check_alone(exported: Exported, only_jax, folder, lowres=None) -> None:
    """Draws in a process that has jax and numpy alone; compares with the live samplers."""
    text = {
        "text_emb": np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32),
        "text_mask": np.arange(4) < np.array([1, 3])[:, None],
    }
    given = text if lowres is None else text | {"lowres": lowres}
    np.savez(folder / "given.npz", **given)
    keys, live = stage_sampler.image_keys(*WHICH.values()), []
    lowres = None if lowres is None else jnp.asarray(lowres)
    for index, stage in enumerate(exported.stages, start=int(lowres is not None)):
        stage_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        told = *map(jnp.asarray, text.values()), stage_keys, lowres
        lowres = stage_sampler.sample_stage(stage.params, stage.config, *told)
        live.append(images.to_uint8(np.asarray(lowres)))

    files = folder / "drawn.npz", folder / "given.npz"
    arguments = [only_jax, *files, json.dumps(WHICH), *exported.folders]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", SCRIPT, *map(str, arguments)],
        env={
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    drawn = np.load(files[0])
    for index, expected in enumerate(live):
        levels = images.to_uint8(drawn[f"arr_{index}"]).astype(int)
        assert expected.std() > 1 and np.abs(levels - expected).max() <= 1
    np.testing.assert_array_equal(drawn["levels"], images.to_uint8(drawn[f"arr_{len(live) - 1}"]))
    # The picture is the same in a batch of another size.
    assert np.abs(drawn["one"][0] - drawn["arr_0"][1]).max() < 2 / 255


def test_jax_and_numpy_alone_draw_the_live_pictures(exported, only_jax, tmp_path):
    lowres = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    check_alone(exported, only_jax, tmp_path, lowres)


@pytest.mark.slow
def test_jax_and_numpy_alone_draw_a_cascade(
    export_stages, base_config, sr_config, only_jax, tmp_path
):
    check_alone(export_stages(base_config, sr_config), only_jax, tmp_path)


def test_the_folder_says_what_goes_in(exported):
    stages, folders, said = exported
    for stage, folder in zip(stages, folders, strict=True):
        names = {"sampler.jaxexport", "params.safetensors", "signature.json", "load.py", "card.md"}
        assert {file.name for file in folder.iterdir()} == names
        signature = json.loads((folder / "signature.json").read_text())
        assert signature["platforms"] == ["cpu", "cuda", "tpu"]
        sampling = json.loads(json.dumps(dataclasses.asdict(stage.config.sampling)))
        assert signature["sampling"] == sampling
        assert signature["inputs"]["text_emb"]["shape"] == ["b", 4, 8]
        assert ("lowres" in signature["inputs"]) == stage.config.model.lowres
        assert "ddpm, 3 steps" in (folder / "card.md").read_text()
        # The weights are not in the program.
        params = (folder / "params.safetensors").stat().st_size
        assert params > 10_000 and (folder / "sampler.jaxexport").stat().st_size < 2e6
    pattern = r"StableHLO: differs from the live sampler by at most [01] of 255 levels"
    assert sum(bool(re.match(pattern, line)) for line in said) == 1


def test_what_draws_something_else_is_refused():
    picture = np.zeros((2, 4, 4, 3), np.float32)
    said = []
    compare(picture, picture + 1.2 / 127.5, "form", said.append)
    assert said == [
        "form: differs from the live sampler by at most 1 of 255 levels (2 pictures drawn)"
    ]
    with pytest.raises(ExportError, match="the form differs from the live sampler by at most 12"):
        compare(picture, picture + 0.1, "form", said.append)
    with pytest.raises(ExportError, match="the form draws pictures that are not finite"):
        compare(picture, picture * np.nan, "form", said.append)


def test_other_folders_are_left_alone(exported, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"precious")
    stage = str(exported.folders[0].parent / "stage" / "sr")
    with pytest.raises(OutputError, match="photos exists and is no folder of an exported"):
        stablehlo.export_stablehlo(stage, str(tmp_path / "photos"))
    with pytest.raises(CheckpointError, match="holds no checkpoints; train first"):
        stablehlo.export_stablehlo(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
