"""The exported sampler equals the live one, in a process with jax and numpy only."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.export import stablehlo, stablehlo_loader
from imagen_jax.export.check import ExportError, compare
from imagen_jax.inference import stage_sampler
from imagen_jax.interop import shards
from imagen_jax.io import images
from imagen_jax.io.atomic import OutputError
from imagen_jax.parallel import partitioning
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import PARAMS_FILE, load_stage, write_stage
from imagen_jax.stages.stage import Stage
from imagen_jax.training.restore import CheckpointError

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
images, sampled = text.get("lowres"), []
for folder in folders:
    stage = load.Stage(folder)
    images = stage(text["text_emb"], text["text_mask"], **which, lowres=images)
    sampled.append(np.asarray(images))
which = {key: value if key == "seed" else value[1:2] for key, value in which.items()}
lowres = text["lowres"][1:2] if "lowres" in text else None
one = load.Stage(folders[0])(text["text_emb"][1:2], text["text_mask"][1:2], **which, lowres=lowres)
np.savez(out, *sampled, one=np.asarray(one), levels=load.to_uint8(images))
"""


class Exported(NamedTuple):
    """Stages, the folders of their exported samplers, and the lines that the export logged."""

    stages: list[Stage]
    folders: list[pathlib.Path]
    lines: list[str]


@pytest.fixture(scope="module")
def export_stages(random_params, tmp_path_factory):
    """Configurations -> `Exported`."""

    def make(*configs) -> Exported:
        root, exports = tmp_path_factory.mktemp("exported"), Exported([], [], [])
        for config in configs:
            # Noise in every step, and guidance.
            sampling = dataclasses.replace(config.sampling, sampler="ddpm", steps=3)
            config = dataclasses.replace(config, sampling=sampling)
            source, out = root / "stage" / config.name, root / config.name
            write_stage(source, random_params(config), config, {})
            stablehlo.export_stablehlo(str(source), str(out), log=exports.lines.append)
            exports.stages.append(load_stage(str(source)))
            exports.folders.append(out)
        return exports

    return make


@pytest.fixture(scope="module")
def exported(export_stages, sr_config):
    return export_stages(sr_config)


@pytest.fixture(scope="module")
def only_jax(tmp_path_factory) -> pathlib.Path:
    """A folder with jax and its requirements only."""
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
    """Samples in a process that has jax and numpy only; compares with the live samplers."""
    text = {
        "text_emb": np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32),
        "text_mask": np.arange(4) < np.array([1, 3])[:, None],
    }
    inputs = text if lowres is None else text | {"lowres": lowres}
    np.savez(folder / "inputs.npz", **inputs)
    keys, live = stage_sampler.image_keys(*WHICH.values()), []
    lowres = None if lowres is None else jnp.asarray(lowres)
    for index, stage in enumerate(exported.stages, start=int(lowres is not None)):
        stage_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        texts = Text(*map(jnp.asarray, text.values()))
        lowres = stage_sampler.sample_stage(stage.params, stage.config, texts, stage_keys, lowres)
        live.append(images.to_uint8(np.asarray(lowres)))

    files = folder / "sampled.npz", folder / "inputs.npz"
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
    sampled = np.load(files[0])
    for index, expected in enumerate(live):
        levels = images.to_uint8(sampled[f"arr_{index}"]).astype(int)
        assert expected.std() > 1 and np.abs(levels - expected).max() <= 1
    last = images.to_uint8(sampled[f"arr_{len(live) - 1}"])
    np.testing.assert_array_equal(sampled["levels"], last)
    # The image is the same in a batch of another size.
    assert np.abs(sampled["one"][0] - sampled["arr_0"][1]).max() < 2 / 255


def test_jax_and_numpy_alone_sample_the_live_images(exported, only_jax, tmp_path):
    lowres = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    check_alone(exported, only_jax, tmp_path, lowres)


@pytest.mark.slow
def test_jax_and_numpy_alone_sample_a_cascade(
    export_stages, base_config, sr_config, only_jax, tmp_path
):
    check_alone(export_stages(base_config, sr_config), only_jax, tmp_path)


def test_the_signature_describes_the_inputs(exported):
    stages, folders, lines = exported
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
    assert sum(bool(re.match(pattern, line)) for line in lines) == 1


def test_no_kernel_of_one_vendor_is_in_a_program_for_all(base_config, random_params, monkeypatch):
    """Exported on a GPU, where the live sampler's attention is cuDNN's."""
    model = dataclasses.replace(base_config.model, dtype="bfloat16")
    stage = Stage(dataclasses.replace(base_config, model=model), random_params(base_config))
    monkeypatch.setattr(partitioning, "platform", lambda: "gpu")
    text = Text(np.zeros((2, 4, 8), np.float32), np.ones((2, 4), bool))
    keys = stage_sampler.image_keys(0, [0, 1], [0, 0])
    with pytest.raises(RuntimeError, match="cuDNN"):  # It is not installed here.
        stage_sampler.sample_stage.trace(stage.params, stage.config, text, keys)
    program = stablehlo.make_program(stage)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "cudnn" not in program.mlir_module().lower()


def test_a_program_reads_shards(exported, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(exported.folders[0], folder)
    whole = stablehlo_loader.read_params(folder / "params.safetensors")
    (folder / "params.safetensors").unlink()
    shards.write_shards(folder / "params.safetensors", whole, 4000)
    assert len(list(folder.glob("params-*"))) > 2
    found = stablehlo_loader.read_params(folder / "params.safetensors")
    np.testing.assert_equal(found, stablehlo_loader.read_params(exported.folders[0] / PARAMS_FILE))


def test_lowres_is_checked_against_the_signature(exported):
    stage = stablehlo_loader.Stage(exported.folders[0])
    text = np.zeros((1, 4, 8), np.float32), np.ones((1, 4), bool)
    with pytest.raises(ValueError, match="stage 'sr': lowres=none, expected an array"):
        stage(*text, seed=0, prompt_index=[0], sample_index=[0])


def test_an_export_that_samples_other_images_is_rejected():
    live = np.zeros((2, 4, 4, 3), np.float32)
    lines = []
    compare(live, live + 1.2 / 127.5, "form", lines.append)
    assert lines == [
        "form: differs from the live sampler by at most 1 of 255 levels (2 images sampled)"
    ]
    with pytest.raises(ExportError, match="the form differs from the live sampler by at most 12"):
        compare(live, live + 0.1, "form", lines.append)
    with pytest.raises(ExportError, match="the form samples images that are not finite"):
        compare(live, live * np.nan, "form", lines.append)


def test_other_folders_are_not_replaced(exported, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"precious")
    stage = str(exported.folders[0].parent / "stage" / "sr")
    with pytest.raises(OutputError, match="photos exists and is no folder of an exported"):
        stablehlo.export_stablehlo(stage, str(tmp_path / "photos"))
    with pytest.raises(CheckpointError, match="holds no checkpoints; train first"):
        stablehlo.export_stablehlo(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
