"""The raters' page in headless Chromium: answers, storage, result file, score."""

import base64
import json
import pathlib
import time

import pytest

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.raters import build, score

pytestmark = pytest.mark.slow

EVIL = (
    "</script><script>document.title='evil'</script>"
    "<img src=x onerror=\"document.title='evil'\">&amp;\" '"
)
PROMPTS = [
    {"prompt": EVIL, "category": "Text"},
    {"prompt": "A red cat.", "category": "Colors"},
    {"prompt": "Ein grüner Hund 🐕", "category": "Colors"},
    {"prompt": "Two cars.", "category": "Counting"},
]
DARK, LIGHT = 40, 220


@pytest.fixture
def study(write_samples, tmp_path):
    """A study of four prompts, eight images each: A dark, B light."""
    a = write_samples("a", PROMPTS, level=DARK, count=8)
    b = write_samples("b", PROMPTS, level=LIGHT, count=8)
    key = build.build(a, [b], str(tmp_path / "study"), study="drawbench", names=("mine", "b"))
    return tmp_path / "study", key


def shown(browser, folder: pathlib.Path) -> tuple[str, list[list[int]]]:
    """Caption and, for each side, the levels of the images on the page."""
    browser.wait(
        "[...document.images].length > 0 && [...document.images].every("
        "(img) => img.complete && img.naturalWidth > 0)"
    )
    sides = browser.value(
        "[...document.querySelectorAll('.side')].map((side) => "
        "[...side.querySelectorAll('img')].map((img) => img.getAttribute('src')))"
    )
    caption = browser.value("document.getElementById('caption').textContent")
    page = folder / "page"
    levels = [[int(samples.load(page, file)[0, 0, 0]) for file in side] for side in sides]
    return caption, levels


def test_a_rater_answers(browser, study, tmp_path):
    folder, key = study
    page = folder / "page" / "index.html"

    def enter(name: str) -> None:
        browser.open(page)
        browser.click("#rater")
        browser.type(name)
        browser.press("Enter")
        browser.wait("!document.getElementById('start').hidden === false")

    def rate(until: int | None = None) -> int:
        """Takes the dark set for better, never noise, and cannot say of captions without a cat."""
        done = 0
        while browser.value("!document.getElementById('rating').hidden") and done != until:
            caption, (left, right) = shown(browser, folder)
            assert len(left) == len(right) == 8
            noisy = [len(set(side)) > 1 for side in (left, right)]
            better = "3" if noisy[0] or (not noisy[1] and left[0] > right[0]) else "1"
            before = browser.value("document.getElementById('count').textContent")
            browser.press(better)
            browser.press(better if any(noisy) or "cat" in caption else "2")
            browser.wait(
                "document.getElementById('rating').hidden || "
                f"document.getElementById('count').textContent !== {json.dumps(before)}"
            )
            done += 1
        return done

    enter("Zoë <b>")
    assert rate(until=2) == 2
    # A new visit under the same name goes on where the old one ended; another begins afresh.
    enter("someone else")
    assert browser.value("document.getElementById('count').textContent").startswith("1 of ")
    enter("Zoë <b>")
    assert browser.value("document.getElementById('count').textContent").startswith("3 of ")
    browser.press("3")
    browser.press("Backspace")
    assert browser.value("document.getElementById('count').textContent").startswith("3 of ")
    browser.press("Backspace")
    assert browser.value("document.getElementById('count').textContent").startswith("2 of ")
    screenshot(browser, tmp_path / "rating.png")
    assert rate() == len(key["items"]) - 1
    assert browser.value("!document.getElementById('end').hidden")
    browser.click("#save_all")
    name = f"ratings_Zoë_b__{key['id']}.json"
    file = browser.downloads / name
    end = time.monotonic() + 20
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    result = json.loads(file.read_text())
    assert result["rater"] == "Zoë <b>" and len(result["answers"]) == 2 * len(key["items"])

    assert browser.value("document.title") == "Rating images", "a prompt ran as a script"
    assert browser.problems == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "blob"}

    card = score.score(str(folder / "key.json"), [file])
    groups = {q: scores["groups"] for q, scores in card["questions"].items()}
    assert groups["fidelity"]["all"]["rates"]["A"]["mean"] == 1.0
    assert groups["alignment"]["all"]["rates"]["A"]["mean"] == 0.25
    assert groups["alignment"]["all"]["rates"]["indifferent"]["mean"] == 0.75
    assert card["excluded"] == {}


def screenshot(browser, path: pathlib.Path) -> None:
    path.write_bytes(base64.b64decode(browser.call("Page.captureScreenshot")["data"]))


def test_one_category_by_mouse(browser, study):
    folder, key = study
    browser.open(folder / "page" / "index.html")
    browser.value("document.getElementById('category').value = 'Colors'")
    browser.click("#rater")
    browser.type("r2")
    browser.click("#begin button")
    captions = []
    while browser.value("!document.getElementById('rating').hidden"):
        captions.append(shown(browser, folder)[0])
        browser.click(".question:nth-child(1) button:nth-child(2)")
        browser.click(".question:nth-child(2) button:nth-child(1)")
    expected = [item["prompt"] for item in key["items"] if item["category"] == "Colors"]
    assert sorted(captions) == sorted(expected)


def test_an_item_with_one_image(browser, write_samples, tmp_path):
    rows = [{"prompt": f"caption {i}"} for i in range(4)]
    a, b = write_samples("a", rows, level=DARK), write_samples("b", rows, level=LIGHT)
    key = build.build(a, b, str(tmp_path / "s"), study="alignment", controls=0.5)
    browser.open(tmp_path / "s" / "page" / "index.html")
    assert browser.value("document.getElementById('choice').hidden")
    browser.click("#rater")
    browser.type("r")
    browser.press("Enter")
    seen = 0
    while browser.value("!document.getElementById('rating').hidden"):
        assert browser.value("document.querySelectorAll('.side img').length") == 1
        browser.press("2")
        seen += 1
    assert seen == len(key["items"])
