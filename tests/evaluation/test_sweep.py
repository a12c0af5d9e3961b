"""`evaluate sweep` on untrained stages: cells, resuming, errors."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.text import TextConfig
from imagen_jax.evaluation import sweep, sweep_report
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.inference.cascade import Cascade
from imagen_jax.interop import hf_t5
from imagen_jax.io import images
from imagen_jax.models import t5
from imagen_jax.stages.folder import write_stage
from imagen_jax.worlds.shapes import scenes

PROMPTS = 3
SAME_SCORER = "imagen_jax.worlds.shapes.scorer:SCORER"


@pytest.fixture(scope="module")
def world(base_config, sr_config, random_params, tmp_path_factory):
    """Two checkpoints of a stage with their text encoder, an SR stage, and five prompts."""
    folder = tmp_path_factory.mktemp("sweep")
    encoder = t5.T5Config(
        vocab_size=384, emb_dim=8, num_layers=1, num_heads=2, head_dim=16, mlp_dim=64
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), t5.parameter_shapes(encoder)
    )
    hf_t5.save(folder / "text", encoder, params)
    text = TextConfig(encoder="bytes", path=str(folder / "text"), max_len=16)
    sampling = dataclasses.replace(base_config.sampling, steps=2)
    config = dataclasses.replace(base_config, text=text, sampling=sampling)
    for seed, name in enumerate(("early", "late")):
        write_stage(folder / name, random_params(config, seed), config, {})
    larger = dataclasses.replace(sr_config.sampling, steps=2, guidance_weight=3.0)
    larger = dataclasses.replace(sr_config, sampling=larger)
    for seed, name in enumerate(("sr", "sr_late")):
        write_stage(folder / name, random_params(larger, seed), larger, {})
    rows = [scenes.prompt_row(scenes.scene("held_out", index)) for index in range(PROMPTS + 2)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags(world, out, *more):
    grid = {"base": {"guidance_weight": [2, 3.5], "thresholding": ["none", "dynamic"]}}
    return [
        *("evaluate", "sweep", f"--stages={world}/early", f"--stages={world}/late"),
        *("--names=early,late", f"--prompts={world}/prompts.jsonl", f"--limit={PROMPTS}"),
        *(f"--out={out}", "--batch_size=4", "--resamples=3", f"--grid={json.dumps(grid)}", *more),
    ]


CHOICE = "base.guidance_weight=3.5,base.thresholding=dynamic"


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main.main(flags(world, out)) == 0
    return out


def times(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_every_cell_equals_the_library_and_is_in_table_and_figure(world, done):
    card = json.loads((done / "sweep.json").read_text())
    assert len(card["cells"]) == 8 and card["score"] == "alignment"
    assert [cell["set"] for cell in card["cells"]] == ["early"] * 4 + ["late"] * 4
    assert card["cells"][3]["values"] == {
        "base.guidance_weight": 3.5,
        "base.thresholding": "dynamic",
    }
    assert any(cell["front"] for cell in card["cells"])
    for cell in card["cells"]:
        numbers = cell["numbers"]
        assert numbers["images"] == PROMPTS and numbers["reference_images"] == PROMPTS + 2
        assert numbers["distance_low"] <= numbers["distance"] <= numbers["distance_high"]
        assert numbers["alignment"]
    assert len({cell["numbers"]["pictures_sha256"] for cell in card["cells"]}) == 8
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    generated = Cascade.load([str(world / "late")]).sample(
        [row["prompt"] for row in rows[:PROMPTS]],
        stage_settings={"base": {"guidance_weight": 3.5, "thresholding": "dynamic"}},
        batch_size=3,
    )
    for index, image in enumerate(generated):
        file = done / "late" / CHOICE / "samples" / f"{index:05d}_00.png"
        np.testing.assert_array_equal(images.decode(file.read_bytes()), image)
    table = (done / "sweep.md").read_text()
    assert table.count("\n| early |") == table.count("\n| late |") == 4
    svg = (done / "pareto.svg").read_text()
    assert "late base.thresholding=none" in svg and svg.count(">3.5</text>") == 4
    assert images.decode((done / "pareto.png").read_bytes()).std() > 0


def test_a_finished_cell_is_skipped_and_an_incomplete_one_resumes(world, done, monkeypatch):
    whole, before = (done / "sweep.json").read_text(), times(done)
    cell = done / "early" / CHOICE
    (cell / "cell.json").unlink()
    image = cell / "samples" / "00001_00.png"
    pixels = image.read_bytes()
    image.write_bytes(pixels[: len(pixels) // 2])
    (cell / ".cell.json.1.tmp").write_text("{")
    (cell / "features" / "samples" / "0000000_4.npz").write_bytes(b"PK")
    assert main.main(flags(world, done)) == 0
    assert (done / "sweep.json").read_text() == whole and image.read_bytes() == pixels
    (cell / ".cell.json.1.tmp").unlink()
    after = times(done)
    changed = {path.removeprefix(f"{done}/") for path in after if after[path] != before.get(path)}
    own = f"early/{CHOICE}"
    assert changed == {
        *(f"{own}/cell.json", f"{own}/samples/00001_00.png", f"{own}/samples/samples.jsonl"),
        *(f"{own}/samples/grid.png", f"{own}/features/samples/0000000_4.npz"),
        *("sweep.json", "sweep.md", "pareto.svg", "pareto.png"),
    }
    # With no cell left, no stage is loaded.
    monkeypatch.setattr(Cascade, "load", None)
    assert main.main(flags(world, done)) == 0


def test_a_moved_folder_goes_on(world, tmp_path, capsys):
    """Neither finished cells nor images depend on where the stages are, with their encoder."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(world, before)
    shutil.copytree(world / "text", before / "early" / "text")
    # One stage and one cell.
    grid = json.dumps({"base": {"guidance_weight": [2]}})

    def command(folder):
        given = ["evaluate", "sweep", f"--stages={folder}/early", "--resamples=3"]
        given += [f"--prompts={folder}/prompts.jsonl", "--limit=2", f"--grid={grid}"]
        return [*given, f"--out={folder}/out"]

    assert main.main(command(before)) == 0
    before.rename(after)
    whole, changes = (after / "out" / "sweep.json").read_text(), times(after / "out")
    assert main.main(command(after)) == 0, capsys.readouterr().err
    (cell,) = (after / "out").rglob("cell.json")
    assert times(cell.parent).items() <= changes.items()
    cell.unlink()
    assert main.main(command(after)) == 0, capsys.readouterr().err
    assert (after / "out" / "sweep.json").read_text() == whole
    assert {
        p: t for p, t in times(cell.parent).items() if p.endswith("_00.png")
    }.items() <= changes.items()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--seed=1", "seed=0, this run has 1"),
        ("--limit=2", "prompts=3, this run has 2"),
        ("--resamples=4", "resamples=3, this run has 4"),
        ("--names=late,early", "stages.base.weights="),
        (f"--scorer={SAME_SCORER}", f"scorer=None, this run has '{SAME_SCORER}'"),
        ("--names=early", "2 words"),
        (
            "--names=early,early",
            "base.guidance_weight=2,base.thresholding=none appears twice",
        ),
        ('--grid={"base": {"guidance_weight": 2}}', "must be a list of values; try [2]"),
        ('--grid={"base": {"guidance_weight": "papr_base"}}', "paper_base"),
        ('--grid={"base": {"guidance": [2]}}', "guidance_norm?"),
        ('--grid={"sr": {"aug_level": [0.1]}}', "base"),
        ('--grid={"base": {"steps": [2, 2]}}', "appears twice"),
        ('--grid={"base": {"aug_level": [2.0]}}', "within 0..1"),
        ("--grid=[1]", "must be JSON"),
        ("--features_from=x", "random_convolutions have no file"),
        ("--samples_per_prompt=0", "--samples_per_prompt=0 must be at least 1"),
    ],
)
def test_errors_are_one_line_and_nothing_is_sampled(world, done, more, says, capsys):
    before = times(done)
    assert main.main(flags(world, done, more)) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert times(done) == before


def test_one_stage_upsamples_all_sets_without_text(world, tmp_path, capsys):
    """Without its text encoder; neither its guidance nor a prompt changes a pixel."""
    grid = ["--grid={}", f"--enlarge={world}/sr"]
    assert main.main(flags(world, tmp_path, *grid)) == 0
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert len({cell["numbers"]["pictures_sha256"] for cell in cells}) == 2
    folder = tmp_path / "late" / "as_exported"
    lowres, generated = (
        np.stack(
            [images.decode((folder / part / f"0000{i}_00.png").read_bytes()) for i in (0, 1, 2)]
        )
        for part in ("samples", "enlarged")
    )
    assert lowres.shape == (3, 8, 8, 3) and generated.shape == (3, 16, 16, 3)
    stage = Cascade.load([str(world / "sr")], text_encoder=None)
    config = stage.configs[0]
    shape = (3, config.data.max_text_len)
    text = {
        "text_emb": np.ones((*shape, config.model.text_dim), np.float32),
        "text_mask": np.ones(shape, bool),
    }
    # Guidance weight 0 is the network without text, for any conditioning.
    without_text, with_text = (
        stage.sample(lowres=lowres, stage_settings={"sr": {"guidance_weight": w}}, **text)
        for w in (0.0, 3.0)
    )
    assert (
        np.abs(without_text.astype(int) - generated).max()
        <= 1
        < np.abs(with_text.astype(int) - generated).max()
    )
    rows = (folder / "enlarged" / "samples.jsonl").read_text()
    assert rows == (folder / "samples" / "samples.jsonl").read_text()
    # A cell records its upsampler; a stage of another size is rejected.
    assert main.main(flags(world, tmp_path, "--grid={}", f"--enlarge={world}/sr_late")) == 1
    assert "enlarge.weights=" in capsys.readouterr().err
    assert main.main(flags(world, tmp_path, "--grid={}", f"--enlarge={world}/early")) == 1
    assert "gets an image of 8 px, expected no image" in capsys.readouterr().err
    # The same parameters of another process are another upsampler.
    other = shutil.copytree(world / "sr", tmp_path / "other")
    change(other, "diffusion", logsnr_shift=-1.0)
    assert main.main(flags(world, tmp_path, "--grid={}", f"--enlarge={other}")) == 1
    assert "enlarge.config=" in capsys.readouterr().err


def change(stage, section, **values):
    config = json.loads((stage / "config.json").read_text())
    config[section] |= values
    (stage / "config.json").write_text(json.dumps(config))


def test_a_guide_is_known_by_its_configuration_too(world, tmp_path):
    hashes = []
    for prediction in ("x0", "v"):
        guide = shutil.copytree(world / "late", tmp_path / prediction)
        change(guide, "diffusion", prediction=prediction, loss_weight="truncated_v")
        hashes += Cascade.load([str(world / "early")], guides=[str(guide)]).guide_hashes
    assert hashes[0] != hashes[1]


def test_the_papers_lists_have_names():
    grid = sweep.read_grid('{"base": {"guidance_weight": "paper_base"}, "sr": {"steps": [8]}}')
    assert grid["base"]["guidance_weight"] == [1, 1.25, 1.5, 1.75, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert grid["sr"] == {"steps": [8]}


def cell(score, distance, **values):
    numbers = {"clip_score": score, "clip_score_low": None, "clip_score_high": None}
    numbers |= {"distance": distance, "distance_low": distance / 2, "distance_high": 2 * distance}
    asked = {"prompts": 3, "samples_per_prompt": 1, "features": "inception"}
    return {"set": "a", "values": values, "numbers": numbers, "asked": asked}


def test_the_front_is_the_set_of_undominated_cells():
    rng = np.random.default_rng(0)
    places = [tuple(place) for place in rng.integers(0, 6, (30, 2)).astype(float).tolist()]
    found = sweep_report.with_front([cell(*place) for place in places])
    for (score, distance), mark in zip(places, found, strict=True):
        better = [(s > score and d <= distance) or (s >= score and d < distance) for s, d in places]
        assert mark["front"] == (not any(better))
    assert 0 < sum(mark["front"] for mark in found) < 30


def test_lines_follow_the_first_field():
    cells = [
        cell(0.2 + w / 100 + s / 10, w, **{"base.guidance_weight": w, "base.steps": s})
        for w, s in itertools.product((1.0, 2.0, 3.0), (4, 8))
    ]
    axes = sweep_report.plot(cells).axes[0]
    lines = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) > 2}
    assert set(lines) == {"a base.steps=4", "a base.steps=8"}
    np.testing.assert_allclose(lines["a base.steps=4"].get_xdata(), [0.61, 0.62, 0.63])
    np.testing.assert_allclose(lines["a base.steps=8"].get_ydata(), [1, 2, 3])
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"] * 2
    table = sweep_report.format_table(sweep_report.with_front(cells))
    assert "| a | 3 | 8 | 1.03 |" in table.replace("|  |", "|")


def test_prompts_without_a_scorer_need_clip_and_real_images(world, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    flags = [f"--stages={world}/early", f"--prompts={tmp_path}/p.txt", f"--out={tmp_path}/out"]
    assert main.main(["evaluate", "sweep", *flags]) == 1
    assert "give --clip=DIR and --reference=DIR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_few_images_have_no_fid_and_a_warning_with_other_features(world, done, tmp_path, capsys):
    weights = ["--features=inception", f"--features_from={tmp_path}/none.pth"]
    assert main.main(flags(world, tmp_path / "out", *weights)) == 1
    assert "samples of --prompts: 3 images give no FID; at least 50" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main.main(flags(world, done)) == 0
    said = capsys.readouterr().out
    assert "warning: samples of --prompts: 3 images give no distance; at least 50" in said
    assert "warning: reference: 5 images" in said


def test_invalid_grids_are_rejected():
    for text in ('{"base": [1]}', "{", '"x"'):
        with pytest.raises(EvaluationError, match="--grid"):
            sweep.read_grid(text)
