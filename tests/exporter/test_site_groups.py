"""Deep models in few lines: which names fold, and what they are called."""

from __future__ import annotations

import pytest
from longspan.exporter.sites.groups import fold_alike, fold_names


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([], []),
        (["attention"], ["attention"]),
        (["attention", "attention"], ["attention", "attention"]),
        (["layer.3.self"], ["layer.3.self"]),
        ([f"layer.{i}.self" for i in range(12)], ["layer.0–11.self"]),
        (["layer.0.self", "layer.2.self"], ["layer.0,2.self"]),
        ([f"layer.{i}.self" for i in (0, 1, 2, 5, 7, 8)], ["layer.0–2,5,7–8.self"]),
        ([f"layer.{i}.self" for i in range(0, 12, 2)], ["layer.0,2,…,10.self"]),
        ([f"layer.{i}" for i in (10, 9, 11)], ["layer.9–11"]),
        (["layer.0.self", "layer.0.cross", "layer.1.self"], ["layer.0–1.self", "layer.0.cross"]),
        ([f"block.{i}.layer.0" for i in range(3)], ["block.0–2.layer.0"]),
        ([f"stage.{i}.block.{j}" for i in (0, 1) for j in range(3)], ["stage.0.block.0–2", "stage.1.block.0–2"]),
    ],
)
def test_names_fold_over_one_number(names: list[str], labels: list[str]) -> None:
    folds = fold_names(names)
    assert [fold.label for fold in folds] == labels
    assert sorted(member for fold in folds for member in fold.members) == list(range(len(names)))
    assert all(fold.skeleton.replace("#", fold.numbers) == fold.label for fold in folds)


def test_only_what_is_alike_folds_also_when_it_does_not_stand_side_by_side() -> None:
    names = [f"layer.{i}.self" for i in range(6)]
    folds = fold_alike(names, ["local", "local", "full", "local", "local", "full"])
    assert [(fold.title, fold.members) for fold in folds] == [("layers 0–1,3–4", (0, 1, 3, 4)), ("layers 2,5", (2, 5))]
