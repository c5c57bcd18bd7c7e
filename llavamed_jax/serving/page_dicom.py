"""The page's controls for DICOM files in the question: which frame, and which window."""

# No annotations from the future: Gradio reads those of handlers, which name a module that is imported late.

import html
import math
from pathlib import Path

from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.page_images import AS_FILE, OWN, Choice, choices, picture, windows
from llavamed_jax.serving.page_talk import Talks, sentence


class DicomPanel:
    """The controls, which are shown while the question holds a DICOM file.

    Args:
      gr: the module gradio.
      talks: the conversations, which keep the choices.
    """

    def __init__(self, gr, talks: Talks):
        self._gr, self._talks = gr, talks
        with gr.Group(visible=False, elem_id="panel") as self.panel, gr.Row():
            with gr.Column(min_width=200):
                self.shown = gr.HTML(elem_classes="preview", apply_default_css=False)
            with gr.Column(min_width=240):
                self.file = gr.Dropdown([], label="DICOM file")
                self.frame = gr.Slider(1, 2, 1, step=1, label="Frame")
                self.window = gr.Dropdown([AS_FILE], label="Window (centre / width)")
                with gr.Row():
                    self.center = gr.Number(label="Centre", min_width=100)
                    self.width = gr.Number(label="Width", min_width=100)

    @property
    def _controls(self) -> list:
        return [self.file, self.frame, self.window, self.center, self.width]

    def connect(self, talk, question, quiet: dict) -> None:
        """Connects the controls.

        Args:
          talk: the conversation's component, whose event `attached` says that files came or went.
          question: the box with the files.
          quiet: options of every event.
        """
        gr = self._gr

        def attached(value, request: gr.Request):
            files = (value or {}).get("files") or []
            return self.attached(request.session_hash, files)

        def picked(path, request: gr.Request):
            return self.look(request.session_hash, path)

        def valued(path, frame, center, width, request: gr.Request):
            return self.choose(request.session_hash, path, frame, OWN, center, width)

        def framed(path, frame, name, center, width, request: gr.Request):
            return self.choose(request.session_hash, path, frame, name, center, width)

        quiet = {**quiet, "trigger_mode": "always_last"}
        outputs = [*self._controls, self.shown]
        talk.attached(attached, question, [self.panel, talk, *outputs], **quiet)
        self.file.input(picked, self.file, outputs, **quiet)
        self.frame.input(framed, self._controls, outputs, **quiet)
        self.window.input(framed, self._controls, outputs, **quiet)
        for number in (self.center, self.width):
            number.input(valued, [self.file, self.frame, self.center, self.width], outputs, **quiet)

    def attached(self, session: str, files: list[str]) -> list:
        """Shows the controls for the DICOM files among some, and an alert if a file is not an image.

        Args:
          session: the browser's tab.
          files: paths of the question's files.

        Returns:
          Changes of the panel, the conversation and the controls.
        """
        gr, talk, found, alert = self._gr, self._talks.of(session), [], ""
        for path in files:
            try:
                if choices(path, self._talks.service.limits) is not None:
                    found.append(path)
                else:
                    picture(path, self._talks.service.limits)
            except ApiError as error:
                alert = sentence(error)
        if not talk.is_busy:
            talk.alert = alert
        if not found:
            return [gr.Group(visible=False), talk.view(), *[gr.skip()] * 6]
        changes = self.look(session, found[-1])
        changes[0] = gr.Dropdown([(Path(path).name, path) for path in found], value=found[-1],
                                 visible=len(found) > 1)
        return [gr.Group(visible=True), talk.view(), *changes]

    def look(self, session: str, path: str) -> list:
        """Shows what is chosen for a file."""
        talk = self._talks.of(session)
        return self._changes(path, talk.choices.get(path, Choice()), None)

    def choose(self, session: str, path: str, frame, name: str, center=None, width=None) -> list:
        """Takes a choice and shows the picture that the model will get.

        Args:
          session: the browser's tab.
          path: the file.
          frame: counted from 1.
          name: the window's name in the list, or `OWN` for the two numbers.
          center: the window's centre, for `OWN`.
          width: the window's width, for `OWN`.

        Returns:
          Changes of the controls.
        """
        talk, window = self._talks.of(session), None
        if name == OWN:
            if not _is_window(center, width):
                return [*[self._gr.skip()] * 5, _words("Write a number for the centre and one above 0 for the width.")]
            window = (float(center), float(width))
        else:
            try:
                found = choices(path, self._talks.service.limits, int(frame))
            except ApiError as error:
                return [*[self._gr.skip()] * 5, _words(sentence(error))]
            window = windows(found).get(name) if found is not None else None
        talk.choices[path] = Choice(int(frame), window)
        return self._changes(path, talk.choices[path], name)

    def _changes(self, path: str, choice: Choice, name: str | None) -> list:
        gr, limits = self._gr, self._talks.service.limits
        try:
            found, seen = choices(path, limits, choice.frame), picture(path, limits, choice)
        except ApiError as error:
            return [*[gr.skip()] * 5, _words(sentence(error))]
        names = windows(found)
        name = name or next((each for each, window in names.items() if window == choice.window), OWN)
        if name not in names and name != OWN:  # a window of another frame
            name = AS_FILE
        center, width = choice.window or (found.windows[0][1:] if found.windows else (None, None))
        is_written = name == OWN  # a number that is being written is not overwritten
        number = (lambda value: gr.skip()) if is_written else (lambda value: gr.Number(value, visible=found.is_grey))
        return [
            gr.skip(), gr.Slider(1, max(2, found.frames), choice.frame, step=1, visible=found.frames > 1,
                                 label=f"Frame, of {found.frames}"),
            gr.Dropdown([*names, OWN], value=name, visible=found.is_grey), number(center), number(width),
            f'<img src="{seen.preview}" alt="The frame as the model will see it">']


def _is_window(center, width) -> bool:
    return all(isinstance(each, (int, float)) and math.isfinite(each) for each in (center, width)) and width > 0


def _words(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
