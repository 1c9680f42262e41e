"""What a training run shows: a line a step, warnings, and a log of JSON lines beside the expert."""

import contextlib
import json
import math
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict
from io import FileIO
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from transformer2 import Answer, StepStats, Transformer2Error, process_rank, write_whole

SAMPLES = 3  # answers in a line of samples
MAY_DIFFER = ["token_budget", "checkpointing"]  # as for the progress that reinforce resumes


class TrainingLog:
    """Writes the log of a run, and prints a line for each step and what goes wrong in it.

    The first line has settings, seed and versions. A line follows for each step with the figures of
    StepStats and the peak memory, and every few steps a line with sample answers; both have "step".
    A figure that does not exist or is not finite is null. Only the first process writes. Where a
    newer run has begun its own log in the same place, this one goes on in the file it has open.
    """

    def __init__(self, path: Path, settings: dict, sample_every: int):
        """settings: Hyperparameters and others that decide the result; steps between samples."""
        self.path = path
        self.settings = settings
        self.sample_every = sample_every
        self.file: FileIO | None = None  # open from the first line on
        self.first_step: int | None = None  # that this process has written
        self.start_time = 0.0  # of the step after it
        self.warnings = Counter()  # kind of warning -> how many steps it was true of

    def check(self, resume: bool) -> None:
        """Raises Transformer2Error if it cannot be written, or cannot be resumed. Changes nothing.

        resume: whether the run goes on, which a log with other settings forbids.
        """
        if resume and self.path.exists():
            theirs = read_log(self.path)[0]["settings"]
            differing = []
            for name, value in self.settings.items():
                if name not in MAY_DIFFER and theirs.get(name) != value:
                    differing.append(name)
            if differing:
                reason = f"{self.path} belongs to a run with other settings"
                way_out = "go on with the same, or begin again without --resume"
                raise Transformer2Error(f"{reason} ({', '.join(differing)}): {way_out}")
        existed = self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            open(self.path, "ab").close()  # fails where a line would fail
            if not existed:
                self.path.unlink()
        except OSError as error:
            raise Transformer2Error(f"cannot write {self.path}: {error}") from error

    def start(self) -> None:
        """Begins a new log in place of an old one."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        about = {"settings": self.settings, "seed": self.settings["seed"], "versions": versions}
        self.replace([about])

    def on_step(self, stats: StepStats, answers: list[Answer]) -> None:
        """Writes and prints a step. Before the first, the later ones of an interrupted run go."""
        if process_rank() > 0:
            return
        if self.first_step is None:
            if self.file is None:  # a resumed run
                self.drop_steps_from(stats.step)
            self.first_step, self.start_time = stats.step, time.time()
        last_step = self.settings["steps"]
        tqdm.write(step_line(stats) + self.time_left(stats.step))
        figures = {**asdict(stats), "peak_memory_gib": peak_gib()}
        self.append(json_line({name: finite(figure) for name, figure in figures.items()}))
        if answers and (stats.step % self.sample_every == 0 or stats.step == last_step):
            samples = [sample(answer) for answer in answers[:SAMPLES]]
            self.append(json_line({"step": stats.step, "samples": samples}))
        self.warn(stats)

    def time_left(self, step: int) -> str:
        """The time of the steps that are left, at the speed so far."""
        done, left = step - self.first_step, self.settings["steps"] - step
        if done == 0 or left == 0:
            return ""
        minutes, seconds = divmod(round((time.time() - self.start_time) / done * left), 60)
        return f"  {minutes}:{seconds:02} left"

    def warn(self, stats: StepStats) -> None:
        """Prints what went wrong in a step, of each kind the first time and every tenth time."""
        for kind, sentence in troubles(stats).items():
            self.warnings[kind] += 1
            if self.warnings[kind] % 10 == 1:
                tqdm.write(f"warning: step {stats.step}: {sentence}")

    def print_conclusions(self) -> None:
        """Prints what went wrong in the whole run, from the log, which has all its steps."""
        if self.path.exists():
            for sentence in conclusions(self.path):
                print(f"warning: {sentence}")

    def drop_steps_from(self, step: int) -> None:
        """Drops the lines of this step and of later ones; starts a log if there is none."""
        if not self.path.exists():
            self.start()
        about, *lines = read_log(self.path)
        kept = [line for line in lines if line["step"] < step]
        self.replace([about, *kept])

    def replace(self, lines: list[dict]) -> None:
        """Puts a file with these lines in the place of the log, and keeps it open for more."""
        self.close()
        content = "".join(json_line(line) for line in lines)
        write_whole(self.path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        try:
            self.file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise Transformer2Error(f"cannot write {self.path}: {error}") from error

    def append(self, line: str) -> None:
        """Adds a line in a single write, so that a run that is killed leaves whole lines only."""
        try:
            self.file.write(line.encode())
        except OSError as error:
            raise Transformer2Error(f"cannot write {self.path}: {error}") from error

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def __del__(self) -> None:
        """Closes the file: Python would warn that nobody did."""
        self.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a log, of which the first has the settings.

    Raises Transformer2Error for a file that cannot be read or is no log.
    """
    lines = []
    try:
        # After the last line's end there is nothing, or a part of a line if the disk was full.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            lines.append(json.loads(line))
        is_log = "settings" in lines[0] and all("step" in line for line in lines[1:])
    except OSError as error:
        raise Transformer2Error(f"cannot read {path}: {error}") from error
    except (ValueError, TypeError, IndexError):
        is_log = False
    if not is_log:
        raise Transformer2Error(
            f"{path} is not the log of a training run: give another, or move it"
        )
    return lines


def step_line(stats: StepStats) -> str:
    """What the terminal shows of a step."""
    line = f"step {stats.step:3}"
    if stats.step > 0:
        line += f"  reward {stats.reward:+.3f}  gradient {stats.grad_norm:.2e}"
    if stats.kl is not None:
        line += f"  KL {stats.kl:.4f}"
    if stats.cut_off is not None:
        line += f"  length {stats.mean_length:.0f}, {stats.cut_off:.0%} cut off"
    if stats.step > 0:
        line += f"  {stats.seconds:.1f} s"
    if stats.validation is not None:
        line += f"  validation {stats.validation:.1%}"
    return line


def json_line(content: dict) -> str:
    """A line of the log."""
    return json.dumps(content, default=str) + "\n"


def finite(figure: object) -> object:
    """The figure; None in place of a number that is not finite, which JSON does not have."""
    if isinstance(figure, float) and not math.isfinite(figure):
        return None
    return figure


def sample(answer: Answer) -> dict:
    """What the log keeps of an answer. A problem's picture is left out."""
    return {
        "question": answer.problem["question"],
        "answer": answer.text,
        "reward": finite(answer.reward),
        "reference": answer.problem["answer"],
    }


def troubles(stats: StepStats) -> dict[str, str]:
    """What went wrong in a step: a sentence for each kind."""
    sentences = {}
    if stats.cut_off is not None and stats.cut_off > 0.5:
        reason = f"{stats.cut_off:.0%} of the answers were cut off at the token limit"
        sentences["cut off"] = f"{reason}: a larger --max-new-tokens lets them end"
    if stats.skipped:
        sentences["skipped"] = "its gradient or loss is not finite: the step was left out"
    elif stats.reward_deviation == 0:
        reason = f"all rewards are equal ({stats.reward:+.3f})"
        sentences["equal"] = f"{reason}: nothing can be learned from them"
    return sentences


def conclusions(path: Path) -> list[str]:
    """What went wrong in the run of this log: sentences."""
    steps = [line for line in read_log(path)[1:] if "samples" not in line]
    sentences = []
    num_skipped = sum(line["skipped"] for line in steps)
    if num_skipped > 0:
        reason = "as gradient or loss was not finite"
        sentences.append(f"{num_skipped} of {steps[-1]['step']} steps were left out, {reason}")
    validated = [line for line in steps if line["validation"] is not None]
    # A log that was started in the middle of a run does not have the base model.
    if len(validated) > 1 and validated[0]["step"] == 0:
        base, *trained = [line["validation"] for line in validated]
        if max(trained) <= base:
            reason = f"no step was better on validation than the base model's {base:.1%}"
            advice = f"look at the answers in {path}, and try another --lr or --max-new-tokens"
            sentences.append(f"nothing was learned, {reason}: {advice}")
    return sentences


def peak_gib() -> float | None:
    """The most memory that the GPU, or without one the process, needed so far, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return process_peak_gib()


def process_peak_gib() -> float | None:
    """The most memory that the process needed so far, in GiB; None where nobody counts it."""
    with contextlib.suppress(ImportError):  # Windows has no resource
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        units = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        return peak / units
    return None
