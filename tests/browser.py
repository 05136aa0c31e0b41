"""Debian's Chromium without a window, and what it asked for over the network."""

import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.conftest import CHROMIUM

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def browser(width: int = 1280, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser of its own, with a page of this width in CSS pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location, driver = CHROMIUM
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield window
    finally:
        window.quit()


def hosts_asked(window: webdriver.Chrome) -> set[str]:
    """The hosts of all requests since the last call; `data:` and `blob:` URLs have none."""
    messages = (json.loads(entry["message"])["message"] for entry in window.get_log("performance"))
    urls = (each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent")
    parts = [urllib.parse.urlsplit(url) for url in urls]
    return {str(part.hostname) for part in parts if part.scheme not in ("data", "blob")}
