"""The training step on given rows, beside the form of the released code, and its memory.

Memory is counted on tensors, with or without storage, so it can be told for models that are not
there. speed.py measures with this file; tests count memory with it.
"""

import copy
import random
import string
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

import transformer2 as t2

Way = Callable[[], object]  # a way to do something: a function without parameters

# ---- Rows: problems with given answers -----------------------------------------------------------

PROMPT_LENGTH = COMPLETION_LENGTH = 64  # tokens
TASK = t2.Task("given answers", list, itemgetter("question"), reward=None)


@dataclass
class Rows:
    """Problems and an answer to each, for set_gradient; the same rows also as tensors."""

    problems: list[dict]
    answers: list[t2.Answer]
    sequences: torch.Tensor  # (B, PROMPT_LENGTH + COMPLETION_LENGTH)
    advantages: torch.Tensor  # (B,)


def make_rows(model: nn.Module, processor: t2.Processor, count: int) -> Rows:
    """Prompts of random digits, and answers of random tokens. Half of the answers are right."""
    rng = random.Random(0)
    texts = [text_of_length(model, processor, PROMPT_LENGTH, rng) for _ in range(count)]
    prompts = t2.encode(model, processor, texts)["input_ids"]
    vocabulary = min(1000, model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(vocabulary, (count, COMPLETION_LENGTH), generator=generator)
    answers = []
    for number, tokens in enumerate(completions.tolist()):
        answers.append(t2.Answer(tokens, text="", reward=(-1.0) ** number))
    rewards = torch.tensor([answer.reward for answer in answers], device=model.device)
    return Rows(
        problems=[{"question": text} for text in texts],
        answers=answers,
        sequences=torch.cat([prompts, completions.to(model.device)], dim=1),
        advantages=t2.leave_one_out_advantages(rewards),
    )


def text_of_length(
    model: nn.Module, processor: t2.Processor, length: int, rng: random.Random
) -> str:
    """Random digits that become `length` tokens."""

    def length_of(text: str) -> int:
        return t2.encode(model, processor, [text])["input_ids"].shape[1]

    text = "".join(rng.choices(string.digits, k=length))
    while length_of(text) < length:  # some tokenizers join digits
        text += rng.choice(string.digits)
    while length_of(text) > length:  # others put a token before the text
        text = text[:-1]
    return text


# ---- The step ------------------------------------------------------------------------------------


def our_step(
    model: nn.Module, processor: t2.Processor, rows: Rows, **hyperparameters: object
) -> Way:
    """A way to do the training step: transformer2's own."""
    hp = t2.Hyperparameters(**hyperparameters)
    answers = [[answer] for answer in rows.answers]

    def step() -> None:
        with t2.token_budget(model, hp.token_budget):
            t2.set_gradient(model, processor, TASK, rows.problems, answers, hp)

    return step


def micro_batch_step(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    completions: list[list[int]],
    advantages: torch.Tensor,
    hp: t2.Hyperparameters,
) -> None:
    """What set_gradient does with one micro-batch, by backward()."""
    with t2.checkpointing(model, hp.checkpointing):
        log_probs = t2.completion_log_probs(model, inputs, completions)
    ref_log_probs = log_probs.detach()
    if hp.kl_coef > 0:
        with torch.no_grad(), t2.reference_policy(model):
            ref_log_probs = t2.completion_log_probs(model, inputs, completions)
    weights = 1 / len(completions)
    t2.reinforce_loss(log_probs, ref_log_probs, advantages, hp.kl_coef, weights).backward()


class ComposedForm:
    """The step of the released code: a dense model runs with W' = U diag(s * z) Vᵀ built.

    W' is built once more to pull its gradient back to z. All tokens have logits. (That code also
    scales W' by sum(s) / sum(s * z), which is left out here.)
    """

    def __init__(self, dense_model: nn.Module, svf_model: nn.Module):
        self.model = copy.deepcopy(dense_model).requires_grad_(False)
        self.layers = t2.svf_layers(svf_model)
        self.weights = {}  # the dense model's own, of the same layers
        for name in self.layers:
            self.weights[name] = self.model.get_submodule(name).weight.requires_grad_()

    def modules(self) -> list[nn.Module]:
        """What it needs in memory: the dense model, and the factors of its matrices."""
        return [self.model, *self.layers.values()]

    def build(self, layer: t2.SVFLinear) -> torch.Tensor:
        """W' as the released code builds it."""
        scale = (layer.s * layer.z).to(layer.U.dtype)
        return layer.U @ torch.diag(scale) @ layer.Vh

    def log_probs(self, sequences: torch.Tensor) -> torch.Tensor:
        """log π of the completions: (B,)."""
        logits = self.model(input_ids=sequences, use_cache=False).logits
        log_pi = logits[:, PROMPT_LENGTH - 1 : -1].float().log_softmax(-1)
        completions = sequences[:, PROMPT_LENGTH:, None]
        return log_pi.gather(-1, completions).sum((1, 2))

    def step(self, rows: Rows, rows_at_a_time: int = 16, lean: bool = False) -> None:
        """Adds the gradient to z.grad. lean: as short and small as we could write it."""
        # 1) Put W' into the dense model. Until the step ends the released code keeps W' also in the
        #    dictionary from which another engine, which generates, got it.
        composed = {}
        for name, layer in self.layers.items():
            with torch.no_grad():
                if lean:
                    self.weights[name].copy_(layer.weight)
                else:
                    composed[name] = self.build(layer)
                    self.weights[name].copy_(composed[name])

        # 2) The gradient of every W'.
        for start in range(0, len(rows.sequences), rows_at_a_time):
            part = slice(start, start + rows_at_a_time)
            log_probs = self.log_probs(rows.sequences[part])
            loss = -(log_probs * rows.advantages[part]).sum() / len(rows.sequences)
            loss.backward()

        # 3) Pull it back to z.
        for name, layer in self.layers.items():
            gradient = self.weights[name].grad
            if lean:
                layer.z.grad = ((layer.U.T @ gradient) * layer.Vh).sum(1) * layer.s
            else:
                self.build(layer).backward(gradient)
            self.weights[name].grad = None


def with_lora(dense_model: nn.Module) -> nn.Module | None:
    """A copy of the model with a LoRA on its queries and values; None if PEFT is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("no LoRA to compare with: pip install -r experiments/requirements.txt")
        return None
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    return get_peft_model(copy.deepcopy(dense_model), config)


# ---- Memory --------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive inside the `with` block: `now` and `most`.

    The weights of the models given are counted from the start. Tensors without storage count as if
    they had one. What an operation needs only inside itself is not counted.

    Example: `with Peak(model) as peak: model(**inputs)`, then `peak.most`.
    """

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.alive: set[int] = set()  # addresses of storages; a tensor shares its views' storage
        self.now = 0
        self.most = 0
        for model in models:
            self.count([*model.parameters(), *model.buffers()])

    def count(self, values: object) -> None:
        """Counts the tensors in a nested structure, until they are freed."""
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if address not in self.alive:
                self.alive.add(address)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.alive.remove(address)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result


def peak_gib(run: Way, *models: nn.Module) -> float:
    """The peak memory of a way in GiB, with the weights of these models."""
    with Peak(*models) as peak:
        run()
    return peak.most / 2**30


def llama_shape(
    vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "Qwen2.5-0.5B": llama_shape(151936, 896, 4864, 24, heads=14, kv_heads=2, tied=True),
    "Qwen2.5-1.5B": llama_shape(151936, 1536, 8960, 28, heads=12, kv_heads=2, tied=True),
    "Qwen2.5-3B": llama_shape(151936, 2048, 11008, 36, heads=16, kv_heads=2, tied=True),
    "Llama-3-8B": llama_shape(128256, 4096, 14336, 32, heads=32, kv_heads=8, tied=False),
}


def counted_memory(config: LlamaConfig) -> dict[str, float]:
    """GiB of the dense weights, of the factored ones, and at the peak of a training step.

    The step runs in bfloat16 on tensors without storage: one row of 1,024 tokens, 512 of them the
    completion, with the KL and checkpointing.
    """
    hp = t2.Hyperparameters(kl_coef=0.1, checkpointing=True)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        dense_bytes = Peak(model).now
        t2.apply_svf(model)
        factored_bytes = Peak(model).now
        prompt = torch.ones(1, 512, dtype=torch.long)
        inputs = {"input_ids": prompt, "attention_mask": prompt}
        with Peak(model) as peak:
            micro_batch_step(model, inputs, [[5] * 512], torch.ones(1), hp)
    return {
        "dense weights": dense_bytes / 2**30,
        "factored weights": factored_bytes / 2**30,
        "peak of a training step": peak.most / 2**30,
    }
