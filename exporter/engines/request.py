"""What is asked of a build, refused before anything is done where the target cannot give it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InvalidRequest

TENSORRT, TENSORRT_RTX, ORT = "tensorrt", "tensorrt-rtx", "ort"
TARGETS = (TENSORRT, TENSORRT_RTX, ORT)

DTYPES = ("fp32", "fp16", "bf16")

PLUGIN_V3, PLUGIN_AOT, NO_PLUGIN = "v3", "aot", "none"
PLUGIN_APIS = (PLUGIN_V3, PLUGIN_AOT, NO_PLUGIN)
"""How TensorRT gets the sites' kernels: the C++ library, a Python plugin whose kernel goes into the engine, not at all
(the function bodies are built)."""

HARDWARE_COMPATIBILITY = ("none", "ampere-plus", "same-compute-capability")

PROVIDERS = ("cpu", "cuda", "tensorrt")
"""Execution providers of ONNX Runtime that an `ORT` build can be for."""

POOLS = ("workspace", "tactic-shared-memory", "tactic-dram")
"""Memory pools of a GPU. TensorRT's others are for deep learning accelerators, which no target here builds for."""

_LARGEST_POOL = 1 << 48
"""Bytes; TensorRT takes no number of more than 64 bits."""

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Attributes:
        target: One of `TARGETS`.
        dtype: One of `DTYPES`: what matrix products and attention compute in; None keeps the model's type.
        min_shapes: Polygraphy's syntax; see `profiles.profiles_of`.
        opt_shapes: The same.
        max_shapes: The same.
        graph_only: Write the graph that TensorRT would get, not the engine; needs neither TensorRT nor a GPU.
        name: Of the engine's folder; empty for one made of target, architecture and type.
        compute_capabilities: ``"sm89"``, …: what to build for. TensorRT builds for the GPU that is there and takes from
            this list for which others kernels go into the engine.
        plugin_api: One of `PLUGIN_APIS`; None for the target's own.
        plugin_library: The plugin library to use instead of Longspan's own for TensorRT's major version.
        require_kernel: Whether to refuse the build where a site has no kernel, instead of building its function body.
        timing_cache: File that keeps what kernels were timed; read where it exists, written after the build.
        hardware_compatibility: One of `HARDWARE_COMPATIBILITY`.
        version_compatible: Whether later versions of TensorRT can load the engine.
        weight_streaming: Whether weights may stay in host memory.
        strip: Whether weights are left out of the engine, to be refitted.
        refit: Whether weights can be replaced later.
        pool_limits: Bytes by name of the memory pool, of `POOLS`.
        optimization_level: 0 (fast build) to 5 (fast engine); None for the builder's default.
        provider: One of `PROVIDERS`, for `ORT`.
    """

    target: str
    dtype: str | None = None
    min_shapes: tuple[str, ...] = ()
    opt_shapes: tuple[str, ...] = ()
    max_shapes: tuple[str, ...] = ()
    graph_only: bool = False
    name: str = ""
    compute_capabilities: tuple[str, ...] = ()
    plugin_api: str | None = None
    plugin_library: Path | None = None
    require_kernel: bool = False
    timing_cache: Path | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    strip: bool = False
    refit: bool = False
    pool_limits: Mapping[str, int] = field(default_factory=dict)
    optimization_level: int | None = None
    provider: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what the target cannot give.

        Raises:
            InvalidRequest: a value is none of those allowed, has no meaning for the target, or contradicts another.
        """
        for option, value, allowed in (
            ("--target", self.target, TARGETS),
            ("--dtype", self.dtype, (None, *DTYPES)),
            ("--plugin-api", self.plugin_api, (None, *PLUGIN_APIS)),
            ("--hardware-compatibility-level", self.hardware_compatibility, HARDWARE_COMPATIBILITY),
            ("--provider", self.provider, PROVIDERS),
        ):
            if value not in allowed:
                raise InvalidRequest(f"{option} {value}: allowed: {', '.join(word for word in allowed if word)}")
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise InvalidRequest(
                f"--name {self.name}: allowed: up to 100 letters, digits, dots, dashes and underscores, the first of "
                "them a letter or a digit"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InvalidRequest(f"--optimization-level {self.optimization_level}: allowed: 0 to 5")
        self._refuse_other_targets_options()
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"sm\d{2,3}", capability):
                raise InvalidRequest(f"--compute-capability {capability}: must be like sm89")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise InvalidRequest(f"--compute-capability {','.join(self.compute_capabilities)}: names one of them twice")
        if self.target == TENSORRT_RTX and len(self.compute_capabilities) > 1 and (self.strip or self.refit):
            raise InvalidRequest(
                "--refit, --strip: TensorRT-RTX refits engines of one compute capability only; next step: build one "
                "engine for each"
            )
        if self.require_kernel and self.plugin_api == NO_PLUGIN:
            raise InvalidRequest("--require-kernel: --plugin-api none builds function bodies; leave one out")
        if self.plugin_library is not None and self.plugin_api not in (None, PLUGIN_V3):
            raise InvalidRequest(f"--plugin-library: --plugin-api {self.plugin_api} uses no library; leave one out")

    def _refuse_other_targets_options(self) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        defaults["pool_limits"] = {}
        for name, (option, targets) in _OPTIONS.items():
            if getattr(self, name) != defaults[name] and self.target not in targets:
                raise InvalidRequest(
                    f"{option} has no meaning for --target {self.target}; it is for {' and '.join(targets)}"
                )
        if (
            self.target == ORT
            and self.provider != "tensorrt"
            and (self.min_shapes or self.opt_shapes or self.max_shapes)
        ):
            raise InvalidRequest(
                f"--min-shapes, --opt-shapes, --max-shapes have no meaning for --provider {self.provider}, which takes "
                "any shape; they are for --provider tensorrt"
            )
        if self.target == ORT and self.plugin_api is not None:
            if self.provider != "tensorrt":
                raise InvalidRequest(
                    f"--plugin-api has no meaning for --provider {self.provider}; it is for --provider tensorrt"
                )
            if self.plugin_api == PLUGIN_AOT:
                raise InvalidRequest(
                    "--plugin-api aot: ONNX Runtime finds plugins in libraries only; allowed with --target ort: v3"
                )


_TENSORRTS = (TENSORRT, TENSORRT_RTX)
_OPTIONS = {
    "graph_only": ("--graph-only", _TENSORRTS),
    "compute_capabilities": ("--compute-capability", _TENSORRTS),
    "plugin_api": ("--plugin-api", (TENSORRT, ORT)),
    "plugin_library": ("--plugin-library", (TENSORRT,)),
    "require_kernel": ("--require-kernel", (TENSORRT,)),
    "timing_cache": ("--timing-cache", (TENSORRT,)),
    "hardware_compatibility": ("--hardware-compatibility-level", (TENSORRT,)),
    "version_compatible": ("--version-compatible", (TENSORRT,)),
    "weight_streaming": ("--weight-streaming", _TENSORRTS),
    "strip": ("--strip", _TENSORRTS),
    "refit": ("--refit", _TENSORRTS),
    "pool_limits": ("--pool-limit", _TENSORRTS),
    "optimization_level": ("--optimization-level", _TENSORRTS),
    "provider": ("--provider", (ORT,)),
}
"""Options that are not for every target: how the command line calls each, and whose it is."""


def pool_limits_of(texts: tuple[str, ...]) -> dict[str, int]:
    """Bytes by memory pool, from texts like ``workspace:1G``.

    Raises:
        InvalidRequest: a text is not of that form, or names an unknown pool, one that was named before, or a size that
            no pool has.
    """
    limits = {}
    for text in texts:
        name, _, size = text.partition(":")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGB]?)", size.upper())
        if match is None:
            raise InvalidRequest(
                f"--pool-limit {text}: must be POOL:SIZE, the size in bytes or followed by K, M or G, e.g. workspace:1G"
            )
        if name not in POOLS:
            raise InvalidRequest(f"--pool-limit {text}: allowed pools: {', '.join(POOLS)}")
        if name in limits:
            raise InvalidRequest(f"--pool-limit {text}: {name} has a limit already; leave one out")
        # As a float: too many digits make infinity, which no integer is.
        bytes_ = float(match[1]) * _UNITS[match[2]]
        if not 1 <= bytes_ <= _LARGEST_POOL:
            raise InvalidRequest(f"--pool-limit {text}: allowed: 1 byte to {_LARGEST_POOL >> 30}G")
        limits[name] = int(bytes_)
    return limits
