"""Reading configurations, tokenizers and models, from a directory, a GGUF file or the hub."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch

from thanos.checkpoint.conversion import can_convert
from thanos.checkpoint.update import FLOATS, tensor_places, weight_files
from thanos_kernels.errors import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LENGTHS = (  # what configurations call the tokens a model takes
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
    "seq_length",
    "n_ctx",
)


_PACKED = {  # ways of quantising that Transformers does not undo when it reads a model
    "aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "eetq",
    "fbgemm_fp8", "fp_quant", "gptq", "higgs", "hqq", "quanto", "spqr", "torchao", "vptq",
}  # fmt: skip


_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # files that tokenizers are read from


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a causal language model.

    Args:
        model: a directory, the path of a ``.gguf`` file, or a name on the Hugging Face hub.
        trust_remote_code: run the Python code that comes with the model. Nothing in a checkpoint can ask for it.

    Raises:
        ValueError: there is no such model, it cannot be read, it comes with code of its own, which is not trusted, or
            it is no decoder-only causal language model.
    """
    from transformers import AutoConfig

    config = _read(model, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{model} is an encoder-decoder ({config.model_type}); only decoder-only models are pruned")
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if auto_class(config) is None and not (own_code and trust_remote_code):
        if own_code:
            raise ValueError(_untrusted(model))
        raise ValueError(
            f"{model} is no causal language model that transformers knows (its type is {config.model_type})"
        )
    return config


def auto_class(config: Any) -> Any:
    """The class that reads the whole model: of a multimodal one its vision part too. None for another kind of model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING else None


def check_unquantised(config: Any, model: str) -> None:
    """Refuse, by its configuration, a model whose weights are read packed, so that they could not be pruned.

    Raises:
        ValueError: the weights are quantised.
    """
    name = quantisation(config)
    if not is_gguf(model) and name in _PACKED:
        raise ValueError(
            f"{model} holds quantised weights ({name}); prune the model in a floating dtype it was made of"
        )


def quantisation(config: Any) -> str | None:
    """How a configuration says that the weights are quantised; None where it does not."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if found is None else str(getattr(method, "value", method)).lower()


def check_floating(source: Path, config: Any) -> None:
    """Refuse matrices that are stored as whole numbers or in 8 bits, where nothing says how they are read.

    Raises:
        ValueError: there are some; the first is named.
    """
    if quantisation(config) is not None:
        return
    for name, place in tensor_places(weight_files(source)).items():
        if name.endswith("weight") and len(place.shape) > 1 and place.dtype not in FLOATS:
            raise ValueError(
                f"{source} holds {name} as {place.dtype}, and its config.json does not say how such weights are read; "
                "use a model whose weights are floating numbers of 16 bits or more"
            )


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``model`` (as in :func:`load_config`)."""
    from transformers import AutoTokenizer

    return _read(model, AutoTokenizer.from_pretrained, "tokenizer", trust_remote_code=trust_remote_code)


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device, without weights; None where it cannot be built so."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            build = auto_class(config) or AutoModelForCausalLM
            model: Any = build.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # of a constructor that needs real tensors: what it would have shown is checked later
        return None
    return model.eval()


def load_model(
    model: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    config: Any = None,
    allow_missing: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        model: a directory, the path of a ``.gguf`` file (dequantised), or a name on the Hugging Face hub.
        dtype: of the weights; None keeps the checkpoint's own.
        device: None leaves it on the CPU.
        config: what :func:`load_config` returned for it, to save reading it again.
        allow_missing: whether tensors that the checkpoint lacks may be random, and those that the model does not know
            be left out.
        trust_remote_code: as for :func:`load_config`.

    Raises:
        ValueError: as :func:`load_config`, or tensors are missing, of another shape, or unknown to the model.
    """
    from transformers import AutoModelForCausalLM

    trusted = {"trust_remote_code": trust_remote_code}
    config = config or load_config(model, **trusted)
    if Path(model).is_dir():
        check_floating(Path(model), config)
    # Mismatches are taken in here, to be refused by name below.
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, **trusted}
    options |= {"config": config, "dtype": dtype or "auto"}
    quantised = quantisation(config) is not None
    if is_gguf(model):
        options["quantization_config"] = _dequantised()
    loaded, found = _read(model, (auto_class(config) or AutoModelForCausalLM).from_pretrained, **options)
    if not allow_missing:
        if not can_convert():  # before version 5 embeddings that are tied are not said to be missing, and stay empty
            found["missing_keys"] = {*found["missing_keys"], *(n for n, p in loaded.named_parameters() if p.is_meta)}
        _refuse_incomplete(model, loaded, found)
    dequantised = quantised and quantisation(loaded.config) is None
    if is_gguf(model) or dequantised:
        _forget_quantisation(loaded)
    if dequantised:
        to_one_dtype(loaded, dtype or getattr(config, "dtype", None))
    return loaded.eval() if device is None else loaded.eval().to(device)


def _refuse_incomplete(model: str, loaded: Any, found: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not the model's, by name."""
    mismatched = [str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in found["mismatched_keys"]]
    buffers = {name for name, _ in loaded.named_buffers()}
    unknown = [name for name in found["unexpected_keys"] if not _is_buffer(name, buffers)]
    for names, what in (
        (sorted(found["missing_keys"]), "lacks"),
        (sorted(mismatched), "holds in another shape"),
        (sorted(unknown), "holds, but its model class does not know,"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"the checkpoint {model} {what} the tensor {names[0]}{more}; mend it, or pass --allow-missing "
                "(allow_missing=True) to use random weights for what is missing and leave out what is unknown"
            )


def check_nothing_left_out(model: Any, source: Path) -> None:
    """Refuse a checkpoint with tensors that Transformers drops without a word, such as heads for further tokens.

    They stay where the source's own files are written over, and vanish where Transformers saves the model: in another
    dtype, or in another shape.

    Args:
        model: of the source's configuration; it may lie on the meta device.

    Raises:
        ValueError: there are some; the first is named.
    """
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    buffers = {name for name, _ in model.named_buffers()}
    names = sorted(
        name
        for name in tensor_places(weight_files(source))
        if name not in known and any(one.search(name) for one in patterns) and not _is_buffer(name, buffers)
    )
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"the checkpoint {source} holds the tensor {names[0]}{more}, which its model class leaves out. It is kept "
            "in the model's own dtype and shape, and lost in another: pass --allow-missing for that"
        )


def _is_buffer(name: str, buffers: set[str]) -> bool:
    """Whether a tensor is one that models compute themselves, such as rotary tables and masks in old checkpoints."""
    leaf = name.rpartition(".")[2]
    ends = {buffer.rpartition(".")[2] for buffer in buffers} | {"inv_freq", "masked_bias"}
    masks = leaf == "bias" and name.endswith(("attn.bias", "attention.bias"))
    return leaf in ends or masks


def is_gguf(model: str) -> bool:
    return model.lower().endswith(".gguf")


def max_length(config: Any) -> int | None:
    """The longest sequence a model takes, in tokens; None where it has no limit."""
    text = config.get_text_config()
    length = next((value for name in _LENGTHS if (value := getattr(text, name, None)) is not None), None)
    if not isinstance(length, int) or length < 1:
        return None
    return length - _reserved(config, length)


def _reserved(config: Any, length: int) -> int:
    """How many of the model's ``length`` positions no token can have.

    Families like RoBERTa count positions from behind the padding token's, whose row is marked in the table of the
    positions' embeddings. So the model is looked at: without weights, and with one block.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return 0
    if any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta")):
        return 0  # rotary positions have no table, and such models may be large
    small = copy.deepcopy(config)
    if hasattr(small, "num_hidden_layers"):
        small.num_hidden_layers = 1
    build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = build(small)
    tokens = model.get_input_embeddings()
    tables = [table for table in model.modules() if isinstance(table, torch.nn.Embedding) and table is not tokens]
    marks = [table.padding_idx for table in tables if table.num_embeddings == length]
    return max((mark + 1 for mark in marks if mark is not None), default=0)


def _read(model: str, reader: Any, what: str = "model", **options: Any) -> Any:
    """Call a ``from_pretrained``, its many errors made one sentence."""
    path = Path(model)
    if is_gguf(model):
        if not path.is_file():
            raise ValueError(f"there is no GGUF file {model}")
        options["gguf_file"], path = path.name, path.parent
    elif path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{model} holds an adapter of PEFT; merge it into its model first, with merge_and_unload(), and use "
                "what that saves (where it is merged already, remove adapter_config.json)"
            )
        if not (path / "config.json").is_file():
            raise ValueError(f"{model} is no model directory: it holds no config.json")
    elif path.exists() or _looks_like_path(model):
        raise ValueError(f"{model} is no model directory, no .gguf file and no name on the Hugging Face hub")
    try:
        return reader(str(path) if "gguf_file" in options or path.is_dir() else model, **options)
    except ImportError as error:
        if what == "tokenizer" and path.is_dir():
            _refuse_without_files(path)
        raise ValueError(f"{model} needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # the readers raise whatever their parsers raise
        if not options.get("trust_remote_code") and "trust_remote_code" in str(error):
            raise ValueError(_untrusted(model)) from error
        here = "" if path.exists() else f"there is no directory {model} here, and "
        whose = model if what == "model" else f"of {model}"
        if what == "tokenizer" and path.is_dir():
            _refuse_without_files(path)
        raise ValueError(f"cannot read the {what} {whose}: {here}{first_line(error)}") from error


def _refuse_without_files(folder: Path) -> None:
    """Raise ValueError where a model directory has no tokenizer at all."""
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ValueError(
            f"cannot read the tokenizer of {folder}: none of its files is there ({', '.join(_TOKENIZERS)}); copy those "
            "of the model that it came from"
        )


def _untrusted(model: str) -> str:
    return (
        f"{model} comes with Python code of its own, which is not run unless you say so: read that code, and if you "
        "trust it pass --trust-remote-code (in Python trust_remote_code=True)"
    )


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or not model


def _dequantised() -> Any:
    """Older versions of transformers unpack a GGUF file in any case; newer ones where they are asked to."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return None
    return GgufConfig(dequantize=True)


def _forget_quantisation(model: Any) -> None:
    """The weights were dequantised when they were read: nothing of their quantisation may be saved with them."""
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = None  # so that those of the model's class alone are reverted
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = None
    model.is_quantized = False


def to_one_dtype(model: Any, dtype: torch.dtype | None) -> None:
    """Convert what Transformers left in another dtype beside weights that were quantised, as it does otherwise.

    Args:
        dtype: of the model; None is that of its first parameter. What the model's class keeps in float32 stays.
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype or model.dtype)
