"""What is compared: the model in torch, three ways, and the bundle in ONNX Runtime, two ways, as Polygraphy runners."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from ...plugins import LibraryMissing, ort_library_path
from ...plugins.definition import DOMAIN
from ..bundle import Bundle
from ..devices import CPU, PROVIDERS, exact_providers, kernels_missing, verify_session
from ..errors import EnvironmentLacks, ExportFailed
from ..manifest import Manifest
from ..runtime_names import expansions
from ..sites.record import AttentionSite
from .inputs import Feed, numpy_type

if TYPE_CHECKING:
    import torch

    from ..pipeline import Prepared

KERNEL = "kernel"
FUNCTION_BODY = "function body"


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """Runs a torch model on numpy inputs and names its outputs as the bundle does."""

    def __init__(
        self,
        name: str,
        model: Callable[..., Any],
        manifest: Manifest,
        dtype: torch.dtype,
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Make a runner.

        Args:
            name: What reports call it.
            model: Called with one tensor per input, by name.
            manifest: Says what inputs and outputs there are.
            dtype: What floating-point inputs are cast to.
            around: Makes the context in which the model is called, e.g. a family's interception.
        """
        super().__init__(name=name)
        self._model, self._manifest, self._dtype, self._around = model, manifest, dtype, around

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The bundle's inputs."""
        return input_metadata(self._manifest)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, Any]:
        """Outputs by name, as numpy arrays; bfloat16 ones as float32, which holds them exactly."""
        import torch
        from torch.utils import _pytree

        inputs = {name: torch.from_numpy(value) for name, value in feed_dict.items()}
        inputs = {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        start = time.perf_counter()
        with torch.no_grad(), self._around():
            result = self._model(**inputs)
        self.inference_time = time.perf_counter() - start
        tensors = [value for value in _pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
        names = [record.name for record in self._manifest.outputs]
        if len(tensors) != len(names):
            raise ExportFailed(
                f"the model returns {len(tensors)} tensors, the bundle has {len(names)} outputs ({', '.join(names)}); "
                "next step: export again"
            )
        if self._dtype == torch.float64:
            rounded = [name for name, t in zip(names, tensors, strict=True) if t.is_floating_point() and t.itemsize < 8]
            if rounded:
                raise ExportFailed(f"output {rounded[0]} left float64, so the model cannot serve as its own oracle")
        tensors = [value.float() if value.dtype == torch.bfloat16 else value for value in tensors]
        return OrderedDict(zip(names, (value.numpy() for value in tensors), strict=True))


def input_metadata(manifest: Manifest) -> TensorMetadata:
    """A bundle's inputs for Polygraphy, with None for the dimensions that vary."""
    metadata = TensorMetadata()
    for record in manifest.inputs:
        shape = tuple(size if isinstance(size, int) else None for size in record.shape)
        metadata.add(record.name, dtype=numpy_type(record.dtype), shape=shape)
    return metadata


@dataclass(frozen=True)
class TorchRunners:
    """The model in torch.

    Attributes:
        oracle: Intercepted, in float64.
        own: Intercepted, in the model's own type, or in the one that an engine computes in.
        unconverted: Intercepted, in the model's own type, where `own` is not; None where it is.
        original: As it was before its attention was intercepted, in float64; None where the model calls longspan
            operators itself, so that there is nothing else to compare with.
        width: Channels of the widest layer.
    """

    oracle: TorchRunner
    own: TorchRunner
    original: TorchRunner | None
    width: int
    unconverted: TorchRunner | None = None


def torch_runners(prepared: Prepared, manifest: Manifest, computed_in: str = "") -> TorchRunners:
    """Make the runners of a model; its float64 copy is made once and shared.

    Args:
        prepared: The model.
        manifest: The bundle's.
        computed_in: numpy's name of the type that an engine computes in; empty for the model's own.
    """
    import torch

    from .oracle import float64_arithmetic, float64_copy, typed_copy

    model: Any = prepared.source.model
    family, conversion = prepared.family, manifest.conversion
    if not isinstance(model, torch.nn.Module):
        program = model
        model = _callable_program(program)
    parameters = [value for value in [*model.parameters(), *model.buffers()] if value.is_floating_point()]
    dtype = parameters[0].dtype if parameters else torch.float32
    double = float64_copy(model)
    own, given = model, dtype
    if computed_in and getattr(torch, computed_in) != dtype:
        dtype = getattr(torch, computed_in)
        own = typed_copy(model, dtype)

    def intercepted(target: Any) -> contextlib.AbstractContextManager[None]:
        return family.intercept(target, conversion) if family is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def pattern64() -> Any:
        with intercepted(double), float64_arithmetic():
            yield

    @contextlib.contextmanager
    def original64() -> Any:
        with family.original(double) if family is not None else contextlib.nullcontext(), float64_arithmetic():
            yield

    return TorchRunners(
        oracle=TorchRunner("torch pattern float64", double, manifest, torch.float64, pattern64),
        own=TorchRunner("torch pattern", own, manifest, dtype, lambda: intercepted(own)),
        original=TorchRunner("torch original float64", double, manifest, torch.float64, original64)
        if family is not None
        else None,
        # An embedding has more rows than channels; its rows are not summed.
        width=max(
            (min(value.shape[0], value[0].numel()) for value in parameters if value.dim() > 1 and value.numel()),
            default=1,
        ),
        unconverted=None
        if own is model
        else TorchRunner("torch pattern unconverted", model, manifest, given, lambda: intercepted(model)),
    )


def _callable_program(program: torch.export.ExportedProgram) -> torch.nn.Module:
    """A module that takes the inputs of an exported program by name, wherever the program takes them."""
    import torch

    assert program.example_inputs is not None
    positional = [str(name) for name in program.graph_signature.user_inputs][: len(program.example_inputs[0])]

    class ByName(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Guards would refuse the float64 inputs of the oracle.
            self.program = program.module(check_guards=False)

        def forward(self, **inputs: torch.Tensor) -> Any:
            return self.program(*(inputs.pop(name) for name in positional), **inputs)

    return ByName()


@dataclass(frozen=True)
class RuntimePath:
    """One way through a runtime, and what was seen to run there.

    Attributes:
        name: `KERNEL` or `FUNCTION_BODY`: what was meant to run; or what reports call an engine.
        runner: Runs the bundle; None where the path cannot run.
        reason: Why it cannot.
        sites: What ran at each site: `KERNEL`, `FUNCTION_BODY` or an engine's native layer, by node name.
        provider: Execution provider of the sites' nodes, or the GPU that an engine runs on.
        library: Operator library that its session registers; None for none.
        device: Where it computes.
        runtime: Name and version.
        dtype: numpy's name of the type that an engine computes in; empty for the bundle's own.
        notes: What a reader should know.
    """

    name: str
    runner: BaseRunner | None
    reason: str
    sites: dict[str, str]
    provider: str = ""
    library: str | None = None
    device: str = CPU
    runtime: str = ""
    dtype: str = ""
    notes: tuple[str, ...] = ()


def runtime_paths(bundle: Bundle, probe: Feed, device: str = CPU) -> tuple[RuntimePath, RuntimePath]:
    """Open both paths and see in a profile of one run of `probe` what runs at each site.

    Args:
        bundle: What to open.
        probe: Inputs of the run.
        device: Where to compute; it must be here.

    Raises:
        EnvironmentLacks: ONNX Runtime is not installed.
        ExportFailed: ONNX Runtime cannot load or run the model.
    """
    try:
        library = ort_library_path()
    except LibraryMissing as error:
        kernel = RuntimePath(KERNEL, None, str(error), {}, runtime=runtime_version())
    else:
        missing = kernels_missing(device, bundle.manifest)
        absent = RuntimePath(KERNEL, None, missing, {}, runtime=runtime_version())
        kernel = absent if missing else _open(KERNEL, bundle, library, probe, device)
    return kernel, _open(FUNCTION_BODY, bundle, None, probe, device)


def _open(name: str, bundle: Bundle, library: str | None, probe: Feed, device: str) -> RuntimePath:
    with tempfile.TemporaryDirectory() as folder:
        try:
            session = open_session(str(bundle.model_path), library, device=device, profile=Path(folder) / "profile")
            session.run(None, probe)
        except EnvironmentLacks:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise ExportFailed(f"{bundle.model_path}: ONNX Runtime cannot run it by {name}: {error}") from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    sites, provider = what_ran(events, bundle.manifest.sites)
    provider = provider or PROVIDERS[device][0]
    return RuntimePath(name, OnnxrtRunner(session, name=name), "", sites, provider, library, device, runtime_version())


def runtime_version() -> str:
    """ONNX Runtime, with its version."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def open_session(
    model: str | bytes,
    library: str | None,
    *,
    device: str = CPU,
    profile: Path | None = None,
    weights: Path | None = None,
) -> Any:
    """Open a session for checking.

    Args:
        model: An ONNX file, or its content.
        library: Operator library to register; None for none.
        device: Where to compute.
        profile: Prefix of the file to profile to; None for no profile.
        weights: Where weights beside the model are, when it is given as content.

    Raises:
        EnvironmentLacks: ONNX Runtime is not installed, or cannot start the device's provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacks(
            "checking runs the bundle in ONNX Runtime, which is not installed; next step: pip install 'longspan[cpu]'"
        ) from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # the arena keeps the memory of the longest case for all others
    # Threads that spin between runs would take the cores from torch, which runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=exact_providers(device))
    verify_session(session, PROVIDERS[device])
    return session


def what_ran(events: Sequence[dict[str, Any]], sites: Sequence[AttentionSite]) -> tuple[dict[str, str], str]:
    """What ran at each site, and on which provider the kernels did, from the node events of a profile.

    A kernel's event bears the operator's and the node's name. ONNX Runtime expands a node without a kernel into the
    nodes of its function, whose names tell one expansion from another, though not which site it stands for: as many
    must have run as there are sites without a kernel.

    Raises:
        ExportFailed: the profile shows neither at a site.
    """
    nodes = [event for event in events if event.get("cat") == "Node"]
    kernels = {
        event["name"].removesuffix("_kernel_time"): event["args"].get("provider", "")
        for event in nodes
        if event["args"].get("op_name") in {site.operator for site in sites}
    }
    ran = {site.node: KERNEL if site.node in kernels else FUNCTION_BODY for site in sites}
    for operator in {site.operator for site in sites}:
        others = [site.node for site in sites if site.operator == operator and ran[site.node] != KERNEL]
        bodies = expansions((event["name"] for event in nodes), operator)
        if bodies < len(others):
            raise ExportFailed(
                f"{', '.join(others)}: ONNX Runtime's profile shows neither a kernel nor a function body of "
                f"{DOMAIN}::{operator} at {len(others) - bodies} of these sites; the manifest does not fit the model: "
                "export again"
            )
    return ran, ", ".join(sorted(set(kernels.values())))
