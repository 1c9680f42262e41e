"""Tasks whose answers are read out of a text: GSM8K, MATH-500 and ARC, and telling them apart.

A wrong reward quietly teaches the wrong thing, so most of this file is the reading of answers.
"""

import itertools
import re
from fractions import Fraction

import torch

from tasks.data import Source, classify_task, dataset_task, exact, load_problems
from tasks.other_prompts import OTHER_PROMPTS
from transformer2 import Experts, Model, Processor, Task, Transformer2Error, score_choices

# ---- Where a text states its answer -------------------------------------------------------------

# "#### 18" as at the end of GSM8K's solutions, but not the heading "#### Step 2".
HASHES = r"####(?=\W*(?:\d|[A-E]\b))"
BOX = r"\\boxed\{"
# "the answer is", "**Answer**:", "the correct option is".
PHRASE = r"\b(?:answer|(?:the|correct|right|best) (?:option|choice))\W{0,2}(?: is|:)"
STATEMENT = rf"(?i:{HASHES}|{BOX}|{PHRASE})"


def stated(text: str) -> str | None:
    """What follows the last statement of an answer in the text; None if it states none."""
    parts = re.split(STATEMENT, text)
    if len(parts) == 1:
        return None
    return parts[-1]


# ---- Numbers ------------------------------------------------------------------------------------

# The comma of "1,234", which LaTeX also writes as "1{,}234".
THOUSANDS_COMMA = r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))"
DOLLAR = r"\\?\$"
MINUS = r"(?<![\w)])-"  # the one in "16-3" is no sign
NUMBER = rf"(?:{MINUS})?\d*\.?\d+"
SENTENCE_END = r"\n|\.\s|\}"


def numeric_answer(text: str) -> float:
    """The number that the text states as its answer, else the last number in it, else NaN.

    "The answer is 5 + 3 = 8 eggs" states 8. NaN is equal to nothing, not even to itself.
    """
    text = text.replace("−", "-")
    text = re.sub(f"{THOUSANDS_COMMA}|{DOLLAR}", "", text)
    statement = stated(text)
    if statement is not None:
        sentence = re.split(SENTENCE_END, statement.strip())[0]
        after_equals_sign = sentence.rpartition("=")[2]
        numbers = re.findall(NUMBER, after_equals_sign)
        if numbers:
            return float(numbers[0])
    numbers = re.findall(NUMBER, text)
    if numbers:
        return float(numbers[-1])
    return float("nan")


# ---- Letters of options -------------------------------------------------------------------------

LETTERS = "ABCDE"


def letter_answer(text: str, problem: dict) -> str:
    """The letter of the option that the text states, or that its last line is; "" if none.

    The option may be given by its letter or by its words. problem: its `question`, and its options
    in `choices["text"]`.
    """
    text = text.replace(problem["question"], "")  # the question's own words are no answer
    answer = stated(text)
    end = ""
    if answer is None:
        answer = text.strip().rpartition("\n")[2]
        end = r"\W*$"  # a last line has to be the option and nothing else
    options = list(zip(LETTERS, problem["choices"]["text"]))
    # The longest first, so that "iron ore" is tried before "iron".
    options.sort(key=lambda option: len(option[1]), reverse=True)
    for letter, option in options:
        if re.match(option_pattern(letter, option) + end, answer):
            return letter
    return ""


def option_pattern(letter: str, option: str) -> str:
    """A pattern for an option at the start of an answer: its letter, its words, or both."""
    # "the option (", "**".
    lead_in = r"\W*(?:(?i:the|option|choice)\W+)*"
    # The letter alone: not that of "Iron" or of "A's".
    label = rf"{letter}(?![\w'])"
    # Nor the article in "A dog barks", while the A in "A because dogs bark" is a label.
    no_article = r"(?!(?<=A) (?!because|since|as |and )[a-z])"
    # The words in capitals or not, up to the end of a word.
    words = rf"(?i:{re.escape(option.strip(' .'))})(?!\w)"
    return rf"{lead_in}(?:{label}{no_article}\W*(?:{words})?|{words})"


# ---- LaTeX --------------------------------------------------------------------------------------

# Commands for layout, spaces and brackets: \left \! \, \$ \[ ...; not the line break \\.
LAYOUT = r"(?<!\\)\\(?:left|right|[!,;: %$()\[\]])"
SIGNS = r"[$%*~°]"
DEGREES = r"\^\{?\\circ\}?"
# The unit after a number: "5\text{ cm}^2".
UNIT = r"(?<=[\d}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?"
# A group in braces with at most one level of groups in it.
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"

# What differs in LaTeX and not in meaning: (pattern, replacement), applied in this order.
MATH_RULES = [
    (f"{LAYOUT}|{SIGNS}|{DEGREES}", ""),
    # \dfrac and \tfrac are \frac.
    (r"\\[dt]frac", r"\\frac"),
    # No units, neither in \text nor as a word: "5 cm" is 5.
    (UNIT, ""),
    (r"\\(?:text|mbox)\{([^{}]*)\}", r"\1"),
    (r"^\s*(-?[\d.,/]+)\s+[A-Za-z ]+\.?$", r"\1"),
    # No spaces, and no full stop at the end.
    (r"\s|\.\s*$", ""),
    # "x=5" and "x\in[0,1]" are what follows.
    (r"^[a-z](?:=|\\in)", ""),
    (THOUSANDS_COMMA, ""),
    # Braces: \sqrt2 is \sqrt{2}, x^{2} is x^2, \frac{1}2 is \frac{1}{2}.
    (r"\\(sqrt|frac)(\d)", r"\\\1{\2}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (rf"(\\frac{GROUP})(\d)", r"\1{\2}"),
    # \frac{1}{2} is 1/2, but not in the mixed number 2\frac{1}{2}.
    (r"(?<!\d)\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2"),
]
INTEGER_OR_FRACTION = r"\d{1,30}(?:/[1-9]\d{0,29})?"
DECIMAL = r"\d{0,30}\.\d{1,30}"
RATIONAL = f"-?(?:{INTEGER_OR_FRACTION}|{DECIMAL})"


def math_form(answer: str) -> str:
    """A LaTeX answer in a form to compare with another: equal forms are equal answers.

    What it does not know to be the same, as 1+x and x+1, stays different.
    """
    for pattern, replacement in MATH_RULES:
        answer = re.sub(pattern, replacement, answer)
    if re.fullmatch(RATIONAL, answer):
        return str(Fraction(answer))
    return answer


def math_answer(text: str) -> str:
    """math_form of what is in the last box of a text, or else stated last; "" if there is none."""
    _, box, rest = text.rpartition(r"\boxed{")
    if box:
        return math_form(until_closing_brace(rest))
    statement = stated(text)
    if statement is None:
        return ""
    sentence = re.split(r"\.\s|\.$|\n", statement.lstrip(" :*\n"))[0]
    return math_form(sentence)


def until_closing_brace(text: str) -> str:
    """The text up to the brace that closes a group which was opened before it."""
    depth = 0
    for i, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth < 0:
            return text[:i]
    return text


# ---- The tasks ----------------------------------------------------------------------------------


def gsm8k() -> Task:
    """Grade school math word problems, answered by a number."""

    def prepare(row: dict) -> dict:
        number = re.search(r"#### *(-?[\d.,]*\d)", row["answer"])
        answer = ""
        if number:
            answer = number[1]
        return {
            "question": row["question"],
            "answer": answer,
            "solution": re.sub(r"<<.*?>>", "", row["answer"]),  # without calculator annotations
        }

    def is_right(completion: str, problem: dict) -> bool:
        return numeric_answer(completion) == numeric_answer(problem["answer"])

    source = Source("openai/gsm8k", "main")
    return dataset_task("gsm8k", "math", source, prepare, "{question}", is_right)


def math500() -> Task:
    """MATH-500: competition problems, answered by a formula."""

    def prepare(row: dict) -> dict:
        return {"question": row["problem"]}  # `answer` and `solution` are columns of the dataset

    def is_right(completion: str, problem: dict) -> bool:
        return math_answer(completion) == math_form(problem["answer"])

    return dataset_task(
        "math",
        "math",
        Source("HuggingFaceH4/MATH-500"),
        prepare,
        "{question}\n\nReason step by step, and put your final answer within \\boxed{{}}.",
        is_right,
        max_new_tokens=1024,
    )


def arc(config: str) -> Task:
    """Science questions with three to five options. config: "ARC-Easy" or "ARC-Challenge"."""

    def prepare(row: dict) -> dict:
        # Some rows count their options 1, 2, 3: all get letters.
        letters = dict(zip(row["choices"]["label"], LETTERS))
        answer = letters.get(row["answerKey"])
        return {
            "question": row["question"],
            "answer": answer,
            "options": list_options(row),
            "solution": f"The answer is ({answer}).",
        }

    def is_right(completion: str, problem: dict) -> bool:
        return letter_answer(completion, problem) == problem["answer"]

    return dataset_task(
        config.lower(),
        "reasoning",
        Source("allenai/ai2_arc", config),
        prepare,
        'Think step by step, then finish with "the answer is (X)", X the letter of the right '
        "choice.\n\n{question}{options}",
        is_right,
        prefill="Let's think step by step",
    )


def list_options(row: dict) -> str:
    """The options of a row of ARC as they stand below its question, each with a letter."""
    text = "\nOptions:"
    for letter, option in zip(LETTERS, row["choices"]["text"]):
        text += f"\n({letter}) {option}"
    return text


def arc_scored(config: str) -> Task:
    """ARC as lm-evaluation-harness asks it, in plain text: the likeliest option is the answer."""

    def prepare(row: dict) -> dict:
        texts = dict(zip(row["choices"]["label"], row["choices"]["text"]))
        answer = texts.get(row["answerKey"], "")
        return {"answer": answer, "solution": f" {answer}"}  # `question` is a column

    def problems(split: str) -> list[dict]:
        found = load_problems(Source("allenai/ai2_arc", config), prepare, split)
        for problem in found:
            if len(problem["choices"]["text"]) < 2:
                raise Transformer2Error(f"{config}: {problem['question']!r} has only one option")
            if not all(text.strip() for text in problem["choices"]["text"]):
                raise Transformer2Error(f"{config}: {problem['question']!r} has an empty option")
        return found

    def conversation(problem: dict) -> str:
        return f"Question: {problem['question']}\nAnswer:"

    def options(problem: dict) -> list[str]:
        return [f" {text}" for text in problem["choices"]["text"]]

    settings = {"steps": 12, "batch_size": 64, "lr": 5e-3, "validate_every": 4}
    extras = {"choices": options, "category": "reasoning", "hyper": settings}
    return Task(f"{config.lower()}-scored", problems, conversation, exact, **extras)


def option_accuracy(
    model: Model, processor: Processor, task: Task, problems: list[dict], expert: Experts
) -> dict[str, float]:
    """The shares of right answers to a task of arc_scored, as lm-evaluation-harness defines them.

    acc: the answer is the option of the largest log-probability, summed over its tokens. acc_norm:
    of the largest log-probability divided by the option's characters, without its blank.
    """
    right = {"acc": 0, "acc_norm": 0}
    scores = score_choices(model, processor, task, problems, expert=expert)
    for problem, log_probs in zip(problems, scores):
        options = problem["choices"]["text"]
        lengths = torch.tensor([len(option) for option in options], device=log_probs.device)
        right["acc"] += options[log_probs.argmax()] == problem["answer"]
        right["acc_norm"] += options[(log_probs / lengths).argmax()] == problem["answer"]
    return {name: count / len(problems) for name, count in right.items()}


# ---- Telling them apart -------------------------------------------------------------------------

CATEGORIES = ["reasoning", "math", "code", "other"]  # the paper's

CLASSIFY_SOURCES = [  # the source of questions, their column, and their category
    (Source("openai/gsm8k", "main"), "question", "math"),
    (Source("google-research-datasets/mbpp", "full"), "text", "code"),
    (Source("allenai/ai2_arc", "ARC-Easy"), "question", "reasoning"),
]
CLASSIFY_SIZES = {"train": 180, "validation": 16, "test": 60}  # questions of each source


def real_classify() -> Task:
    """The task of telling math, code and reasoning questions apart, and other prompts from them."""

    def problems(split: str) -> list[dict]:
        sources = [load_questions(*source, split) for source in CLASSIFY_SOURCES]
        copies = 2 if split == "train" else 1  # of the other prompts, which are few
        return in_turn([*sources, other_prompts(split) * copies])

    return classify_task(
        "classify", problems, CATEGORIES, steps=20, batch_size=40, lr=4e-3, validate_every=5
    )


def load_questions(source: Source, column: str, category: str, split: str) -> list[dict]:
    """The questions in a column of a source, as problems whose answer is their category.

    Questions with options come twice, also without them, where they look more like small talk.
    """

    def prepare(row: dict) -> dict:
        return {"answer": row[column]}  # rows without a question are left out

    problems = []
    for row in load_problems(source, prepare, split)[: CLASSIFY_SIZES[split]]:
        problems.append({"question": row[column], "answer": category})
        if "choices" in row:
            question = row[column] + list_options(row)
            problems.append({"question": question, "answer": category})
    return problems


def other_prompts(split: str) -> list[dict]:
    """Prompts that are neither math nor code nor reasoning. Each split has kinds of its own."""
    problems = []
    for kind, prompts in OTHER_PROMPTS[split].items():
        problems.append([{"question": text, "answer": "other", "kind": kind} for text in prompts])
    return in_turn(problems)


def in_turn(lists: list[list[dict]]) -> list[dict]:
    """One problem of each list in turn, while they last, so that the first few are of all lists."""
    problems = []
    for turn in itertools.zip_longest(*lists):
        problems.extend(problem for problem in turn if problem is not None)
    return problems
