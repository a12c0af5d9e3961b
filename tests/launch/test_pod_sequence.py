"""docs/clusters.md from an empty slice to scores: its commands as they are, on emulators.

Four processes stand for the workers of the slice. What the commands call of Google's is replaced
(`tests/reference/pod.py`); launch/tpu_vm.sh, the script on the workers and the verbs (prepare,
embed, train, export, sample, evaluate clip_score) are the real ones, with the sizes of `TINY`.
"""

import fcntl
import io
import json
import pathlib
import subprocess
import tarfile

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from imagen_jax.io import buckets
from tests import object_stores
from tests.reference import pages, pod
from tests.reference.pages import ROOT, Block

pytestmark = pytest.mark.slow

PAGE, BUCKET = "docs/clusters.md", "gs://my-bucket"
GOLDEN = ROOT / "tests" / "golden"
STEPS, IMAGES = 6, 12
CHIPS = "--config.mesh.fsdp=4"  # Of `embed` on a worker, which has one CPU device here.
# Shape of tests/golden/t5_t5x.
T5 = {"vocab_size": 128, "emb_dim": 32, "num_layers": 3, "num_heads": 4, "head_dim": 8}
TINY = f"""
c.data.image_size, c.data.batch_size, c.data.loader = 16, 8, "numpy"
c.data.max_text_len = c.text.max_len = 8
c.text.preset, c.model.text_dim = "", 32
c.model.channels, c.model.head_dim, c.model.num_groups, c.model.embed_dim = (8, 16), 8, 4, 16
c.model.num_res_blocks, c.model.self_attention = (1, 1), (False, True)
c.model.cross_attention = (False, True)
c.embed.unit_size = 4
c.mesh.fsdp, c.train.accumulation = 4, 1
c.train.steps, c.train.log_every, c.checkpoint.every, c.sampling.steps = {STEPS}, 1, 3, 2
"""


def block(language: str) -> Block:
    """The block of the section on Cloud TPU."""
    name = pathlib.Path(__file__).relative_to(ROOT).as_posix()
    (found,) = [b for b in pages.ALL if (b.page, b.language, b.about) == (PAGE, language, name)]
    return found


def my_config(address: str) -> str:
    """configs/my.py of the page, with small sizes."""
    source = (ROOT / "configs" / "imagen.py").read_text()
    assert source.count("\n    return c\n") == 1
    lines = (block("python").code.replace(BUCKET, address) + TINY).splitlines()
    return source.replace("\n    return c\n", "\n    ".join(["", *lines, "return c"]) + "\n")


def upload(address: str) -> None:
    """What the page takes for granted in the bucket: images, T5, CLIP, prompts."""
    rng, tar, captions = np.random.default_rng(0), io.BytesIO(), []
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for i in range(IMAGES):
            captions.append(f"a {['red', 'green', 'blue'][i % 3]} square number {i}")
            png = io.BytesIO()
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(png, "png")
            for suffix, data in (("png", png.getvalue()), ("txt", captions[-1].encode())):
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    t5 = f"{address}/t5_1_1_xxl"
    objects = {
        f"{address}/images/00000.tar": tar.getvalue(),
        f"{address}/prompts.txt": b"a red square\na blue square\n",
        f"{t5}/sentencepiece.model": model.getvalue(),
        f"{t5}/t5_config.json": json.dumps({**T5, "mlp_dim": 64}).encode(),
    }
    copies = {"t5_t5x/checkpoint_1000": f"{t5}/checkpoint_1000000", "clip": f"{address}/clip"}
    for folder, target in copies.items():
        for file in (GOLDEN / folder).rglob("*"):
            if file.is_file():
                name = file.relative_to(GOLDEN / folder).as_posix()
                objects[f"{target}/{name}"] = file.read_bytes()
    for name, data in objects.items():
        buckets.write(name, data)


@pytest.fixture
def slice_folder(tmp_path, tmp_path_factory):
    """The folder of a pod; two tests at once would take each other's port."""
    pod.write_tools(tmp_path / "tools")
    with (tmp_path_factory.getbasetemp().parent / "pod.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path
        pod.end(tmp_path)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_the_commands_of_the_page(scheme, slice_folder):
    here = slice_folder / "checkout"
    with object_stores.running(scheme):
        address = f"{scheme}://{object_stores.BUCKET}"
        pod.checkout(here, ROOT, {"configs/my.py": my_config(address)})
        upload(address)
        code = block("bash").code.replace(BUCKET, address)
        assert CHIPS in code
        script = "set -euo pipefail\n" + code.replace(CHIPS, "--config.mesh.fsdp=1")
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=here,
            env=pod.environment(slice_folder),
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"

        rows = buckets.read(f"{address}/base/metrics.jsonl").data.decode().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, STEPS + 1))
        names = buckets.names(address)
        lists = [f"base/checkpoints/{STEPS}/{process:05d}.json" for process in range(pod.WORKERS)]
        assert set(lists) <= set(names)
        assert {"stages/base/params.safetensors", "samples/00001_00.png"} <= set(names)
        card = json.loads(buckets.read(f"{address}/clip_score.json").data)
        assert card["images"] == 2
    # Every worker has a part of the embeddings, and joined the training.
    workers = sorted(slice_folder.glob("pod.deleted/*/imagen_jax"))
    assert len(workers) == pod.WORKERS
    for number, worker in enumerate(workers):
        joined = f"process {number} of {pod.WORKERS}: waiting for the others"
        assert joined in (worker / "train.log").read_text()
    # Nothing else appears on the laptop or on a worker, such as a folder named after a scheme.
    added = {path.name for path in here.iterdir()} - {"launch", "imagen_jax", "configs", ".git"}
    assert added == {"setup.py", "constraints.txt", "runs"}
    assert not [path for path in slice_folder.rglob("*") if path.name in ("gs:", "s3:")]
