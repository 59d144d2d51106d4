"""The page of `python -m ovseg_jax.demo` in Gradio: widgets around `page.answers`.

Each visitor has a `Visit` of their own in Gradio's session state; nothing is shared but the models and the word list.
"""

import base64
import contextlib
import dataclasses
import functools
import html
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8

from ovseg_jax.errors import UserError, optional
from ovseg_jax.inference.result import Result
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.page import answers
from ovseg_jax.page.browser import CSS, HEADERS, ON_LOAD, SAVE
from ovseg_jax.vocab.classes import ClassList

EVERYDAY = (
    "person; animal; car; building; road; tree; grass; sky; water; mountain; wall; floor; furniture; food"
)
"""The words that a page begins with, where a model has no classes of its own."""
VISITS, WAITING = 16, 20
"""Visitors whose pictures are kept, the latest; and requests that may wait for the model."""
_LAUNCH: dict[str, Any] = dict(
    server_name="127.0.0.1",
    share=False,
    inbrowser=False,
    quiet=True,
    prevent_thread_lock=True,
    footer_links=[],
    run_history=False,
    enable_monitoring=False,
    ssr_mode=False,
    pwa=False,
    mcp_server=False,
    max_file_size=answers.MAX_BYTES + 1_000_000,  # `read_picture` names a file that is too large
    state_session_capacity=VISITS,
    css=CSS,
)
_LOG = logging.getLogger(__name__)
_FAILED = "The program failed at this; its terminal shows why."


class Model(NamedTuple):
    """A model and the name that the page shows."""

    name: str
    segmenter: Segmenter


@dataclasses.dataclass(frozen=True, eq=False)
class Visit:
    """The state of one visitor.

    Attributes:
      image: the picture.
      predictions: of each model for the picture, once it was asked about.
      results: the result of each model, without a threshold.
      task: the task of the results.
    """

    image: UInt8[np.ndarray, "h w 3"]
    predictions: tuple[answers.PicturePrediction, ...] = ()
    results: tuple[Result, ...] = ()
    task: str = "semantic"


class Page:
    """The handlers of the page's events: from a `Visit` and inputs to a `Visit` and HTML.

    Args:
      models: one or two.
      lists: label files, which tell things from stuff.
      words: the words that a click chooses from.
      examples: pictures to pick.

    Attributes:
      start: the words that the page begins with; "" if all models have classes of their own.
    """

    def __init__(
        self,
        models: Sequence[Model],
        lists: Sequence[ClassList],
        words: Sequence[str],
        examples: Sequence[UInt8[np.ndarray, "h w 3"]] = (),
    ):
        self.models, self.examples = list(models), list(examples)
        self.names = [model.name for model in models]
        self.known = [own for model in models if (own := model.segmenter.classes)] + list(lists)
        self.words = tuple(dict.fromkeys(words))
        self.start = EVERYDAY if any(model.segmenter.classes is None for model in models) else ""
        self.vocabulary = functools.cache(lambda i: answers.embeddable(models[i].segmenter, self.words))

    def upload(self, path: str | None) -> tuple[Visit, str, str]:
        """Reads an uploaded file and deletes it: visit, figures, sentence."""
        if path is None:
            raise UserError("choose a picture first")
        try:
            image, sentence = answers.read_picture(path)
        finally:
            epath.Path(path).unlink(missing_ok=True)
        return self.show(image, sentence)

    def pick(self, index: int) -> tuple[Visit, str, str]:
        """Takes an example: visit, figures, sentence."""
        return self.show(self.examples[index], f"Example {index + 1}.")

    def show(self, image: UInt8[np.ndarray, "h w 3"], sentence: str) -> tuple[Visit, str, str]:
        """Shows a picture that is not yet segmented."""
        figures = "".join(answers.figure(image, name) for name in self.names)
        return Visit(image), _row(figures), sentence + " Type words and press Segment."

    def segment(
        self, visit: Visit | None, words: str, task: str, threshold: int | float
    ) -> tuple[Visit, str, str]:
        """Segments the visitor's picture by each model."""
        visit = _started(visit)
        classes = answers.read_words(words, self.known)
        results = tuple(answers.segment(model.segmenter, visit.image, classes, task) for model in self.models)
        visit = dataclasses.replace(visit, results=results, task=task)
        return visit, *self.draw(visit, threshold)

    def draw(self, visit: Visit | None, threshold: int | float) -> tuple[str, str]:
        """Draws the results above a threshold: figures, sentence."""
        visit = _started(visit)
        if not visit.results:
            return self.show(visit.image, "")[1:]
        colours = answers.colours_of(visit.results)
        kept = [answers.above(result, threshold, visit.task) for result in visit.results]
        figures = [
            answers.figure(result, name, colours, visit.task)
            for result, name in zip(kept, self.names, strict=True)
        ]
        counts = "; ".join(f"{len(result.segments)} segments" for result in kept)
        said = f"{counts}. Point at one for its word and score; click to ask what is there."
        if not any(result.segments for result in visit.results):
            said = (
                "No segment was found: try other words, or semantic, which needs no masks of single objects."
            )
        elif not any(result.segments for result in kept):
            said = "No segment scores that much: lower the threshold, or try other words."
        return _row("".join(figures)), said

    def ask(self, visit: Visit | None, at: tuple[float, float]) -> tuple[Visit, str, str]:
        """Answers what is at a point: visit, tables, sentence."""
        visit, tables = self._predicted(visit), []
        for i, (name, prediction) in enumerate(zip(self.names, visit.predictions, strict=True)):
            words = self.vocabulary(i)  # not before the first question, since it embeds all words
            tables.append(answers.words_table(name, answers.words_at(prediction, words, at), len(words)))
        height, width = visit.image.shape[:2]
        return visit, _row("".join(tables)), f"Asked at {int(at[0] * width)}, {int(at[1] * height)}."

    def similar(self, visit: Visit | None, word: str) -> tuple[Visit, str, str]:
        """Maps how well a word fits each pixel: visit, figures, sentence."""
        if not word.strip():
            raise UserError("type a word to look for")
        visit = self._predicted(visit)
        figures = [
            answers.heat_figure(visit.image, answers.similarity(prediction, word), word, name)
            for prediction, name in zip(visit.predictions, self.names, strict=True)
        ]
        return visit, _row("".join(figures)), f"Similarity to {word}."

    def download(self, visit: Visit | None, threshold: int | float, kind: str) -> tuple[dict[str, str], str]:
        """Returns a file for the browser to save, and a sentence."""
        visit = _started(visit)
        if not visit.results:
            raise UserError("segment the picture first")
        kept = [answers.above(result, threshold, visit.task) for result in visit.results]
        name, content = answers.download(kept, self.names, kind)
        return {"name": name, "data": base64.b64encode(content).decode()}, f"Saved {name}."

    def _predicted(self, visit: Visit | None) -> Visit:
        visit = _started(visit)
        if visit.predictions:
            return visit
        predictions = (answers.PicturePrediction(model.segmenter, visit.image) for model in self.models)
        return dataclasses.replace(visit, predictions=tuple(predictions))


def build(page: Page) -> Any:
    """Builds the page: a `gradio.Blocks`.

    Raises:
      UserError: Gradio is not installed.
    """
    gr = _gradio()
    with gr.Blocks(title="ovseg_jax", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        visit = gr.State(None)
        gr.HTML("<h1>Segment a picture by words</h1><p>Pictures stay on this machine.</p>")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                file = gr.File(
                    label=f"Your picture, up to {answers.MAX_BYTES // 1_000_000} MB",
                    height=160,
                )
                gallery = gr.Gallery(
                    page.examples,
                    label="Or an example",
                    columns=4,
                    height="auto",
                    object_fit="cover",
                    allow_preview=False,
                    elem_id="ov-examples",
                    buttons=[],
                    interactive=False,
                    visible=bool(page.examples),
                )
                words = gr.Textbox(
                    page.start,
                    label="Words",
                    placeholder="bride,woman in white; groom; cake",
                    info="; between categories, commas between names of one; or the name of a label file, such as "
                    "coco_panoptic; empty: the model's own classes",
                    lines=2,
                    max_lines=8,
                )
                task = gr.Radio(
                    [("semantic", "semantic"), ("panoptic", "panoptic"), ("instances", "instance")],
                    value="semantic",
                    label="Segments",
                )
                threshold = gr.Slider(0, 1, _default(page.models), step=0.01, label="Threshold (0 shows all)")
                run = gr.Button("Segment", variant="primary")
            with gr.Column(scale=2, min_width=280):
                said = gr.HTML(_said("Choose a picture."), elem_id="ov-said")
                view = gr.HTML("", js_on_load=ON_LOAD, elem_id="ov-view")
                asked = gr.HTML("", elem_id="ov-asked")
                with gr.Row():
                    saves = [
                        gr.Button(f"Save {text}", size="sm", min_width=90)
                        for text in ("PNG", "JSON", "features")
                    ]
                saved = gr.HTML(None, html_template="", js_on_load=SAVE, visible="hidden")
                with gr.Row(elem_id="ov-word"):
                    word = gr.Textbox(
                        label="Where is it similar to", placeholder="a word", scale=3, min_width=160
                    )
                    look = gr.Button("Show similarity", scale=1, min_width=130)
                heat = gr.HTML("", elem_id="ov-heat")
        one = dict(concurrency_id="model", concurrency_limit=1)
        shown, cleared = [visit, view, said, asked, heat], ("", "")
        load = _reporting(gr, lambda path: (*page.upload(path), *cleared), 5)
        loaded = file.upload(load, file, shown, api_name="upload", **one)
        loaded.then(lambda: None, None, file, api_visibility="private")

        def pick(event: Any) -> Any:
            return (*page.pick(event.index), *cleared)

        pick.__annotations__["event"] = gr.SelectData
        gallery.select(_reporting(gr, pick, 5), None, shown, api_visibility="private", **one)
        inputs = [visit, words, task, threshold]
        gr.on(
            [run.click, words.submit, task.input],
            _reporting(gr, page.segment, 3),
            inputs,
            [visit, view, said],
            api_name="segment",
            **one,
        )
        threshold.change(
            _reporting(gr, page.draw, 2),
            [visit, threshold],
            [view, said],
            api_name="threshold",
            show_progress="hidden",
            trigger_mode="always_last",
        )

        def ask(visit: Visit | None, event: Any) -> Any:
            return page.ask(visit, (float(event.x), float(event.y)))

        ask.__annotations__["event"] = gr.EventData
        view.select(_reporting(gr, ask, 3), visit, [visit, asked, said], api_visibility="private", **one)
        gr.on(
            [look.click, word.submit],
            _reporting(gr, page.similar, 3),
            [visit, word],
            [visit, heat, said],
            api_name="similar",
            **one,
        )
        for button, kind in zip(saves, answers.FORMATS, strict=True):
            save = _reporting(gr, functools.partial(page.download, kind=kind), 2)
            button.click(save, [visit, threshold], [saved, said], api_name=f"save_{kind}")
    blocks.queue(max_size=WAITING)
    return blocks


@contextlib.contextmanager
def serving(page: Page, port: int) -> Iterator[Any]:
    """Serves the page on this machine alone, inside a `with`; yields the `gradio.Blocks`.

    Gradio's analytics and sharing are off, its fonts are the system's, and HEADERS forbid a browser to fetch anything
    from elsewhere. Uploads lie in a folder that is deleted at the end.

    Raises:
      UserError: Gradio is not installed, or the port is taken.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": folder,
        }
        before = {key: os.environ.get(key) for key in own}
        os.environ |= own
        gr = _gradio()
        blocks = build(page)
        try:
            try:
                blocks.launch(
                    **_LAUNCH, server_port=port, theme=_theme(gr), app_kwargs={"middleware": _middleware()}
                )
            except OSError:
                taken = f"--port={port}: the port is taken; give another one, such as {port + 1}"
                raise UserError(taken) from None
            yield blocks
        finally:
            blocks.close(verbose=False)
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


def _theme(gr: Any) -> Any:
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # White text on the default shade has a contrast of 3.7, less than the 4.5 of WCAG 2.
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
    )


def _middleware() -> list[Any]:
    from starlette.middleware import Middleware

    class Headers:
        def __init__(self, app: Any):
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def with_headers(message: Any) -> None:
                if message["type"] == "http.response.start":
                    own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                    message["headers"] = [*message.get("headers", ()), *own]
                await send(message)

            await self.app(scope, receive, with_headers)

    return [Middleware(Headers)]


def _gradio() -> Any:
    return optional("gradio", "the page needs Gradio: pip install -e '.[demo]' ({error})")


def _reporting(gr: Any, handler: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Wraps a handler: an error is shown in place of its sentence, the third output or the last of two."""
    place = min(2, count - 1)

    @functools.wraps(handler)
    def call(*inputs: Any) -> Any:
        try:
            found = list(handler(*inputs))
        except UserError as error:
            sentence = f"{error}".rstrip(".") + "."
            if sentence.partition(" ")[0].isalpha():  # a file's name keeps its case
                sentence = sentence[:1].upper() + sentence[1:]
            return _with([gr.skip()] * count, place, _said(sentence, bad=True))
        except Exception:
            _LOG.exception("the page")
            return _with([gr.skip()] * count, place, _said(_FAILED, bad=True))
        return _with(found, place, _said(found[place]))

    return call


def _with(values: list[Any], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _said(sentence: str, bad: bool = False) -> str:
    kind = "alert" if bad else "status"
    return f'<p role="{kind}" class="{"ov-bad" if bad else "ov-good"}">{html.escape(sentence)}</p>'


def _row(figures: str) -> str:
    return f'<div class="ov-row">{figures}</div>'


def _started(visit: Visit | None) -> Visit:
    if visit is None:
        raise UserError("choose a picture first")
    return visit


def _default(models: Sequence[Model]) -> float:
    return max(0.0, min(float(model.segmenter.method.unknown_below) for model in models))
