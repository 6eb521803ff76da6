"""A preview shows what the labels say, and nothing that the data could do to a terminal."""

import io

import pytest
from rich.console import Console

from hf_llava_ft.checking.preview import marked_pieces, preview_text, print_preview
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor


def conversation(*turns):
    messages = []
    for question, answer in turns:
        content = [{"type": "image", "text": None}] if "<image>" in question else []
        content.append({"type": "text", "text": question.replace("<image>", "")})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


TWO_TURNS = conversation(("<image>\nWhat is it?", " A cat é 漢字."), ("And\nthis?", "A dog."))


@pytest.mark.parametrize("version", ["v1", "v0", "llama_2", "mpt", "mistral"])
def test_marks_are_the_labels(tiny_processor, tmp_path, version):
    tiny_processor.save_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    processor.use_chat_template(version)
    pieces = marked_pieces(processor, TWO_TURNS)
    text, spans = processor.render(TWO_TURNS)
    assert "".join(piece.text for piece in pieces).removeprefix("<s>") == text.removeprefix("<s>")
    assert [piece.text for piece in pieces if piece.learned] == [text[start:end] for start, end in spans]
    assert [piece.image_tokens for piece in pieces if piece.image_tokens] == [processor.num_image_tokens]
    # By the labels themselves: as many tokens are learned as the marked texts have.
    [(ids, supervised)] = processor.tokenize_rendered([(text, spans)])
    marked = "".join(piece.text for piece in pieces if piece.learned)
    learned = processor.tokenizer.decode(ids[supervised])
    assert "".join(marked.split()) == "".join(learned.split())


def test_a_template_that_marks_otherwise_is_shown_otherwise(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    # As a faulty template would have it: the question is learned.
    processor.chat_template = (
        "{% for message in messages %}{% generation %}{{ message['content'][-1]['text'] }}{% endgeneration %}"
        "{{ eos_token }}{% endfor %}"
    )
    learned = [piece.text for piece in marked_pieces(processor, conversation(("Why?", "So."))) if piece.learned]
    assert learned == ["Why?", "So."]


def shown(processor, rows, **console) -> str:
    file = io.StringIO()
    print_preview(Console(file=file, width=200, **console), processor, rows)
    return file.getvalue()


def test_without_a_terminal_marks_are_brackets_and_with_one_colours(tiny_processor):
    rows = [("data.json: row 1", {"messages": TWO_TURNS, "images": [{"path": "x.png", "bytes": None}]})]
    plain = shown(tiny_processor, rows)
    assert "\x1b" not in plain and "data.json: row 1\n" in plain
    assert "<image> x 16" in plain and "<image><image>" not in plain
    assert plain.count("[[") == plain.count("]]") - plain.count("and ]]") + plain.count("between [[ and") == 3
    assert "[[ A dog.</s>]]" in plain and "this? ASSISTANT:[[" in plain
    coloured = shown(tiny_processor, rows, force_terminal=True, color_system="truecolor")
    assert "\x1b[1;32m A dog.</s>\x1b[0m" in coloured and "[[" not in coloured


def test_data_cannot_steer_the_terminal_or_pass_for_markup(tiny_processor):
    messages = conversation(("[bold]q[/bold] \x1b[2J\x9b31m", "a \x07 \u202e [red]"))
    text = preview_text(marked_pieces(tiny_processor, messages), in_colour=False).plain
    assert "\\x1b[2J\\x9b31m" in text and "[bold]q[/bold]" in text and "\x07" not in text and "\u202e" not in text
    plain = shown(tiny_processor, [("[red]place", {"messages": messages, "images": []})])
    assert "[red]place" in plain and "\x1b" not in plain


def test_what_is_wrong_with_a_row_takes_its_place_and_a_long_one_ends(tiny_processor):
    rows = [
        ("data.json: row 1", UserError("data.json: row 1: turn 2 is an empty answer; write the answer.")),
        ("data.json: row 2", {"messages": conversation(("q", "word " * 5000)), "images": []}),
    ]
    plain = shown(tiny_processor, rows)
    assert "data.json: row 1\nturn 2 is an empty answer; write the answer.\n" in plain
    assert "the rest is not shown" in plain and len(plain) < 6000
