"""Looks at a page in headless Chromium: its picture, what its console said, and what it asked for."""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.image import imread
from numpy.typing import NDArray

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
OF_THE_BROWSER = "not an origin"
"""Chromium itself asks for updates; what a page asks for has another initiator."""
SECONDS = 120
BANDS = 12
NUM_COLOURS = 30


@dataclass(frozen=True)
class Look:
    pixels: NDArray[np.uint8]
    """[height, width, 3]"""
    console: list[str]
    """Its lines."""
    requests: list[str]
    """Addresses that the page asked for, but for itself."""

    def is_blank(self) -> bool:
        """Whether few colours are to be seen, or a third of the bands of the picture has one alone."""
        colours = self.pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        num_plain = sum(len(np.unique(band)) == 1 for band in np.array_split(colours, BANDS))
        return len(np.unique(colours)) < NUM_COLOURS or num_plain > BANDS // 3


def look(page: Path, screenshot: Path, *, width: int = 1200, height: int = 2400, dark: bool = False) -> Look:
    """Open a file. AssertionError where there is no Chromium: without it nobody has seen the page."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    assert found, f"the test needs one of {', '.join(NAMES)} in PATH: apt-get install chromium"
    with tempfile.TemporaryDirectory(prefix="nvfp4-tests-chromium-") as profile:
        log = Path(profile) / "net-log.json"
        command = [
            found[0],
            *QUIET,
            f"--user-data-dir={profile}/user",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--v=0",
            f"--screenshot={screenshot}",
            f"--window-size={width},{height}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            page.absolute().as_uri(),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert result.returncode == 0, result.stderr[-3000:]
        events = json.loads(log.read_text())["events"]
    asked = [event.get("params", {}) for event in events]
    requests = {params["url"] for params in asked if params.get("initiator", OF_THE_BROWSER) != OF_THE_BROWSER}
    pixels = (imread(screenshot)[..., :3] * 255).astype(np.uint8)
    return Look(pixels, re.findall(r"CONSOLE:\d+\] (.*)", result.stderr), sorted(requests))
