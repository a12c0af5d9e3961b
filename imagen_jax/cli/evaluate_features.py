"""The evaluations with feature networks: fid, fid30k, clip_score."""

from __future__ import annotations

import argparse
import pathlib

from imagen_jax.cli import path_flags, wiring
from imagen_jax.cli import sample as sample_verb
from imagen_jax.evaluation import cards
from imagen_jax.evaluation.features import clip_score, fid, fid30k, frechet
from imagen_jax.evaluation.features.resizing import DEFAULT_FILTER, FILTERS, filter_name
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.inference import adapters
from imagen_jax.inference.request import with_settings
from imagen_jax.interop import hf_clip
from imagen_jax.interop.inception import PUBLIC_FILE
from imagen_jax.parallel import distributed


def add_fid(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate fid`."""
    path_flags.required(parser, "--samples", "folder of images", metavar="DIR", bucket="read")
    path_flags.required(
        parser, "--reference", "real images, or mu and sigma", metavar="DIR|FILE.npz", bucket="read"
    )
    _add_networks(parser)
    add_batch_flags(parser)
    path_flags.required(parser, "--out", "card to write", metavar="FILE.json", bucket="write")
    path_flags.optional(
        parser,
        "--save_reference",
        "write mu and sigma of --reference",
        metavar="FILE.npz",
        bucket="write",
    )


def run_fid(flags: argparse.Namespace) -> None:
    """Runs `evaluate fid`."""
    start(flags)
    card, reference = fid.evaluate(
        flags.samples, flags.reference, _store(flags.out), _settings(flags), log=log_once
    )
    if distributed.is_first():
        if flags.save_reference:
            frechet.save(flags.save_reference, reference.gaussian, reference.about)
        cards.write(card, flags.out)
        print(cards.format_card(card), end="")


def add_fid30k(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate fid30k`."""
    path_flags.required(
        parser, "--data", "TFDS data_dir with coco_captions, or a folder", metavar="DIR"
    )
    parser.add_argument(
        "--splits", default=",".join(fid30k.SPLITS), help="TFDS: splits of the reference"
    )
    parser.add_argument(
        "--max_quarantined", type=float, default=0.05, help="largest share of unusable images"
    )
    parser.add_argument(
        "--count", type=int, default=fid30k.COUNT, help="captions; fewer make a larger FID"
    )
    parser.add_argument("--caption_seed", type=int, default=0, help="seed of the caption selection")
    parser.add_argument(
        "--trained_on_coco", action="store_true", help="mark the card as not zero-shot"
    )
    _add_networks(parser)
    sample_verb.add_sampling(parser, samples_per_prompt=1)


def run_fid30k(flags: argparse.Namespace) -> None:
    """Runs `evaluate fid30k`."""
    if flags.samples_per_prompt != 1 or flags.limit:
        raise EvaluationError(
            "FID-30K has one sample per caption for all captions; omit --samples_per_prompt and "
            "--limit, give --count"
        )
    start(flags)
    # Load the networks first, so that a missing file fails before sampling.
    fid.inception_network(flags.inception, flags.filter)
    if flags.clip:
        hf_clip.read_towers(flags.clip)
    sources = fid30k.open_data(flags.data, flags.splits.split(","), flags.max_quarantined)
    rows = fid30k.select_captions(sources, flags.count, flags.caption_seed)
    fid30k.write_captions(rows, flags.out)
    folder = str(pathlib.Path(flags.out) / "samples")
    # `start` has set up the devices, which is possible only once.
    sampling_flags = argparse.Namespace(**{**vars(flags), "out": folder, "cpu_devices": 1})
    sample_verb.sample_rows(sampling_flags, rows)
    settings = sample_verb.read_settings(flags.stage_settings)
    configs = sample_verb.read_configs(flags.stages)
    configs = adapters.with_loras(configs, wiring.read_loras(flags))
    configs = with_settings(configs, settings, "--stage_settings")
    about = fid30k.about_run(rows, configs, flags.caption_seed, flags.seed)
    about |= {"negative_prompt": flags.negative_prompt, "guides": flags.guides}
    about["zero_shot"] = about["zero_shot"] and not flags.trained_on_coco
    card = fid30k.evaluate(flags.out, sources, _settings(flags), about, log=log_once)
    if distributed.is_first():
        cards.write(card, str(pathlib.Path(flags.out) / "fid30k.json"))
        print(cards.format_card(card), end="")


def add_clip_score(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate clip_score`."""
    path_flags.required(
        parser, "--samples", "folder written by `imagen sample`", metavar="DIR", bucket="read"
    )
    path_flags.required(parser, "--clip", "Hugging Face CLIP folder", metavar="DIR", bucket="read")
    add_batch_flags(parser)
    path_flags.required(parser, "--out", "card to write", metavar="FILE.json", bucket="write")


def run_clip_score(flags: argparse.Namespace) -> None:
    """Runs `evaluate clip_score`."""
    start(flags)
    card = clip_score.evaluate(
        flags.samples, flags.clip, _store(flags.out), batch_size=flags.batch_size, log=log_once
    )
    if distributed.is_first():
        cards.write(card, flags.out)
        print(cards.format_card(card), end="")


def _add_networks(parser: argparse.ArgumentParser) -> None:
    path_flags.required(
        parser,
        "--inception",
        f"{PUBLIC_FILE}, or .safetensors of it",
        metavar="FILE",
        bucket="read",
    )
    parser.add_argument(
        "--filter",
        default=DEFAULT_FILTER,
        type=filter_name,
        choices=list(FILTERS),
        help="resizing of Inception's input",
    )
    parser.add_argument(
        "--size", type=int, default=0, help="side of all images, pixels; 0: that of the samples"
    )
    path_flags.optional(
        parser,
        "--clip",
        "Hugging Face CLIP: adds CMMD, and to fid30k the CLIP score",
        metavar="DIR",
        bucket="read",
    )
    parser.add_argument(
        "--resamples", type=int, default=fid.RESAMPLES, help="groups of the jackknife interval"
    )


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of batch size and devices."""
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    wiring.add_cpu_devices(parser)


def _settings(flags: argparse.Namespace) -> fid.Settings:
    return fid.Settings(
        inception=flags.inception,
        filter=flags.filter,
        size=flags.size,
        clip=flags.clip,
        batch_size=flags.batch_size,
        resamples=flags.resamples,
    )


def start(flags: argparse.Namespace) -> None:
    """Checks numeric flags, sets up the devices and joins the other processes."""
    wiring.check_least(flags, 0, "size")
    wiring.check_least(flags, 1, "batch_size", "cpu_devices", "samples_per_prompt")
    wiring.check_least(flags, 2, "resamples", "count")
    wiring.set_up_devices(flags.cpu_devices)
    distributed.initialize()


def _store(out: str) -> pathlib.Path:
    """Folder of the feature cache, beside the card."""
    return pathlib.Path(out).with_suffix(".features")


def log_once(line: str) -> None:
    """Prints a progress line on the first process."""
    if distributed.is_first():
        print(line, flush=True)
