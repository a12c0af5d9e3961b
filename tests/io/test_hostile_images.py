"""Images of strangers: only image decoders run, and the memory of all threads is bounded."""

import io
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.io import images, pixel_budget


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
0 0 64 64 rectfill
%%EOF
"""
SMALL = Image.new("RGB", (16, 16), "red")
FOREIGN = {
    "EPS": EPS,
    "EPS with a DOS header": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<6I", 30, len(EPS), 0, 0, 0, 0)
    + EPS,
    "PDF": encode(SMALL, "pdf"),
    "ICO": encode(SMALL, "ico"),
    "PPM": encode(SMALL, "ppm"),
    "TGA": encode(SMALL, "tga"),
    "ICNS": encode(Image.new("RGBA", (16, 16), "red"), "icns"),
    "PSD": b"8BPS\0\1" + b"\0" * 60,
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 60,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "IM": encode(SMALL, "im"),
    "DDS": encode(SMALL, "dds"),
    "JPEG 2000": encode(SMALL, "jpeg2000"),
}


@pytest.fixture
def children(monkeypatch):
    """The child processes that are started."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or 1 / 0)
    for name in ("system", "posix_spawn", "fork", "execv"):
        monkeypatch.setattr(os, name, lambda *a, **k: started.append(a) or 1 / 0)
    return started


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_refused_and_start_nothing(name, children):
    for call in (images.decode, lambda data: images.inspect_image(data, "decode")):
        with pytest.raises(images.ImageError, match=r"^wrong type \(not an image\)$"):
            call(FOREIGN[name])
    assert children == []


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff", "gif", "bmp", "mpo"])
def test_the_formats_of_images_are_decoded(kind):
    data = encode(SMALL, kind)
    assert np.abs(images.decode(data).astype(int) - [255, 0, 0]).max() < 12
    assert images.inspect_image(data, "header").size == (16, 16)


def bomb(width: int, height: int, depth: int = 1) -> bytes:
    """A PNG of one colour, some kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    colour_type, per_pixel = (0, depth) if depth < 24 else (2, 24)
    row = b"\0" + b"\0" * (width * per_pixel // 8)
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, min(depth, 8), colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(65535, 65535), (16384, 5500), (100_000, 1000), (2**31 - 1, 1)])
def test_more_pixels_than_allowed_are_refused_by_the_header(size):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + crc + bomb(8, 8)[33:]
    for call in (images.decode, lambda d: images.inspect_image(d, "header")):
        with pytest.raises(images.ImageError, match="too large"):
            call(data)


def test_a_jpeg_of_a_thousand_scans_is_refused():
    data = encode(Image.new("RGB", (640, 640)), "jpeg", progressive=True)
    at = data.rindex(b"\xff\xda")
    many = data[:at] + data[at:-2] * 1000 + data[-2:]
    started = time.monotonic()
    with pytest.raises(images.ImageError, match="more than 100 scans"):
        images.decode(many)
    assert time.monotonic() - started < 1
    assert images.decode(data).shape == (640, 640, 3)


def test_threads_share_the_budget(monkeypatch):
    """The pixels that are decoded at any one time never exceed the budget."""
    budget = pixel_budget.PixelBudget(None)
    now, most, lock = 0, 0, threading.Lock()

    def work(pixels: int) -> None:
        nonlocal now, most
        with budget.hold(pixels):
            with lock:
                now += pixels
                most = max(most, now)
            time.sleep(0.01)
            with lock:
                now -= pixels

    sizes = [images.MAX_PIXELS, 30_000_000, 9_000_000, 2_000_000] * 4
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert images.MAX_PIXELS <= most <= pixel_budget.UNITS * pixel_budget.UNIT
    assert budget.held == 0


HOLDER = """
import sys, time
from imagen_jax.io.pixel_budget import PixelBudget
budget = PixelBudget(sys.argv[1])
with budget.hold(int(sys.argv[2])):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def holder(path, pixels: int, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(path), str(pixels), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_processes_share_the_budget_and_a_killed_one_returns_it(tmp_path):
    path = tmp_path / "pixels"
    other = holder(path, 60 * pixel_budget.UNIT, 60)
    try:
        budget, got = pixel_budget.PixelBudget(str(path)), threading.Event()

        def work() -> None:
            with budget.hold(50 * pixel_budget.UNIT):
                got.set()

        with budget.hold(30 * pixel_budget.UNIT):
            pass
        thread = threading.Thread(target=work)
        thread.start()
        assert not got.wait(0.3), "60 and 50 of 96 units at once"
    finally:
        other.kill()
        other.wait()
    assert got.wait(10), "a killed process keeps its units"
    thread.join()


def test_a_file_of_someone_else_or_a_link_is_not_used(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "link").symlink_to(target)
    for path in (tmp_path / "link", tmp_path, tmp_path / "no" / "folder"):
        with pixel_budget.PixelBudget(str(path)).hold(10**7):
            pass
    assert target.read_text() == "kept"


BOMBS = """
    import concurrent.futures, resource, sys
    from imagen_jax.io import images, pixel_budget
    pixel_budget.UNITS = int(sys.argv[4])
    data = open(sys.argv[1], "rb").read()
    images.decode(open(sys.argv[2], "rb").read())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        def work(_):
            with images.decoded(data) as pixels:
                return pixels[::1000].sum()
        assert len(list(pool.map(work, range(int(sys.argv[3]))))) == int(sys.argv[3])
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    ("side", "count", "units"), [(3000, 16, 10), pytest.param(9400, 32, 96, marks=pytest.mark.slow)]
)
def test_sixteen_threads_against_bombs(tmp_path, side, count, units):
    """Peak memory is that of the budget, one image at a time here, not of sixteen images."""
    (tmp_path / "bomb.png").write_bytes(bomb(side, side, depth=24))
    (tmp_path / "small.png").write_bytes(encode(SMALL, "png"))
    script = textwrap.dedent(BOMBS)
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb.png"), str(tmp_path / "small.png")]
        + [str(count), str(units)],
        capture_output=True,
        text=True,
        timeout=500,
        # glibc keeps up to 64 MB of freed memory per thread, which is no image.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    assert found.returncode == 0, found.stderr
    megabytes = int(found.stdout)
    assert megabytes < units * 16, f"{megabytes} MB"
