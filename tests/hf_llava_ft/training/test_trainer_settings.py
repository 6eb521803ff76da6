"""Settings of transformers do here what they say: two steps of the tiny model, beside the same computed plainly."""

import copy
import dataclasses
import re

import pytest
import torch
from transformers import TrainingArguments

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.tuning import with_tuning

RATE = 1e-2


@pytest.fixture
def prepared(tiny_checkpoint, llava_json, tmp_path):
    """A function that makes a Trainer of the projector, of so many rows, as told."""

    def make(num_rows=4, **settings):
        processor = load_processor(str(tiny_checkpoint))
        model = with_tuning(load_model(str(tiny_checkpoint), processor), TuningArguments(train_type="projector"), "")
        given = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": RATE, "warmup_steps": 0}
        given |= {"lr_scheduler_type": "constant", "optim": "adamw_torch", "save_strategy": "no", "use_cpu": True}
        args = LlavaTrainingArguments(output_dir=str(tmp_path / "out"), disable_tqdm=True, **(given | settings))
        data = hf_llava_ft.load_llava_json(*llava_json(num_rows, with_text_rows=True))
        return hf_llava_ft.LlavaTrainer(model=model, args=args, train_dataset=data, processing_class=processor)

    return make


def plain_loss(trainer, model, batch, smoothing=0.0):
    """Summed loss of the next tokens, and their number, by PyTorch's own."""
    inputs = trainer._prepare_inputs(batch)
    labels = inputs.pop("labels")
    kept = torch.arange(max(trainer.processing_class.tokenizer.get_vocab().values()) + 1)
    kept = kept[kept != trainer.processing_class.image_token_id]
    logits = model(**inputs).logits[:, :-1]
    column = torch.full((logits.shape[-1] + 1,), -100)
    column[kept] = torch.arange(len(kept))
    targets = labels[:, 1:]
    targets = torch.where(targets == -100, -100, column[targets.clamp(min=0)])
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="sum")
    return loss(logits[..., kept].flatten(0, 1), targets.flatten()), int((targets != -100).sum())


def padded_batches(trainer):
    """What the Trainer trains on, padded to the longest row of each batch, with the mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "is_padding_free", False)
        return list(trainer.get_train_dataloader())


def plainly_trained(trainer, optimizer, *, accumulation=1, clip=1.0, smoothing=0.0, num_steps=2):
    """The trained weights, by a loop without a Trainer, over the batches that the Trainer takes."""
    model = copy.deepcopy(trainer.model).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    step = optimizer(trained)
    batches = iter(padded_batches(trainer))
    for _ in range(num_steps):
        sums = [plain_loss(trainer, model, next(batches), smoothing) for _ in range(accumulation)]
        (sum(loss for loss, _ in sums) / sum(count for _, count in sums)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        step.step()
        step.zero_grad()
    return trained


def adamw(decay=0.0, **settings):
    def make(trained):
        groups = [[each for each in trained if (each.dim() > 1) is is_matrix] for is_matrix in (True, False)]
        decays = [{"params": each, "weight_decay": d} for each, d in zip(groups, (decay, 0.0), strict=True)]
        return torch.optim.AdamW(decays, **({"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8} | settings))

    return make


TRIALS = {
    "nothing": ({}, adamw(), {}),
    "learning_rate": ({"learning_rate": 3e-3}, adamw(lr=3e-3), {}),
    "adam_beta1, adam_beta2, adam_epsilon": (
        {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-3},
        adamw(betas=(0.5, 0.7), eps=1e-3),
        {},
    ),
    "weight_decay": ({"weight_decay": 0.5}, adamw(0.5), {}),
    "max_grad_norm": ({"max_grad_norm": 0.01, "adam_epsilon": 1e-2}, adamw(eps=1e-2), {"clip": 0.01}),
    "no max_grad_norm": ({"max_grad_norm": 0.0, "adam_epsilon": 1e-2}, adamw(eps=1e-2), {"clip": 0}),
    "label_smoothing_factor": (
        {"label_smoothing_factor": 0.3, "adam_epsilon": 1e-2},
        adamw(eps=1e-2),
        {"smoothing": 0.3},
    ),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "adam_epsilon": 1e-2},
        adamw(eps=1e-2),
        {"accumulation": 2},
    ),
    "optim sgd": ({"optim": "sgd"}, lambda trained: torch.optim.SGD(trained, lr=RATE), {}),
    "optim adagrad": ({"optim": "adagrad"}, lambda trained: torch.optim.Adagrad(trained, lr=RATE), {}),
    "optim rmsprop": ({"optim": "rmsprop"}, lambda trained: torch.optim.RMSprop(trained, lr=RATE), {}),
    "optim adamw_torch_fused": ({"optim": "adamw_torch_fused"}, adamw(), {}),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, adamw(), {}),
    "train_sampling_strategy": ({"train_sampling_strategy": "sequential"}, adamw(), {}),
}


SLOW_TRIALS = {"torch_compile": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, adamw(), {})}


@pytest.mark.parametrize("name", [*TRIALS, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_TRIALS)])
def test_a_setting_trains_what_it_says(prepared, name):
    settings, optimizer, how = (TRIALS | SLOW_TRIALS)[name]
    trainer = prepared(**settings)
    assert trainer.is_padding_free is (name != "torch_compile")
    before = [each.detach().clone() for each in trainer.model.parameters() if each.requires_grad]
    expected = plainly_trained(trainer, optimizer, **how)
    trainer.train()
    trained = [each for each in trainer.model.parameters() if each.requires_grad]
    for each, start, plain in zip(trained, before, expected, strict=True):
        assert (each - plain).norm() < 2e-3 * (plain - start).norm()


def test_another_computation_is_seen(prepared):
    """Negative control: the label smoothing of transformers' own, which moves no labels for our class."""
    from transformers.trainer_pt_utils import LabelSmoother

    trainer = prepared(label_smoothing_factor=0.3, adam_epsilon=1e-2)
    expected = plainly_trained(trainer, adamw(eps=1e-2), smoothing=0.3)
    trainer.label_smoother = LabelSmoother(epsilon=0.3)
    trainer.compute_loss = lambda *args, **kwargs: super(type(trainer), trainer).compute_loss(*args, **kwargs)
    before = [each.detach().clone() for each in trainer.model.parameters() if each.requires_grad]
    trainer.train()
    trained = [each for each in trainer.model.parameters() if each.requires_grad]
    off = max((a - b).norm() / (b - c).norm() for a, b, c in zip(trained, expected, before, strict=True))
    assert off > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_evaluation_loss_is_that_of_training_whatever_says_how_it_is_gathered(prepared, smoothing):
    trainer = prepared(label_smoothing_factor=smoothing)
    batches = padded_batches(trainer)
    with torch.no_grad():
        sums = [plain_loss(trainer, trainer.model.eval(), batch, smoothing) for batch in batches]
    expected = float(sum(loss for loss, _ in sums) / sum(count for _, count in sums))
    ways = [("prediction_loss_only", True), ("eval_accumulation_steps", 1), ("batch_eval_metrics", True)]
    ways += [("eval_do_concat_batches", False), ("per_device_eval_batch_size", 1), ("seed", 3)]
    for name, value in ways if not smoothing else ways[:1]:
        setattr(trainer.args, name, value)
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5), name


def ids(trainer) -> list[list[int]]:
    return [row.tolist() for batch in trainer.get_train_dataloader() for row in batch["input_ids"]]


def test_the_order_of_rows_is_as_said(prepared):
    said = prepared(5, train_sampling_strategy="sequential", per_device_train_batch_size=1)
    in_file = [said.data_collator([row])["input_ids"][0].tolist() for row in said.train_dataset]
    assert ids(said) == in_file
    orders = [ids(prepared(5, per_device_train_batch_size=1, **each)) for each in ({}, {}, {"data_seed": 7})]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(in_file)
    for drops, num_batches in ((False, 3), (True, 2)):
        for grouped in (False, True):
            made = prepared(5, dataloader_drop_last=drops, group_by_modality_length=grouped)
            assert len(list(made.get_train_dataloader())) == num_batches, (drops, grouped)


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_tokens_that_were_seen_are_counted(prepared, kind):
    trainer = prepared(include_num_input_tokens_seen=kind)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    counted = "input_ids" if kind == "all" else "attention_mask"
    number = sum(int(batch[counted].numel() if kind == "all" else batch[counted].sum()) for batch in batches)
    assert trainer.state.num_input_tokens_seen == number


@pytest.mark.parametrize(
    "kind, options, expected",
    [
        ("linear", {}, [0.0, 1.0, 2 / 3, 1 / 3]),
        ("constant", {}, [1.0] * 4),
        ("constant_with_warmup", {}, [0.0, 1.0, 1.0, 1.0]),
        ("cosine", {}, [0.0, 1.0, 0.75, 0.25]),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}, [0.0, 1.0, 0.875, 0.625]),
        ("polynomial", {"power": 2.0, "lr_end": 0.0}, [0.0, 1.0, 4 / 9, 1 / 9]),
        ("inverse_sqrt", {}, [0.0, 1.0, 2**-0.5, 3**-0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule(prepared, kind, options, expected):
    trainer = prepared(lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=1, max_steps=4)
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(4):
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / RATE)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-6)


REFUSED = {
    "remove_unused_columns": True,
    "label_names": ["input_ids"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "num_tokens",
    "auto_find_batch_size": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_cache": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "dataloader_in_order": False,
    "enable_jit_checkpoint": True,
    "logging_nan_inf_filter": True,
    "optim": "adalomo",
    "accelerator_config": {"split_batches": True},
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"no_such_word": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_do_here_what_it_says_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=name):
        LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: REFUSED[name]})


def test_two_orders_at_once_are_refused(tmp_path):
    for other in ({"group_by_modality_length": True}, {"sampler_order": "original"}):
        with pytest.raises(UserError, match="two orders"):
            LlavaTrainingArguments(
                output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy="sequential", **other
            )


def table(checkout) -> dict[str, str]:
    """Of the document: what happens here, by name of a setting."""
    text = (checkout / "docs/training.md").read_text()
    rows = text.partition("## What each setting of transformers does here")[2].partition("\n## ")[0]
    found = {}
    for row in re.findall(r"^\| (`.+?) \| (.+?) \|", rows, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", row[0]), row[1])
    return found


def test_the_table_names_every_setting_of_transformers_and_says_what_is_refused(checkout):
    found = table(checkout)
    there = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert not there - set(found), "docs/training.md lacks rows for these settings of transformers"
    only_of_some_releases = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(found) - there <= only_of_some_releases
    says_refused = {name for name, what in found.items() if what.startswith("refused")}
    assert says_refused - {"parallelism_config"} == set(REFUSED) - {
        *("logging_nan_inf_filter", "optim", "accelerator_config", "lr_scheduler_type", "lr_scheduler_kwargs"),
        "train_sampling_strategy",
    }


def test_a_refusal_is_one_sentence_of_the_command(llava_ft, tmp_path):
    code, _, err = llava_ft(
        *("train", "--model_name_or_path", "none", "--data_path", "none", "--output_dir", tmp_path),
        *("--use_cpu", "True", "--auto_find_batch_size", "True"),
    )
    assert code == 2 and err.count("error:") == 1 and "auto_find_batch_size True would go on" in err
    assert resolve(["--model_name_or_path", "a", "--data_path", "b"]).by_name["auto_find_batch_size"].value is False
