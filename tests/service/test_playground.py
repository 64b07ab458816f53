"""The playground and the API page in a real Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoints import save_checkpoint
from tests.conformance.harness import Server

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 30


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # A context long enough that an answer can be stopped on its way.
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("long") / "long", max_position_embeddings=16384)
    server = Server(str(checkpoint), "--dtype", "float32", "--threads", "1")
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromium-driver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser: Any, script: str) -> Any:
    """The value of a script as soon as it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, SECONDS).until(lambda driver: driver.execute_script(f"return {script}"))


def test_a_conversation(browser: Any, url: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(url)
    wait(browser, "document.querySelector('.dot.ready') && document.querySelector('#model').value")
    prompt, send = browser.find_element(By.ID, "prompt"), browser.find_element(By.ID, "send")
    browser.find_element(By.ID, "system").send_keys("Be brief.")
    limit = browser.find_element(By.ID, "max_tokens")
    limit.clear()
    limit.send_keys("12")
    prompt.send_keys("Hello <b>there</b>", Keys.ENTER)
    wait(browser, "document.querySelector('.assistant .meta button')")
    assert browser.find_element(By.CSS_SELECTOR, ".user .body").text == "Hello <b>there</b>"
    assert browser.find_element(By.CSS_SELECTOR, ".assistant .body").text
    assert 0 < int(browser.find_element(By.CSS_SELECTOR, ".count").text) <= 12
    assert int(browser.find_element(By.CSS_SELECTOR, ".ttft").text) > 0

    # Stopped on its way, the answer stays as far as it came. (A random model may end by itself: not this time.)
    browser.execute_script("const own = requestBody; requestBody = () => ({...own(), ignore_eos: true});")
    limit.clear()
    limit.send_keys("15000")
    prompt.send_keys("And a long one", Keys.ENTER)
    wait(browser, "document.querySelectorAll('.assistant .body')[1]?.textContent.length > 3")
    assert send.text == "Stop"
    send.click()
    wait(browser, "document.querySelector('#send').textContent === 'Send'")
    assert "stopped" in wait(browser, "document.querySelectorAll('.meta')[1]?.textContent")

    # An error is shown in its words.
    browser.find_element(By.CSS_SELECTOR, "#min_p").send_keys("7")
    prompt.send_keys("Once more", Keys.ENTER)
    assert "min_p" in wait(browser, "document.querySelector('.error')?.textContent")

    theme = browser.execute_script("return document.documentElement.dataset.theme")
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return document.documentElement.dataset.theme") != theme
    browser.find_element(By.ID, "clear").click()
    assert browser.find_elements(By.CSS_SELECTOR, ".turn") == []
    severe = [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert all("400 (Bad Request)" in message for message in severe), severe


def test_the_api_page(browser: Any, url: str) -> None:
    from selenium.webdriver.common.by import By

    browser.get(f"{url}/docs")
    wait(browser, "document.querySelectorAll('details').length > 10")
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    wait(browser, "[...document.querySelectorAll('td')].some(cell => cell.textContent.startsWith('temperature'))")
    browser.execute_script(
        "[...document.querySelectorAll('td button')].find(b => b.textContent === 'StreamOptions').click()"
    )
    wait(browser, "[...document.querySelectorAll('td')].some(cell => cell.textContent === 'include_usage')")
    assert browser.get_log("browser") == []
