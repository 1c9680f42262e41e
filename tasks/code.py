"""Tasks whose answers are programs: MBPP and HumanEval. A program is right if its tests pass."""

import ast
import re
import warnings
from collections.abc import Callable

from tasks.data import Source, dataset_task
from tasks.sandbox import run_tests
from transformer2 import Task, Transformer2Error

# A model's program may have "\d" in an ordinary string, which Python warns of when it parses it.
warnings.filterwarnings("ignore", module="<unknown>")

LONGEST_COMPLETION = 20_000  # characters that are looked at

# ---- The program in a completion ----------------------------------------------------------------

FENCE = r"```(?:[Pp]ython3?|py)?"

DECORATOR = "@"
IMPORT = r"import |from \S+ import "
DEFINITION = r"def |class \w+[:(]"
ASSIGNMENT = r"\w+ *= *"
FIRST_LINE = f"^(?:{DECORATOR}|{IMPORT}|{DEFINITION}|{ASSIGNMENT})"


def extract_code(completion: str, problem: dict) -> str:
    """The program in a completion.

    It is made of the fenced blocks and of the text around them, each from its first line of code
    on and as far as it is Python. If the problem is HumanEval's, it has a `prompt`: the beginning
    of a function. A completion without that function is the rest of it.
    """
    parts = re.split(FENCE, completion[:LONGEST_COMPLETION])
    if "prompt" in problem:
        header = problem["prompt"] + "    "  # a body follows, indented
        whole_function = rf"^def {problem['entry_point']}\b"
        if re.search(whole_function, completion, re.M):
            parts = [header + "pass", *parts]  # the header brings imports and helper functions
        else:
            # Fences in pairs enclose blocks: the body is in the first of these. Otherwise the body
            # comes first, and a fence after it closes the block that the prompt opened.
            fences = len(parts) - 1
            body = parts[0]
            if fences > 0 and fences % 2 == 0:
                body = parts[1]
            parts = [header + body.lstrip()]
    return "".join(python_in(part) + "\n" for part in parts)


def python_in(text: str) -> str:
    """The text from its first line of code on, as far as it is Python."""
    first_line = re.search(FIRST_LINE, text, re.M)
    if first_line is None:
        return ""
    lines = text[first_line.start() :].splitlines()
    while lines:
        try:
            ast.parse("\n".join(lines))
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # Cut before the line with the error; if none is named, before the first.
            error_line = getattr(error, "lineno", None) or 1
            keep = min(error_line, len(lines)) - 1
            lines = lines[:keep]
    return "\n".join(lines)


# ---- The tasks ----------------------------------------------------------------------------------


def code_task(name: str, source: Source, prepare: Callable[[dict], dict], prompt: str) -> Task:
    """A task of a dataset whose problems have `tests`.

    Raises Transformer2Error where code is not allowed to run or the sandbox does not start.
    """

    def score(completion: str, problem: dict) -> float:
        return run_tests(extract_code(completion, problem), problem["tests"])

    # Try the sandbox now, rather than after the first answers.
    if not run_tests("", "assert remote('int')('1') == 1"):
        raise Transformer2Error(
            "the sandbox for code does not start on this system: run code tasks on Linux"
        )
    return dataset_task(name, "code", source, prepare, prompt, score, prefill="```python")


def mbpp() -> Task:
    """Short Python functions, described in a sentence and by three assertions."""

    def prepare(row: dict) -> dict:
        assertions = "\n".join(row["test_list"])
        tests = ""
        for name in re.findall(r"^def +(\w+)", row["code"], re.M):
            tests += f"{name} = remote({name!r})\n"
        answer = assertions
        if "class " in row["code"]:
            answer = ""  # its assertions hand over objects, which are no literals
        return {
            "question": row["text"],
            "answer": answer,
            "solution": f"\n{row['code']}",
            "tests": tests + assertions,
        }

    return code_task(
        "mbpp",
        Source("google-research-datasets/mbpp", "full"),
        prepare,
        "{question} Your code should satisfy these assertions:\n```python\n{answer}\n```",
    )


def humaneval() -> Task:
    """Python functions, given as their beginning and a description."""

    def prepare(row: dict) -> dict:
        solution = row["prompt"] + row["canonical_solution"]
        # The tests begin with the solution, as one of them compares with it.
        tests = f"{solution}\n{row['test']}\ncheck(remote({row['entry_point']!r}))"
        return {
            "question": row["prompt"],
            "answer": row["test"],
            "solution": f"\n{solution}",
            "tests": tests,
        }

    return code_task(
        "humaneval",
        Source("openai/openai_humaneval"),
        prepare,
        "Write a solution to the following problem:\n```python\n{question}```",
    )
