"""`accelerate launch -m hf_llava_ft.evaluate`: two processes, each its rows, give what one gives."""

import json

import pytest

from hf_llava_ft.answering.ranks import ALONE, Ranks
from tests import ranks

MODULE = "hf_llava_ft.evaluate"


def arguments(checkpoint, data, folder, into):
    found = ["--model", checkpoint, "--data_path", data, "--image_folder", folder, "--output_dir", into]
    return [*found, "--metric", "anls,loss", "--max_new_tokens", 4, "--batch_size", 1, "--device", "cpu", "--alone"]


def rows_in(path):
    return [json.loads(line)["row"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_processes_give_what_one_gives(llava_ft, own_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(7, with_text_rows=True)
    one, two, result = tmp_path / "one", tmp_path / "two", tmp_path / "result.json"
    code, _, err = llava_ft("evaluate", *arguments(own_checkpoint, data, folder, one))
    assert code == 0, err
    flags = [*arguments(own_checkpoint, data, folder, two), "--json", result]
    going_on = ranks.Run("ddp", flags, tmp_path / "logs", module=MODULE)
    assert going_on.wait() == 0, going_on.all_printed()
    assert (two / "answers-tuned.jsonl").read_bytes() == (one / "answers-tuned.jsonl").read_bytes()
    assert rows_in(two / "losses-tuned.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    figures = [json.loads(path.read_text())["figures"] for path in (one / "result.json", result)]
    for single, shared in zip(*figures, strict=True):
        assert shared["figure"] == single["figure"]
        assert shared["tuned"] == pytest.approx(single["tuned"], rel=1e-5)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    said = [going_on.printed(rank) for rank in range(2)]
    assert "7 rows" in said[0] and "report.html" in said[0] and "report.html" not in said[1]


@pytest.mark.slow
def test_killed_processes_leave_their_rows_to_any_number_of_others(llava_ft, own_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(40)
    into, part = tmp_path / "found", ".answers-tuned.jsonl.part"
    parts = [into / f"{part}{rank}" for rank in range(2)]
    flags = arguments(own_checkpoint, data, folder, into)
    going_on = ranks.Run("ddp", flags, tmp_path / "logs", module=MODULE)
    assert going_on.until(lambda: all(path.exists() and path.stat().st_size for path in parts))
    going_on.kill()
    before = [rows_in(path) for path in parts]
    assert not set(before[0]) & set(before[1]) and 0 < sum(map(len, before)) < 40
    assert {row % 2 for row in before[0]} == {1} and {row % 2 for row in before[1]} == {0}
    with parts[1].open("a") as file:
        file.write('{"row": 39, "ans')  # what a kill leaves of a line

    code, _, err = llava_ft("evaluate", *flags)
    assert code == 0, err
    assert f"goes on: {sum(map(len, before))} of 40 rows are there" in " ".join(err.split())
    assert rows_in(into / "answers-tuned.jsonl") == list(range(1, 41)) and not list(into.glob(f"{part}*"))


@pytest.mark.slow
def test_what_the_first_refuses_all_refuse(own_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(4)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "answers-tuned.jsonl").write_text("{}\n")
    flags = arguments(own_checkpoint, data, folder, tmp_path / "found")
    going_on = ranks.Run("ddp", flags, tmp_path / "logs", module=MODULE)
    for process in going_on.processes:
        process.join(120)
    assert [process.exitcode for process in going_on.processes] == [2, 2]
    assert all("is there already" in going_on.printed(rank) for rank in range(2))


def test_shares_are_all_of_it_and_nothing_twice():
    for count in (1, 2, 3):
        shares = [list(Ranks(rank, count).share(range(7))) for rank in range(count)]
        assert sorted(sum(shares, [])) == list(range(7))
        assert [len(share) for share in shares] == [Ranks(rank, count).size_of_share(7) for rank in range(count)]
    assert ALONE.from_first(lambda: 3) == 3
