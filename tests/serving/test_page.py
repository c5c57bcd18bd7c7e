"""The page without a browser: what is served at `/`, and the conversation behind it against the API's own answers."""

import asyncio
import base64
import http.client
import io
import json
import re
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image
from llavamed_jax.serving import page_door, page_images, page_talk
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.limits import DEFAULTS, Limits
from llavamed_jax.serving.page_feedback import Feedback
from llavamed_jax.serving.page_images import Choice
from llavamed_jax.serving.page_talk import Settings, Talks
from llavamed_jax.serving.service import Service
from tests.support.server import MOST, data_url, picture, running

GREEDY = Settings(0.0, MOST)


@pytest.fixture
def talks(server):
    return Talks(server.service)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "scan.png"
    path.write_bytes(picture(5))
    return str(path)


async def collect(views):
    return [json.loads(json.dumps(view)) async for view in views]


def asked(talks, *args, session="s", **more):
    return asyncio.run(collect(talks.ask(session, *args, **more)))


def post(server, messages, **more):
    body = json.dumps({"messages": messages, "max_tokens": MOST, "temperature": 0.0, **more}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/chat/completions", body, {"Content-Type": "application/json"}), timeout=120) as response:
        return json.load(response)["choices"][0]


def image(data):
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def texts(views):
    return [view["exchanges"][-1]["answer"] for view in views if view["exchanges"] and view["exchanges"][-1]["answer"]]


def test_answers_grow_and_equal_those_of_the_api(server, talks, photo):
    first = asked(talks, "What is shown?", [photo], GREEDY)
    said = texts(first)
    assert first[0]["busy"] and not first[-1]["busy"] and not first[-1]["alert"] and said
    assert all(longer.startswith(shorter) for shorter, longer in zip(said, said[1:]))
    content = [image(picture(5)), {"type": "text", "text": "What is shown?"}]
    wanted = post(server, [{"role": "user", "content": content}])
    assert said[-1] == wanted["message"]["content"] and first[-1]["exchanges"][0]["end"] == wanted["finish_reason"]
    second = asked(talks, "Sure?", [], GREEDY, shown=1)
    wanted = post(server, [{"role": "user", "content": content}, {"role": "assistant", "content": said[-1]},
                           {"role": "user", "content": "Sure?"}])["message"]["content"]
    assert texts(second)[-1] == wanted and len(second[-1]["exchanges"]) == 2
    # Regenerating gives the greedy answer again; editing the first question forgets the second one and keeps the image.
    again = asyncio.run(collect(talks.again("s", 1, None, GREEDY)))
    assert texts(again)[-1] == wanted and len(again[-1]["exchanges"]) == 2
    edited = asyncio.run(collect(talks.again("s", 0, "Where?", GREEDY)))
    wanted = post(server, [{"role": "user", "content": [content[0], {"type": "text", "text": "Where?"}]}])
    assert texts(edited)[-1] == wanted["message"]["content"] and len(edited[-1]["exchanges"]) == 1
    assert edited[-1]["exchanges"][0]["text"] == "Where?" and edited[-1]["exchanges"][0]["pictures"]
    assert talks.clear("s")["exchanges"] == [] and talks.of("s").exchanges == []


def test_stopping_keeps_the_words_and_frees_the_row(server, talks, monkeypatch):
    monkeypatch.setattr(page_talk, "_PAUSE_S", 0.0)  # every piece is seen

    async def stop_after(count):
        views = []
        async for view in talks.ask("t", "What is shown?", [], Settings(0.0, 400)):
            views.append(json.loads(json.dumps(view)))
            if len(texts(views)) == count:
                talks.stop("t")
        return views

    views = asyncio.run(stop_after(1))
    assert views[-1]["exchanges"][0]["end"] == "stopped" and views[-1]["exchanges"][0]["answer"] and not views[-1]["busy"]
    server.until(lambda service: service.scheduler.rows == 0 and service.under_way == 0)
    assert not talks.of("t").refused and len(views[-1]["exchanges"][0]["answer"]) < 2000

    async def leave():  # as if the tab were closed
        views = talks.ask("t", "And now?", [], Settings(0.0, 400), shown=1)
        async for view in views:
            if view["exchanges"][-1]["answer"]:
                break
        await views.aclose()

    asyncio.run(leave())
    server.until(lambda service: service.scheduler.rows == 0 and service.under_way == 0)


def test_errors_are_shown_and_the_question_is_given_back(talks, tmp_path):
    broken, gone = tmp_path / "broken.png", tmp_path / "gone.png"
    broken.write_bytes(b"no image")
    long = "word " * 2000
    for text, files, shown, words in (
            ("", [], 0, "question is empty"), ("Hm?", [], 2, "no longer has this conversation"), ("Hm?", [str(broken)], 0, "broken.png"),
            ("Hm?", [str(gone)], 0, "no longer on the server"), (long, [], 0, "maximum context length")):
        views = asked(talks, text, files, GREEDY, shown=shown)
        assert words in views[-1]["alert"] and views[-1]["alert"].endswith(".") and views[-1]["exchanges"] == []
        assert talks.of("s").refused and not views[-1]["busy"]
    asked(talks, "Hm?", [], GREEDY)
    kept = talks.of("s").exchanges[0].answer
    views = asyncio.run(collect(talks.again("s", 0, long, GREEDY)))  # refused: the old question and answer stay
    assert "maximum context length" in views[-1]["alert"]
    assert views[-1]["exchanges"][0]["text"] == "Hm?" and views[-1]["exchanges"][0]["answer"] == kept
    views = asyncio.run(collect(talks.again("s", 7)))
    assert "no longer has this conversation" in views[-1]["alert"]


def test_the_servers_limits_hold_on_the_page(model, photo):
    with running(None, Limits(max_images=1, max_image_bytes=4096, max_image_pixels=700, max_body_bytes=6000)) as server:
        talks = Talks(server.service)
        (loading,) = asked(talks, "Hm?", [])[1:]
        assert "the model is not loaded yet" in loading["alert"].lower()
        server.service.serve(model)
        try:
            for data, count, words in ((picture(1), 2, "at most 1 were expected"), (b"\0" * 5000, 1, "too many bytes"),
                                       (b"P6 100 100 255\n" + b"\0" * 30000, 1, "too many bytes"), (ppm(30, 30), 1, "30 x 30 pixels"),
                                       (ppm(26, 26), 3, "at most 6000 were expected")):
                with open(photo, "wb") as file:
                    file.write(data)
                assert words in asked(talks, "Hm?", [photo] * count)[-1]["alert"]
        finally:
            server.service.scheduler.close(5)


def ppm(width, height):
    return b"P6 %d %d 255\n" % (width, height) + b"\x40" * (3 * width * height)


def test_ratings_are_lines_without_words_unless_asked_for(server, tmp_path):
    for has_content in (False, True):
        path = tmp_path / f"{has_content}.jsonl"
        talks = Talks(server.service, Feedback(str(path), has_content))
        answer = texts(asked(talks, "What is a secret?", [], GREEDY))[-1]
        assert talks.rate("s", 0, "like")["exchanges"][0]["rating"] == "like"
        assert talks.rate("s", 0, "")["exchanges"][0]["rating"] == ""
        for index, rating in ((3, "like"), (0, "both")):
            talks.rate("s", index, rating)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [(line["rating"], line["turn"], line["model"]) for line in lines] == [("like", 0, "served"), (None, 0, "served")]
        assert lines[0]["request"] == talks.of("s").exchanges[0].request_id and lines[0]["request"] in server.lines.getvalue()
        assert ("secret" in path.read_text(encoding="utf-8")) is has_content
        if has_content:
            content = lines[0]["content"]
            assert content["messages"] == [{"role": "user", "content": [{"type": "text", "text": "What is a secret?"}]}] and content["answer"] == answer
        assert path.stat().st_mode & 0o077 == 0
        path.unlink()
        path.mkdir()
        assert "could not be written" in talks.rate("s", 0, "dislike")["alert"]
    with pytest.raises(UserError, match="cannot be written"):
        Feedback(str(tmp_path))


def dicom(frames=3, modality="CT", photometric="MONOCHROME2"):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.CTImageStorage, "1.2.3")
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values = np.random.default_rng(0).integers(0, 2000, (frames, 12, 16), dtype=np.uint16)
    ds.Rows, ds.Columns, ds.NumberOfFrames, ds.SamplesPerPixel = 12, 16, frames, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PhotometricInterpretation, ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = photometric, modality, 1, -1000
    ds.WindowCenter, ds.WindowWidth, ds.WindowCenterWidthExplanation = [40, -600], [400, 1500], ["SOFT <b>", "LUNG"]
    ds.PixelData = values.tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue(), values.astype(float) - 1000


def pixels(one):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one.url.partition(",")[2]))))


def test_dicom_has_the_frame_and_window_that_were_chosen(server, talks, tmp_path):
    data, values = dicom()
    path = tmp_path / "scan.dcm"
    path.write_bytes(data)
    plain = page_images.picture(str(path), DEFAULTS)
    assert np.array_equal(pixels(plain), np.asarray(load_image(data))[..., 0])  # what the API makes of the same bytes
    for frame, center, width in ((1, -600.0, 1500.0), (3, 40.0, 80.0), (2, 0.5, 0.5)):
        found = pixels(page_images.picture(str(path), DEFAULTS, Choice(frame, (center, width))))
        exact = (values[frame - 1] - (center - 0.5)) / (width - 1) + 0.5 if width >= 1 else (values[frame - 1] - center) / width + 0.5
        assert np.array_equal(found, np.rint(np.clip(exact, 0, 1) * 255).astype(np.uint8))
    described = page_images.choices(str(path), DEFAULTS)
    assert (described.frames, described.is_grey, described.modality) == (3, True, "CT")
    names = page_images.windows(described)
    assert list(names.values())[:3] == [None, (40.0, 400.0), (-600.0, 1500.0)] and "LUNG (-600 / 1500)" in names and "CT brain (40 / 80)" in names
    path.write_bytes(dicom(modality="MR")[0])
    assert not any(name.startswith("CT") for name in page_images.windows(page_images.choices(str(path), DEFAULTS)))
    for choice, words in ((Choice(4), "no frame 4"), (Choice(1, (0.0, -1.0)), "width above 0")):
        with pytest.raises(ApiError, match=words):
            page_images.picture(str(path), DEFAULTS, choice)
    with pytest.raises(ApiError, match="16 x 12 pixels"):
        page_images.picture(str(path), Limits(max_image_pixels=100))
    old = tmp_path / "old.dcm"  # without a preamble, so that only the suffix says what it is
    old.write_bytes(data[132:])
    assert page_images.picture(str(old), DEFAULTS).url == plain.url and page_images.choices(str(old), DEFAULTS).frames == 3


def test_the_model_gets_the_chosen_frame(server, talks, tmp_path):
    data, _ = dicom()
    path = tmp_path / "scan.dcm"
    path.write_bytes(data)
    talks.of("s").choices[str(path)] = Choice(2, (-600.0, 1500.0))
    answer = texts(asked(talks, "What is shown?", [str(path)], GREEDY))[-1]
    from llavamed_jax.images.dicom import read_dicom

    file = io.BytesIO()
    read_dicom(io.BytesIO(data), "it", 2, (-600.0, 1500.0)).convert("RGB").save(file, "PNG")
    wanted = post(server, [{"role": "user", "content": [image(file.getvalue()), {"type": "text", "text": "What is shown?"}]}])
    assert answer == wanted["message"]["content"]
    assert talks.of("s").view()["exchanges"][0]["pictures"][0]["name"] == "scan.dcm, frame 2"


# ---- what Gradio serves


@pytest.fixture(scope="module")
def paged(model):
    pytest.importorskip("gradio", reason="gradio, of the extra [serve], is not installed")
    from llavamed_jax.serving import page

    with running(None, page=page.mounting()) as server:
        yield server


def get(server, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers, data


def test_the_page_is_served_while_the_model_loads_and_names_no_other_machine(paged):
    status, headers, body = get(paged, "/")
    assert status == 200 and b"For research use only, never for clinical decisions" in body and b"served" in body
    assert "connect-src 'self'" in headers["content-security-policy"]
    css = get(paged, "/theme.css")[2]
    for text in (body.decode(), css.decode()):
        found = {address for address in re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}\b", text) if not address.endswith("www.w3.org")}
        assert not found
    assert b'"footer_links":[]' in body.replace(b" ", b"") and b'"analytics_enabled":false' in body.replace(b" ", b"")
    assert get(paged, "/health")[0] == 503 and json.loads(get(paged, "/v1/nothing")[2])["error"]["type"] == "not_found_error"


def test_only_what_the_page_needs_is_reachable(paged):
    for path in ("/gradio_api/info", "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/run/ask", "/gradio_api/call/ask", "/monitoring", "/login",
                 "/gradio_api/runs", "/docs", "/gradio_api/openapi.json"):
        for method in ("GET", "POST"):
            status, _, body = get(paged, path, method, b"{}" if method == "POST" else None)
            assert status in (404, 405) and "error" in json.loads(body), path
    join = "/gradio_api/queue/join"
    assert get(paged, join, "POST", b"{}", Origin="http://evil.example")[0] == 403
    assert get(paged, join, "POST", None, **{"Content-Length": str(2**30)})[0] == 413
    assert get(paged, "/gradio_api/file=/etc/passwd")[0] in (403, 404)
    assert get(paged, "/gradio_api/file=http://169.254.169.254/")[0] in (400, 403, 404)


def test_a_server_with_keys_asks_for_one(model):
    pytest.importorskip("gradio", reason="gradio, of the extra [serve], is not installed")
    from llavamed_jax.serving import page

    with running(None, page=page.mounting(), keys={"ann": "sesame"}) as server:
        status, _, body = get(server, "/")
        assert status == 401 and b"API key" in body and b"never for clinical decisions" in body and b"gradio" not in body
        for path, method in (("/gradio_api/upload", "POST"), ("/gradio_api/queue/join", "POST"), ("/config", "GET"), ("/assets/a.js", "GET")):
            assert get(server, path, method, b"" if method == "POST" else None)[0] == 401, path
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for key in (b"key=sesam", b"", b"key=" + b"x" * 5000, b"key=%00%ff"):
            status, headers, body = get(server, "/key", "POST", key, **form)
            assert status in (401, 413) and "set-cookie" not in headers
        status, headers, _ = get(server, "/key", "POST", b"key=sesame", **form)
        cookie = headers["set-cookie"].split(";")[0]
        assert status == 303 and "HttpOnly" in headers["set-cookie"] and "SameSite=strict" in headers["set-cookie"] and "sesame" not in cookie
        assert get(server, "/", Cookie=cookie)[0] == 200 and get(server, "/", Cookie=cookie + "x")[0] == 401
        assert get(server, "/v1/models", Cookie=cookie)[0] == 401  # the cookie is the page's alone


def test_words_are_never_read_as_html():
    """Names and words that the layout itself writes are escaped, and the script only makes text nodes of the others."""
    from llavamed_jax.serving import page_dicom

    assert page_dicom._words("<b>") == "<p>&lt;b&gt;</p>"
    script = (page_door.__file__.removesuffix("page_door.py") + "page.js")
    with open(script, encoding="utf-8") as file:
        source = file.read()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|srcdoc", source.replace("evaluates", ""))


def test_a_models_name_is_escaped():
    pytest.importorskip("gradio", reason="gradio, of the extra [serve], is not installed")
    import gradio

    from llavamed_jax.serving import page

    blocks = page._blocks(gradio, Talks(Service(["<i>name"])), None, [])
    (head,) = [block for block in blocks.blocks.values() if getattr(block, "elem_id", "") == "head"]
    assert "&lt;i&gt;name" in head.value and "<i>" not in head.value


def test_addresses_of_other_machines_are_removed():
    html = b'<meta property="og:image" content="https://raw.x.com/a" />\n<link rel="manifest" href="/m" /><p>https://a.example/b http://www.w3.org/2000/svg</p>'
    assert page_door.without_addresses(html) == b"<p>about:blank#/b http://www.w3.org/2000/svg</p>"
