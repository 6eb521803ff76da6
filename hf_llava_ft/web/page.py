"""The page: pictures and questions in, streamed answers out, of one model or two. All that needs Gradio."""

import html
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_llava_ft.answering.shared_base import SharedBase
from hf_llava_ft.errors import UserError
from hf_llava_ft.serving.endpoint_handler import MAX_NEW_TOKENS, SETTINGS
from hf_llava_ft.web.talk import Said, Talk
from hf_llava_ft.web.uploads import SUFFIXES, opened_upload

NOBODY = "nobody"  # beside the model
# No event is an address for programs: `llava-ft export` writes folders for servers.
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_TURN: dict[str, Any] = {**_EVENT, "concurrency_limit": 1, "concurrency_id": "model"}
_SECONDS_KEPT = 86400  # of an upload
_SECONDS_A_STEP = 0.05  # each sends what it changes through Gradio, which takes time from a model on the CPU
# Hidden are Gradio's buttons that clear a column alone, give back what was uploaded, or would send it to the Hub.
STYLE = """
footer, .side [aria-label="Clear"], .side [aria-label="Share"], .side a[download] { display: none !important; }
.side > .wrapper > .icon-button-wrapper, .side .message-buttons-right { display: none !important; }
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important; }
.side { height: 52vh !important; }
.side .message-content .md { white-space: pre-wrap !important; }
.side .message img { max-height: 22vh !important; width: auto !important; }
#told { min-height: 1.5em; }
#told .flag { white-space: nowrap; }
#told .error { color: #b91c1c; }
.dark #told .error { color: #fca5a5; }
@media (max-width: 700px) {
  .side { height: 44vh !important; }
  :has(> .side + .side) > .side { height: 29vh !important; }
  .side .message img { max-height: 16vh !important; }
  .gradio-container .main { padding: 8px 12px !important; }
}
"""


def theme() -> Any:
    """Gradio's own, in the fonts of the system: nothing is fetched from anywhere."""
    import gradio as gr

    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(
    models: SharedBase, uploads: Path, history: Path, *, system: str | None, generation: dict[str, Any]
) -> Any:
    """
    Args:
        models (`SharedBase`): those that can be chosen.
        uploads (`Path`): the folder that Gradio keeps uploads in.
        history (`Path`): the file that conversations are kept in.
        generation: what the settings are at the beginning.

    Returns:
        `gradio.Blocks`.
    """
    import gradio as gr

    several = len(models.names) > 1
    opening = models.processor(models.names[0]).picture_opening
    with gr.Blocks(title=f"{models.names[0]} - llava-ft chat", delete_cache=(3600, _SECONDS_KEPT)) as page:
        talk = gr.State()
        with gr.Row(visible=several):
            name = gr.Dropdown(models.names, value=models.names[0], label="Model", filterable=False)
            beside = gr.Dropdown([NOBODY, *models.names], value=NOBODY, label="Beside it", filterable=False)
        with gr.Row():
            sides = [_side(models.names[0], True), _side("", False)]
        box = gr.MultimodalTextbox(
            file_types=SUFFIXES,
            file_count="multiple",
            sources=["upload"],
            placeholder="Drop a picture here, and ask",
            show_label=False,
            max_lines=6,
            elem_id="question",
        )
        told = gr.HTML(elem_id="told")
        with gr.Row():
            again = gr.Button("Ask again", size="sm", min_width=90)
            new = gr.Button("New", size="sm", min_width=60)
            keep = gr.Button("Keep for training", size="sm", min_width=130)
        with gr.Accordion("Settings", open=False):
            settings = _settings(generation)

        shown = [talk, *sides, box, told]

        def start() -> Talk:
            return Talk(models, system)

        def ask(talk: Talk | None, said: dict[str, Any], *chosen: float) -> Iterator[tuple]:
            talk = talk or start()
            question, files = (said.get("text") or "").strip(), list(said.get("files") or [])

            def steps() -> Iterator[None]:
                if not question:
                    raise UserError("a question is missing: write one beside the picture.")
                pictures = [opened_upload(file, uploads, opening) for file in files]
                yield from talk.ask(question, pictures, files, **_generation(*chosen))

            yield from _shown(talk, steps(), said)

        def ask_again(talk: Talk | None, said: dict[str, Any], *chosen: float) -> Iterator[tuple]:
            talk = talk or start()

            def steps() -> Iterator[None]:  # what is wrong with the settings is told as all else
                yield from talk.retry(**_generation(*chosen))

            yield from _shown(talk, steps(), said, keeps_box=True)

        def change(talk: Talk | None, do: Callable[[Talk], str | None]) -> tuple:
            talk = talk or start()
            try:
                line = _told(do(talk) or "")
            except UserError as error:
                line = _told(error.sentence, is_error=True)
            return talk, *_sides(talk), gr.skip(), line

        def choose(talk: Talk | None, left: str, right: str) -> tuple:
            return change(talk, lambda each: each.choose(left, None if right == NOBODY else right))

        inputs = [talk, box, *settings]
        page.load(start, None, talk, queue=False, **_EVENT)
        box.submit(ask, inputs, shown, **_TURN)
        box.stop(lambda talk: talk.end() if talk else None, talk, None, queue=False, **_EVENT)
        again.click(ask_again, inputs, shown, **_TURN)
        new.click(lambda talk: change(talk, Talk.begin), talk, shown, **_EVENT)
        keep.click(lambda talk: change(talk, lambda each: each.keep(history)), talk, shown, **_EVENT)
        for choice in (name, beside):
            choice.input(choose, [talk, name, beside], shown, **_EVENT)
    return page


def _side(label: str, visible: bool) -> Any:
    import gradio as gr

    # What is said is shown as it is: as Markdown or HTML it could name pictures of elsewhere, and would lack its tags.
    # Gradio leaves out Markdown, not HTML (6.31), so that `_message` escapes it; its button would copy the escapes.
    return gr.Chatbot(
        label=label,
        visible=visible,
        render_markdown=False,
        latex_delimiters=[],
        height="52vh",
        min_width=320,
        buttons=[],
        feedback_options=None,
        allow_file_downloads=False,
        elem_classes="side",
        layout="bubble",
    )


def _settings(generation: dict[str, Any]) -> list[Any]:
    import gradio as gr

    longest = max(MAX_NEW_TOKENS, generation["max_new_tokens"])
    hottest = max(2.0, generation["temperature"])
    return [
        gr.Slider(0, hottest, generation["temperature"], step=0.05, label="Temperature", info="0: no sampling"),
        gr.Slider(0.01, 1, generation["top_p"] or 1.0, step=0.01, label="Top-p", info="above temperature 0"),
        gr.Slider(1, longest, generation["max_new_tokens"], step=1, label="Most tokens of an answer"),
    ]


def _generation(temperature: float, top_p: float, max_new_tokens: float) -> dict[str, Any]:
    """What [`Conversation.stream`] takes, of the sliders; Gradio has refused what is outside of them."""
    _, low, high = SETTINGS["top_p"]
    if not low <= top_p <= high or temperature < 0 or max_new_tokens < 1:
        raise UserError("a setting is out of its range: reload the page.")
    share = None if temperature == 0 or top_p == 1 else top_p
    return {"temperature": temperature, "top_p": share, "max_new_tokens": int(max_new_tokens)}


def _shown(talk: Talk, steps: Iterator[None], said: dict[str, Any], keeps_box: bool = False) -> Iterator[tuple]:
    """The page at each step of an answer, and in the end."""
    import gradio as gr

    idle: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
    line, is_error, last = "", True, 0.0
    yield talk, *_sides(talk), gr.MultimodalTextbox(submit_btn=False, stop_btn=True), ""
    try:
        for _ in steps:
            if time.monotonic() - last >= _SECONDS_A_STEP:
                last = time.monotonic()
                yield talk, *_sides(talk), gr.skip(), gr.skip()
        is_error = False
        if talk.is_cut:
            line = "The answer ends here because the model's context is full: begin a new conversation."
    except UserError as error:
        line = error.sentence
    except Exception as error:
        traceback.print_exc()  # for who started the page
        line = f"there is no answer ({type(error).__name__}); the terminal says why."
    if not keeps_box:
        idle["value"] = said if is_error else None
    yield talk, *_sides(talk), gr.MultimodalTextbox(**idle), _told(line, is_error)


def _sides(talk: Talk) -> list[Any]:
    """Both columns as the talk stands."""
    import gradio as gr

    found = [
        gr.Chatbot(value=[_message(said) for said in column], label=name, visible=True)
        for name, column in zip(talk.names, talk.columns(), strict=True)
    ]
    return found if len(found) == 2 else [found[0], gr.Chatbot(visible=False)]


def _message(said: Said) -> dict[str, Any]:
    text = said.text.replace("<image>", "") if len(said.files) == 1 else said.text
    if said.role == "assistant" and not text.strip():
        text = "(an empty answer)" if said.is_whole else "..."
    # Not a bare string: Gradio takes the indentation from one.
    written = [{"type": "text", "text": html.escape(text.strip("\n"), quote=False)}] if text.strip() else []
    return {"role": said.role, "content": [*({"path": file} for file in said.files), *written]}


def _told(sentence: str, is_error: bool = False) -> str:
    kind = ' class="error"' if is_error else ""
    unbroken = re.sub(r"--\w+", r'<span class="flag">\g<0></span>', html.escape(sentence))
    return f'<span role="status"{kind}>{unbroken}</span>' if sentence else ""
