"""Headless Chromium, for tests of pages."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest


def start_chrome(profile: Path, *flags: str) -> Any:
    """A browser that logs its console and its requests. The test is skipped without one."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("chromium and chromedriver are not on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    usual = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--mute-audio")
    for flag in (*usual, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver, env={**os.environ, "SE_OFFLINE": "true"})
    return webdriver.Chrome(options=options, service=service)


def wait(browser: Any, script: str, seconds: float = 30) -> Any:
    """The value of a JavaScript expression once it is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := browser.execute_script(f"return {script}"):
            return value
        time.sleep(0.05)
    raise AssertionError(f"{script}; the browser says {browser.get_log('browser')[:3]}")
