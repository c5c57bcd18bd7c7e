"""The page at `/`: a Gradio layout around the conversations of `page_talk`.

Gradio brings uploads, controls and the transport; `page.js` draws the conversation. Tried with gradio 6.31.
"""

# No annotations from the future: Gradio reads those of handlers, which name a module that is imported late.

import atexit
import contextlib
import html
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from llavamed_jax.errors import UserError
from llavamed_jax.serving import page_images
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.page_dicom import DicomPanel
from llavamed_jax.serving.page_door import Door
from llavamed_jax.serving.page_feedback import Feedback
from llavamed_jax.serving.page_keys import Keys
from llavamed_jax.serving.page_talk import Settings, Talk, Talks
from llavamed_jax.serving.service import Service

NOTICE = "For research use only, never for clinical decisions."
MOST_TOKENS = 4096
_HERE = Path(__file__).resolve().parent
_SAMPLE = _HERE.parents[1] / "samples" / "vqa_rad" / "images"
_EXAMPLES = {  # of images that no training stage of the sample sees, with VQA-RAD's own questions
    "synpic31394.jpg": "What is the pathology seen in this image?",
    "synpic42951.jpg": "What is the condition seen in this image?",
    "synpic23648.jpg": "How would you describe the liver?",
    "synpic17738.jpg": "Where is the abnormal mass located with respect to the lungs?",
}
_UPLOADS_S = (300, 3600)  # how often old uploads are removed, and at which age
_HEAD = """<div class="bar"><h1>LLaVA-Med JAX</h1><span class="model">{model}</span>
<span class="state" role="status">…</span>
<button type="button" class="quiet fresh" hidden>New conversation</button></div>
<p class="notice" role="note">{notice}</p>"""
_TALK = """<div class="welcome"><h2>Ask about an image</h2><p>Add one or more images (DICOM too), or ask in words
alone.</p><div class="cards"></div></div><div class="log" role="log" aria-live="polite" aria-label="Conversation"></div>
<div class="alert" role="alert" hidden></div>"""


def check_installed() -> None:
    """Raises UserError if Gradio is not installed."""
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio, which the page needs, is not installed: pip install 'llavamed-jax[serve]', or add "
                        "--no_page")


def mounting(feedback: Feedback | None = None) -> Callable[[FastAPI, Service], FastAPI]:
    """Returns the function that `app.create` takes, which mounts the page at `/`."""
    def mount(app: FastAPI, service: Service) -> FastAPI:
        folder = tempfile.mkdtemp(prefix="llavamed-page-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        # Gradio reads both when its components are made; without the first it reports every start to its makers.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        import gradio

        keys = Keys(service, NOTICE)
        blocks = _blocks(gradio, Talks(service, feedback), keys, _examples(folder, service.limits))
        gradio.mount_gradio_app(app, blocks, "/",
                                footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
                                enable_monitoring=False, max_file_size=service.limits.max_image_bytes,
                                css_paths=[_HERE / "page.css"], theme=_theme(gradio), show_error=False)
        mounted = app.router.routes[-1]
        mounted.app = Door(mounted.app, service.limits, keys, folder, service.hosts)
        return app

    return mount


def _theme(gradio):
    fonts = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    return gradio.themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts,
                              font_mono=("ui-monospace", "monospace"))


def _examples(folder: str, limits: Limits) -> list[tuple[str, str, str]]:
    """Returns the examples of a source checkout (an installed wheel has none): path, question, small picture."""
    found = []
    for name, text in _EXAMPLES.items():
        if (_SAMPLE / name).is_file():
            path = shutil.copy(_SAMPLE / name, folder)
            found.append((path, text, page_images.picture(path, limits).preview))
    return found


def _blocks(gr, talks: Talks, keys: Keys, examples: list[tuple[str, str, str]]):
    """Lays the page out and connects it with the conversations."""
    limits = talks.service.limits
    model, most = talks.service.names[0], min(limits.max_new_tokens or MOST_TOKENS, MOST_TOKENS)
    with gr.Blocks(analytics_enabled=False, title=f"{model} · LLaVA-Med JAX", fill_width=True,
                   delete_cache=_UPLOADS_S) as blocks:
        gr.HTML(_HEAD.format(model=html.escape(model), notice=NOTICE), elem_id="head")
        talk = gr.HTML(
            Talk().view(), html_template=_TALK, js_on_load=(_HERE / "page.js").read_text(encoding="utf-8"),
            apply_default_css=False, elem_id="talk", rated=talks.feedback is not None, model=model,
            examples=[{"text": text, "url": url} for _, text, url in examples])
        dicom = DicomPanel(gr, talks)
        question = gr.MultimodalTextbox(
            label="Your question", show_label=False, placeholder="Ask a question; add, paste or drop images",
            file_count="multiple", sources=["upload"], max_lines=8, max_plain_text_length=1_000_000, autofocus=True,
            elem_id="question", container=False)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            temperature = gr.Slider(0, 1.5, min(Settings.temperature, 1.5), step=0.05, label="Temperature",
                                    info="0 gives the likeliest answer, the same one every time.")
            length = gr.Slider(1, most, min(Settings.max_tokens, most), step=1, label="Longest answer, in tokens")

        def box(view: dict, **changes):
            return gr.MultimodalTextbox(submit_btn=not view["busy"], stop_btn=view["busy"], **changes)

        async def shown(session: str, views, text: str = "", files=None):
            """Passes views on; the box is emptied at the start, and gets a refused question back at the end."""
            is_asking, last = files is not None, None
            async with contextlib.aclosing(views):
                async for view in views:
                    is_first, last = last is None, view
                    if is_first:
                        empty = {"value": {"text": "", "files": []}} if is_asking and view["busy"] else {}
                        yield view, box(view, **empty)
                    elif view["busy"]:
                        yield view, gr.skip()
            is_back = is_asking and talks.of(session).refused
            yield last, box(last, **({"value": {"text": text, "files": files}} if is_back else {}))

        def asking(request: gr.Request, text: str, files: list[str], count: int, *settings):
            views = talks.ask(request.session_hash, text, files, Settings(*settings), count,
                              keys.name(request.headers) or "")
            return contextlib.aclosing(shown(request.session_hash, views, text, files))

        async def ask(value, count, temperature, length, request: gr.Request):
            text, files = value["text"] or "", list(value["files"] or [])
            async with asking(request, text, files, count, temperature, length) as changes:
                async for each in changes:
                    yield each

        async def example(count, temperature, length, request: gr.Request, event: gr.EventData):
            path, text, _ = examples[int(event.index)]
            async with asking(request, text, [path], count, temperature, length) as changes:
                async for each in changes:
                    yield each

        async def again(temperature, length, request: gr.Request, event: gr.EventData):
            views = talks.again(request.session_hash, int(event.index), getattr(event, "text", None),
                                Settings(temperature, length), keys.name(request.headers) or "")
            async with contextlib.aclosing(shown(request.session_hash, views)) as changes:
                async for each in changes:
                    yield each

        def stop(request: gr.Request):
            talks.stop(request.session_hash)

        def fresh(request: gr.Request):
            view = talks.clear(request.session_hash)
            return view, box(view, value={"text": "", "files": []})

        def rate(request: gr.Request, event: gr.EventData):
            return talks.rate(request.session_hash, int(event.index), event.rating)

        # All events go through Gradio's queue, since `page_door` closes its other route.
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        settings, both = [temperature, length], [talk, question]
        # The browser sends how many exchanges it shows, not what is in them.
        question.submit(ask, [question, talk, *settings], both, **quiet,
                        js="(value, view, ...rest) => [value, view.exchanges.length, ...rest]")
        talk.example(example, [talk, *settings], both, **quiet,
                     js="(view, ...rest) => [view.exchanges.length, ...rest]")
        talk.regenerate(again, settings, both, **quiet)
        talk.edit(again, settings, both, **quiet)
        question.stop(stop, **quiet)
        talk.fresh(fresh, None, both, **quiet)
        talk.rate(rate, None, talk, **quiet)
        dicom.connect(talk, question, quiet)
        blocks.unload(stop)
    return blocks
