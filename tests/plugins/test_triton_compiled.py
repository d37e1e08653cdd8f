"""The Triton kernels compiled for every architecture, without a GPU, and what the result must look like."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from longspan.plugins.gpu.compilation import PTX_VERSION, CompiledKernel, compile_variant
from longspan.plugins.gpu.launch import load
from longspan.plugins.gpu.tuning import KINDS, SHARED_MEMORY, WIDTHS, choose, registers, shared_bytes, source, table
from longspan.plugins.gpu.variants import ARCHITECTURES, KernelSite, KernelVariant, NoKernel, variants_for

triton = pytest.importorskip("triton")

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
WINDOW = {"left_window_size": 256, "right_window_size": 256}
SITES = {
    "window": KernelSite("SlidingWindowAttention", "bfloat16", 64, 64, 12, 12, ("Q", "K", "V"), WINDOW),
    "odd sizes": KernelSite(
        "SlidingWindowAttention", "float16", 72, 40, 8, 2, ("Q", "K", "V", "sinks"),
        {"left_window_size": 4095, "right_window_size": 0, "is_causal": 1},
    ),
    "float32": KernelSite("SlidingWindowAttention", "float32", 64, 64, 4, 4, ("Q", "K", "V"), WINDOW),
    "blocks": KernelSite(
        "BlockSparseAttention", "bfloat16", 64, 64, 12, 12, ("Q", "K", "V", *LISTS, "block_mask_ids", "block_masks"),
        {"q_block_size": 64, "kv_block_size": 64}, lists_per_head=False,
    ),
    "everything": KernelSite(
        "SlidingWindowAttention", "bfloat16", 64, 64, 12, 12,
        ("Q", "K", "V", "attn_mask", "nonpad_kv_seqlen", "global_mask", "band_bias", "sinks", "spans"),
        {**WINDOW, "softcap": 30.0, "is_causal": 1}, lse=True,
    ),
    "global": KernelSite(
        "SlidingWindowAttention", "float16", 64, 64, 4, 4,
        ("Q", "K", "V", "attn_mask", "global_mask", "global_Q", "global_K", "global_V"), WINDOW,
    ),
}  # fmt: skip

# What the products and the loads of an architecture must be made of; a mistake here is silent and slow.
PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


def variant(site: str, architecture: int, function: str, path: str = "whole") -> KernelVariant:
    """The kernel of a site's path that runs `function`."""
    recipe = variants_for(SITES[site], architecture)
    kernels = next(each.kernels for each in recipe.paths if each.name == path)
    return next(kernel for kernel in kernels if kernel.function.endswith(f":{function}"))


@cache
def compiled(site: str, architecture: int, function: str, path: str = "whole") -> CompiledKernel:
    """The compiled kernel; each is made once."""
    return compile_variant(variant(site, architecture, function, path))


def stack_bytes(cubin: bytes, folder: Path) -> tuple[int, int]:
    """(stack, local memory) of a kernel in bytes, as the tool that comes with Triton reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(cubin)
    said = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(STACK|LOCAL):(\d+)", said.stdout + said.stderr))
    return int(usage["STACK"]), int(usage["LOCAL"])


def assert_sound(kernel: CompiledKernel, folder: Path, stack: int = 0) -> None:
    """Shared memory within the limit, at most `stack` bytes spilled, and a PTX version that pinned drivers read."""
    architecture = kernel.variant.architecture
    assert 0 < kernel.threads <= 1024
    assert kernel.shared <= SHARED_MEMORY[architecture][0] * 1024
    version = re.search(r"^\.version (\d+)\.(\d+)$", kernel.ptx, re.MULTILINE)
    assert version is not None
    assert 10 * int(version[1]) + int(version[2]) <= PTX_VERSION
    assert re.search(rf"^\.target sm_{architecture}a?$", kernel.ptx, re.MULTILINE)
    spilled, local = stack_bytes(kernel.cubin, folder)
    assert local == 0
    assert spilled <= stack
    declared = re.search(rf"\.entry {kernel.entry}\((.*?)\)", kernel.ptx, re.DOTALL)
    assert declared is not None
    assert declared[1].count(".param") == len(kernel.variant.parameters) + 2  # Triton's two scratch pointers


def assert_uses_the_machine(kernel: CompiledKernel) -> None:
    """Both products on the tensor cores, and keys and values loaded by cp.async, 16 bytes at a time."""
    product = PRODUCTS.get(kernel.variant.architecture, "mma.sync")
    assert kernel.ptx.count(product) >= 4  # two products in two loops
    assert "cp.async.cg.shared.global" in kernel.ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_window_kernel_on_every_architecture(architecture: int, tmp_path: Path) -> None:
    kernel = compiled("window", architecture, "window_forward")
    assert_sound(kernel, tmp_path)
    assert_uses_the_machine(kernel)
    # The arithmetic that tiles are chosen by is from above.
    assert kernel.shared <= shared_bytes(architecture, choose(architecture, "whole", 2, 64), 64, 2)


def test_every_input_at_once_spills_little(tmp_path: Path) -> None:
    kernel = compiled("everything", 90, "window_forward")
    assert_sound(kernel, tmp_path, stack=64)
    assert_uses_the_machine(kernel)


@pytest.mark.parametrize("architecture", [80, 90])
def test_block_lists_with_masks(architecture: int, tmp_path: Path) -> None:
    kernel = compiled("blocks", architecture, "block_sparse_forward")
    assert_sound(kernel, tmp_path, stack=16)  # none with Triton 3.9
    assert_uses_the_machine(kernel)


def test_few_rows_are_split_on_mma_tiles_of_16(tmp_path: Path) -> None:
    kernel = compiled("odd sizes", 90, "window_forward", "split")
    assert_sound(kernel, tmp_path)
    assert "mma.sync.aligned.m16n8k16" in kernel.ptx
    assert_sound(compiled("odd sizes", 90, "merge_parts", "split"), tmp_path)


def test_float32_is_not_rounded_to_tf32(tmp_path: Path) -> None:
    kernel = compiled("float32", 86, "window_forward")
    assert_sound(kernel, tmp_path)
    assert "tf32" not in kernel.ptx
    assert "fma.rn.f32" in kernel.ptx


@pytest.mark.parametrize(("site", "function"), [("global", "collect_global"), ("blocks", "prepare_lists")])
def test_kernels_that_prepare(site: str, function: str, tmp_path: Path) -> None:
    assert_sound(compiled(site, 89, function), tmp_path)


def test_machine_code_names_no_file_of_this_machine() -> None:
    kernel = compiled("window", 80, "window_forward")
    for path in (Path(__file__).parents[2], Path(triton.__file__).parent):
        assert str(path) not in kernel.ptx
        assert str(path).encode() not in kernel.cubin


def _combinations() -> list[KernelSite]:
    optional = ("attn_mask", "nonpad_kv_seqlen", "global_mask", "band_bias", "sinks", "spans")
    sites = []
    for count in (0, 1, len(optional)):
        for inputs in itertools.combinations(optional, count):
            for dilation in ([1], [1, 2, 1, 3]):
                attributes = {**WINDOW, "softcap": 3.0 * (count > 1), "dilation": dilation}
                sites.append(
                    KernelSite(
                        "SlidingWindowAttention",
                        "float16",
                        80,
                        48,
                        4,
                        2,
                        ("Q", "K", "V", *inputs),
                        attributes,
                        lse=count == 1,
                    )
                )
    optional = ("attn_mask", "nonpad_kv_seqlen", "sinks", "distance_bias")
    pairs = ("block_mask_ids", "block_masks"), ("q_positions", "k_positions")
    for count, more in itertools.product((0, 1, len(optional)), ((), *pairs, (*pairs[0], *pairs[1]))):
        for inputs in itertools.combinations(optional, count):
            attributes = {"q_block_size": 32, "kv_block_size": 48, "is_causal": 1}
            sites.append(
                KernelSite(
                    "BlockSparseAttention",
                    "float32",
                    64,
                    64,
                    4,
                    2,
                    ("Q", "K", "V", *LISTS, *inputs, *more),
                    attributes,
                    lse=count == 1,
                    lists_per_head=bool(more),
                )
            )
    return sites


def test_every_variant_has_the_parameters_of_its_function() -> None:
    """As compilation needs it, but for every combination of inputs and without compiling."""
    seen: dict[str, KernelVariant] = {}
    for site in _combinations():
        for kernel in variants_for(site, 90).variants:
            order = load(kernel).arg_names
            given = [parameter.name for parameter in kernel.parameters]
            assert Counter(order) == Counter([*given, *kernel.constexprs])
            assert [name for name in order if name in given] == given
            buffers = {p.meaning for p in kernel.parameters if p.meaning.startswith("buffer:")}
            paths = [path for path in variants_for(site, 90).paths if kernel in path.kernels]
            for path in paths:
                assert buffers <= {f"buffer:{buffer.name}" for buffer in path.buffers}
            assert seen.setdefault(kernel.name, kernel) == kernel


def test_sites_that_no_kernel_covers() -> None:
    with pytest.raises(NoKernel, match="sm_75"):
        variants_for(SITES["window"], 75)
    with pytest.raises(NoKernel, match="float64"):
        KernelSite("SlidingWindowAttention", "float64", 64, 64, 1, 1, ("Q", "K", "V"))
    with pytest.raises(NoKernel, match="512"):
        KernelSite("SlidingWindowAttention", "float16", 512, 64, 1, 1, ("Q", "K", "V"))
    with pytest.raises(NoKernel, match="5 query heads"):
        KernelSite("SlidingWindowAttention", "float16", 64, 64, 5, 2, ("Q", "K", "V"))
    with pytest.raises(NoKernel, match="no input bias"):
        KernelSite("SlidingWindowAttention", "float16", 64, 64, 4, 2, ("Q", "K", "V", "bias"))


def test_tuned_table_is_what_the_script_writes() -> None:
    from longspan.plugins.gpu import tuned

    assert Path(tuned.__file__).read_text(encoding="utf-8") == source()
    assert table() == tuned.TUNED


def test_tuned_tiles_fit_and_shrink_with_the_shared_memory() -> None:
    for (architecture, kind, element, width), tile in table().items():
        assert shared_bytes(architecture, tile, width, element) <= SHARED_MEMORY[architecture][0] * 1024
        assert tile.block_n <= 64 or kind.startswith("split")
    assert set(table()) == set(itertools.product(ARCHITECTURES, KINDS, (2, 4), WIDTHS))
    small, large = choose(86, "whole", 2, 256), choose(80, "whole", 2, 256)
    assert shared_bytes(86, small, 256, 2) < shared_bytes(80, large, 256, 2)
    assert registers(choose(90, "whole, edited scores", 2, 128), 128) < registers(choose(90, "whole", 2, 128), 128)


@pytest.mark.parametrize(
    ("site", "function", "path"),
    [
        ("window", "merge_parts", "split"),
        ("window", "window_forward", "whole"),
        ("blocks", "block_sparse_forward", "whole"),
        ("blocks", "prepare_lists", "whole"),
    ],
)
def test_sizes_of_one_may_be_constants(site: str, function: str, path: str) -> None:
    """Triton's own launcher specialises on every number that is 1, and a constant lacks a tensor's methods."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant(site, 80, function, path)
    loaded = load(kernel)
    ones = {parameter.name: 1 for parameter in kernel.parameters if parameter.type in ("i32", "i64")}
    constants = {**kernel.constexprs, **ones}
    signature = {name: "constexpr" if name in constants else kernel.signature[name] for name in loaded.arg_names}
    places = {(loaded.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        ASTSource(loaded, signature=signature, constexprs=places),
        target=GPUTarget("cuda", 80, 32),
        options={"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )
    assert ".entry" in made.asm["ptx"]
