"""The mathematics and the promises of transformer2.py, on small random models.

No network, no GPU; about a minute and a half on two cores.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

import transformer2 as t2
from conftest import (
    CONTEXT,
    EXACT_FAMILIES,
    FAMILIES,
    GENERATION_FAMILIES,
    TOKENIZER,
    logits,
    make,
    make_svf,
    never_ends,
    plain_answer,
    plain_log_prob,
    prompt_ids,
    random_expert,
    relative,
    say,
    set_z,
    toy,
    z_gradient,
)
from experiments.steps import SHAPES, Peak, counted_memory

HERE = Path(__file__).parent
SHORT, LONG = "Hello", "What is 1 plus 2? ABCDEFGH Hello"  # prompts of unequal length
COLORS = ["red", "green", "blue"]


def is_blue(completion: str, problem: dict) -> float:
    return 1.0 if completion.strip() == "blue" else -1.0


def starts_with_digit(completion: str, problem: dict) -> float:
    return 1.0 if completion.strip()[:1].isdigit() else -1.0


def checksum(text: str, problem: dict) -> float:
    """A reward that tells answers and problems apart."""
    return zlib.crc32(f"{problem['question']} {text}".encode()) % 97 / 97


# ---- Section 3.1: singular value fine-tuning -----------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_decomposition_is_the_svd(shape):
    torch.manual_seed(0)
    W = torch.randn(shape)
    U, s, Vh = t2.decompose(W)
    assert torch.allclose(U @ torch.diag(s) @ Vh, W, atol=1e-5)
    assert torch.allclose(s, torch.linalg.svdvals(W), atol=1e-5)
    assert torch.allclose(U.T @ U, torch.eye(5 if 5 in shape else 6), atol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(5 if 5 in shape else 6), atol=1e-5)


def test_decomposition_of_a_singular_matrix_is_exact():
    W = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 8))
    U, s, Vh = t2.decompose(W)
    assert torch.isfinite(U).all()
    assert torch.allclose(U @ torch.diag(s) @ Vh, W, atol=1e-4)


def test_decompositions_are_remembered_by_content(tmp_path):
    A, B = torch.randn(6, 4), torch.randn(6, 4)
    U, s, Vh = t2.decompose_cached(A, tmp_path)
    [path] = tmp_path.iterdir()
    save_file({"U": U, "s": 2 * s, "Vh": Vh}, path)  # so that a hit can be told from a miss
    assert torch.equal(t2.decompose_cached(A, tmp_path)[1], 2 * s)
    assert torch.allclose(t2.decompose_cached(B, tmp_path)[1], torch.linalg.svdvals(B), atol=1e-5)


def test_a_damaged_decomposition_is_made_again(tmp_path):
    W = torch.randn(6, 4)
    factors = t2.decompose_cached(W, tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    for _ in range(2):
        for made, expected in zip(t2.decompose_cached(W, tmp_path), factors):
            assert torch.equal(made, expected)
    assert path.read_bytes() != b"damaged"


def test_apply_svf_reads_the_cache_of_decompositions(tmp_path, monkeypatch):
    first = t2.apply_svf(make(), cache_dir=tmp_path)
    monkeypatch.setattr(t2, "decompose", None)  # calling it would fail
    second = t2.apply_svf(make(), cache_dir=tmp_path)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_z_of_ones_is_the_untouched_model(family):
    before = logits(make(family))
    for targets in (EXACT_FAMILIES[family].targets, "all"):
        model = t2.apply_svf(make(family), targets)
        assert len(t2.svf_layers(model)) > 1
        assert relative(logits(model), before) < 1e-4


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_a_merged_model_equals_the_factored_one_and_has_the_former_classes_and_names(family):
    model = make(family)
    before = logits(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    t2.apply_svf(model, "all")
    with t2.use_expert(model, random_expert(model)):
        factored = logits(model)
        t2.merge_svf(model)
    assert relative(factored, before) > 0.01
    assert relative(logits(model), factored) < 1e-4
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == names


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_model_can_be_saved_and_loaded(family, tmp_path):
    model = make_svf(family)
    with t2.use_expert(model, random_expert(model)):
        t2.merge_svf(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(loaded), logits(model)) < 1e-5


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_the_gradient_of_z_is_the_finite_difference(family):
    model = t2.apply_svf(make(family), "all").double()
    set_z(model, random_expert(model, size=0.3))
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    torch.manual_seed(0)
    weights = torch.randn(6, model.config.vocab_size, dtype=torch.float64)

    def loss():
        return (model(input_ids=tokens).logits[0].double() * weights).mean()

    loss().backward()
    for layer in t2.svf_layers(model).values():
        # Along this direction no two components cancel, and each counts by a size of its own.
        direction = layer.z.grad.sign() * (0.5 + torch.rand_like(layer.z))
        slope = (layer.z.grad * direction).sum().item()
        step, values = 1e-3, []
        with torch.no_grad():
            for distance in (step, -2 * step):
                layer.z += distance * direction
                values.append(loss().item())
            layer.z += step * direction
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.01)


def test_only_z_trains():
    model = t2.apply_svf(make(), "all")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.z" for name in t2.svf_layers(model)]


def test_targets_may_be_a_regular_expression():
    model = t2.apply_svf(make(), r"layers\.0\.mlp\.up_proj$")
    assert list(t2.svf_layers(model)) == ["model.layers.0.mlp.up_proj"]


def test_the_output_head_stays_as_it_is():
    model = t2.apply_svf(make(), "all")
    assert not any("lm_head" in name for name in t2.svf_layers(model))


@pytest.mark.parametrize("targets", ["no_such_layer", "(", "lm_head"])
def test_targets_that_match_no_layer_are_refused(targets):
    with pytest.raises(t2.Transformer2Error, match="match no"):
        t2.apply_svf(make(), targets)


def test_a_layer_shows_its_composed_weight():
    model = make()
    dense = model.model.layers[0].mlp.up_proj.weight.clone()
    t2.apply_svf(model)
    assert torch.allclose(model.model.layers[0].mlp.up_proj.weight, dense, atol=1e-5)


def test_bfloat16_keeps_z_in_float32():
    model = make().to(torch.bfloat16)
    before = logits(model).float()
    t2.apply_svf(model)
    for layer in t2.svf_layers(model).values():
        assert layer.z.dtype == layer.s.dtype == torch.float32
        assert layer.U.dtype == layer.Vh.dtype == torch.bfloat16
    assert relative(logits(model).float(), before) < 0.05


def test_parameter_counts_at_llama_3_8b():
    config = SHAPES["Llama-3-8B"]
    for targets, count in (("mlp", 393_216), (r"(q|v)_proj$", 163_840)):
        with torch.device("meta"):
            model = t2.apply_svf(AutoModelForCausalLM.from_config(config), targets)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def mixture_of_experts() -> nn.Module:
    """A small model; in new versions of transformers its experts' weights have three dimensions."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    experts = model.model.layers[0].mlp.experts
    if not any(parameter.dim() == 3 for parameter in experts.parameters(recurse=False)):
        pytest.skip("this transformers has an nn.Linear for every expert")
    return model


def test_weights_of_three_dimensions_are_named_and_the_others_are_adapted(capsys):
    model = mixture_of_experts()
    before = logits(model)
    t2.apply_svf(model, "all")
    attention = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"}
    assert attention <= set(t2.svf_layers(model))
    assert relative(logits(model), before) < 1e-4
    [message] = capsys.readouterr().err.splitlines()
    assert re.search(r"cannot be adapted, like .*layers\.0\.mlp\.experts.*self_attn", message)


def test_targets_that_match_only_weights_of_three_dimensions_are_refused():
    with pytest.raises(t2.Transformer2Error, match=r"cannot be adapted, like .*mlp\.experts"):
        t2.apply_svf(mixture_of_experts(), r"mlp\.experts")


# ---- Experts -------------------------------------------------------------------------------------


def test_experts_nest():
    model = make_svf()
    a, b = random_expert(model, 1), random_expert(model, 2)
    base = logits(model)
    with t2.use_expert(model, a):
        under_a = logits(model)
        with t2.use_expert(model, b):
            assert relative(logits(model), under_a) > 0.01
        with t2.use_expert(model, None):
            assert relative(logits(model), base) < 1e-6
        assert torch.equal(logits(model), under_a)
    assert torch.equal(logits(model), base)


def test_the_former_expert_is_put_back_after_an_exception():
    model = make_svf()
    base = logits(model)
    with pytest.raises(KeyboardInterrupt), t2.use_expert(model, random_expert(model)):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), base)


def test_get_expert_copies_the_z_in_use():
    model = make_svf()
    expert = random_expert(model)
    with t2.use_expert(model, expert):
        copied = t2.get_expert(model)
    assert copied.keys() == expert.keys()
    for name, z in t2.get_expert(model).items():
        assert torch.equal(copied[name], expert[name])
        assert torch.equal(z, torch.ones_like(z))
        z.fill_(7.0)  # a copy: the model does not change
    assert torch.equal(t2.svf_layers(model)[name].z, torch.ones_like(z))


def test_a_layer_that_an_expert_does_not_have_is_the_base_models():
    model = make_svf()
    expert = random_expert(model)
    name = "model.layers.0.mlp.up_proj"
    with t2.use_expert(model, {name: expert[name]}):
        partly = logits(model)
    ones = {other: torch.ones_like(z) for other, z in expert.items()}
    with t2.use_expert(model, {**ones, name: expert[name]}):
        assert torch.equal(logits(model), partly)


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_each_row_of_a_padded_batch_has_the_logits_of_its_own_expert_alone(family):
    model = t2.apply_svf(make(family), "all")
    experts = [random_expert(model, 1), None, random_expert(model, 2)]
    texts = [SHORT, LONG, "Hello ABC"]
    inputs = t2.encode(model, TOKENIZER, [say(text) for text in texts])
    with torch.no_grad(), t2.use_expert(model, experts):
        mixed = t2.run_model(model, inputs).logits
    for row, text, expert in zip(mixed, texts, experts):
        with t2.use_expert(model, expert):
            alone = logits(model, prompt_ids(text))
        assert relative(row[-len(alone) :], alone) < 1e-4


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_each_row_of_a_batch_says_what_its_own_expert_says_alone(family):
    model = never_ends(t2.apply_svf(make(family), "all"))
    experts = [random_expert(model, 1, 2.0), None, random_expert(model, 2, 2.0)]
    conversations = [say(SHORT), say(LONG), say("Hello ABC")]
    mixed = t2.generate(model, TOKENIZER, conversations, expert=experts, max_new_tokens=12)
    alone = []
    for conversation, expert in zip(conversations, experts):
        alone += t2.generate(model, TOKENIZER, [conversation], expert=expert, max_new_tokens=12)
    assert mixed == alone
    assert mixed != t2.generate(model, TOKENIZER, conversations, max_new_tokens=12)


def test_a_list_of_experts_has_to_be_as_long_as_the_batch():
    model = make_svf()
    with pytest.raises(t2.Transformer2Error, match="2 rows"):
        with t2.use_expert(model, [None] * 3):
            model(input_ids=torch.tensor([[5, 6], [7, 8]]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_experts_has_to_be_as_long_as_the_list_of_prompts(count):
    model, experts, prompts = make_svf(), [None] * count, [say(SHORT), say(LONG)]
    with pytest.raises(t2.Transformer2Error, match=f"there are {count} experts for 2 rows"):
        t2.generate(model, TOKENIZER, prompts, expert=experts)
    with pytest.raises(t2.Transformer2Error, match=f"there are {count} experts for 2 rows"):
        t2.evaluate(model, TOKENIZER, choice_task(), some_problems()[:2], expert=experts)


class Mixture(nn.Module):
    """Stands in for a mixture of experts, each an nn.Linear that sees tokens of any rows."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def get_output_embeddings(self):
        return None


def test_a_list_of_experts_is_refused_where_a_layer_does_not_see_rows():
    model = t2.apply_svf(Mixture())
    with pytest.raises(t2.Transformer2Error, match=r"mlp\.experts\.0.*one expert for all"):
        with t2.use_expert(model, [random_expert(model), None]):
            pass
    with t2.use_expert(model, random_expert(model)):  # one expert for all works
        pass


def test_an_expert_is_saved_and_loaded(tmp_path):
    model = make_svf()
    expert = random_expert(model)
    path = tmp_path / "expert.safetensors"
    t2.save_expert(expert, path, task="toy", seed=3)
    loaded = t2.load_expert(path, model)
    assert loaded.keys() == expert.keys()
    for name, z in loaded.items():
        assert torch.equal(z, expert[name])
    assert t2.expert_facts(path) == {"task": "toy", "seed": 3}


def test_an_expert_of_another_model_is_refused(tmp_path):
    model = make_svf()
    t2.save_expert(random_expert(model), tmp_path / "expert.safetensors")
    attention = t2.apply_svf(make(), "attention")
    with pytest.raises(t2.Transformer2Error, match="another model"):
        t2.load_expert(tmp_path / "expert.safetensors", attention)
    with pytest.raises(t2.Transformer2Error, match="another model"):
        with t2.use_expert(attention, random_expert(model)):
            pass
    wrong_shape = {name: z[:-1] for name, z in random_expert(model).items()}
    with pytest.raises(t2.Transformer2Error, match="another model"):
        with t2.use_expert(model, wrong_shape):
            pass


def test_a_saved_loaded_and_saved_expert_has_the_same_bytes(tmp_path):
    facts = {"task": "toy", "accuracy": 0.5, "blocks": 2}
    expert = random_expert(make_svf())
    t2.save_expert(expert, tmp_path / "first", **facts)
    loaded = t2.load_expert(tmp_path / "first")
    backwards = {name: loaded[name] for name in reversed(loaded)}
    t2.save_expert(backwards, tmp_path / "second", **dict(reversed(facts.items())))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("metadata", [None, {"task": "toy", "model": "tiny", "seed": "3"}])
def test_a_file_from_before_the_format_had_a_number_loads(metadata, tmp_path):
    model, path = make_svf(), tmp_path / "expert.safetensors"
    expert = random_expert(model)
    save_file(expert, path, metadata=metadata)
    loaded = t2.load_expert(path, model)
    assert all(torch.equal(loaded[name], z) for name, z in expert.items())
    assert t2.expert_facts(path) == (metadata or {})


class RunsCode:
    """What pickle would run while it loads: it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def damaged_files() -> dict[str, tuple[str, object]]:
    """Name of the damage -> (suffix, bytes of the file, or a function that writes it).

    The good file is an expert of make_svf(). Nothing here is such an expert.
    """
    torch.manual_seed(0)
    expert = random_expert(make_svf())
    first = next(iter(expert))
    folder = Path(tempfile.mkdtemp())
    t2.save_expert(expert, folder / "good", task="toy", model="random", blocks=2)
    good = (folder / "good").read_bytes()
    header_size = int.from_bytes(good[:8], "little")
    rng, files = random.Random(0), {}

    for place in rng.sample(range(len(good)), 45):
        files[f"cut after {place} bytes"] = (".safetensors", good[:place])
    for bit in rng.sample(range(8 * (8 + header_size)), 60):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        files[f"bit {bit} flipped"] = (".safetensors", bytes(flipped))
    for bit in rng.sample(range(8 * (8 + header_size), 8 * len(good)), 10):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        files[f"bit {bit} of a value flipped"] = (".safetensors", bytes(flipped))
    for length in (0, 1, header_size - 1, header_size + 1, 10**6, 2**40, 2**63, 2**64 - 1):
        changed = length.to_bytes(8, "little") + good[8:]
        files[f"a header of {length} bytes"] = (".safetensors", changed)
    for count in (1, 8, 1000):
        files[f"{count} bytes too many"] = (".safetensors", good + bytes(count))
    for text in (
        b"",
        b"{}",
        b"no safetensors",
        b"\x80\x04.",
        bytes(64),
        b"version https://git-lfs",
    ):
        files[f"the text {text[:20]}"] = (".safetensors", text)
        files[f"the text {text[:20]}, as .pt"] = (".pt", text)
    files["an expert as .pt"] = (".pt", good)

    def tensors(name: str, z: object, layer: str = first, metadata: dict | None = None) -> None:
        """The good expert with another z in one layer, as a safetensors file."""
        changed = {key: value for key, value in expert.items() if key != first}
        changed[layer] = z
        write = partial(save_file, changed, metadata=metadata)
        files[name] = (".safetensors", write)

    z = expert[first]
    for value in (math.nan, math.inf, -math.inf):
        tensors(f"a value that is {value}", torch.where(torch.arange(len(z)) == 3, value, z))
        half = torch.full_like(z, value, dtype=torch.bfloat16)
        tensors(f"bfloat16 values that are {value}", half)
    for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool):
        tensors(f"a tensor of {dtype}", torch.ones_like(z, dtype=dtype))
    for shape in ((len(z) - 1,), (len(z) + 1,), (1, len(z)), (0,), (), (len(z), len(z))):
        tensors(f"a tensor of shape {shape}", torch.ones(shape))
    for layer in ("", "lm_head", first + ".z", first.replace("0", "7"), "../" + first):
        tensors(f"a layer named {layer!r}", z.clone(), layer)
    files["no tensors"] = (".safetensors", partial(save_file, {}))
    for blocks in (1, 3, "two", None):
        save = partial(t2.save_expert, expert, blocks=blocks)
        files[f"a header of {blocks} blocks"] = (".safetensors", save)
    for header in ("", "{}", "[]", "null", "{", '{"format": 2, "about": {}, "sha256": ""}'):
        metadata = {"transformer2": header}
        tensors(f"the header {header}", z.clone(), metadata=metadata)

    weights = {f"{name}.weight": torch.zeros_like(z) for name, z in expert.items()}
    foreign = {
        "a list": [z],
        "a tensor": z,
        "a number": 3,
        "a text": "expert",
        "nothing": {},
        "an object that runs code": RunsCode(),
        "weights and code": {**weights, "code": RunsCode()},
        "a nested dict": {"state": weights},
        "a number among them": {**weights, "steps": 3},
        "a model": nn.Linear(2, 2),
        "whole numbers": {name: z.long() for name, z in weights.items()},
        "NaN": {name: z * math.nan for name, z in weights.items()},
        "shapes of another model": {name: z[:-1] for name, z in weights.items()},
        "names of another model": {f"x.{name}": z for name, z in weights.items()},
        "numbers of layers that are not there": {"list.99": z},
    }
    for name, content in foreign.items():
        files[f"{name} in a .pt file"] = (".pt", partial(torch.save, content))
    for name in ("an object that runs code", "weights and code"):
        pickled = pickle.dumps(foreign[name])
        files[f"{name}, pickled"] = (".pt", pickled)
        files[f"{name}, pickled, as .safetensors"] = (".safetensors", pickled)
    files["a folder"] = (".safetensors", Path.mkdir)
    files["a folder as .pt"] = (".pt", Path.mkdir)
    files["no file"] = (".safetensors", lambda path: None)
    files["no file as .pt"] = (".pt", lambda path: None)
    return files


def write_large_tensor(path: Path) -> None:
    """A file that says it holds a tensor of 2 GB. It takes no room on the disk."""
    size = 2 * 10**9
    about = {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(about).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def write_large_pt(path: Path) -> None:
    torch.save({"model.layers.0.mlp.up_proj.weight": torch.zeros(40_000_000)}, path)  # 160 MB


DAMAGED = damaged_files()
DAMAGED["a large tensor of another model"] = (".safetensors", write_large_tensor)
DAMAGED["a large tensor in a .pt file"] = (".pt", write_large_pt)


@pytest.fixture(scope="module")
def svf_model() -> nn.Module:
    return make_svf()


def test_there_are_at_least_150_damaged_files():
    assert len(DAMAGED) >= 150


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_file_is_refused(damage, svf_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suffix, content = DAMAGED[damage]
    path = tmp_path / f"expert{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with memory_taken() as memory, pytest.raises(t2.Transformer2Error) as refusal:
        t2.load_expert(path, svf_model)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    assert "weights_only" not in message  # torch advises to run the file's code
    assert not Path("EXECUTED").exists()
    assert memory.mib < 100


@dataclass
class Memory:
    mib: float = 0.0


@contextlib.contextmanager
def memory_taken() -> Iterator[Memory]:
    """How much more memory the process takes at most inside, where Linux counts it."""
    memory = Memory()
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        yield memory
        return

    def mib(name: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024

    clear_refs.write_text("5")  # forgets the former peak
    before = mib("VmRSS")
    try:
        yield memory
    finally:
        memory.mib = mib("VmHWM") - before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("a value that is nan", "is not a tensor of finite floating-point numbers"),
        ("a tensor of torch.int64", "is not a tensor of finite floating-point numbers"),
        ("a tensor of shape (0,)", r"\[0\] does not fit"),
        ("a layer named 'lm_head'", "another model or other targets"),
        ("a header of 3 blocks", "for 3 blocks, but the model has 2"),
        ("no tensors", "it holds no tensors"),
        ("a list in a .pt file", "it is not a dict of tensors"),
        ("an object that runs code in a .pt file", "not a torch file that holds only tensors"),
    ],
)
def test_a_refusal_says_what_is_wrong(damage, words, svf_model, tmp_path):
    suffix, content = DAMAGED[damage]
    content(tmp_path / f"expert{suffix}")
    with pytest.raises(t2.Transformer2Error, match=words):
        t2.load_expert(tmp_path / f"expert{suffix}", svf_model)


@pytest.mark.parametrize("damage", ["a tensor of shape (0,)", "a layer named 'lm_head'"])
def test_names_and_shapes_are_checked_before_a_tensor_is_read(
    damage, svf_model, tmp_path, monkeypatch
):
    safe_open = t2.safe_open

    @contextlib.contextmanager
    def header_only(path: Path, framework: str) -> Iterator[SimpleNamespace]:
        with safe_open(path, framework) as file:  # it has no get_tensor
            yield SimpleNamespace(metadata=file.metadata, keys=file.keys, get_slice=file.get_slice)

    path = tmp_path / "expert.safetensors"
    DAMAGED[damage][1](path)
    monkeypatch.setattr(t2, "safe_open", header_only)
    with pytest.raises(t2.Transformer2Error, match="does not fit"):
        t2.load_expert(path, svf_model)


def test_a_good_file_loads_after_damaged_ones(svf_model, tmp_path):
    expert = random_expert(svf_model)
    t2.save_expert(expert, tmp_path / "expert.safetensors", blocks=2)
    loaded = t2.load_expert(tmp_path / "expert.safetensors", svf_model)
    assert all(torch.equal(loaded[name], z) for name, z in expert.items())


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted(temporary: Path) -> None:
        temporary.write_text("half of ")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        t2.write_whole(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    """Starts a Python process that runs this code beside the module."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    folder = Path(t2.__file__).parent
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def test_what_a_killed_write_left_over_is_removed_by_the_next(tmp_path):
    killed = """
import os, signal, sys, transformer2
def write(temporary):
    temporary.write_text("half of ")
    os.kill(os.getpid(), signal.SIGKILL)
transformer2.write_whole(sys.argv[1], write)
"""
    assert run_python(killed, tmp_path / "file").wait() == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    t2.write_whole(tmp_path / "file", lambda temporary: temporary.write_text("all of it"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_of_two_processes_that_write_the_same_file_one_wins(tmp_path):
    write_often = """
import sys, transformer2
for _ in range(300):
    transformer2.write_whole(sys.argv[1], lambda path: path.write_text(sys.argv[2] * 100_000))
"""
    processes = [run_python(write_often, tmp_path / "file", letter) for letter in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "file").read_text() in ("a" * 100_000, "b" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_sentence_and_the_former_file_stays(tmp_path):
    """A limit on the size of files stands for the disk."""
    full = """
import resource, signal, sys, torch, transformer2
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    transformer2.save_expert({"layer": torch.ones(10_000)}, sys.argv[1])
except transformer2.Transformer2Error as error:
    sys.exit(str(error))
"""
    path = tmp_path / "expert.safetensors"
    t2.save_expert({"layer": torch.ones(3)}, path)
    process = run_python(full, path)
    _, message = process.communicate()
    assert process.returncode == 1
    assert message.startswith(f"cannot write {path}: ") and message.count("\n") == 1
    assert t2.load_expert(path)["layer"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["expert.safetensors"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(t2.Transformer2Error, match="cannot write .*/file/expert"):
        t2.save_expert({"layer": torch.ones(3)}, tmp_path / "file" / "expert")


def test_a_cache_that_cannot_be_written_does_not_stop_apply_svf(tmp_path):
    (tmp_path / "file").write_text("")
    model = t2.apply_svf(make(), cache_dir=tmp_path / "file")
    assert len(t2.svf_layers(model)) == 6


@pytest.mark.parametrize("file", ["learnable_params.pt", "policy_params.pt"])
def test_the_authors_checkpoints_give_the_authors_weights(file, tmp_path):
    model = make_svf()
    layers = t2.svf_layers(model)
    p = {name: torch.randn_like(layer.s) for name, layer in layers.items()}
    if file == "learnable_params.pt":  # has names
        theirs = {f"{name}.weight": values for name, values in p.items()}
    else:  # counts the layers
        theirs = {f"learnable_params_module_list.{i}": x for i, x in enumerate(p.values())}
    torch.save(theirs, tmp_path / file)
    with t2.use_expert(model, t2.load_expert(tmp_path / file, model)):
        for name, layer in layers.items():
            # As in their compose_new_params.
            z = torch.sigmoid(p[name])
            norm = layer.s.sum() / (layer.s * z).sum()
            weight = layer.U @ torch.diag(layer.s * z) @ layer.Vh * norm
            assert relative(layer.weight, weight) < 1e-5


# ---- Section 3.1: log-probabilities and the policy gradient --------------------------------------


def test_token_log_probs_are_log_softmax_at_the_tokens():
    torch.manual_seed(0)
    scores = 5 * torch.randn(2, 3, 7)
    tokens = torch.tensor([[0, 6, 3], [2, 2, 5]])
    expected = scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(t2.token_log_probs(scores, tokens), expected, atol=1e-5)


def test_token_log_probs_are_float32_in_a_bfloat16_model():
    scores = torch.randn(4, 1000).bfloat16()
    log_probs = t2.token_log_probs(scores, torch.arange(4))
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs, scores.float().log_softmax(-1)[range(4), range(4)], atol=1e-5)


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_padding_does_not_matter_in_completion_log_probs(family):
    model = make(family)
    texts, completions = [SHORT, LONG, "Hello ABC"], [[7, 8, 9], [10], [5, 6]]
    inputs = t2.encode(model, TOKENIZER, [say(text) for text in texts])
    with torch.no_grad():
        log_probs = t2.completion_log_probs(model, inputs, completions)
        for text, completion, log_prob in zip(texts, completions, log_probs):
            alone = plain_log_prob(model, prompt_ids(text), completion)
            assert log_prob.item() == pytest.approx(alone.item(), abs=1e-4)


def test_the_loss_of_one_step_with_two_actions_worked_out_by_hand():
    """π = (p, 1 - p) with p = sigmoid(x), π_ref = (q, 1 - q), and the first action is drawn.

    The log ratio is log(p / q), and d/dx log p = 1 - p. So the gradient of -J is estimated as
    -(1 - p) (r - λ log(p / q)).
    """
    x = torch.tensor(0.3, requires_grad=True)
    p, q, r, kl_coef = torch.sigmoid(x).item(), 0.4, -1.0, 0.2
    log_prob = F.logsigmoid(x)[None]
    ref_log_prob = torch.tensor([math.log(q)])
    loss = t2.reinforce_loss(log_prob, ref_log_prob, torch.tensor([r]), kl_coef, weights=1.0)
    loss.backward()
    assert x.grad.item() == pytest.approx(-(1 - p) * (r - kl_coef * math.log(p / q)), rel=1e-5)


def test_leave_one_out_advantages_are_rewards_less_the_mean_of_the_others():
    advantages = t2.leave_one_out_advantages(torch.tensor([1.0, -1.0, 0.0, 0.5]))
    assert torch.allclose(advantages, torch.tensor([1 + 0.5 / 3, -1 - 0.5, -0.5 / 3, 0.5]))


def test_one_answer_alone_has_no_baseline():
    assert t2.leave_one_out_advantages(torch.tensor([-1.0])).tolist() == [-1.0]


def enumerate_answers(vocabulary: int, length: int):
    """A small model whose z's are not 1, and log π and log π_ref of all answers it can give."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = t2.apply_svf(AutoModelForCausalLM.from_config(config), "all").double()
    set_z(model, random_expert(model, size=0.5))
    answers = [list(answer) for answer in itertools.product(range(vocabulary), repeat=length)]
    prompts = torch.tensor([[1, 2, 3]] * len(answers))
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    log_probs = t2.completion_log_probs(model, inputs, answers)
    with torch.no_grad(), t2.use_expert(model, None):
        ref_log_probs = t2.completion_log_probs(model, inputs, answers)
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    return model, log_probs, ref_log_probs


def gradient_of(value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """The gradient of a number with respect to all z's, as one vector."""
    value.backward(retain_graph=True)
    return z_gradient(model)


def test_the_gradient_of_sampled_answers_is_on_average_that_of_eq_1():
    """All 216 answers of three tokens, each weighted with its probability, at λ = 0.3."""
    model, log_probs, ref_log_probs = enumerate_answers(vocabulary=6, length=3)
    rewards = torch.randn(len(log_probs))
    probs = log_probs.exp()
    J = (probs * (rewards - 0.3 * (log_probs - ref_log_probs))).sum()

    expected_loss = 0.0
    for i, prob in enumerate(probs.detach()):
        answer = slice(i, i + 1)
        terms = (log_probs[answer], ref_log_probs[answer], rewards[answer])
        expected_loss = expected_loss + prob * t2.reinforce_loss(*terms, 0.3, weights=1.0)
    assert relative(gradient_of(expected_loss, model), -gradient_of(J, model)) < 1e-4


def test_the_baseline_leaves_the_average_gradient_as_it_is():
    """All 256 pairs of answers that a batch of two can have, at λ = 0.3."""
    model, log_probs, ref_log_probs = enumerate_answers(vocabulary=4, length=2)
    rewards = torch.randn(len(log_probs))
    probs = log_probs.exp()
    J = (probs * (rewards - 0.3 * (log_probs - ref_log_probs))).sum()

    expected_loss = 0.0
    for pair in itertools.product(range(len(log_probs)), repeat=2):
        pair = list(pair)
        advantages = t2.leave_one_out_advantages(rewards[pair])
        terms = (log_probs[pair], ref_log_probs[pair], advantages)
        loss = t2.reinforce_loss(*terms, 0.3, weights=0.5)
        expected_loss = expected_loss + probs[pair].prod().detach() * loss
    assert relative(gradient_of(expected_loss, model), -gradient_of(J, model)) < 1e-4


def choice_gradient(model: nn.Module, task: t2.Task, problems: list, hp: t2.Hyperparameters):
    """Sets the gradient of a task with choices, and gives the figures of the step."""
    answers = [t2.choices_of(TOKENIZER, task, problem) for problem in problems]
    for problem, choices in zip(problems, answers):
        for choice in choices:
            choice.reward = task.reward(choice.text, problem)
    return gradient_stats(model, task, problems, answers, hp)


def gradient_stats(model, task, problems, answers, hp) -> t2.StepStats:
    """Sets the gradient of given answers, and gives the figures of the step."""
    with t2.token_budget(model, hp.token_budget):
        answers = t2.set_gradient(model, TOKENIZER, task, problems, answers, hp)
    return t2.step_stats(1, task, answers, hp, rollout_seconds=1.0)


def some_answers() -> list[t2.Answer]:
    """Six answers of one to three tokens, right and wrong."""
    answers = []
    for i in range(6):
        answers.append(t2.Answer(tokens=[5 + i, 6, 7][: 1 + i % 3], text="", reward=(-1.0) ** i))
    return answers


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("token_budget", [10**6, 60, 1])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(token_budget, baseline):
    model = make_svf()
    set_z(model, random_expert(model))
    task, answers = toy(is_blue, max_new_tokens=4), some_answers()
    problems = task.problems("train")[5:11]
    hp = t2.Hyperparameters(token_budget=token_budget, kl_coef=0.3, baseline=baseline)
    stats = gradient_stats(model, task, problems, [[a] for a in answers], hp)
    gradient = z_gradient(model)

    log_probs, ref_log_probs = [], []
    for problem, answer in zip(problems, answers):
        prompt = prompt_ids(problem["question"])
        log_probs.append(plain_log_prob(model, prompt, answer.tokens))
        with torch.no_grad(), t2.use_expert(model, None):
            ref_log_probs.append(plain_log_prob(model, prompt, answer.tokens))
    log_probs, log_ratios = torch.stack(log_probs), torch.stack(log_probs).detach()
    log_ratios = log_ratios - torch.stack(ref_log_probs)
    rewards = torch.tensor([answer.reward for answer in answers])
    advantages = rewards
    if baseline:
        advantages = rewards - torch.tensor([-0.2, 0.2] * 3)  # means of the five others
    (-(log_probs * (advantages - 0.3 * log_ratios)).mean()).backward()
    assert relative(gradient, z_gradient(model)) < 1e-4
    assert stats.kl == pytest.approx(log_ratios.mean().item(), abs=1e-5)
    assert stats.reward == pytest.approx(0)


@pytest.mark.parametrize("token_budget", [10**6, 60, 1])
def test_the_token_budget_bounds_a_micro_batch_of_answers(token_budget, monkeypatch):
    sizes, completion_log_probs = [], t2.completion_log_probs

    def recorded(model, inputs, completions):
        rows, width = inputs["input_ids"].shape
        sizes.append((rows, rows * (width + max(len(tokens) for tokens in completions))))
        return completion_log_probs(model, inputs, completions)

    monkeypatch.setattr(t2, "completion_log_probs", recorded)
    task = toy(is_blue)
    hp = t2.Hyperparameters(token_budget=token_budget)
    answers = [[answer] for answer in some_answers()]
    gradient_stats(make_svf(), task, task.problems("train")[:6], answers, hp)
    assert sum(rows for rows, _ in sizes) == 6
    assert all(tokens <= token_budget or rows == 1 for rows, tokens in sizes)
    assert len(sizes) == {10**6: 1, 60: 2, 1: 6}[token_budget]


@pytest.mark.parametrize("token_budget", [10**6, 80, 1])
def test_the_token_budget_bounds_a_micro_batch_of_choices_and_the_copies_of_prompts(
    token_budget, monkeypatch
):
    sizes, choice_log_probs = [], t2.choice_log_probs

    def recorded(model, inputs, choices):
        rows, width = inputs["input_ids"].shape
        longest = max(len(tokens) for own_choices in choices for tokens in own_choices)
        sizes.append((rows, rows * len(COLORS) * (width + longest)))
        return choice_log_probs(model, inputs, choices)

    monkeypatch.setattr(t2, "choice_log_probs", recorded)
    task = toy(is_blue, choices=COLORS)
    hp = t2.Hyperparameters(token_budget=token_budget)
    choice_gradient(make_svf(), task, task.problems("train")[:6], hp)
    assert sum(rows for rows, _ in sizes) == 6
    assert all(tokens <= token_budget or rows == 1 for rows, tokens in sizes)
    assert len(sizes) == {10**6: 1, 80: 3, 1: 6}[token_budget]


def gradient_of_a_step(model: nn.Module, task: t2.Task, **hyper) -> torch.Tensor:
    """The gradient of six problems with the answers above, or with all choices of the task."""
    hp, problems = t2.Hyperparameters(kl_coef=0.1, **hyper), task.problems("train")[5:11]
    if task.choices:
        choice_gradient(model, task, problems, hp)
    else:
        answers = [[answer] for answer in some_answers()]
        gradient_stats(model, task, problems, answers, hp)
    return z_gradient(model)


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_checkpointing_gives_the_same_gradient(family):
    model = t2.apply_svf(make(family), "all")
    set_z(model, random_expert(model))
    for task in (toy(is_blue), toy(is_blue, choices=COLORS, prefill="The category is")):
        expected = gradient_of_a_step(model, task)
        assert expected.norm() > 1e-3
        assert relative(gradient_of_a_step(model, task, checkpointing=True), expected) < 1e-4


def test_checkpointing_takes_less_memory():
    model = t2.apply_svf(make(), "all")
    peaks = []
    for checkpointing in (False, True):
        with Peak(model) as peak:
            gradient_of_a_step(model, toy(is_blue), checkpointing=checkpointing)
        peaks.append(peak.most)
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 reads values of the mask, which tensors without storage do not have",
)
def test_llama_3_8b_trains_on_a_card_of_24_gb():
    """Bytes are counted on tensors without storage: one row of 1,024 tokens, λ > 0."""
    memory = counted_memory(SHAPES["Llama-3-8B"])
    assert memory["dense weights"] == pytest.approx(14.96, abs=0.01)
    assert memory["factored weights"] == pytest.approx(17.96, abs=0.01)
    assert 18 < memory["peak of a training step"] < 23


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mamba2", "gemma3"])
def test_checkpointing_leaves_the_model_as_it_was(family):
    model = make_svf(family)
    states = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(KeyboardInterrupt), t2.checkpointing(model, True):
        raise KeyboardInterrupt
    for name, module in model.named_modules():
        assert vars(module) == states[name]


# ---- Choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_have_the_log_probs_and_gradients_of_whole_sequences(family):
    """They differ in number between problems, in length, and some begin alike."""
    model = make_svf(family)
    set_z(model, random_expert(model, size=0.3))
    texts = [SHORT, LONG]
    choices = [[[5, 6, 7], [5, 6, 8], [5, 6], [9]], [[10, 11], [12]]]
    inputs = t2.encode(model, TOKENIZER, [say(text) for text in texts])
    log_probs = t2.choice_log_probs(model, inputs, choices)
    assert [scores.shape for scores in log_probs] == [(4,), (2,)]

    expected = []
    for text, own_choices in zip(texts, choices):
        for choice in own_choices:
            expected.append(plain_log_prob(model, prompt_ids(text), choice))
    scores, expected = torch.cat(log_probs), torch.stack(expected)
    assert torch.allclose(scores, expected, atol=1e-4)

    weights = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.7])
    (scores * weights).sum().backward()
    gradient = z_gradient(model)
    (expected * weights).sum().backward()
    assert relative(gradient, z_gradient(model)) < 1e-3


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_choices_are_scored_under_the_expert_of_their_row(family):
    model = make_svf(family)
    experts = [random_expert(model, 1), None, random_expert(model, 2)]
    task = toy(is_blue, choices=["A B", "A C", "red"])
    problems = task.problems("train")[:3]
    mixed = t2.score_choices(model, TOKENIZER, task, problems, expert=experts)
    for scores, problem, expert in zip(mixed, problems, experts):
        [alone] = t2.score_choices(model, TOKENIZER, task, [problem], expert=expert)
        assert torch.allclose(scores, alone, atol=1e-4)


def test_a_problem_may_have_choices_of_its_own_that_begin_with_a_blank():
    """As benchmarks score them: plain prompts, the blank counts, no end token."""
    model = make()
    problems = [
        {"question": "What is 1 plus 2?", "options": [" red", " green", "blue"], "answer": ""},
        {"question": "Hello", "options": [" red A", " red AB"], "answer": ""},
    ]
    task = t2.Task(
        "own-choices",
        problems=lambda split: problems,
        conversation=lambda problem: problem["question"],
        reward=is_blue,
        choices=lambda problem: problem["options"],
    )
    scores = t2.score_choices(model, TOKENIZER, task, problems)
    for problem, own_scores in zip(problems, scores):
        assert len(own_scores) == len(problem["options"])
        for option, score in zip(problem["options"], own_scores):
            prompt = TOKENIZER(problem["question"])["input_ids"]
            alone = plain_log_prob(model, prompt, TOKENIZER(option)["input_ids"])
            assert score.item() == pytest.approx(alone.item(), abs=1e-4)


def test_a_blank_stands_between_prefill_and_choice():
    model = make()
    task = toy(is_blue, choices=["red", " green"], prefill="The category is")
    [problem] = task.problems("train")[:1]
    [scores] = t2.score_choices(model, TOKENIZER, task, [problem])
    prompt = prompt_ids(problem["question"]) + TOKENIZER("The category is")["input_ids"]
    for score, text in zip(scores, [" red", " green"]):
        alone = plain_log_prob(model, prompt, TOKENIZER(text)["input_ids"])
        assert score.item() == pytest.approx(alone.item(), abs=1e-4)


def test_the_gradient_for_choices_is_that_of_eq_1():
    """J written out with whole sequences; choices of unequal number, at λ = 0.3."""
    model = make_svf()
    set_z(model, random_expert(model))
    rewards = {"red": 1.0, "green": -1.0, "blue": -0.1}

    def choices(problem: dict) -> list[str]:
        return COLORS[: 2 + int(problem["question"][-2]) % 2]

    task = toy(lambda text, problem: rewards[text], choices=choices, prefill="The category is")
    problems = task.problems("train")[:5]
    hp = t2.Hyperparameters(kl_coef=0.3, token_budget=220)  # micro-batches of three and two
    stats = choice_gradient(model, task, problems, hp)
    gradient = z_gradient(model)

    J, mean_reward, mean_kl = torch.zeros(()), 0.0, 0.0
    for problem in problems:
        prompt = prompt_ids(problem["question"]) + TOKENIZER(task.prefill)["input_ids"]
        scores, ref_scores, own_rewards = [], [], []
        for text in choices(problem):
            tokens = TOKENIZER(f" {text}")["input_ids"]
            scores.append(plain_log_prob(model, prompt, tokens))
            with torch.no_grad(), t2.use_expert(model, None):
                ref_scores.append(plain_log_prob(model, prompt, tokens))
            own_rewards.append(rewards[text])
        log_pi = torch.stack(scores).log_softmax(0)
        log_ratio = log_pi - torch.stack(ref_scores).log_softmax(0)
        reward = (log_pi.exp() * torch.tensor(own_rewards)).sum() / 5
        kl = (log_pi.exp() * log_ratio).sum() / 5
        J = J + reward - 0.3 * kl
        mean_reward, mean_kl = mean_reward + reward.item(), mean_kl + kl.item()
    J.backward()
    assert relative(gradient, -z_gradient(model)) < 1e-3
    assert stats.reward == pytest.approx(mean_reward, abs=1e-5)
    assert stats.kl == pytest.approx(mean_kl, abs=1e-5)


@pytest.mark.parametrize("choices", [[], lambda problem: []])
def test_a_problem_without_choices_is_refused(choices):
    task = toy(is_blue, choices=choices)
    for use in (t2.evaluate, t2.score_choices):
        with pytest.raises(t2.Transformer2Error, match="toy has no choices"):
            use(make(), TOKENIZER, task, task.problems("test"))
    with pytest.raises(t2.Transformer2Error, match="toy has no choices"):
        t2.reinforce(make_svf(), TOKENIZER, task, steps=1)


def test_a_choice_without_tokens_is_refused():
    task = toy(is_blue, choices=["red", ""])
    with pytest.raises(t2.Transformer2Error, match="the choice '' of task toy gives no tokens"):
        t2.score_choices(make(), TOKENIZER, task, task.problems("test"))


# ---- Section 3.1: training -----------------------------------------------------------------------

TRAINING = {"steps": 24, "batch_size": 64, "lr": 3e-2, "validate_every": 8}


def choice_task() -> t2.Task:
    """One of three answers is right, whatever the problem."""
    return toy(is_blue, choices=COLORS, prefill="The category is")


def own_choices_task() -> t2.Task:
    """The number of choices depends on the problem; "blue" is always right."""

    def choices(problem: dict) -> list[str]:
        is_odd = int(problem["question"][8]) % 2 == 1
        return ["red", "blue"] if is_odd else ["green", "red", "blue"]

    return toy(is_blue, choices=choices, prefill="The category is")


def digit_task() -> t2.Task:
    """An answer has to be a digit, out of the whole vocabulary."""
    return toy(starts_with_digit, max_new_tokens=1)


@pytest.mark.parametrize("make_task", [choice_task, own_choices_task, digit_task])
def test_reinforce_learns(make_task):
    model, task = make_svf(), make_task()
    before = t2.evaluate(model, TOKENIZER, task, task.problems("test"))
    expert = t2.reinforce(model, TOKENIZER, task, **TRAINING)
    after = t2.evaluate(model, TOKENIZER, task, task.problems("test"), expert=expert)
    assert before < 0.6
    assert after > 0.9


def test_reinforce_leaves_the_model_as_it_was():
    model = make_svf()
    start = random_expert(model, size=0.1)
    set_z(model, start)
    expert = t2.reinforce(model, TOKENIZER, digit_task(), steps=2, batch_size=8, lr=0.1)
    for name, layer in t2.svf_layers(model).items():
        assert torch.equal(layer.z, start[name])
        assert layer.z.grad is None
        assert not torch.equal(expert[name], start[name])  # it trained, and from there on
        assert (expert[name] - start[name]).abs().max() < 0.3


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("batch_size", 0, 1),
        ("validate_every", 0, 1),
        ("validation_problems", 0, 1),
        ("steps", -1, 0),
        ("lr", -0.1, 0),
        ("max_grad_norm", -1.0, 0),
        ("kl_coef", -0.1, 0),
        ("kl_coef", math.nan, 0),
    ],
)
def test_training_settings_out_of_range_are_refused(name, value, least):
    with pytest.raises(t2.Transformer2Error, match=f"{name} {value} must be at least {least}"):
        t2.reinforce(make_svf(), TOKENIZER, digit_task(), **{name: value})


def test_a_second_apply_svf_adds_layers_and_all_train():
    model = t2.apply_svf(t2.apply_svf(make(), "mlp"), "attention")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.z" for name in t2.svf_layers(model)]
    assert len(trained) == 2 * (3 + 4)


def test_training_inside_of_use_expert_is_refused():
    model = make_svf()
    with pytest.raises(t2.Transformer2Error, match="train outside of it"):
        with t2.use_expert(model, random_expert(model)):
            t2.reinforce(model, TOKENIZER, digit_task())


@pytest.mark.parametrize("choices", [None, ["B", "A B" * 100]])
def test_an_answer_that_does_not_fit_the_context_after_its_prompt_is_refused(choices):
    model, task = make_svf(), toy(checksum, choices=choices)
    sentence = f"a prompt and its answer have [0-9]+ tokens, but the model's context is {CONTEXT}"
    with pytest.raises(t2.Transformer2Error, match=sentence):
        if choices:
            t2.evaluate(model, TOKENIZER, task, some_problems())
        else:
            answers, hp = [[t2.Answer([5] * CONTEXT, text="")]], t2.Hyperparameters()
            t2.set_gradient(model, TOKENIZER, task, some_problems()[:1], answers, hp)


def test_reinforce_leaves_the_model_as_it_was_after_an_exception():
    """Here it comes in the middle of the third step."""
    model, calls = make_svf(), itertools.count()

    def failing_reward(completion: str, problem: dict) -> float:
        if next(calls) > 3 * 20 + 3 * 12:
            raise KeyboardInterrupt
        return is_blue(completion, problem)

    task = toy(failing_reward, choices=COLORS, prefill="The category is")
    hyper = dict(steps=3, batch_size=20, lr=0.1, token_budget=100, validation_problems=1)
    with pytest.raises(KeyboardInterrupt):
        t2.reinforce(model, TOKENIZER, task, **hyper)
    for layer in t2.svf_layers(model).values():
        assert torch.equal(layer.z, torch.ones_like(layer.z))
        assert layer.z.grad is None


def test_reinforce_returns_the_best_validated_expert(monkeypatch):
    """The accuracies of steps 0 to 4 are given; the last of the two best steps wins."""
    accuracies, experts = iter([0.1, 0.6, 0.3, 0.6, 0.2]), []

    def evaluate(model, processor, task, problems, *, expert=None):
        experts.append(t2.get_expert(model))
        return next(accuracies)

    monkeypatch.setattr(t2, "evaluate", evaluate)
    hyper = dict(steps=4, batch_size=8, lr=0.1, validate_every=1)
    expert = t2.reinforce(make_svf(), TOKENIZER, digit_task(), **hyper)
    for name, z in expert.items():
        assert torch.equal(z, experts[3][name])
        assert not torch.equal(z, experts[2][name])


def test_on_step_sees_figures_and_answers():
    seen = []
    hyper = dict(steps=3, batch_size=32, validate_every=2, validation_problems=4)
    task = digit_task()
    t2.reinforce(make_svf(), TOKENIZER, task, on_step=lambda *step: seen.append(step), **hyper)
    assert [stats.step for stats, _ in seen] == [0, 1, 2, 3]
    assert [stats.validation is None for stats, _ in seen] == [False, True, False, False]
    assert seen[0][1] == []  # step 0 only validates
    for stats, answers in seen[1:]:
        assert len(answers) == 32
        for answer in answers:
            assert len(answer.tokens) == 1
            assert answer.reward == task.reward(answer.text, {})
        assert stats.reward == pytest.approx(sum(answer.reward for answer in answers) / 32)
        assert stats.mean_length == 1
        assert stats.grad_norm > 0
        assert stats.seconds > 0


def test_the_figures_of_a_step_with_sampled_answers():
    model, seen = make_svf(), []
    # Answers end at a letter or at the limit, which is short: some end in both ways at once.
    ends = TOKENIZER("ABCDEFGH")["input_ids"]
    model.generation_config.eos_token_id = ends
    hyper = dict(steps=2, batch_size=60, kl_coef=0.1, validation_problems=4)
    task = toy(starts_with_digit, max_new_tokens=5)
    t2.reinforce(model, TOKENIZER, task, on_step=lambda *step: seen.append(step), **hyper)
    for stats, answers in seen[1:]:
        ended = [answer for answer in answers if answer.tokens[-1] in ends]
        assert 0 < len(ended) < 60
        assert any(len(answer.tokens) == 5 for answer in ended)
        assert stats.cut_off == pytest.approx(1 - len(ended) / 60)
        num_tokens = sum(len(answer.tokens) for answer in answers)
        assert stats.mean_length == pytest.approx(num_tokens / 60)
        # Sampling is a part of the step.
        assert stats.tokens_per_second > num_tokens / stats.seconds
        deviation = np.std([answer.reward for answer in answers])
        assert stats.reward_deviation == pytest.approx(deviation, rel=1e-4)
        assert stats.kl_coef == 0.1


def test_the_figures_of_a_step_with_choices():
    model, task, seen = make_svf(), own_choices_task(), []
    problems = task.problems("train")
    scores = t2.score_choices(model, TOKENIZER, task, problems)
    likeliest = {}
    for problem, log_probs in zip(problems, scores):
        likeliest[problem["question"]] = task.choices(problem)[log_probs.argmax()]
    assert len(set(likeliest.values())) > 1

    hyper = dict(steps=1, batch_size=80, kl_coef=0.1, validation_problems=4)
    t2.reinforce(model, TOKENIZER, task, on_step=lambda *step: seen.append(step), **hyper)
    _, (stats, answers) = seen
    assert {answer.problem["question"]: answer.text for answer in answers} == likeliest
    for answer in answers:
        assert answer.reward == task.reward(answer.text, answer.problem)
    assert stats.mean_length is None
    assert stats.cut_off is None
    assert stats.tokens_per_second is None

    mean, mean_square = 0.0, 0.0
    for problem, log_probs in zip(problems, scores):
        rewards = [task.reward(text, problem) for text in task.choices(problem)]
        probs = log_probs.softmax(0)
        mean += (probs * torch.tensor(rewards)).sum().item() / 80
        mean_square += (probs * torch.tensor(rewards) ** 2).sum().item() / 80
    assert stats.reward == pytest.approx(mean, abs=1e-5)
    assert stats.reward_deviation == pytest.approx(math.sqrt(mean_square - mean**2), rel=1e-4)


@pytest.mark.parametrize("choices", [None, COLORS])
@pytest.mark.parametrize("batch_size", [1, 7, 8])
def test_rewards_that_are_all_equal_have_no_deviation(choices, batch_size):
    task, seen = toy(lambda text, problem: 0.3, choices=choices, max_new_tokens=2), []
    hyper = dict(steps=1, batch_size=batch_size, validation_problems=4)
    t2.reinforce(make_svf(), TOKENIZER, task, on_step=lambda *step: seen.append(step), **hyper)
    stats, _ = seen[1]
    assert stats.reward_deviation == 0.0
    assert stats.reward == pytest.approx(0.3)


@pytest.mark.parametrize("make_task", [choice_task, digit_task])
def test_the_kl_is_a_figure_only_where_it_counts(make_task):
    model, seen = make_svf(), []
    set_z(model, random_expert(model))
    for kl_coef in (0.0, 0.1):
        hyper = dict(steps=1, batch_size=8, kl_coef=kl_coef, validation_problems=4)
        t2.reinforce(model, TOKENIZER, make_task(), on_step=lambda *s: seen.append(s), **hyper)
    assert seen[1][0].kl is None
    assert abs(seen[3][0].kl) > 1e-3


def test_z_follows_the_gradient_with_a_learning_rate_that_falls_along_a_cosine():
    """Along a gradient that stays as it is, AdamW moves every z by the learning rate."""
    model = make_svf()
    hp = t2.Hyperparameters(steps=4, lr=0.1)
    progress = t2.Progress(model, digit_task(), hp)
    for step, lr in enumerate([0.1, 0.0853553, 0.05, 0.0146447], start=1):
        before, stats = t2.get_expert(model), t2.StepStats(step)
        for layer in t2.svf_layers(model).values():
            layer.z.grad = torch.ones_like(layer.z)
        t2.descend(progress, stats, hp)
        assert stats.lr == pytest.approx(lr, rel=1e-5)
        for name, z in t2.get_expert(model).items():
            assert torch.allclose(before[name] - z, torch.tensor(lr), rtol=1e-3)


@pytest.mark.parametrize(
    "make_infinite", [lambda loss: loss + math.inf, lambda loss: loss * math.inf]
)
def test_a_step_whose_loss_is_infinite_is_left_out(make_infinite, tmp_path, monkeypatch):
    """That of the first step, when AdamW has no state yet, and that of the third."""
    model, steps, seen = make_svf(), itertools.count(1), []
    task = toy(checksum, max_new_tokens=2)
    reinforce_loss = t2.reinforce_loss

    def sometimes_infinite(*arguments):
        loss = reinforce_loss(*arguments)
        return make_infinite(loss) if next(steps) in (1, 3) else loss

    def on_step(stats: t2.StepStats, answers: list[t2.Answer]) -> None:
        seen.append((stats, torch.cat(list(t2.get_expert(model).values()))))

    monkeypatch.setattr(t2, "reinforce_loss", sometimes_infinite)
    hyper = dict(steps=4, batch_size=8, lr=0.1, validation_problems=4)
    progress = tmp_path / "progress"
    t2.reinforce(model, TOKENIZER, task, checkpoint=progress, on_step=on_step, **hyper)

    assert [stats.skipped for stats, _ in seen] == [False, True, False, True, False]
    for (_, before), (stats, after) in zip(seen, seen[1:]):
        assert torch.equal(before, after) == stats.skipped
        assert after.isfinite().all()
    state = torch.load(progress)["optimizer"]["state"]
    assert len(state) == len(t2.svf_layers(model))
    for values in state.values():
        assert all(value.isfinite().all() for value in values.values())


def test_the_token_budget_of_a_run_bounds_all_its_batches():
    """Validation, the answers of a step, and its micro-batches, with one forward pass for each."""
    model, sizes = make_svf(), []

    def record(model, arguments, inputs) -> None:
        sizes.append(len(inputs["input_ids"]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    five_rows = 5 * (len(prompt_ids("What is 1 plus 2?")) + 1)
    hyper = dict(steps=1, batch_size=12, validation_problems=8, token_budget=five_rows)
    t2.reinforce(model, TOKENIZER, digit_task(), **hyper)
    validation, answers, micro_batches = [5, 3], [5, 5, 2], [5, 5, 2]
    assert sizes == [*validation, *answers, *micro_batches, *validation]


def test_a_batch_larger_than_the_data_is_cut_and_noted(capsys):
    seen, task = [], digit_task()
    for batch_size in (80, 500):
        hyper = dict(steps=1, batch_size=batch_size, validation_problems=4)
        t2.reinforce(make_svf(), TOKENIZER, task, on_step=lambda *s: seen.append(s), **hyper)
        stats, answers = seen.pop()
        assert len({answer.problem["question"] for answer in answers}) == len(answers) == 80
        assert stats.reward == pytest.approx(sum(answer.reward for answer in answers) / 80)
    [note] = capsys.readouterr().err.splitlines()
    assert note == "note: the batch of 500 is cut to the 80 problems that task toy has"


def test_the_kl_holds_the_policy_back():
    distances = []
    for kl_coef in (0.0, 10.0):
        hyper = dict(steps=10, batch_size=64, lr=2e-2, kl_coef=kl_coef, validate_every=100)
        expert = t2.reinforce(make_svf(), TOKENIZER, choice_task(), **hyper)
        distances.append(sum(((z - 1) ** 2).sum().item() for z in expert.values()))
    assert distances[1] < 0.7 * distances[0]


def test_the_same_seed_gives_the_same_expert_and_another_seed_another():
    model, experts = make_svf(), []
    for seed in (3, 3, 4):
        torch.manual_seed(len(experts))  # torch's own generator does not matter
        hyper = dict(steps=2, batch_size=8, lr=0.1, seed=seed)
        expert = t2.reinforce(model, TOKENIZER, digit_task(), **hyper)
        experts.append(torch.cat(list(expert.values())))
    assert torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], experts[2])


def interrupted_run(model: nn.Module, task: t2.Task, path: Path, **changes) -> None:
    """A run that is interrupted in its 10th step, in the middle of the rewards."""
    reward, calls = task.reward, itertools.count()

    def failing_reward(completion: str, problem: dict) -> float:
        if next(calls) > 64 * 9 + 20 * 2 + 40:
            raise KeyboardInterrupt
        return reward(completion, problem)

    task.reward = failing_reward
    with pytest.raises(KeyboardInterrupt):
        t2.reinforce(model, TOKENIZER, task, checkpoint=path, **{**TRAINING, **changes})
    task.reward = reward


@pytest.mark.parametrize("make_task", [choice_task, digit_task])
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_does(make_task, tmp_path):
    model, task = make_svf(), make_task()
    uninterrupted = t2.reinforce(model, TOKENIZER, task, **TRAINING)
    interrupted_run(model, task, tmp_path / "progress")
    steps = []
    resumed = t2.reinforce(
        model,
        TOKENIZER,
        task,
        checkpoint=tmp_path / "progress",
        on_step=lambda stats, answers: steps.append(stats.step),
        **TRAINING,
    )
    assert 1 < steps[0] < 24  # it did go on
    assert resumed.keys() == uninterrupted.keys()
    for name, z in resumed.items():
        assert torch.equal(z, uninterrupted[name])


def test_a_run_survives_kill_at_any_moment_and_leaves_nothing_over(tmp_path):
    killed = """
import sys
import test_transformer2 as tests
model, task = tests.make_svf(), tests.digit_task()
tests.t2.reinforce(model, tests.TOKENIZER, task, checkpoint=sys.argv[1], **tests.TRAINING)
"""
    model, task, progress = make_svf(), digit_task(), tmp_path / "progress"
    uninterrupted = t2.reinforce(model, TOKENIZER, task, **TRAINING)
    process = run_python(killed, progress)
    while not progress.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random())
    process.kill()
    process.communicate()
    resumed = t2.reinforce(model, TOKENIZER, task, checkpoint=progress, **TRAINING)
    t2.save_expert(uninterrupted, tmp_path / "uninterrupted")
    t2.save_expert(resumed, tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "uninterrupted").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "progress",
        "resumed",
        "uninterrupted",
    ]


@pytest.mark.parametrize("changes", [{"token_budget": 100}, {"checkpointing": True}])
def test_a_run_goes_on_with_another_token_budget_or_with_checkpointing(changes, tmp_path):
    model, task = make_svf(), choice_task()
    uninterrupted = t2.reinforce(model, TOKENIZER, task, **TRAINING)
    interrupted_run(model, task, tmp_path / "progress")
    settings = {**TRAINING, **changes}
    resumed = t2.reinforce(model, TOKENIZER, task, checkpoint=tmp_path / "progress", **settings)
    for name, z in resumed.items():
        assert torch.allclose(z, uninterrupted[name], atol=1e-3)
        assert (z - 1).abs().max() > 0.02


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 32}, "batch.size"),
        ({"lr": 1e-3}, "lr"),
        ({"kl_coef": 0.1}, "kl"),
        ({"max_new_tokens": 2}, "token"),
        ({"task": "other"}, "task"),
        ({"targets": "all"}, "model|layers"),
        ({"model": "a/model"}, "model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(changes, named, tmp_path):
    model, task, path = make_svf(), digit_task(), tmp_path / "progress"
    hyper = dict(steps=1, batch_size=4, validation_problems=4, lr=2e-3)
    t2.reinforce(model, TOKENIZER, task, checkpoint=path, **hyper)
    before = path.read_bytes()
    for name, value in changes.items():
        if name == "targets":
            model = t2.apply_svf(make(), value)
        elif name == "model":
            model.config._name_or_path = value
        elif name == "task":
            task.name = value
        elif name == "max_new_tokens":
            task.max_new_tokens = value
        else:
            hyper[name] = value
    with pytest.raises(t2.Transformer2Error, match=rf"other settings \([^:]*({named})"):
        t2.reinforce(model, TOKENIZER, task, checkpoint=path, **hyper)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "progress").write_bytes(b"damaged")
    with pytest.raises(t2.Transformer2Error, match="progress"):
        t2.reinforce(make_svf(), TOKENIZER, digit_task(), checkpoint=tmp_path / "progress", steps=1)


def test_reinforce_where_nothing_requires_gradients_is_refused():
    model = make().requires_grad_(False)
    with pytest.raises(t2.Transformer2Error, match="requires gradients.*apply_svf"):
        t2.reinforce(model, TOKENIZER, digit_task(), steps=1)


def test_evaluate_counts_the_rewards_of_greedy_answers():
    model, task = make(), digit_task()
    problems = task.problems("test")
    right = 0
    for problem in problems:
        answer = plain_answer(model, prompt_ids(problem["question"]), max_new_tokens=1)
        right += max(0.0, task.reward(answer, problem))
    assert t2.evaluate(model, TOKENIZER, task, problems) == pytest.approx(right / len(problems))


def test_a_partly_right_answer_counts_partly_and_a_wrong_one_not_negatively():
    rewards = {"red": 0.3, "green": -1.0, "blue": -0.5}
    task = toy(lambda text, problem: rewards[text], choices=COLORS, prefill="The category is")
    problems = task.problems("train")
    model = make()
    scores = t2.score_choices(model, TOKENIZER, task, problems)
    chosen = [COLORS[own_scores.argmax()] for own_scores in scores]
    accuracy = t2.evaluate(model, TOKENIZER, task, problems)
    assert accuracy == pytest.approx(0.3 * chosen.count("red") / len(problems))


def test_evaluating_on_no_problems_is_refused():
    with pytest.raises(t2.Transformer2Error, match="no problems"):
        t2.evaluate(make(), TOKENIZER, digit_task(), [])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_peft_lora_trains_by_the_same_loop(kl_coef):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "down_proj"])
    torch.manual_seed(0)
    model, task = peft.get_peft_model(make(), config).eval(), digit_task()
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    before = t2.evaluate(model, TOKENIZER, task, task.problems("test"))
    hyper = {**TRAINING, "max_grad_norm": 1.0, "kl_coef": kl_coef}
    matrices = t2.reinforce(model, TOKENIZER, task, **hyper)

    assert matrices.keys() == start.keys()
    parameters = dict(model.named_parameters())
    for name, matrix in matrices.items():
        assert torch.equal(parameters[name], start[name])
        assert matrix.shape == start[name].shape
    with torch.no_grad():
        for name, matrix in matrices.items():
            parameters[name].copy_(matrix)
    after = t2.evaluate(model, TOKENIZER, task, task.problems("test"))
    assert before < 0.6
    assert after > 0.9


def train_two_tasks(path: str, rank: int = 0, processes: int = 1) -> None:
    """What each of several processes does in the test below; the first saves the experts."""
    if processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}.meet", rank=rank, world_size=processes
        )
    model, experts = make_svf(), {}
    three_digits = toy(starts_with_digit, max_new_tokens=3)
    for task in (three_digits, choice_task()):
        hyper = dict(steps=3, batch_size=31, lr=3e-2, kl_coef=0.2, validate_every=3)
        expert = t2.reinforce(model, TOKENIZER, task, **hyper)
        for name, z in expert.items():
            experts[f"{task.max_new_tokens} {name}"] = z
    if rank == 0:
        t2.save_expert(experts, path)
    if processes > 1:
        # Without this, threads that are still alive at the end may abort the process.
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    processes = []
    for rank in range(2):
        call = f"train_two_tasks({str(tmp_path / 'two')!r}, {rank}, 2)"
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {Path(__file__).stem} import *; {call}"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            cwd=HERE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
    train_two_tasks(str(tmp_path / "one"))
    for process in processes:
        errors = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 0, errors[-3000:]
    one, two = t2.load_expert(tmp_path / "one"), t2.load_expert(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, z in one.items():
        assert torch.allclose(z, two[name], atol=1e-5)
        assert (z - 1).abs().max() > 0.01


# ---- Generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GENERATION_FAMILIES)
def test_80_greedy_tokens_in_a_padded_batch_alone_and_by_plain_transformers(family, monkeypatch):
    monkeypatch.setattr(t2, "folded", lambda *about: contextlib.nullcontext())  # by the factors
    model = never_ends(make(family, seed=2))
    plain = [plain_answer(model, prompt_ids(text), max_new_tokens=80) for text in (SHORT, LONG)]
    assert len(set("".join(plain))) > 5  # no endless repetition of one token
    t2.apply_svf(model, GENERATION_FAMILIES[family].targets)
    batch = t2.generate(model, TOKENIZER, [say(SHORT), say(LONG)], max_new_tokens=80)
    assert batch == plain
    for text, answer in zip((SHORT, LONG), plain):
        assert t2.generate(model, TOKENIZER, [say(text)], max_new_tokens=80) == [answer]


def test_draws_follow_softmax_of_logits_over_temperature():
    model, n = make(), 4000
    draws = t2.generate(
        model, TOKENIZER, [say(SHORT)] * n, max_new_tokens=1, temperature=2.0, seed=0
    )
    pi = (logits(model, prompt_ids(SHORT))[-1] / 2.0).softmax(0)
    chances = {}
    for token, p in enumerate(pi.tolist()):  # end token and padding are both no text
        text = TOKENIZER.decode([token], skip_special_tokens=True)
        chances[text] = chances.get(text, 0.0) + p
    for text, p in chances.items():
        deviation = math.sqrt(p * (1 - p) / n)
        assert draws.count(text) / n == pytest.approx(p, abs=4.5 * deviation)


@pytest.mark.parametrize("noise_groups", [{}, {"cpu": 16}])  # on a GPU rows share generators
def test_draws_do_not_depend_on_how_rows_are_cut_into_batches(noise_groups, monkeypatch):
    monkeypatch.setattr(t2, "NOISE_GROUPS", noise_groups)
    model = never_ends(make())
    conversations = [say(f"What is {i} plus 2?" + " A" * i) for i in range(24)]
    how = dict(max_new_tokens=48, temperature=1.0, seed=5)
    together = t2.generate(model, TOKENIZER, conversations, **how)
    assert len(set(together)) == 24
    for budget in (1, 300):
        with t2.token_budget(model, budget):
            assert t2.generate(model, TOKENIZER, conversations, **how) == together


def test_equal_prompts_draw_answers_of_their_own():
    answers = t2.generate(
        never_ends(make()), TOKENIZER, [say(SHORT)] * 20, max_new_tokens=8, temperature=2.0, seed=0
    )
    assert len(set(answers)) == 20


@pytest.mark.parametrize("seed", range(5))
def test_an_expert_says_the_same_alone_in_a_list_and_merged(seed):
    """For random models, experts and prompts, sampled at temperature 1."""
    rng = random.Random(seed)
    family = rng.choice(["llama", "gpt2", "phi3", "opt", "gemma3"])
    model = make_svf(family, seed)
    expert = random_expert(model, seed)
    prompts = []
    for _ in range(4):
        text = "".join(rng.choices("ABCDEFGH0123456789 ", k=rng.randint(1, 30)))
        prompts.append(say(text))
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}
    alone = t2.generate(model, TOKENIZER, prompts, expert=expert, **settings)
    in_a_list = t2.generate(model, TOKENIZER, prompts, expert=[expert] * 4, **settings)
    mixed = t2.generate(model, TOKENIZER, prompts, expert=[expert, None] * 2, **settings)
    with t2.use_expert(model, expert):
        merged = t2.merge_svf(copy.deepcopy(model))
    assert in_a_list == alone
    assert t2.generate(merged, TOKENIZER, prompts, **settings) == alone
    assert mixed[0] == alone[0]
    assert mixed[2] == alone[2]


def test_without_a_seed_draws_come_from_torchs_generator():
    model = never_ends(make())
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        for _ in range(2):
            draws += t2.generate(model, TOKENIZER, [say(SHORT)], max_new_tokens=20, temperature=2.0)
    assert draws[:2] == draws[2:]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("seed", [-1, 2**31 + 1])
def test_a_seed_out_of_range_is_refused(seed):
    model, task = make_svf(), digit_task()
    with pytest.raises(t2.Transformer2Error, match="seed"):
        t2.generate(model, TOKENIZER, [say(SHORT)], seed=seed)
    with pytest.raises(t2.Transformer2Error, match="seed"):
        t2.reinforce(model, TOKENIZER, task, steps=1, seed=seed)
    with pytest.raises(t2.Transformer2Error, match="seed"):
        t2.few_shot(model, TOKENIZER, task, task.problems("test"), {}, seed=seed)


def test_the_largest_seed_is_a_seed():
    model, task, seed = make_svf(), digit_task(), 2**31
    how = dict(max_new_tokens=2, temperature=1.0, seed=seed)
    assert len(t2.generate(model, TOKENIZER, [say(SHORT)], **how)) == 1
    assert t2.reinforce(model, TOKENIZER, task, steps=1, batch_size=4, seed=seed)
    experts = {"a": random_expert(model)}
    problems = task.problems("test")[:2]
    assert t2.few_shot(model, TOKENIZER, task, problems, experts, iterations=1, seed=seed)


def test_generation_ignores_the_models_own_settings_and_puts_them_back():
    model = never_ends(make())
    conversations = [say(SHORT), say(LONG)]
    greedy = t2.generate(model, TOKENIZER, conversations, max_new_tokens=12)
    how = dict(max_new_tokens=12, temperature=2.0, seed=0)
    drawn = t2.generate(model, TOKENIZER, conversations, **how)
    settings = model.generation_config
    settings.repetition_penalty = 5.0
    settings.do_sample, settings.top_k = True, 1
    settings.max_length, settings.min_new_tokens = 20, 3
    before = settings.to_dict()
    assert t2.generate(model, TOKENIZER, conversations, max_new_tokens=12) == greedy
    assert t2.generate(model, TOKENIZER, conversations, **how) == drawn
    assert model.generation_config is settings
    assert settings.to_dict() == before


def answer_with_end(end: int) -> tuple[nn.Module, str]:
    """A model whose greedy answer to SHORT has the token `end` in fifth place, and what it says.

    `end` and what the random model says in fifth place change places in its output head.
    """
    model = never_ends(make())
    [text] = t2.generate(model, TOKENIZER, [say(SHORT)], max_new_tokens=5)
    tokens = TOKENIZER(text)["input_ids"]
    assert len(set(tokens) - {end}) == 5
    weight = model.lm_head.weight.data
    weight[[end, tokens[4]]] = weight[[tokens[4], end]]
    return model, TOKENIZER.decode(tokens[:4])


@pytest.mark.parametrize("of_model", [0, [0], [1, 0]])
def test_the_models_end_tokens_end_an_answer_also_token_0(of_model):
    model, text = answer_with_end(0)
    model.generation_config.eos_token_id = of_model
    assert t2.generate(model, TOKENIZER, [say(SHORT)], max_new_tokens=20) == [text]


def test_the_tokenizers_end_token_ends_an_answer_if_the_model_has_none():
    model, text = answer_with_end(TOKENIZER.eos_token_id)
    model.generation_config.eos_token_id = None
    assert t2.generate(model, TOKENIZER, [say(SHORT)], max_new_tokens=20) == [text]


def test_without_any_end_token_answers_have_full_length():
    model, text = answer_with_end(TOKENIZER.eos_token_id)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    [answer] = t2.generate(model, tokenizer, [say(SHORT)], max_new_tokens=20)
    assert answer.startswith(text)
    assert len(answer) > len(text)


def test_rows_that_end_early_do_not_change_the_others():
    model = never_ends(make(seed=2))
    conversations = [say(f"What is {i} plus 2?") for i in range(10)]
    endless = t2.generate(model, TOKENIZER, conversations, max_new_tokens=30)
    end = TOKENIZER("A")["input_ids"][0]
    model.generation_config.eos_token_id = end
    expected = []
    for answer in endless:
        before, found, _ = answer.partition("A")
        expected.append(before + found)
    assert len({len(answer) for answer in expected}) > 3
    assert t2.generate(model, TOKENIZER, conversations, max_new_tokens=30) == expected


def test_an_answer_ends_where_the_context_of_its_own_prompt_ends():
    """Each token of a prompt leaves one token less for its own answer, and none less for others."""
    model = never_ends(make())
    texts = ["A" * 40, "A" * 100, "A" * 140]
    answers = t2.generate(model, TOKENIZER, [say(text) for text in texts], max_new_tokens=50)
    for text, answer in zip(texts, answers):
        room = min(50, CONTEXT - len(prompt_ids(text)))
        assert answer == plain_answer(model, prompt_ids(text), max_new_tokens=room)
        assert [answer] == t2.generate(model, TOKENIZER, [say(text)], max_new_tokens=50)
    assert len(TOKENIZER(answers[2])["input_ids"]) < 20


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(t2.Transformer2Error, match=f"context of {CONTEXT}"):
        t2.generate(make(), TOKENIZER, [say(SHORT), say("A" * CONTEXT)])


def test_a_picture_is_refused_by_a_model_that_reads_only_text():
    picture = [{"role": "user", "content": [{"type": "image", "image": None}]}]
    with pytest.raises(t2.Transformer2Error, match="reads plain text only"):
        t2.generate(make(), TOKENIZER, [picture])


def test_no_prompts_have_no_answers():
    assert t2.generate(make(), TOKENIZER, []) == []
    assert t2.classify(make(), TOKENIZER, [], COLORS) == []


def test_no_chat_template_is_noted_and_replaced(capsys):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    conversations = [say(SHORT), say(LONG)]
    texts = t2.generate(make(), tokenizer, conversations, max_new_tokens=3, prefill="The")
    assert len(texts) == 2
    assert capsys.readouterr().err.count("no chat template") == 1


def test_plain_strings_need_no_chat_template(capsys):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    t2.generate(make(), tokenizer, [SHORT, LONG], max_new_tokens=3)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_without_pad_token_pads_all_the_same():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = None
    conversations, model = [say(SHORT), say(LONG)], never_ends(make())
    expected = t2.generate(model, TOKENIZER, conversations, max_new_tokens=8)
    assert t2.generate(model, tokenizer, conversations, max_new_tokens=8) == expected


def test_a_prefill_is_the_given_start_of_the_answer():
    model = never_ends(make())
    tokens = TOKENIZER("The category")["input_ids"]
    for prompt, prompt_tokens in (
        (say(SHORT), prompt_ids(SHORT)),
        (SHORT, TOKENIZER(SHORT)["input_ids"]),
    ):
        how = dict(max_new_tokens=6, prefill="The category")
        [answer] = t2.generate(model, TOKENIZER, [prompt], **how)
        assert answer == plain_answer(model, [*prompt_tokens, *tokens], max_new_tokens=6)


def test_a_plain_string_is_tokenised_as_it_is():
    model = make()
    inputs = t2.encode(model, TOKENIZER, ["What is 1 plus", "Hello"])
    long, [hello] = TOKENIZER("What is 1 plus")["input_ids"], TOKENIZER("Hello")["input_ids"]
    padding = [0] * (len(long) - 1)
    assert inputs["input_ids"].tolist() == [long, [*padding, hello]]
    assert inputs["attention_mask"].tolist() == [[1] * len(long), [*padding, 1]]


def test_a_task_of_plain_strings_is_evaluated():
    model, task = make(), digit_task()
    task.conversation = lambda problem: problem["question"]
    problems = task.problems("test")
    right = 0
    for problem in problems:
        token = logits(model, TOKENIZER(problem["question"])["input_ids"])[-1].argmax()
        right += TOKENIZER.decode([token]).strip().isdigit()
    assert t2.evaluate(model, TOKENIZER, task, problems) == pytest.approx(right / len(problems))


# ---- Batches and memory --------------------------------------------------------------------------


@contextlib.contextmanager
def device_for(rows: int, model: nn.Module) -> Iterator[list[int]]:
    """A stand-in for a device that has memory for so many rows. Gives the sizes that were tried."""
    tried = []

    def run_out_of_memory(model, arguments, inputs) -> None:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError

    hook = model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    try:
        yield tried
    finally:
        hook.remove()


def some_problems() -> list[dict]:
    """Eight problems, whose questions have different lengths."""
    return [{"question": LONG[: 4 * i], "answer": "B"} for i in range(8)]


def generating_task() -> t2.Task:
    return toy(checksum, max_new_tokens=6)


def three_choices_task() -> t2.Task:
    return toy(checksum, choices=["A B", "A C", "red"])


def test_a_full_device_draws_the_same_answers():
    model, task = never_ends(make_svf()), generating_task()
    experts = [random_expert(model, 1), None, random_expert(model, 2), None] * 2
    how = dict(expert=experts, temperature=1.0, seed=3)
    expected = t2.rollout(model, TOKENIZER, task, some_problems(), **how)
    assert len({answer.text for answer in expected}) == 8
    with device_for(3, model) as tried:
        answers = t2.rollout(model, TOKENIZER, task, some_problems(), **how)
    assert answers == expected
    assert tried[:3] == [8, 4, 2]


@pytest.mark.parametrize("make_task", [generating_task, three_choices_task])
def test_a_full_device_evaluates_the_same(make_task):
    model, task = make_svf(), make_task()
    expert = random_expert(model, size=1.0)
    expected = t2.evaluate(model, TOKENIZER, task, some_problems(), expert=expert)
    with device_for(3, model) as tried:
        accuracy = t2.evaluate(model, TOKENIZER, task, some_problems(), expert=expert)
    assert accuracy == pytest.approx(expected, rel=1e-6)
    assert tried[:2] == [8, 4]


@pytest.mark.parametrize("make_task", [generating_task, three_choices_task])
def test_few_shot_finds_the_same_on_a_full_device(make_task):
    experts = {name: random_expert(make_svf(), seed) for seed, name in enumerate("ab")}
    search = partial(t2.few_shot, population=6, iterations=2)
    problems = some_problems()[:3]
    _, expected = search(make_svf(), TOKENIZER, make_task(), problems, experts)
    model = make_svf()
    with device_for(4, model) as tried:
        _, alphas = search(model, TOKENIZER, make_task(), problems, experts)
    assert torch.allclose(alphas, expected, rtol=1e-6)
    assert tried[:2] == [18, 9]  # 3 problems under each of 6 candidates


@pytest.mark.parametrize("make_task", [generating_task, three_choices_task])
def test_a_full_device_gives_the_same_gradient(make_task):
    model, task = make_svf().double(), make_task()  # float64, as other batches round otherwise
    set_z(model, random_expert(model))
    expected = gradient_of_a_step(model, task)
    with device_for(4, model) as tried:
        gradient = gradient_of_a_step(model, task)
    assert relative(gradient, expected) < 1e-6
    assert tried[:2] == [6, 3]


@pytest.mark.parametrize(
    ("make_task", "tokens_a_problem"),
    [(generating_task, 11 + 3), (three_choices_task, 3 * (11 + 3))],
)
def test_memory_that_runs_out_within_backward_leaves_no_part_of_a_gradient(
    make_task, tokens_a_problem
):
    """It happens in the second micro-batch, when the gradient has gone through the last layer."""
    model, task, passes = make_svf().double(), make_task(), []  # float64: less rounding
    set_z(model, random_expert(model))
    expected = gradient_of_a_step(model, task)
    layer = model.model.layers[0].mlp.down_proj

    def run_out_of_memory_once(gradient: torch.Tensor) -> None:
        passes.append(gradient)
        if len(passes) == 2:
            raise torch.OutOfMemoryError

    def watch(layer, arguments, output) -> None:
        # Choices take a second pass of nine rows, whose backward comes before that of the prompts.
        if output.requires_grad and len(output) == 3:
            output.register_hook(run_out_of_memory_once)

    layer.register_forward_hook(watch)
    # Two micro-batches of three problems.
    gradient = gradient_of_a_step(model, task, token_budget=3 * tokens_a_problem)
    assert len(passes) >= 2
    assert relative(gradient, expected) < 1e-6


def test_batches_are_halved_until_they_fit_and_later_ones_are_no_larger():
    model, task = make_svf(), digit_task()
    problems = task.problems("train")[:8]
    with device_for(3, model) as tried:
        t2.evaluate(model, TOKENIZER, task, problems)
        assert tried == [8, 4, 2, 2, 2, 2]
        t2.evaluate(model, TOKENIZER, task, problems)
        assert tried[6:] == [2, 2, 2, 2]


def test_only_the_first_halving_is_noted(capsys):
    model = make_svf()
    with device_for(3, model):
        for task in (digit_task(), choice_task()):
            t2.evaluate(model, TOKENIZER, task, task.problems("test")[:8])
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith("note: a batch of 96 tokens does not fit in memory")


def test_the_note_names_a_token_budget_that_avoids_the_halving(capsys):
    task = digit_task()
    problems = task.problems("test")[:8]
    model = make_svf()
    with device_for(4, model) as tried:
        t2.evaluate(model, TOKENIZER, task, problems)
    assert tried == [8, 4, 4]
    budget = int(re.search(r"token budget of (\d+)", capsys.readouterr().err)[1])

    model = make_svf()
    with device_for(4, model) as tried, t2.token_budget(model, budget):
        t2.evaluate(model, TOKENIZER, task, problems)
    assert tried == [4, 4]
    assert capsys.readouterr().err == ""


def generate_64_tokens(model: nn.Module) -> None:
    t2.generate(model, TOKENIZER, [say(SHORT)], expert=random_expert(model), max_new_tokens=64)


def score_three_choices(model: nn.Module) -> None:
    task, expert = three_choices_task(), random_expert(model)
    t2.score_choices(model, TOKENIZER, task, task.problems("test")[:1], expert=expert)


def add_a_gradient(model: nn.Module) -> None:
    task, hp = generating_task(), t2.Hyperparameters(kl_coef=0.1, checkpointing=True)
    answers = [[t2.Answer([5] * 4, text="")]]
    t2.set_gradient(model, TOKENIZER, task, task.problems("test")[:1], answers, hp)


@pytest.mark.parametrize(
    ("work", "tokens"),
    [(generate_64_tokens, 4 + 64), (score_three_choices, 3 * (11 + 3)), (add_a_gradient, 11 + 4)],
)
def test_a_row_that_does_not_fit_is_one_sentence_and_the_model_stays_as_it_was(work, tokens):
    model = make_svf()
    for layer in t2.svf_layers(model).values():
        layer.z.grad = torch.full_like(layer.z, 7.0)
    states = {name: dict(vars(module)) for name, module in model.named_modules()}
    sentence = (
        f"^there is not enough memory for a single row of {tokens} tokens: .*shorter prompts .*$"
    )
    with pytest.raises(t2.Transformer2Error, match=sentence), device_for(0, model):
        work(model)
    for name, module in model.named_modules():
        assert vars(module) == states[name]
    assert (z_gradient(model) == 7).all()


@pytest.mark.parametrize(
    ("name", "bytes_per_token", "groups"),
    [("Qwen2.5-0.5B", 2 * 24 * 2 * 64 * 2, 1), ("Llama-3-8B", 2 * 32 * 8 * 128 * 2, 7)],
)
def test_a_rollout_takes_as_few_decoding_steps_as_its_cache_allows(
    name, bytes_per_token, groups, monkeypatch
):
    """256 prompts of 200 tokens, 512 new ones each, and 22 GiB for the factors and the cache.

    A token of Llama-3-8B has a key and a value in 32 layers of 8 heads of 128 numbers of 2 bytes:
    128 KiB, or 89 MiB for a row. The factors leave 4.04 GiB, and free_memory leaves a tenth of
    them, so 41 rows fit at a time.
    """
    with FakeTensorMode():  # tensors without storage
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
        free_memory = 0.9 * (22 * 2**30 - Peak(t2.apply_svf(model)).now)
    group_sizes, decoding_steps = [], []

    def generate(input_ids, **inputs):
        """Stands in for the model's own."""
        new_tokens = model.generation_config.max_new_tokens
        group_sizes.append(len(input_ids))
        decoding_steps.append(new_tokens)
        return F.pad(input_ids, (0, new_tokens), value=5)

    monkeypatch.setattr(t2, "free_memory", lambda model: free_memory)
    monkeypatch.setattr(model, "generate", generate)
    how = dict(max_new_tokens=512, temperature=1.0)
    answers = t2.generate(model, TOKENIZER, ["A" * 200] * 256, **how)
    assert len(answers) == sum(group_sizes) == 256
    assert decoding_steps == [512] * groups
    assert max(group_sizes) == min(256, free_memory // (712 * bytes_per_token))


@pytest.mark.parametrize(("budget", "most"), [(None, 100), (10**6, 100), (60, 60)])
def test_a_token_budget_lowers_the_bound_of_a_gpus_memory_and_never_lifts_it(
    budget, most, monkeypatch
):
    model = make()
    monkeypatch.setattr(t2, "free_memory", lambda model: 100 * t2.cache_bytes(model))
    with t2.token_budget(model, budget):
        assert t2.most_tokens(model, "generation") == most


@contextlib.contextmanager
def layers_watched(model: nn.Module) -> Iterator[set[str]]:
    """Gives the ways in which the layers run in this `with` block: folded, factored."""
    ways, hooks = set(), []

    def watch(layer, arguments, output) -> None:
        weight = layer.folded_weight
        if weight is not None and torch.equal(output, F.linear(*arguments, weight, layer.bias)):
            ways.add("folded")
        else:
            ways.add("factored")

    for layer in t2.svf_layers(model).values():
        hooks.append(layer.register_forward_hook(watch))
    try:
        yield ways
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("with_expert", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_answer_is_the_same_folded_as_factored(family, with_expert, monkeypatch):
    model = never_ends(make_svf(family, seed=2))
    set_z(model, random_expert(model, 1))  # the model's own z's do not matter
    expert = random_expert(model, 2) if with_expert else None
    how = dict(expert=expert, max_new_tokens=80)
    with layers_watched(model) as ways:
        folded = t2.generate(model, TOKENIZER, [say(SHORT), say(LONG)], **how)
    assert ways == {"folded"}

    monkeypatch.setattr(t2, "folded", lambda *about: contextlib.nullcontext())
    with layers_watched(model) as ways:
        factored = t2.generate(model, TOKENIZER, [say(SHORT), say(LONG)], **how)
    assert ways == {"factored"}
    assert folded == factored
    assert len(set("".join(folded))) > 5  # no endless repetition of one token


@pytest.mark.parametrize(
    ("way", "dtype", "temperature", "max_new_tokens"),
    [
        ("folded", torch.float32, 0.0, 64),
        ("folded", torch.float32, 1.0, 64),
        ("folded", torch.bfloat16, 0.0, 64),
        ("factored", torch.bfloat16, 1.0, 64),  # W' is rounded, and z trains on the answers
        ("factored", torch.float32, 0.0, 32),  # too short to be worth it
    ],
)
def test_what_generates_with_folded_weights(way, dtype, temperature, max_new_tokens):
    model = never_ends(t2.apply_svf(make().to(dtype)))
    how = dict(expert=random_expert(model), temperature=temperature, max_new_tokens=max_new_tokens)
    with layers_watched(model) as ways:
        t2.generate(model, TOKENIZER, [say(SHORT)], **how)
    assert ways == {way}


def test_a_list_of_the_same_expert_is_folded():
    model = never_ends(make_svf())
    how = dict(expert=[random_expert(model)] * 2, max_new_tokens=64)
    with layers_watched(model) as ways:
        t2.generate(model, TOKENIZER, [say(SHORT), say(LONG)], **how)
    assert ways == {"folded"}


def test_without_memory_to_fold_the_factors_answer(monkeypatch, capsys):
    model = never_ends(make_svf())
    expected = t2.generate(model, TOKENIZER, [say(SHORT)], max_new_tokens=64)

    def run_out_of_memory(layer: t2.SVFLinear) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(t2.SVFLinear, "weight", property(run_out_of_memory))
    with layers_watched(model) as ways:
        assert t2.generate(model, TOKENIZER, [say(SHORT)], max_new_tokens=64) == expected
    assert ways == {"factored"}
    assert capsys.readouterr().err == ""


def test_a_batch_with_a_list_of_experts_is_not_folded():
    model = never_ends(make_svf())
    how = dict(expert=[None, random_expert(model)], max_new_tokens=64)
    with layers_watched(model) as ways:
        t2.generate(model, TOKENIZER, [say(SHORT), say(LONG)], **how)
    assert ways == {"factored"}


@pytest.mark.parametrize(("missing_bytes", "way"), [(0, "folded"), (1, "factored")])
def test_weights_are_folded_only_where_they_fit_beside_the_cache(missing_bytes, way, monkeypatch):
    model = never_ends(make_svf())
    # In float32: two layers of three matrices of 32 x 48, and for each of two rows its prompt and
    # 64 new tokens, with a key and a value in two layers of two heads of 8.
    weights = 2 * 3 * 32 * 48 * 4
    cache = 2 * (len(prompt_ids(SHORT)) + 64) * (2 * 2 * 2 * 8 * 4)
    monkeypatch.setattr(t2, "free_memory", lambda model: weights + cache - missing_bytes)
    with layers_watched(model) as ways:
        t2.generate(model, TOKENIZER, [say(SHORT)] * 2, max_new_tokens=64)
    assert ways == {way}


def test_an_interrupted_answer_leaves_no_folded_weights():
    model, calls = never_ends(make_svf()), itertools.count()

    def interrupt(model, arguments, output) -> None:
        if next(calls) == 5:
            assert all(layer.folded_weight is not None for layer in t2.svf_layers(model).values())
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_64_tokens(model)
    assert all(layer.folded_weight is None for layer in t2.svf_layers(model).values())


# ---- Section 3.2: self-adaptation ----------------------------------------------------------------


def test_classify_asks_for_the_category_and_takes_the_likeliest():
    model = make()
    conversations = [say(f"What is {a} plus {b}?") for a in range(4) for b in range(4)]
    chosen = t2.classify(model, TOKENIZER, conversations, COLORS)
    for conversation, category in zip(conversations, chosen):
        [message] = t2.category_question(conversation, COLORS)
        assert message["content"].endswith(conversation[0]["content"])
        prompt = prompt_ids(message["content"]) + TOKENIZER(t2.CATEGORY_PREFILL)["input_ids"]
        scores = []
        for color in COLORS:
            tokens = TOKENIZER(f" {color}")["input_ids"]
            scores.append(plain_log_prob(model, prompt, tokens).item())
        assert category == COLORS[np.argmax(scores)]


@pytest.mark.parametrize("categories", [[], ["red", "red"], ["red", ""], ["red", " "]])
def test_categories_that_are_none_doubled_or_empty_are_refused(categories):
    with pytest.raises(t2.Transformer2Error, match="categories .* must be different names"):
        t2.classify(make(), TOKENIZER, [say(SHORT)], categories)


def test_a_category_that_begins_another_is_scored_with_its_end():
    """Without its end "red" would always be likelier than "red blue"."""
    model, categories, end = make(seed=10), ["red", "red blue"], TOKENIZER.eos_token_id
    conversations = [say(f"What is {a} plus {b}?") for a in range(3) for b in range(3)]
    chosen = t2.classify(model, TOKENIZER, conversations, categories)
    assert set(chosen) == set(categories)
    for conversation, category in zip(conversations, chosen):
        [message] = t2.category_question(conversation, categories)
        prompt = prompt_ids(message["content"]) + TOKENIZER(t2.CATEGORY_PREFILL)["input_ids"]
        scores = []
        for text in categories:
            tokens = TOKENIZER(f" {text}")["input_ids"] + [end]
            scores.append(plain_log_prob(model, prompt, tokens).item())
        assert category == categories[np.argmax(scores)]


def test_two_pass_answers_every_prompt_with_the_expert_of_its_category():
    model = t2.apply_svf(make(), "all")
    experts = {"red": random_expert(model, 1), "green": None, "blue": random_expert(model, 2)}
    classifier = random_expert(model, 3, size=1.0)
    conversations = [say(f"What is {a} plus {b}?") for a in range(4) for b in range(3)]
    answers = t2.two_pass(
        model, TOKENIZER, conversations, experts, classifier=classifier, max_new_tokens=6
    )
    chosen = t2.classify(model, TOKENIZER, conversations, [*experts, "other"], expert=classifier)
    assert [category for category, _ in answers] == chosen
    assert len(set(chosen)) > 1
    for conversation, (category, answer) in zip(conversations, answers):
        expert = experts.get(category)
        alone = t2.generate(model, TOKENIZER, [conversation], expert=expert, max_new_tokens=6)
        assert [answer] == alone


def test_two_pass_answers_plain_strings():
    """Pass 1 asks in a chat, pass 2 continues the text as it is."""
    model = make_svf()
    experts = {"red": random_expert(model, 1), "green": random_expert(model, 2)}
    texts = ["What is 1 plus", "Hello"]
    answers = t2.two_pass(model, TOKENIZER, texts, experts, max_new_tokens=4)
    for text, (category, answer) in zip(texts, answers):
        expert = experts.get(category)
        alone = t2.generate(model, TOKENIZER, [text], expert=expert, max_new_tokens=4)
        assert [answer] == alone


def test_a_mixture_is_one_plus_the_weighted_differences_from_one():
    model = make_svf()
    a, b = random_expert(model, 1), random_expert(model, 2)
    mixture = t2.mix([a, b], torch.tensor([[0.7], [-0.4]]))
    for name, z in mixture.items():
        assert torch.allclose(z, 1 + 0.7 * (a[name] - 1) - 0.4 * (b[name] - 1))


def test_a_mixture_of_one_expert_is_that_expert_and_of_none_the_base_model():
    model = make_svf()
    a, b = random_expert(model, 1), random_expert(model, 2)
    for name, z in t2.mix([a, b], torch.tensor([[1.0], [0.0]])).items():
        assert torch.allclose(z, a[name])
    for z in t2.mix([a, b], torch.zeros(2, 1)).values():
        assert torch.allclose(z, torch.ones_like(z))


def test_a_mixture_may_weigh_every_block_differently():
    model = make_svf()
    a = random_expert(model)
    for name, z in t2.mix([a], torch.tensor([[0.0, 2.0]])).items():
        weight = 2.0 if "layers.1." in name else 0.0
        assert torch.allclose(z, 1 + weight * (a[name] - 1))


def test_experts_of_different_layers_can_be_mixed():
    a, b = {"x": torch.full((3,), 2.0)}, {"y": torch.full((3,), 3.0)}
    mixture = t2.mix([a, b], [[0.5], [0.5]])
    assert torch.allclose(mixture["x"], torch.full((3,), 1.5))
    assert torch.allclose(mixture["y"], torch.full((3,), 2.0))


@pytest.mark.parametrize("shape", [(2, 1), (2, 3)])
def test_the_cross_entropy_method_finds_a_known_optimum(shape):
    rng = np.random.default_rng(0)
    best = rng.uniform(-1.5, 1.5, shape)

    def score(candidates):
        return [-((candidate - best) ** 2).sum() for candidate in candidates]

    first = np.zeros((1, *shape))
    found = t2.cross_entropy_method(score, first, population=32, iterations=30, seed=0)
    assert np.allclose(found, best, atol=0.1)


def test_the_cross_entropy_method_returns_the_best_candidate_that_it_saw():
    seen = []

    def score(candidates):
        scores = [math.sin(1000 * float(np.sum(candidate))) for candidate in candidates]
        seen.extend(zip(scores, candidates))
        return scores

    first = np.zeros((1, 2, 1))
    found = t2.cross_entropy_method(score, first, population=8, iterations=5, seed=0)
    assert np.array_equal(found, max(seen, key=lambda pair: pair[0])[1])


@pytest.mark.parametrize("per_layer", [False, True])
def test_few_shot_tries_the_base_model_and_every_single_expert_first(per_layer, monkeypatch):
    model = make_svf()
    experts = {name: random_expert(model, seed) for seed, name in enumerate("abc")}
    rounds = []

    def score_mixtures(model, processor, task, problems, experts, candidates):
        rounds.append([np.asarray(candidate) for candidate in candidates])
        return [(0.0, 0.0)] * len(candidates)

    monkeypatch.setattr(t2, "score_mixtures", score_mixtures)
    task = digit_task()
    settings = dict(population=8, iterations=2, per_layer=per_layer)
    t2.few_shot(model, TOKENIZER, task, task.problems("test"), experts, **settings)
    columns = 2 if per_layer else 1
    for alphas in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        expected = np.repeat(np.array(alphas)[:, None], columns, axis=1)
        assert any(np.array_equal(candidate, expected) for candidate in rounds[0])
    assert len(rounds) == 2
    assert len(rounds[0]) == 8


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_few_shot_answers_its_examples_as_well_as_the_base_model_and_every_expert(family):
    model, task = make_svf(family), digit_task()
    useful = t2.reinforce(model, TOKENIZER, task, **TRAINING)
    experts = {"useless": random_expert(model, 1, 0.1), "useful": useful}
    problems = task.problems("test")
    settings = dict(population=6, iterations=2)
    mixture, alphas = t2.few_shot(model, TOKENIZER, task, problems, experts, **settings)
    assert alphas.shape == (2, 1)
    for name, z in t2.mix(list(experts.values()), alphas).items():
        assert torch.allclose(mixture[name], z)
    accuracies = {}
    for name, expert in {"base": None, **experts, "mixture": mixture}.items():
        accuracies[name] = t2.evaluate(model, TOKENIZER, task, problems, expert=expert)
    assert accuracies["mixture"] == max(accuracies.values())
    assert accuracies["mixture"] > accuracies["base"] + 0.3


@pytest.mark.parametrize("make_task", [choice_task, digit_task])
def test_candidates_score_in_one_batch_what_they_score_alone(make_task):
    model, task = make_svf("opt"), make_task()
    experts = [random_expert(model, 1, 1.0), random_expert(model, 2, 1.0)]
    problems = task.problems("test")[:7]
    candidates = [np.array(alphas)[:, None] for alphas in ([0, 0], [1, 0], [0.5, -1], [0.3, 2])]
    scores = t2.score_mixtures(model, TOKENIZER, task, problems, experts, candidates)
    for alphas, (accuracy, log_prob) in zip(candidates, scores):
        mixture = t2.mix(experts, alphas)
        alone = t2.evaluate(model, TOKENIZER, task, problems, expert=mixture)
        assert accuracy == pytest.approx(alone)
        total = 0.0
        with torch.no_grad(), t2.use_expert(model, mixture):
            for problem in problems:
                prompt = prompt_ids(problem["question"])
                answer = problem["answer"]
                if task.prefill:
                    prompt, answer = prompt + TOKENIZER(task.prefill)["input_ids"], f" {answer}"
                total += plain_log_prob(model, prompt, TOKENIZER(answer)["input_ids"]).item()
        assert log_prob == pytest.approx(total / len(problems), abs=1e-3)


def test_few_shot_decides_between_equals_by_the_likelihood_of_the_right_answers():
    """No candidate answers right here, so likelihood alone decides."""
    model, task = make_svf(), toy(lambda text, problem: -1.0, max_new_tokens=1)
    problems = task.problems("test")[:5]
    experts = {"a": random_expert(model, 1, 0.3), "b": random_expert(model, 2, 0.3)}
    settings = dict(population=8, iterations=4)
    _, alphas = t2.few_shot(model, TOKENIZER, task, problems, experts, **settings)
    candidates = [np.zeros((2, 1)), np.eye(2)[:, :1], np.eye(2)[:, 1:], alphas.numpy()]
    scores = t2.score_mixtures(model, TOKENIZER, task, problems, list(experts.values()), candidates)
    assert [accuracy for accuracy, _ in scores] == [0.0] * 4
    assert max(scores) == scores[3]
    assert scores[3][1] > scores[0][1] + 0.1


def test_few_shot_gives_the_same_for_the_same_seed():
    model, task = make_svf(), digit_task()
    experts = {"a": random_expert(model, 1), "b": random_expert(model, 2)}
    alphas = []
    for seed in (1, 1, 2):
        settings = dict(population=5, iterations=2, seed=seed)
        _, found = t2.few_shot(
            model, TOKENIZER, task, task.problems("test")[:3], experts, **settings
        )
        alphas.append(found)
    assert torch.equal(alphas[0], alphas[1])
    assert not torch.equal(alphas[0], alphas[2])


# ---- The module as a whole -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme_example(tmp_path_factory) -> subprocess.CompletedProcess:
    """README's ten lines, run in a folder with nothing but transformer2.py and a model."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "transformer2.py").write_text((HERE / "transformer2.py").read_text())
    make().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")

    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "two_pass(" in block]
    code, replaced = re.subn(r'name = "[^"]+"', 'name = "model"', code)
    assert replaced == 1
    code = re.sub(r"steps=\d+", "steps=2", code)
    code = re.sub(r"batch_size=\d+", "batch_size=8", code)
    (folder / "example.py").write_text(code)
    return subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "always::FutureWarning"},
        capture_output=True,
        text=True,
    )


def test_one_file_is_enough_for_readmes_ten_lines(readme_example):
    assert readme_example.returncode == 0, readme_example.stderr[-3000:]
    *_, accuracy, answers = readme_example.stdout.splitlines()
    assert 0 <= float(accuracy) <= 1
    assert re.match(r"\[\('\w+', '", answers)


def test_readmes_ten_lines_print_no_warnings(readme_example):
    assert "warn" not in readme_example.stderr.lower()
    assert "deprecat" not in readme_example.stderr.lower()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2"])
def test_transformers_warns_of_nothing_that_will_change(family):
    model = make_svf(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        t2.generate(model, TOKENIZER, [say(SHORT), say(LONG)], max_new_tokens=4, temperature=1.0)
        for task in (choice_task(), digit_task()):
            for checkpointing in (False, True):
                hyper = dict(steps=1, batch_size=4, kl_coef=0.1, checkpointing=checkpointing)
                t2.reinforce(model, TOKENIZER, task, validation_problems=4, **hyper)
