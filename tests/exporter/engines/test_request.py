"""What a build may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from longspan.exporter.engines.request import BuildRequest, pool_limits_of
from longspan.exporter.errors import InvalidRequest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tflite"}, "--target tflite: allowed: tensorrt, tensorrt-rtx, ort"),
        ({"target": "ort", "dtype": "int8"}, "--dtype int8: allowed: fp32, fp16, bf16"),
        ({"target": "ort", "name": "../up"}, "--name ../up"),
        ({"target": "ort", "strip": True}, "--strip has no meaning for --target ort"),
        ({"target": "ort", "max_shapes": ("ids:[1,8]",)}, "--max-shapes have no meaning for --provider cpu"),
        ({"target": "tensorrt-rtx", "plugin_api": "v3"}, "--plugin-api has no meaning for --target tensorrt-rtx"),
        ({"target": "tensorrt-rtx", "version_compatible": True}, "it is for tensorrt$"),
        ({"target": "tensorrt-rtx", "provider": "cuda"}, "--provider has no meaning"),
        ({"target": "tensorrt-rtx", "compute_capabilities": ("ada",)}, "--compute-capability ada: must be like sm89"),
        ({"target": "tensorrt-rtx", "compute_capabilities": ("sm80", "sm89"), "refit": True}, "one compute capability"),
        ({"target": "tensorrt", "optimization_level": 6}, "--optimization-level 6: allowed: 0 to 5"),
        ({"target": "tensorrt", "plugin_api": "aot", "plugin_library": Path("x.so")}, "uses no library"),
        ({"target": "tensorrt", "plugin_api": "none", "require_kernel": True}, "--plugin-api none builds function"),
        ({"target": "tensorrt", "hardware_compatibility": "volta"}, "--hardware-compatibility-level volta"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        BuildRequest(**options)


def test_every_option_of_a_target_is_taken() -> None:
    BuildRequest("tensorrt", "fp16", ("i:[1]",), version_compatible=True, refit=True, pool_limits={"workspace": 1})
    BuildRequest("tensorrt-rtx", "bf16", compute_capabilities=("sm75", "sm121"), weight_streaming=True)
    BuildRequest("ort", provider="tensorrt", max_shapes=("i:[1]",))


def test_pool_limits() -> None:
    assert pool_limits_of(("workspace:1.5G", "tactic-dram:64m", "tactic-shared-memory:7")) == {
        "workspace": 3 << 29,
        "tactic-dram": 64 << 20,
        "tactic-shared-memory": 7,
    }
    wrong = (
        "workspace",
        "workspace:lots",
        "workspace:1T",
        "workspace:-1",
        "attic:1G",
        "dla-local-dram:1G",
        "workspace:0",
    )
    for text in (*wrong, "workspace:0.5", f"workspace:{'9' * 20}G", f"workspace:{'9' * 400}"):
        with pytest.raises(InvalidRequest, match=f"--pool-limit {text}"):
            pool_limits_of((text,))
    with pytest.raises(InvalidRequest, match="workspace has a limit already"):
        pool_limits_of(("workspace:1G", "workspace:2G"))


def test_a_device_is_named_once() -> None:
    with pytest.raises(InvalidRequest, match="--compute-capability sm89,sm89: names one of them twice"):
        BuildRequest("tensorrt-rtx", compute_capabilities=("sm89", "sm89"))
