"""What a Trainer pushes to the Hub: the model with its card and, where one is asked for, a checkpoint.

transformers pushes the output folder as it finds it. In ours lie a picture of the run, answers, rows that were left
out and the folder of a composed base, and it adds a pickle with this machine's paths; a checkpoint leaves before it is
whole, and may be deleted while it leaves. Here each push is one commit of files that are named, from a folder of its
own.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers import Trainer

from hf_llava_ft.checkpoints.inspection import Kind
from hf_llava_ft.checkpoints.training_facts import TrainingFacts
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.model_card import ASSETS_FOLDER, CARD_FILE, BaseOnCard, write_card, write_local_card
from hf_llava_ft.hub.private_text import check_nothing_private
from hf_llava_ft.hub.refusals import push_refusal
from hf_llava_ft.hub.staging import hub_name, replaced_by, stage
from hf_llava_ft.hub.upload import Upload, Uploaded, patiently
from hf_llava_ft.library_differences import HTTPError
from hf_llava_ft.training.push_folder import PushFolder, stage_state
from hf_llava_ft.training.summary import settings_of

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"


class PushingTrainer(Trainer):
    """
    As `transformers.Trainer`; what differs is what a push holds.

    Attributes:
        known (`dict`, *optional*): what a card can tell of the run before it is over, in the form of
            `train_summary.json`.
    """

    known: dict[str, Any] | None = None
    _base_on_card: BaseOnCard | None = None

    # Of checkpoints; transformers' own `push_in_progress` stays empty.
    _running_pushes: Sequence[Future[CommitInfo]] = ()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As in transformers.

        Raises:
            UserError: if the Hub refuses, or the adapter stands on a base that nobody else has.
        """
        base = self._base_of_adapter
        if base is not None and Path(base).exists():
            raise UserError(
                f"--push_to_hub: the adapter's base is {base}, a folder that nobody else has: start from the Hub id "
                f"of that model, or train without and push with llava-ft push, which takes the id of the base."
            )
        initialise = super().init_hf_repo
        try:
            patiently(lambda: initialise(token=token, private=private))
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            repo_id = self.args.hub_model_id or Path(str(self.args.output_dir)).name
            refusal = push_refusal(error, repo_id)
            if refusal is None:
                raise
            raise refusal from error
        self._pushes = ThreadPoolExecutor(max_workers=1)
        self._running_pushes = []

    def create_model_card(  # type: ignore[override]
        self, language=None, license=None, tags=None, model_name=None, dataset_tags=None, **kwargs
    ) -> None:
        """
        Writes the card of [`write_card`] to the output folder; see there for `language` and `license`. The other facts
        that transformers takes are known here.

        Args:
            tags (`str` or `list[str]`, *optional*): to add to ours.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of datasets.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        with PushFolder.new(folder) as push:
            stage(folder, self._kind, push.staged)
            self._write_card(push.staged, folder, language=language, license=license, tags=tags, datasets=dataset_tags)
            for file in (push.staged / CARD_FILE, *push.staged.glob(f"{ASSETS_FOLDER}/*")):
                target = folder / file.relative_to(push.staged)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
            push.remove()

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        As in transformers: saves the model to the output folder, and pushes it from there.

        Returns:
            The commit, or a future of it if not `blocking`; `None` in all processes but the first.

        Raises:
            UserError: if the Hub refuses; what was saved stays.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        names = {"language": "language", "license": "license", "tags": "tags", "dataset_tags": "datasets"}
        card = {names[name]: value for name, value in kwargs.items() if name in names}
        return self.push_output_folder(commit_message, blocking=blocking, token=token, revision=revision, **card)

    def push_output_folder(
        self,
        commit_message: str | None = "End of training",
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Pushes the model that lies in the output folder; as `push_to_hub`.

        Args:
            card: `language`, `license`, `tags` and `datasets` of the card.
        """
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(str(self.args.output_dir))
        try:
            with PushFolder.new(folder) as push:
                stage(folder, self._kind, push.staged)
                self._write_card(push.staged, folder, **card)
                self._wait_for_pushes()
                future = self._upload(push, commit_message or "Upload model", token=token, revision=revision)
            return future.result() if blocking else future
        except UserError as error:
            raise UserError(
                f"{error.sentence} What was trained is whole at {folder}, and llava-ft push sends it."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the Trainer calls it before the checkpoint is sealed. See `push_checkpoint`."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes the model in a checkpoint that is whole, and the checkpoint itself if `hub_strategy` says so."""
        strategy = self.args.hub_strategy
        if not self.args.push_to_hub or not self.is_world_process_zero() or strategy == "end":
            return
        running = [push for push in self._running_pushes if not push.done()]
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with_state = {"checkpoint": LAST_CHECKPOINT, "all_checkpoints": checkpoint.name}
        name = next((name for known, name in with_state.items() if strategy == known), None)
        try:
            with PushFolder.new(checkpoint.parent) as push:
                push.keep(checkpoint)
                stage(push.kept, self._kind, push.staged)
                self._write_card(push.staged, None)
                if name is not None:
                    stage_state(push.kept, push.staged / name)
                future = self._upload(push, f"Training in progress, step {self.state.global_step}")
        except UserError as error:
            _tell_of_failure(error)  # no reason to end the training
            return
        self._running_pushes = [*running, future]

    def train(self, *args, **kwargs):
        """As in transformers; waits at the end for what is still being pushed."""
        output = super().train(*args, **kwargs)
        self._wait_for_pushes()
        return output

    def _wait_for_pushes(self) -> None:
        if not all(push.done() for push in self._running_pushes):
            logger.info("Waiting for the current checkpoint push to be finished, this might take a couple of minutes.")
            wait(self._running_pushes)

    @property
    def _base_of_adapter(self) -> str | None:
        """What the adapter names as its base; `None` for a whole model."""
        if not isinstance(self.model, PeftModel):
            return None
        return self.model.peft_config["default"].base_model_name_or_path

    @property
    def _kind(self) -> Kind:
        return "adapter" if isinstance(self.model, PeftModel) else "model"

    def write_own_card(self, folder: Path, facts: TrainingFacts | None = None, plot: str | None = None) -> None:
        """
        The card of an adapter that was saved to `folder`, in place of PEFT's.

        Args:
            facts (`TrainingFacts`, *optional*): by default what is known so far.
            plot (`str`, *optional*): file of the loss curve in the folder.
        """
        if facts is None:
            known = self.known or {"settings": settings_of(self.args)}
            numbers = {"steps": self.state.global_step, "epochs": self.state.epoch}
            facts = TrainingFacts.of_run(known | numbers, self.state.log_history)
        if self._base_on_card is None:
            self._base_on_card = BaseOnCard.of(folder, facts)
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).name
        write_local_card(folder, name, facts, self._base_on_card, plot)

    def _write_card(self, staged: Path, run: Path | None, *, tags=None, datasets=None, **facts: Any) -> None:
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).name
        base = None if self._kind == "adapter" else str(getattr(self.model, "name_or_path", "") or "") or None
        if base is not None and hub_name(base) is None:
            base = None
        card = write_card(staged, kind=self._kind, repo_id=str(name), run=run, base=base, **facts)
        for key, values in {"tags": tags, "datasets": datasets}.items():
            if values:
                given = [values] if isinstance(values, str) else values
                card.data[key] = list(dict.fromkeys([*(card.data.get(key) or []), *given]))
        if tags or datasets:
            card.save(staged / CARD_FILE)

    def _upload(
        self, push: "PushFolder", message: str, token: str | None = None, revision: str | None = None
    ) -> Future[CommitInfo]:
        """Uploads what is staged in one commit, in the background, and removes the folder."""
        kind, has_state = self._kind, (push.staged / LAST_CHECKPOINT).is_dir()
        check_nothing_private(push.staged, Path(str(self.args.output_dir)))
        upload = Upload(
            push.staged,
            str(self.hub_model_id),
            "model",
            message,
            revision=revision or self.args.hub_revision,
            replaces=lambda name: replaced_by(kind, name) or (has_state and name.startswith(f"{LAST_CHECKPOINT}/")),
            token=token or self.args.hub_token,
        )
        future = self._pushes.submit(lambda: _commit_info(upload.run(), message))
        future.add_done_callback(lambda done: _after_upload(done, push))
        return future


def _commit_info(uploaded: Uploaded, message: str) -> CommitInfo:
    """What `huggingface_hub` tells of a commit."""
    url = f"{HfApi().endpoint}/{uploaded.repo_id}/commit/{uploaded.commit}"
    return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=uploaded.commit)


def _after_upload(done: Future, push: PushFolder) -> None:
    push.remove()
    error = done.exception()
    if error is not None:
        _tell_of_failure(error)


def _tell_of_failure(error: BaseException) -> None:
    logger.warning(f"A push to the Hub failed: {error}")
