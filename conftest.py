"""What several test files share: a small tokenizer and small random models of many families."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn

from tasks.tiny import tiny_tokenizer
from transformer2 import Expert, Task, apply_svf, svf_layers

WORDS = (
    "Classify the question into one of these categories: red, green, blue, other. "
    "The category of this question is What is 1 plus 2? Hello math mathematics"
)
TOKENIZER = tiny_tokenizer([WORDS, "0123456789ABCDEFGH"])
CONTEXT = 160  # tokens that the models below can read


@dataclass
class Family:
    """How to make a small random model of one family."""

    config: str  # the class of its configuration in transformers
    settings: dict = field(default_factory=dict)  # what it needs beside SMALL
    targets: str = "mlp"  # of apply_svf; "all" where the family has no MLP


SMALL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # large, so that every token and every position matters
    "tie_word_embeddings": False,  # tied ones say the same token for ever
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
STATE_SPACE = {"state_size": 8, "expand": 2, "conv_kernel": 4}
EXACT_FAMILIES = {
    "llama": Family("LlamaConfig"),
    "qwen2": Family("Qwen2Config"),  # biases
    "qwen3": Family("Qwen3Config", {"head_dim": 8}),
    "mistral": Family("MistralConfig", {"sliding_window": None}),
    "gemma2": Family("Gemma2Config", {"head_dim": 8, "sliding_window": 16}),
    "gemma3": Family("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 16}),
    # Conv1D layers, absolute positions
    "gpt2": Family("GPT2Config", {"n_inner": 48, "tie_word_embeddings": True}),
    "gpt_neox": Family("GPTNeoXConfig"),
    "phi3": Family("Phi3Config"),  # one layer for q, k and v
    "opt": Family(  # its MLP sees a batch's rows as one
        "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
    ),
    "falcon": Family("FalconConfig"),
    "stablelm": Family("StableLmConfig"),
    "cohere": Family("CohereConfig", {"logit_scale": 1.0, "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2Config"),
    "granite": Family("GraniteConfig"),
    "mamba2": Family(
        "Mamba2Config",
        {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
        targets="all",
    ),
}
GENERATION_FAMILIES = {
    **EXACT_FAMILIES,
    "mamba": Family("MambaConfig", {**STATE_SPACE, "time_step_rank": 4}, targets="all"),
    "falcon_h1": Family(
        "FalconH1Config",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "lfm2": Family(
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    ),
    "mistral_window": Family("MistralConfig", {"sliding_window": 16}),
}
FAMILIES = {
    **GENERATION_FAMILIES,
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "mlp_only_layers": [0, 1],
        },
    ),
}
# What has a meaning of its own in a state-space layer keeps the values that it begins with.
STATE_SPACE_PARAMETERS = ("A_log", "dt_bias", "dt_proj.bias")


def make(name: str = "llama", seed: int = 0) -> nn.Module:
    """A random model of a family; skips the test where transformers does not have the family."""
    family = FAMILIES[name]
    config_class = getattr(transformers, family.config, None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.config}")
    config = config_class(**{**SMALL, **family.settings})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        # Biases begin at 0 and norms at 1, which would hide a layer that loses them.
        if parameter.dim() == 1 and not parameter_name.endswith(STATE_SPACE_PARAMETERS):
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_svf(name: str = "llama", seed: int = 0) -> nn.Module:
    """A random model of a family after apply_svf."""
    return apply_svf(make(name, seed), FAMILIES[name].targets)


def random_expert(model: nn.Module, seed: int = 0, size: float = 0.5) -> Expert:
    """An expert whose z's are 1 plus random numbers of this size."""
    generator = torch.Generator().manual_seed(seed)
    expert = {}
    for name, layer in svf_layers(model).items():
        expert[name] = 1 + size * torch.randn(layer.s.shape, generator=generator)
    return expert


@torch.no_grad()
def set_z(model: nn.Module, expert: Expert) -> None:
    """Makes an expert the model's own z's, which train."""
    for name, layer in svf_layers(model).items():
        layer.z.copy_(expert[name])


def z_gradient(model: nn.Module) -> torch.Tensor:
    """The gradients of all z's, one after the other, as one vector; they are 0 afterwards."""
    gradients = []
    for layer in svf_layers(model).values():
        gradients.append(layer.z.grad)
        layer.z.grad = None
    return torch.cat(gradients)


def say(text: str) -> list[dict]:
    """A conversation in which the user says one thing."""
    return [{"role": "user", "content": text}]


def prompt_ids(text: str) -> list[int]:
    """The tokens of the prompt that say(text) becomes."""
    prompt = TOKENIZER.apply_chat_template(say(text), add_generation_prompt=True, tokenize=False)
    return TOKENIZER(prompt)["input_ids"]


@torch.no_grad()
def logits(model: nn.Module, tokens: list[int] | None = None) -> torch.Tensor:
    """The logits (T, V) of one row without padding, by a plain call of the model."""
    if tokens is None:
        tokens = [5, 6, 7, 8, 9, 10]
    return model(input_ids=torch.tensor([tokens])).logits[0]


def plain_log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log π of a completion after its prompt, from one plain call of the model on both."""
    log_pi = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    total = torch.zeros(())
    for i, token in enumerate(completion):
        total = total + log_pi[len(prompt) - 1 + i, token]
    return total


def plain_answer(model: nn.Module, prompt: list[int], max_new_tokens: int) -> str:
    """What transformers' own generate says after the tokens of a prompt, greedily, unpadded."""
    sequences = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return TOKENIZER.decode(sequences[0, len(prompt) :], skip_special_tokens=True)


def never_ends(model: nn.Module) -> nn.Module:
    """The model with an end token that does not exist, so that all answers have full length."""
    model.generation_config.eos_token_id = 10**6
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of a from b in units of b."""
    return ((a - b).norm() / b.norm()).item()


def toy(reward: Callable[[str, dict], float], **more: object) -> Task:
    """A task of 80 training and 20 other problems, with this reward."""
    problems = []
    for a in range(10):
        for b in range(10):
            problems.append({"question": f"What is {a} plus {b}?", "answer": "B"})

    def split_of(split: str) -> list[dict]:
        if split == "train":
            return problems[:80]
        return problems[80:]

    return Task("toy", split_of, lambda problem: say(problem["question"]), reward, **more)
