"""The pages in a real browser: keys, mouse, touch, what is told, what survives, and texts that mean harm (R27)."""

import re
import shutil
import time

import pytest
from hostile import TEXTS
from live import answer, fresh, pair, ranking, rating, site, tasks

from plaudit.feedback import secret
from plaudit.feedback.items import Answer, Candidate, Item, Label
from plaudit.feedback.store import Store

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="the pages are tested with playwright: pip install it")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="the pages are tested in Chromium, and there is no `chromium` here"
)
PROMPT = "#prompt .text"
WAIT = 10_000
"""Milliseconds that a page may take to show what is expected: twice as long as it may need until it asks the server."""


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=WAIT)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page of one person, and everything that went wrong in it."""

    def __init__(self, browser, study, link, **look):
        self.wrong = []
        self.context = browser.new_context(**look)
        self.context.set_default_timeout(WAIT)
        self.study = study
        self.page = self.open(link)

    def open(self, link):
        page = self.context.new_page()
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.wrong.append(f"error {error}"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("console", lambda said: self.wrong.append(said.text) if "Content Security" in said.text else None)
        page.goto(link)
        return page

    def _asked(self, url):
        if not url.startswith(self.study.links.url + "/"):
            self.wrong.append(f"request {url}")

    def keys(self, *names):
        for name in names:
            self.page.keyboard.press(name)

    def see(self, selector, text):
        sync_api.expect(self.page.locator(selector)).to_have_text(text)

    def answered(self, count):
        """Waits until the server has so many answers of everybody."""
        for _ in range(200):
            if len(labels := self.study.labels()) == count:
                return labels
            self.page.wait_for_timeout(25)
        pytest.fail(f"{len(labels)} answers, not {count}")


@pytest.fixture
def people(chromium):
    """Opens pages, and at the end sees that nothing went wrong in any of them."""
    tabs = []

    def enter(study, name="Ann", **look):
        tabs.append(Tab(chromium, study, f"{study.links.url}/join/{study.token(name)}", **look))
        return tabs[-1]

    yield enter
    for tab in tabs:
        tab.context.close()
        assert tab.wrong == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "labels.db"
    with site(path, title="A study", instructions="Be kind.", strength=True) as found:
        yield found


@pytest.fixture
def study(shared):
    with fresh(shared) as found:
        yield found


@pytest.fixture
def own(tmp_path):
    """A server for one test alone."""
    with site(tmp_path / "labels.db", title="A study", strength=True) as found:
        yield found


def shown(label):
    return label.answer.reordered(label.order)


# ------------------------------------------------------------------------------------------------ keys


def test_pairs_by_every_key(study, people):
    study.add(*(pair(number) for number in range(6)))
    tab = people(study)
    tab.see("#title", "A study")
    tab.see("#instructions", "Be kind.")
    for number, (keys, said) in enumerate(
        [
            (["ArrowLeft"], "Answered: A is better."),
            (["ArrowRight"], "Answered: B is better."),
            (["ArrowUp"], "Answered: Equal."),
            (["ArrowDown"], "Answered: Can’t compare."),
            (["Shift+Digit3", "ArrowRight"], "Answered: B is better, much."),
            (["Shift+Digit1", "Shift+Digit1", "Shift+Digit2", "ArrowUp"], "Answered: Equal."),
        ]
    ):
        tab.see(PROMPT, f"prompt {number}")
        tab.keys(*keys)
        tab.see("#said", said)
    labels = tab.answered(6)
    expected = [Answer((1, 2)), Answer((2, 1)), Answer((1, 1)), Answer(), Answer((2, 1), strength=3), Answer((1, 1))]
    assert [shown(label) for label in labels] == expected
    assert [label.item.prompt for label in labels] == [f"prompt {number}" for number in range(6)]
    assert all(0 < label.ms < 60_000 for label in labels)
    tab.see("#rest-title", "Nothing to do just now")
    sync_api.expect(tab.page.locator("#rest-title")).to_be_focused()
    tab.see("#pace", "6 of 6")


def test_rankings_by_keys(study, people):
    study.add(ranking(0, 4), ranking(1, 9), ranking(2, 3))
    tab = people(study)
    tab.see(PROMPT, "rank 0")
    cards = tab.page.locator("#answers .card")
    sync_api.expect(cards.nth(0)).to_be_focused()
    tab.keys("3")
    sync_api.expect(cards.nth(1)).to_be_focused()
    tab.keys("Enter")
    tab.see("#said", "Answer B has no place yet: press a number.")
    tab.keys("1", "ArrowDown", "4")
    sync_api.expect(cards.nth(2)).to_be_focused()
    tab.keys("Tab", "ArrowUp", "3")
    tab.see("#said", "B > A = C > D")
    tab.keys("Enter")
    tab.see(PROMPT, "rank 1")
    tab.keys(*"123456789", "Enter")
    tab.see(PROMPT, "rank 2")
    tab.keys("c")
    labels = tab.answered(3)
    assert [shown(label).ranks for label in labels] == [(2, 1, 2, 3), tuple(range(1, 10)), None]
    assert [cards_of(label) for label in labels[:1]] == [4]


def test_b02_after_a_note_the_next_answer_gets_its_place_and_no_earlier_one_loses_its_own(study, people):
    study.add(ranking(0, 3))
    tab = people(study)
    tab.see(PROMPT, "rank 0")
    tab.keys("1", "n")
    tab.page.keyboard.type("2 is close")
    tab.keys("Escape")
    sync_api.expect(tab.page.locator("#question")).to_be_focused()
    tab.keys("2")
    sync_api.expect(tab.page.locator("#answers .card").nth(2)).to_be_focused()
    tab.keys("3", "n", "Escape", "1", "Enter")  # all have a place: a number out of nowhere changes none
    (label,) = tab.answered(1)
    assert (shown(label).ranks, label.answer.note) == ((1, 2, 3), "2 is close")


def cards_of(label):
    return len(label.item.candidates)


def test_ratings_and_thumbs_by_keys(study, people, tmp_path):
    study.add(rating(0), rating(1))
    tab = people(study)
    tab.see(PROMPT, "rate 0")
    tab.keys("Enter")
    tab.see("#said", "Choose a rating first.")
    tab.keys("9", "6", "Enter")
    tab.see(PROMPT, "rate 1")
    tab.keys("1", "Enter")
    assert [label.answer.rating for label in tab.answered(2)] == [6.0, 1.0]
    with site(tmp_path / "thumbs.db", ratings=(0, 1)) as thumbs, site(tmp_path / "ten.db", ratings=(1, 10)) as ten:
        thumbs.add(rating(0), rating(1))
        tab = people(thumbs)
        tab.see(PROMPT, "rate 0")
        tab.keys("+")
        tab.see(PROMPT, "rate 1")
        tab.keys("-")
        assert [label.answer.rating for label in tab.answered(2)] == [1.0, 0.0]
        ten.add(rating(0))
        tab = people(ten)
        tab.see(PROMPT, "rate 0")
        tab.keys("0", "Enter")
        assert tab.answered(1)[0].answer.rating == 10.0


def test_notes_rewrites_skip_help_and_keyboard_only(study, people):
    study.add(pair(0), pair(1))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    tab.keys("n")
    tab.page.keyboard.type("nothing ← is pressed here: s u e ?")
    tab.keys("ArrowLeft", "Escape", "e")
    tab.page.keyboard.type("A better one.")
    tab.keys("Escape", "?")
    sync_api.expect(tab.page.locator("#help")).to_be_visible()
    tab.keys("ArrowLeft", "s", "?")
    sync_api.expect(tab.page.locator("#help")).to_be_hidden()
    tab.see(PROMPT, "prompt 0")
    tab.keys("s")
    tab.see(PROMPT, "prompt 1")
    tab.keys("ArrowLeft")
    tab.see(PROMPT, "prompt 0")
    sync_api.expect(tab.page.locator("#note-field")).to_be_hidden()
    tab.keys("n")
    tab.page.keyboard.type("kept")
    tab.keys("Escape", "e")
    tab.page.keyboard.type("better")
    tab.keys("Escape", "ArrowDown")
    last = tab.answered(2)[-1]
    assert (last.answer, last.item.prompt) == (Answer(note="kept", rewrite="better"), "prompt 0")


def test_undo_shows_the_question_with_the_earlier_answer_marked(study, people):
    study.add(pair(0), ranking(1, 3), pair(2))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    tab.keys("Shift+Digit2", "n")
    tab.page.keyboard.type("why")
    tab.keys("Escape", "ArrowLeft")
    tab.see(PROMPT, "rank 1")
    tab.keys("2", "1", "2", "Enter")
    tab.see(PROMPT, "prompt 2")
    tab.answered(2)
    tab.keys("u")
    tab.see(PROMPT, "rank 1")
    pressed = tab.page.locator("#answers [aria-pressed=true]")
    assert pressed.all_inner_texts() == ["2", "1", "2"]
    tab.keys("Control+z")
    tab.see(PROMPT, "prompt 0")
    assert tab.page.locator("#panel [aria-pressed=true] span").all_inner_texts() == ["A is better", "clearly"]
    assert tab.page.input_value("#note") == "why"
    tab.answered(0)
    tab.page.reload()
    tab.see(PROMPT, "prompt 0")
    tab.keys("Enter")
    tab.see(PROMPT, "rank 1")
    tab.keys("Enter")
    tab.see(PROMPT, "prompt 2")
    labels = tab.answered(2)
    assert [shown(label) for label in labels] == [Answer((1, 2), strength=2, note="why"), Answer((2, 1, 2))]


# ------------------------------------------------------------------------------------------------ mouse and touch


def test_by_mouse_and_a_double_click_answers_once(study, people):
    study.add(pair(0), ranking(1, 2), rating(2), pair(3), pair(4))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    tab.page.click("#strength button >> nth=2")
    tab.page.dblclick("[data-name=right]")
    tab.see(PROMPT, "rank 1")
    tab.page.click("#answers .card >> nth=0 >> [data-tier='2']")
    tab.page.click("#answers .card >> nth=1 >> [data-tier='1']")
    tab.page.click("#submit")
    tab.see(PROMPT, "rate 2")
    tab.page.click("[data-name='4']")
    sync_api.expect(tab.page.locator("#submit")).to_be_focused()
    tab.page.keyboard.press("Enter")
    tab.see(PROMPT, "prompt 3")
    tab.page.click("#open-rewrite")
    tab.page.click("#sources button >> nth=1")
    tab.page.click("#skip")
    tab.see(PROMPT, "prompt 4")
    labels = tab.answered(3)
    assert [shown(label) for label in labels] == [Answer((2, 1), strength=3), Answer((2, 1)), Answer(rating=4.0)]
    tab.page.dblclick("#undo", delay=40)
    tab.see(PROMPT, "rate 2")
    tab.answered(2)
    tab.see("#said", "Taken back: your earlier answer is marked.")
    tab.page.wait_for_load_state("networkidle")
    assert len(study.labels()) == 2


def test_on_a_phone(study, people):
    long = "\n\n".join(["A paragraph that goes on for a while and then ends."] * 60)
    study.add(pair(0, long, "short"), ranking(1, 9), rating(2))
    look = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    tab = people(study, **look)
    for prompt, taps in [
        ("prompt 0", ["[data-name=left]"]),
        (
            "rank 1",
            [f"#answers .card >> nth={place} >> [data-tier='{place % 3 + 1}']" for place in range(9)] + ["#submit"],
        ),
        ("rate 2", ["[data-name='7']", "#submit"]),
    ]:
        tab.see(PROMPT, prompt)
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for button in tab.page.locator("#choices button").all():
            box = button.bounding_box()
            assert min(box["height"], box["width"]) >= 40
            assert 0 <= box["x"] <= 360 - box["width"]
            assert box["y"] + box["height"] <= 640  # the bar stays in sight, however long the texts
        cards = [card.bounding_box() for card in tab.page.locator("#answers .card").all()]
        assert len({card["x"] for card in cards}) == 1
        tab.page.tap("#open-rewrite")
        field, bar = (tab.page.locator(name).bounding_box() for name in ("#rewrite", "#panel"))
        assert field["y"] >= 0
        assert field["y"] + field["height"] <= bar["y"]  # the bar does not lie over what is being written
        for tap in taps:
            tab.page.tap(tap)
    tab.answered(3)


@pytest.mark.slow
def test_both_cards_are_aligned_and_long_texts_scroll_inside_them(study, people):
    study.add(pair(0, "short", "\n".join(str(number) for number in range(500)), "p\n" * 200))
    tab = people(study, viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    tab.see("#question", "Which answer is better?")
    boxes = [card.bounding_box() for card in tab.page.locator("#answers .card").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["height"] == boxes[1]["height"]
    assert tab.page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    scroll = "[...document.querySelectorAll('.card')].map(card => card.scrollHeight > card.clientHeight)"
    assert sorted(tab.page.evaluate(scroll)) == [False, True, True]
    assert tab.page.locator("#choices").bounding_box()["y"] < 720


@pytest.mark.slow
def test_b24_of_a_long_conversation_the_turn_that_is_answered_is_in_sight(study, people):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(15)]
    study.add(pair(0, *([{"role": "assistant", "content": text}] for text in "ab"), turns), pair(1, prompt="p\n" * 200))
    tab = people(study, viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    tab.see("#question", "Which answer is better?")
    box, turn = (tab.page.locator(name).bounding_box() for name in ("#prompt", "#prompt .turn:last-child"))
    assert box["y"] <= turn["y"]
    assert turn["y"] + turn["height"] <= box["y"] + box["height"]
    tab.keys("ArrowLeft")
    tab.see(PROMPT, "p\n" * 200)
    assert tab.page.evaluate("document.getElementById('prompt').scrollTop") == 0


@pytest.mark.slow
def test_b02_nine_places_stand_in_one_line_on_every_screen(study, people):
    study.add(ranking(1, 9))
    tab = people(study, reduced_motion="reduce")
    tab.see("#question", "Put the answers in order")
    for width in (360, 800, 1280):
        tab.page.set_viewport_size({"width": width, "height": 720})
        boxes = [one.bounding_box() for one in tab.page.locator("#answers .card >> nth=0 >> .tiers button").all()]
        assert len({box["y"] for box in boxes}) == 1
        assert min(box["width"] for box in boxes) >= 24  # WCAG 2.2, 2.5.8
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ------------------------------------------------------------------------------------------------ for everybody


@pytest.mark.slow
def test_focus_can_be_seen_and_everything_has_a_name(study, people):
    study.add(pair(0), ranking(1, 3), rating(2))
    tab = people(study)
    for prompt, key in [("prompt 0", "ArrowLeft"), ("rank 1", "c"), ("rate 2", None)]:
        tab.see(PROMPT, prompt)
        names = []
        for _ in range(40):
            tab.keys("Tab")
            found = tab.page.evaluate(
                "(() => { const e = document.activeElement, s = getComputedStyle(e);"
                " return [e.tagName, s.outlineStyle, parseFloat(s.outlineWidth),"
                " e.ariaLabel || e.labels?.[0]?.innerText || e.innerText]; })()"
            )
            if found[0] == "BODY":
                break
            assert found[1] != "none", found
            assert found[2] >= 1
            assert found[3].strip(), found
            names.append(found[3])
        assert len(set(names)) >= 6
        nameless = tab.page.locator("button:visible").evaluate_all(
            "all => all.filter(one => !(one.ariaLabel || one.innerText.trim())).length"
        )
        assert nameless == 0
        if key:
            tab.keys(key)
    assert tab.page.get_attribute("#said", "aria-live") == "polite"
    tab.page.reload()
    tab.see(PROMPT, "rate 2")
    named = tab.page.locator("[aria-keyshortcuts]")
    shortcuts = named.evaluate_all("all => all.map(one => one.getAttribute('aria-keyshortcuts'))")
    assert {"N", "E", "S", "U Control+Z", "?", "1", "7", "Enter"} <= set(shortcuts)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_light_and_in_dark(study, people, scheme):
    """Contrast of 4.5 to 1 and more (WCAG 2.2, 1.4.3), by the colours that the browser computes."""
    study.add(pair(0))
    tab = people(study, color_scheme=scheme, reduced_motion="reduce")
    tab.see(PROMPT, "prompt 0")
    pairs = tab.page.evaluate(
        "[...document.querySelectorAll('#title, #pace, #question, .text, #choices button, .tools button, #person')]"
        ".map(e => { let b = e; while (getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement"
        " || document.body; return [getComputedStyle(e).color, getComputedStyle(b).backgroundColor]; })"
    )
    assert len(pairs) > 8
    for front, back in pairs:
        lighter, darker = sorted((luminance(front), luminance(back)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (front, back)
    assert tab.page.evaluate("getComputedStyle(document.querySelector('#answers .card')).animationName") == "none"


def luminance(colour):
    values = [float(value) for value in re.findall(r"[\d.]+", colour)[:3]]
    scale = 1 if colour.startswith("color(") else 255
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (value / scale for value in values)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_two_people_at_once_never_answer_the_same(study, people):
    study.add(*(pair(number) for number in range(8)))
    tabs = [people(study, name) for name in ("Ann", "Bob")]
    for step in range(4):
        for tab in tabs:
            sync_api.expect(tab.page.locator(PROMPT)).to_have_text(re.compile("prompt"))
            tab.keys("ArrowLeft")
            tab.page.wait_for_function(f"document.getElementById('pace').textContent.startsWith('{step + 1} of')")
    labels = tabs[0].answered(8)
    assert sorted(label.item.prompt for label in labels) == [f"prompt {number}" for number in range(8)]
    assert [sum(label.person.startswith(name) for label in labels) for name in ("Ann", "Bob")] == [4, 4]


@pytest.mark.slow
def test_two_tabs_of_one_person_do_no_harm(study, people):
    study.add(pair(0), pair(1), pair(2))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    first, tab.page = tab.page, tab.open(study.links.url)
    tab.see(PROMPT, "prompt 0")
    tab.keys("ArrowLeft")
    tab.answered(1)
    tab.page = first
    tab.keys("ArrowRight")
    tab.see("#said", "assignment: this is answered already; undo that answer to give another.")
    tab.see(PROMPT, "prompt 1")
    tab.keys("ArrowRight")
    assert [shown(label).ranks for label in tab.answered(2)] == [(1, 2), (2, 1)]


def test_questions_that_come_later_appear_by_themselves(study, people):
    tab = people(study)
    tab.page.clock.install()
    tab.page.reload()
    tab.see("#rest-title", "Nothing to do just now")
    study.add(pair(0))
    tab.page.clock.fast_forward(4000)
    tab.see(PROMPT, "prompt 0")


# ------------------------------------------------------------------------------------------------ what survives


def test_who_writes_keeps_the_question_and_who_only_looks_does_not(study, people):
    study.add(*(pair(number) for number in range(4)))
    tab = people(study)
    tab.page.clock.install()
    tab.page.reload()
    tab.see(PROMPT, "prompt 0")
    tab.page.wait_for_load_state("networkidle")
    asked = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.clock.run_for(310_000)
    assert asked == []
    tab.keys("n", "x")
    with tab.page.expect_request(re.compile("/api/next")):
        tab.page.clock.run_for(4000)


def test_a_text_that_is_too_long_stays_where_it_is(study, people):
    study.add(pair(0, "l" * 10_001, "r" * 10_001), pair(1))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    tab.page.click("#open-rewrite")
    tab.page.click("#sources button >> nth=0")
    tab.keys("Escape", "ArrowLeft")
    tab.see("#said", "This text is too long: 10001 characters of at most 10000.")
    tab.see(PROMPT, "prompt 0")
    sync_api.expect(tab.page.locator("#rewrite")).to_be_focused()
    tab.page.fill("#rewrite", "short")
    tab.keys("Control+Enter")
    assert tab.answered(1)[0].answer.rewrite == "short"


def test_the_browser_forgets_old_drafts_and_tells_people_apart(study, people):
    study.add(pair(0))
    tab = people(study, "Ann:out:")
    tab.see(PROMPT, "prompt 0")
    tab.keys("n")
    tab.page.keyboard.type("young")
    prefix = tab.page.evaluate("Object.keys(localStorage)[0]").partition("draft:")[0]
    tab.page.evaluate("name => localStorage.setItem(name, JSON.stringify({ note: 'x', at: 1 }))", f"{prefix}draft:old")
    tab.page.reload()
    tab.see(PROMPT, "prompt 0")
    left = tab.page.evaluate("Object.keys(localStorage)")
    assert f"{prefix}draft:old" not in left
    assert len([key for key in left if key.startswith(f"{prefix}draft:")]) == 1
    # A person called "Ann:out" would else be taken for what Ann has to send.
    assert prefix.count(":") == 3


def test_a_reload_in_the_middle_keeps_the_question_its_order_and_the_draft(study, people):
    study.add(ranking(0, 5), pair(1))
    tab = people(study)
    tab.see(PROMPT, "rank 0")
    tab.keys("2", "1", "n")
    tab.page.keyboard.type("half a no")
    before = tab.page.locator("#answers .text").all_inner_texts()
    tab.page.reload()
    tab.see(PROMPT, "rank 0")
    assert tab.page.locator("#answers .text").all_inner_texts() == before
    assert tab.page.locator("#answers [aria-pressed=true]").all_inner_texts() == ["2", "1"]
    assert tab.page.input_value("#note") == "half a no"


def test_unsent_answers_survive_the_server_and_the_page(tmp_path, people):
    path = tmp_path / "labels.db"
    with site(path) as study:
        study.add(*(pair(number) for number in range(5)))
        tab = people(study)
        tab.see(PROMPT, "prompt 0")
        tab.page.wait_for_load_state("networkidle")
    tab.keys("ArrowLeft")
    tab.see(PROMPT, "prompt 1")
    sync_api.expect(tab.page.locator("#sending")).to_contain_text("1 answer waits in this browser")
    tab.keys("ArrowRight")
    tab.see(PROMPT, "prompt 2")
    assert tab.study.labels() == []
    link = tab.page.url
    tab.page.close()
    with site(path) as study:
        assert study.links == tab.study.links
        tab.study = study
        tab.page = tab.open(link)
        assert [shown(label).ranks for label in tab.answered(2)] == [(1, 2), (2, 1)]
        tab.see(PROMPT, "prompt 2")
        tab.see("#sending", "")


HASTE = "const own = AbortSignal.timeout; AbortSignal.timeout = time => own.call(AbortSignal, time / 20);"


def between(tab, what):
    """Puts `what` between page and server: it gets the requests while the list that this gives holds anything."""
    away = []
    tab.page.add_init_script(HASTE)
    tab.page.route("**/api/**", lambda route: what(route) if away else route.continue_())
    tab.page.reload()
    tab.see(PROMPT, "prompt 0")
    return away


def test_a_connection_that_hangs_is_told_and_loses_nothing(study, people):
    study.add(*(pair(number) for number in range(5)))
    tab = people(study)
    hanging = []
    away = between(tab, hanging.append)
    away.append(True)
    tab.keys("ArrowLeft")
    tab.see("#sending", "No connection to the server. 1 answer waits in this browser and will be sent.")
    tab.keys("n")
    tab.page.keyboard.type("half a note")
    tab.keys("Escape", "ArrowRight")
    sync_api.expect(tab.page.locator("#sending")).to_contain_text("2 answers wait in this browser")
    assert study.labels() == []
    assert hanging
    away.clear()
    labels = tab.answered(2)
    assert [shown(label) for label in labels] == [Answer((1, 2)), Answer((2, 1), note="half a note")]
    tab.see("#sending", "")


def test_what_was_written_comes_back_with_the_question_if_the_answer_is_refused(study, people):
    study.add(pair(0))
    tab = people(study)
    away = between(tab, lambda route: route.fulfill(status=400, body='{"error": "answer: no."}'))
    tab.keys("e")
    tab.page.keyboard.type("A better one.")
    away.append(True)
    tab.keys("Escape", "ArrowLeft")
    tab.see("#said", "answer: no.")
    sync_api.expect(tab.page.locator("#task")).to_be_hidden()
    away.clear()
    sync_api.expect(tab.page.locator("#task")).to_be_visible()
    tab.keys("Enter")
    assert [label.answer.rewrite for label in tab.answered(1)] == ["A better one."]


@pytest.mark.parametrize("status", [200, 404, 502])
def test_what_answers_in_place_of_the_server_acknowledges_and_refuses_nothing(study, people, status):
    """A proxy's page, or that of a network which wants one to sign in."""
    study.add(pair(0), pair(1))
    tab = people(study)
    away = between(tab, lambda route: route.fulfill(status=status, body="<p>Sign in</p>"))
    away.append(True)
    tab.keys("ArrowLeft")
    tab.see("#sending", "No connection to the server. 1 answer waits in this browser and will be sent.")
    away.clear()
    assert [shown(label).ranks for label in tab.answered(1)] == [(1, 2)]


def test_r28_what_a_full_disk_could_not_keep_stays_in_the_browser(tmp_path, people, monkeypatch):
    """SQLite is given no more pages, which is the error that a full disk is."""
    opened = []
    opening = Store.open
    monkeypatch.setattr(Store, "open", lambda path: opened.append(opening(path)) or opened[-1])
    with site(tmp_path / "full.db") as study:
        study.add(*(pair(number) for number in range(3)))
        tab = people(study)
        tab.see(PROMPT, "prompt 0")
        tab.page.wait_for_load_state("networkidle")
        [store] = opened
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        tab.keys("n")
        tab.page.locator("#note").fill("n" * 9000)
        tab.keys("Escape", "ArrowLeft")
        waits = "The server's disk is full; nothing was kept of this. 1 answer waits in this browser and will be sent."
        tab.see("#sending", waits)
        tab.keys("n")
        tab.page.keyboard.type("half a no")
        assert study.labels() == []
        tab.page.reload()
        tab.see("#sending", waits)
        tab.see(PROMPT, "prompt 1")
        assert tab.page.input_value("#note") == "half a no"
        store._db.execute("PRAGMA max_page_count = 1000000")
        tab.page.reload()
        (label,) = tab.answered(1)
        assert (shown(label).ranks, label.answer.note) == ((1, 2), "n" * 9000)
        tab.see("#sending", "")


@pytest.mark.slow
def test_answers_go_on_while_the_server_restarts_under_the_page(tmp_path, people):
    path = tmp_path / "labels.db"
    with site(path) as study:
        study.add(*(pair(number) for number in range(3)))
        tab = people(study)
        tab.see(PROMPT, "prompt 0")
        tab.page.wait_for_load_state("networkidle")
    tab.keys("ArrowUp")
    tab.see(PROMPT, "prompt 1")
    with site(path) as study:
        tab.study = study
        tab.answered(1)
        tab.see("#sending", "")
        tab.keys("u")
        tab.see(PROMPT, "prompt 0")


# ------------------------------------------------------------------------------------------------ texts that mean harm


def test_hostile_texts_are_shown_as_text(study, people):
    """Every text as a turn, as a role and as an answer; the page shows exactly the text, and only it."""
    assert len(set(TEXTS)) == 60
    short = [text for text in TEXTS if len(text) < 1000]
    turns = [{"role": text[:100], "content": text} for text in short]
    groups = [TEXTS[start : start + 9] for start in range(0, 60, 9)]
    for number, texts in enumerate(groups):
        candidates = tuple(Candidate(text, {"model": text[:99]}) for text in texts)
        study.add(Item("rank", [*turns, {"role": "last", "content": str(number)}], candidates))
    tab = people(study)
    for number, texts in enumerate(groups):
        tab.page.wait_for_function(
            "last => [...document.querySelectorAll('#prompt .text')].at(-1)?.textContent === last", arg=str(number)
        )
        assert tab.page.locator("#prompt .text").all_text_contents() == [*short, str(number)]
        assert tab.page.locator("#prompt .role").all_text_contents() == [*(text[:100] for text in short), "last"]
        assert sorted(tab.page.locator("#answers .text").all_text_contents()) == sorted(texts)
        assert tab.page.locator("#task .text *, #task .role *").count() == 0
        tab.keys("c")
    tab.answered(7)


@pytest.mark.slow
def test_r27_hostile_errors_are_shown_as_text(study, people):
    """Whatever the server may say of an answer or of a name: the page shows that sentence, and nothing else."""
    study.add(pair(0))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    said = ""
    tab.page.route("**/api/undo", lambda route: route.fulfill(status=400, json={"error": said}))
    for said in TEXTS:
        tab.keys("u")
        tab.page.wait_for_function("text => document.getElementById('said').textContent === text", arg=said)
    assert tab.page.locator("#said *").count() == 0
    link = study.links.join
    page = tab.open(link)
    page.route(link, lambda route: route.fulfill(status=409, json={"error": said}))
    page.locator("#name").fill("Eve")
    for said in TEXTS:
        page.keyboard.press("Enter")
        page.wait_for_function("text => document.getElementById('problem').textContent.startsWith(text)", arg=said)
    assert page.locator("#problem *").count() == 0


@pytest.mark.slow
def test_hostile_names_notes_and_rewrites_are_text_for_the_manager(own, chromium):
    study = own
    study.add(*(pair(number) for number in range(len(TEXTS))))
    names = [name for text in TEXTS if (name := " ".join(text.split())[:80]).isprintable()]
    for name in dict.fromkeys(names):
        study.token(name)
    writer = study.person("writer")
    for number, task in enumerate(text for _ in range(3) for text in tasks(writer, 20)):
        text = TEXTS[number % len(TEXTS)][:9000]
        answer(writer, task, {"choice": "left", "note": text, "rewrite": f"{text}?"}, f"h{number}")
    tab = Tab(chromium, study, study.links.review)
    sync_api.expect(tab.page.locator("#people th")).to_have_count(len(set(names)) + 1)
    assert set(tab.page.locator("#people th").all_text_contents()) == {*names, "writer"}
    tab.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    sync_api.expect(tab.page.locator(".full")).to_have_count(tab.page.locator("details").count())
    shown = set(tab.page.locator(".extra .text").all_text_contents())
    kept = {text for label in study.labels()[-50:] for text in (label.answer.note, label.answer.rewrite)}
    assert shown == kept
    assert tab.page.locator(".text *, #people th *").count() == 0
    tab.context.close()
    assert tab.wrong == []


@pytest.mark.slow
def test_no_page_of_a_person_names_a_model(study, people):
    study.add(pair(0), ranking(1, 3))
    tab = people(study)
    heard = []
    tab.page.on("response", lambda reply: heard.append(reply.text()) if "/api/" in reply.url else None)
    tab.page.reload()
    tab.see(PROMPT, "prompt 0")
    tab.keys("ArrowLeft")
    tab.see(PROMPT, "rank 1")
    tab.keys("u")
    tab.see(PROMPT, "prompt 0")
    assert len(heard) >= 4
    everything = "".join(heard) + tab.page.content()
    everything += tab.page.evaluate("JSON.stringify([localStorage, document.title, location.href])")
    assert "secret" not in everything


# ------------------------------------------------------------------------------------------------ doors and the review


@pytest.mark.slow
def test_joining_by_the_shared_link(study, chromium):
    study.add(pair(0))
    tab = Tab(chromium, study, study.links.join)
    study.token("Taken")
    tab.page.keyboard.type(f"Taken {study.number}")
    tab.keys("Enter")
    sync_api.expect(tab.page.locator("#problem")).to_contain_text("is taken; choose another")
    tab.page.fill("#name", "Zoë")
    tab.page.click("button")
    tab.see(PROMPT, "prompt 0")
    tab.see("#person", "Zoë")
    lost = Tab(chromium, study, f"{study.links.url}/join/nothing")
    lost.see("h1", "This browser is not known here")
    for one in (tab, lost):
        one.context.close()
        assert one.wrong == []


def test_the_page_that_hides_a_link_leads_on_to_it(study, chromium, tmp_path):
    study.add(pair(0))
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(secret.doorway(tmp_path / "s.db", f"{study.links.url}/join/{study.token('Ann')}"))
        sync_api.expect(page.locator(PROMPT)).to_have_text("prompt 0")


@pytest.mark.slow
def test_the_review_page_follows_the_study(own, chromium):
    study = own
    study.add(*(pair(number) for number in range(60)))
    ann = study.person("Ann")
    for number in range(55):
        answer(ann, tasks(ann)[0], {"choice": "left", "strength": 2}, f"k{number}", ms=2000)
    tab = Tab(chromium, study, study.links.review)
    tab.see("#headline", "55 answers from 1 person")
    sync_api.expect(tab.page.locator("details")).to_have_count(50)
    tab.page.click("details >> nth=0 >> summary")
    sources = tab.page.locator("details >> nth=0 >> .source").all_inner_texts()
    assert sorted(sources) == ["model: secret-ppo · step: 2", "model: secret-sft · step: 1"]
    assert tab.page.locator(".verdict").first.inner_text() == "A > B, clearly"
    tab.page.click("#older")
    sync_api.expect(tab.page.locator("details")).to_have_count(5)
    tab.see("#page", "2 of 2")
    tab.page.fill("#link-name", "Ann")
    tab.page.click("#link button")
    sync_api.expect(tab.page.locator("#made")).to_contain_text("/join/")
    assert ann.get("/api/next").status_code == 401
    tab.see("#void", "Ann’s earlier link is void now.")
    link = tab.page.locator("#made").inner_text()
    assert study.client().get(link).status_code == 303
    tab.context.close()
    assert tab.wrong == []


@pytest.mark.slow
def test_a_link_of_somebody_else_never_sends_in_the_old_name(study, people):
    """A second person's link in the same browser: what the first one wrote is not sent as the second's."""
    study.add(*(pair(number) for number in range(4)))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    other = tab.open(f"{study.links.url}/join/{study.token('Bob')}")
    other.close()
    tab.keys("ArrowLeft")
    tab.see("#person", f"Bob {study.number}")
    assert study.labels() == []


def test_a_page_that_goes_sends_nothing_in_the_new_name(study, people):
    study.add(*(pair(number) for number in range(5)))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    token = study.token("Bob")
    bob = study.client(token)
    answer(bob, tasks(bob)[0], {"choice": "left"}, f"bob {token}")
    tab.open(f"{study.links.url}/join/{token}").close()
    sent = []
    tab.page.on("response", lambda reply: sent.append(reply.status) if "/api/undo" in reply.url else None)
    tab.keys("u")
    tab.see("#person", f"Bob {study.number}")
    tab.page.wait_for_load_state("networkidle")
    assert len(study.labels()) == 1
    assert sent == [403]
    assert len(tab.page.evaluate("Object.keys(localStorage).filter(name => name.includes(':out:'))")) == 1


@pytest.mark.slow
def test_an_answer_that_is_read_stays_open_while_others_come(own, chromium):
    study = own
    study.add(pair(0), pair(1))
    ann = study.person("Ann")
    answer(ann, tasks(ann)[0], {"choice": "left"}, "one")
    tab = Tab(chromium, study, study.links.review)
    tab.page.click("details >> summary")
    answer(ann, tasks(ann)[0], {"choice": "right"}, "two")
    sync_api.expect(tab.page.locator("details")).to_have_count(2)
    states = tab.page.locator("details").evaluate_all("all => all.map(one => one.open)")
    assert states == [False, True]
    sync_api.expect(tab.page.locator("details >> nth=1 >> summary")).to_be_focused()
    tab.context.close()
    assert tab.wrong == []


def test_the_review_says_that_the_order_shown_is_unknown(tmp_path, chromium):
    path = tmp_path / "labels.db"
    with Store.open(path) as store:
        store.take([Label("imported", pair(0), "Ann", Answer((2, 1)), (), 0.0, 0.0, 0)])
    with site(path) as study:
        study.add(pair(1))
        bob = study.person("Bob")
        answer(bob, tasks(bob)[0], {"choice": "left"}, "one")
        tab = Tab(chromium, study, study.links.review)
        sync_api.expect(tab.page.locator("details")).to_have_count(2)
        flags = [row.locator("i").all_inner_texts() for row in tab.page.locator("details").all()]
        assert flags == [[], ["order unknown"]]
        assert "·" in tab.page.locator("details time").first.inner_text()
        tab.see("details >> nth=1 >> time", "time unknown")
        tab.see("details >> nth=1 >> .verdict", "B > A")
        tab.page.click("details >> nth=1 >> summary")
        sync_api.expect(tab.page.locator(".full article .text")).to_have_text(["left 0", "right 0"])
        tab.context.close()
        assert tab.wrong == []


@pytest.mark.slow
def test_the_review_page_may_come_before_the_connection(own, chromium):
    tab = Tab(chromium, own, own.links.review, viewport={"width": 360, "height": 640})
    tab.page.clock.install()
    tab.page.route("**/api/**", lambda route: route.abort())
    tab.page.reload()
    tab.see("#problem", "No connection to the server; trying again.")
    tab.page.route("**/api/agreement", lambda route: None)  # the first figures take seconds, where much else is done
    tab.page.unroute("**/api/**")
    tab.page.clock.fast_forward(6000)
    tab.see("#headline", "0 answers from 0 people")
    tab.see("#problem", "")
    tab.page.fill("#link-name", "Ann")
    tab.page.click("#link button")
    sync_api.expect(tab.page.locator("#made")).to_contain_text("/join/")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    tab.context.close()
    assert tab.wrong == []


@pytest.mark.slow
def test_the_time_that_nobody_looks_does_not_count(study, people):
    study.add(pair(0))
    tab = people(study)
    tab.see(PROMPT, "prompt 0")
    tab.page.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    time.sleep(0.6)
    tab.page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    tab.keys("ArrowLeft")
    assert tab.answered(1)[0].ms < 600
