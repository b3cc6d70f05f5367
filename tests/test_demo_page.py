"""The page to play with in a real browser and under many clicks at once: a student of two steps and its teacher."""

import concurrent.futures
import importlib.util
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_report_browser import chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio: pip install -e '.[demo]'"),
]

REPO = Path(__file__).parents[1]
BUNDLE = Path(__file__).parent / "fixtures" / "bundle_v1"
USERS, WAITING = 20, 32
GROWTH = 200  # MiB


@pytest.fixture(scope="module")
def server(free_port):
    """(address, process) of the command."""
    port = free_port()
    command = [sys.executable, "-m", "guided_distill.demo", f"--bundle={BUNDLE}", f"--port={port}"]
    address = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: process.poll() is not None or answers(address))
            assert process.poll() is None, process.stderr.read()
            yield address, process
        finally:
            process.terminate()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        driver.set_window_size(1280, 1000)
        driver.get(server[0])
        wait_for(lambda: len(shown(driver)) == 2)
        yield driver


def shown(page, where="drawn"):
    """[(src, caption)] of the figures in an element."""
    script = "return [...document.querySelectorAll(arguments[0])].map(f => [f.children[0].src, f.innerText])"
    return page.execute_script(script, f"#{where} figure")


def changed(page, before, where="drawn", num=2):
    """What is shown once all `num` figures are others."""
    earlier = {src for src, _ in before}

    def others():
        now = shown(page, where)
        return now if len(now) == num and not earlier & {src for src, _ in now} else None

    return wait_for(others)


def press(page, selector):
    page.find_element(By.CSS_SELECTOR, selector).click()


def test_pictures_follow_the_slider_and_the_seed_is_kept(page):
    first = shown(page)
    assert "det_0002: 2 steps, 2 calls" in first[0][1] and "teacher: 4 steps, 8 calls" in first[1][1]
    w = page.find_element(By.CSS_SELECTOR, "#w input[type=range]")
    w.send_keys(Keys.END)
    guided = changed(page, first)
    w.send_keys(Keys.HOME)
    changed(page, guided)
    w.send_keys(Keys.END)
    wait_for(lambda: [src for src, _ in shown(page)] == [src for src, _ in guided])
    press(page, "#another")
    changed(page, guided)
    press(page, "#beside input")
    wait_for(lambda: len(shown(page)) == 1)


# The next two streams of answers end at once, as one does that is closing when a question is asked.
CLOSING = """
const fetched = window.fetch;
window.lost = 0;
window.fetch = (request, ...rest) => {
  if (!(request.url ?? String(request)).includes('queue/data')) return fetched(request, ...rest);
  if (++window.lost == 2) window.fetch = fetched;
  return Promise.resolve(new Response('data: {"msg": "close_stream"}\\n\\n'));
};
"""


def test_a_move_whose_answer_is_lost_is_answered_all_the_same(page):
    if page.find_element(By.CSS_SELECTOR, "#beside input").is_selected():
        press(page, "#beside input")
    wait_for(lambda: len(shown(page)) == 1)
    time.sleep(2)  # until the stream of that answer is closed
    before = shown(page)
    page.execute_script(CLOSING)
    page.find_element(By.CSS_SELECTOR, "#w input[type=range]").send_keys(Keys.HOME)
    changed(page, before, num=1)
    assert page.execute_script("return window.lost") == 2


COUNTING = """
const asks = window.fetch;
window.asked = 0;
window.fetch = (request, ...rest) => {
  window.asked += (request.url ?? String(request)).includes('queue/join');
  return asks(request, ...rest);
};
"""


def open_tab(page, name):
    (button,) = [b for b in page.find_elements(By.CSS_SELECTOR, "button[role=tab]") if b.text == name]
    button.click()


def test_what_is_refused_is_not_asked_for_again(page):
    open_tab(page, "From a picture")
    wait_for(lambda: page.find_element(By.ID, "edit_go").is_displayed())
    page.execute_script(COUNTING)
    press(page, "#edit_go")  # without a picture
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, "#status .error"))
    time.sleep(4)  # until the look after the error, where the answer took longer than a look
    before = page.execute_script("return window.asked")
    time.sleep(7)  # two looks
    assert page.execute_script("return window.asked") == before > 0


def test_pictures_are_made_of_a_picture_and_filled_in(page):
    for tab, kind in (("From a picture", "edit"), ("Fill in", "fill")):
        open_tab(page, tab)
        wait_for(lambda k=kind: page.find_element(By.ID, f"{k}_take").is_displayed())
        press(page, f"#{kind}_take")
        there = "#picture img" if kind == "edit" else "#painted canvas"
        wait_for(lambda s=there: page.find_elements(By.CSS_SELECTOR, s))
        if kind == "fill":
            time.sleep(2)  # until the canvas has the picture, which nothing in the page tells
            canvas = page.find_element(By.CSS_SELECTOR, "#painted canvas")
            ActionChains(page).move_to_element(canvas).click_and_hold().move_by_offset(60, 40).release().perform()
        press(page, f"#{kind}_go")
        assert "det_0002" in changed(page, [], kind + "_made", num=1)[0][1]


def test_nothing_comes_from_elsewhere_and_nothing_fails(page, server):
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith((server[0], "data:", "blob:"))] == []
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []


def memory(process):
    (line,) = [s for s in Path(f"/proc/{process.pid}/status").read_text().splitlines() if s.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def clients(server):
    import gradio_client

    patient = {"timeout": 120}
    return [gradio_client.Client(server[0], verbose=False, httpx_kwargs=patient) for _ in range(USERS)]


def submit(client, **changes):
    given = {"student": "det_0002", "w": 1.0, "label": 3, "seed": 0, "beside": False, **changes}
    return client.submit(*given.values(), api_name="/draw")


def test_twenty_users_at_once_wait_in_turn(server, clients):
    def clicks(user):
        places, made = [], []
        for seed in range(5):
            job = submit(clients[user], seed=user, w=seed % 5)
            while not job.done():
                places.append(job.status().rank or 0)
                time.sleep(0.02)
            made.append(job.result())
        return max(places, default=0), made

    before = memory(server[1])
    with concurrent.futures.ThreadPoolExecutor(USERS) as pool:
        places, made = zip(*pool.map(clicks, range(USERS)), strict=True)
    assert max(places) > 0  # they were told their place
    assert len({picture for pictures in made for picture in pictures}) == 5 * USERS
    assert memory(server[1]) - before < GROWTH


def test_a_full_queue_says_so(clients):
    jobs = [submit(clients[k % USERS], seed=k, beside=True) for k in range(2 * WAITING)]
    said = {str(job.exception()) for job in jobs if job.exception()}
    assert said == {"Queue is full! Please try again."}
    assert submit(clients[0]).result()  # and goes on


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"w": 5.0}, "w|5"),
        ({"student": "det_0001"}, "not in the list of choices"),
        ({"label": 10}, "not in the list of choices"),
        ({"seed": -1}, "-1|minimum"),
    ],
)
def test_what_is_no_setting_is_refused(clients, changes, says):
    with pytest.raises(Exception, match=says):
        submit(clients[0], **changes).result()
