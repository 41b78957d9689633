"""The form in a real browser: keys rate, the work is kept, and the saved file is read back. Skipped where there is no Chromium."""

import json
import shutil
import time

import pytest
import torch
from restore.browser import chromium

from tropism.restore.form import MUST, write_form
from tropism.restore.form_answers import read_answers

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def start(browser, page, rater):
    browser.open(page.as_uri())
    browser.run(f"document.getElementById('rater').value = '{rater}'; document.querySelector('#who button').click()")


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
@pytest.mark.parametrize("embedded", [10**9, 0])
def test_a_person_rates_closes_the_page_goes_on_and_saves(tmp_path, embedded):
    pictures = [(f"{i}.png", *(torch.full((3, n, n), 0.1 + 0.2 * i) for n in (8, 8, 2))) for i in range(4)]
    form = write_form(pictures, tmp_path / "form.html", embedded=embedded)
    items = json.loads(form.key.read_text())["items"]
    with chromium(PROGRAM, tmp_path) as browser:
        start(browser, form.page, "a/b")
        assert browser.run("document.getElementById('work').hidden"), "a name that is no file name is refused"
        start(browser, form.page, "ann")
        order = browser.run("order.map((i) => form.items[i].id)")
        assert sorted(order) == sorted(items)
        for k, word in enumerate(order):
            if k == 3:  # the page is closed and opened anew
                start(browser, form.page, "ann")
                assert (
                    browser.run("Object.keys(answers).length") == 3
                    and browser.run("order.map((i) => form.items[i].id)") == order
                )
            browser.until(
                "document.getElementById('c').complete && document.getElementById('c').naturalWidth === 8 && !waiting"
            )
            assert browser.run(f"form.items[order[at]].id === '{word}'")
            browser.press("4" if k == 0 else str(MUST.get(items[word]["kind"], 2)))
            browser.until("!waiting")
        for _ in order:  # back to the first, which was a slip
            browser.press("ArrowLeft")
        assert (
            browser.run("at") == 0 and browser.run("document.querySelector('[aria-pressed=true]').dataset.level") == "4"
        )
        browser.press(str(MUST.get(items[order[0]]["kind"], 3)))
        browser.until("!document.getElementById('end').hidden")
        browser.run("document.querySelector('#end button.save').click()")
        saved = tmp_path / "ratings-ann.json"
        for _ in range(400):
            if saved.exists() and saved.stat().st_size:
                break
            time.sleep(0.05)
        start(browser, form.page, "bob")
        assert browser.run("Object.keys(answers).length") == 0
        assert browser.run("order.map((i) => form.items[i].id)") != order, "another rater, another order"
        asked = [
            e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
        ]
        assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
        assert not [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    found = read_answers(form.key, [saved])
    first = items[order[0]]
    expected = {f"{i}.png": {"ann": 3 if first == {"kind": "picture", "name": f"{i}.png"} else 2} for i in range(4)}
    assert found.ratings.levels == expected and found.raters[0].caught == form.traps
