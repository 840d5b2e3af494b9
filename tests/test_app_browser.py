"""The app in a real browser, as `zepad app` serves it and as an exported Space does.

`chromium.py` says what this needs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import to_pil_image

from chromium import DESKTOP, PHONE, violations
from command_line import zepad
from zepad import BenignConfig, HardenConfig, ZePAD
from zepad.data import digits

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"
START_S = 120  # to import, load and listen on a busy machine

# What a server process runs before anything else: it notes and refuses whoever wants to leave this machine.
GUARD = """
import ipaddress, os, socket

def guarded(name, original):
    def call(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            open(os.environ["LEFT"], "a").write(f"{name} {address}\\n")
            raise OSError("no network here")
        return original(self, address, *rest)
    return call

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(name, getattr(socket.socket, name)))
lookup = socket.getaddrinfo
def looked_up(host, *rest, **settings):
    if host not in (None, "127.0.0.1", "localhost", b"127.0.0.1", b"localhost"):
        open(os.environ["LEFT"], "a").write(f"getaddrinfo {host}\\n")
        raise OSError("no network here")
    return lookup(host, *rest, **settings)
socket.getaddrinfo = looked_up
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits model that is trained too shortly to be defended, with a class whose name attacks the page."""
    train = digits("train")
    loader = DataLoader(Subset(train, range(300)), batch_size=100, shuffle=True)
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr", detector="features")
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), progress=False)
    defense.calibrate(train.images[300:500])
    defense.class_names = tuple(HOSTILE if label == 7 else f"digit {label}" for label in range(10))
    folder = tmp_path_factory.mktemp("app") / "model"
    defense.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(browser: Any, model: Path) -> Iterator[dict[str, tuple[str, subprocess.Popen[bytes], Path]]]:
    """The address, the process and the list of attempts to leave this machine of each way to serve the app."""
    folder = model.parent
    done = zepad("app", model, "--export-space", folder / "space")
    assert done.returncode == 0, done.stderr
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0)), other.bind(("127.0.0.1", 0))
        ports = {"command": one.getsockname()[1], "space": other.getsockname()[1]}
    commands = {
        "command": ["-m", "zepad", "app", str(model), "--no-browser", "--port", str(ports["command"])],
        "space": [str(folder / "space" / "app.py")],
    }
    started = {}
    for name, command in commands.items():
        own = {
            "LEFT": str(folder / f"{name}.left"),
            "GRADIO_TEMP_DIR": str(folder / name),
            "GRADIO_SERVER_PORT": str(ports[name]),
            "PYTHONPATH": os.pathsep.join([str(folder / "guard"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_")} | own
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=folder, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c
        )
        started[name] = (f"http://127.0.0.1:{ports[name]}/", process, Path(own["LEFT"]))
    try:
        for address, process, _ in started.values():
            wait_for(address, process)
        yield started
    finally:
        for _, process, _ in started.values():
            process.kill()
            process.communicate()


def heed_ctrl_c() -> None:
    """Let a server end by SIGINT also where the tests run in the background, whose processes ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while not answers(address):
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"the server ended: {process.stderr.read().decode()}")
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        with urlopen(address) as answer:
            return answer.status == 200
    except URLError:
        return False


@pytest.mark.parametrize(
    ("name", "viewport", "scheme"),
    [
        ("command", PHONE, "light"),
        ("command", DESKTOP, "dark"),
        ("space", PHONE, "dark"),
        ("space", DESKTOP, "light"),
    ],
    ids=lambda value: value["width"] if isinstance(value, dict) else value,
)
def test_an_image_is_attacked_in_the_browser(
    browser: Any, servers, tmp_path: Path, name: str, viewport: dict[str, int], scheme: str
) -> None:
    address, _, left = servers[name]
    data = digits("test")
    seven = data.images[int((data.labels == 7).nonzero()[0])]
    to_pil_image(seven).save(tmp_path / "seven.png")
    context = browser.new_context(
        viewport=viewport, is_mobile=viewport is PHONE, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    requests, trouble = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    try:
        page.goto(address)
        start = page.get_by_role("button", name="Attack", exact=True)
        start.click()
        page.get_by_role("alert").filter(has_text="There is no image yet").wait_for()
        assert violations(page) == []
        page.locator("input[type=file]").first.set_input_files(tmp_path / "seven.png")
        page.get_by_role("img", name="The image to attack").wait_for()
        page.get_by_label("both public encoders").check()
        page.get_by_role("spinbutton").fill("48")
        page.get_by_role("spinbutton").press("Enter")
        start.click()
        answer = page.locator("#answer")
        answer.get_by_role("heading", level=2).filter(has_text="the undefended classifier is fooled").wait_for()
        told = answer.inner_text()
        assert f"It said {HOSTILE} and now says" in told
        assert "budget 48/255" in told
        assert "both public encoders" in told
        assert "threshold" in told
        assert answer.locator("img").count() == 3
        page.get_by_text("What each attacker knows").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 64)")
        assert dark == (scheme == "dark")
        assert violations(page) == []
        with page.expect_download() as download:
            page.get_by_role("link", name="Download this report").click()
        report = Path(download.value.path()).read_text(encoding="utf-8")
        assert download.value.suggested_filename == "zepad-report.html"
        assert "<h1>One image under attack</h1>" in report
        assert "budget 48/255" in report
        (tmp_path / "report.html").write_text(report, encoding="utf-8")
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert violations(page) == []
    finally:
        context.close()
    hosts = {urlsplit(url).hostname for url in requests if not url.startswith(("data:", "blob:", "file:"))}
    assert hosts == {"127.0.0.1"}
    assert trouble == []
    assert not left.exists(), left.read_text()


def test_a_test_image_is_chosen_by_its_name(browser: Any, servers) -> None:
    page = browser.new_page()
    page.goto(servers["command"][0])
    page.get_by_role("button", name="digit 3", exact=True).click()
    page.get_by_role("img", name="The image to attack").wait_for()
    page.get_by_label("no attack").check()
    page.get_by_role("button", name="Attack", exact=True).click()
    page.locator("#answer").get_by_role("heading", level=2).filter(has_text="Without an attack").wait_for()
    assert "It says digit 3." in page.locator("#answer").inner_text()
    page.close()


def test_ctrl_c_ends_the_app(servers) -> None:
    _, process, _ = servers["command"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) is not None
