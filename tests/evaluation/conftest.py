"""Folders of samples, and a headless browser driven through Chromium's DevTools pipe."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from imagen_jax import images


@pytest.fixture
def write_samples(tmp_path):
    """(name, rows, level, per prompt) -> a folder as `sample` writes it, of plain pictures."""

    def write(name, rows, level=128, count=1, size=8) -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for p, row in enumerate(rows):
            for k in range(count):
                file = f"{p:05d}_{k:02d}.png"
                picture = np.full((size, size, 3), level, np.uint8)
                images.save_png(folder / file, picture, {"checkpoint": name})
                lines.append(
                    json.dumps({**row, "file": file, "prompt_index": p, "sample_index": k})
                )
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return write


class Browser:
    """A page in headless Chromium: messages are JSON, each ended by a zero byte."""

    def __init__(self, executable: str, folder, size=(1400, 900)):
        self.downloads = folder / "downloads"
        self.requests: list[str] = []
        self.problems: list[str] = []
        commands, self._write = os.pipe()
        self._read, replies = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}/profile"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={size[0]},{size[1]}"]
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
            assert part, "the browser has gone"
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

    def open(self, path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        self.wait(f"location.href === {json.dumps(path.as_uri())}")
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never came: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Backspace": 8, "Tab": 9}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        about = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0]))}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

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
        # The browser's own children are in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with no network; skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if not executable:
        pytest.skip("no Chromium here")
    page = Browser(executable, tmp_path)
    yield page
    page.close()
