"""The page in a real browser: every task makes a picture, and what cannot be is one readable line.

One server and one browser serve all tests of this file. They need Chromium: `apt install chromium`,
or another one that UNIVG_CHROMIUM names.
"""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import requests
from PIL import Image

from data_pipelines.tasks import TASKS
from tests.serving.test_store import bomb, picture
from univg_jax.images import png_bytes
from univg_jax.serving.store import Store

CHROMIUM = os.environ.get("UNIVG_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium"),
]
SECONDS = 180  # until something is there; a busy machine compiles slowly
MILLISECONDS = SECONDS * 1000


@contextlib.contextmanager
def served(checkpoint, *flags):
    """`univg demo` in a process of its own, on one device; gives its address and the process."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment.pop("PYTEST_CURRENT_TEST", None)  # by which NiceGUI would listen for its own tests
    command = [sys.executable, "-m", "univg_jax", "demo", f"--checkpoint={checkpoint}"]
    process = subprocess.Popen(
        [*command, "--port=0", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = re.match(r"the page: (http://127\.0\.0\.1:\d+) ", process.stdout.readline())
        assert said, process.stderr.read()
        yield said[1], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(root):
    with served(root / "stage3") as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage"],  # as containers need it
        )
        yield browser
        browser.close()


def label(task):
    """What a task's button says."""
    return (task.aliases or (task.name,))[0].capitalize()


class Visitor:
    """A tab of the browser, and what a visitor does in it."""

    def __init__(self, browser, address, query="", width=1200):
        is_phone = width < 600
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, has_touch=is_phone, is_mobile=is_phone
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(MILLISECONDS)
        self.hosts, self.errors, self.address = set(), [], address
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url)[:2]))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open(query)

    def open(self, query):
        self.page.goto(f"{self.address}/{query}")
        self.page.locator(".chips .q-btn").first.wait_for()

    def choose(self, task):
        self.page.locator(".chips").get_by_text(task, exact=True).click()
        self.page.locator(f'.chips [aria-pressed="true"]:has-text("{task}")').wait_for()

    def upload(self, name, data):
        file = dict(name=name, mimeType="image/png", buffer=data)
        self.page.locator("input[type=file]").set_input_files(file)

    def upload_picture(self, pixels):
        """Sends a picture, and waits until it is shown."""
        self.upload("a.png", png_bytes(pixels))
        address = f"/file/{Store().add_picture(pixels)}"
        self.page.locator(f'.easel img[src="{address}"]').wait_for()

    def points(self, places):
        """Where on the screen places are that are given in fractions of the easel."""
        canvas = self.page.locator(".easel canvas")
        canvas.scroll_into_view_if_needed()
        area = canvas.bounding_box()
        return [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in places]

    def swipe(self, *places):
        """As `drag`, with a finger."""
        touch = self.context.new_cdp_session(self.page)
        for k, (x, y) in enumerate(self.points(places)):
            kind = "touchMove" if k else "touchStart"
            event = dict(type=kind, touchPoints=[dict(x=x, y=y)])
            touch.send("Input.dispatchTouchEvent", event)
        touch.send("Input.dispatchTouchEvent", dict(type="touchEnd", touchPoints=[]))

    def drag(self, *places):
        """Draws on the easel, from place to place, in fractions of it."""
        points = self.points(places)
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point, steps=5)
        self.page.mouse.up()

    def prompt(self, text):
        self.page.locator("textarea").fill(text)

    def make(self):
        """Asks for the picture."""
        self.page.get_by_role("button", name="Make the picture", exact=True).click()

    def made(self):
        """Asks for the picture, waits for it, and returns its card."""
        before = [self.page.locator("article").count(), self.line()]
        self.make()
        self.page.wait_for_function(
            "([count, line]) => document.querySelectorAll('article').length > count"
            " || !['', line].includes(document.querySelector('.error').innerText)",
            arg=before,
        )
        assert self.line() == ""
        card = self.page.locator("article").first
        card.locator("img.made").wait_for()
        return card

    def line(self):
        """What the page says is wrong."""
        return self.page.locator(".error").inner_text()

    def says(self, line):
        """Waits until it says that."""
        self.page.locator(".error").get_by_text(line).wait_for()

    def pixels(self, card, which="img.made"):
        source = card.locator(which).get_attribute("src")
        data = requests.get(self.address + source, timeout=SECONDS).content
        return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def visitor(chromium, address):
    visitor = Visitor(chromium, address)
    yield visitor
    # Of "data" and "blob" addresses there is no host.
    assert {host for _, host in visitor.hosts} <= {urlsplit(address).netloc, ""}
    assert visitor.errors == []


def test_text_makes_an_image(visitor):
    visitor.choose("Generate")
    visitor.prompt("a pig on grass")
    card = visitor.made()
    assert visitor.pixels(card).shape == (32, 32, 3)
    assert "a pig on grass" in card.inner_text()
    assert re.search(
        r"seed 0 · steps \d+ · solver euler · guidance 2\.5 · size 32 x 32", card.inner_text()
    )


def test_an_image_has_the_size_that_is_asked_for(visitor):
    visitor.choose("Generate")
    visitor.page.get_by_label("Width").fill("48")
    assert visitor.pixels(visitor.made()).shape == (32, 48, 3)


def test_an_instruction_edits_a_picture(visitor):
    visitor.choose("Edit")
    visitor.upload_picture(picture(40, 50))
    visitor.prompt("remove the pig")
    card = visitor.made()
    assert visitor.pixels(card).shape == (40, 50, 3)
    np.testing.assert_array_equal(visitor.pixels(card, 'img[alt="image"]'), picture(40, 50))


def test_what_is_painted_is_made_anew_and_the_rest_stays(visitor):
    visitor.choose("Inpaint")
    visitor.upload_picture(picture(40, 50, seed=1))
    visitor.drag((0.5, 0.5), (0.7, 0.5))
    visitor.page.wait_for_timeout(300)
    made = visitor.pixels(visitor.made())
    changed = (made != picture(40, 50, seed=1)).any(axis=-1)
    assert changed[20, 25:35].all()
    assert not changed[:10].any()
    assert not changed[:, :15].any()


def test_a_stroke_can_be_erased_and_all_of_them_cleared(visitor):
    visitor.choose("Inpaint")
    visitor.upload_picture(picture(32, 32, seed=2))
    visitor.drag((0.2, 0.5), (0.8, 0.5))
    visitor.page.get_by_text("Eraser").click()
    visitor.drag((0.5, 0.5), (1.0, 0.5))
    visitor.page.wait_for_timeout(300)
    changed = (visitor.pixels(visitor.made()) != picture(32, 32, seed=2)).any(axis=-1)
    assert changed[16, 8]
    assert not changed[16, 20:].any()
    visitor.page.get_by_role("button", name="Clear", exact=True).click()
    visitor.page.wait_for_timeout(300)
    visitor.make()
    visitor.says("Nothing is painted")


def test_a_picture_is_made_larger(visitor):
    visitor.choose("Inpaint")
    visitor.upload_picture(picture(40, 50, seed=3))
    visitor.page.get_by_text("Or make the picture larger").click()
    visitor.page.get_by_label("right").fill("20")
    made = visitor.pixels(visitor.made())
    assert made.shape == (40, 60, 3)
    np.testing.assert_array_equal(made[:, :50], picture(40, 50, seed=3))


def test_drawn_blocks_lay_out_an_image(visitor):
    visitor.choose("Layout")
    visitor.prompt("a pig and an apple on grass")
    visitor.drag((0.1, 0.5), (0.5, 0.9))
    visitor.page.get_by_label("what stands in the red block").fill("a pig")
    visitor.drag((0.6, 0.1), (0.9, 0.4))
    visitor.make()
    visitor.says("Say what stands in the blue block")
    visitor.page.get_by_label("what stands in the blue block").fill("an apple")
    card = visitor.made()
    canvas = visitor.pixels(card, 'img[alt="layout"]')
    assert canvas[24, 8].tolist() == [230, 25, 25]
    assert canvas[8, 24].tolist() == [30, 60, 230]
    assert canvas[2, 2].tolist() == [128] * 3
    assert visitor.pixels(card).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("task", "note", "suffix"),
    [
        ("Depth", r"from [\d.]+ m \(red\) to [\d.]+ m \(blue\)", ".npy"),
        ("Pose", r"\d+ of 17 joints found", ".json"),
    ],
)
def test_dense_tasks_show_what_they_found(visitor, task, note, suffix):
    visitor.choose(task)
    visitor.upload_picture(picture(40, 50, seed=4))
    card = visitor.made()
    assert re.search(note, card.inner_text())
    drawing = visitor.pixels(card, 'img[alt="answer"]')
    assert abs(drawing.shape[1] / drawing.shape[0] - 50 / 40) < 0.01
    answer = card.get_by_text("Save answer").get_attribute("href")
    assert answer.endswith(suffix)
    assert requests.get(visitor.address + answer, timeout=SECONDS).ok


def test_a_phrase_is_segmented(visitor):
    visitor.choose("Segment")
    visitor.upload_picture(picture(40, 50, seed=5))
    visitor.prompt("the pig")
    card = visitor.made()
    share = int(re.search(r"(\d+)% of the picture", card.inner_text())[1])
    answer = card.get_by_text("Save answer").get_attribute("href")
    data = requests.get(visitor.address + answer, timeout=SECONDS).content
    mask = np.asarray(Image.open(io.BytesIO(data)))
    assert mask.shape == (40, 50)
    assert abs(100 * (mask == 255).mean() - share) <= 0.5


def test_a_face_becomes_a_picture_of_the_person(visitor):
    visitor.choose("Identity")
    visitor.upload_picture(picture(32, 32, seed=6))
    visitor.prompt("a portrait")
    visitor.make()
    visitor.says("has no <p>")
    visitor.prompt("a portrait of <p> smiling")
    card = visitor.made()
    np.testing.assert_array_equal(visitor.pixels(card, 'img[alt="face"]'), picture(32, 32, seed=6))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_an_example_of_each_task_works_at_once(visitor, task):
    visitor.choose(label(task))
    assert visitor.page.locator(".example").count() >= 2
    visitor.page.locator(".example").nth(1).click()
    visitor.made()


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("notes.png", b"Dear diary", "notes.png is not a readable image: none of PNG"),
        ("bomb.png", bomb(), "taken for a decompression bomb"),
        ("dot.png", png_bytes(picture(1, 1)), "dot.png has 1 x 1 pixels: expected at least 8 x 8"),
    ],
)
def test_a_bad_upload_is_a_line_and_the_next_one_is_fine(visitor, name, data, line):
    visitor.choose("Edit")
    visitor.upload(name, data)
    visitor.says(line)
    visitor.upload_picture(np.random.default_rng().integers(0, 256, (32, 32, 3), np.uint8))
    assert visitor.line() == ""


def test_what_is_missing_is_one_line(chromium, address):
    visitor = Visitor(chromium, address)
    for task, line in {
        "Generate": "task 't2i' needs a prompt",
        "Edit": "Choose a picture first",
        "Inpaint": "Choose a picture first",
        "Layout": "No block is drawn",
        "Identity": "Choose a picture of the person first",
    }.items():
        visitor.choose(task)
        visitor.make()
        visitor.says(line)
    visitor.context.close()


def test_a_made_picture_becomes_the_input_and_its_settings_come_back(visitor):
    visitor.choose("Generate")
    visitor.prompt("an apple on sand")
    card = visitor.made()
    source = card.locator("img.made").get_attribute("src")
    for task in ("Edit", "Inpaint"):  # from another task, and from one that takes a picture
        card.get_by_text("Use as input").click()
        visitor.page.locator(f'.easel img[src="{source}"]').wait_for()
        assert visitor.page.locator('.chips [aria-pressed="true"]').inner_text() != "Generate"
        visitor.choose(task)
        visitor.upload_picture(picture(32, 32, seed=8))
    card.get_by_text("Reuse").click()
    visitor.page.locator('.chips [aria-pressed="true"]:has-text("Generate")').wait_for()
    assert visitor.page.locator("textarea").input_value() == "an apple on sand"


def test_a_link_restores_the_settings_and_makes_the_same_picture(visitor, chromium):
    visitor.choose("Inpaint")
    visitor.upload_picture(picture(32, 32, seed=7))
    visitor.drag((0.3, 0.3), (0.6, 0.6))
    visitor.prompt("a pig & <grass>")
    visitor.page.get_by_label("Seed", exact=True).fill("7")
    visitor.page.wait_for_timeout(300)
    card = visitor.made()
    source, link = (
        card.locator("img.made").get_attribute("src"),
        card.get_by_text("Link", exact=True),
    )
    query = urlsplit(link.get_attribute("href")).query
    assert dict(parse_qsl(query))["seed"] == "7"
    visitor.page.wait_for_url(f"**/?{query}")
    other = Visitor(chromium, visitor.address, f"?{query}")
    assert other.page.locator("textarea").input_value() == "a pig & <grass>"
    assert other.page.get_by_label("Seed", exact=True).input_value() == "7"
    assert other.made().locator("img.made").get_attribute("src") == source
    other.open("?task=ie&prompt=snow&image=0123.png")
    other.says("A picture of this form is not here any more: choose it again")
    assert other.page.locator("textarea").input_value() == "snow"
    other.open("?task=ie&stepps=3")
    other.says("did you mean 'steps'?")
    other.context.close()


def test_progress_is_shown_and_can_be_stopped(visitor):
    visitor.choose("Generate")
    visitor.prompt("a pig")
    visitor.page.get_by_label("Steps").last.fill("200")
    for _ in range(5):  # on a fast machine the picture may be made before the click arrives
        count = visitor.page.locator("article").count()
        visitor.make()
        visitor.page.wait_for_function(
            "() => /Step [0-9]+ of 200/.test(document.querySelector('.form').innerText)"
            " && (document.querySelectorAll('.go button')[1].click(), true)"
        )
        visitor.page.get_by_role("button", name="Stop", exact=True).wait_for(state="hidden")
        if visitor.page.locator("article").count() == count:
            break
    else:
        pytest.fail("none of five pictures was stopped")
    visitor.page.get_by_label("Steps").last.fill("2")
    visitor.made()


def test_it_fits_a_phone(chromium, address):
    phone = Visitor(chromium, address, width=390)
    for task in TASKS.values():
        phone.choose(label(task))
        phone.page.locator(".example").first.click()
        phone.page.wait_for_load_state("networkidle")
        outside = phone.page.evaluate(
            "[...document.querySelectorAll('.page *')].filter(element => {"
            " const area = element.getBoundingClientRect();"
            " return area.width && (area.left < 0 || area.right > 390); }).map(e => e.outerHTML)"
        )
        assert outside == []
    phone.context.close()


def test_a_phone_shows_the_line_of_an_upload(chromium, address):
    from playwright.sync_api import expect

    phone = Visitor(chromium, address, "?task=ip", width=390)
    phone.upload_picture(picture(40, 30))  # so that the line is below what the screen shows
    expect(phone.page.get_by_text("Make the picture", exact=True)).not_to_be_in_viewport()
    phone.upload("notes.png", b"Dear diary")
    expect(phone.page.locator(".error")).to_be_in_viewport(timeout=MILLISECONDS)
    phone.context.close()


def test_a_finger_paints_and_does_not_scroll(chromium, address):
    phone = Visitor(chromium, address, "?task=ip", width=390)
    phone.upload_picture(picture(32, 32, seed=9))
    before = phone.points([(0, 0)])
    phone.swipe((0.5, 0.2), (0.5, 0.5), (0.5, 0.8))
    phone.page.wait_for_timeout(300)
    assert phone.points([(0, 0)]) == before
    changed = (phone.pixels(phone.made()) != picture(32, 32, seed=9)).any(axis=-1)
    assert changed[8:24, 16].all()
    assert not changed[:, :8].any()
    phone.context.close()


def test_only_tasks_of_the_model_are_shown_and_the_end_is_quiet(root, chromium):
    with served(root / "stage1") as (address, process):
        visitor = Visitor(chromium, address)
        assert visitor.page.locator(".chips").inner_text().split() == ["Generate"]
        visitor.open("?task=depth")
        visitor.says("unknown task of this model")
        visitor.context.close()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 130
        assert "Traceback" not in said
