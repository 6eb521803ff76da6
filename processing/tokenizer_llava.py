"""A text tokenizer made ready for LLaVA: it has `<image>` and a padding token, and it cuts text as the original does.

The original tokenises the text before and after each image as separate strings, so a SentencePiece tokenizer puts its
dummy space in front of the text that follows an image. A tokenizer of transformers does that on its own when it is
`legacy`, and not otherwise; here a normaliser rule does it, inside `tokenizer.json`, so that every reader of the
folder gets the same ids.
"""

import json
from importlib import import_module
from pathlib import Path

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

IMAGE_TOKEN = "<image>"
# Behind which text gets a space in front: not between two images, and not at the end or in front of a special token,
# where the original has an empty text, for which SentencePiece gives nothing.
IMAGE_RULE = rf"{IMAGE_TOKEN}(?!{IMAGE_TOKEN})(?=[\s\S])"
IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_start>", "<im_end>"
# The first of a gated repository too, the last of a name that is none.
_NOT_TO_BE_HAD = (RepositoryNotFoundError, RevisionNotFoundError, PermissionError, ValueError)


def load_tokenizer(name_or_path, **kwargs):
    """`AutoTokenizer.from_pretrained`, with a bare `tokenizer.model` read as SentencePiece reads it."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **{"trust_remote_code": False, **kwargs})
    if not tokenizer.is_fast:
        raise ValueError(f"{name_or_path}: its tokenizer has no fast version, which labels by character spans need.")

    location = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
    if file_if_there(name_or_path, "tokenizer.json", **location) is None:
        model_file = file_if_there(name_or_path, "tokenizer.model", **location)
        if model_file is not None:
            return _as_sentencepiece(tokenizer, Path(model_file))
    return tokenizer


def file_if_there(name_or_path, file_name: str, **location) -> str | None:
    """The path of a file in a folder, in the cache or on the Hub; `None` if it is not there, or the Hub is not to be
    reached. `location`: as `cached_file` takes it."""
    try:
        return cached_file(name_or_path, file_name, **location)
    except OSError as error:
        # transformers' own, which it raises for everything, has no number; a full disk has one.
        if error.errno is not None or isinstance(error.__cause__, _NOT_TO_BE_HAD):
            raise
        return None


def prepare_tokenizer(tokenizer, image_start_end: bool = False):
    """
    A tokenizer with `<image>` as one special token, a padding token, and padding on the right.

    Args:
        image_start_end (`bool`): also `<im_start>` and `<im_end>`, in front of `<image>`, where the original has them.

    The one passed in is changed, unless it needs the rule for text after an image: that one comes back as a new
    object.
    """
    if image_start_end:
        tokenizer.add_tokens([IMAGE_START_TOKEN, IMAGE_END_TOKEN], special_tokens=True)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        if _prefixes_first_segment_only(tokenizer):
            tokenizer = _with_space_after_image(tokenizer)
        # normalized: found after the normaliser has run, which then sees the image and the text after it together.
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=_has_image_rule(tokenizer))
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        # The original pads with <unk>. Without one, never with the stop token: that one is learned.
        tokenizer.add_special_tokens({"pad_token": tokenizer.unk_token or "<pad>"})
    tokenizer.padding_side = "right"
    return tokenizer


def _rebuilt(tokenizer, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer around `backend`. The general class: `LlamaTokenizer` would drop the normaliser on loading."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


def _prefixes_first_segment_only(tokenizer) -> bool:
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return isinstance(pre_tokenizer, pre_tokenizers.Metaspace) and pre_tokenizer.prepend_scheme == "first"


def _has_image_rule(tokenizer) -> bool:
    return IMAGE_TOKEN in str(tokenizer.backend_tokenizer.normalizer)


def _with_space_after_image(tokenizer) -> PreTrainedTokenizerFast:
    prepared = _rebuilt(tokenizer, tokenizer.backend_tokenizer)  # a copy
    before, rule = prepared.backend_tokenizer.normalizer, normalizers.Replace(Regex(IMAGE_RULE), f"{IMAGE_TOKEN} ")
    prepared.backend_tokenizer.normalizer = rule if before is None else normalizers.Sequence([before, rule])
    return prepared


def _as_sentencepiece(tokenizer, model_file: Path):
    """
    Undoes two things that transformers 5 does to a `tokenizer.model`.

    SentencePiece merges by score. transformers orders the merges by id, which is the same for most pieces but not for
    LLaMA's runs of spaces: those have the lowest ids and the lowest score. And a `legacy` tokenizer puts the dummy
    space in front of every text between special tokens; the `Metaspace` of transformers leaves it out where the text
    begins with a space of its own.
    """
    # No import statement: transformers would ask everybody for it who loads this code from the Hub.
    pieces = import_module("sentencepiece").SentencePieceProcessor(model_file=str(model_file))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        return tokenizer
    score = {pieces.id_to_piece(index): pieces.get_score(index) for index in range(pieces.get_piece_size())}
    state["model"]["merges"].sort(key=lambda pair: -score["".join(pair)])  # stable: equal scores keep their order
    backend = Tokenizer.from_str(json.dumps(state))
    if (
        isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
        and backend.pre_tokenizer.prepend_scheme == "always"
    ):
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence([backend.normalizer, *spaces] if backend.normalizer else spaces)
        backend.pre_tokenizer = None
    return _rebuilt(tokenizer, backend)
