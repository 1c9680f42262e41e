"""Loading a model: one of the two built-in ones, which are pretrained here, or any other."""

import inspect
import zlib
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import torch
import transformers
from torch import nn

from tasks import pictures, tiny
from tasks.data import offer_categories
from transformer2 import Processor, Transformer2Error, write_whole

CACHE = Path(".cache/transformer2")  # what takes long to compute

BUILT_IN_MODELS: dict[str, Callable] = {  # name -> function that pretrains: (model, processor)
    "tiny": tiny.pretrain_tiny,
    "tiny-vlm": pictures.pretrain_tiny_vlm,
}


def load_model(
    name: str, device: str | None = None, device_map: str | None = None
) -> tuple[nn.Module, Processor]:
    """The model and the processor of a hub id, a folder, "tiny" or "tiny-vlm".

    The model is in bfloat16 on a GPU and in float32 on a CPU. device: the GPU of this process if
    there is one, otherwise the CPU. device_map: "auto" spreads a model over several GPUs. Raises
    Transformer2Error for a model that cannot be loaded.
    """
    # The libraries' notes, retries and progress bars are not for the user.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    source = built_in_folder(name) if name in BUILT_IN_MODELS else name
    model_class, processor_class = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if hasattr(config, "vision_config"):
            model_class = transformers.AutoModelForImageTextToText
            processor_class = transformers.AutoProcessor
        model = model_class.from_pretrained(source, dtype=dtype, device_map=device_map)
        processor = processor_class.from_pretrained(source)
    except Exception as error:  # no such model, a damaged file, a package that is missing
        reason = f"{type(error).__name__}, {str(error).strip()}".splitlines()[0]
        what = "neither 'tiny' or 'tiny-vlm', nor a folder with a model, nor to be had from the hub"
        raise Transformer2Error(f"model {str(source)!r} is {what}: {reason}") from error
    if device_map is None:
        model = model.to(device)
    return model.eval(), processor


def built_in_folder(name: str) -> Path:
    """The folder of a built-in model, named by its source text. The first call pretrains it."""
    version = zlib.crc32(built_in_source(name).encode())
    folder = CACHE / f"{name}-{version:08x}"
    if not folder.exists():
        model, processor = BUILT_IN_MODELS[name]()

        def save(path: Path) -> None:
            model.save_pretrained(path)
            processor.save_pretrained(path)

        try:
            write_whole(folder, save)
        except Transformer2Error:
            if not folder.exists():  # otherwise another process was faster
                raise
    return folder


def built_in_source(name: str) -> str:
    """The source text that decides what a built-in model is: another text, another model.

    It gives the folder in which the model is kept a name of its own.
    """
    source = inspect.getsource(tiny) + inspect.getsource(offer_categories)
    if name == "tiny-vlm":
        source += inspect.getsource(pictures)
    return source
