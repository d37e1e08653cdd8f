"""Optimization profiles: defaults, Polygraphy's syntax, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from longspan.exporter.conversion import Conversion
from longspan.exporter.engines.profiles import (
    DEFAULT_MAX_BATCH,
    DEFAULT_MAX_LENGTH,
    DEFAULT_OPT_LENGTH,
    ShapeRange,
    profiles_of,
)
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.manifest import InputRecord, Manifest, SourceRecord

MANIFEST = Manifest(
    source=SourceRecord("config", "config.json", "Model", {}),
    conversion=Conversion(),
    family="",
    faithful=True,
    approximation="",
    max_length=4096,
    trained_length=None,
    inputs=(
        InputRecord("ids", "int64", ("batch", "sequence"), "tokens"),
        InputRecord("mask", "int64", ("batch", "sequence"), "padding_mask"),
        InputRecord("states", "float32", ("batch", "sequence", 8), "data"),
    ),
    outputs=(),
    sites=(),
    opset=20,
    versions={},
    created="",
)


def test_defaults_span_what_the_model_takes() -> None:
    (profile,) = profiles_of(MANIFEST)
    assert profile.inputs["states"] == ShapeRange((1, 1, 8), (1, DEFAULT_OPT_LENGTH, 8), (DEFAULT_MAX_BATCH, 4096, 8))
    assert profile.inputs["ids"].max == profile.inputs["mask"].max == (DEFAULT_MAX_BATCH, 4096)


@pytest.mark.parametrize(
    ("limit", "opt", "longest"),
    [
        (100, 100, 100),
        (None, DEFAULT_OPT_LENGTH, DEFAULT_MAX_LENGTH),
        (131072, DEFAULT_OPT_LENGTH, DEFAULT_MAX_LENGTH),
    ],
)
def test_no_default_exceeds_the_positions(limit: int | None, opt: int, longest: int) -> None:
    (profile,) = profiles_of(dataclasses.replace(MANIFEST, max_length=limit))
    assert profile.sizes("sequence", MANIFEST.inputs) == (1, opt, longest)


def test_one_input_gives_the_shapes_of_all() -> None:
    (profile,) = profiles_of(MANIFEST, ["mask:[2,16]"], ["mask:[2,128]"], ["mask:[8,512]"])
    assert profile.inputs["states"] == ShapeRange((2, 16, 8), (2, 128, 8), (8, 512, 8))


def test_a_small_maximum_pulls_the_best_shape_down_and_a_large_best_one_the_maximum_up() -> None:
    (small,) = profiles_of(MANIFEST, max_shapes=["ids:[1,64]"])
    assert small.inputs["ids"] == ShapeRange((1, 1), (1, 64), (1, 64))
    (large,) = profiles_of(dataclasses.replace(MANIFEST, max_length=None), opt_shapes=["ids:[6,16384]"])
    assert large.inputs["ids"] == ShapeRange((1, 1), (6, 16384), (6, 16384))


def test_an_input_that_is_named_again_begins_the_next_profile() -> None:
    texts = ["ids:[1,64] mask:[1,64]", "ids:[4,512]"]
    first, second = profiles_of(MANIFEST, max_shapes=texts)
    assert (first.inputs["ids"].max, second.inputs["ids"].max) == ((1, 64), (4, 512))


def test_a_fixed_dimension_stays() -> None:
    inputs = (InputRecord("ids", "int64", ("batch", 128), "tokens"),)
    (profile,) = profiles_of(dataclasses.replace(MANIFEST, inputs=inputs))
    assert profile.inputs["ids"] == ShapeRange((1, 128), (1, 128), (DEFAULT_MAX_BATCH, 128))


def test_a_size_that_nobody_knows_is_asked_for() -> None:
    inputs = (*MANIFEST.inputs, InputRecord("cache", "float32", ("batch", "past", 8), "data"))
    manifest = dataclasses.replace(MANIFEST, inputs=inputs)
    with pytest.raises(InvalidRequest, match=r"'past' is; next step: give it, e\.g\. --max-shapes cache:\[1,1,1\]"):
        profiles_of(manifest)
    (profile,) = profiles_of(manifest, max_shapes=["cache:[4,100,8]"])
    assert profile.inputs["cache"] == ShapeRange((1, 1, 8), (1, 100, 8), (4, 100, 8))


@pytest.mark.parametrize(
    ("least", "best", "most", "message"),
    [
        (["ids:[1,512]"], [], ["ids:[1,128]"], "--min-shapes and --max-shapes: the sequence would go from 512 to 128"),
        (["ids:[1,512]"], ["ids:[1,128]"], [], "--min-shapes and --opt-shapes: the sequence"),
        ([], ["ids:[4,128]"], ["ids:[2,128]"], "--opt-shapes and --max-shapes: the batch would go from 4 to 2"),
        ([], [], ["ids:[1,4097]"], "--max-shapes: the sequence is 4,097, the model has positions for 4,096 tokens"),
        ([], [], ["ids:[2,8]", "mask:[2,9]"], "--max-shapes: input mask: sequence is 9, but another input makes it 8"),
        ([], [], ["ids:[2]"], r"--max-shapes ids:\[2\]: input ids has shape"),
        ([], [], ["states:[2,8,9]"], "input states has shape"),
        ([], [], ["other:[2,8]"], "no input 'other'; allowed: ids, mask, states"),
        ([], [], ["ids"], "must be input:"),
        ([], [], [""], "--max-shapes: is empty"),
        ([], ["ids:[0,8]"], [], "--opt-shapes .* must be input:"),
        ([], ["ids:[1,8]"], ["ids:[1,8]", "ids:[1,16]"], "different numbers .*: --opt-shapes 1, --max-shapes 2"),
    ],
)
def test_what_contradicts_is_refused(least: list[str], best: list[str], most: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        profiles_of(MANIFEST, least, best, most)


def test_admits_what_lies_between_the_bounds() -> None:
    (profile,) = profiles_of(MANIFEST, ["ids:[2,16]"], [], ["ids:[4,32]"])
    assert profile.admits({"ids": (2, 16), "mask": (4, 32)})
    assert not profile.admits({"ids": (1, 16)})
    assert not profile.admits({"ids": (2, 33)})
    assert not profile.admits({"ids": (2,)})
