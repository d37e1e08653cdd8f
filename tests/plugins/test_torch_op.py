from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
import torch
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.functions import attach_function_bodies
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.torch_blocked import Operands, blocked_attention
from longspan.plugins.sliding_window_attention.torch_op import (
    sliding_window_attention,
    sliding_window_attention_lse,
)
from longspan.plugins.torch_ops import onnx_translation_table
from torch.utils._python_dispatch import TorchDispatchMode

from .function_sites import session
from .sliding_window_cases import CASES, Case, expected

EVERYTHING = next(case for case in CASES if case.name == "everything")


def tensors(case: Case, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The operands of a case by argument name; floating-point ones in `dtype`."""
    given = {name.lower(): torch.from_numpy(np.ascontiguousarray(a)) for name, a in case.operands(layout).items()}
    return {
        name: tensor.to(torch.float32 if name == "spans" else dtype) if tensor.is_floating_point() else tensor
        for name, tensor in given.items()
    }


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_agrees_with_the_reference(case: Case, layout: str) -> None:
    given, attributes = tensors(case, layout, torch.float64), case.node_attributes(layout)
    y, lse = sliding_window_attention_lse(**given, **attributes)
    want_y, want_lse = expected(case, layout)
    np.testing.assert_allclose(y.numpy(), want_y, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=1e-13)
    assert torch.equal(sliding_window_attention(**given, **attributes), y)


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, int, int], layout: str) -> None:
    batch, seq_q, seq_k = sizes
    window = {"left_window_size": 1, "right_window_size": 1}
    features, none = ("attn_mask", "sinks", "global_mask"), ((),) * batch
    case = Case("empty", window, features, batch=batch, seq_q=seq_q, seq_k=seq_k, global_tokens=none)
    given = tensors(case, layout, torch.float64)
    got = sliding_window_attention_lse(**given, **case.node_attributes(layout))
    for mine, want in zip(got, expected(case, layout), strict=True):
        np.testing.assert_allclose(mine.numpy(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "padding", "many blocks", "global with own projections"])
def test_lower_precision_accumulates_in_float32(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    given = tensors(case, "bhsd", dtype)
    formal = {"q": "Q", "k": "K", "v": "V", "global_q": "global_Q", "global_k": "global_K", "global_v": "global_V"}
    exact = {
        formal.get(name, name): tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in given.items()
    }
    want_y, want_lse = expected(case, "bhsd", exact)
    with torch.inference_mode():
        y, lse = sliding_window_attention_lse(**given, **case.node_attributes("bhsd"))
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    half_ulp = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    float32 = 4 * 16 * torch.finfo(torch.float32).eps  # |V| < 4; a score below 16 is off by 16 eps
    np.testing.assert_allclose(y.double().numpy(), want_y, rtol=half_ulp, atol=float32)
    np.testing.assert_allclose(lse.double().numpy(), want_lse, rtol=0, atol=float32)


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("name", ["plain", "everything", "decode"])
def test_opcheck(name: str, layout: str) -> None:
    case = next(case for case in CASES if case.name == name)
    given = tensors(case, layout, torch.float32)
    attributes = case.node_attributes(layout)
    attributes["dilation"] = list(attributes.get("dilation", [1]))
    for op in ("sliding_window_attention", "sliding_window_attention_lse"):
        torch.library.opcheck(
            getattr(torch.ops.longspan, op).default,
            (),
            {**given, **attributes},
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any torch operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("attributes", [{"left_window_size": 30, "right_window_size": 9}, {"dilation": (1, 3)}])
def test_no_tensor_is_quadratic(attributes: dict[str, Any]) -> None:
    sizes = []
    for length in (512, 2048):
        case = Case("memory", attributes, ("global_mask",), batch=1, seq_q=length, global_tokens=((0, 7),))
        with LargestTensor() as largest:
            # Not through the op, which a dispatch mode sees as one call.
            blocked_attention(Operands(**tensors(case, "bhsd", torch.float32)), Attributes.from_mapping(attributes))
        sizes.append(largest.elements)
    assert 512 * 8 < sizes[1] <= 4.2 * sizes[0]


class Net(torch.nn.Module):
    """Two sites: one with optional inputs, one without and with lse."""

    def forward(
        self, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = {"q_num_heads": 4, "kv_num_heads": 2}
        y = sliding_window_attention(
            q, kv, kv, attn_mask=mask, sinks=sinks, left_window_size=3, right_window_size=2, softcap=4.0, **heads
        )
        return sliding_window_attention_lse(
            y, kv, kv, left_window_size=5, is_causal=True, dilation=(1, 2, 1, 1), scale=0.3, **heads
        )


def net_inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(batch, length, generator=generator) > 0.2
    q = torch.randn(batch, length, 32, generator=generator)
    kv = torch.randn(batch, length, 16, generator=generator)
    return q, kv, mask, torch.randn(4, generator=generator)


def dynamic(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    return tuple(None if x is None or x.dim() == 1 else {0: batch, 1: length} for x in inputs)


def test_torch_export_specialises_nothing() -> None:
    inputs = net_inputs(2, 9)
    program = torch.export.export(Net(), inputs, dynamic_shapes=dynamic(inputs))  # named Dims: an error if specialised
    assert all(bound.upper > 10**9 for bound in program.range_constraints.values())
    for batch, length in ((1, 1), (3, 40)):
        other = net_inputs(batch, length)
        for got, want in zip(program.module()(*other), Net()(*other), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("present", [(True, True), (False, True), (True, False), (False, False)])
def test_onnx_export_makes_one_node_for_each_call(present: tuple[bool, bool]) -> None:
    def given(batch: int, length: int) -> tuple[Any, ...]:
        q, kv, *optional = net_inputs(batch, length)
        return (q, kv, *(x if there else None for x, there in zip(optional, present, strict=True)))

    inputs = given(2, 9)
    program = torch.onnx.export(
        Net().eval(),
        inputs,
        dynamo=True,
        dynamic_shapes=dynamic(inputs),
        custom_translation_table=onnx_translation_table(),
        opset_version=18,
        verbose=False,
    )
    model = program.model
    first, second = (node for node in model.graph if node.domain == "longspan")
    assert len(list(model.graph)) == 2
    names = [None if x is None else x.name for x in first.inputs]
    mask, sinks = ("mask" if present[0] else None), ("sinks" if present[1] else None)
    full = ["q", "kv", "kv", mask, None, None, None, None, None, None, sinks]
    while full[-1] is None:
        full.pop()
    assert names == full
    assert len(second.inputs) == 3
    assert model.opset_imports["longspan"] == 1
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    assert attributes == pytest.approx({
        "left_window_size": 3, "right_window_size": 2, "scale": 8**-0.5, "softcap": 4.0,
        "q_num_heads": 4, "kv_num_heads": 2,
    })  # fmt: skip
    assert second.attributes["dilation"].as_ints() == (1, 2, 1, 1)
    assert second.attributes["scale"].as_float() == pytest.approx(0.3)
    assert [len(first.outputs), len(second.outputs)] == [1, 2]
    assert [isinstance(size, ir.SymbolicDim) for size in model.graph.outputs[0].shape] == [True, True, False]

    attach_function_bodies(model)
    running = session(model)
    for batch, length in ((1, 1), (3, 40)):
        other = given(batch, length)
        feeds = [x.numpy() for x in other if x is not None]
        got = running.run(None, {value.name: x for value, x in zip(model.graph.inputs, feeds, strict=True)})
        for mine, want in zip(got, Net()(*other), strict=True):
            np.testing.assert_allclose(mine, want.numpy(), rtol=0, atol=1e-5)


def test_transformers_exporter_makes_one_node() -> None:
    pytest.importorskip("transformers", minversion="5.18")
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.exporters import exporter_onnx

    class Tiny(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.qkv = torch.nn.Linear(16, 48)
            self.post_init()

        def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            q, k, v = self.qkv(inputs_embeds).split(16, 2)
            window = {"left_window_size": 2, "right_window_size": 2, "q_num_heads": 2, "kv_num_heads": 2}
            return {"hidden": sliding_window_attention(q, k, v, attn_mask=attention_mask.bool(), **window)}

    torch.manual_seed(0)
    model = Tiny(PretrainedConfig()).eval()
    sample = {"inputs_embeds": torch.randn(2, 9, 16), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    with mock.patch.dict(exporter_onnx._ONNX_TRANSLATION_TABLE, onnx_translation_table()):
        exported = exporter_onnx.OnnxExporter().export(model, sample, config=exporter_onnx.OnnxConfig(dynamic=True))
    program = exported.program
    assert sum(node.domain == "longspan" for node in program.graph.all_nodes()) == 1
    attach_function_bodies(program)
    other = {"inputs_embeds": torch.randn(1, 23, 16), "attention_mask": torch.ones(1, 23, dtype=torch.int64)}
    other["attention_mask"][:, 17:] = 0
    got = session(program).run(None, {name: x.numpy() for name, x in other.items()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(**other)["hidden"].numpy(), rtol=0, atol=1e-5)


def test_scale_is_left_open_where_the_head_size_is_dynamic() -> None:
    class Single(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return sliding_window_attention(q, q, q, left_window_size=1, right_window_size=1)

    size = torch.export.Dim("size")
    program = torch.onnx.export(
        Single().eval(),
        (torch.randn(2, 2, 5, 8),),
        dynamo=True,
        dynamic_shapes=({3: size},),
        custom_translation_table=onnx_translation_table(),
        verbose=False,
    )
    [node] = program.model.graph
    assert "scale" not in node.attributes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.ones(2, 19)}, "attn_mask is torch.float32: must be torch.bool"),
        ({"attn_mask": torch.ones(2, 18, dtype=torch.bool)}, r"attn_mask has shape \(2, 18\): must be \(2, 19\)"),
        ({"k": torch.zeros(2, 2, 19, 8, dtype=torch.float16)}, "K is torch.float16: must be torch.float32"),
        ({"left_window_size": -3}, "left_window_size = -3"),
        ({"dilation": 2**31}, "dilation = .2147483648.: every value must be at most 2147483647"),
        (
            {"nonpad_kv_seqlen": torch.tensor([19, 20])},
            r"nonpad_kv_seqlen\[1\] = 20: must be between 0 and .*, 19",
        ),
        ({"nonpad_kv_seqlen": torch.tensor([-1, 4])}, r"nonpad_kv_seqlen\[0\] = -1: must be between 0 and"),
        ({"dilation": (1, 2, 3)}, "dilation has 3 values: must be 1 or 2"),
        ({"band_bias": torch.zeros(1, 1, 1, 4), "left_window_size": -1}, "band_bias needs bounded windows"),
        ({"global_q": torch.zeros(2, 2, 19, 8)}, "come together or not at all"),
        ({"q": torch.zeros(2, 19, 16), "k": torch.zeros(2, 19, 16), "v": torch.zeros(2, 19, 16)}, "3-D inputs need"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    case = next(case for case in CASES if case.name == "plain")
    given = {**tensors(case, "bhsd", torch.float32), **case.node_attributes("bhsd"), **change}
    with pytest.raises(InvalidOperands, match=message):
        sliding_window_attention(**given)
