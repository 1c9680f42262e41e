"""What the two command lines, train_expert.py and adapt.py, promise."""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from glob import glob
from pathlib import Path

import pytest
import torch

import adapt
import train_expert
import transformer2 as t2
from conftest import TOKENIZER, logits, make, random_expert, relative, toy
from tasks import interval
from tasks.log import TrainingLog, read_log, step_line
from tasks.test_tasks import hub as hub  # a fixture

SCRIPTS = Path(train_expert.__file__).parent
FEW = "--batch-size 4 --validation-problems 4 --test-problems 4 --max-new-tokens 3".split()
SHORT_SEARCH = "--shots 2 --population 4 --iterations 1 --test-problems 4".split()
TWO_TASKS = ["--task", "addition", "reversal", "--steps", "1", *FEW]


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script in an empty folder with a random model MODEL; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("MODEL")
    TOKENIZER.save_pretrained("MODEL")

    def run(script, *arguments: str) -> str:
        command = [script.__name__, "--model", "MODEL", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(run_script, capsys) -> Callable[..., str]:
    """Runs a script that has to end with exit code 2 and one sentence; gives the sentence."""

    def run(script, *arguments: str) -> str:
        def main() -> None:
            run_script(script, *arguments)

        with pytest.raises(SystemExit) as stop:
            train_expert.guarded(main)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 0
        return error

    return run


def save_experts(
    folder: str, categories: list[str], suffix: str = "expert", model: str = "MODEL", **facts: str
) -> None:
    """Random experts, one for each category; that of "classify" is the classifier."""
    svf_model = t2.apply_svf(make())
    for seed, category in enumerate(categories):
        name = category if category == "classify" else f"{category}-{suffix}"
        path = Path(folder, f"{name}.safetensors")
        expert = random_expert(svf_model, seed)
        t2.save_expert(expert, path, category=category, model=model, **facts)


@pytest.fixture
def interrupt_before_saving(run_script, monkeypatch) -> Callable[..., None]:
    """Runs train_expert.py, and interrupts it just before the expert of a task is saved."""

    def run(task_name: str, *arguments: str) -> None:
        def save_expert(expert, path, **facts):
            if facts["task"] == task_name:
                raise KeyboardInterrupt
            t2.save_expert(expert, path, **facts)

        with monkeypatch.context() as patch:
            patch.setattr(train_expert, "save_expert", save_expert)
            with pytest.raises(KeyboardInterrupt):
                run_script(train_expert, *arguments)

    return run


# ---- train_expert.py ----------------------------------------------------------------------------


def test_training_writes_one_expert_a_task_and_a_table(run_script):
    printed = run_script(train_expert, *TWO_TASKS)
    names = ["addition.safetensors", "reversal.safetensors"]
    assert sorted(glob("*.safetensors", root_dir="experts/MODEL")) == names
    table = printed.partition("held-out accuracy, base -> expert\n")[2]
    for name in names:
        assert f"experts/MODEL/{name}" in table


def test_an_expert_says_where_it_comes_from(run_script):
    run_script(train_expert, "--task", "addition", "--steps", "1", "--kl", "0.1", *FEW)
    facts = adapt.read_headers(Path("experts/MODEL"), "MODEL")["addition"]
    assert facts["task"] == "addition"
    assert facts["category"] == "arithmetic"
    assert facts["model"] == "MODEL"
    assert facts["targets"] == "mlp"
    assert facts["steps"] == 1
    assert facts["kl_coef"] == 0.1
    assert facts["problems"] == 4
    assert 0 <= float(facts["accuracy"]) <= 1


def test_layers_trains_the_last_share_of_the_blocks(run_script):
    run_script(train_expert, "--task", "addition", "--steps", "1", "--layers", "0.5", *FEW)
    expert = t2.load_expert("experts/MODEL/addition.safetensors")
    names = [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
    assert sorted(expert) == names


def test_an_expert_of_half_the_layers_fits_the_whole_model():
    half = make()
    t2.apply_svf(half, train_expert.last_blocks(half, "mlp", 0.5))
    whole = t2.apply_svf(make())
    expert = random_expert(half)
    assert {name.split(".")[2] for name in expert} == {"1"}
    with t2.use_expert(half, expert), t2.use_expert(whole, expert):
        assert relative(logits(whole), logits(half)) < 1e-4


def test_the_summary_does_without_the_resource_module(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    printed = run_script(train_expert, "--task", "addition", "--steps", "0", *FEW)
    assert printed.endswith("of the model\n")


def test_resume_trains_nothing_again(run_script, interrupt_before_saving):
    interrupt_before_saving("reversal", *TWO_TASKS)
    assert "step   1" not in run_script(train_expert, *TWO_TASKS, "--resume")


@pytest.mark.parametrize(
    "place, name, calls",
    [
        (t2.Progress, "save", 0),  # before the first checkpoint
        (t2.Progress, "save", 2),  # after a step
        (train_expert, "save_expert", 0),
        (train_expert, "save_expert", 1),  # between the two tasks
        (train_expert, "remove_progress", 0),  # all experts are saved
    ],
)
def test_an_interrupted_run_ends_with_the_same_experts_and_leaves_nothing_else(
    run_script, monkeypatch, place, name, calls
):
    def get_task(name: str) -> t2.Task:
        return replace(toy(lambda text, problem: len(text) / 7), name=name)

    monkeypatch.setattr(train_expert, "get_task", get_task)
    arguments = ["--task", "one", "two", "--steps", "3", "--lr", "0.1", *FEW]
    run_script(train_expert, *arguments, "--out", "whole")
    function = getattr(place, name)
    done = []

    def stop_after_some_calls(*given, **options):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(name)
        return function(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stop_after_some_calls)
        with pytest.raises(KeyboardInterrupt):
            run_script(train_expert, *arguments)
    run_script(train_expert, *arguments, "--resume")

    for task_name in ("one", "two"):
        expert = Path("experts/MODEL", f"{task_name}.safetensors")
        whole = Path("whole/MODEL", f"{task_name}.safetensors")
        assert expert.read_bytes() == whole.read_bytes()
        assert (t2.load_expert(expert)["model.layers.0.mlp.up_proj"] != 1).all()
        assert [line["step"] for line in read_lines(task_name)] == [0, 1, 2, 3]
    names = ["one.log.jsonl", "one.safetensors", "two.log.jsonl", "two.safetensors"]
    assert sorted(os.listdir("experts/MODEL")) == names


def test_nothing_is_left_of_the_progress_but_experts_and_logs(run_script):
    run_script(train_expert, *TWO_TASKS)
    assert sorted(os.listdir("experts/MODEL")) == [
        "addition.log.jsonl",
        "addition.safetensors",
        "reversal.log.jsonl",
        "reversal.safetensors",
    ]


def test_without_resume_training_begins_again(run_script, interrupt_before_saving):
    interrupt_before_saving("addition", *TWO_TASKS)
    assert "step   1" in run_script(train_expert, *TWO_TASKS)


@pytest.mark.parametrize("change", [["--token-budget", "64"], ["--checkpointing"]])
def test_resume_goes_on_with_less_memory(run_script, interrupt_before_saving, change):
    interrupt_before_saving("addition", *TWO_TASKS)
    run_script(train_expert, *TWO_TASKS, "--resume", *change)
    assert Path("experts/MODEL/reversal.safetensors").exists()


@pytest.mark.parametrize(
    "change, name",
    [(["--lr", "0.5"], "lr"), (["--seed", "5"], "seed"), (["--layers", "0.5"], "layers")],
)
def test_resume_refuses_another_run_and_says_what_differs(
    refusal, interrupt_before_saving, change, name
):
    interrupt_before_saving("addition", *TWO_TASKS)
    for log in glob("experts/MODEL/*.log.jsonl"):
        os.remove(log)  # it would be refused likewise
    error = refusal(train_expert, *TWO_TASKS, "--resume", *change)
    assert "addition.state" in error
    assert re.search(rf"\b{name}\b", error)


def test_a_model_that_does_not_fit_the_gpu_is_one_sentence(refusal, monkeypatch):
    def run_out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_expert, "apply_svf", run_out_of_memory)
    assert "take a smaller model" in refusal(train_expert, "--task", "addition", *FEW)


def test_a_built_in_model_is_pretrained_once(run_script, monkeypatch):
    pretrained = []

    def pretrain():
        pretrained.append("tiny")
        return make(), TOKENIZER

    monkeypatch.setitem(train_expert.BUILT_IN_MODELS, "tiny", pretrain)
    first, _ = train_expert.load_model("tiny")
    second, _ = train_expert.load_model("tiny")
    assert pretrained == ["tiny"]
    assert torch.equal(logits(first), logits(second))
    [folder] = os.listdir(train_expert.CACHE)
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", folder)


def test_without_a_model_the_first_line_says_which_and_why(run_script, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(train_expert.BUILT_IN_MODELS, "tiny", lambda: (make(), TOKENIZER))
    monkeypatch.setattr(sys, "argv", ["train_expert", "--steps", "0", *FEW])
    train_expert.main()
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line == "model tiny: no GPU here, so the built-in one (choose with --model)"
    assert len(glob("experts/tiny/*.safetensors")) == 4


# ---- The log of a training run ------------------------------------------------------------------


def read_lines(task_name: str = "addition", kind: str = "step") -> list[dict]:
    """The lines of a log. kind: those that have this, but of "step" only the lines of figures."""
    lines = []
    for line in Path(f"experts/MODEL/{task_name}.log.jsonl").read_text().splitlines():
        content = json.loads(line)
        if kind in content and not (kind == "step" and "samples" in content):
            lines.append(content)
    return lines


def folder_bytes(folder: str = "experts") -> dict[str, bytes]:
    """Path -> content, for all files of a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}


@pytest.fixture
def train_on(run_script, monkeypatch) -> Callable[..., str]:
    """Trains on the task `toy` with this reward and gives what is printed. more: as for Task."""

    def run(reward: Callable[[str, dict], float], *arguments: str, **more: object) -> str:
        monkeypatch.setattr(train_expert, "get_task", lambda name: toy(reward, **more))
        return run_script(train_expert, "--task", "toy", *FEW, *arguments)

    return run


@pytest.fixture
def killed_run(run_script) -> list[str]:
    """The arguments of a run of train_expert.py that is killed after some of its 100 steps."""
    arguments = ["--task", "addition", "--steps", "100", "--sample-every", "2", *FEW]
    command = [sys.executable, str(SCRIPTS / "train_expert.py"), "--model", "MODEL", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = Path("experts/MODEL/addition.log.jsonl")
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    time.sleep(random.random() / 5)
    process.kill()
    process.wait()
    return arguments


def test_the_log_begins_with_settings_seed_and_versions(run_script):
    run_script(train_expert, *TWO_TASKS, "--seed", "5", "--lr", "0.5")
    first, *others = [json.loads(line) for line in open("experts/MODEL/reversal.log.jsonl")]
    settings = first["settings"]
    assert settings["model"] == "MODEL"
    assert settings["task"] == "reversal"
    assert settings["targets"] == "mlp"
    assert settings["layers"] == 1
    assert settings["max_new_tokens"] == 3
    hyper = {"steps": 1, "batch_size": 4, "lr": 0.5, "seed": 5, "validation_problems": 4}
    assert settings | asdict(t2.Hyperparameters(**hyper)) == settings
    assert first["seed"] == 5
    assert first["versions"]["torch"] == torch.__version__
    assert sorted(first["versions"]) == ["python", "torch", "transformers"]
    assert not any("settings" in line for line in others)


def test_the_log_has_the_figures_of_each_step_that_the_terminal_shows(train_on):
    arguments = ["--steps", "11", "--kl-coef", "0.1", "--lr", "0.1"]
    printed = train_on(lambda text, problem: len(text) / 7, *arguments)
    lines = read_lines("toy")
    assert [line["step"] for line in lines] == list(range(12))
    shown = []
    for line in lines:
        assert line.pop("peak_memory_gib") > 0
        shown.append(step_line(t2.StepStats(**line)))
    printed = re.sub(r"  \d+:\d\d left$", "", printed, flags=re.MULTILINE)
    assert re.findall("^step .*", printed, re.MULTILINE) == shown


def test_the_time_left_is_that_of_the_steps_left(tmp_path):
    log = TrainingLog(tmp_path / "toy.log.jsonl", {"steps": 8, "seed": 0}, sample_every=10)
    log.on_step(t2.StepStats(3, reward=0.0, grad_norm=0.0, seconds=0.0), [])  # a resumed run
    assert log.time_left(3) == ""
    log.start_time = time.time() - 60  # 60 seconds ago
    assert log.time_left(5) == "  1:30 left"
    assert log.time_left(8) == ""


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_run_that_goes_on_writes_nothing_into_the_log_of_a_newer_one(tmp_path, steps_before):
    path = tmp_path / "toy.log.jsonl"
    older = TrainingLog(path, {"steps": 9, "seed": 1}, sample_every=10)
    newer = TrainingLog(path, {"steps": 9, "seed": 2}, sample_every=10)

    def write_step(log: TrainingLog, step: int) -> None:
        seed = float(log.settings["seed"])  # as the reward, to tell the lines of the two apart
        log.on_step(t2.StepStats(step, reward=seed, grad_norm=0.0, seconds=0.0), [])

    older.start()
    for step in range(steps_before):
        write_step(older, step)
    newer.start()
    write_step(newer, 0)
    write_step(older, steps_before)
    write_step(newer, 1)
    write_step(older, steps_before + 1)
    first, *others = read_log(path)
    assert first["seed"] == 2
    assert [(line["step"], line["reward"]) for line in others] == [(0, 2.0), (1, 2.0)]


def test_a_figure_that_does_not_exist_is_null(run_script):
    run_script(train_expert, "--task", "addition", "tiny-classify", "--steps", "2", *FEW)
    start, first, second = read_lines()
    assert start["validation"] is not None
    assert {start["reward"], start["lr"], start["grad_norm"], start["cut_off"]} == {None}
    assert first["kl"] is None  # λ = 0
    assert first["validation"] is None
    assert second["validation"] is not None
    _, first, _ = read_lines("tiny-classify")
    assert {first["mean_length"], first["cut_off"], first["tokens_per_second"]} == {None}


def test_the_log_has_answers_every_few_steps_and_in_the_last(run_script):
    arguments = ["--task", "addition", "--steps", "5", "--sample-every", "2", *FEW]
    run_script(train_expert, *arguments)
    lines = read_lines(kind="samples")
    assert [line["step"] for line in lines] == [2, 4, 5]
    references = {}
    for problem in train_expert.get_task("addition").problems("train"):
        references[problem["question"]] = problem["answer"]
    for line in lines:
        assert len(line["samples"]) == 3
        for sample in line["samples"]:
            assert isinstance(sample["answer"], str)
            assert sample["reward"] == -1  # of a random model
            assert sample["reference"] == references[sample["question"]]


def test_a_killed_run_leaves_whole_lines_only(killed_run):
    log = Path("experts/MODEL/addition.log.jsonl").read_text()
    assert log.endswith("\n")
    numbers = [json.loads(line).get("step", -1) for line in log.splitlines()]
    assert 2 <= max(numbers) < 100
    assert numbers == sorted(numbers)


def test_resume_goes_on_in_the_log_without_a_gap_or_a_repeated_step(killed_run, run_script):
    before = read_lines()
    run_script(train_expert, *killed_run, "--resume")
    lines = read_lines()
    assert [line["step"] for line in lines] == list(range(101))
    assert [line["step"] for line in read_lines(kind="samples")] == list(range(2, 101, 2))
    assert lines[: len(before) - 1] == before[:-1]  # the last may have been trained again


def test_resume_trains_the_steps_again_that_are_in_the_log_only(
    run_script, interrupt_before_saving
):
    log, progress = Path("experts/MODEL/addition.log.jsonl"), "experts/MODEL/addition.state"
    interrupt_before_saving("addition", *TWO_TASKS)
    before = log.read_text()
    os.remove(progress)
    log.write_text(before + '{"step": 2, "rew')  # a full disk
    run_script(train_expert, *TWO_TASKS, "--resume")
    assert [line["step"] for line in read_lines()] == [0, 1]


def test_resume_without_a_log_starts_one(run_script, interrupt_before_saving):
    arguments = ["--task", "addition", "reversal", "--steps", "2", *FEW]
    interrupt_before_saving("addition", *arguments)
    os.remove("experts/MODEL/reversal.log.jsonl")
    run_script(train_expert, *arguments, "--resume")
    assert [line["step"] for line in read_lines("reversal")] == [0, 1, 2]
    assert len(read_lines("reversal", "settings")) == 1


@pytest.mark.parametrize(
    "change, name",
    [
        (["--lr", "0.5"], "lr"),
        (["--seed", "5"], "seed"),
        (["--layers", "0.5"], "layers"),
        (["--kl-coef", "0.1"], "kl_coef"),
        (["--max-new-tokens", "4"], "max_new_tokens"),
        (["--targets", "attention"], "targets"),
    ],
)
def test_resume_refuses_a_log_of_other_settings(run_script, refusal, change, name):
    run_script(train_expert, *TWO_TASKS)
    before = folder_bytes()
    error = refusal(train_expert, *TWO_TASKS, "--resume", *change)
    assert f"addition.log.jsonl belongs to a run with other settings ({name})" in error
    assert folder_bytes() == before


def test_resume_refuses_a_log_that_is_none(run_script, refusal):
    run_script(train_expert, *TWO_TASKS)
    Path("experts/MODEL/addition.log.jsonl").write_text("5\n")
    before = folder_bytes()
    error = refusal(train_expert, *TWO_TASKS, "--resume")
    assert "addition.log.jsonl is not the log of a training run" in error
    assert folder_bytes() == before


def test_resume_takes_a_log_of_other_versions(run_script):
    run_script(train_expert, *TWO_TASKS)
    log = Path("experts/MODEL/addition.log.jsonl")
    log.write_text(log.read_text().replace(torch.__version__, "1.0"))
    run_script(train_expert, *TWO_TASKS, "--resume")
    assert [line["step"] for line in read_lines()] == [0, 1]


def test_a_new_run_replaces_log_and_expert_together(run_script, interrupt_before_saving):
    run_script(train_expert, *TWO_TASKS, "--lr", "0.5")
    interrupt_before_saving("addition", *TWO_TASKS)
    assert not glob("experts/MODEL/*.safetensors")
    assert [line["step"] for line in read_lines()] == [0, 1]
    run_script(train_expert, *TWO_TASKS, "--resume")


def test_a_log_that_cannot_be_written_is_met_before_anything_is_overwritten(run_script, refusal):
    run_script(train_expert, *TWO_TASKS)
    os.remove("experts/MODEL/reversal.log.jsonl")
    os.mkdir("experts/MODEL/reversal.log.jsonl")
    before = folder_bytes()
    error = refusal(train_expert, *TWO_TASKS, "--lr", "0.5")
    assert error.startswith("error: cannot write experts/MODEL/reversal.log.jsonl: ")
    assert folder_bytes() == before


def test_a_dataset_that_cannot_be_read_is_met_before_anything_is_overwritten(
    run_script, refusal, monkeypatch
):
    def missing(split):
        raise t2.Transformer2Error("there is no dataset")

    run_script(train_expert, *TWO_TASKS)
    before = folder_bytes()
    task = train_expert.get_task("reversal")
    monkeypatch.setitem(train_expert.TASKS, "reversal", lambda: replace(task, problems=missing))
    assert "no dataset" in refusal(train_expert, *TWO_TASKS, "--lr", "0.5")
    assert folder_bytes() == before


def test_a_question_with_one_option_is_met_before_anything_is_overwritten(hub, refusal):
    option = {"label": ["A"], "text": ["oak"]}
    row = {"question": "Which?", "choices": option, "answerKey": "A"}
    hub(train=[row, row], test=[row])
    save_experts("experts/MODEL", ["arc-easy"], suffix="scored")
    before = folder_bytes()
    error = refusal(train_expert, "--task", "arc-easy-scored", *FEW)
    assert error == "error: ARC-Easy: 'Which?' has only one option"
    assert folder_bytes() == before


# ---- What goes wrong in training is said --------------------------------------------------------


def warnings_in(printed: str) -> list[str]:
    return re.findall("^warning: (.*)", printed, re.MULTILINE)


def test_answers_that_are_cut_off_are_said_the_first_and_every_tenth_time(run_script):
    printed = run_script(train_expert, "--task", "addition", "--steps", "12", *FEW)
    said = [line for line in warnings_in(printed) if "cut off" in line]
    assert len(said) == 2
    assert said[0].startswith("step 1: ")
    assert said[1].startswith("step 11: ")
    assert "--max-new-tokens" in said[0]


def test_equal_rewards_are_said(train_on):
    printed = train_on(lambda text, problem: 0.7, "--steps", "2", "--batch-size", "3")
    assert "step 1: all rewards are equal (+0.700): " in "\n".join(warnings_in(printed))


def test_a_step_that_is_left_out_is_said_counted_and_null_in_the_log(train_on):
    def reward(text: str, problem: dict) -> float:
        if problem["question"] < "What is 8":  # those to train on
            return float("inf")
        return 1.0

    printed = train_on(reward, "--steps", "3")
    said = warnings_in(printed)
    assert "step 1: its gradient or loss is not finite: the step was left out" in said
    assert "3 of 3 steps were left out, as gradient or loss was not finite" in said
    for line in read_lines("toy")[1:]:
        assert line["skipped"]
        assert line["grad_norm"] is None


def test_a_run_that_learns_nothing_says_so_at_the_end(train_on):
    printed = train_on(lambda text, problem: len(problem["question"]) / 100, "--steps", "2")
    said = warnings_in(printed)
    assert said[-1].startswith("nothing was learned, no step was better on validation than")
    assert "experts/MODEL/toy.log.jsonl" in said[-1]


def test_a_run_that_learns_has_no_warning(train_on):
    def reward(text: str, problem: dict) -> float:
        return 1.0 if text == "D" else -1.0

    arguments = ["--steps", "3", "--lr", "0.1"]
    printed = train_on(reward, *arguments, choices=["A", "B", "C", "D"])
    first, last = re.findall(r"validation (\S+)%", printed)
    assert float(last) > float(first)
    assert warnings_in(printed) == []


# ---- adapt.py -----------------------------------------------------------------------------------


def test_adapt_compares_all_strategies_on_an_unseen_task(run_script):
    save_experts("experts/MODEL", ["math", "code", "classify"])
    printed = run_script(adapt, "--task", "smallest", *SHORT_SEARCH, "--max-new-tokens", "3")
    assert "MODEL: experts code-expert, math-expert; classifier: yes" in printed
    assert (
        "smallest, a task no expert here was trained on: accuracy on 4 held-out problems" in printed
    )
    end = r" +acc +\d+\.\d% \(.* to .*\)  +(?:\d+\.\d s|\(all are \w+\))$"
    rows = re.findall(rf"^  (\S.*?){end}", printed, re.MULTILINE)
    assert rows == [
        "base model",
        "expert code-expert",
        "expert math-expert",
        "prompt",
        "classifier",
        "few-shot",
        "few-shot, one α each",
    ]
    assert re.search(r"α code-expert [+-]\d\.\d\d, math-expert [+-]\d\.\d\d\)", printed)


def test_scored_options_train_an_expert_and_every_row_of_adapt_has_both_accuracies(run_script, hub):
    rows = []
    for i in range(16):
        options = {"label": ["A", "B", "C"], "text": ["red", f"green {i}", "blue"]}
        rows.append({"question": f"What is {i}?", "choices": options, "answerKey": "ABC"[i % 3]})
    hub(train=rows, test=rows)
    save_experts("experts/MODEL", ["classify"])
    run_script(train_expert, "--task", "arc-easy-scored", "--steps", "1", *FEW)
    printed = run_script(adapt, "--task", "arc-challenge-scored", *SHORT_SEARCH)
    table = printed.partition("accuracy on 4 held-out problems\n")[2]
    figures = r"(acc|acc_norm) +\d+\.\d% \(\d+\.\d to \d+\.\d\)"
    shown = {}
    for line in table.splitlines():
        if not line.startswith("  (cross-entropy search on "):
            shown[line[2:26].strip()] = re.findall(figures, line)
    labels = ["base model", "expert arc-easy-scored", "prompt", "classifier"]
    labels += ["few-shot", "few-shot, one α each"]
    assert shown == dict.fromkeys(labels, ["acc", "acc_norm"])


def test_a_strategy_that_takes_one_expert_for_all_prompts_has_its_figures(run_script, monkeypatch):
    def classify(model, processor, conversations, categories, *, expert):
        return ["code"] * len(conversations)

    monkeypatch.setattr(adapt, "classify", classify)
    save_experts("experts/MODEL", ["math", "code"])
    arguments = ["--task", "smallest", "--strategy", "prompt", "--max-new-tokens", "3"]
    printed = run_script(adapt, *arguments)
    [figures] = re.findall(r"  expert code-expert +(acc .*?\))", printed)
    assert f"  prompt                   {figures}  (all are code)\n" in printed


def test_adapt_shows_only_the_strategies_asked_for(run_script):
    save_experts("experts/MODEL", ["math", "classify"])
    arguments = ["--task", "smallest", "--strategy", "classifier", *SHORT_SEARCH]
    printed = run_script(adapt, *arguments, "--max-new-tokens", "3")
    assert "\n  classifier " in printed
    assert "\n  prompt " not in printed
    assert "few-shot" not in printed


def test_adapt_answers_prompts_before_and_after(run_script):
    save_experts("experts/MODEL", ["math", "code", "reasoning", "other"])
    printed = run_script(adapt, "Hello ABC", "What is 1 plus 2?", "--max-new-tokens", "3")
    answers = re.findall(r"prompt    (.*)\ncategory  (\S+)\nbase      .*\nanswer    ", printed)
    assert [prompt for prompt, _ in answers] == ["Hello ABC", "What is 1 plus 2?"]
    assert {category for _, category in answers} <= {"math", "code", "reasoning", "other"}
    assert "base model" not in printed


def test_a_category_without_an_expert_is_answered_by_the_base_model(run_script):
    save_experts("experts/MODEL", ["classify"])
    printed = run_script(adapt, "Hello ABC", "--max-new-tokens", "3")
    assert "answer    the same: no expert for this category" in printed


@pytest.fixture
def printed_dispatch(run_script, monkeypatch, capsys) -> str:
    """What adapt.py prints for the model "tiny", with 40 problems to dispatch and no other task."""
    monkeypatch.setitem(train_expert.BUILT_IN_MODELS, "tiny", lambda: (make(), TOKENIZER))
    problems = adapt.get_task("tiny-classify").problems("test")[:40]
    task = replace(adapt.get_task("tiny-classify"), problems=lambda split: problems)
    monkeypatch.setattr(adapt, "get_task", lambda name: task)
    monkeypatch.setattr(adapt, "TINY_UNSEEN", [])
    save_experts("experts/tiny", ["arithmetic", "classify"])
    monkeypatch.setattr(sys, "argv", ["adapt", "--model", "tiny", "--max-new-tokens", "3"])
    adapt.main()
    return capsys.readouterr().out


def test_adapt_shows_how_held_out_prompts_are_dispatched(printed_dispatch):
    for strategy in ("prompt", "classifier"):
        table = printed_dispatch.partition(f"dispatch by {strategy}: ")[2].partition("\n\n")[0]
        title, header, *rows = table.splitlines()
        mean, low, high, worst, order = re.fullmatch(
            r"(\S+)% \((\S+) to (\S+)\) of 40 held-out prompts, "
            r"each in four orders of the categories; "
            r"(\S+)% in the worst, (.*)",
            title,
        ).groups()
        assert float(worst) <= float(mean)
        assert sorted(order.split(", ")) == ["arithmetic", "comparison", "letters", "other"]
        assert header.split() == ["arithmetic", "letters", "comparison", "other", "right"]
        right = 0
        for i, row in enumerate(rows):
            category, *counts, share = row.split()
            assert category == header.split()[i]
            counts = [int(count) for count in counts]
            assert sum(counts) == 4 * 10  # each prompt once in each order
            assert share == f"{counts[i] / sum(counts):.1%}"
            right += counts[i]
        assert len(rows) == 4
        assert mean == f"{100 * right / 160:.1f}"
        assert f"{low} to {high}" == interval(right / 160, 40)
    assert printed_dispatch.count(" (truth: ") == 6


def test_dispatch_is_measured_with_each_category_in_each_place(run_script, monkeypatch, capsys):
    categories = ["math", "code", "reasoning", "other"]
    orders = []

    def recorded_classify(model, processor, conversations, order, *, expert=None):
        orders.append(order)
        return ["math"] * len(conversations) if order[-1] == "code" else ["code"]

    monkeypatch.setattr(adapt, "classify", recorded_classify)
    library = adapt.Library(None, None, {}, dict.fromkeys(categories), {"prompt": None})
    task = toy(lambda text, problem: 1.0)
    problem = {"question": "What is 1 plus 2?", "answer": "code"}
    args = argparse.Namespace(test_problems=1)
    adapt.show_dispatch(library, replace(task, problems=lambda split: [problem] * 2), args)
    places = [{order[place] for order in orders} for place in range(4)]
    assert places == 4 * [set(categories)]
    pairs = {pair for order in orders for pair in zip(order, order[1:])}
    assert len(pairs) == 12
    title = capsys.readouterr().out.splitlines()[1]
    [worst] = [order for order in orders if order[-1] == "code"]
    assert title.startswith("dispatch by prompt: 75.0% (11.8 to 98.5) of 1 held-out prompts")
    assert title.endswith(f"0.0% in the worst, {', '.join(worst)}")


def test_a_classifier_of_another_task_is_noted(run_script):
    save_experts("experts/MODEL", ["classify"], task="addition")
    printed = run_script(adapt, "Hello", "--max-new-tokens", "3")
    assert "note: the classifier classify was trained on another task, addition\n" in printed
    assert "prompt    Hello\n" in printed


def test_an_expert_of_another_model_and_one_that_takes_a_place_are_noted(run_script):
    save_experts("experts/MODEL", ["math"], model="OTHER")
    save_experts("experts/MODEL", ["math"], suffix="second")
    printed = run_script(adapt, "Hello", "--max-new-tokens", "3")
    assert "note: expert math-expert was trained on OTHER" in printed
    assert "note: expert math-second takes the place of another one" in printed


def test_adapt_shows_what_each_expert_says_of_pictures(capsys):
    model = t2.apply_svf(make())
    task = toy(lambda text, problem: 1.0, max_new_tokens=3)
    experts = {"shapes": random_expert(model)}
    adapt.show_pictures(adapt.Library(model, TOKENIZER, experts, {}, {}), [task])
    printed = capsys.readouterr().out
    assert printed.count("\npicture     none\nquestion    What is ") == 6
    assert printed.count("\nbase        ") == 6
    assert printed.count("\nshapes      ") == 6
    assert printed.count("(right)") == 12


# ---- Both scripts -------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [[], ["old"]], ids=["no folder", "a file"])
def test_no_cache_keeps_no_decompositions(run_script, files):
    folder = Path(".cache/transformer2/svd")
    for name in files:
        folder.mkdir(parents=True)
        (folder / name).write_text("old")
    before = folder_bytes(".cache")
    training = ["--task", "addition", "--steps", "0", *FEW]
    run_script(train_expert, *training, "--no-cache")
    run_script(adapt, "Hello", "--max-new-tokens", "3", "--no-cache")
    assert folder_bytes(".cache") == before
    assert folder.exists() == bool(files)
    run_script(train_expert, *training)
    assert len(folder_bytes(".cache")) > len(files)


# ---- Bad input, warnings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "tiny", "--task", "nonsense"], "unknown task 'nonsense'"),
        (["--model", "no/such-model"], "neither 'tiny' or 'tiny-vlm', nor a folder"),
        (["--targets", "nothing"], "match no linear layer"),
        (["--targets", "(["], "or a regular expression"),
        (["--layers", "50"], "above 0, up to 1"),
        (["--layers", "-1"], "above 0, up to 1"),
        (["--steps", "-1"], "--steps -1 is out of range: it must be at least 0"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--kl-coef", "nan"], "--kl-coef nan is out of range"),
        (["--kl-coef", "inf"], "--kl-coef inf is out of range"),
        (["--kl-coef", "-1"], "--kl-coef -1.0 is out of range"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["--test-problems", "0"], "--test-problems 0 is out of range"),
        (["--token-budget", "0"], "--token-budget 0 is out of range"),
        (["--sample-every", "0"], "--sample-every 0 is out of range: it must be at least 1"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--seed", "2147483649"], "seed 2147483649 is out of range"),
        (["--out", "MODEL/config.json"], "MODEL/config.json"),
    ],
)
def test_bad_input_of_training_is_one_sentence(refusal, monkeypatch, arguments, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert says in refusal(train_expert, "--task", "addition", *FEW, *arguments)
    assert set(os.listdir(".")) <= {"MODEL", ".cache"}  # no experts were begun


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--experts", "EMPTY"], "no experts in EMPTY: train some with python train_expert.py"),
        (["--experts", "DAMAGED"], "cannot read the expert DAMAGED/x.safetensors"),
        (["--experts", "OTHERS"], "for another model"),
        (["--experts", "MIXED"], "have different targets (attention, mlp)"),
        (["--model", "no/such-model"], "neither 'tiny' or 'tiny-vlm', nor a folder"),
        (["A" * 300], "context of 160"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--shots", "0"], "--shots 0 is out of range"),
        (["--iterations", "-2"], "--iterations -2 is out of range"),
    ],
)
def test_bad_input_of_adaptation_is_one_sentence(refusal, monkeypatch, arguments, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for folder in ("EMPTY", "DAMAGED"):
        os.mkdir(folder)
    Path("DAMAGED/x.safetensors").write_bytes(b"damaged")
    t2.save_expert({"model.layers.0.mlp.up_proj": torch.ones(7)}, "OTHERS/x.safetensors")
    save_experts("MIXED", ["math"])
    save_experts("MIXED", ["code"], targets="attention")
    save_experts("OWN", ["math"])
    names = {*os.listdir("."), ".cache"}
    assert says in refusal(adapt, "--experts", "OWN", *arguments)
    assert set(os.listdir(".")) <= names  # nothing else was written


@pytest.mark.parametrize(
    "arguments",
    [
        ["train_expert.py", *TWO_TASKS],
        ["adapt.py", "--task", "smallest", *SHORT_SEARCH, "--max-new-tokens", "3"],
    ],
    ids=["train_expert.py", "adapt.py"],
)
def test_no_library_warns(run_script, arguments):
    save_experts("experts/MODEL", ["math"])
    script, *rest = arguments
    command = [sys.executable, "-W", "default", str(SCRIPTS / script), "--model", "MODEL", *rest]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "Warning" not in result.stdout
