"""Training on packs: loss, gradients and weights are those of the same rows in padded batches."""

import json

import pytest
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from transformers import set_seed

import hf_llava_ft
from hf_llava_ft.data.collator import LlavaCollator, PackCollator
from hf_llava_ft.data.lengths import token_lengths
from hf_llava_ft.data.packing import PackSampler
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import train
from hf_llava_ft.training.speed import packed_attention
from hf_llava_ft.training.speed.packed_attention import BY_DOCUMENT
from hf_llava_ft.training.tuning import with_tuning
from tests.one_step import assert_same, is_same, step_of
from tests.ranks import logged, run, saved_weights, write_rows

disable_progress_bars()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twelve rows of different lengths: text alone, one picture, two pictures."""
    folder = tmp_path_factory.mktemp("rows")
    path = write_rows(folder, 12)
    written = json.loads(path.read_text())
    for index, row in enumerate(written):
        row["conversations"][1]["value"] *= 1 + index % 4
    written[5] |= {"image": ["5.png", "3.png"]}
    written[5]["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    path.write_text(json.dumps(written))
    return path, folder


@pytest.fixture(scope="module")
def data(rows):
    return hf_llava_ft.load_llava_json(*rows)


@pytest.fixture
def prepared(loaded, data, tmp_path):
    """A function that makes a Trainer with packing."""

    def make(train_type="full", model=None, processor=None, **settings):
        tiny_model, tiny_processor = loaded()
        processor = tiny_processor if processor is None else processor
        tuning = TuningArguments(train_type=train_type, lora_r=4, lora_alpha=8, lora_dropout=0.0)
        set_seed(1)
        model = with_tuning(tiny_model if model is None else model, tuning, "")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        given = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "packing": True}
        given |= {"max_tokens_per_batch": 300, "max_grad_norm": 1e9}
        args = LlavaTrainingArguments(
            output_dir=str(tmp_path / "out"), disable_tqdm=True, use_cpu=True, **(given | settings)
        )
        return hf_llava_ft.LlavaTrainer(model=model, args=args, train_dataset=data, processing_class=processor)

    return make


def padded(trainer, packs, size=3):
    """The rows of the packs in padded batches of `size`."""
    picked = [trainer.train_dataset[index] for pack in packs for index in pack]
    return [trainer.data_collator(picked[start : start + size]) for start in range(0, len(picked), size)]


def packed(trainer, packs):
    collate = PackCollator(trainer.data_collator)
    return [collate([[trainer.train_dataset[index] for index in pack]]) for pack in packs]


@pytest.mark.parametrize("train_type", ["full", "lora", "projector"])
def test_loss_and_gradients_of_an_accumulated_step_are_those_of_padded_batches(prepared, train_type):
    trainer = prepared(train_type)
    packs = trainer.pack_sampler().packs(0)
    assert len(packs) > 1 and max(map(len, packs)) > 2
    found = step_of(trainer, packed(trainer, packs))
    assert_same(found, step_of(trainer, padded(trainer, packs)))
    assert any("projector" in name for name in found[1])


def test_gradient_checkpointing_and_the_chunked_loss_change_nothing(prepared, monkeypatch):
    trainer = prepared("lora")
    packs = trainer.pack_sampler().packs(0)[:2]
    expected = step_of(trainer, padded(trainer, packs))
    trainer.model.gradient_checkpointing_enable()
    trainer.model.enable_input_require_grads()
    monkeypatch.setattr("hf_llava_ft.modeling.chunked_loss_llava.CHUNK_BYTES", 4 * 1088 * 5)  # five rows
    assert_same(step_of(trainer, packed(trainer, packs)), expected)


def test_pictures_in_several_crops_go_to_their_documents(tiny, golden, prepared):
    crops = {"image_grid_pinpoints": [[56, 112], [112, 56]]}
    model = tiny.model(image_aspect_ratio="anyres", patch_merge_type="spatial_unpad", **crops)
    processor = LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        model.config.vision_config,
        version="v1",
        image_aspect_ratio="anyres",
        **crops,
    )
    trainer = prepared(model=model, processor=processor)
    packs = [pack for pack in trainer.pack_sampler().packs(0) if 5 in pack]  # with the row of two pictures
    batches = packed(trainer, packs)
    assert len(batches[0]["image_sizes"]) > 2 and len(batches[0]["document_lengths"]) > 1
    expected = step_of(trainer, padded(trainer, packs))
    assert is_same(step_of(trainer, batches), expected)
    swapped = {**batches[0], "pixel_values": batches[0]["pixel_values"].flip(0)}
    assert not is_same(step_of(trainer, [swapped]), expected)


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_a_window_is_kept_within_each_document(tiny, prepared, text):
    model = tiny.model(text)
    for part in (model.config.text_config, model.model.language_model.config):
        part.sliding_window = 8
    for layer in model.model.language_model.layers:
        if hasattr(layer.self_attn, "sliding_window"):
            layer.self_attn.sliding_window = 8
    if text == "qwen2":
        model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
        model.model.language_model.has_sliding_layers = True
        model.model.language_model.layers[0].self_attn.sliding_window = None
    trainer = prepared(model=model)
    packs = trainer.pack_sampler().packs(0)[:2]
    found = step_of(trainer, packed(trainer, packs))
    assert_same(found, step_of(trainer, padded(trainer, packs)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "_window", lambda *_: None)
        assert not is_same(step_of(trainer, packed(trainer, packs)), found)


def test_what_would_be_wrong_is_seen(prepared, monkeypatch):
    trainer = prepared()
    packs = trainer.pack_sampler().packs(0)[:1]
    batches, rows = packed(trainer, packs), padded(trainer, packs)
    expected = step_of(trainer, rows)
    assert is_same(step_of(trainer, batches), expected)

    # documents that see those before them
    [batch] = batches
    total = sum(batch["document_lengths"])
    assert not is_same(step_of(trainer, [{**batch, "document_lengths": [total]}]), expected)
    # positions that do not begin anew, and a border a token too late: seen where they count
    late = [*batch["document_lengths"]]
    late[0], late[1] = late[0] + 1, late[1] - 1
    assert not is_same(step_of(trainer, [{**batch, "document_lengths": late}]), expected)
    # a label over a border
    labels = batch["labels"].clone()
    start = batch["document_lengths"][0]
    labels[0, start] = batch["input_ids"][0, start]
    assert not is_same(step_of(trainer, [{**batch, "labels": labels}]), expected)
    # the mean of a pack in place of the mean of a step
    assert not is_same(step_of(trainer, batches, items=len(packs[0])), expected)


def test_positions_begin_anew_with_each_document(tiny, prepared):
    """Rotary positions tell distances alone; scaling by the highest of them tells where they begin."""
    model = tiny.model(rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    rotary = model.model.language_model.rotary_emb
    rotary.original_max_seq_len = rotary.max_seq_len_cached = model.config.text_config.max_position_embeddings = 128
    trainer = prepared(model=model)
    packs = trainer.pack_sampler().packs(0)[:1]
    [batch] = packed(trainer, packs)
    assert max(batch["document_lengths"]) < 128 < batch["input_ids"].shape[1]
    expected = step_of(trainer, padded(trainer, packs))
    assert is_same(step_of(trainer, [batch]), expected)
    running = torch.arange(batch["input_ids"].shape[1])[None]
    assert not is_same(step_of(trainer, [{**batch, "position_ids": running}]), expected)


def test_documents_are_told_apart_before_the_first_step(prepared, monkeypatch):
    trainer = prepared()
    trainer.train()
    assert trainer.state.global_step == 2

    trainer = prepared()
    real, all_one = packed_attention.packed_inputs, packed_attention.Documents([8], None)
    monkeypatch.setattr(packed_attention, "packed_inputs", lambda *args: {**real(*args), "documents": all_one})
    with pytest.raises(UserError, match="--packing: in llama a row is not computed as it is alone"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_batch_of_rows_is_computed_as_before(prepared):
    """Evaluation and answers go through the same attention, also with padding on the left."""
    trainer = prepared()
    model = trainer.model.eval()
    assert model.model.language_model.config._attn_implementation == BY_DOCUMENT
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    batch = LlavaCollator(trainer.processing_class, padding_side="left")([trainer.train_dataset[i] for i in (0, 2, 1)])
    with torch.no_grad():
        found = model(**batch).loss
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(found, model(**batch).loss)
    assert "attn" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize("lengths", [[3, 3, 3], [5, 5, 2, 7, 7, 7], [4], [1, 1, 6, 1], [2, 3, 2, 3]], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_neighbours_of_one_length_are_computed_together_as_each_alone(lengths, window, monkeypatch):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    # Laid out as a layer has them: position by position, then the heads.
    packs = [torch.randn(1, sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(1, sum(lengths), 4, 8)

    def by_document() -> list[torch.Tensor]:
        documents = packed_attention.Documents(lengths, torch.tensor([0, *lengths]).cumsum(0))
        query, key, value = (each.transpose(1, 2) for each in packs)
        arguments = {"scaling": 0.3, "sliding_window": window, "documents": documents}
        found, _ = packed_attention.attention_by_document(module, query, key, value, None, **arguments)
        return [found, *torch.autograd.grad((found * weights).sum(), packs)]

    alone = []
    for document in zip(*(each.split(lengths, 1) for each in packs), strict=True):
        query, key, value = (each.transpose(1, 2) for each in document)
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
        alone.append(found.transpose(1, 2))
    expected = [torch.cat(alone, 1)]
    expected += torch.autograd.grad((expected[0] * weights).sum(), packs)
    torch.testing.assert_close(by_document(), expected)

    # The control: neighbours cut at other places.
    if len(lengths) > 1:
        with monkeypatch.context() as patch:
            patch.setattr(packed_attention, "groupby", lambda lengths: [(sum(lengths), [None])])
            assert not torch.allclose(by_document()[0], expected[0], atol=1e-3)


def test_the_kernel_is_given_documents_as_it_takes_them(monkeypatch):
    """PyTorch's kernel for documents of different lengths runs on GPUs alone: here stands its definition."""
    given = {}

    def varlen_attn(query, key, value, borders, of_keys, longest, of_key, *, scale, window_size, enable_gqa):
        given.update(window_size=window_size, enable_gqa=enable_gqa, longest=longest)
        assert query.shape == (9, 4, 8) and key.shape == value.shape == (9, 2, 8)  # (T, heads, width)
        found = torch.empty_like(query)
        for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            q, k, v = (each[start:stop].transpose(0, 1) for each in (query, key, value))
            look = torch.arange(stop - start)
            behind = look[:, None] - look
            mask = (behind >= 0) & (behind <= window_size[0] if window_size[0] >= 0 else behind >= 0)
            found[start:stop] = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        return found

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    documents = packed_attention.Documents([6, 3], torch.tensor([0, 6, 9], dtype=torch.int32))
    for window in (None, 3):
        arguments = {"scaling": 0.3, "sliding_window": window, "documents": documents}
        expected, _ = packed_attention.attention_by_document(module, query, key, value, None, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(packed_attention, "_has_kernel", lambda *_: True)
            found, _ = packed_attention.attention_by_document(module, query, key, value, None, **arguments)
        torch.testing.assert_close(found, expected)
        assert given["window_size"] == (-1 if window is None else 2, 0) and given["longest"] == 6


def test_a_run_on_packs_is_resumed_exactly_and_by_the_same_budget_alone(tiny_checkpoint, rows, tmp_path):
    path, folder = rows

    def command(name, **others):
        given = {"model_name_or_path": tiny_checkpoint, "data_path": path, "image_folder": folder, "use_cpu": True}
        given |= {"output_dir": tmp_path / name, "num_train_epochs": 2, "lora_r": 4, "lora_dropout": 0.1}
        given |= {
            "packing": True,
            "max_tokens_per_batch": 200,
            "gradient_accumulation_steps": 2,
            "save_strategy": "no",
        }
        given |= {"save_strategy": "no", "try_longest_batch": "true"}
        words = [str(word) for pair in (given | others).items() for word in (f"--{pair[0]}", pair[1])]
        return train(*resolve(words).build())

    whole = command("whole", save_strategy="steps", save_steps=2)
    assert whole.summary["samples"] == 2 * 12 and whole.summary["epochs"] == 2
    assert whole.summary["settings"]["max_tokens_per_batch"] == 200
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    steps = whole.summary["steps"]
    assert steps > 3
    resumed = command("resumed", resume_from_checkpoint=checkpoint)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed")]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert resumed.losses == whole.losses
    for others in ({"max_tokens_per_batch": 250}, {"packing": False, "per_device_train_batch_size": 1}):
        with pytest.raises(UserError, match="is of a run that was another: .*(packing|max_tokens_per_batch)"):
            given = {"max_tokens_per_batch": 200} | others
            if others.get("packing") is False:
                del given["max_tokens_per_batch"]
            words = {"resume_from_checkpoint": checkpoint, "model_name_or_path": tiny_checkpoint, "data_path": path}
            words |= {"image_folder": folder, "use_cpu": True, "output_dir": tmp_path / "again", "packing": True}
            words |= {"num_train_epochs": 2, "lora_r": 4, "lora_dropout": 0.1, "gradient_accumulation_steps": 2}
            words |= {"save_strategy": "no"} | given
            train(*resolve([str(word) for pair in words.items() for word in (f"--{pair[0]}", pair[1])]).build())


def test_two_processes_train_as_one_that_accumulates(tiny_checkpoint, tiny_processor, data, rows, tmp_path):
    """Packs are dealt in turn, so a step of two processes is one of two accumulated packs."""
    path, folder = rows
    lengths = token_lengths(data, tiny_processor)
    budget = next(each for each in range(200, 300) if len(PackSampler(lengths, each)) == 4)  # else two have one more
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", path, "--image_folder", folder, "--use_cpu"]
    flags += ["--packing", "True", "--max_tokens_per_batch", budget, "--num_train_epochs", "1", "--lora_dropout", "0"]
    flags += ["--lora_r", "4", "--save_strategy", "no", "--learning_rate", "1e-3"]
    weights = []
    for engine, accumulation in (("ddp", 1), ("single", 2)):
        out = tmp_path / engine
        argv = [*flags, "--output_dir", out, "--gradient_accumulation_steps", accumulation]
        run(engine, argv, tmp_path / f"{engine}-logs")
        weights.append(saved_weights(out))
    assert len(logged(tmp_path / "ddp")) == 2
    for one, other in zip(*(logged(tmp_path / engine) for engine in ("ddp", "single")), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"per_device_train_batch_size": 4}, "leave per_device_train_batch_size out"),
        ({"group_by_modality_length": True}, "packing has an order of its own"),
        ({"sampler_order": "original"}, "packing has an order of its own"),
        ({"loss_normalization": "micro_batch"}, "weight of a token would depend on what is packed beside it"),
        ({"packing": False}, "max_tokens_per_batch 300 is of packing alone"),
        ({"max_tokens_per_batch": 20}, "more than --max_tokens_per_batch 20 takes"),
    ],
)
def test_what_does_not_go_with_packing_is_said(prepared, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared(**settings).train()


def test_attention_that_has_no_borders_is_refused(tiny, prepared):
    model = tiny.model()
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="--packing: it needs an attention .* and eager has none"):
        prepared(model=model)
    model = tiny.model()
    model.model.language_model._supports_flash_attn = False
    with pytest.raises(UserError, match="--packing: llama cannot keep packed rows apart"):
        prepared(model=model)


def test_a_step_has_about_as_many_rows_as_without_packing(prepared, data):
    trainer = prepared("lora", max_tokens_per_batch=None, max_steps=-1)
    lengths = token_lengths(data, trainer.processing_class)
    assert trainer.args.max_tokens_per_batch == max(4 * lengths.mean() // 1 + 1, lengths.max())  # of up to 100 rows: 4
    assert trainer.args.gradient_accumulation_steps == 1
    small = prepared("lora", max_tokens_per_batch=int(lengths.max()), max_steps=-1)
    assert small.args.gradient_accumulation_steps == round(4 / (lengths.max() / lengths.mean()))
    assert trainer.told_of_padding().startswith("Packing: 12 rows in ")
