"""Kills training runs at random moments, resumes them, and compares what they leave.

python experiments/kills.py             # ten runs on the built-in tiny model, some minutes

Every run has to end with the same bytes as one that was never killed, and with nothing but the
expert and its log in its folder.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parents[1]
COMMAND = "train_expert.py --model tiny --task reversal --steps 12 --test-problems 64".split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as out:
        train(Path(out))  # it may have to pretrain the base model first, which takes long
    with tempfile.TemporaryDirectory() as out:
        expected, seconds = train(Path(out))
    num_equal = all_kills = 0
    for number in range(args.runs):
        with tempfile.TemporaryDirectory() as out:
            num_kills = 0
            while not killed_or_finished(Path(out), rng.uniform(0, 1.5 * seconds)):
                num_kills += 1
            equal = contents(Path(out)) == expected
        num_equal += equal
        all_kills += num_kills
        verdict = "equal" if equal else "different"
        print(f"run {number}: killed {num_kills} times, {verdict}", flush=True)
    result = f"{num_equal} of {args.runs} runs end as the one that was never killed"
    print(f"{result}; {all_kills} kills")
    if num_equal < args.runs:
        sys.exit(1)


def train(out: Path) -> tuple[dict[str, bytes], float]:
    """What a run leaves that is never killed, and the seconds that it takes."""
    start_time = time.time()
    subprocess.run([sys.executable, *COMMAND, "--out", out], cwd=FOLDER, check=True)
    return contents(out), time.time() - start_time


def killed_or_finished(out: Path, seconds: float) -> bool:
    """Goes on with a run, and kills it after so many seconds. True if it finished before."""
    command = [sys.executable, *COMMAND, "--out", out, "--resume"]
    process = subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.DEVNULL)
    try:
        exit_code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL: it cannot clean up
        process.wait()
        return False
    if exit_code != 0:
        sys.exit("a resumed run failed")
    return True


def contents(out: Path) -> dict[str, bytes]:
    """Name -> bytes of the files of a run; of logs, which have times in them, the names only."""
    files = {}
    for path in out.rglob("*"):
        if path.is_file():
            is_log = path.name.endswith(".log.jsonl")
            files[path.name] = b"" if is_log else path.read_bytes()
    return files


if __name__ == "__main__":
    main()
