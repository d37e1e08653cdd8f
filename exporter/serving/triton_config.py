"""The configuration of a model, ``config.pbtxt``, in the server's own schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..engines.onnxruntime.session import CACHE_FOLDER, CPU_PROVIDER, CUDA_PROVIDER, TENSORRT_PROVIDER, SessionPlan
from ..errors import EnvironmentLacks, ExportFailed, InvalidRequest
from ..manifest import InputRecord, Manifest, OutputRecord
from .served_models import ORT_PLATFORM, TENSORRT_PLATFORM, ServedModel
from .warm_up import Sample

CONFIG_FILE = "config.pbtxt"

TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}
"""The server's types, by numpy's names."""

# The server's ONNX Runtime backend sets these two of the CUDA provider from the model's parameters, as numbers,
# whatever its accelerator's parameters say.
_ARENA, _SEARCH = "arena_extend_strategy", "cudnn_conv_algo_search"
_NUMBERED = {
    _ARENA: {"kNextPowerOfTwo": "0", "kSameAsRequested": "1"},
    _SEARCH: {"EXHAUSTIVE": "0", "HEURISTIC": "1", "DEFAULT": "2"},
}

_INITIALIZERS = "session.use_device_allocator_for_initializers"


@dataclass(frozen=True)
class Placement:
    """Where the server finds what a configuration refers to.

    Attributes:
        mount: Path of the repository, as the server sees it.
        operator_library: Operator library for ONNX Runtime, relative to it; empty where none is needed.
        plugin_loaders: What ONNX Runtime's TensorRT provider opens, relative to it; one for each major version of
            TensorRT that the server may have.
    """

    mount: PurePosixPath
    operator_library: str = ""
    plugin_loaders: tuple[str, ...] = ()


def schema() -> Any:
    """The server's protobuf module.

    Raises:
        EnvironmentLacks: the package that carries it is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise EnvironmentLacks(
            "config.pbtxt is made with the server's own schema, which the package tritonclient carries; next step: pip "
            "install 'longspan[serving]'"
        ) from error
    return model_config_pb2


def model_config(
    model: ServedModel, manifest: Manifest, samples: Sequence[Sample], placement: Placement, queue_delay_us: int
) -> Any:
    """Make the configuration of a model.

    Args:
        model: What is served.
        manifest: Of the bundle.
        samples: Warm-up requests.
        placement: Where the server finds files.
        queue_delay_us: How long a request may wait for others to join its batch, in microseconds.

    Returns:
        A ``ModelConfig`` message.

    Raises:
        InvalidRequest: an input or output has a type that the server lacks.
        EnvironmentLacks: the server's schema is not here.
    """
    proto = schema()
    config = proto.ModelConfig(name=model.name, platform=model.platform, max_batch_size=model.max_batch)
    config.backend = {TENSORRT_PLATFORM: "tensorrt", ORT_PLATFORM: "onnxruntime"}[model.platform]
    for record in manifest.inputs:
        _tensor(proto, config.input.add(), record, model.max_batch > 0)
    for output in manifest.outputs:
        _tensor(proto, config.output.add(), output, model.max_batch > 0)
    config.version_policy.all.SetInParent()
    if model.max_batch > 1:
        config.dynamic_batching.preferred_batch_size.extend(_preferred(model, manifest))
        config.dynamic_batching.max_queue_delay_microseconds = queue_delay_us
    _instances(proto, config, model)
    if model.platform == ORT_PLATFORM:
        _onnxruntime(config, model.session, placement)
    else:
        _plans(config, model)
    for sample in samples:
        _warm_up(proto, config, sample, model.max_batch > 0)
    return config


def to_text(config: Any) -> str:
    """Content of ``config.pbtxt``, read back and compared before it is given out.

    Raises:
        ExportFailed: what was read back differs.
    """
    from google.protobuf import text_format

    text = text_format.MessageToString(config, as_utf8=True)
    again = parse(text)
    if again != config:
        raise ExportFailed(f"{CONFIG_FILE} of {config.name} changes when it is read back; this is a bug in longspan")
    return f"# Written by longspan package. README.md beside the repository says how it is served.\n{text}"


def parse(text: str) -> Any:
    """Read ``config.pbtxt`` with the server's schema.

    Raises:
        ExportFailed: it does not fit the schema.
        EnvironmentLacks: the schema is not here.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, schema().ModelConfig())
    except text_format.ParseError as error:
        raise ExportFailed(f"{CONFIG_FILE} does not fit the server's schema: {error}") from error


def _tensor(proto: Any, tensor: Any, record: InputRecord | OutputRecord, batched: bool) -> None:
    """Name, type and shape; the batch, which the server adds itself, is not among the dimensions."""
    tensor.name = record.name
    tensor.data_type = _type(proto, record)
    dims = [size if isinstance(size, int) else -1 for size in record.shape[batched:]]
    if dims:
        tensor.dims.extend(dims)
        return
    if not batched:
        raise InvalidRequest(
            f"{record.name} is a scalar, which the server takes in batches only; next step: give the model a dimension"
        )
    # One number a row: the server wants a dimension, the model has none.
    tensor.dims.append(1)
    tensor.reshape.SetInParent()


def _type(proto: Any, record: InputRecord | OutputRecord) -> Any:
    if record.dtype not in TYPES:
        raise InvalidRequest(f"{record.name} is of type {record.dtype}; the server takes {', '.join(TYPES)}")
    return proto.DataType.Value(TYPES[record.dtype])


def _preferred(model: ServedModel, manifest: Manifest) -> list[int]:
    """Batches that kernels were chosen for. The server's documentation advises against naming any others."""
    first = manifest.inputs[0].name
    sizes = {profile.inputs[first].opt[0] for engine in model.engines for profile in engine.manifest.profiles}
    return sorted(size for size in sizes if 1 < size <= model.max_batch)


def _instances(proto: Any, config: Any, model: ServedModel) -> None:
    kinds = proto.ModelInstanceGroup
    group = config.instance_group.add(count=1)
    on_cpu = model.platform == ORT_PLATFORM and model.session.providers[0].name == CPU_PROVIDER
    group.kind = kinds.KIND_CPU if on_cpu else kinds.KIND_GPU
    if model.platform == TENSORRT_PLATFORM:
        # Without a list the backend uses the first profile alone.
        count = len(model.engines[0].manifest.profiles)
        group.profile.extend(str(number) for number in range(count) if count > 1)


def _plans(config: Any, model: ServedModel) -> None:
    for file in (file for version in model.versions for file in version.files if file.compute_capability):
        digits = file.compute_capability.removeprefix("sm")
        config.cc_model_filenames[f"{digits[:-1]}.{digits[-1]}"] = file.name


def _onnxruntime(config: Any, plan: SessionPlan, placement: Placement) -> None:
    """What the session's record says, as far as the server lets a model say it.

    The server's default for the graph is all optimisations, in sequence, which is what the record has.
    """
    parameters = {
        "enable_mem_arena": str(int(plan.enable_cpu_mem_arena)),
        "enable_mem_pattern": str(int(plan.enable_mem_pattern)),
    }
    if _INITIALIZERS in plan.config_entries:
        parameters[_INITIALIZERS] = plan.config_entries[_INITIALIZERS]
    accelerators = config.optimization.execution_accelerators
    for provider in plan.providers:
        # The server gives each instance the device of its own.
        options = {name: value for name, value in provider.options.items() if name != "device_id"}
        if provider.name == TENSORRT_PROVIDER:
            cache = str(placement.mount / CACHE_FOLDER)
            options |= dict.fromkeys(provider.paths, cache)
            if plan.tensorrt_plugins:
                loaders = (str(placement.mount / name) for name in placement.plugin_loaders)
                options["trt_extra_plugin_lib_paths"] = ";".join(loaders)
            accelerators.gpu_execution_accelerator.add(name="tensorrt", parameters=options)
        elif provider.name == CUDA_PROVIDER:
            parameters |= {name: numbers[options.pop(name)] for name, numbers in _NUMBERED.items() if name in options}
            accelerators.gpu_execution_accelerator.add(name="cuda", parameters=options)
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    if placement.operator_library:
        config.model_operations.op_library_filename.append(str(placement.mount / placement.operator_library))


def _warm_up(proto: Any, config: Any, sample: Sample, batched: bool) -> None:
    warm_up = config.model_warmup.add(name=sample.name, batch_size=sample.batch, count=1)
    for name, value in sample.inputs.items():
        entry = warm_up.inputs[name]
        entry.data_type = proto.DataType.Value(TYPES[str(value.dtype)])
        entry.dims.extend(value.shape[batched:])
        entry.input_data_file = sample.file(name)
