"""The dashboard in a real Chromium: what it shows of models that serve, fail and come and go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.backends.served import write_model
from tests.service.process import Process

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 30
KEY = {"Authorization": "Bearer secret"}
IDENTITY = """
    backend: "identity" max_batch_size: 8 dynamic_batching { }
    input { name: "IN" data_type: TYPE_FP32 dims: [ 4 ] }
    output { name: "OUT" data_type: TYPE_FP32 dims: [ 4 ] }
    parameters { key: "execute_delay_ms" value { string_value: "5" } }
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "steady", IDENTITY, {"1/keep": ""})
    write_model(folder, "broken", 'backend: "python"' + IDENTITY.replace('backend: "identity"', ""), {"1/keep": ""})
    options = ("--model-control-mode", "explicit", "--load-model", "*", "--exit-on-error", "false")
    process = Process("--model-repository", str(folder), "--api-key", "secret", *options)
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromium-driver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser: Any, script: str) -> Any:
    """The value of a script as soon as it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, SECONDS).until(lambda driver: driver.execute_script(f"return {script}"))


def send(server: Process, count: int, size: int = 4) -> list[int]:
    """`count` requests, some at the same time; their statuses."""
    data = [0.0] * size
    body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, size], "data": data}]}
    url = f"http://{server.http}/v2/models/steady/infer"
    with ThreadPoolExecutor(8) as pool, httpx.Client(headers=KEY) as client:
        answers = pool.map(lambda _: client.post(url, content=json.dumps(body)), range(count))
        return [answer.status_code for answer in answers]


def card(name: str) -> str:
    return f"[...document.querySelectorAll('article')].find(one => one.querySelector('h2').textContent === '{name}')"


def test_the_dashboard(browser: Any, server: Process) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(f"http://{server.http}/v2/dashboard")
    wait(browser, "document.querySelector('#key input')")
    browser.find_element(By.CSS_SELECTOR, "#key input").send_keys("secret", Keys.ENTER)
    wait(browser, f"{card('steady')}?.querySelector('.dot.READY')")
    assert not browser.find_elements(By.ID, "key")

    # One model says why it is not there.
    assert "Python model file not found" in wait(browser, f"{card('broken')}.querySelector('.reason').textContent")
    assert wait(browser, f"{card('broken')}.querySelector('.dot.UNAVAILABLE') !== null")
    assert browser.find_element(By.ID, "models").text == "1"

    # The other's figures live.
    while True:
        assert set(send(server, 40)) == {200}
        rate = browser.execute_script(f"return {card('steady')}.querySelector('.figures b').textContent")
        if float(rate.split()[0]) > 0:
            break
    assert float(browser.find_element(By.ID, "rate").text.split()[0]) > 0
    p50, p90, p99 = wait(
        browser, f"[...{card('steady')}.querySelectorAll('table tr')[1].cells].slice(1).map(cell => cell.textContent)"
    )
    assert all(value.endswith((" ms", " s")) for value in (p50, p90, p99))
    bars = wait(browser, f"[...{card('steady')}.querySelectorAll('.batches span')].map(one => Number(one.textContent))")
    assert bars == sorted(bars)
    assert set(bars) <= set(range(1, 9))
    wait(browser, f"{card('steady')}.querySelector('path.stroke').getAttribute('d')")
    assert "steady_0" in browser.execute_script(f"return {card('steady')}.querySelector('.instances').textContent")

    # A model that is unloaded says so.
    httpx.post(f"http://{server.http}/v2/repository/models/steady/unload", headers=KEY)
    assert wait(browser, f"{card('steady')}.querySelector('.reason').textContent") == "unloaded"
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("401" in message for message in severe)


def test_data_for_other_programs(server: Process) -> None:
    assert httpx.get(f"http://{server.http}/v2/dashboard/data").status_code == 401
    httpx.post(f"http://{server.http}/v2/repository/models/steady/load", headers=KEY)
    send(server, 16)
    answer = httpx.get(f"http://{server.http}/v2/dashboard/data", headers=KEY).json()
    models = {model["name"]: model for model in answer["models"]}
    assert (models["steady"]["state"], models["broken"]["state"]) == ("READY", "UNAVAILABLE")
    steady = models["steady"]
    assert (steady["success"], steady["inferences"], steady["failures"]) == (16, 16, {})
    assert sum(steady["batches"].values()) == steady["executions"]
    assert sum(int(rows) * count for rows, count in steady["batches"].items()) == 16
    assert steady["latency_us"][0] >= 5_000
