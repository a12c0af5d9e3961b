"""embed.py: duplicates are encoded once, killed runs resume, and the bytes are always the same."""

import json
import pathlib
import re
import threading
import time

import jax
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.text import T5Config
from imagen_jax.data.embeddings import embed
from imagen_jax.data.embeddings import store as embeddings
from imagen_jax.data.embeddings.store import EmbeddingError, EmbeddingStore
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5
from imagen_jax.text.vocabulary import TokenBatch


class LetterEncoder:
    """One token per letter; its embedding depends on letter, position and caption."""

    dim = 3
    max_len = 20

    def __init__(self, fail_after: int = 10**9):
        self.seen: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()
        self._left = fail_after

    def fingerprint(self) -> dict:
        return {"encoder": "letters", "max_len": self.max_len}

    def token_count(self, caption: str) -> int:
        return len(caption)

    def tokenize(self, captions):
        ids = np.zeros((len(captions), self.max_len), np.int32)
        for row, caption in zip(ids, captions, strict=True):
            cut = caption[: self.max_len].encode()
            row[: len(cut)] = list(cut)
        long = tuple(i for i, c in enumerate(captions) if self.token_count(c) > self.max_len)
        return TokenBatch(ids, ids > 0, long)

    def flops(self, length: int) -> float:
        return 100.0 * length

    def encode(self, ids, mask):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.shapes.add(ids.shape)
        self.seen += [
            "".join(map(chr, row[m])) for row, m in zip(ids, mask, strict=True) if m.any()
        ]
        place = np.arange(ids.shape[1])[None]
        total = ids.sum(axis=1, keepdims=True)
        return np.stack([ids / 7, ids * 0 + place, ids * 0 + total], axis=-1).astype(np.float32)


CAPTIONS = [f"{'long ' * (i % 5)}{i}" for i in range(40)]


def silent(line: str) -> None:
    del line


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_distinct_caption_is_encoded_once_and_found_again(tmp_path):
    encoder = LetterEncoder()
    report = embed.embed(CAPTIONS + CAPTIONS[:7], encoder, str(tmp_path), 4, silent)
    assert sorted(encoder.seen) == sorted(c[:20] for c in CAPTIONS)
    assert (report["captions"], report["unique"], report["truncated"]) == (47, 40, 8)
    assert encoder.shapes == {(4, 8), (4, 16), (4, 20)}

    store = EmbeddingStore.open(str(tmp_path), encoder.fingerprint())
    store.verify()
    text_emb, mask = store.lookup(CAPTIONS, 20)
    truth = encoder.tokenize(CAPTIONS)
    np.testing.assert_array_equal(mask, truth.mask)
    expected = encoder.encode(truth.ids, truth.mask) * truth.mask[..., None]
    np.testing.assert_allclose(text_emb.astype(np.float32), expected, rtol=2**-8)
    tokens = int(truth.mask.sum())
    assert report["tokens"] == tokens and report["bytes"] == tokens * 3 * 2


def test_a_killed_run_resumes_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    units = embed.embed(CAPTIONS, LetterEncoder(), str(whole), 4, silent)["units"]
    with pytest.raises(KeyboardInterrupt):
        embed.embed(CAPTIONS, LetterEncoder(fail_after=3), str(killed), 4, silent)
    # What SIGKILL leaves: half a unit under way, half a manifest, the claim of a unit that is done.
    done = next(path.name for path in killed.glob("unit_*.bin"))
    (killed / f".{done}.host.1.tmp").write_bytes(b"half a unit")
    (killed / ".manifest.json.host.1.tmp").write_bytes(b"{")
    (killed / f".{done}.claim0").touch()
    second = LetterEncoder()
    report = embed.embed(CAPTIONS[::-1], second, str(killed), 4, silent)
    assert report["computed"] == units - 3
    assert files(killed) == files(whole)
    assert embed.embed(CAPTIONS, LetterEncoder(0), str(killed), 4, silent)["computed"] == 0


def test_the_claim_of_a_dead_worker_is_taken_over(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    units = embed.embed(CAPTIONS, LetterEncoder(), str(alone), 4, silent)["units"]
    shared.mkdir()
    for path in list(alone.glob("unit_*.bin"))[:2]:
        (shared / f".{path.name}.claim0").touch()
    start = time.monotonic()
    report = embed.embed(CAPTIONS, LetterEncoder(), str(shared), 4, silent, patience=0.5)
    assert report["computed"] == units and time.monotonic() - start > 0.5
    assert files(shared) == files(alone)


def embed_together(encoders, folder) -> list[dict]:
    """Reports of workers that start at the same time, one for each encoder."""
    start, reports = threading.Barrier(len(encoders)), []

    def work(encoder):
        start.wait()
        reports.append(embed.embed(CAPTIONS, encoder, str(folder), 4, silent))

    threads = [threading.Thread(target=work, args=[encoder]) for encoder in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


def test_workers_share_the_units_and_encode_none_twice(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    units = embed.embed(CAPTIONS, LetterEncoder(), str(alone), 4, silent)["units"]
    first = threading.Barrier(3)  # No worker goes on before each has a unit.
    workers = [SlowEncoder(first) for _ in range(3)]
    reports = embed_together(workers, shared)
    assert sum(report["computed"] for report in reports) == units
    assert all(report["computed"] for report in reports)
    assert len(sum((worker.seen for worker in workers), [])) == len(CAPTIONS)
    assert files(shared) == files(alone)


class SlowEncoder(LetterEncoder):
    """Takes its time; its first call waits for the others at the barrier, if there is one."""

    def __init__(self, barrier: threading.Barrier | None = None):
        super().__init__()
        self.barrier = barrier

    def encode(self, ids, mask):
        if self.barrier:
            self.barrier.wait(timeout=60)
            self.barrier = None
        time.sleep(0.02)
        return super().encode(ids, mask)


def test_killed_while_the_manifest_is_written(tmp_path, monkeypatch):
    """The store is incomplete without the manifest; the next run only writes that."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    embed.embed(CAPTIONS, LetterEncoder(), str(whole), 4, silent)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "publish_file", die)
        with pytest.raises(KeyboardInterrupt):
            embed.embed(CAPTIONS, LetterEncoder(), str(killed), 4, silent)
    with pytest.raises(EmbeddingError, match="incomplete"):
        EmbeddingStore.open(str(killed))
    assert embed.embed(CAPTIONS, LetterEncoder(0), str(killed), 4, silent)["computed"] == 0
    assert files(killed) == files(whole)


def test_repeated_captions_are_encoded_once(tmp_path):
    different = [f"{i:05d}" for i in range(64)]
    calls = [
        embed.embed(texts, LetterEncoder(), str(tmp_path / name), 4, silent)["computed"]
        for name, texts in (("all", different), ("half", different[:32] * 2))
    ]
    assert calls == [16, 8]


def test_int8_halves_the_bytes_and_records_its_error(tmp_path):
    """Channels a hundred times larger than the rest, as T5's are, cost the others nothing."""
    rng = np.random.default_rng(0)

    class Outliers(LetterEncoder):
        dim = 256

        def encode(self, ids, mask):
            vectors = rng.normal(size=(*ids.shape, self.dim)).astype(np.float32)
            vectors[..., :3] *= 100
            self.exact = vectors
            return vectors

    texts = ["one caption", "another one"]
    encoder, plain = Outliers(), Outliers()
    report = embed.embed(texts, encoder, str(tmp_path / "int8"), 2, silent, dtype="int8")
    store = EmbeddingStore.open(str(tmp_path / "int8"), encoder.fingerprint())
    store.verify()
    text_emb, mask = store.lookup(sorted(texts, key=embeddings.caption_hash), 20)
    got, exact = text_emb[mask].astype(np.float32), encoder.exact[mask[:, :16]]
    manifest = json.loads((tmp_path / "int8" / "manifest.json").read_text())
    assert manifest["dtype"] == "int8"

    def relative(channels):
        error = got[:, channels] - exact[:, channels]
        return np.sqrt((error**2).mean() / (exact[:, channels] ** 2).mean())

    # bfloat16, into which the values are read, adds 0.0017 (root of the sum of squares).
    assert 0.004 < manifest["relative_rms_error"] < 0.012
    assert relative(slice(None)) == pytest.approx(manifest["relative_rms_error"], rel=0.2)
    assert relative(slice(3, None)) < 0.012
    wide = embed.embed(texts, plain, str(tmp_path / "bf16"), 2, silent)
    assert report["bytes"] < 0.6 * wide["bytes"]
    bf16 = json.loads((tmp_path / "bf16" / "manifest.json").read_text())
    assert 0.001 < bf16["relative_rms_error"] < 0.003


def test_estimate_agrees_with_the_run(tmp_path):
    texts = CAPTIONS + CAPTIONS[:5]
    report = embed.embed(texts, LetterEncoder(), str(tmp_path), 4, silent)
    estimate = embed.estimate(texts, LetterEncoder(0), 4)
    assert estimate == {name: report[name] for name in estimate}
    # Every unit is filled up to 4 captions of its length: 8, 16 or the longest, 20.
    assert estimate["padded_tokens"] * 100 == estimate["flops"]
    assert estimate["padded_tokens"] >= estimate["tokens"]


def test_progress_lines_have_throughput_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "REPORT_EVERY", 0.0)
    lines: list[str] = []
    embed.embed(CAPTIONS, LetterEncoder(), str(tmp_path), 4, lines.append)
    pattern = r"\d+ of \d+ units, here [\d,.]+ captions/s, [\d,]+ tokens/s, [\d,]+ s left"
    said = [line for line in lines if re.fullmatch(pattern, line)]
    assert said[-1].endswith(" 0 s left")
    assert "40 distinct captions of 40" in lines[-1] and "captions/s" in lines[-1]


def test_values_that_are_not_finite_are_rejected(tmp_path):
    class Broken(LetterEncoder):
        def encode(self, ids, mask):
            return super().encode(ids, mask) / np.zeros(1, np.float32)

    with np.errstate(all="ignore"), pytest.raises(EmbeddingError, match="NaN or infinite"):
        embed.embed(CAPTIONS, Broken(), str(tmp_path), 4, silent)
    assert [path.name[:6] for path in tmp_path.iterdir()] == [".plan_"]


def test_the_command_estimates_then_embeds(tmp_path, base_config, write_world, capsys):
    shape = T5Config(vocab_size=384, emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=16)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), t5.parameter_shapes(shape))
    hf_t5.save(tmp_path / "text", shape, params)
    path = write_world(tmp_path, base_config, steps=1, every=1)
    store = tmp_path / "new"
    command = ["embed", f"--config={path}", f"--config.data.embeddings={store}"]
    command += ["--config.text.encoder=bytes", f"--config.text.path={tmp_path}/text"]
    assert main.main([*command, "--estimate", "--flop_rate=1e6"]) == 0
    said = dict(line.split(":") for line in capsys.readouterr().out.splitlines() if ":" in line)
    said = {name.strip(): value.strip() for name, value in said.items()}
    # "image 0" to "image 11": 7 or 8 bytes and the end mark, 8 numbers of 2 bytes each.
    assert (said["captions"], said["unique"], said["tokens"]) == ("12", "12", "98")
    assert said["bytes"] == f"{98 * 8 * 2:,}" and not store.exists()
    hours = float(said["flops"]) / 1e6 / 3600
    assert said["chip_hours"].endswith(" at 1e+06 FLOP/s per chip")
    # Both are printed with three digits.
    assert float(said["chip_hours"].split()[0]) == pytest.approx(hours, rel=5e-3)
    assert main.main(command) == 0
    assert "12 distinct captions of 12, 98 tokens" in capsys.readouterr().out
    assert EmbeddingStore.open(str(store)).captions == 12
    assert main.main([*command, "--estimate", "--flop_rate=0"]) == 1
    assert "--flop_rate=0 must be above 0" in capsys.readouterr().err
