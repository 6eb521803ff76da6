"""The card: what it says is so, what it shows was asked for, and what it tells to copy runs."""

import contextlib
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.checkpoints.starting.starting_point import check_starting_point, read_projector_of
from hf_llava_ft.checkpoints.training_facts import TrainingFacts
from hf_llava_ft.checkpoints.verify import Verification
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.model_card import write_card
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.train import train
from tests.loopback_hub import LoopbackHub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUESTION = "What|is *this* <b>thing</b>? ![x](http://x.org/y.png)"
OF_THE_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.json")
OF_THE_ADAPTER += ("preprocessor_config.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory) -> Path:
    """A LoRA run of 8 steps with evaluations and prompts, told as a user tells it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "images").mkdir()
    rows = []
    for index in range(5):
        photo = Image.new("RGB", (60 + index, 40), (40 * index, 90, 200))
        photo.save(folder / "images" / f"{index}.jpg", comment=b"a comment of the camera")
        turns = [("human", f"<image>\nWhat is number {index}?"), ("gpt", f"It is the number {index * 7}.")]
        conversations = [{"from": who, "value": said} for who, said in turns]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": conversations})
    (folder / "my | rows.json").write_text(json.dumps(rows))
    prompts = [{"image": "1.jpg", "prompt": QUESTION}, {"images": ["2.jpg", "3.jpg"], "prompt": "And these?"}]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    flags = {
        "model_name_or_path": tiny_checkpoint,
        "data_path": folder / "my | rows.json",
        "image_folder": folder / "images",
        "output_dir": folder / "out",
        "use_cpu": True,
        "num_train_epochs": 4,
        "learning_rate": 0.02,
        "mm_projector_lr": 0.001,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "eval_split": 0.2,
        "eval_strategy": "epoch",
        "eval_prompts": folder / "prompts.json",
        "eval_max_new_tokens": 8,
    }
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    train(*resolve(argv).build())
    return folder / "out"


@pytest.fixture
def staged(run, tmp_path) -> Path:
    """What of the adapter goes to the Hub."""
    folder = tmp_path / "staged"
    folder.mkdir()
    for name in OF_THE_ADAPTER:
        shutil.copyfile(run / name, folder / name)
    return folder


def verified(loader="transformers", differences=()) -> Verification:
    return Verification(list(differences), 1.5e-7, "yes", loader)


def adapter_card(staged: Path, run: Path | None, **options) -> ModelCard:
    options = {"base": "org/base", "base_revision": COMMIT, "verification": verified(), **options}
    return write_card(staged, kind="adapter", repo_id="user/my_adapter", run=run, **options)


def front_matter(folder: Path) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(), re.DOTALL)[1])


def rendered(card: ModelCard) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(card.text)


def programs(card: ModelCard, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card.text, re.DOTALL)


def test_an_adapter_says_what_it_is(staged, run):
    adapter_card(staged, run, license="llama2", language="en")
    data = front_matter(staged)
    assert (data["pipeline_tag"], data["library_name"]) == ("image-text-to-text", "peft")
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert (data["license"], data["language"]) == ("llama2", "en")
    assert data["tags"] == ["llava", "lora", "hf_llava_ft"]
    [entry] = data["model-index"]
    [result] = entry["results"]
    summary = json.loads((run / "train_summary.json").read_text())
    assert entry["name"] == "my_adapter" and result["task"] == {"type": "image-text-to-text"}
    assert result["metrics"][0]["value"] == pytest.approx(summary["eval_loss"]["last"]["loss"], abs=1e-6)
    assert "datasets" not in data  # rows of this machine are no dataset on the Hub


def test_the_training_is_told_as_it_was(staged, run):
    text = adapter_card(staged, run).text
    for said in (
        "LoRA on the language model (rank 4, alpha 8, dropout 0.05), and the whole projector",
        "8 steps in batches of 2 rows (4 epochs), learning rate 0.02 (0.001 for the projector)",
        "schedule `cosine`",
        "| `multi_modal_projector` | 6,272 | 6,272 | float32 | 0.001 |",
        "of 1 row held back from training (20% of all, drawn at random)",
        "- rows: 4\n- of them with pictures: 4\n- pictures: 4\n- rows evaluated: 1",
        "trained on 4 rows alone",
        f"tree/{COMMIT}",
    ):
        assert said in text
    summary = json.loads((run / "train_summary.json").read_text())
    tokens, supervised = summary["tokens"], summary["supervised_tokens"]
    assert f"{supervised:,} ({supervised / tokens:.1%})" in text
    assert f"`{summary['data']['sources'][0]['fingerprint']}`" in text
    assert f"transformers {summary['versions']['transformers']}" in text
    with Image.open(staged / "assets" / "loss.png") as plot:
        assert plot.size == (900, 450)


def test_nothing_of_this_machine_is_in_it(staged, run, tmp_path):
    adapter_card(staged, run, samples=2)
    written = [path for path in staged.rglob("*") if path.is_file() and path.name not in OF_THE_ADAPTER]
    assert {path.name for path in written} >= {"README.md", "training.json", "loss.png"}
    texts = "".join(path.read_text() for path in written if path.suffix in (".md", ".json"))
    for path in (run, run.parent, tmp_path, Path.home()):
        assert str(path) not in texts
    assert str(run.parent) in (run / "train_summary.json").read_text()  # whereas it is there


def test_samples_are_shown_if_asked_for(staged, run):
    card = adapter_card(staged, run)
    assert "## Answers" not in card.text and "x&#46;org" not in card.text
    assert [path.name for path in (staged / "assets").iterdir()] == ["loss.png"]
    card = adapter_card(staged, run, samples=2)
    page = rendered(card)
    lines = [json.loads(line) for line in (run / "eval_answers.jsonl").read_text().splitlines()]
    said = {(line["step"], line["index"]): line["answer"] for line in lines}
    assert said[0, 0] != said[8, 0]
    [row] = re.findall(r"<tr>\s*<td>(?:(?!</tr>).)*What(?:(?!</tr>).)*</tr>", page, re.DOTALL)
    cells = re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
    assert len(cells) == 4 and "assets/sample-0-0.jpg" in cells[0]
    assert "<" not in cells[1] and html.unescape(cells[1]) == QUESTION  # and no picture of x.org
    for cell, step in zip(cells[2:], (0, 8), strict=True):
        visible = "".join(char for char in " ".join(said[step, 0].split()) if char.isprintable())
        assert html.unescape(cell) == visible or (cell, visible) == ("<em>(nothing)</em>", "")
    pictures = sorted((staged / "assets").glob("sample-*"))
    assert [path.name for path in pictures] == ["sample-0-0.jpg", "sample-1-0.jpg", "sample-1-1.jpg"]
    with Image.open(run / "eval_pictures" / "0-0.jpg") as picture:
        assert "comment" in picture.info
    for path in pictures:
        with Image.open(path) as picture:
            assert "comment" not in picture.info and not picture.getexif()
    adapter_card(staged, run, samples=1)
    assert len(list((staged / "assets").glob("sample-*"))) == 1  # of the card before none is left


def test_samples_that_are_not_there_are_an_error(staged, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "eval_pictures")
    with pytest.raises(UserError, match=r"0-0\.jpg of a sample cannot be read"):
        adapter_card(staged, other, samples=1)
    (other / "eval_answers.jsonl").write_text('{"step": "0"}\n')
    with pytest.raises(UserError, match="cannot be read"):
        adapter_card(staged, other, samples=1)
    (other / "eval_answers.jsonl").unlink()
    with pytest.raises(UserError, match="--eval_prompts"):
        adapter_card(staged, other, samples=1)


def test_of_an_unknown_folder_nothing_is_invented(staged):
    card = adapter_card(staged, None, verification=None)
    data = front_matter(staged)
    assert "model-index" not in data and "license" not in data and "datasets" not in data
    for absent in ("## Training", "## Data", "## Versions", "assets/", "It was trained on"):
        assert absent not in card.text
    for said in ("How it was trained is not recorded", "No evaluation is recorded", "was not loaded again"):
        assert said in card.text
    assert "Which languages it was trained on is not stated" in card.text
    assert "## License\n\nNo license is stated" in card.text and not (staged / "training.json").exists()


def test_of_a_new_model_the_parts_are_told(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "staged")
    TrainingFacts(base=[{"name": name, "commit": COMMIT} for name in ("org/words", "org/tower")]).save(folder)
    card = write_card(folder, kind="model", repo_id="user/model")
    assert front_matter(folder)["base_model"] == ["org/words", "org/tower"]
    assert "No training of the whole is recorded" in card.text and "## Training" not in card.text


def test_what_hostile_facts_say_stays_text(staged, run):
    rows = rendered(adapter_card(staged, run)).count("<tr>")
    facts = json.loads((staged / "training.json").read_text())
    facts["sources"][0] |= {"name": "a|b\n\n# Buy <script src=x>: [x](y)", "format": "*b* `c`"}
    facts["device"], facts["trained"][0]["dtype"] = "x\n\n# y", "`|`"
    facts["settings"] |= {"optim": "x`y", "lora_r": "# z"}
    facts["base"] = [{"name": "a/b\n---\nlicense: mit", "commit": "../.."}]
    (staged / "training.json").write_text(json.dumps(facts))
    page = rendered(adapter_card(staged, None))
    assert len(re.findall("<h1>", page)) == 1 and "<script" not in page and '"y"' not in page
    assert "# Buy &lt;script src=x&gt;: [x](y)</td>" in page and page.count("<tr>") == rows
    assert "license" not in front_matter(staged) and front_matter(staged)["base_model"] == "org/base"


@pytest.mark.parametrize("name", ["user/../name", "user/na me", 'user/x"); import os; ("', "a/b/c", "-x/y", "u/```"])
def test_names_that_could_be_code_are_refused(staged, run, name):
    with pytest.raises(UserError, match="no name that the Hub takes"):
        write_card(staged, kind="adapter", repo_id=name, run=run, base="org/base")
    with pytest.raises(UserError, match="no name that the Hub takes"):
        adapter_card(staged, run, base=name)
    assert not (staged / "README.md").exists()


@pytest.mark.parametrize("revision", ['main", trust_remote_code=True, x="', "a\n```\n# b", "../x"])
def test_revisions_that_could_be_code_are_refused(staged, run, revision):
    with pytest.raises(UserError, match="no revision"):
        adapter_card(staged, run, base_revision=revision)


def put_on_hub(cache: Path, name: str, front: str) -> None:
    """A model of the Hub with a card, in the cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def test_the_license_is_that_of_the_base(staged, run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    put_on_hub(tmp_path / "cache", "org/base", "license: other\nlicense_name: the-license\nlicense_link: LICENSE")
    put_on_hub(tmp_path / "cache", "org/tower", "license: mit")
    card = adapter_card(staged, run)
    data = front_matter(staged)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "the-license", "LICENSE")
    assert "the-license, taken over from [org/base]" in card.text
    card = adapter_card(staged, run, license="apache-2.0")
    assert "apache-2.0, as stated by who uploaded it. What it was made of has a license of its own: [org" in card.text
    assert front_matter(staged)["license"] == "apache-2.0" and "license_name" not in front_matter(staged)
    # Of two parts with different ones nobody can say without asking.
    facts = json.loads((staged / "training.json").read_text())
    facts["base"] = [{"name": name, "commit": COMMIT} for name in ("org/base", "org/tower")]
    (staged / "training.json").write_text(json.dumps(facts))
    write_card(staged, kind="model", repo_id="user/model", verification=verified())
    data = front_matter(staged)
    assert "license" not in data
    assert (data["base_model"], data["base_model_relation"]) == (["org/base", "org/tower"], "merge")


def test_what_yaml_takes_for_something_else_survives(staged, run, tmp_path, monkeypatch):
    """Norwegian is `no`, and a license's name may be a version or a date."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    put_on_hub(tmp_path / "cache", "org/base", "license: other\nlicense_name: 2.0\nlicense_link: 2026-11-28")
    card = adapter_card(staged, run, language=["no", "on"])
    data = front_matter(staged)
    assert (data["license_name"], data["license_link"], data["language"]) == ("2.0", "2026-11-28", ["no", "on"])
    assert ModelCard.load(staged / "README.md").data.language == ["no", "on"]
    assert "Which languages" not in card.text


def test_data_of_the_hub_is_named(staged, run):
    adapter_card(staged, run)
    facts = json.loads((staged / "training.json").read_text())
    facts["sources"] = [{"name": f"org/rows:{split}", "on_hub": True, "format": "messages"} for split in ("a", "b")]
    (staged / "training.json").write_text(json.dumps(facts))
    card = adapter_card(staged, None)
    assert front_matter(staged)["datasets"] == ["org/rows"]
    assert "https://huggingface.co/datasets/org/rows" in rendered(card)


def test_the_best_weights_have_the_best_loss(staged, run):
    adapter_card(staged, run)
    facts = json.loads((staged / "training.json").read_text())
    facts["evaluated"] = [[2, 3.0], [4, 1.0], [6, 2.0]]
    for keeps_best, loss in ((False, 2.0), (True, 1.0)):
        facts["settings"]["load_best_model_at_end"] = keeps_best
        (staged / "training.json").write_text(json.dumps(facts))
        assert f"**{loss:g}**" in adapter_card(staged, None).text
        assert front_matter(staged)["model-index"][0]["results"][0]["metrics"][0]["value"] == loss


def test_the_outcome_of_the_verification_is_told(staged, run):
    right = adapter_card(staged, run).text
    assert "by plain transformers" in right and "1.5e-07 of the largest" in right
    wrong = adapter_card(staged, run, verification=verified(differences=["the answer is <b> instead of 'a'"]))
    assert "answered otherwise: the answer is &#60;b&#62;" in wrong.text and "1.5e-07" not in wrong.text


def test_the_hub_finds_the_card_valid(staged, run, monkeypatch):
    """The client asks it before each commit with a README; older ones ask no other Hub in `card.validate()`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_loopback")
        api.create_repo("user/my_adapter")
        card = adapter_card(staged, run, license="llama2", language=["en", "de"], samples=1)
        api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="user/my_adapter")
        assert "POST /api/validate-yaml" in hub.requests
        card.data["license"] = "no such license"
        with pytest.raises(ValueError, match="license"):
            api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="user/my_adapter")


def said_by(program: str, folder: Path, names: dict[str, Path]) -> str:
    """What the program prints, run where there is photo.jpg, with folders in place of the names on the Hub."""
    for name, path in names.items():
        assert f'"{name}"' in program
        program = program.replace(f'"{name}"', json.dumps(str(path)))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        exec(compile(program, "card", "exec"), {})
    return printed.getvalue().strip()


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def answer_of(folder: Path, photo: Path) -> str:
    conversation = Conversation(*load_for_answering(str(folder)))
    return conversation.ask("What is in the picture?", [open_image(photo)], max_new_tokens=128)


def test_the_program_for_an_adapter_answers(staged, run, tiny_checkpoint, photo):
    [program] = programs(adapter_card(staged, run))
    assert f'revision="{COMMIT}"' in program
    said = said_by(program, photo.parent, {"user/my_adapter": staged, "org/base": tiny_checkpoint})
    assert said == answer_of(run, photo) != answer_of(tiny_checkpoint, photo)


def test_the_programs_for_a_model_answer(tiny_checkpoint, tmp_path, photo):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "staged")
    card = write_card(folder, kind="model", repo_id="user/model")
    assert front_matter(folder)["library_name"] == "transformers"
    answers = {said_by(program, tmp_path, {"user/model": folder}) for program in programs(card)}
    assert len(programs(card)) == 2 and answers == {answer_of(tiny_checkpoint, photo)} != {""}


def test_the_program_for_an_original_model_answers(tiny, tiny_processor, tmp_path, photo, monkeypatch):
    folder = tmp_path / "staged"
    model = tiny.model()
    monkeypatch.chdir(tmp_path)
    model.config.vision_config.save_pretrained("org/tower")  # which the original's settings name
    model.config.vision_tower_name = "org/tower"
    model.save_pretrained(folder, checkpoint_format="llava")
    tiny_processor.save_pretrained(folder)
    card = write_card(folder, kind="model", repo_id="user/model")
    assert front_matter(folder)["library_name"] == "hf_llava_ft"
    [program] = programs(card)
    assert said_by(program, tmp_path, {"user/model": folder}) == answer_of(folder, photo)


def test_a_projector_says_how_stage_2_takes_it(tmp_path, tiny, monkeypatch):
    from hf_llava_ft.checkpoints.original_folders import write_projector

    folder, model = tmp_path / "staged", tiny.model()
    folder.mkdir()
    model.config.vision_tower_name = "org/tower"
    write_projector(model, folder)
    card = write_card(folder, kind="projector", repo_id="user/projector", base="org/words")
    assert "pipeline_tag" not in front_matter(folder)
    [program] = programs(card, "sh")
    download, command = program.split("\n", 1)
    words = shlex.split(command.replace("\\\n", " "))
    assert shlex.split(download) == ["hf", "download", "user/projector", "--local-dir", "projector"]
    assert words[:2] == ["llava-ft", "train"]
    model_args, _, tuning_args, _ = resolve([*words[2:], "--use_cpu", "True"]).build()
    assert (model_args.model_name_or_path, model_args.vision_tower) == ("org/words", "org/tower")
    folder.rename(tmp_path / "projector")
    monkeypatch.chdir(tmp_path)
    assert len(read_projector_of(model_args.pretrain_mm_mlp_adapter)) == 4
    with pytest.raises(UserError, match="org/words"):  # it is not here
        check_starting_point(model_args, tuning_args)


MADE = """
import json, sys
from pathlib import Path
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.hub.model_card import write_card
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.train import train

train(*resolve(sys.argv[1:]).build())
merged = merge_adapter("out", "merged")
write_card(Path("out"), kind="adapter", repo_id="user/adapter")
write_card(Path("merged"), kind="model", repo_id="user/merged", verification=merged.verification)
"""

STRANGER = """
import contextlib, io, json, sys
sys.modules["hf_llava_ft"] = None
answers = []
for program in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    answers.append(printed.getvalue().strip())
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_stranger_runs_what_the_cards_tell(run, tiny, tiny_processor, tiny_checkpoint, tmp_path, photo):
    """From a base on the Hub to a merged model there: cards name base and license, and their programs run as they are,
    where this package is not."""
    coded = tmp_path / "coded"  # what transformers has no class for
    tiny.model(projector_type="linear").save_pretrained(coded)
    tiny_processor.save_pretrained(coded)
    assert (coded / "modeling_llava.py").is_file()
    coded_card = write_card(coded, kind="model", repo_id="user/coded")
    assert "trust_remote_code=True" in coded_card.text
    with LoopbackHub() as hub:
        base = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
        commit = hub.upload("models/org/base", base | {"README.md": b"---\nlicense: llama2\n---\n"})
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        flags = f"--model_name_or_path org/base --data_path rows.json --image_folder {run.parent / 'images'}"
        flags += " --output_dir out --use_cpu True --max_steps 4 --learning_rate 0.02 --lora_r 4 --save_strategy no"
        shutil.copyfile(run.parent / "my | rows.json", tmp_path / "rows.json")
        command = [sys.executable, "-c", MADE, *flags.split()]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
        hub.upload("models/org/base", {"config.json": b"{}"}, title="main moves on, and is of no use any more")
        cards = {name: ModelCard.load(tmp_path / name / "README.md") for name in ("out", "merged")}
        for card, relation in ((cards["out"], "adapter"), (cards["merged"], "finetune")):
            assert (card.data.base_model, card.data.base_model_relation) == ("org/base", relation)
            assert card.data.license == "llama2" and commit in card.text
        assert "merged into it" in cards["merged"].text and "rank 4" in cards["merged"].text
        assert json.loads((tmp_path / "merged" / "training.json").read_text())["numbers"]["steps"] == 4
        for folder, name in (("out", "adapter"), ("merged", "merged"), ("coded", "coded")):
            hub.upload(f"models/user/{name}", tmp_path / folder)
        told = [program for card in (*cards.values(), coded_card) for program in programs(card)]
        done = subprocess.run(
            [sys.executable, "-c", STRANGER],
            input=json.dumps(told),
            cwd=photo.parent,
            env=environment | {"HF_HOME": str(tmp_path / "empty")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        adapted, *merged, coded_1, coded_2 = json.loads(done.stdout.splitlines()[-1])
    assert merged == [answer_of(tmp_path / "merged", photo)] * 2 and adapted == merged[0]
    assert coded_1 == coded_2 == answer_of(coded, photo)
    assert len({adapted, coded_1, answer_of(tiny_checkpoint, photo)}) == 3
