"""Make a kernel pack of recipes and of their compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..registry import operator as definition_of
from .compilation import CompiledKernel
from .cubin import resources
from .pack import Pack, PackedKernel, PackedPath, PackedRecipe
from .pack_rules import MATCHES
from .postfix import to_postfix
from .tuning import SHARED_MEMORY
from .variants import Buffer, KernelSite, KernelVariant, NoKernel, Parameter, Recipe, variants_for

PTX_ARCHITECTURE = 80
"""Architecture that PTX is compiled for; drivers translate it for every newer one."""

_LEAST_SHARED = min(SHARED_MEMORY, key=lambda architecture: SHARED_MEMORY[architecture][0])


@dataclass(frozen=True)
class Target:
    """What a pack's code is for.

    Attributes:
        architecture: Compute capability.
        form: ``"cubin"`` or ``"ptx"``.
    """

    architecture: int
    form: str = "cubin"

    def __str__(self) -> str:
        return f"sm_{self.architecture}" if self.form == "cubin" else "ptx"


PTX = Target(PTX_ARCHITECTURE, "ptx")


def recipe_for(site: KernelSite, target: Target) -> Recipe:
    """The kernels of a site for a target.

    PTX runs on devices that nobody has chosen tiles for, so it takes those of the architecture with the least shared
    memory.

    Raises:
        NoKernel: the architecture or something about the site is not covered.
    """
    if target.form == "cubin":
        return variants_for(site, target.architecture)
    recipe = variants_for(site, _LEAST_SHARED)
    kernels = {k.name: replace(k, architecture=target.architecture) for k in recipe.variants}
    paths = tuple(replace(path, kernels=tuple(kernels[k.name] for k in path.kernels)) for path in recipe.paths)
    return Recipe(site, target.architecture, paths)


def build_pack(recipes: Iterable[tuple[Recipe, Target]], compiled: Mapping[str, CompiledKernel], compiler: str) -> Pack:
    """Put recipes and code together.

    Args:
        recipes: Each with the target that it is for; those that serve the same nodes become one.
        compiled: By name of the variant, every kernel of the recipes.
        compiler: What compiled them.

    Raises:
        NoKernel: PTX needs more shared memory than the smallest architecture has.
    """
    packed: dict[tuple[object, ...], tuple[Recipe, Target]] = {}
    kernels: dict[tuple[str, str], PackedKernel] = {}
    for recipe, target in recipes:
        packed.setdefault(recipe_key(recipe.site, target), (recipe, target))
        for variant in recipe.variants:
            kernel = _kernel(compiled[variant.name], target)
            kernels[kernel.sort_key] = kernel
    ordered = sorted(kernels)
    numbers = {key: number for number, key in enumerate(ordered)}
    done = [_recipe(recipe, target, numbers) for recipe, target in packed.values()]
    done.sort(key=lambda recipe: recipe.sort_key)
    return Pack(compiler, tuple(kernels[key] for key in ordered), tuple(done))


def match_of(site: KernelSite) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What a node must have in common with `site`, beyond T, inputs and outputs, to be executed by its recipe."""
    defaults = {attribute.name: attribute.default for attribute in definition_of(site.operator).attributes}
    attributes: dict[str, Any] = {**defaults, **site.attributes}
    facts: dict[str, Any] = {
        **attributes, "D": site.head_size, "D_v": site.v_head_size, "group": site.group,
        "softcap": attributes["softcap"] > 0, "lists_per_head": site.lists_per_head,
    }  # fmt: skip
    if "dilation" in attributes:
        dilation = attributes["dilation"]
        steps = (dilation,) if isinstance(dilation, int) else tuple(dilation)
        facts["dilation"] = steps[:1] if len(set(steps)) == 1 else steps
    return tuple(
        (name, tuple(int(v) for v in value) if isinstance(value, tuple) else (int(value),))
        for name, value in ((name, facts[name]) for name in MATCHES[site.operator])
    )


def recipe_key(site: KernelSite, target: Target) -> tuple[object, ...]:
    """`PackedRecipe.sort_key` of the recipe that a pack has for a site and a target, if it has one."""
    return (
        site.operator, site.dtype, target.architecture, target.form, _present(site), _outputs(site), match_of(site)
    )  # fmt: skip


def _outputs(site: KernelSite) -> tuple[str, ...]:
    return ("Y", "lse") if site.lse else ("Y",)


def _present(site: KernelSite) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in definition_of(site.operator).inputs if site.has(tensor.name))


def _recipe(recipe: Recipe, target: Target, numbers: Mapping[tuple[str, str], int]) -> PackedRecipe:
    site = recipe.site
    paths = tuple(
        PackedPath(
            path.name,
            to_postfix(path.condition),
            tuple((name, to_postfix(expression)) for name, expression in path.sizes),
            tuple(Buffer(b.name, b.type, to_postfix(b.elements), b.zeroed) for b in path.buffers),
            tuple(numbers[kernel.name, target.form] for kernel in path.kernels),
        )
        for path in recipe.paths
    )
    return PackedRecipe(
        site.operator, site.dtype, target.architecture, target.form, _present(site), _outputs(site), match_of(site),
        paths,
    )  # fmt: skip


def _kernel(compiled: CompiledKernel, target: Target) -> PackedKernel:
    variant = compiled.variant
    limit = SHARED_MEMORY[_LEAST_SHARED][0] * 1024
    if target.form == "ptx" and compiled.shared > limit:
        raise NoKernel(f"{variant.name}: PTX needs {compiled.shared} bytes of shared memory; allowed: {limit}")
    needs = resources(compiled.cubin, compiled.entry)
    x, y, z = (to_postfix(expression) for expression in variant.grid)
    return PackedKernel(
        name=variant.name, architecture=variant.architecture, form=target.form, entry=compiled.entry,
        threads=compiled.threads, shared=compiled.shared, registers=needs.registers, stack=needs.stack,
        dtype=variant.dtype, head_size=variant.head_size, v_head_size=variant.v_head_size, stages=variant.num_stages,
        function=variant.function, features=variant.features, constants=_constants(variant),
        parameters=tuple(_parameter(parameter) for parameter in variant.parameters), grid=(x, y, z),
        code=compiled.cubin if target.form == "cubin" else compiled.ptx.encode("ascii"),
    )  # fmt: skip


def _parameter(parameter: Parameter) -> Parameter:
    kind, _, what = parameter.meaning.partition(":")
    return replace(parameter, meaning=f"size:{to_postfix(what)}") if kind == "size" else parameter


def _constants(variant: KernelVariant) -> tuple[tuple[str, str], ...]:
    return tuple((constant.name, _as_text(constant.value)) for constant in variant.constants)


def _as_text(value: int | float | bool | str | Sequence[int] | None) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float, str)) else ",".join(str(item) for item in value)
