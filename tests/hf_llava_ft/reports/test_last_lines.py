"""What a run says in the end."""

from pathlib import Path

from hf_llava_ft.reports.last_lines import last_lines


def line(step, index, answer, **more):
    return {"step": step, "index": index, "prompt": f"Question {index}?", "images": [], "answer": answer, **more}


def test_answers_before_and_after_and_the_next_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "my images" / "0.png"
    answers = [line(step, index, f"{step} of {index}") for step in (0, 5, 9) for index in range(4)]
    answers[0] |= {"images": ["0.png"], "expected": "It is\nright."}
    answers[8] |= {"images": ["0.png"], "expected": "It is\nright."}
    said = last_lines(Path("out dir"), answers, is_adapter=True, are_held_out=True, picture=str(picture))
    assert said == [
        "Asked, of rows that were not trained on:",
        "  Question 0? (0.png)",
        "    expected: It is right.",
        "    before:   0 of 0",
        "    after:    9 of 0",
        "  Question 1?",
        "    before:   0 of 1",
        "    after:    9 of 1",
        "  Question 2?",
        "    before:   0 of 2",
        "    after:    9 of 2",
        "The result is at out dir, its report is out dir/report.html.",
        "Next:",
        "  llava-ft chat --model 'out dir' --image 'my images/0.png'",
        "  llava-ft evaluate --model 'out dir' --eval_split 'out dir'",
        "  llava-ft merge --adapter 'out dir' --output_dir 'out dir-merged'",
    ]


def test_without_answers_it_says_how_to_get_some_and_a_whole_model_is_not_merged():
    said = last_lines(Path("out"), [], is_adapter=False, are_held_out=True)
    assert "--eval_split" in said[1] and "merge" not in "".join(said)
    assert said[-1] == "  llava-ft push out --repo_id USER/NAME"


def test_a_single_time_is_no_before_and_long_answers_are_cut():
    said = last_lines(Path("out"), [line(9, 0, "word " * 100)], is_adapter=True, are_held_out=False)
    assert said[0] == "Asked, of --eval_prompts:" and "before" not in "".join(said)
    assert said[2].endswith("...") and len(said[2]) < 270
    [empty] = [
        each
        for each in last_lines(Path("out"), [line(9, 0, " ")], is_adapter=True, are_held_out=False)
        if "after" in each
    ]
    assert empty.endswith("(nothing)")
