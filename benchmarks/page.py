"""Drives the server's page in headless Chromium, from upload to streamed answer, stop, second turn and DICOM.

    pip install playwright
    python benchmarks/page.py --url http://127.0.0.1:8000 --out runs/page [--chromium /usr/bin/chromium]

The server runs already (`python serve.py --checkpoint PATH --feedback FILE`). The browser resolves no address but
127.0.0.1, and every request is noted. Each step is printed with its seconds; screenshots of a wide and a narrow window,
light and dark, lie in --out. Exits 1 if a step fails, if a request names another machine, or if a script fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llavamed_jax.utils.paths import local

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "samples" / "vqa_rad" / "images"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HTML = "Is <b>this</b> <img src=x onerror=\"document.title='owned'\"> normal? <script>document.title='owned'</script>"
BUSY = "document.querySelector('#talk .log').getAttribute('aria-busy') === '%s'"


def dicom(frames: int = 4) -> bytes:
    """Makes a CT-like DICOM file of several frames: a bright ball in water, of another size in each frame."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.CTImageStorage, "1.2.3")
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    y, x = np.mgrid[:256, :256] - 128
    radius = np.hypot(x, y)
    values = np.stack([np.where(radius < 15 * (n + 1), 1300, np.where(radius < 100, 1040, 0)) for n in range(frames)])
    ds.Rows, ds.Columns, ds.NumberOfFrames, ds.SamplesPerPixel = 256, 256, frames, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PhotometricInterpretation, ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "MONOCHROME2", "CT", 1, -1000
    ds.WindowCenter, ds.WindowWidth, ds.WindowCenterWidthExplanation = [40, -600], [400, 1500], ["SOFT TISSUE", "LUNG"]
    ds.PixelData = values.astype(np.uint16).tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


class Drive:
    """A page under test: its steps, and what its browser asked for."""

    def __init__(self, page, out: Path):
        self.page, self.out = page, out
        self.wrong: list[str] = []
        self.requests = 0
        page.on("request", self._asked)
        page.on("requestfailed", self._failed)
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("console", lambda message: message.type == "error" and "status of 4" not in message.text and self.wrong.append(f"console: {message.text[:300]}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _asked(self, request) -> None:
        self.requests += 1
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.wrong.append(f"a request to another machine: {request.url[:200]}")

    def _failed(self, request) -> None:
        # Gradio's client closes its own stream of events when an answer is complete.
        if not ("/gradio_api/queue/data" in request.url and "ABORTED" in str(request.failure)):
            self.wrong.append(f"failed: {request.url[:200]}: {request.failure}")

    @contextlib.contextmanager
    def step(self, words: str):
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            self.wrong.append(f"{words}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            with contextlib.suppress(Exception):
                self.shot(f"failed_{len(self.wrong)}")
        print(f"{time.monotonic() - start:8.1f} s  {words}", flush=True)

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.out / f"{name}.png")

    def add(self, *files) -> None:
        before = self.page.locator("#question .thumbnail-item").count()
        self.page.set_input_files("#question input[type=file]", list(files))
        self.page.wait_for_function(f"document.querySelectorAll('#question .thumbnail-item').length === {before + len(files)}")

    def ask(self, text: str, count: int) -> None:
        """Asks as a person does, and waits for the beginning of the answer."""
        area = self.page.locator("#question textarea")
        area.fill(text)
        area.press("Enter")
        self.page.wait_for_function(f"document.querySelectorAll('#talk .exchange').length === {count} && " + BUSY % "true")

    def words(self, count: int = 1) -> None:
        self.page.wait_for_function(f"[...document.querySelectorAll('#talk .answer')].pop().textContent.length >= {count}")

    def ended(self) -> None:
        self.page.wait_for_function(BUSY % "false")

    def answer(self) -> str:
        return self.page.locator("#talk .answer").last.text_content()


def check(condition, words: str) -> None:
    if not condition:
        raise AssertionError(words)


def drive(it: Drive, url: str) -> None:
    """The steps."""
    page = it.page
    with it.step("the page is there"):
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_selector("#talk .welcome")
        page.wait_for_selector("#question textarea")
    with it.step("the model is ready"):
        page.wait_for_function("document.querySelector('#head .state').textContent === 'ready'")
        page.wait_for_timeout(1000)
        it.shot("welcome_wide_light")
    with it.step("an image is uploaded, and the answer grows"):
        it.add(IMAGES / "synpic31394.jpg")
        it.ask("What is the pathology seen in this image?", 1)
        it.words()
        first = it.answer()
        it.words(len(first) + 8)
        it.shot("growing_wide_light")
        it.ended()
        check(it.answer().startswith(first), "the answer did not grow")
    with it.step("a second turn is stopped by the button, and keeps its words"):
        it.ask("Describe every region of the image in detail.", 2)
        it.words(8)
        page.locator("#question .stop-button").click()
        it.ended()
        check("Stopped." in page.locator("#talk .exchange").last.inner_text() and it.answer(), "nothing says that it was stopped")
    with it.step("temperature and length stand behind a fold"):
        page.get_by_role("button", name="Settings").click()
        length = page.get_by_label("number input for Longest answer, in tokens")
        length.fill("64")
        length.press("Tab")
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Settings").click()
    with it.step("the answer is generated again, and the question edited by keyboard"):
        page.locator("#talk .exchange").last.get_by_text("Regenerate").click()
        page.wait_for_function(BUSY % "true")
        it.ended()
        page.locator("#talk .asked .tools button").last.focus()
        page.keyboard.press("Enter")
        page.locator("#talk textarea.edit").fill("Is the heart enlarged?")
        page.locator("#talk textarea.edit").press("Enter")
        page.wait_for_function(BUSY % "true")
        it.ended()
        check(page.locator("#talk .question").last.text_content() == "Is the heart enlarged?", "the question was not edited")
        it.shot("turns_wide_light")
    with it.step("HTML in a question is shown and not executed"):
        it.ask(HTML, 3)
        it.ended()
        check(page.locator("#talk .question").last.text_content() == HTML and page.title() != "owned", "HTML was executed or lost")
        check(page.locator("#talk .question img, #talk .question b, #talk .answer img").count() == 0, "HTML became elements")
    with it.step("a file that is no image is an error in words, and the question stays"):
        page.set_input_files("#question input[type=file]", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
        page.wait_for_selector("#talk .alert:not([hidden])")
        page.locator("#question textarea").fill("What is this?")
        page.locator("#question textarea").press("Enter")
        page.wait_for_timeout(3000)
        check("notes.txt" in page.locator("#talk .alert").text_content(), "the alert does not name the file")
        check(page.locator("#question textarea").input_value() == "What is this?", "the question is lost")
        it.shot("error_wide_light")
        page.locator("#question .delete-button").first.click()
        page.locator("#question textarea").fill("")
    with it.step("a DICOM file has frames and windows"):
        page.locator("#head .fresh").click()
        page.wait_for_selector("#talk .welcome:not([hidden])")
        path = it.out / "phantom.dcm"
        path.write_bytes(dicom())
        it.add(path)
        page.wait_for_selector("#panel .preview img")
        before = page.locator("#panel .preview img").get_attribute("src")
        frame = page.locator("#panel input[type=number]").first
        frame.fill("3")
        frame.press("Tab")
        page.wait_for_function("before => document.querySelector('#panel .preview img').src !== before", arg=before)
        before = page.locator("#panel .preview img").get_attribute("src")
        page.get_by_label("Window (centre / width)").click()
        page.get_by_role("option", name="CT bone").click()
        page.wait_for_function("before => document.querySelector('#panel .preview img').src !== before", arg=before)
        it.shot("dicom_wide_light")
        it.ask("What is shown?", 1)
        it.ended()
        check("frame 3" in page.locator("#talk .pictures img").get_attribute("alt"), "another frame was sent")
    with it.step("several images, narrow and dark"):
        page.set_viewport_size(NARROW)
        it.add(IMAGES / "synpic42951.jpg", IMAGES / "synpic23648.jpg")
        it.ask("Which of the two is a head?", 2)
        it.ended()
        page.wait_for_timeout(500)
        it.shot("turns_narrow_light")
        check(page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"], "the page is wider than the window")
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(500)
        it.shot("turns_narrow_dark")
        for place in ("0", "document.documentElement.scrollHeight"):
            page.evaluate(f"scrollTo(0, {place})")
            box = page.locator("#head .notice").bounding_box()
            check(0 <= box["y"] < NARROW["height"] - box["height"], "the notice is out of view")
        page.set_viewport_size(WIDE)
        page.wait_for_timeout(500)
        it.shot("turns_wide_dark")
    with it.step("the keyboard reaches everything, in the order of the page"):
        page.locator("#head .fresh").focus()
        seen = []
        for _ in range(24):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("(e => e.getAttribute('aria-label') || e.placeholder || e.textContent.trim().slice(0, 40) || e.tagName)"
                                      "(document.activeElement)"))
        print("           ", " > ".join(seen))
        check(any("question" in name.lower() for name in seen) and any("Settings" in name for name in seen), "the box or the settings are not reached")
        page.locator("#head .fresh").click()
        page.wait_for_selector("#talk .welcome:not([hidden])")
        page.set_viewport_size(NARROW)
        page.wait_for_timeout(500)
        it.shot("welcome_narrow_dark")


def main() -> int:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", default="runs/page", type=local)
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser's program")
    parser.add_argument("--timeout", default=300.0, type=float, help="seconds for each wait")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    blocked = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", blocked], timeout=1e3 * args.timeout)
        page = browser.new_context(viewport=WIDE, color_scheme="light").new_page()
        page.set_default_timeout(1e3 * args.timeout)
        it = Drive(page, args.out)
        drive(it, args.url)
        browser.close()
    print(f"{it.requests} requests, all to 127.0.0.1" if not it.wrong else "\n".join(it.wrong))
    return bool(it.wrong)


if __name__ == "__main__":
    sys.exit(main())
