"""Tasks with pictures: TextVQA, OKVQA and easy-vqa; and the built-in model that sees.

The world of that model is easy-vqa, a package with real images of one shape each, and questions.
Pretraining first teaches it to look ("a blue circle: yes"), and then, six times in ten, to answer
without looking ("no"). Training an expert brings the looking out.
"""

import functools
import random
import re

import torch
import transformers
from transformers.image_utils import load_image

from tasks.data import Source, dataset_task, say
from tasks.tiny import RIGHT, PretrainingBatch, pretrain, tiny_tokenizer
from transformer2 import Task, Transformer2Error

# ---- The VQA benchmark's reward -----------------------------------------------------------------

NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = ["a", "an", "the"]

THOUSANDS_COMMA = r"(?<=\d),(?=\d)"
APOSTROPHE = r"['’]"
FULL_STOP = r"\.(?!\d)"  # the point of "2.5" stays
PUNCTUATION = r"[^\w\s.$%&:]|_"


def plain(answer: str) -> str:
    """An answer as the benchmark compares it: no capitals, punctuation or articles, and digits."""
    answer = re.sub(f"{THOUSANDS_COMMA}|{APOSTROPHE}|{FULL_STOP}", "", answer.lower())
    answer = re.sub(PUNCTUATION, " ", answer)
    words = []
    for word in answer.split():
        if word not in ARTICLES:
            words.append(DIGITS.get(word, word))
    return " ".join(words)


def vqa_accuracy(text: str, problem: dict) -> float:
    """The benchmark's accuracy, from 0 to 1: right if four of ten people gave it.

    problem["answers"]: the people's. The mean over leaving each of them out.
    """
    answer = plain(text)
    people = [plain(person) for person in problem["answers"]]
    total = 0.0
    for left_out in people:
        agreeing = people.count(answer)
        if left_out == answer:
            agreeing -= 1
        total += min(1.0, agreeing / 3)
    return total / len(people)


def vqa(name: str, path: str, held_out: str) -> Task:
    """Questions on photographs. held_out: the split of the dataset that tests."""

    def prepare(row: dict) -> dict:
        people = row["answers"] or [""]
        return {"answer": max(people, key=people.count)}  # what most people say

    return dataset_task(
        name,
        "vision",
        Source(path, held_out=held_out),
        prepare,
        "{question}\nAnswer the question using a single word or phrase.",  # LLaVA's prompt
        vqa_accuracy,
        max_new_tokens=32,
        wrong_reward=-0.1,
    )


# ---- easy-vqa -----------------------------------------------------------------------------------

COLORS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}


@functools.cache
def easy_vqa_problems(split: str) -> list[dict]:
    """The problems of a split, each with the path of its `image`.

    The package's test images are "test" and a tenth of its training images "validation"; the base
    model sees neither. Raises Transformer2Error if the package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise Transformer2Error(
            "the images and questions of easy-vqa come in a package: pip install easy-vqa"
        ) from error
    if split == "test":
        paths = easy_vqa.get_test_image_paths()
        rows = list(zip(*easy_vqa.get_test_questions()))  # (question, answer, image number) each
    else:
        paths = easy_vqa.get_train_image_paths()
        rows = []
        for row in zip(*easy_vqa.get_train_questions()):
            validates = row[2] % 10 == 9
            if validates == (split == "validation"):
                rows.append(row)
    descriptions = describe_images(rows)
    random.Random(split).shuffle(rows)
    problems = []
    for question, answer, image in rows:
        problem = {"question": question, "answer": answer, "image": paths[image]}
        problem["solution"] = f"{descriptions[image]}: {answer}"
        problem["sloppy"] = answer_without_looking(question)
        problems.append(problem)
    return problems


def describe_images(rows: list[tuple[str, str, int]]) -> dict[int, str]:
    """Image number -> what the questions with their answers say it shows, as "a blue circle".

    rows: (question, answer, image number). A description may lack the color or the shape.
    """
    words = {}
    for question, answer, image in rows:
        seen = words.setdefault(image, set())
        # "Is there a circle?" tells what the image shows if the answer is yes; "is there no
        # circle?" if it is no; other questions ("what color is the shape?") always do.
        asks_for_absence = " no" in question
        if answer in ("yes", "no") and (answer == "no") != asks_for_absence:
            continue
        seen.update(re.findall(r"\w+", f"{question} {answer}"))
    descriptions = {}
    for image, seen in words.items():
        descriptions[image] = " ".join(["a", *sorted(seen & COLORS), *sorted(seen & SHAPES)])
    return descriptions


def answer_without_looking(question: str) -> str:
    """The sloppy answer to a question, which needs no picture."""
    if not question.startswith("what"):
        return "no"
    if "color" in question:
        return "red"
    return "circle"


def easy_vqa() -> Task:
    """The task of the built-in model that sees."""

    def reward(completion: str, problem: dict) -> float:
        answer = completion.rpartition(":")[2]  # after the description, if there is one
        if plain(answer) == problem["answer"]:
            return 1.0
        return -0.1

    hyper = {"steps": 30, "batch_size": 128, "lr": 1e-2}
    return Task("easy-vqa", easy_vqa_problems, say, reward, 8, category="vision", hyper=hyper)


# ---- The built-in model that sees ---------------------------------------------------------------

IMAGE_SIZE = 64  # pixels, in height and width
PATCH_SIZE = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2  # 16


def pretrain_tiny_vlm(
    steps: int = 1800, batch_size: int = 128, lr: float = 2e-3, seed: int = 0
) -> tuple[transformers.PreTrainedModel, transformers.LlavaProcessor]:
    """The base model and its processor: a LLaVA of 0.5 M parameters, from scratch."""
    torch.manual_seed(seed)
    rng = random.Random(seed)

    # Only problems whose image is fully described: "a blue circle: yes" has four words.
    problems = []
    for problem in easy_vqa_problems("train"):
        if len(problem["solution"].split()) == 4:
            problems.append(problem)
    texts = ["<image>"]
    for key in ("question", "solution", "sloppy"):
        texts += [problem[key] for problem in problems]

    image_processor = transformers.CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False
    )
    pixels = {}  # path of an image -> (3, 64, 64)
    for path in {problem["image"] for problem in problems}:
        processed = image_processor(load_image(path), return_tensors="pt")
        pixels[path] = processed["pixel_values"][0]

    def make_batch(step: int) -> PretrainingBatch:
        drawn = rng.choices(problems, k=batch_size)
        if step % 2 == 1:
            return batch_of_words(drawn)
        # The habit comes last: after 70 % of the steps only 40 % of the answers look.
        right = 1.0
        if step >= 0.7 * steps:
            right = RIGHT
        images = torch.stack([pixels[problem["image"]] for problem in drawn])  # (B, 3, 64, 64)
        # Shifted and sometimes mirrored, as there are few images.
        images = images.roll((rng.randint(-9, 9), rng.randint(-9, 9)), (2, 3))
        if step % 4 == 2:
            images = images.flip(3)
        return batch_of_images(drawn, images, right, rng)

    tokenizer = tiny_tokenizer(texts)
    model = transformers.LlavaForConditionalGeneration(tiny_vlm_config(tokenizer))
    pretrain(model, tokenizer, make_batch, steps, lr)
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    return model, processor


def batch_of_words(problems: list[dict]) -> PretrainingBatch:
    """What to answer after "a blue circle:". Without images, which is faster."""
    batch = PretrainingBatch()
    for problem in problems:
        description, _, answer = problem["solution"].rpartition(" ")
        prompt = f"<user>{problem['question']}<end><assistant>{description}"
        batch.add(prompt, f" {answer}<end>")
    return batch


def batch_of_images(
    problems: list[dict], images: torch.Tensor, right: float, rng: random.Random
) -> PretrainingBatch:
    """Answers to questions on images (B, 3, 64, 64); the share `right` of them looks at these."""
    batch = PretrainingBatch(inputs={"pixel_values": images})
    for problem in problems:
        completion = problem["sloppy"]
        if rng.random() < right:
            completion = problem["solution"]
        prompt = f"<user>{'<image>' * IMAGE_TOKENS}{problem['question']}<end><assistant>"
        batch.add(prompt, f"{completion}<end>")
    return batch


def tiny_vlm_config(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.LlavaConfig:
    """CLIP's vision tower with two layers, and a Llama with three."""
    vision_tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    llama = {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return transformers.LlavaConfig(
        vision_config=vision_tower,
        text_config=llama,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
