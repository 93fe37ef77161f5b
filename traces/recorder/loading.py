"""A model and its tokenizer, loaded as transformers loads them."""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traces.errors import InputError
from traces.recorder.layers import MoELayer, expert_count
from traces.recorder.options import RecordOptions

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")


def require_packages(what: str = "recording") -> None:
    """Raise `InputError` where torch or transformers, which `what` needs, are not installed."""
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ImportError:
            raise InputError(
                f"{what} needs the package {package}, which is not installed: pip install 'foregate[real]'"
            ) from None


def check_folder(path: str) -> None:
    """Raise `InputError` where `path` names a folder and no saved model is there; the id of a published one passes."""
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        raise InputError(f"model: there is no folder {path}; it must be a folder with a saved model, or the id of one")
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise InputError(f"model: {path} is no saved model; it must be a folder with a config.json")


def load_model(path: str, options: RecordOptions) -> torch.nn.Module:
    """Load the causal language model at `path`, a folder or the id of a published model, ready to generate.

    Raises `InputError` when there is no such model, or it is of a kind that transformers cannot load.
    """
    import torch
    import transformers

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is '{options.dtype}'; it must be auto or a type of torch's, such as bfloat16")
    keywords: dict[str, Any] = {"dtype": dtype}
    if options.experts_implementation is not None:
        keywords["experts_implementation"] = options.experts_implementation
    if options.device_map is not None:
        keywords["device_map"] = options.device_map
    device = _device(options)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **keywords)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model: {path} cannot be loaded: {error}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    return (model if options.device_map is not None else model.to(device)).eval()


def load_encoder(path: str) -> Callable[[str], Sequence[int]] | None:
    """Return the function that turns a text into token ids as the tokenizer at `path` does, None where there is none.

    Raises `InputError` when there is one that cannot be loaded.
    """
    import transformers

    # Without any file, transformers makes up an empty tokenizer for some architectures.
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return encoder(transformers.AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"model: the tokenizer of {path} cannot be loaded ({error}); prompts can be token_ids instead"
        ) from error


def encoder(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """Return the function that turns a text into token ids, special tokens included, as `tokenizer` does."""

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text)["input_ids"]
        return ids

    return encode


def describe(model: Any, layers: Sequence[MoELayer]) -> dict[str, Any]:
    """Return what decides a recording's bytes besides the options and the prompts: JSON values, no time and no path."""
    import torch
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    return {
        "architecture": type(model).__name__,
        "attention_implementation": str(model.config._attn_implementation),
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "device": ", ".join(devices),
        "device_name": torch.cuda.get_device_name() if any("cuda" in device for device in devices) else "cpu",
        "dtype": str(next(layers[0].experts.parameters()).dtype).removeprefix("torch."),
        "experts_implementation": str(layers[0].experts.config._experts_implementation),
        "foregate": foregate_version(),
        "router_weights_sha256": _router_weights(layers),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def foregate_version() -> str:
    """Return this project's version: as installed, or as the checkout says where it runs without being installed."""
    try:
        return metadata.version("foregate")
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"])


def _device(options: RecordOptions) -> torch.device:
    import torch

    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise InputError(f"device is '{options.device}'; it must be auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is '{options.device}'; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _router_weights(layers: Sequence[MoELayer]) -> str:
    """Return a sha256 of what routes: the parameters of one row per expert beside the experts.

    It tells two checkpoints of one configuration apart without reading all of either.
    """
    import torch

    digest = hashlib.sha256()
    for layer in layers:
        inside = {id(parameter) for parameter in layer.experts.parameters()}
        for parameter in layer.block.parameters():
            one_per_expert = parameter.ndim > 0 and parameter.shape[0] == expert_count(layer.experts)
            # Parameters that are kept off the device until they are used have no values here.
            if id(parameter) not in inside and one_per_expert and parameter.device.type != "meta":
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
