"""`llava-ft push`: an adapter, a model, a projector or a dataset, so that it works for the next person.

Staged, loaded in a fresh process, uploaded in one commit, downloaded again and loaded once more.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_llava_ft.checkpoints.checked.folder import check_settings
from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG, Checkpoint, Kind, inspect_checkpoint
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.run_files import SUMMARY_FILE, TRAINING_FILE
from hf_llava_ft.checkpoints.verify import (
    LOGIT_TOLERANCE,
    Probe,
    Verification,
    compare_outputs,
    loader_for,
    reference_outputs,
    reloaded_outputs,
)
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.download import check_same_files, download, files_of
from hf_llava_ft.hub.model_card import write_card
from hf_llava_ft.hub.private_text import check_nothing_private
from hf_llava_ft.hub.staging import hub_name, id_of_cached, is_of_card, kind_on_the_hub, replaced_by, stage
from hf_llava_ft.hub.upload import Upload, Uploaded, check_login, patiently
from hf_llava_ft.library_differences import HTTPError
from hf_llava_ft.processing.processing_llava import LlavaProcessor

KIND_NAMES: dict[Kind, str] = {
    "model": "model",
    "adapter": "adapter",
    "original_lora": "adapter of the original format",
    "projector": "projector",
}


@dataclass(frozen=True)
class Pushed:
    """
    Args:
        kind (`Kind`): what it is.
        files (`dict[str, int]`): bytes of each file, by its path in the repository.
        left_out (`list[str]`): what was in the folder and stayed here.
        card (`str`): the text of README.md; empty if that on the Hub was kept.
        verification (`Verification`, *optional*): of what is staged, or of what was downloaded again if it was.
        uploaded (`Uploaded`, *optional*): none after a dry run.
    """

    kind: Kind
    files: dict[str, int]
    left_out: list[str]
    card: str
    verification: Verification | None
    uploaded: Uploaded | None


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    keep_card: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    language: list[str] | None = None,
    run: str | Path | None = None,
    base: str | None = None,
    samples: int = 0,
    kinds: tuple[Kind, ...] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """
    Uploads the adapter, model or projector in the folder `path`.

    Args:
        repo_id (`str`): `user/name`; the repository is made if it is not there.
        private (`bool`): if it is made, it is private.
        revision (`str`, *optional*): branch; it is made from main if it is not there.
        create_pr (`bool`): offers it as a pull request.
        dry_run (`bool`): everything but the upload; needs no token.
        verify (`bool`): whether the folder is loaded and asked, before and after the upload.
        keep_card (`bool`): leaves README.md and its pictures on the Hub as they are.
        commit_message (`str`, *optional*): of the commit.
        license, language, samples: of the card; see [`~hf_llava_ft.hub.model_card.write_card`].
        run (`str` or `Path`, *optional*): folder of the training run; by default `path` is looked into.
        base (`str`, *optional*): Hub id of the base of an adapter or projector, if it names a folder.
        kinds (`tuple[Kind, ...]`, *optional*): what `path` may be.
        tell: is given a line on each step.

    Raises:
        UserError: if something is missing, would not work for others or tells of this machine, if the folder answers
            otherwise after it was staged or downloaded again, or the Hub refuses.
    """
    source = Path(path)
    if not source.is_dir():
        raise UserError(f"{path} is not a folder: name the one that holds the adapter, the model or the projector.")
    if create_pr and revision not in (None, "main"):
        raise UserError("a pull request is made on main: leave out --revision or --create_pr.")
    check_settings(str(source))
    checkpoint = _inspect(source, base)
    name = KIND_NAMES[checkpoint.kind]
    if kinds is not None and checkpoint.kind not in kinds:
        wanted = " or ".join(KIND_NAMES[kind] for kind in kinds if kind != "original_lora")
        raise UserError(
            f"{path} holds {_a(name)}, and {_a(wanted)} was to be pushed: use llava-ft push, which takes both."
        )
    if not dry_run:
        check_login(repo_id)
    public_base, base_revision = _public_base(checkpoint, base)

    # What is staged are links into the folder, which nobody may write until they are uploaded.
    with (
        locked_folder(source, for_reading=True),
        tempfile.TemporaryDirectory(prefix="llava-ft-push-") as scratch,
    ):
        staged = Path(scratch, "staged")
        staged.mkdir()
        left_out = stage(source, checkpoint.kind, staged, public_base, base_revision).left_out
        answers = verification = None
        if verify:
            tell(f"Loading the {name} in a fresh process.")
            answers = _Answers.of(checkpoint, staged)
            verification = answers.verification
        card = ""
        if not keep_card:
            written = write_card(
                staged,
                kind=checkpoint.kind,
                repo_id=repo_id,
                run=_run_folder(source, run),
                base=public_base,
                base_revision=base_revision,
                verification=verification,
                license=license,
                language=language,
                samples=samples,
            )
            card = str(written)
        check_nothing_private(staged, source)
        sizes = {file: (staged / file).stat().st_size for file in files_of(staged)}
        uploaded = None
        if not dry_run:
            tell(f"Uploading {len(sizes)} files of {sum(sizes.values()) / 2**20:,.1f} MiB.")
            uploaded = Upload(
                staged,
                repo_id,
                "model",
                commit_message or f"Upload a LLaVA {name}",
                private=private,
                revision=revision,
                create_pr=create_pr,
                replaces=lambda file: replaced_by(checkpoint.kind, file) and not (keep_card and is_of_card(file)),
                check=lambda files: _check_kind(repo_id, checkpoint.kind, files),
            ).run()
            if answers is not None:
                tell(f"Downloading commit {uploaded.commit[:12]} into an empty cache, and loading it again.")
                verification = _verify_downloaded(staged, uploaded, answers, public_base)
        return Pushed(checkpoint.kind, sizes, left_out, card, verification, uploaded)


def _inspect(source: Path, base: str | None) -> Checkpoint:
    """What `source` holds, on the base that is on this machine, if there is one: it need not be downloaded then."""
    checkpoint = inspect_checkpoint(str(source), base=base)
    if base is None or checkpoint.kind == "model":
        return checkpoint
    recorded = (read_json(str(source), ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    return replace(checkpoint, base=recorded, revision=None) if recorded and Path(recorded).is_dir() else checkpoint


def _public_base(checkpoint: Checkpoint, base: str | None) -> tuple[str | None, str | None]:
    """
    Hub id and revision of the base, as others are told of it; `None` of a whole model.

    Raises:
        UserError: if the base is a folder that only this machine has.
    """
    named = base or (None if checkpoint.kind == "model" else checkpoint.base)
    if named is None:
        return None, None
    if hub_name(named):
        return named, checkpoint.revision if named == checkpoint.base and checkpoint.revision else _commit_of(named)
    cached = id_of_cached(named)
    if cached is None:
        raise UserError(
            f"the base of {checkpoint.path} is the folder {named}, which nobody else has: push it first, and name it "
            f"with --base user/base."
        )
    return cached


def _commit_of(repo_id: str) -> str | None:
    """The newest commit, so that the adapter stays with the weights it was tried on; `None` if it can't be asked."""
    try:
        return patiently(lambda: HfApi().model_info(repo_id)).sha
    except (HTTPError, OSError):
        return None


@dataclass(frozen=True)
class _Answers:
    """What the staged folder answered in a fresh process, and that it is what the model in memory answers."""

    outputs: dict[str, torch.Tensor]
    verification: Verification
    processor: LlavaProcessor
    tolerance: float
    base: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, staged: Path) -> "_Answers":
        base = None if checkpoint.kind == "model" else checkpoint.base
        loader, probe = loader_for(staged, base), Probe()
        processor = load_processor(checkpoint.path, base=base)
        # transformers takes model and processor as they are.
        fitting = processor if loader == "hf_llava_ft" else None
        model: Any = load_model(checkpoint.path, fitting, base=base)
        reference, tolerance = reference_outputs(model, processor, probe), LOGIT_TOLERANCE[model.dtype]
        del model  # the other process needs as much memory
        [outputs] = reloaded_outputs(staged, [probe], base, loader)
        verification = compare_outputs(reference, outputs, processor, tolerance, loader)
        if not verification.ok:
            raise UserError(
                f"{checkpoint.path} answers differently where others load it: {'; '.join(verification.differences)}."
            )
        return cls(outputs, verification, processor, tolerance, base)


def _verify_downloaded(staged: Path, uploaded: Uploaded, answers: _Answers, base: str | None) -> Verification:
    """Fetches the commit into an empty cache, as a stranger would, and asks it again."""
    place = f"commit {uploaded.commit} of {uploaded.repo_id}"
    with tempfile.TemporaryDirectory(prefix="llava-ft-pushed-") as cache:
        folder = download(uploaded, Path(cache), [*files_of(staged), *_READ_BY_LOADERS])
        check_same_files(staged, folder, place)
        loader = loader_for(folder, base)
        [outputs] = reloaded_outputs(folder, [Probe()], base, loader)
    # The same files in the same program give the same numbers; another copy of the base may be of another dtype.
    tolerance = 0.0 if base == answers.base or base is None else answers.tolerance
    verification = compare_outputs(answers.outputs, outputs, answers.processor, tolerance, loader)
    if not verification.ok:
        raise UserError(f"{place} does not answer like what was pushed: {'; '.join(verification.differences)}.")
    return verification


# Of other files in the repository, those that decide how it loads.
_READ_BY_LOADERS = ("*.json", "*.jinja", "*.py", "*.model", "*.txt")


def _check_kind(repo_id: str, kind: Kind, files: set[str]) -> None:
    there, ours = kind_on_the_hub(files), "adapter" if kind == "original_lora" else kind
    if there is not None and there != ours:
        raise UserError(
            f"{repo_id} holds {_a(there)}, and {_a(ours)} in the same place would make both unreadable: choose "
            f"another name."
        )


def _run_folder(source: Path, run: str | Path | None) -> Path:
    """Where the card finds what is known of the training."""
    if run is not None:
        if not any(Path(run, name).is_file() for name in (SUMMARY_FILE, TRAINING_FILE)):
            raise UserError(
                f"--run {run} is not the folder of a training run: it has neither {SUMMARY_FILE} nor {TRAINING_FILE}."
            )
        return Path(run)
    return source


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
