"""A screenshot of `univg demo`, with an example of some tasks: docs/images/demo.png.

    python -m tools.page_picture runs/quickstart/stage3

It needs Chromium, as tests/serving/test_page.py does.
"""

import pathlib
import sys

from playwright.sync_api import sync_playwright

from tests.serving.test_page import CHROMIUM, Visitor, served

FILE = pathlib.Path(__file__).parents[1] / "docs" / "images" / "demo.png"
TASKS = ("Segment", "Pose", "Inpaint", "Layout")  # the last one is seen first


def main(checkpoint: str) -> None:
    """Makes an example of each task, and takes a picture of the page."""
    with served(checkpoint) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        visitor = Visitor(browser, address)
        for task in TASKS:
            visitor.choose(task)
            visitor.page.locator(".example").first.click()
            visitor.made()
        visitor.page.evaluate("scrollTo(0, 0)")
        visitor.page.screenshot(path=FILE)


if __name__ == "__main__":
    main(*sys.argv[1:])
