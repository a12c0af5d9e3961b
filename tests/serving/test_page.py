"""The page in headless Chromium."""

import base64
import json
import pathlib
import time

import pytest

from imagen_jax.io import images

pytestmark = pytest.mark.slow

EVIL = "a <b>red</b> circle</script><img src=x onerror=\"document.title='evil'\">"


def value(browser, selector: str) -> str:
    return browser.value(f"document.querySelector({json.dumps(selector)}).value")


def fill(browser, selector: str, text: str) -> None:
    browser.value(f"document.querySelector({json.dumps(selector)}).select()")
    browser.type(text)


def test_generate_and_repeat(browser, start_server, tmp_path):
    server = start_server(tmp_path / "out")
    browser.open(f"http://127.0.0.1:{server.client.port}/")
    browser.wait("document.querySelectorAll('#stages tr').length === 2")
    browser.wait("document.getElementById('health')?.textContent === 'ready'")
    assert browser.value("document.getElementById('chain').textContent") == "base 8 px → sr 16 px"
    assert browser.value("!document.getElementById('empty').hidden")

    fill(browser, "#prompt", EVIL)
    fill(browser, "#samples", "2")
    fill(browser, "#seed", "41")
    # Enough steps for the progress to be visible.
    fill(browser, "[data-stage=base] .steps", "250")
    browser.click("#generate")
    browser.wait("document.querySelectorAll('.job progress').length === 1")
    browser.wait(
        r"/^(base|sr): step \d+ of \d+$/.test("
        "document.querySelector('.job .doing')?.textContent)"
    )
    browser.wait("document.querySelectorAll('figure').length === 2", seconds=120)
    browser.wait("document.querySelectorAll('.job').length === 0")
    browser.wait("[...document.images].every((img) => img.complete && img.naturalWidth === 16)")
    captions = "[...document.querySelectorAll('figcaption p')].map((p) => p.textContent)"
    assert browser.value(captions) == [EVIL, EVIL]
    settings = browser.value("document.querySelector('.settings').innerText")
    assert settings.splitlines() == [
        "seed 41 · 2 of 2",
        "base: 250 steps, guidance 2",
        "sr: 4 steps, guidance 2",
    ]
    path = tmp_path / "page.png"
    path.write_bytes(base64.b64decode(browser.call("Page.captureScreenshot")["data"]))

    # Again with these settings gives the same images.
    fill(browser, "#prompt", "something else")
    browser.click("#reset")
    assert value(browser, "#prompt") == value(browser, "#seed") == ""
    browser.click("figure:last-child button")
    assert value(browser, "#prompt") == EVIL and value(browser, "#seed") == "41"
    assert value(browser, "[data-stage=base] .steps") == "250"
    browser.click("#generate")
    browser.wait("document.querySelectorAll('figure').length === 4", seconds=120)
    newest = server.client.get("/api/images")["images"]
    levels = [pixels(tmp_path / "out" / f"{about['id']}.png") for about in newest]
    assert levels[0] == levels[2] and levels[1] == levels[3] and levels[0] != levels[1]

    # The page shows the server's refusal.
    fill(browser, "#prompt", "a" * 10)
    browser.value("document.getElementById('samples').max = ''")
    fill(browser, "#samples", "99")
    browser.click("#generate")
    browser.wait("!document.getElementById('problem').hidden")
    message = browser.value("document.getElementById('problem').textContent")
    assert message == "samples=99 must be an integer from 1 to 8"

    assert browser.value("document.title") == "Imagen", "a prompt ran as a script"
    assert all("400 (Bad Request)" in problem for problem in browser.problems), browser.problems
    own = f"http://127.0.0.1:{server.client.port}/"
    assert all(url.startswith((own, "data:")) for url in browser.requests)


def test_under_a_prefix_with_a_token(browser, start_server, prefix_proxy, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    public = f"http://127.0.0.1:{prefix_proxy.server_port}"
    server = start_server(tmp_path / "out", f"--token_file={token}", f"--origins={public}")
    prefix_proxy.target = server.client.port
    browser.open(f"{public}/draw/")
    browser.wait("!document.getElementById('access').hidden")
    assert "needs its token" in browser.value("document.getElementById('problem').textContent")
    fill(browser, "#token", "0123456789abcdef")
    browser.click("#access button")
    browser.wait("document.getElementById('health')?.textContent === 'ready'")
    browser.wait("document.querySelectorAll('#stages tr').length === 2")
    fill(browser, "#prompt", "a cat")
    browser.click("#generate")
    browser.wait("document.querySelectorAll('figure').length === 1", seconds=120)
    browser.wait("[...document.images].every((img) => img.complete && img.naturalWidth === 16)")

    # A job is cancelled by its button, and when the page is left.
    fill(browser, "[data-stage=base] .steps", "250")
    fill(browser, "#samples", "8")
    for leave in ("document.querySelector('.job button').click()", "location.href = 'about:blank'"):
        browser.click("#generate")
        browser.wait("document.querySelectorAll('.job').length === 1")
        browser.value(leave)
        counted = 'imagen_jobs_total{state="cancelled"}'
        headers = {"authorization": "Bearer 0123456789abcdef"}
        line = f"{counted} {1.0 if 'click' in leave else 2.0}"
        for _ in range(200):
            if line in server.client.call("GET", "/metrics", **headers)[2].decode():
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"no line {line}")
        if "click" in leave:
            browser.wait("document.querySelectorAll('.job').length === 0")


def pixels(path: pathlib.Path) -> bytes:
    return images.decode(path.read_bytes()).tobytes()
