"""A headless Chromium that looks at a page, through Selenium."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO_INSTALL = (
    "no Chromium with its chromedriver: `apt-get install chromium chromium-driver`, or name the "
    "former with the variable CHROMIUM"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

FIGURES = """
return [...document.querySelectorAll("figure")].map((figure) => {
  const {left, right, width, height} = figure.getBoundingClientRect();
  const drawings = [...figure.querySelectorAll("svg")].map((svg) => {
    const {width, height} = svg.getBoundingClientRect();
    const name = svg.getAttribute("aria-labelledby").replace(/-title$/, "");
    const data = {};
    for (const group of svg.querySelectorAll(`[id^="${name}-data-"]`)) {
      const arm = group.id.slice(name.length).split("-")[2];
      const panel = group.closest(`[id^="${name}-axes_"]`)
        .querySelector("path").getBoundingClientRect();
      const shapes = group.matches("image") ? [group] : [...group.querySelectorAll("path, use")];
      data[arm] = (data[arm] || 0) + shapes.filter((shape) => {
        const own = shape.getBoundingClientRect();
        return !shape.closest("defs") && own.width + own.height > 0
          && own.right > panel.left - 1 && own.left < panel.right + 1
          && own.bottom > panel.top - 1 && own.top < panel.bottom + 1;
      }).length;
    }
    return {name, width, height, scale: width / svg.viewBox.baseVal.width, data};
  });
  const rows = figure.querySelectorAll("tbody tr").length;
  return {left, right, width, height, rows, drawings};
})
"""
"""Place and size of each figure, its rows, and its drawings, each with the number of shapes of each
arm's data that can be seen within their axes."""
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function luminance(colours) {
  for (const colour of ["#fff", ...colours]) {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
  }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
}
const found = {};
for (const part of document.querySelectorAll("main *, nav *, header *, footer *")) {
  const hasText = [...part.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (part.closest("svg") || !hasText) continue;
  const backgrounds = [];
  for (let each = part; each; each = each.parentElement)
    backgrounds.unshift(getComputedStyle(each).backgroundColor);
  const below = luminance(backgrounds);
  const text = luminance([...backgrounds, getComputedStyle(part).color]);
  const ratio = (Math.max(below, text) + 0.05) / (Math.min(below, text) + 0.05);
  const name = part.tagName + "." + part.className;
  found[name] = Math.min(found[name] || 99, ratio);
}
return found
"""
"""The least contrast (of WCAG 2) of text with its background, by kind of element."""


def find():
    """The browser and its driver, or None."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def start(profile):
    """A Selenium driver with an empty ``profile`` folder, for as long as the block lasts."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver_path = find()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(driver_path, log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.get("about:blank")  # the page of a new tab goes on loading otherwise
        yield driver
    finally:
        driver.quit()


def show(driver, place, width, height=900):
    """Open a file, or an address, in a window ``width`` wide; a narrow one as a phone's."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    driver.get(place if str(place).startswith("http:") else Path(place).resolve().as_uri())


def on_paper(driver, width):
    """Lay the page that is open out for paper ``width`` pixels wide."""
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
    )


def open_all(driver, opened):
    """Open or close all parts of the page that can be closed."""
    script = "for (const each of document.querySelectorAll('details')) each.open = arguments[0]"
    driver.execute_script(script, opened)


def requests(driver):
    """The addresses asked for since the last call, and the errors of those that failed."""
    asked, failed = [], []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
        elif message["method"] == "Network.loadingFailed":
            failed.append(message["params"]["errorText"])
    return asked, failed


def screenshot(driver, path, clip=None, vision=None):
    """Write a PNG of the whole page, or of ``clip`` (x, y, width, height).

    ``vision`` is a deficiency to imitate, such as "deuteranopia".
    """
    driver.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": vision or "none"})
    options = {"captureBeyondViewport": True}
    if clip is not None:
        options["clip"] = dict(zip(("x", "y", "width", "height"), clip), scale=1)
    data = driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    Path(path).write_bytes(base64.b64decode(data))


def print_pdf(driver):
    """The page on A4 as the bytes of a PDF."""
    paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
    return base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", paper)["data"])
