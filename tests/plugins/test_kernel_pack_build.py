"""From recipes to packs: what is packed launches what the recipe does, and serves exactly the nodes it may."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.plugins.gpu.compilation import CompiledKernel
from longspan.plugins.gpu.cubin import InvalidCubin, Resources, resources
from longspan.plugins.gpu.expressions import evaluate
from longspan.plugins.gpu.pack import Pack, PackedPath
from longspan.plugins.gpu.pack_build import PTX, Target, build_pack, match_of, recipe_for
from longspan.plugins.gpu.postfix import evaluate_postfix
from longspan.plugins.gpu.variants import ELEMENT_SIZES, KernelSite, KernelVariant, NoKernel, Path

WINDOW = KernelSite(
    "SlidingWindowAttention", "float16", 64, 64, 8, 2, ("Q", "K", "V", "attn_mask", "global_mask", "nonpad_kv_seqlen"),
    {"left_window_size": 128, "right_window_size": 128},
)  # fmt: skip
LISTS = KernelSite(
    "BlockSparseAttention", "bfloat16", 128, 64, 4, 4,
    ("Q", "K", "V", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "distance_bias"),
    {"is_causal": 1}, lse=True,
)  # fmt: skip


def cubin(entry: str = "kernel", registers: int = 96, stack: int = 8) -> bytes:
    """The least that `resources` reads: two symbols, and attributes of both."""
    names = b"\0.symtab\0.strtab\0.nv.info\0"
    strings = b"\0other\0" + entry.encode() + b"\0"
    symbols = b"".join(struct.pack("<I20x", at) for at in (0, 1, 7))
    facts = [(0x2F, 1, 17), (0x2F, 2, registers), (0x11, 2, stack), (0x12, 2, stack), (0x12, 1, 4000)]
    info = struct.pack("<BBH", 3, 0x55, 0)  # one without a payload
    info += b"".join(struct.pack("<BBHII", 4, *(fact, 8), symbol, value) for fact, symbol, value in facts)
    parts = (b"", names, symbols, strings, info)
    offsets = [64 + sum(map(len, parts[:number])) for number in range(len(parts))]
    titles = (0, 0, names.index(b".symtab"), names.index(b".strtab"), names.index(b".nv.info"))
    table = b"".join(
        struct.pack("<IIQQQQ24x", title, 1, 0, 0, offset, len(part))
        for title, offset, part in zip(titles, offsets, parts, strict=True)
    )
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q10xHHH", 64 + sum(map(len, parts)), 64, 5, 1)
    return header.ljust(64, b"\0") + b"".join(parts) + table


def made_up(variant: KernelVariant, shared: int = 2048) -> CompiledKernel:
    """A variant as if it had been compiled."""
    return CompiledKernel(variant, "kernel", cubin(), "// made up\n", variant.num_warps * 32, shared)


def packed(*wanted: tuple[KernelSite, Target]) -> Pack:
    recipes = [(recipe_for(site, target), target) for site, target in wanted]
    return build_pack(recipes, {v.name: made_up(v) for recipe, _ in recipes for v in recipe.variants}, "none")


@pytest.mark.parametrize("site", [WINDOW, LISTS], ids=lambda site: site.operator)
@pytest.mark.parametrize("target", [Target(80), Target(90), PTX], ids=str)
def test_a_pack_launches_what_the_recipe_does(site: KernelSite, target: Target) -> None:
    recipe, pack = recipe_for(site, target), packed((site, target))
    assert Pack.from_bytes(pack.to_bytes()) == pack
    (found,) = pack.recipes
    assert (found.architecture, found.form) == (target.architecture, target.form)
    assert len(found.paths) == len(recipe.paths) == 2
    for s_q, s_k in ((1, 1), (1, 700), (5, 5), (300, 300), (4096, 5000)):
        sizes = {
            "B": 3, "H_q": site.heads, "H_kv": site.kv_heads, "S_q": s_q, "S_k": s_k, "D": site.head_size,
            "D_v": site.v_head_size, "SMS": 108, "LEFT": 128, "RIGHT": 128, "W": 7, "W_full": 0, "M": 2, "B_lists": 1,
            "H_lists": 4,
        }  # fmt: skip
        for original, path in zip(recipe.paths, found.paths, strict=True):
            assert_same_launches(original, path, pack, sizes)


def assert_same_launches(original: Path, path: PackedPath, pack: Pack, sizes: dict[str, int]) -> None:
    sizes = dict(sizes)
    assert evaluate_postfix(path.condition, sizes) == evaluate(original.condition, sizes)
    for (name, infix), (packed_name, postfix) in zip(original.sizes, path.sizes, strict=True):
        assert packed_name == name
        sizes[name] = evaluate(infix, sizes)
        assert evaluate_postfix(postfix, sizes) == sizes[name]
    for wanted, buffer in zip(original.buffers, path.buffers, strict=True):
        assert (buffer.name, buffer.type, buffer.zeroed) == (wanted.name, wanted.type, wanted.zeroed)
        assert evaluate_postfix(buffer.elements, sizes) == evaluate(wanted.elements, sizes)
    for variant, number in zip(original.kernels, path.launches, strict=True):
        kernel = pack.kernels[number]
        assert kernel.name == variant.name and kernel.threads == 32 * variant.num_warps
        assert (kernel.registers, kernel.stack) == (96, 8)
        assert [evaluate_postfix(g, sizes) for g in kernel.grid] == [evaluate(g, sizes) for g in variant.grid]
        for wanted_parameter, parameter in zip(variant.parameters, kernel.parameters, strict=True):
            kind, _, what = parameter.meaning.partition(":")
            if kind == "size":
                text = wanted_parameter.meaning.partition(":")[2]
                assert evaluate_postfix(what, sizes) == evaluate(text, sizes)
                parameter = dataclasses.replace(parameter, meaning=wanted_parameter.meaning)
            assert parameter == wanted_parameter


def test_order_and_repetition_of_what_is_asked_for_do_not_matter() -> None:
    wanted = [(site, target) for site in (WINDOW, LISTS) for target in (Target(80), Target(90), PTX)]
    assert packed(*wanted).to_bytes() == packed(*reversed(wanted), *wanted).to_bytes()


def test_sites_that_differ_in_parameters_only_share_a_recipe() -> None:
    other = dataclasses.replace(WINDOW, attributes={"left_window_size": 5, "right_window_size": -1, "scale": 0.5})
    more_heads = dataclasses.replace(WINDOW, heads=16, kv_heads=4)
    assert packed((WINDOW, PTX), (other, PTX), (more_heads, PTX)) == packed((WINDOW, PTX))
    causal = dataclasses.replace(WINDOW, attributes={"is_causal": 1})
    assert len(packed((WINDOW, PTX), (causal, PTX)).recipes) == 2


WINDOW_ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "left_window_size": st.integers(-1, 600), "right_window_size": st.integers(-1, 600),
        "dilation": st.sampled_from(([1], [2], [1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 3, 3], [1, 2, 1, 2])),
        "is_causal": st.integers(0, 1), "scale": st.sampled_from((0.1, 1.0)),
        "softcap": st.sampled_from((0.0, 10.0, 30.0)), "span_ramp": st.sampled_from((8.0, 32.0)),
    },
)  # fmt: skip
LISTS_ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "q_block_size": st.sampled_from((16, 64, 128)), "kv_block_size": st.sampled_from((16, 100, 128)),
        "is_causal": st.integers(0, 1), "exclude_self": st.integers(0, 1), "scale": st.sampled_from((0.1, 1.0)),
        "softcap": st.sampled_from((0.0, 10.0, 30.0)),
    },
)  # fmt: skip


@pytest.mark.parametrize("site", [WINDOW, LISTS], ids=lambda site: site.operator)
def test_what_must_match_is_all_that_a_recipe_depends_on(site: KernelSite) -> None:
    """Two nodes that a launcher cannot tell apart get the same kernels; otherwise it would launch wrong ones."""
    seen: dict[Any, Any] = {}
    attributes = WINDOW_ATTRIBUTES if site is WINDOW else LISTS_ATTRIBUTES

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(attributes, st.sampled_from(((4, 4), (4, 2), (4, 1))), st.booleans())
    def compare(given_attributes: dict[str, Any], heads: tuple[int, int], per_head: bool) -> None:
        here = dataclasses.replace(
            site, attributes=given_attributes, heads=heads[0], kv_heads=heads[1], lists_per_head=per_head
        )
        paths = recipe_for(here, Target(90)).paths
        assert seen.setdefault(match_of(here), paths) == paths

    compare()
    assert len(seen) > 15


def test_ptx_fits_every_architecture() -> None:
    site = dataclasses.replace(LISTS, head_size=256, v_head_size=256)
    assert all(variant.architecture == 80 for variant in recipe_for(site, PTX).variants)
    recipe = recipe_for(site, PTX)
    compiled = {variant.name: made_up(variant, shared=100 * 1024) for variant in recipe.variants}
    with pytest.raises(NoKernel, match="PTX needs 102400 bytes of shared memory; allowed: 101376"):
        build_pack([(recipe, PTX)], compiled, "none")
    build_pack([(recipe, Target(80))], compiled, "none")


def test_resources_are_those_of_the_named_kernel() -> None:
    assert resources(cubin("kernel", 96, 8), "kernel") == Resources(96, 8)
    with pytest.raises(InvalidCubin, match="no_such"):
        resources(cubin(), "no_such")


def test_what_is_no_cubin_is_refused() -> None:
    good = cubin()
    for length in range(len(good) - 24):  # the end of the table's last line is not read
        with pytest.raises(InvalidCubin):
            resources(good[:length], "kernel")
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        try:
            resources(bytes(damaged), "kernel")
        except InvalidCubin:
            continue


def test_every_type_has_a_pack() -> None:
    for dtype in ELEMENT_SIZES:
        pack = packed((dataclasses.replace(WINDOW, dtype=dtype), Target(120)))
        assert {kernel.dtype for kernel in pack.kernels} == {dtype}
        Pack.from_bytes(pack.to_bytes())
