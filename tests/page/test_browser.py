"""The page in Gradio: a real click-through in Chromium, and two visitors through its API.

All ask for the same words, so that the model is compiled for them once.
"""

import json
import shutil
import socket
import time
import urllib.request

import pytest
from PIL import Image
from test_answers import IMAGE, colours

from ovseg_jax.errors import UserError
from ovseg_jax.page.app import Model, Page, serving
from ovseg_jax.vocab.classes import read_label_file
from tests.extras import require


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def page():
    lists = [read_label_file("voc_2012")]
    return Page([Model("colours", colours())], lists, lists[0].flat()[0], [IMAGE])


@pytest.fixture(scope="module")
def served():
    """The address of a page with an example; a connection to anywhere else is an error."""
    require("gradio")
    connect, gone = socket.socket.connect, []

    def local(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            gone.append(address)
            raise OSError(f"a connection to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        with serving(page(), free_port()) as blocks:
            yield blocks.local_url
    assert not gone


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "colours.png")
    return tmp_path / "colours.png"


def test_a_page_is_served_to_this_machine_alone_and_a_taken_port_is_named(served):
    port = int(served.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port={port}: the port is taken"), serving(page(), port):
        pass
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
    for address in others - {"127.0.0.1"}:
        with socket.socket() as probe:
            assert probe.connect_ex((address, port)) != 0


def test_two_visitors_do_not_see_each_other(served, picture):
    client = require("gradio_client")
    first, second = (client.Client(served, verbose=False) for _ in range(2))
    _, said, *_ = first.predict(client.handle_file(str(picture)), api_name="/upload")
    assert "colours.png, 40 x 24 pixels" in said
    ask = dict(words="red; green; blue; yellow", task="semantic", threshold=0.04, api_name="/segment")
    _, said = second.predict(**ask)
    assert "Choose a picture first" in said and 'role="alert"' in said
    shown, said = first.predict(**ask)
    assert "4 segments" in said and "data-map" in shown
    saved, _ = first.predict(0.04, api_name="/save_json")
    assert saved["name"] == "segments.json"
    _, said = second.predict(0.04, api_name="/save_json")
    assert "Choose a picture first" in said


def test_a_failure_of_the_program_is_a_sentence_without_details(served, caplog):
    client = require("gradio_client")
    _, said = client.Client(served, verbose=False).predict(None, api_name="/similar")
    assert "The program failed at this" in said and "NoneType" not in said and "NoneType" in caplog.text


def test_the_api_reads_no_file_of_the_server(served, picture):
    address = f"{served}gradio_api/call/upload"
    file = {"path": str(picture), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file]}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}") as reply:
        answer = reply.read().decode()
    assert "event: error" in answer and "a.png" not in answer and picture.exists()


@pytest.fixture
def driver(tmp_path):
    """Headless Chromium, which saves into tmp_path / "saved"."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser, tool = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not browser or not tool:
        pytest.skip("Chromium or its driver is not installed")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(tool))
    yield driver
    driver.quit()


def until(found, seconds=30):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "the page did not answer"
        time.sleep(0.05)
    return value


def said(driver, text):
    script = "return document.querySelector('#ov-said p')?.textContent || ''"
    return until(lambda: text in driver.execute_script(script))


def one(driver, selector, text=""):
    find = lambda: [e for e in driver.find_elements("css selector", selector) if text in e.text]
    return until(find)[0]


def tip(driver):
    return driver.execute_script("return document.querySelector('.ov-tip')?.textContent || ''")


def test_a_click_through(served, driver, picture, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    driver.get(served)
    said(driver, "Choose a picture.")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    one(driver, "input[type=file]").send_keys(str(tmp_path / "bad.png"))
    said(driver, "The image bad.png cannot be read")
    one(driver, "input[type=file]").send_keys(str(picture))
    said(driver, "colours.png, 40 x 24 pixels.")
    words = one(driver, "textarea")
    words.send_keys("zebra")
    one(driver, "button", "Segment").click()
    said(driver, "ever seen 'zebra'")
    words.clear()
    words.send_keys("red; green; blue; yellow")
    one(driver, "button", "Segment").click()
    said(driver, "4 segments.")
    legend = [cell.text.strip() for cell in driver.find_elements("css selector", ".ov-legend td:first-child")]
    assert {*legend} - {"unknown"} == {"red", "green", "blue", "yellow"}
    # The picture's corner, from its middle: red is at the top left.
    frame = one(driver, ".ov-frame")
    across, down = (-frame.size["width"] // 4, -frame.size["height"] // 4)
    ActionChains(driver).move_to_element_with_offset(frame, across, down).perform()
    until(lambda: tip(driver).startswith("red "))
    ActionChains(driver).click().perform()
    said(driver, "Asked at ")
    assert one(driver, ".ov-words td").text == "red"
    one(driver, "[placeholder='a word']").send_keys("blue", Keys.ENTER)
    said(driver, "Similarity to blue.")
    assert one(driver, ".ov-heat img").size["width"] > 200
    one(driver, "input[value=panoptic]").click()
    said(driver, "4 segments.")
    one(driver, "button", "Save JSON").click()
    said(driver, "Saved segments.json.")
    until(lambda: (tmp_path / "saved" / "segments.json").exists())
    # A second tab is a visit of its own.
    driver.switch_to.new_window("tab")
    driver.get(served)
    said(driver, "Choose a picture.")
    one(driver, "button", "Segment").click()
    said(driver, "Choose a picture first")
    urls = [e["message"] for e in driver.get_log("performance") if "requestWillBeSent" in e["message"]]
    assert not [u for u in urls if '"url":"http' in u and f'"url":"{served.rstrip("/")}' not in u]


def test_keys_alone_on_a_narrow_screen(served, driver):
    from selenium.webdriver import ActionChains, Keys

    size = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(served)
    said(driver, "Choose a picture.")

    def press(*keys):
        ActionChains(driver).send_keys(*keys).perform()

    def tab_to(selector):
        reached = f"return document.activeElement.matches({selector!r})"
        for _ in range(60):
            if driver.execute_script(reached):
                return
            press(Keys.TAB)
        pytest.fail(f"the tabulator does not reach {selector}")

    one(driver, "#ov-examples button img")
    tab_to("#ov-examples button")
    press(Keys.ENTER)
    said(driver, "Example 1.")
    tab_to("textarea")
    press("red; green; blue; yellow", Keys.TAB)
    tab_to("button.primary")
    press(Keys.ENTER)
    said(driver, "4 segments.")
    tab_to(".ov-frame")
    press(*[Keys.ARROW_LEFT] * 5, *[Keys.ARROW_UP] * 5)
    until(lambda: tip(driver).startswith("red "))
    press(Keys.ENTER)
    said(driver, "Asked at ")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 375
