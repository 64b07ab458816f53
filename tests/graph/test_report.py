"""The report: every box and edge of a large graph has its place, and the page works in a browser, offline."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.graph.report import page, text
from trine.graph.report.layout import arrange

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def large(layers: int = 500) -> Any:
    """A chain of products with shortcuts, a branch here and there, and names that HTML must not take for markup."""
    nodes, last = [], ["x"]
    for index in range(layers):
        name = f"<b>{index}</b>"
        if index % 5 == 4:
            nodes.append(node("Add", f"{last[-1]} {last[-2]}", name, name=f"sum&{index}"))
        elif index % 5 == 3:
            nodes.append(node("Softmax", last[-2], name, name=f"branch{index}"))
        else:
            nodes.append(node("Exp" if index % 2 else "Sin", last[-1], name, name=f"node{index}"))
        last = [*last[-4:], name]
    return model(nodes, {"x": ["n", 4]}, last[-2:])


@pytest.mark.parametrize("seed", range(20))
def test_boxes_do_not_overlap_and_edges_go_down(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 120)
    widths = [float(rng.randint(30, 200)) for _ in range(count)]
    edges = [(rng.randrange(end), end) for end in range(1, count) for _ in range(rng.randint(0, 3))]
    layout = arrange(widths, edges)
    for a in range(count):
        x, y = layout.places[a]
        assert x - widths[a] / 2 >= 0
        assert x + widths[a] / 2 <= layout.width + 1e-6
        assert y <= layout.height
        for b in range(a):
            apart = abs(x - layout.places[b][0]) >= (widths[a] + widths[b]) / 2
            assert apart or layout.places[b][1] != y
    for start, end in edges:
        assert layout.places[start][1] < layout.places[end][1]
    for (start, end), points in layout.edges.items():
        assert points[0] == layout.places[start]
        assert points[-1] == layout.places[end]


def test_a_shortcut_bends_around_what_lies_between() -> None:
    layout = arrange([100.0] * 4, [(0, 1), (1, 2), (2, 3), (0, 3)])
    (x, _), (middle, _) = layout.places[0], layout.edges[0, 3][1]
    assert abs(middle - layout.places[1][0]) > 50
    assert layout.places[0][0] == pytest.approx(x)


def test_text_says_passes_regions_candidates_and_memory() -> None:
    nodes = [node("Conv", "x w", "p", name="product", pads=[1, 1, 1, 1]), node("Relu", "p", "y", name="act")]
    plan = tg.build(model(nodes, {"x": [1, 8, 12, 12]}, ["y"], {"w": weights(8, 8, 3, 3)}))
    found = text(plan.inspect())
    assert "pass fuse_convolution: -1 Conv, -1 Relu, +1 FusedConv" in found
    assert "computes Conv product, Relu act" in found
    assert re.search(r"FusedConv product: float32\[1,8,12,12\]; \w+ \(\w+ [\d.e-]+ ms", found)
    assert "precision: 1 in float32" in found
    assert re.search(r"intermediates: [\d.]+ KiB at once, of 4\.50 KiB in all", found)


def test_text_says_what_lower_precision_costs() -> None:
    made = model([node("MatMul", "x w", "y", name="product")], {"x": ["n", 4]}, ["y"], {"w": weights(4, 3)})
    plan = tg.build(made, tune=False, precision="int8", calibration={"x": weights(16, 4, seed=3)})
    assert re.search(r"output y against fp32: cosine 0\.99\d+, .* over 16 samples", text(plan.inspect()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromium-driver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_the_page_of_a_large_graph(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    content = page(tg.build(large(), tune=False).inspect(), "large & <wide>")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", content)
    (tmp_path / "report.html").write_text(content, encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    assert (browser.title, browser.find_element(By.TAG_NAME, "h1").text) == ("large & <wide>",) * 2
    rows, boxes = "#layers tr:not([hidden])", "#graph g[data-layer]"
    count = len(browser.find_elements(By.CSS_SELECTOR, rows))
    assert count == len(browser.find_elements(By.CSS_SELECTOR, boxes)) == 500
    assert "sum&4" in browser.find_element(By.CSS_SELECTOR, "#layer-4").text
    browser.find_element(By.ID, "search").send_keys("branch softmax")
    assert len(browser.find_elements(By.CSS_SELECTOR, rows)) == 100
    assert browser.find_element(By.ID, "count").text == "100 of 500 layers"
    browser.find_element(By.CSS_SELECTOR, "#layer-3").click()
    frame = browser.execute_script(
        "const box = document.querySelector('.box.chosen').getBoundingClientRect(),"
        " view = document.getElementById('view').getBoundingClientRect();"
        "return [box.left > view.left, box.right < view.right, box.top > view.top, box.bottom < view.bottom]"
    )
    assert frame == [True] * 4
    browser.execute_script("document.querySelector('[data-layer=\"8\"]').dispatchEvent(new MouseEvent('click'))")
    assert "branch8" in browser.find_element(By.CSS_SELECTOR, "tr.chosen").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
