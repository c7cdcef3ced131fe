"""The page in a browser: what it shows, swaps by hand, and that nothing leaves the machine."""

import json
import time

import pytest
from support import browser

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the red house is not here"


def until(driver, script, *arguments):
    """What a script returns, as soon as that is something."""
    return eventually(lambda: driver.execute_script(f"return {script}", *arguments), script)


def eventually(look, what):
    """What a look finds, as soon as that is something."""
    given_up = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < given_up, what
        time.sleep(0.05)
    return found


def translate(driver, serving, text, width=1280):
    """Open the page and translate a text, which it shows then."""
    driver.get_log("browser")
    browser.show(driver, serving.url, width)
    until(driver, "document.getElementById('model').textContent.includes('experts')")
    driver.find_element("id", "text").send_keys(f"{text}\n")
    until(driver, "after && !document.getElementById('go').disabled")


def press(driver, selector, number=0):
    """A click, wherever the page is scrolled to."""
    script = "document.querySelectorAll(arguments[0])[arguments[1]].click()"
    driver.execute_script(script, selector, number)


def shown(driver, selector):
    """The text of each such element."""
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)",
        selector,
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_shows_the_answer(driver, serving, inspector, width):
    translate(driver, serving, TEXT, width)
    answer = inspector.translate({"text": TEXT})
    assert shown(driver, ".found b") == [answer["translation"]]
    for side, name in (("encoder", "encoder.0"), ("decoder", "decoder.0")):
        pieces = driver.execute_script(
            """return [...document.querySelectorAll(`#${arguments[0]} button.piece`)]
              .map((each) => [
                each.querySelector("span").firstChild.textContent,
                each.querySelector("sub").textContent,
                each.style.getPropertyValue("--own"),
                ...[...each.querySelectorAll("small")].map((one) => one.textContent)])""",
            side,
        )
        for piece, text, entry in zip(
            pieces, answer[side]["pieces"], answer[side]["layers"][name], strict=True
        ):
            (expert,), (gate,), probs = entry["experts"], entry["gates"], entry["probs"]
            second = max({0, 1, 2, 3} - {expert}, key=probs.__getitem__)
            label = {"</s>": "end", "▁": "▁"}.get(text, text.lstrip("▁"))
            colours = inspector.describe()["colours"]
            assert piece[:4] == [label, str(expert), colours[expert], f"×{gate:.2f}"]
            assert piece[4].startswith(f"{second}: ")
            assert float(piece[4].split()[1]) == pytest.approx(100 * probs[second], abs=0.6)
    press(driver, "#encoder button.piece", 1)
    sizes = driver.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert sizes[0] <= sizes[1]
    outside = driver.execute_script(
        """return [...document.querySelectorAll("main *")]
          .filter((part) => part.getBoundingClientRect().right > innerWidth + 1)
          .map((part) => part.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    ratios = driver.execute_script(browser.CONTRASTS)
    assert len(ratios) > 8
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    assert driver.get_log("browser") == []


def test_swaps_by_hand(driver, serving, inspector):
    translate(driver, serving, TEXT)
    plain = inspector.translate({"text": TEXT})
    swaps = []
    for side, layer, position in (("encoder", "encoder.0", 2), ("decoder", "decoder.0", 1)):
        own = json.loads(until(driver, "JSON.stringify(after)"))
        (before,) = own[side]["layers"][layer][position]["experts"]
        press(driver, f"#{side} button.piece", position)
        assert shown(driver, ".panel [aria-pressed=true]")[0].startswith(f"expert {before}")
        expert = (before + 1) % 4
        press(driver, ".panel button", expert)
        swaps.append({"layer": layer, "position": position, "experts": [expert]})
        until(driver, "swaps.size === arguments[0]", len(swaps))
        answer = inspector.translate({"text": TEXT, "swaps": swaps})
        assert shown(driver, ".found b") == [answer["translation"], plain["translation"]]
        assert json.loads(until(driver, "JSON.stringify(after)")) == json.loads(json.dumps(answer))
        assert len(shown(driver, ".swapped")) == len(swaps)
        assert shown(driver, f"#{side} .swapped sub") == [str(expert)]
        effect = shown(driver, "#effect")[0].replace("−", "-")
        assert f"{answer['score'] - plain['score']:+.3f}" in effect
        same = answer["translation"] == plain["translation"]
        assert ("stays the same" in effect) == same
    # As if the router had chosen otherwise before the swaps: at one place of each side, of which
    # the decoder's can only be compared where both translations begin alike.
    driver.execute_script(
        """const others = (entry) => { entry.experts = [(entry.experts[0] + 1) % 4]; };
        others(before.encoder.layers["encoder.0"][0]);
        others(before.decoder.layers["decoder.0"][0]);
        others(before.decoder.layers["decoder.0"][3]);
        before.decoder.pieces[2] = "another";
        render()"""
    )
    assert len(shown(driver, "#encoder .changed, #decoder .changed")) == 2
    assert " at 2 of " in shown(driver, "#effect")[0]
    driver.execute_script("before = arguments[0]", plain)
    press(driver, "#encoder button.piece", 2)
    (own,) = plain["encoder"]["layers"]["encoder.0"][2]["experts"]
    assert "the router’s choice" in shown(driver, ".panel button")[own]
    press(driver, ".panel button", own)  # takes the swap back
    until(driver, "swaps.size === 1")
    press(driver, "#swaps button")
    until(driver, "swaps.size === 0")
    assert shown(driver, ".found b") == [plain["translation"]]
    assert shown(driver, ".swapped, .changed") == []
    assert driver.get_log("browser") == []


def test_nothing_is_fetched_from_elsewhere_and_text_is_text(driver, serving):
    browser.requests(driver)
    hostile = "<img src=x onerror=alert(1)>"
    translate(driver, serving, hostile)
    asked, failed = browser.requests(driver)
    assert failed == []
    pages = [address for address in asked if not address.startswith("data:")]
    assert pages == [serving.url, f"{serving.url}model", f"{serving.url}translate"]
    assert shown(driver, "main img, main script") == []
    assert driver.get_log("browser") == []
    # Even if text were read as HTML, the policy would run and load nothing of it.
    driver.execute_script("document.getElementById('effect').innerHTML = arguments[0]", hostile)
    blocked = eventually(lambda: driver.get_log("browser"), "nothing is blocked")
    assert all("Content Security Policy" in entry["message"] for entry in blocked)


def test_errors_are_shown(driver, serving):
    translate(driver, serving, TEXT)
    driver.find_element("id", "text").clear()
    driver.find_element("id", "text").send_keys("  \n")
    until(driver, "!document.getElementById('problem').hidden")
    assert "nothing to translate" in shown(driver, "#problem")[0]
    driver.find_element("id", "text").send_keys("a lamp\n")
    until(driver, "document.getElementById('problem').hidden")
    assert len(shown(driver, "#encoder button.piece")) < 8
    driver.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    press(driver, "#go")
    until(driver, "!document.getElementById('problem').hidden")
    assert shown(driver, "#problem") == ["No answer: is the command still running?"]
    assert driver.get_log("browser")[0]["message"].count("400 (Bad Request)") == 1
