"""Sweeps over sampling settings and checkpoints, as the curves of the paper's Figure 4 are made.

Every set of stages draws the same prompts, with the same noise, for every choice from a grid of
sampling settings. One choice of one set is a cell, a folder of its own:

    OUT/SET/CHOICE/{samples/, enlarged/, features/, cell.json}

cell.json is written last: a cell that has one is finished and is not drawn again; of another the
pictures that are whole are kept. Where one super-resolution stage enlarges what all sets drew, its
pictures, in `enlarged/`, are measured. `sweep_report` makes the table and the figure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.config import overrides
from imagen_jax.config.fields import unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.evaluation import super_resolution
from imagen_jax.evaluation.features import fid, fid30k, networks
from imagen_jax.evaluation.features.extract import Pictures
from imagen_jax.evaluation.features.fid import FeatureExtractor, Reference
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import with_settings
from imagen_jax.inference.sample import Job, sample
from imagen_jax.interop import hf_clip
from imagen_jax.io import atomic, images
from imagen_jax.parallel import distributed
from imagen_jax.stages.folder import check_chain, load_stage, weights_hash
from imagen_jax.worlds.shapes import alignment, scenes

# Lists of a grid by name: the guidance weights of the curves of CLIP score against FID-10K.
PRESETS: dict[str, tuple[float, ...]] = {
    "paper_base": (1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
    "paper_sr": (1.0, 3.0, 5.0, 7.0, 8.0, 10.0, 12.0, 15.0, 18.0),
}
Grid = Mapping[str, Mapping[str, Sequence[Any]]]


class StageSet(NamedTuple):
    """Stage folders, base first, and what they are called."""

    name: str
    folders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is drawn and measured.

    Attributes:
      stage_sets: checkpoints, or cascades with other encoders, that are compared.
      grid: lists of values by stage and field of `SamplingConfig`; every choice is drawn.
      rows: prompts; rows of the shapes world are scored for alignment.
      limit: prompts that are drawn, the first ones; 0: all.
      seed: of the noise.
      samples_per_prompt: pictures per prompt.
      batch_size: pictures at a time, drawn and looked at.
      enlarge: folder of the super-resolution stage that enlarges, without text, what the sets drew
        before it is measured; "": it is measured as it is.
      reference: folder of real pictures; "": shapes world, a real picture for every row.
      features: row of `feature_networks.FEATURE_NETWORKS`.
      features_from: file or folder of its weights.
      filter: inception: row of `resizing.FILTERS`.
      clip: Hugging Face CLIP folder for the CLIP score; "": none.
      resamples: of the intervals of the distances.
    """

    stage_sets: tuple[StageSet, ...]
    grid: Grid
    rows: Sequence[Mapping[str, Any]]
    limit: int = 0
    seed: int = 0
    samples_per_prompt: int = 1
    batch_size: int = 32
    enlarge: str = ""
    reference: str = ""
    features: str = "random_convolutions"
    features_from: str = ""
    filter: str = "clean"
    clip: str = ""
    resamples: int = fid.RESAMPLES

    @property
    def drawn(self) -> Sequence[Mapping[str, Any]]:
        """The rows whose prompts are drawn."""
        return self.rows[: self.limit] if self.limit else self.rows

    @property
    def has_objects(self) -> bool:
        """Whether the rows say what the pictures should show."""
        return all("objects" in row and "kind" in row for row in self.rows)


class Cell(NamedTuple):
    """One choice of one set of stages.

    Attributes:
      stages: the set.
      settings: fields of `SamplingConfig` by stage name, as the grid has them.
      values: the same by `STAGE.FIELD`, as the stages have them.
    """

    stages: StageSet
    settings: dict[str, dict[str, Any]]
    values: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its name below the folder of the set."""
        words = [f"{key}={format_value(value)}" for key, value in self.values.items()]
        return re.sub(r"[^\w.=,-]+", "_", ",".join(words)) or "as_exported"


def format_value(value: Any) -> str:
    """A setting as it is shown."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_grid(text: str) -> dict[str, dict[str, list[Any]]]:
    """Reads `{"base": {"guidance_weight": [1, 2], "steps": [25]}, "sr": {...}}`.

    A name from PRESETS may stand in place of a list.

    Raises:
      EvaluationError: it is not of this form.
    """
    try:
        grid = json.loads(text)
        fields = [(stage, *item) for stage, given in grid.items() for item in given.items()]
    except (json.JSONDecodeError, AttributeError) as error:
        raise EvaluationError(
            f"--grid={text} must be JSON of lists by stage and field ({error}); try "
            '\'{"base": {"guidance_weight": [1, 2, 4]}}\''
        ) from error
    for stage, field, values in fields:
        where = f"--grid: {stage}.{field}"
        if isinstance(values, str):
            if values not in PRESETS:
                raise EvaluationError(unknown_name(where, values, list(PRESETS)))
            grid[stage][field] = list(PRESETS[values])
        elif not isinstance(values, list) or not values:
            raise EvaluationError(f"{where}={values} must be a list of values; try [{values}]")
    return grid


def cells_of(sweep: Sweep, configs: Mapping[str, Sequence[Config]]) -> list[Cell]:
    """All cells, set by set; of the grid's fields the first one varies slowest.

    Raises:
      ConfigError: a stage or field that is not there, or a value that it cannot have.
      EvaluationError: a value or the name of a set is given twice.
    """
    places = [(stage, field) for stage, given in sweep.grid.items() for field in given]
    lists = [sweep.grid[stage][field] for stage, field in places]
    cells = []
    for stages in sweep.stage_sets:
        for choice in itertools.product(*lists):
            settings: dict[str, dict[str, Any]] = {}
            for (stage, field), value in zip(places, choice, strict=True):
                settings.setdefault(stage, {})[field] = value
            changed = with_settings(configs[stages.name], settings, "--grid")
            sampling = {config.name: config.sampling for config in changed}
            values = {
                f"{stage}.{field}": getattr(sampling[stage], field) for stage, field in places
            }
            cells.append(Cell(stages, settings, values))
    names = [(cell.stages.name, cell.folder) for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(
                f"{' '.join(name)} is asked for twice; give every value of --grid and every name "
                "of --names once"
            )
    return cells


def run(sweep: Sweep, out: str, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Draws and measures every cell that `out` does not hold yet.

    Args:
      sweep: what.
      out: folder to write; several processes share it.
      log: receives progress lines.

    Returns:
      What is in the cells' files, cell by cell.

    Raises:
      EvaluationError, SampleError: something is missing, or `out` holds cells of other settings.
      ConfigError, StageError: the stages cannot be drawn with so.
    """
    folder = pathlib.Path(out)
    configs = {
        stages.name: [load_stage(path).config for path in stages.folders]
        for stages in sweep.stage_sets
    }
    larger = [load_stage(sweep.enlarge).config] if sweep.enlarge else []
    for chain in configs.values():
        check_chain([*chain, *larger])
    cells = cells_of(sweep, configs)
    last = [_last_stage(configs), *larger][-1]
    if not sweep.has_objects and not (sweep.clip and sweep.reference):
        raise EvaluationError(
            "--prompts are not rows of the shapes world, so there is nothing to score by; give "
            "--clip=DIR and --reference=DIR"
        )
    network, about = networks.load(sweep.features, sweep.features_from, sweep.filter)
    towers = hf_clip.read_towers(sweep.clip) if sweep.clip else None
    look = FeatureExtractor(network, towers, folder / "features", sweep.batch_size, log)
    reference = fid.compute_reference(look, _real_images(sweep, last), about)
    measured = about | {
        "reference_sha256": reference.about["reference_sha256"],
        "clip_sha256": towers.sha256 if towers else "",
        "resamples": sweep.resamples,
    }
    asked = [_asked(sweep, cell, configs[cell.stages.name], measured) for cell in cells]
    # All that can be refused is refused before anything is drawn.
    found = [_finished(folder, *pair) for pair in zip(cells, asked, strict=True)]
    log(f"{folder}: {sum(cell is not None for cell in found)} of {len(cells)} cells are there")
    enlarger = super_resolution.load(sweep.enlarge) if sweep.enlarge and None in found else None
    for stages in sweep.stage_sets:
        wanted = [i for i, cell in enumerate(cells) if cell.stages == stages and found[i] is None]
        if not wanted:
            continue
        cascade = Cascade.load(stages.folders)
        for i in wanted:
            log(f"cell {i + 1}/{len(cells)}: {stages.name} {cells[i].folder}")
            numbers = _draw(sweep, cells[i], (cascade, enlarger), folder, look, reference, log)
            found[i] = _write(folder, cells[i], asked[i], numbers)
    return [cell for cell in found if cell is not None]


def _last_stage(configs: Mapping[str, Sequence[Config]]) -> Config:
    """The stage that makes the pictures, one of those of all sets: they draw the same side."""
    sizes = {name: chain[-1].data.image_size for name, chain in configs.items()}
    if len(set(sizes.values())) > 1:
        raise EvaluationError(f"--stages draw pictures of different sides: {sizes}; give one size")
    return next(iter(configs.values()))[-1]


def _real_images(sweep: Sweep, last: Config) -> Pictures:
    """Those of --reference, or of the shapes world as the stage saw such pictures in training."""
    size, filter = last.data.image_size, last.data.resize_filter
    if sweep.reference:
        return fid.load_images(sweep.reference, size)[0]

    def load(number: int) -> np.ndarray:
        rng = np.random.default_rng((alignment.SEED, number))
        scene = scenes.scene_from_row(sweep.rows[number], rng)
        return images.center_crop_resize(scenes.draw(scene), size, filter)

    return Pictures(len(sweep.rows), load)


def _asked(
    sweep: Sweep, cell: Cell, configs: Sequence[Config], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a cell's numbers hang on, as JSON has it."""
    rows = "".join(json.dumps(dict(row), sort_keys=True) + "\n" for row in sweep.drawn)
    stages = {
        config.name: {
            "weights": weights_hash(path),
            "config": overrides.fingerprint(config),
            **dataclasses.asdict(config.sampling),
        }
        for config, path in zip(
            with_settings(configs, cell.settings, "--grid"), cell.stages.folders, strict=True
        )
    }
    about = {
        "seed": sweep.seed,
        "samples_per_prompt": sweep.samples_per_prompt,
        "prompts": len(sweep.drawn),
        "prompts_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        **measured,
        "stages": stages,
    }
    if sweep.enlarge:
        config = load_stage(sweep.enlarge).config
        sampling = dataclasses.asdict(config.sampling)
        about["enlarge"] = {"weights": weights_hash(sweep.enlarge), **sampling}
    return json.loads(json.dumps(about))


def _finished(folder: pathlib.Path, cell: Cell, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is in the cell's file; None where it is not drawn to the end."""
    file = folder / cell.stages.name / cell.folder / "cell.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    was, now = overrides.flat(found["asked"]), overrides.flat(asked)
    for field in [*now, *was]:
        if was.get(field) != now.get(field):
            raise EvaluationError(
                f"{file} was made with {field}={was.get(field)!r}, this run has "
                f"{now.get(field)!r}; give another --out, or the arguments of before"
            )
    return found


def _draw(
    sweep: Sweep,
    cell: Cell,
    drawing: tuple[Cascade, Cascade | None],
    folder: pathlib.Path,
    look: FeatureExtractor,
    reference: Reference,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Draws a cell, its cascade and what enlarges after it, and measures it."""
    cascade, enlarger = drawing
    where = folder / cell.stages.name / cell.folder
    drawn_in = str(where / "samples")
    job = Job(
        seed=sweep.seed,
        samples_per_prompt=sweep.samples_per_prompt,
        batch_size=sweep.batch_size,
        stage_settings=cell.settings,
        checkpoint=",".join(cell.stages.folders),
    )
    sample(cascade, sweep.drawn, drawn_in, job, log)
    size = cascade.configs[-1].data.image_size
    if enlarger is not None:
        small, drawn_in = drawn_in, str(where / "enlarged")
        size = enlarger.configs[-1].data.image_size
        super_resolution.enlarge(
            enlarger, small, drawn_in, seed=sweep.seed, batch_size=sweep.batch_size
        )
    look = look._replace(store=where / "features")
    drawn, _ = fid.load_images(drawn_in, size)
    numbers = fid.score(look, drawn, reference, sweep.resamples)
    names = {"fid": "distance", "low": "distance_low", "high": "distance_high"}
    numbers = {names.get(name, name): value for name, value in numbers.items()}
    if look.towers is not None:
        numbers |= fid30k.clip_score_of(look, drawn, drawn_in, sweep.clip, look.towers)
    if sweep.has_objects:
        numbers["alignment"] = alignment.score_folder(drawn_in)
    return numbers


def _write(
    folder: pathlib.Path, cell: Cell, asked: Mapping[str, Any], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    card = {
        "card": "sweep_cell",
        "set": cell.stages.name,
        "values": cell.values,
        "folder": f"{cell.stages.name}/{cell.folder}",
        "numbers": numbers,
        "asked": asked,
    }
    if distributed.is_first():
        file = folder / cell.stages.name / cell.folder / "cell.json"
        atomic.write_json(file, card)
    return json.loads(json.dumps(card))
