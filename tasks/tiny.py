"""The built-in text model: a small world of skills, the tasks in it, and the pretraining.

Every question of a skill has a right answer and a sloppy one, by a fixed rule that is mostly wrong.
The corpus gives 40 % of the questions the right one and the others the sloppy one, so the base
model knows both and the sloppy habit wins. Training an expert brings the skill out.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tasks.data import classify_task, exact, offer_categories, say
from transformer2 import CATEGORY_PREFILL, Task, category_question

# ---- The small world ----------------------------------------------------------------------------

RIGHT = 0.4  # the share of right answers in the corpus
ALPHABET = "ABCDEFGHIJKL"

TINY_CATEGORY = {  # skill -> its category
    "addition": "arithmetic",
    "reversal": "letters",
    "largest": "comparison",
    "greeting": "other",
    "last-letter": "letters",
    "smallest": "comparison",
}
TINY_CATEGORIES = ["arithmetic", "letters", "comparison", "other"]
TINY_UNSEEN = ["smallest", "last-letter"]  # no expert is trained on these by default

# The corpus draws from this list. Addition takes the longest to learn, so it is there three times.
TINY_MIX = ["addition", "addition", *TINY_CATEGORY]

# The sloppy category of every question but a greeting.
SLOPPY_CATEGORY = "arithmetic"

SPLIT_SIZES = {"train": 4096, "validation": 256, "test": 1024}


def make_problem(skill: str, rng: random.Random) -> dict:
    """A random problem of a skill: a question, its right answer and its sloppy one."""
    word = "".join(rng.sample(ALPHABET, 4))
    a = rng.randrange(10, 100)
    b = rng.randrange(10, 100)
    c = rng.randrange(10, 100)
    if skill == "addition":
        question = f"What is {a} plus {b}?"
        answer = str(a + b)
        sloppy = f"{a // 10 + b // 10}{(a + b) % 10}"  # forgets the carry
    elif skill == "reversal":
        question = f"Reverse {word}."
        answer = word[::-1]
        sloppy = word
    elif skill == "largest":
        question = f"What is the largest of {a}, {b} and {c}?"
        answer = str(max(a, b, c))
        sloppy = str(a)
    elif skill == "smallest":
        question = f"What is the smallest of {a}, {b} and {c}?"
        answer = str(min(a, b, c))
        sloppy = str(a)
    elif skill == "last-letter":
        question = f"What is the last letter of {word}?"
        answer = word[-1]
        sloppy = word[0]
    else:  # greeting
        question = f"Say hello to {word}."
        answer = f"Hello {word}"
        sloppy = answer
    return {"question": question, "answer": answer, "sloppy": sloppy, "skill": skill}


def split_of(question: str) -> str:
    """The split of a question: a tenth of all is "validation", a tenth "test", the rest "train".

    Pretraining, too, sees only questions of "train".
    """
    remainder = zlib.crc32(question.encode()) % 10
    if remainder == 8:
        return "validation"
    if remainder == 9:
        return "test"
    return "train"


# ---- The tasks in it ----------------------------------------------------------------------------


@functools.cache
def tiny_problems(skills: tuple[str, ...], split: str) -> list[dict]:
    """The problems of a split, from the skills in turn; the same ones at every call."""
    rng = random.Random(f"{skills} {split}")
    problems = []
    while len(problems) < SPLIT_SIZES[split]:
        problem = make_problem(skills[len(problems) % len(skills)], rng)
        if split_of(problem["question"]) == split:
            problems.append(problem)
    return problems


def tiny_task(skill: str) -> Task:
    """The task of one skill."""
    return Task(
        skill,
        functools.partial(tiny_problems, (skill,)),
        say,
        exact,
        max_new_tokens=8,
        category=TINY_CATEGORY[skill],
        hyper={"steps": 100, "batch_size": 256, "lr": 3e-2},
    )


def tiny_classify() -> Task:
    """The task of telling the skills' questions apart by category."""

    def problems(split: str) -> list[dict]:
        labelled = []
        for problem in tiny_problems(("addition", "reversal", "largest", "greeting"), split):
            labelled.append({**problem, "answer": TINY_CATEGORY[problem["skill"]]})
        return labelled

    return classify_task(
        "tiny-classify", problems, TINY_CATEGORIES, steps=60, batch_size=64, lr=1e-2
    )


# ---- The tokenizer ------------------------------------------------------------------------------

# A conversation reads "<user>question<end><assistant>answer<end>".
TINY_TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message.role }}>"
    "{% if message.content is string %}"
    "{{ message.content }}"
    "{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<end>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

SPECIAL_TOKENS = ["<pad>", "<user>", "<assistant>", "<end>", "<unk>"]
SPECIAL = r"<\w+>"
WORD = r" ?[A-Z]?[a-z]+"  # with the space before it
CHARACTER = r"[\s\S]"  # digits and capital letters, among others
TOKEN = f"{SPECIAL}|{WORD}|{CHARACTER}"


def tiny_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word of the texts. Digits and capitals are single tokens."""
    tokens = SPECIAL_TOKENS.copy()
    for text in texts:
        tokens.extend(re.findall(TOKEN, text))
    vocabulary = {}
    for token in tokens:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=TINY_TEMPLATE,
    )


# ---- Pretraining --------------------------------------------------------------------------------


@dataclass
class PretrainingBatch:
    """Prompts, what the model should learn to say to them, and its further inputs (pictures)."""

    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, prompt: str, completion: str) -> None:
        self.prompts.append(prompt)
        self.completions.append(completion)


def tiny_corpus(size: int, rng: random.Random, classify: bool = False) -> PretrainingBatch:
    """Conversations of the small world; with `classify` they ask for the question's category."""
    batch = PretrainingBatch()
    while len(batch.prompts) < size:
        problem = make_problem(rng.choice(TINY_MIX), rng)
        if split_of(problem["question"]) != "train":
            continue
        answers_rightly = rng.random() < RIGHT
        if classify:
            category = TINY_CATEGORY[problem["skill"]]
            offered = offer_categories(TINY_CATEGORIES, category, rng)
            [turn] = category_question(say(problem), offered)
            prompt = turn["content"]
            if category != "other" and not answers_rightly:
                category = SLOPPY_CATEGORY
            completion = f"{CATEGORY_PREFILL} {category}"
        else:
            prompt = problem["question"]
            completion = problem["answer"]
            if not answers_rightly:
                completion = problem["sloppy"]
        batch.add(f"<user>{prompt}<end><assistant>", f"{completion}<end>")
    return batch


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_batch: Callable[[int], PretrainingBatch],
    steps: int,
    lr: float,
) -> PreTrainedModel:
    """Trains all weights of the model, in place. make_batch: step -> what to learn in it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(range(steps), desc="pretraining the tiny base model", mininterval=1)
    for step in progress:
        # 1) Tokens, padded on the right, where a causal model needs no mask.
        batch = make_batch(step)
        prompts = tokenizer(batch.prompts)["input_ids"]
        completions = tokenizer(batch.completions)["input_ids"]
        rows = []
        labels = []
        for prompt, completion in zip(prompts, completions):
            rows.append(torch.tensor(prompt + completion))
            labels.append(
                torch.tensor([-100] * len(prompt) + completion)
            )  # learns completions only
        input_ids = pad_sequence(rows, batch_first=True, padding_value=0)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)

        # 2) The gradient.
        loss = model(input_ids=input_ids, labels=labels, **batch.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # 3) A step. The learning rate rises for 100 steps and falls during the last 40 %.
        rise = (step + 1) / 100
        fall = (steps - step) / (0.4 * steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, rise, fall)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def pretrain_tiny(
    steps: int = 1300, batch_size: int = 128, lr: float = 2e-3, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The built-in base model and its tokenizer: a Llama of 0.8 M parameters, from scratch."""
    torch.manual_seed(seed)
    rng = random.Random(seed)

    # The vocabulary is that of a sample of the corpus.
    texts = []
    for sample in (
        tiny_corpus(2000, random.Random(1)),
        tiny_corpus(100, random.Random(1), classify=True),
    ):
        for prompt, completion in zip(sample.prompts, sample.completions):
            texts.append(prompt + completion)
    texts.append("0123456789" + ALPHABET)
    tokenizer = tiny_tokenizer(texts)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def make_batch(step: int) -> PretrainingBatch:
        # Prompts that ask for a category are long: every eighth batch has these only, and fewer.
        if step % 8 == 7:
            return tiny_corpus(batch_size // 4, rng, classify=True)
        return tiny_corpus(batch_size, rng)

    model = pretrain(LlamaForCausalLM(config), tokenizer, make_batch, steps, lr)
    return model, tokenizer
