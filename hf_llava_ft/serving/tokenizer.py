"""The tokenizer and the chat template as llama.cpp's converter takes them.

The converter reads the tokenizer with transformers 4, which has no class with the name that transformers 5 writes. It
takes the order of merges of a SentencePiece tokenizer from `tokenizer.model`; from `tokenizer.json` alone it gives
every token the same score, and llama.cpp then silently tokenizes text differently from training.
transformers 5 no longer writes that file, so it is rebuilt here.
"""

import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.older_readers_processing_llava import write_for_older_readers

_proto: Any = sentencepiece_model_pb2  # its classes are made when it is imported
# What a difference in merging, in bytes of unknown letters, or in spaces would show on.
_SAMPLES = (
    "What is in the picture?",
    "Two  spaces,   three; a\ttab\nand a new line.\n\n",
    "In 2019, 3.14159 x 1,000,000 = $4?",
    "for index in range(10):\n    print(f'{index!r}')",
    "Über straße, naïve façade, ¿qué? Привет, мир. 图片里有什么？ 日本語 😀",
    "unbelievably internationalization antidisestablishmentarianism",
)

# llama-server hands a template one string per message, in which `<__media_XXXX__>` stands for each picture, with
# nothing between picture and question. Our templates put markup around a picture, and a newline behind a leading one;
# this does both before they run.
_MEDIA_MARKERS = r"""
{%- set served = namespace(messages=[], text='', leading=true) -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set served.text = '' -%}
        {%- set served.leading = true -%}
        {%- for piece in message['content'].split('__>') -%}
            {%- set parts = piece.split('<__media_') -%}
            {%- if parts | length == 1 -%}
                {%- set served.text = served.text + piece + ('' if loop.last else '__>') -%}
            {%- else -%}
                {%- set served.leading = served.leading and not parts[0] -%}
                {%- set served.text = served.text + parts[0] + 'BEFORE<__media_' + parts[1] + '__>AFTER' -%}
                {%- if served.leading and loop.nextitem and not loop.nextitem.startswith('\n') -%}
                    {%- set served.text = served.text + '\n' -%}
                {%- endif -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set served.messages = served.messages + [{'role': message['role'], 'content': served.text}] -%}
    {%- else -%}
        {%- set served.messages = served.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = served.messages -%}
"""


def with_media_markers(chat_template: str) -> str:
    """`chat_template`, one of ours, taught the marks that llama-server puts in the place of pictures."""
    markup = re.search(r"set image_markup = '([^']*)'", chat_template)
    before, _, after = (markup[1] if markup else "<image>").partition("<image>")
    return re.sub(r"\n *", "", _MEDIA_MARKERS).replace("BEFORE", before).replace("AFTER", after) + chat_template


def save_tokenizer(tokenizer: Any, chat_template: str, folder: Path) -> None:
    """
    Writes `tokenizer` with `chat_template` to `folder`.

    Raises:
        UserError: if it is a SentencePiece tokenizer that cannot be written as one.
    """
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    write_for_older_readers(folder)
    model = sentencepiece_model(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    if model is not None:
        _check(model, tokenizer)
        (folder / "tokenizer.model").write_bytes(model)
        size = SentencePieceProcessor(model_proto=model).get_piece_size()
        added = {token: index for token, index in tokenizer.get_added_vocab().items() if index >= size}
        (folder / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False) + "\n", encoding="utf-8")


def sentencepiece_model(tokenizer_json: dict[str, Any]) -> bytes | None:
    """
    The `tokenizer.model` that a `tokenizer.json` was made from; `None` for a tokenizer of another kind.

    SentencePiece merges two pieces into the one with the best score, `tokenizer.json` by the first line of a list that
    applies. So the score of a piece is the negative place of the first line that makes it.
    """
    model = tokenizer_json["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    special = {token["content"] for token in tokenizer_json["added_tokens"] if token["special"]}
    unknown = model.get("unk_token") or "<unk>"
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    places: dict[str, int] = {}
    for merge in model["merges"]:
        places.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), len(places))

    proto = _proto.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = _begins_with_a_space(tokenizer_json)
    proto.normalizer_spec.remove_extra_whitespaces = False
    for text in pieces:
        piece = proto.pieces.add(piece=text, score=0.0)
        if text == unknown:
            piece.type = piece.UNKNOWN
        elif text in special:
            piece.type = piece.CONTROL
        elif len(text) == 6 and text.startswith("<0x"):
            piece.type = piece.BYTE
        else:
            piece.type, piece.score = piece.NORMAL, -float(places.setdefault(text, len(places)))
    return proto.SerializeToString()


def _begins_with_a_space(tokenizer_json: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text, by either of the two ways in which `tokenizer.json` says so."""
    pre_tokenizer = tokenizer_json.get("pre_tokenizer") or {}
    by_metaspace = pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") != "never"
    return by_metaspace or '"Prepend"' in json.dumps(tokenizer_json.get("normalizer"))


def _check(model: bytes, tokenizer: Any) -> None:
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"the tokenizer cannot be written as a SentencePiece model: {error}.") from error
    for text in _SAMPLES:
        if processor.encode(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"the tokenizer cannot be written as a SentencePiece model, which llama.cpp's converter needs: "
                f"{text[:24]!r} would be cut into other tokens; serve the model with --for vllm."
            )
