"""The pages in a real browser, from file://: no error, no request; the report sorts, filters, marks, and opens sheets
by keyboard."""

import json
import shutil

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


@pytest.fixture(params=SIZES)
def chrome(request, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver here")
    width, height = SIZES[request.param]
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    if request.param == "phone":
        metrics = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1.0}}
        options.add_experimental_option("mobileEmulation", metrics)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture
def browser(chrome, states, inspect, tmp_path):
    page = tmp_path / "r.html"
    assert inspect("report", states("healthy"), "--out", page).code == 0
    chrome.get(page.as_uri())
    return chrome


def requests(browser):
    """Addresses that the page asked for, its own among them."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own start page asks for things too; what counts is what our page asks for.
    page = browser.current_url.partition("#")[0]
    ours = [each["request"]["url"] for each in sent if each["documentURL"].partition("#")[0] == page]
    return {url for url in ours if not url.startswith("data:")}


def test_the_page_sorts_filters_and_opens_sheets_without_error_or_request(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def prompts():
        return [card.text for card in browser.find_elements(By.CSS_SELECTOR, ".card .prompt")]

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    assert len(prompts()) == 5
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    data = json.loads(find("#data").get_attribute("textContent"))["pairs"]
    Select(find("#sort")).select_by_value("error")
    by_error = sorted(data, key=lambda pair: -pair["reference_error"])
    assert prompts() == [pair["prompt"] for pair in by_error]
    Select(find("#sort")).select_by_value("gap")
    by_gap = sorted(data, key=lambda pair: -pair["gap"])
    assert prompts() == [pair["prompt"] for pair in by_gap]
    Select(find("#sort")).select_by_value("inversion")
    by_trip = sorted(data, key=lambda pair: -max(each or -1 for each in pair["inversion_errors"]))
    assert prompts() == [pair["prompt"] for pair in by_trip]
    assert [tag.text for tag in browser.find_elements(By.CSS_SELECTOR, ".card .tag")] == ["win", "lose"] * 5

    browser.execute_script("document.activeElement.blur()")
    press("/", "house")
    assert prompts() == ["a blue house on the sky"] * 2
    assert find("#count").text == "2 of 5 shown"
    assert "query=house" in browser.current_url
    press(Keys.TAB, Keys.TAB, Keys.TAB, Keys.ENTER)  # past the two lists to the first card
    assert find("#sheet").is_displayed()
    assert find("#sheet-name").text == "a blue house on the sky"
    assert find("#place").text == "1 of 2"
    press(Keys.ARROW_RIGHT)
    assert find("#place").text == "2 of 2"
    cells = browser.find_elements(By.CSS_SELECTOR, "#steps .cell")
    assert len(cells) == 2 + 2 * 2 * 4
    assert min(cell.size["width"] for cell in cells) > 50
    assert len({cell.value_of_css_property("background-position") for cell in cells}) == len(cells)
    assert browser.execute_script("return document.querySelector('#sheet').scrollWidth <= innerWidth")
    press("m")
    second = find("#sheet-facts").text.split(" · ")[0].removeprefix("pair ")
    press(Keys.ESCAPE)
    assert not find("#sheet").is_displayed()
    assert "card" in browser.switch_to.active_element.get_attribute("class")

    # Marked pairs are a list as --except reads it; the address brings everything back.
    assert find("#list").get_attribute("value") == f"{second}\n"
    browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    find("#copy").click()
    assert browser.execute_script("return window.copied") == f"{second}\n"
    browser.refresh()
    assert prompts() == ["a blue house on the sky"] * 2
    assert find("#list").get_attribute("value") == f"{second}\n"

    # A search without a hit says so; a bar of a plot chooses the pairs that it counts.
    press("/", "xyz")
    assert prompts() == []
    assert "housexyz" in find("#nothing-words").text
    find("#reset").click()
    assert len(prompts()) == 5
    for bar in browser.find_elements(By.CSS_SELECTOR, "svg[data-column=gap] .bar"):
        count = int(bar.get_attribute("aria-label").split(": ")[1].split()[0])
        if count:
            browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", bar)
            assert len(prompts()) == count
    find("#unchoose").click()
    assert len(prompts()) == 5

    assert browser.get_log("browser") == []
    assert requests(browser) == {browser.current_url.partition("#")[0]}


def test_a_runs_page_enlarges_samples_without_error_or_request(chrome, inspect, tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    lines = [{"step": step, "loss": 0.7, "margin": 0.0} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (32, 16), "red").save(run / "samples" / "step-00000000.png")
    assert inspect("run", run, "--out", tmp_path / "page.html").code == 0
    chrome.get((tmp_path / "page.html").as_uri())
    assert chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert len(chrome.find_elements("css selector", "svg polyline")) == 2
    button = chrome.find_element("css selector", "button.picture")
    chrome.execute_script("arguments[0].click()", button)
    assert chrome.find_element("css selector", "#large-picture").is_displayed()
    chrome.find_element("css selector", "#close").click()
    pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(chrome, 10).until(
        lambda driver: driver.switch_to.active_element == button
    )
    assert chrome.get_log("browser") == []
    assert requests(chrome) == {chrome.current_url}
