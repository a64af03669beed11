"""The study's page in a real browser, from file://: answered by mouse and keyboard, closed, opened again and saved."""

import json
import re
import shutil
import time

import pytest
from typer.testing import CliRunner

from inpo.evaluation.cli import app
from inpo.evaluation.study import read_key
from inpo.evaluation.tally import count_answers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_answers_are_given_kept_and_saved(save_images, tmp_path, size):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver here")
    a, b = save_images(tmp_path / "a", [1, 2, 3]), save_images(tmp_path / "b", [101, 102, 103])
    study = tmp_path / "study"
    assert CliRunner().invoke(app, ["study", str(a), str(b), "--out", str(study)]).exit_code == 0
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    if size[0] < 500:
        metrics = {"deviceMetrics": {"width": size[0], "height": size[1], "pixelRatio": 1.0}}
        options.add_experimental_option("mobileEmulation", metrics)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:

        def find(selector):
            return chrome.find_element(By.CSS_SELECTOR, selector)

        def answer(question, choice):
            find(f"input[name={question}][value={choice}]").click()

        chrome.get((study / "study.html").as_uri())
        chrome.save_screenshot(str(tmp_path / "page.png"))
        assert chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        prompts = [find("#prompt").text]
        left = chrome.execute_script(
            "const c = document.createElement('canvas').getContext('2d'); c.drawImage(document.getElementById('left'), "
            "0, 0); return c.getImageData(0, 0, 1, 1).data[0]"
        )
        answer("overall", "left")
        answer("appeal", "tie")
        find("input[name=alignment][value=left]").send_keys(Keys.ARROW_RIGHT)  # the next choice, by keyboard
        find("#next").click()
        prompts.append(find("#prompt").text)
        assert find("#state").text == "pair 2 of 3, 1 answered"
        assert not chrome.find_elements(By.CSS_SELECTOR, "input:checked")
        answer("overall", "right")
        find("#back").click()
        assert find("input[name=appeal]:checked").get_attribute("value") == "tie"

        chrome.refresh()  # as after a closed page: it goes on at the first pair that is not whole
        assert find("#prompt").text == prompts[1]
        assert find("input[name=overall]:checked").get_attribute("value") == "right"
        find("#save").click()
        for _ in range(100):
            files = list((tmp_path / "saved").glob("answers-*.json"))
            if files:
                break
            time.sleep(0.1)
        document = json.loads(files[0].read_text())
        assert files[0].name == f"answers-{document['person']}.json"
        assert sorted(row["choice"] for row in document["answers"]) == ["left", "right", "tie", "tie"]
        counted = count_answers(read_key(study), files)
        overall = counted.questions[0]
        lefts = {re.search(r"number \d", pair["prompt"])[0]: pair["left"] for pair in read_key(study)["pairs"].values()}
        first, second = (lefts[re.search(r"number \d", prompt)[0]] for prompt in prompts)
        assert (first == "b") == (left > 100)
        assert overall.statistics.wins == (first == "b") + (second == "a")
        assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []
        sent = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
        assert not [url for url in urls if url.startswith(("http", "ws"))]
    finally:
        chrome.quit()
