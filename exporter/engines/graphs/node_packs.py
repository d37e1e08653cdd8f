"""A kernel pack for each node: taken from packs that are there, compiled where those lack something."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from ....plugins.gpu.pack import Pack, PackedKernel, PackedRecipe
from ....plugins.gpu.pack_build import Target, recipe_for, recipe_key
from ....plugins.gpu.variants import KernelSite, NoKernel
from ...kernel_packs import compile_pack


def refusals(sites: Mapping[str, KernelSite], targets: Sequence[Target]) -> dict[str, str]:
    """Why a site has no kernel for a target, by node; sites that have one for each are not named."""
    refused = {}
    for node, site in sites.items():
        try:
            for target in targets:
                recipe_for(site, target)
        except NoKernel as error:
            refused[node] = str(error)
    return refused


def node_packs(
    sites: Mapping[str, KernelSite],
    targets: Sequence[Target],
    packs: Sequence[Pack] = (),
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[dict[str, Pack], frozenset[str]]:
    """A pack for each node with what it needs, and nothing else.

    Args:
        sites: What to execute, by node.
        targets: What devices the kernels are for.
        packs: Where to look for kernels first, in this order.
        progress: Told how many kernels are compiled, where some are.

    Returns:
        The pack of each node; and the nodes for which something was compiled.

    Raises:
        EnvironmentLacks: something must be compiled and Triton is not installed.
        ExportFailed: a kernel does not compile.
        InvalidRequest: a site has no kernel for a target; see `refusals`.
    """
    found = _recipes(packs)
    lacking = {
        node: [target for target in targets if recipe_key(site, target) not in found] for node, site in sites.items()
    }
    compiled: list[Pack] = []
    for wanted in {tuple(missing) for missing in lacking.values() if missing}:
        nodes = [node for node, missing in lacking.items() if tuple(missing) == wanted]
        compiled.append(compile_pack([sites[node] for node in nodes], wanted, progress=progress))
    found = _recipes([*packs, *compiled])
    result = {node: joined([found[recipe_key(site, target)] for target in targets]) for node, site in sites.items()}
    return result, frozenset(node for node, missing in lacking.items() if missing)


def _recipes(packs: Iterable[Pack]) -> dict[tuple[object, ...], tuple[Pack, PackedRecipe]]:
    """Every recipe with the pack that has it; of several packs the first counts."""
    found: dict[tuple[object, ...], tuple[Pack, PackedRecipe]] = {}
    for pack in packs:
        for recipe in pack.recipes:
            found.setdefault(recipe.sort_key, (pack, recipe))
    return found


def joined(chosen: Sequence[tuple[Pack, PackedRecipe]]) -> Pack:
    """One pack of some recipes, each with the pack that it is from.

    Args:
        chosen: Recipes no two of which are for the same nodes and target: kernels of one name and form are the same.
    """
    kernels: dict[tuple[str, str], PackedKernel] = {}
    for pack, recipe in chosen:
        for path in recipe.paths:
            for number in path.launches:
                kernel = pack.kernels[number]
                kernels.setdefault(kernel.sort_key, kernel)
    ordered = sorted(kernels)
    numbers = {key: number for number, key in enumerate(ordered)}
    recipes = []
    for pack, recipe in chosen:
        paths = tuple(
            dataclasses.replace(
                path, launches=tuple(numbers[pack.kernels[number].sort_key] for number in path.launches)
            )
            for path in recipe.paths
        )
        recipes.append(dataclasses.replace(recipe, paths=paths))
    recipes.sort(key=lambda recipe: recipe.sort_key)
    compilers = dict.fromkeys(pack.compiler for pack, _ in chosen)
    return Pack("; ".join(compilers), tuple(kernels[key] for key in ordered), tuple(recipes))
