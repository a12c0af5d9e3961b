"""LoRAs chosen by each request: validation, and a server that switches between them."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.fields import ConfigError
from imagen_jax.inference.adapters import LoraSpec, names, weights, with_loras
from imagen_jax.inference.request import with_settings
from imagen_jax.interop.weights import flatten
from imagen_jax.serving.http_request import ClientRequestError, Limits, parse
from imagen_jax.stages import lora_file
from imagen_jax.stages.folder import load_stage
from imagen_jax.stages.lora import Factors
from tests.serving.test_server import generate

LOADED = ("cat@0.8", "a@b@1.0")


def test_a_lora_is_named_by_its_folder_unless_another_is_too():
    paths = ["runs/cat", "dogs/lora.safetensors", "birds/lora"]
    specs = [LoraSpec("base", path) for path in paths]
    assert names(specs) == ["cat", *paths[1:]]
    assert names([*specs, specs[1]]) == ["cat", *paths[1:], f"{paths[1]}#4"]


def test_configurations_name_what_is_loaded(base_config, sr_config):
    specs = [LoraSpec("base", "runs/cat", 0.8), LoraSpec("sr", "runs/dog")]
    base, sr = with_loras([base_config, sr_config], specs)
    assert (base.sampling.loras, sr.sampling.loras) == (("cat@0.8",), ("dog@1.0",))
    # A request chooses among them; earlier settings of a stage folder have no effect.
    (chosen, _) = with_settings([base, sr], {"base": {"loras": ["cat@2"]}})
    assert weights(chosen.sampling.loras, base.sampling.loras, "x") == {"cat": 2.0}
    with pytest.raises(ConfigError, match="base.loras: LoRA='cut' is not one of cat; did you mean"):
        with_settings([base, sr], {"base": {"loras": ["cut@1"]}})
    assert with_loras([base], [])[0].sampling.loras == ()


@pytest.fixture
def read(base_config, sr_config):
    sampling = dataclasses.replace(base_config.sampling, loras=LOADED)
    configs = [dataclasses.replace(base_config, sampling=sampling), sr_config]

    def read(**stages):
        body = json.dumps({"prompt": "a cat", "stages": stages}).encode()
        return parse(body, configs, Limits()).stages

    return read


def test_a_request_chooses_loras(read):
    assert read()["base"]["loras"] == ["cat@0.8", "a@b@1.0"]
    assert "loras" not in read()["sr"]
    assert read(base={"loras": []})["base"]["loras"] == []
    # A name may have an @; without a weight it is 1.
    chosen = ["a@b", "cat@-0.5"]
    assert read(base={"loras": chosen})["base"]["loras"] == ["a@b@1.0", "cat@-0.5"]


@pytest.mark.parametrize(
    "value",
    ["cat", [1], ["cut@1"], ["cat@x"], ["cat@nan"], ["cat@inf"], ["cat@1", "cat@2"], ["@1"], [""]]
    + [["x" * 999], ["cat@1\n@1"], {"cat": 1}],
)
def test_wrong_loras_are_one_line(read, value):
    with pytest.raises(ClientRequestError) as error:
        read(base={"loras": value})
    text = str(error.value)
    assert "stages.base.loras=" in text and "NAME@WEIGHT with the names of cat@0.8, a@b@1.0" in text
    assert text.isprintable() and len(text) < 300


def test_a_stage_without_loras_takes_none(read):
    with pytest.raises(ClientRequestError, match="stages.sr.field='loras' is not one of steps"):
        read(sr={"loras": []})


@pytest.fixture
def lora_flag(stage_folders, tmp_path) -> str:
    """--loras of two random LoRAs of the base stage, `cat` and `dog`."""
    stage = load_stage(stage_folders.split(",")[0])
    for name, seed in (("cat", 0), ("dog", 1)):
        rng, adapter = np.random.default_rng(seed), {}
        for path, kernel in flatten(stage.params).items():
            if path.endswith("/kernel") and kernel.ndim == 2:
                shapes = (kernel.shape[0], 2), (2, kernel.shape[1])
                pair = (0.25 * rng.normal(size=shape).astype(np.float32) for shape in shapes)
                adapter[path.removesuffix("/kernel")] = Factors(*pair)
        (tmp_path / name).mkdir()
        lora_file.write(tmp_path / name, adapter, stage.config)
    return f"--loras=base={tmp_path / 'cat'},base={tmp_path / 'dog'}@0.5"


def pixels(client, image_id: str) -> bytes:
    data = client.call("GET", f"/images/{image_id}.png")[2]
    with Image.open(io.BytesIO(data)) as opened:
        return opened.tobytes()


@pytest.mark.slow
def test_one_server_switches_between_loras(start_server, lora_flag, tmp_path):
    client = start_server(tmp_path / "out", lora_flag).client
    assert client.get("/api/about")["stages"][0]["loras"] == ["cat@1.0", "dog@0.5"]

    def image(**settings) -> bytes:
        request = {"prompt": "a", "seed": 1, "stages": {"base": settings}}
        return pixels(client, generate(client, request)["images"][0])

    seen = {}
    for chosen in ([], ["cat@1"], ["dog@1"], ["cat@1", "dog@0.5"], ["cat@1"], []):
        data = image(loras=chosen)
        assert seen.setdefault(tuple(chosen), data) == data
    assert len(set(seen.values())) == 4
    assert image() == seen["cat@1", "dog@0.5"]


@pytest.mark.slow
def test_the_page_has_a_weight_for_each_lora(browser, start_server, lora_flag, tmp_path):
    """In headless Chromium: weights are sent, shown with the image, reset, and used again."""
    client = start_server(tmp_path / "out", lora_flag).client
    browser.open(f"http://127.0.0.1:{client.port}/")
    browser.wait("document.querySelectorAll('#stages tr').length === 2")
    inputs = "[...document.querySelectorAll('.lora')]"
    labels = ["Weight of cat in base", "Weight of dog in base"]
    assert browser.value(f"{inputs}.map((input) => input.ariaLabel)") == labels
    assert browser.value("!document.getElementById('loras').hidden")

    def weights() -> list[str]:
        return browser.value(f"{inputs}.map((input) => input.value)")

    def fill(selector: str, text: str) -> None:
        browser.value(f"document.querySelector({json.dumps(selector)}).select()")
        browser.type(text)

    assert weights() == ["1", "0.5"]
    fill("#prompt", "a")
    fill("#seed", "1")
    for count, pair in enumerate((("1", "0.5"), ("0", "-0.25"), ("0", "0")), start=1):
        for name, weight in zip(("cat", "dog"), pair, strict=True):
            fill(f".lora[name={name}]", weight)
        assert tuple(weights()) == pair
        browser.click("#generate")
        browser.wait(f"document.querySelectorAll('figure').length === {count}", seconds=120)
    newest = client.get("/api/images")["images"]
    chosen = [about["stages"]["base"]["loras"] for about in newest]
    assert chosen == [["cat@0.0", "dog@0.0"], ["cat@0.0", "dog@-0.25"], ["cat@1.0", "dog@0.5"]]
    assert len({pixels(client, about["id"]) for about in newest}) == 3
    settings = browser.value("document.querySelectorAll('.settings')[1].innerText").splitlines()
    assert settings[1].startswith("base: ") and settings[1].endswith(", cat@0.0, dog@-0.25")

    browser.click("#reset")
    assert weights() == ["1", "0.5"]
    browser.click("figure:nth-child(2) button")
    assert weights() == ["0", "-0.25"]
    browser.click("#generate")
    browser.wait("document.querySelectorAll('figure').length === 4", seconds=120)
    again = client.get("/api/images")["images"][0]["id"]
    assert pixels(client, again) == pixels(client, newest[1]["id"])

    # A weight that is no number is not sent.
    browser.value("document.querySelector('.lora[name=dog]').value = ''")
    browser.click("#generate")
    assert not browser.value("document.querySelector('.lora[name=dog]').validity.valid")
    assert len(client.get("/api/images")["images"]) == 4
    assert browser.problems == []
