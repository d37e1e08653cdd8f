"""The C++ launcher of kernel packs on a stub of the CUDA driver, built for tests, and packs that the stub takes."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from longspan.plugins.gpu import pack_build
from longspan.plugins.gpu.compilation import CompiledKernel
from longspan.plugins.gpu.cubin import Resources
from longspan.plugins.gpu.pack import Pack
from longspan.plugins.gpu.pack_build import Target
from longspan.plugins.gpu.variants import KernelVariant, Recipe

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "stub"
SIZES = {"i32": 4, "fp32": 4, "i64": 8}


def build(target: str) -> Path:
    """Build one target of `plugins/CMakeLists.txt` with its tests; skips the test where there is no compiler.

    Returns:
        The folder that it is in.
    """
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    tools = Path(sys.executable).parent
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:  # several test processes may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            tools / "cmake", "-G", "Ninja", "-S", ROOT / "plugins", "-B", BUILD, "-DCMAKE_BUILD_TYPE=Debug",
            f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}", "-DLONGSPAN_TESTS=ON",
            "-DLONGSPAN_LIBRARY=OFF", "-DLONGSPAN_STUB_LIBRARY=ON",
        ]  # fmt: skip
        for command in (configure, [tools / "cmake", "--build", BUILD, "--target", target]):
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


def stub_pack(recipes: Sequence[tuple[Recipe, Target]]) -> Pack:
    """A pack of real recipes whose code is text for the stub: the kernels' names and the sizes of their parameters."""
    kernels = {variant.name: _compiled(variant) for recipe, _ in recipes for variant in recipe.variants}
    with mock.patch.object(pack_build, "resources", lambda cubin, entry: Resources(64, 0)):
        return pack_build.build_pack(recipes, kernels, "stub")


def _compiled(variant: KernelVariant) -> CompiledKernel:
    sizes = [*(SIZES.get(parameter.type, 8) for parameter in variant.parameters), 8, 8]
    entry = entry_of(variant)
    text = f"stub {entry} {' '.join(map(str, sizes))}\n"
    return CompiledKernel(variant, entry, b"\x7fELF" + text.encode(), text, variant.num_warps * 32, 4096)


def entry_of(variant: KernelVariant) -> str:
    """Symbol of a kernel in a pack of `stub_pack`."""
    return f"f_{variant.name.rpartition('_')[2]}"
