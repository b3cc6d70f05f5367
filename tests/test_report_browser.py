"""report.html as a browser shows it: on a phone and on a screen, in the light and in the dark, from a file alone."""

import contextlib
from pathlib import Path

import pytest
from fake_run import STRENGTHS, make_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from guided_distill import report

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync"""
# Everything a page may break its policy by, counted before its own script runs.
WATCH = "window.refused = []; addEventListener('securitypolicyviolation', e => refused.push(e.violatedDirective))"


@contextlib.contextmanager
def chromium(user_data):
    """A browser with nothing remembered."""
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.fail(f"{CHROMIUM} or {DRIVER} is missing: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS.split(), f"--user-data-dir={user_data}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("report") / "digits"
    make_run(workdir)
    return report.write_report(workdir)


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def page(request, browser, path):
    width, scheme = request.param
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(f"file://{path}")
    return browser


def style(page, selector, name):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return page.execute_script(script, selector, name)


def lightness(colour):
    return sum(int(part) for part in colour.strip("rgba()").split(",")[:3]) / (3 * 255)


def shown(page):
    """{series: (src of its picture, caption)} of the pictures that can be seen."""
    figures = [figure for figure in page.find_elements(By.CSS_SELECTOR, ".pictures figure") if figure.is_displayed()]
    return {
        figure.get_attribute("data-series"): (figure.find_element(By.TAG_NAME, "img").get_attribute("src"), figure.text)
        for figure in figures
    }


def test_nothing_is_refused_fetched_or_logged_and_every_picture_is_decoded(page):
    assert page.get_log("browser") == [] and page.execute_script("return refused") == []
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    images = "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert page.execute_script(images) and len(page.find_elements(By.TAG_NAME, "img")) > 30


def test_the_page_is_as_wide_as_the_screen(page):
    root = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth, innerWidth]"
    width, screen, window = page.execute_script(root)
    assert width == screen and window - screen < 20  # the bar of the vertical scrolling
    outside = """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert page.execute_script(outside) == []
    # Letters of the charts are as large on the screen as they are drawn, or nearly.
    scale = "return Math.min(...[...document.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect().width))"
    assert page.execute_script(scale) > 300


def test_it_is_dark_in_the_dark(page, request):
    background, ink = (lightness(style(page, "body", name)) for name in ("backgroundColor", "color"))
    _, scheme = request.node.callspec.params["page"]
    assert (background < 0.2 and ink > 0.8) if scheme == "dark" else (background > 0.9 and ink < 0.2)
    line = lightness(style(page, ".s-0 .line", "stroke"))
    assert abs(line - background) > 0.25


def test_sliders_change_the_pictures_but_not_the_reference_of_another_number_of_steps(page):
    steps, w = page.find_elements(By.CSS_SELECTOR, "input[type=range]")
    start = shown(page)
    assert set(start) == {"reference teacher", "student", "teacher, DDIM", "stage-one student"}
    assert len({src for src, _ in start.values()}) == 4
    steps.send_keys(Keys.ARROW_RIGHT)
    more = shown(page)
    assert more["reference teacher"] == start["reference teacher"]
    assert all(more[name] != start[name] for name in start if name != "reference teacher")
    assert "2 steps" in more["student"][1] and page.find_elements(By.TAG_NAME, "output")[0].text == "2"
    w.send_keys(Keys.END)
    guided = shown(page)
    assert all(guided[name][0] != more[name][0] for name in start)
    assert f"w = {STRENGTHS[-1]:g}" in guided["student"][1] and w.get_attribute("aria-valuetext") == "4"
    steps.send_keys(Keys.HOME)
    w.send_keys(Keys.HOME)
    assert shown(page) == start


def test_without_a_script_every_picture_is_there(browser, path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"file://{path}")
        figures = browser.find_elements(By.CSS_SELECTOR, ".pictures figure")
        assert len(figures) > 30 and all(figure.is_displayed() for figure in figures)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
