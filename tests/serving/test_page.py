"""The page at `/`: how it is sent, and what who looks at it in a browser sees and can do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, expect, sync_playwright
from stand_in import KEY, NEWS, WRITER, Site, site, until

from ia3.serving.requests import Served

PATHS = ["/", "/page.css", "/page.js"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def sending() -> Iterator[Site]:
    """A server with keys, of which these tests have none."""
    with site() as running:
        yield running


class TestHowItIsSent:
    @pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")])
    def test_anybody_has_its_files(self, sending: Site, path: str, kind: str) -> None:
        response = sending.get(path, None)
        assert response.status_code == 200
        assert response.headers["content-type"] == f"text/{kind}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"

    @pytest.mark.parametrize("path", PATHS)
    def test_its_policy(self, sending: Site, path: str) -> None:
        """Nothing from elsewhere runs, nothing inline, in no frame; no text becomes markup."""
        policy = sending.get(path, None).headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in str(policy)

    @pytest.mark.parametrize("path", PATHS)
    def test_it_is_of_one_piece(self, sending: Site, path: str) -> None:
        """No word of another address, no script or style inline, and nothing that reads text as markup."""
        text = sending.get(path, None).text
        assert not re.findall(r"https?:|//[a-z]|@import|url\(", text)
        assert not re.findall(r"<script>|<style|\sstyle=|\son[a-z]+=", text)
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text)

    def test_its_addresses_are_relative(self, sending: Site) -> None:
        """So that it stands below any path of a proxy."""
        found = re.findall(r'(?:href|src)="([^"]*)"', sending.get("/", None).text)
        assert found == ["data:,", "page.css", "page.js"]
        assert set(re.findall(r'"/?(?:v1|health)/', sending.get("/page.js", None).text)) == {'"v1/'}

    def test_it_is_no_route_of_the_description(self, sending: Site) -> None:
        assert not {*PATHS} & {*sending.get("/openapi.json", None).json()["paths"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Playwright's Chromium, or the system's."""
    expect.set_options(timeout=60_000)  # of a busy machine
    with sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if path is None:
            pytest.skip("there is no Chromium: `playwright install chromium`, or the system's package")
        # Its sandbox needs what containers seldom have, and all that it opens here is ours.
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


class Sight:
    """The page in a browser's tab, and all that it complained of."""

    def __init__(self, browser: Browser, served: Site, viewport: dict[str, int] | None = None) -> None:
        self.served = served
        self.context = browser.new_context(viewport=viewport or DESKTOP)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda each: self.complaints.append(each.text))
        self.page.on("pageerror", lambda each: self.complaints.append(str(each)))
        self.page.on("dialog", lambda each: self.complaints.append(each.message) or each.dismiss())
        self.page.clock.install()
        self.page.goto(served.url)

    @property
    def search(self) -> Locator:
        return self.page.get_by_label("Search adapters")

    @property
    def rows(self) -> Locator:
        return self.page.locator("#rows tr")

    def box(self, name: str) -> Locator:
        return self.page.locator("#list li").filter(has=self.page.get_by_text(name, exact=True)).get_by_role("checkbox")

    def ask(self, text: str, *names: str) -> None:
        for name in names:
            self.box(name).check()
        self.page.get_by_label("Text").fill(text)
        self.page.get_by_role("button", name="Ask").click()

    def later(self) -> None:
        """After the longest time in which it asks for everything again."""
        self.page.clock.fast_forward(301_000)

    def fits(self) -> bool:
        """Whether nothing stands out of the window's width."""
        root = "document.documentElement"
        return bool(self.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"))


@pytest.fixture
def served() -> Iterator[Site]:
    with site(keys=False) as running:
        yield running


@pytest.fixture
def sight(browser: Browser, served: Site) -> Iterator[Sight]:
    """On a desktop, without keys, with its first list, and at the end without any complaint of the browser."""
    seen = Sight(browser, served)
    expect(seen.page.locator("#count")).not_to_be_empty()
    yield seen
    seen.context.close()
    assert seen.complaints == []


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_answers_stand_side_by_side(browser: Browser, served: Site, viewport: dict[str, int]) -> None:
    sight = Sight(browser, served, viewport)
    sight.ask("hello", "news", "writer")
    news, writer = sight.rows.nth(0), sight.rows.nth(1)
    expect(sight.rows).to_have_count(2)
    expect(news).to_contain_text("news")
    expect(news.locator(".said")).to_have_text("good")
    expect(news.locator(".bars li")).to_have_text(["good75.0 %", "bad25.0 %"])
    fills = news.locator(".fill").evaluate_all("found => found.map((each) => each.style.width)")
    assert fills == ["75%", "25%"]
    expect(writer.locator(".said")).to_have_text("hello!")
    expect(writer).to_contain_text("as long as it may be")
    for row, of in ((news, NEWS), (writer, WRITER)):
        expect(row.locator(".number")).to_have_text(["100 ms", "200 ms"])
        expect(row.locator("code")).to_have_text(str(of.digest)[:12])
        expect(row.locator("code")).to_have_attribute("title", str(of.digest))
    expect(sight.page.get_by_role("status")).to_contain_text("2 answers in")
    busy = sight.page.locator("#busy li")
    expect(busy).to_have_count(2)
    assert sorted(busy.all_text_contents()) == ["news1", "writer1"]
    expect(sight.page.locator("#now")).to_have_text("2 texts wait, 3 running, 7 adapters on the device")
    heights = [each.bounding_box()["y"] for each in news.locator("td").all()]
    assert (len({*heights}) == 1) == (viewport is DESKTOP)  # a row, and a card on a phone
    for width in (viewport["width"], 1190, 1000, 800, 600, 320):
        sight.page.set_viewport_size(viewport | {"width": width})
        assert sight.fits(), width
    sight.context.close()
    assert sight.complaints == []


def test_a_key_is_asked_for(browser: Browser) -> None:
    with site() as served:
        sight = Sight(browser, served, PHONE)
        key = sight.page.get_by_label("API key")
        for wrong, said in (("two words", "without blanks"), ("not-one-of-the-keys", "not taken this key")):
            key.fill(wrong)
            key.press("Enter")
            expect(sight.page.locator("#key-said")).to_contain_text(said)
        assert sight.fits()
        key.fill(KEY)
        key.press("Enter")
        sight.ask("hello", "news")
        expect(sight.rows.locator(".said")).to_have_text("good")
        stored = sight.page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert stored == [[KEY], [], ""]
        assert KEY not in sight.page.url
        sight.page.get_by_role("button", name="Forget the key").click()
        expect(key).to_be_visible()
        assert sight.page.evaluate("sessionStorage.length") == 0
        sight.context.close()
        assert all("401" in each for each in sight.complaints)


def test_hostile_words_stay_words(sight: Sight) -> None:
    """Names, aliases, labels, answers and errors of anybody."""
    engine = sight.served.engine
    engine.served[HOSTILE] = Served(HOSTILE, "a" * 64, "tiny", (f"alias{HOSTILE}",), "label-words", (HOSTILE, "b"))
    engine.served["long"] = Served("n" * 128, "b" * 64, "tiny", (), "label-words", ("l" * 500, "javascript:alert(1)"))
    sight.later()
    sight.ask(HOSTILE, HOSTILE, "writer", "n" * 128)
    expect(sight.rows.nth(0).locator("th")).to_have_text(HOSTILE)
    expect(sight.rows.nth(0).locator(".said")).to_have_text(HOSTILE)
    expect(sight.rows.nth(1).locator(".said")).to_have_text(f"{HOSTILE}!")
    expect(sight.rows.nth(2).locator(".said")).to_have_text("l" * 500)
    expect(sight.page.locator("#list")).to_contain_text(f"alias{HOSTILE}")
    expect(sight.page.locator("#busy")).to_contain_text(HOSTILE)
    expect(sight.page.locator("img, script:not([src])")).to_have_count(0)
    for viewport in (DESKTOP, PHONE):
        sight.page.set_viewport_size(viewport)
        assert sight.fits()


def test_nothing_in_it_can_read_text_as_markup(sight: Sight) -> None:
    """Even where its own script were wrong, the browser refuses."""
    sink = "try { document.body.innerHTML = '<b>x</b>' } catch (error) { error.name }"
    assert sight.page.evaluate(sink) == "TypeError"
    assert len(sight.complaints) == 1
    sight.complaints.clear()


def test_a_thousand_adapters_stay_usable(sight: Sight) -> None:
    some = {f"tenant-{each:04d}": replace(NEWS, name=f"tenant-{each:04d}", aliases=()) for each in range(1000)}
    some["tenant-0777"] = replace(some["tenant-0777"], aliases=("Favourite",))
    sight.served.engine.served.update(some)
    sight.later()
    listed = sight.page.locator("#list li")
    expect(sight.page.locator("#count")).to_have_text("1,002")
    expect(listed).to_have_count(200)
    expect(sight.page.locator("#more")).to_contain_text("803 more")
    expect(sight.page.get_by_role("button", name="Choose these")).to_be_disabled()
    sight.search.fill("favour")
    expect(listed).to_have_count(1)
    expect(listed).to_contain_text("tenant-0777")
    tries = sight.page.evaluate(
        """() => Array.from({ length: 5 }, () => {
            const search = document.getElementById("search");
            const show = (text) => {
                search.value = text;
                search.dispatchEvent(new Event("input"));
                document.body.offsetHeight;
            };
            show("favour");
            const began = performance.timeOrigin + performance.now();
            show("");
            return performance.timeOrigin + performance.now() - began;
        })"""
    )
    assert min(tries) < 1000
    sight.search.fill("tenant-01")
    sight.page.get_by_role("button", name="Choose these").click()
    sight.page.get_by_label("Text").fill("hello")
    sight.page.get_by_role("button", name="Ask 100 adapters").click()
    expect(sight.page.get_by_role("status")).to_contain_text("100 answers")
    expect(sight.page.get_by_role("status")).to_contain_text("good 100")
    asked = {each.model for each in sight.served.engine.requests}
    assert asked == {f"tenant-01{each:02d}" for each in range(100)}
    sight.page.get_by_role("button", name="Choose none").click()
    expect(sight.page.get_by_role("button", name="Ask")).to_be_disabled()


def test_the_keyboard_is_enough(sight: Sight) -> None:
    keys = sight.page.keyboard
    expect(sight.box("news")).to_be_visible()
    keys.press("Tab")
    expect(sight.search).to_be_focused()
    for key in ("ArrowDown", "ArrowDown", "Space", "ArrowDown", "Space"):  # past the base
        keys.press(key)
    expect(sight.box("writer")).to_be_focused()
    keys.press("Shift+Tab")
    expect(sight.search).to_be_focused()
    for _ in range(4):  # the list is one stop, two buttons are others
        keys.press("Tab")
    expect(sight.page.get_by_label("Text")).to_be_focused()
    keys.type("hello")
    keys.press("Control+Enter")
    expect(sight.rows.locator(".said")).to_have_text(["good", "hello!"])


def test_the_list_follows_what_is_served(sight: Sight) -> None:
    engine = sight.served.engine
    sight.box("news").check()
    sight.box("writer").check()
    engine.served["sport"] = replace(NEWS, name="sport", aliases=("games",))
    del engine.served["news"]
    sight.later()
    expect(sight.page.locator("#list .name")).to_have_text(["tiny", "writer", "sport"])
    expect(sight.page.locator("#chosen button")).to_have_text(["writer"])
    expect(sight.page.locator("#hint")).to_have_text("Not served any more: news.")
    expect(sight.box("writer")).to_be_checked()
    engine.served["late"] = replace(NEWS, name="late", aliases=())
    stats = engine.stats() | {"adapters": 3.0}
    engine.stats = lambda: stats  # type: ignore[method-assign]
    sight.page.clock.fast_forward(6_000)  # where their number has changed it doesn't wait
    expect(sight.page.locator("#list .name")).to_have_text(["tiny", "writer", "sport", "late"])


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("busy", "ask again in 3 seconds"),
            ("late", "There was no answer in time"),
            ("fault", "The server has failed"),
            ("a" * 100_001, "100,001 characters"),
        ],
    )
    def test_they_are_told_in_its_words(self, sight: Sight, text: str, said: str) -> None:
        sight.ask(text, "news", "writer")
        expect(sight.rows.locator(".failed")).to_have_text([re.compile(said)] * 2)
        expect(sight.page.get_by_role("status")).to_contain_text("0 answers")
        sight.complaints[:] = [each for each in sight.complaints if "Failed to load resource" not in each]

    def test_one_that_is_gone_takes_no_others_along(self, sight: Sight) -> None:
        sight.served.engine.served["sport"] = replace(NEWS, name="sport", aliases=())
        sight.later()
        sight.box("sport").check()
        del sight.served.engine.served["news"]
        sight.page.evaluate("document.querySelector('#list input[value=news]').click()")
        sight.ask("hello", "sport")
        expect(sight.rows.locator(".said.label")).to_have_text(["good"])
        expect(sight.rows.locator(".failed")).to_have_text(["It is not served any more."])
        sight.complaints.clear()

    def test_what_was_written_before_an_error_stays(self, sight: Sight) -> None:
        sight.ask("breaks", "writer")
        expect(sight.rows.locator(".said")).to_have_text("bre")
        expect(sight.rows.locator(".failed")).to_contain_text("no answer in time")

    def test_a_text_is_needed(self, sight: Sight) -> None:
        sight.ask("  ", "writer")
        expect(sight.page.locator("#hint")).to_have_text("Write a text first.")
        assert sight.served.engine.requests == []

    def test_a_server_that_is_away(self, sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ia3.serving.listening._FAILED_S", 600.0)
        expect(sight.page.locator("#state")).to_have_text("Ready")
        sight.context.set_offline(True)
        sight.later()
        expect(sight.page.get_by_role("alert")).to_contain_text("can't be reached")
        sight.context.set_offline(False)
        sight.later()
        expect(sight.page.get_by_role("alert")).to_be_hidden()
        sight.served.engine.ready = False
        sight.later()
        expect(sight.page.locator("#state")).to_have_text("Stopping")
        sight.complaints.clear()

    def test_stopping_drops_what_was_asked(self, sight: Sight) -> None:
        sight.ask("wait", "news", "writer")
        until(lambda: len(sight.served.engine.futures) == 2)
        sight.page.get_by_role("button", name="Stop").click()
        expect(sight.rows.locator(".failed")).to_have_text(["Stopped."] * 2)
        until(lambda: all(each.cancelled() for each in sight.served.engine.futures))
