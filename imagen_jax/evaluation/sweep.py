"""Sweeps over sampling settings and checkpoints: the curves of the paper's Figure 4.

Every set of stages samples the same prompts with the same noise for every choice from a grid of
sampling settings. One choice of one set is a cell, in a folder of its own:

    OUT/SET/CHOICE/{samples/, enlarged/, features/, cell.json}

cell.json is written last: a cell that has one is skipped, in any other cell complete images are
kept. With `enlarge`, one super-resolution stage upsamples the images of all sets, and its output in
`enlarged/` is measured. `sweep_report` makes the table and the figure.
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
from imagen_jax.evaluation.features.extract import LazyImages
from imagen_jax.evaluation.features.fid import FeatureExtractor, Reference
from imagen_jax.evaluation.features.resizing import DEFAULT_FILTER
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.evaluation.scorers import Scorer
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import with_settings
from imagen_jax.inference.sample import SampleOptions, sample
from imagen_jax.interop import hf_clip
from imagen_jax.io import atomic, images
from imagen_jax.parallel import distributed
from imagen_jax.stages.folder import check_chain, config_hash, load_stage, weights_hash

# Lists of a grid by name: the guidance weights of the curves of CLIP score against FID-10K.
PRESETS: dict[str, tuple[float, ...]] = {
    "paper_base": (1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
    "paper_sr": (1.0, 3.0, 5.0, 7.0, 8.0, 10.0, 12.0, 15.0, 18.0),
}
Grid = Mapping[str, Mapping[str, Sequence[Any]]]


class StageSet(NamedTuple):
    """Named stage folders, base first."""

    name: str
    folders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of sampling settings and how its cells are measured.

    Attributes:
      stage_sets: the compared checkpoints or cascades.
      grid: lists of values by stage and field of `SamplingConfig`; every combination is sampled.
      rows: prompt rows.
      limit: number of prompts to sample, the first ones; 0: all.
      seed: seed of the noise.
      samples_per_prompt: images per prompt.
      batch_size: images per batch, in sampling and in feature extraction.
      enlarge: folder of a super-resolution stage that upsamples, without text, the images of all
        sets before they are measured; "": none.
      reference: folder of real images; "": the scorer's real image of every row.
      features: row of `networks.FEATURE_NETWORKS`.
      features_from: file or folder of its weights.
      filter: inception: row of `resizing.FILTERS`.
      clip: Hugging Face CLIP folder for the CLIP score; "": none.
      resamples: bootstrap resamples of the distance intervals.
      scorer: scores alignment if it can score every row; None: no alignment.
      scorer_name: distinguishes the cells of other scorers in a folder; "": the default scorer.
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
    filter: str = DEFAULT_FILTER
    clip: str = ""
    resamples: int = fid.RESAMPLES
    scorer: Scorer | None = None
    scorer_name: str = ""

    @property
    def sampled_rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows whose prompts are sampled."""
        return self.rows[: self.limit] if self.limit else self.rows

    @property
    def row_scorer(self) -> Scorer | None:
        """The scorer, if it can score every row."""
        scorer = self.scorer
        return scorer if scorer is not None and all(map(scorer.can_score, self.rows)) else None


class Cell(NamedTuple):
    """One choice of settings for one set of stages.

    Attributes:
      stages: the set.
      settings: fields of `SamplingConfig` by stage name, with the types of the grid.
      values: the same by `STAGE.FIELD`, with the types of the configuration.
    """

    stages: StageSet
    settings: dict[str, dict[str, Any]]
    values: dict[str, Any]

    @property
    def folder(self) -> str:
        """Folder name below the folder of the set."""
        words = [f"{key}={format_value(value)}" for key, value in self.values.items()]
        return re.sub(r"[^\w.=,-]+", "_", ",".join(words)) or "as_exported"


def format_value(value: Any) -> str:
    """A setting as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_grid(text: str) -> dict[str, dict[str, list[Any]]]:
    """Reads `{"base": {"guidance_weight": [1, 2], "steps": [25]}, "sr": {...}}`.

    A name from PRESETS can replace a list.

    Raises:
      EvaluationError: the text has another form.
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
    """All cells, set by set; the first field of the grid varies slowest.

    Raises:
      ConfigError: unknown stage or field, or an invalid value.
      EvaluationError: duplicate value or name of a set.
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
                f"{' '.join(name)} appears twice; give every value of --grid and every name of "
                "--names once"
            )
    return cells


def run(sweep: Sweep, out: str, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Samples and measures every cell that `out` does not hold yet.

    Args:
      sweep: the cells.
      out: folder to write; several processes share it.
      log: receives progress lines.

    Returns:
      The content of the cells' files, cell by cell.

    Raises:
      EvaluationError, SampleError: something is missing, or `out` holds cells of other settings.
      ConfigError, StageError: the stages do not fit together, or not these settings.
    """
    folder = pathlib.Path(out)
    configs = {
        stages.name: [load_stage(path).config for path in stages.folders]
        for stages in sweep.stage_sets
    }
    upsamplers = [load_stage(sweep.enlarge).config] if sweep.enlarge else []
    for chain in configs.values():
        check_chain([*chain, *upsamplers])
    cells = cells_of(sweep, configs)
    last = [_last_stage(configs), *upsamplers][-1]
    if sweep.row_scorer is None and not (sweep.clip and sweep.reference):
        raise EvaluationError(
            "--scorer cannot score the rows of --prompts, so there is nothing to score by; give "
            "--clip=DIR and --reference=DIR, or a --scorer of these prompts"
        )
    real = _real_images(sweep, last)
    warn = None if sweep.features == "inception" else log  # Other distances are no FID.
    sampled = len(sweep.sampled_rows) * sweep.samples_per_prompt
    fid.check_count(sampled, "samples of --prompts", warn)
    fid.check_count(real.count, "reference", warn)
    network, about = networks.load(sweep.features, sweep.features_from, sweep.filter)
    towers = hf_clip.read_towers(sweep.clip) if sweep.clip else None
    extractor = FeatureExtractor(network, towers, folder / "features", sweep.batch_size, log)
    reference = fid.compute_reference(extractor, real, about)
    measured = about | {
        "reference_sha256": reference.about["reference_sha256"],
        "clip_sha256": towers.sha256 if towers else "",
        "resamples": sweep.resamples,
    }
    identities = [
        _cell_identity(sweep, cell, configs[cell.stages.name], measured) for cell in cells
    ]
    # Every refusal comes before any sampling.
    found = [_finished(folder, *pair) for pair in zip(cells, identities, strict=True)]
    log(f"{folder}: {sum(cell is not None for cell in found)} of {len(cells)} cells exist")
    upsampler = super_resolution.load(sweep.enlarge) if sweep.enlarge and None in found else None
    for stages in sweep.stage_sets:
        missing = [i for i, cell in enumerate(cells) if cell.stages == stages and found[i] is None]
        if not missing:
            continue
        cascades = Cascades(Cascade.load(stages.folders), upsampler)
        for i in missing:
            log(f"cell {i + 1}/{len(cells)}: {stages.name} {cells[i].folder}")
            numbers = _sample_cell(sweep, cells[i], cascades, folder, extractor, reference, log)
            found[i] = _write(folder, cells[i], identities[i], numbers)
    return [cell for cell in found if cell is not None]


class Cascades(NamedTuple):
    """The cascade of a set, and the stage of `Sweep.enlarge` if there is one."""

    stages: Cascade
    upsampler: Cascade | None


def _last_stage(configs: Mapping[str, Sequence[Config]]) -> Config:
    """The last stage of the first set; all sets must have its image size."""
    sizes = {name: chain[-1].data.image_size for name, chain in configs.items()}
    if len(set(sizes.values())) > 1:
        raise EvaluationError(f"--stages have different image sizes: {sizes}; give one size")
    return next(iter(configs.values()))[-1]


def _real_images(sweep: Sweep, last: Config) -> LazyImages:
    """Images of --reference, or the scorer's, preprocessed as in training of the last stage."""
    size, filter = last.data.image_size, last.data.resize_filter
    scorer = sweep.row_scorer
    if sweep.reference or scorer is None:
        return fid.load_images(sweep.reference, size)[0]

    def load(index: int) -> np.ndarray:
        return images.center_crop_resize(
            scorer.real_image(sweep.rows[index], index=index), size, filter
        )

    return LazyImages(len(sweep.rows), load)


def _cell_identity(
    sweep: Sweep, cell: Cell, configs: Sequence[Config], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that determines a cell's numbers, as JSON."""
    rows = "".join(json.dumps(dict(row), sort_keys=True) + "\n" for row in sweep.sampled_rows)
    stages = {
        config.name: {
            "weights": weights_hash(path),
            "config": config_hash(config),
            **dataclasses.asdict(config.sampling),
        }
        for config, path in zip(
            with_settings(configs, cell.settings, "--grid"), cell.stages.folders, strict=True
        )
    }
    about = {
        "seed": sweep.seed,
        "samples_per_prompt": sweep.samples_per_prompt,
        "prompts": len(sweep.sampled_rows),
        "prompts_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        **measured,
        "stages": stages,
    }
    if sweep.scorer_name:
        about["scorer"] = sweep.scorer_name
    if sweep.enlarge:
        config = load_stage(sweep.enlarge).config
        own = {"weights": weights_hash(sweep.enlarge), "config": config_hash(config)}
        about["enlarge"] = {**own, **dataclasses.asdict(config.sampling)}
    return json.loads(json.dumps(about))


def _finished(
    folder: pathlib.Path, cell: Cell, identity: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The content of the cell's file; None if the cell is incomplete."""
    file = folder / cell.stages.name / cell.folder / "cell.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    was, now = overrides.flatten_fields(found["asked"]), overrides.flatten_fields(identity)
    for field in [*now, *was]:
        if was.get(field) != now.get(field):
            raise EvaluationError(
                f"{file} was made with {field}={was.get(field)!r}, this run has "
                f"{now.get(field)!r}; give another --out, or the earlier arguments"
            )
    return found


def _sample_cell(
    sweep: Sweep,
    cell: Cell,
    cascades: Cascades,
    folder: pathlib.Path,
    extractor: FeatureExtractor,
    reference: Reference,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Samples a cell, upsamples its images where the sweep says so, and measures them."""
    cell_folder = folder / cell.stages.name / cell.folder
    samples_dir = str(cell_folder / "samples")
    job = SampleOptions(
        seed=sweep.seed,
        samples_per_prompt=sweep.samples_per_prompt,
        batch_size=sweep.batch_size,
        stage_settings=cell.settings,
        checkpoint=",".join(cell.stages.folders),
    )
    sample(cascades.stages, sweep.sampled_rows, samples_dir, job, log)
    size = cascades.stages.configs[-1].data.image_size
    if cascades.upsampler is not None:
        lowres_dir, samples_dir = samples_dir, str(cell_folder / "enlarged")
        size = cascades.upsampler.configs[-1].data.image_size
        super_resolution.upsample_samples(
            cascades.upsampler,
            lowres_dir,
            samples_dir,
            seed=sweep.seed,
            batch_size=sweep.batch_size,
        )
    extractor = extractor._replace(store=cell_folder / "features")
    generated, _ = fid.load_images(samples_dir, size)
    numbers = fid.score(extractor, generated, reference, sweep.resamples)
    names = {"fid": "distance", "low": "distance_low", "high": "distance_high"}
    numbers = {names.get(name, name): value for name, value in numbers.items()}
    if extractor.towers is not None:
        numbers |= fid30k.clip_score_of(
            extractor, generated, samples_dir, sweep.clip, extractor.towers
        )
    if sweep.row_scorer is not None:
        numbers["alignment"] = sweep.row_scorer.score_folder(samples_dir)
    return numbers


def _write(
    folder: pathlib.Path, cell: Cell, identity: Mapping[str, Any], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    card = {
        "card": "sweep_cell",
        "set": cell.stages.name,
        "values": cell.values,
        "folder": f"{cell.stages.name}/{cell.folder}",
        "numbers": numbers,
        "asked": identity,
    }
    if distributed.is_first():
        file = folder / cell.stages.name / cell.folder / "cell.json"
        atomic.write_json(file, card)
    return json.loads(json.dumps(card))
