"""Fixtures of the whole suite: compilation settings, tiny stages, tiny data sets, a browser."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

# JAX and TensorFlow read these when they are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import (
    CheckpointConfig,
    Config,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from imagen_jax.data.embeddings.store import (
    describe_unit,
    unit_name,
    write_manifest,
    write_unit,
)
from imagen_jax.parallel import partitioning
from imagen_jax.stages.network import init_params

SIZE, LENGTH, DIM = 8, 4, 8

BASE = Config(
    name="base",
    data=DataConfig(image_size=SIZE, batch_size=4, max_text_len=LENGTH),
    model=ModelConfig(
        name="efficient_unet",
        channels=(8,),
        num_res_blocks=(1,),
        self_attention=(True,),
        cross_attention=(True,),
        strided_stem=(False,),
        head_dim=8,
        num_groups=4,
        embed_dim=16,
        text_dim=DIM,
    ),
    diffusion=DiffusionConfig(prediction="x0", loss_weight="truncated_v"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
    train=TrainConfig(steps=6, log_every=1),
    checkpoint=CheckpointConfig(every=2),
    sampling=SamplingConfig(sampler="ddim", steps=4, guidance_weight=2.0),
)
SR = dataclasses.replace(
    BASE,
    name="sr",
    data=dataclasses.replace(BASE.data, image_size=2 * SIZE, lowres_size=SIZE),
    model=dataclasses.replace(BASE.model, lowres=True, patch_size=2),
    sampling=dataclasses.replace(BASE.sampling, aug_level=0.1),
)


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("training", "parallel"))


@pytest.fixture(scope="session", autouse=True)
def quick_compilation(tmp_path_factory):
    """Short compilation: with tiny models most of the suite's time is the compiler's."""
    base = tmp_path_factory.getbasetemp()
    # The workers of pytest-xdist compile the same programs, so they share a cache.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(shared / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # For the programs that tests start.


@pytest.fixture(scope="session")
def base_config() -> Config:
    """The tiny base stage: 8x8 images, 4 text tokens of width 8."""
    return BASE


@pytest.fixture(scope="session")
def sr_config() -> Config:
    """The tiny super-resolution stage, 8 -> 16."""
    return SR


@pytest.fixture(scope="session")
def make_batch():
    """(config, seed) -> one batch of random images and text embeddings of 1 to 4 tokens."""

    def make(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        n, size = config.data.batch_size, config.data.image_size
        length, dim = config.data.max_text_len, config.model.text_dim
        batch = {
            "image": rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32),
            "text_emb": rng.normal(size=(n, length, dim)).astype(np.float32),
            "text_mask": np.arange(length) <= (np.arange(n) % length)[:, None],
        }
        if config.data.lowres_size:
            low = config.data.lowres_size
            batch["lowres"] = rng.uniform(-1, 1, (n, low, low, 3)).astype(np.float32)
        return batch

    return make


@pytest.fixture(scope="session")
def random_params():
    """config -> random parameters without zeros, so that every layer affects the output."""

    def make(config: Config, seed: int = 0):
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: (
                rng.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 4) ** 0.5
            ).astype(np.float32),
            partitioning.unbox(shapes),
        )

    return make


CONFIG_FILE = """
from imagen_jax.config import overrides

def get_config(name=""):
    return overrides.to_config_dict(overrides.from_json('''{json}'''))
"""


@pytest.fixture(scope="session")
def write_world():
    """Writes a folder of 12 images, their embeddings and a configuration file for `train`."""

    def write(folder: pathlib.Path, config: Config, steps: int, every: int) -> pathlib.Path:
        rng = np.random.default_rng(0)
        image_folder = folder / "images"
        image_folder.mkdir()
        captions = [f"image {i}" for i in range(12)]
        for i, caption in enumerate(captions):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image_folder / f"{i}.png")
            (image_folder / f"{i}.txt").write_text(caption)
        store = folder / "embeddings"
        store.mkdir()
        vectors = [rng.normal(size=(3, DIM)).astype(ml_dtypes.bfloat16) for _ in captions]
        unit = store / unit_name(captions, encoder="fake")
        write_unit(unit, captions, vectors)
        description = {"encoder": "fake", "max_len": LENGTH}
        write_manifest(store, [describe_unit(unit)], description)
        data = dataclasses.replace(
            config.data,
            kind="folder",
            path=str(image_folder),
            embeddings=str(store),
            loader="numpy",
            max_quarantined=0.5,
        )
        config = dataclasses.replace(
            config,
            data=data,
            train=TrainConfig(steps=steps, log_every=1),
            checkpoint=CheckpointConfig(every=every),
        )
        path = folder / "tiny.py"
        path.write_text(CONFIG_FILE.format(json=json.dumps(dataclasses.asdict(config))))
        return path

    return write


class Browser:
    """A page in headless Chromium, controlled through its DevTools pipe.

    Messages are JSON, terminated by a zero byte.
    """

    def __init__(self, executable: str, folder, size=(1400, 900)):
        self.downloads = folder / "downloads"
        self.requests: list[str] = []
        self.problems: list[str] = []
        commands, self._write = os.pipe()
        self._read, replies = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}/profile"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        flags += [f"--window-size={size[0]},{size[1]}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{replies}', "browser", executable, *flags],
            pass_fds=(commands, replies),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(replies)
        self._buffer, self._number, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def _message(self):
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has exited"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._message()
            if got.get("method") == "Network.requestWillBeSent":
                self.requests.append(got["params"]["request"]["url"])
            elif got.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(got["params"]))
            if got.get("id") == self._number:
                assert "error" not in got, got
                return got["result"]

    def open(self, address: str | pathlib.Path) -> None:
        url = address if isinstance(address, str) else address.as_uri()
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)}")
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Backspace": 8, "Tab": 9}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        event = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0]))}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        box = self.value(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        at = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def close(self) -> None:
        # The browser's child processes are in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with access to loopback only; skips the test without Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if not executable:
        pytest.skip("no Chromium here")
    page = Browser(executable, tmp_path)
    yield page
    page.close()
