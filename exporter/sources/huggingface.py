"""Hugging Face models: a local folder, a hub id, or a configuration with random weights."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EnvironmentLacks, ExportFailed, InvalidRequest
from ..manifest import SourceRecord, sha256_of
from .base import EXAMPLE_BATCH, EXAMPLE_LENGTH, Source, SourceRequest, max_length, record_input

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_FILE_SUFFIXES = (".json", ".onnx", ".pt2", ".py", ".safetensors", ".txt", *_PICKLED_SUFFIXES)
_READ_SUFFIXES = (".json", ".safetensors", ".py", *_PICKLED_SUFFIXES)

# Sizes of a model with random weights: the architecture stays, the numbers shrink to them.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "moe_intermediate_size": 64,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "d_ff": 128,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
    "sliding_window": 32,
    "window_size": 32,
    "attention_window": 32,
    "local_radius": 32,
    "block_size": 16,
    "attention_chunk_size": 64,
}
_LAYERS = 2
# The branch of a hub repository to load where no commit is known.
_NEWEST = "main"
# Wide enough for attention that is far from uniform, so that a wrong mask shows in the output.
_INITIALIZER_RANGE = 0.1


def load_huggingface(request: SourceRequest) -> Source:
    """Load a model with the class that its configuration names; of an encoder-decoder, its encoder.

    A decoder reads its own output one token at a time, which is another graph; the long text is the encoder's.

    Raises:
        InvalidRequest: no such model, or what it needs was not allowed (pickles, remote code).
        EnvironmentLacks: transformers is not installed, or the hub cannot be reached.
        ExportFailed: transformers cannot load it.
    """
    folder = _locate(request)
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentLacks(
            "Hugging Face models need transformers, which is not installed; next step: pip install 'longspan[hf]'"
        ) from error
    import torch

    torch.manual_seed(request.seed)
    with _quiet(transformers):
        config = _load_config(request)
        # Of a model of the hub, so that the weights are those of this configuration, now and later.
        commit = "" if Path(request.location).exists() else getattr(config, "_commit_hash", None) or ""
        own_code = request.trust_remote_code and bool(getattr(config, "auto_map", None))
        if request.random_weights:
            shrink(config)
            model, pickled = _drawn(transformers, config, request), False
        else:
            model, pickled = _pretrained(transformers, config, request, folder, commit)
    model, encoder_of = _encoder(model.eval())
    # A cache would be an output, and another graph; this one reads a whole text.
    part: Any
    for part in model.modules():
        if getattr(getattr(part, "config", None), "use_cache", None):
            part.config.use_cache = False
    examples = _example_inputs(model, request)
    vocabulary = _vocabulary(config)
    records = {
        name: record_input(name, value, vocabulary if name == "input_ids" else None) for name, value in examples.items()
    }
    record = SourceRecord(
        kind="config" if request.random_weights else "huggingface",
        location=request.location,
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        files=_hashes(request, folder),
        random_weights=request.random_weights,
        seed=request.seed,
        pickled_weights=pickled,
        remote_code=own_code,
        inputs=request.inputs,
        revision=commit,
        encoder_of=encoder_of,
    )
    return Source(record, model, examples, None, records, max_length(model))


def shrink(config: PretrainedConfig) -> None:
    """Reduce a configuration in place to a model that runs in a second, with every special token still valid.

    Of many layers two stay, or the first of each kind where there are more kinds. Windows and radii above 32 tokens
    become 32, chunks above 64 become 64, blocks above 16 become 16, so that a text of a few hundred tokens goes well
    beyond them. Positions stay, and so do counts: blocks that are drawn at random, tokens of a global block.
    """
    before = getattr(config, "num_hidden_layers", 0)
    kept = _kept_layers(config, before)
    head_size = _head_size(config)
    for name, size in {**_SMALL, "num_hidden_layers": len(kept)}.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > size:
            setattr(config, name, size)
    if getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
        if getattr(config, "query_pre_attn_scalar", None):
            config.query_pre_attn_scalar = config.head_dim
    if hasattr(config, "initializer_range"):
        config.initializer_range = _INITIALIZER_RANGE
    rotation = getattr(config, "rope_parameters", None) or {}
    for name, factors in rotation.items():
        # One factor per pair of channels: short_factor, long_factor.
        if isinstance(factors, list) and head_size:
            rotation[name] = factors[: len(factors) * _head_size(config) // head_size]
    for name, value in vars(config).items():
        if name.endswith("_token_id") and value is not None:
            last = config.vocab_size - 1
            setattr(config, name, [min(v, last) for v in value] if isinstance(value, list) else min(value, last))
        # One entry per layer: attention_window, layer_types, …
        elif isinstance(value, list) and len(value) == before > 0 and name != "architectures":
            limit = _SMALL.get(name)
            chosen = [value[layer] for layer in kept]
            setattr(config, name, chosen if limit is None else [min(entry, limit) for entry in chosen])


def _head_size(config: PretrainedConfig) -> int:
    """Channels of a head; 0 where the configuration does not say."""
    heads = getattr(config, "num_attention_heads", 0)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)


def _kept_layers(config: PretrainedConfig, before: int) -> list[int]:
    """Positions of the layers to keep: the first of each kind, and the next ones up to two."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = (layer for layer in range(before) if layer not in first)
    return sorted([*first, *itertools.islice(others, max(0, _LAYERS - len(first)))])


def _locate(request: SourceRequest) -> Path | None:
    """The local folder, or None for a configuration file or a hub id.

    Raises:
        InvalidRequest: the location is neither, or its files do not fit the options.
    """
    path = Path(request.location)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "manifest.json").is_file():
                raise InvalidRequest(f"{path}: is a bundle already; next step: longspan check {path}")
            raise InvalidRequest(f"{path}: has no config.json; give a folder that save_pretrained wrote")
        if not request.random_weights and not request.allow_pickle and not list(path.glob("*.safetensors")):
            pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED_SUFFIXES)
            if pickled:
                raise InvalidRequest(
                    f"{path}: its weights are pickled ({', '.join(pickled)}), and pickles can run any code; convert "
                    "them to safetensors, or if you trust them, add --allow-pickle"
                )
            raise InvalidRequest(
                f"{path}: has no weights (*.safetensors); for an architecture without weights, add --random-weights"
            )
        return path
    if path.is_file():
        if path.suffix != ".json":
            raise InvalidRequest(f"{path}: of no known kind; give a folder, config.json, file.py:factory or .pt2")
        if not request.random_weights:
            raise InvalidRequest(f"{path}: is a configuration without weights; add --random-weights")
        return None
    if not is_hub_id(request.location):
        raise InvalidRequest(f"{request.location}: no such file or folder, and not a hub id (owner/name)")
    return None


def _load_config(request: SourceRequest) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            request.location, trust_remote_code=request.trust_remote_code, revision=request.revision or _NEWEST
        )
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever transformers and its validators think of the file
        raise _load_error(request, error) from error
    return config


def _model_class(transformers: Any, config: PretrainedConfig, request: SourceRequest) -> Any:
    """The class that the configuration names, else the base model of its type."""
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if request.random_weights:
        mapping = transformers.AutoModel._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
        raise InvalidRequest(f"{request.location}: transformers has no model class for {type(config).__name__}")
    return transformers.AutoModel


def _encoder(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The encoder of an encoder-decoder and the name of the latter's class; any other model as it is, and ""."""
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return model, ""
    encoder = model.get_encoder()
    return (encoder, type(model).__name__) if hasattr(encoder, "config") and encoder is not model else (model, "")


def _drawn(transformers: Any, config: PretrainedConfig, request: SourceRequest) -> PreTrainedModel:
    """The model of a configuration, with random weights."""
    import torch

    model_class = _model_class(transformers, config, request)
    try:
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32)
    except Exception as error:  # sizes that contradict each other fail anywhere in the model's own code
        raise _load_error(request, error) from error
    return model


def _pretrained(
    transformers: Any, config: Any, request: SourceRequest, folder: Path | None, commit: str
) -> tuple[PreTrainedModel, bool]:
    """The model with its weights, and whether these were pickled."""
    import torch

    model_class = _model_class(transformers, config, request)

    def load(pickled: bool) -> Any:
        return model_class.from_pretrained(
            folder or request.location,
            config=config,
            dtype=torch.float32,
            trust_remote_code=request.trust_remote_code,
            revision=commit or request.revision or _NEWEST,
            use_safetensors=not pickled,
            output_loading_info=True,
            # Collected and refused below: transformers itself would say which only in its log.
            ignore_mismatched_sizes=True,
        )

    pickled = request.allow_pickle and folder is not None and not list(folder.glob("*.safetensors"))
    try:
        try:
            model, loading = load(pickled)
        except OSError:
            # What the hub has of a model shows only when it is asked.
            if folder is not None or not request.allow_pickle:
                raise
            pickled = True
            model, loading = load(pickled)
    except (Exception, SystemExit) as error:  # the model's own code, its configuration, a damaged file
        raise _damaged_weights(folder) or _load_error(request, error) from error
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, saved, wanted = mismatched[0]
        raise ExportFailed(
            f"{request.location}: config.json does not fit the weights: {name} has shape {list(saved)}, the "
            f"configuration wants {list(wanted)} ({len(mismatched)} such weights)"
        )
    # Weights of a head that the checkpoint lacks are drawn by transformers; refuse rather than export noise, but let
    # the pooler pass, which sentence encoders are saved without and which leaves the other outputs right.
    missing = sorted(name for name in loading["missing_keys"] if "pooler." not in name)
    if missing:
        raise ExportFailed(
            f"{request.location}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}: "
            f'{", ".join(missing[:3])}…; check "architectures" in config.json'
        )
    return model, pickled


def _damaged_weights(folder: Path | None) -> ExportFailed | None:
    """The error of a folder in which a file of weights is damaged; None where all of them can be read."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            return ExportFailed(f"{file}: is truncated or damaged ({error}); next step: download or save it again")
    return None


def _load_error(request: SourceRequest, error: BaseException) -> Exception:
    text = str(error)
    if "trust_remote_code" in text:
        return InvalidRequest(
            f"{request.location}: comes with Python code of its own; if you trust it, add --trust-remote-code"
        )
    # Of a paragraph of advice the first sentence says what is wrong.
    first = " ".join(text.split()).split(". ")[0].rstrip(".") or type(error).__name__
    if not Path(request.location).exists() and isinstance(error, OSError):
        return EnvironmentLacks(
            f"{request.location}: no such folder, and the hub did not give it ({first}); next step: check the "
            "name, or download the model and give its folder"
        )
    return ExportFailed(
        f"{request.location}: transformers cannot load it: {first}; next step: correct it, or download it again"
    )


def _example_inputs(model: PreTrainedModel, request: SourceRequest) -> dict[str, torch.Tensor]:
    import torch

    parameters = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(request.seed)
    low, high = _vocabulary(config)
    # Shorter than the longest: there a table of positions needs no slice, and torch.export would fix the length.
    length = min(EXAMPLE_LENGTH, max((max_length(model) or EXAMPLE_LENGTH + 1) - 1, 1))
    shape = (EXAMPLE_BATCH, length)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, -3:] = 0
    first = torch.zeros(shape, dtype=torch.int64)
    first[:, 0] = 1
    available = {
        "input_ids": torch.randint(low, high + 1, shape, generator=generator),
        "attention_mask": mask,
        "global_attention_mask": first,
    }
    types = getattr(config, "type_vocab_size", 0) or 0
    if types > 1:
        available["token_type_ids"] = torch.randint(0, types, shape, generator=generator)
    available = {name: value for name, value in available.items() if name in parameters}
    if "input_ids" not in available:
        raise ExportFailed(f"{request.location}: {type(model).__name__} does not take input_ids; use file.py:factory")
    unknown = [name for name in request.inputs if name not in available]
    if unknown:
        raise InvalidRequest(f"--inputs {', '.join(unknown)}: not among {', '.join(available)}")
    return {name: available[name] for name in request.inputs or available}


def _vocabulary(config: Any) -> tuple[int, int]:
    """Smallest and largest token id to draw. Padding tokens are left out: some models count positions by them."""
    pad = getattr(config, "pad_token_id", None)
    low = pad + 1 if isinstance(pad, int) and 0 <= pad < config.vocab_size // 2 else 0
    return low, config.vocab_size - 1


def _hashes(request: SourceRequest, folder: Path | None) -> dict[str, str]:
    path = Path(request.location)
    if path.is_file():
        return {path.name: sha256_of(path)}
    return {file.name: sha256_of(file) for file in read_files(folder, request.random_weights)} if folder else {}


def read_files(folder: Path, random_weights: bool) -> list[Path]:
    """Files of a folder that loading it may read."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _READ_SUFFIXES)
    return [file for file in files if not random_weights or file.name == "config.json" or file.suffix == ".py"]


def is_hub_id(location: str) -> bool:
    """Whether a location can only be the name of a model on the hub, as far as its spelling tells."""
    path = Path(location)
    return (
        path.suffix not in _FILE_SUFFIXES
        and not location.startswith((".", "/", "~"))
        and _HUB_ID.fullmatch(location) is not None
    )


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and hints off the terminal while loading; errors still raise."""
    from huggingface_hub.utils import logging as hub

    ours = transformers.utils.logging
    verbosities = ours.get_verbosity(), hub.get_verbosity()
    ours.set_verbosity_error()
    hub.set_verbosity_error()
    ours.disable_progress_bar()
    try:
        yield
    finally:
        ours.set_verbosity(verbosities[0])
        hub.set_verbosity(verbosities[1])
        ours.enable_progress_bar()
