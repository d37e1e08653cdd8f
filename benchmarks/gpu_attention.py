"""Prove and time the GPU kernels on a CUDA device: one command in a checkout, for anyone who can borrow a GPU.

Needs torch (with CUDA), Triton and numpy, and nothing installed from here:

    python benchmarks/gpu_attention.py                        # everything, in less than 8 minutes
    python benchmarks/gpu_attention.py --run a,e --budget 120
    python benchmarks/gpu_attention.py --run features --match softcap
    python benchmarks/gpu_attention.py --dry-run              # no GPU: tiny shapes, interpreted, nothing timed

Features come first: every case that the kernels are tested with, in every type, against the float64 reference. Then
the cases of `SITES` and the invariants of `GROUPS`: each contestant is held against the reference on some rows, then
captured in a CUDA graph and replayed, the contestants in turns, each time after the L2 cache was overwritten; events
around the replay give its time. The floor is what the same run measured: the time that a bf16 matrix product needs for
the same operations, or a copy for the same bytes, whichever is longer.

What there was no time for is listed as not run, never as passed. Exit codes: 0; 1 a wrong result, a crash, or with
--strict a missed anchor; 2 usage; 3 not everything was run within the budget; 4 no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[[], Any]

ROOT = Path(__file__).resolve().parents[1]
WRONG, USAGE, INCOMPLETE, NO_DEVICE = 1, 2, 3, 4
OURS = "longspan"
UNIT_ROUNDOFF = 2.0**-8  # of bfloat16 when it is cut instead of rounded

CAPABILITY = (8, 0)

# On an H100; other devices get figures and no verdict.
ANCHOR_DEVICE = "H100"
MUST_RATIO = {
    "FlexAttention": 1.0, "FlashAttention-2": 1.2, "FlashAttention-3": 0.75, "ORT LongformerAttention": 3.0,
}  # fmt: skip
MUST_OPTION, MUST_DOUBLE, MUST_SLOPE, MUST_CACHE = 1.05, 2.1, 1.05, 1.1


class Unavailable(Exception):
    """A contestant that cannot take part; the message says why."""


@dataclass(frozen=True)
class Site:
    """One attention layer: a window (l, r) of keys around each query, or whole blocks of BigBird's pattern.

    Attributes:
        queries: Rows; they stand at the end of the keys.
        left: Keys before a query that it sees.
        right: Keys after it.
        block: Size of the blocks of a block-sparse layer; 0 for a window.
        random: Random blocks in each of its rows.
        others: Whether a row of blocks sees its neighbours and both ends too, as BigBird's do.
        must: Microseconds on an H100 that the anchor allows, and that it hopes for.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    left: int = 0
    right: int = 0
    block: int = 0
    random: int = 0
    others: bool = True
    must: tuple[float, float] | None = None

    @property
    def operator(self) -> str:
        """Which of our operators computes it."""
        return "BlockSparseAttention" if self.block else "SlidingWindowAttention"

    @property
    def offset(self) -> int:
        """Position of query row 0."""
        return self.keys - self.queries

    @cached_property
    def listed(self) -> Array:
        """Which blocks a block-sparse layer sees: bool (heads, rows of blocks, blocks)."""
        count = self.keys // self.block
        row, column = np.ogrid[:count, :count]
        ends = np.isin(row, (0, count - 1)) | np.isin(column, (0, count - 1))
        seen = np.broadcast_to((abs(row - column) <= 1) | ends if self.others else False, (count, count))
        result = np.repeat(seen[None], self.heads, 0)
        rng = np.random.default_rng(0)
        for rows in result:
            for one in rows:
                free = np.flatnonzero(~one)
                one[rng.choice(free, min(self.random, len(free)), replace=False)] = True
        return result

    def attributes(self) -> dict[str, Any]:
        """Attributes of the node."""
        if self.block:
            return {"q_block_size": self.block, "kv_block_size": self.block}
        return {"left_window_size": self.left, "right_window_size": self.right, "is_causal": int(self.right == 0)}

    def operands(self, bench: Bench) -> dict[str, Any]:
        """Random Q, K and V on the device, and the inputs that say what is seen."""
        torch = bench.torch
        torch.manual_seed(0)
        q = torch.randn(self.batch, self.heads, self.queries, self.size, dtype=bench.dtype, device=bench.device)
        k, v = torch.randn(2, self.batch, self.kv_heads, self.keys, self.size, dtype=bench.dtype, device=bench.device)
        operands = {"Q": q, "K": k, "V": v}
        if self.block:
            counts, indices = _as_lists(self.listed)
            names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
            lists = (np.zeros_like(counts), np.zeros((*counts.shape, 0), np.int32), counts, indices)
            for name, array in zip(names, lists, strict=True):
                operands[name] = torch.from_numpy(array[None]).to(bench.device)
        elif self.offset:
            operands["nonpad_kv_seqlen"] = torch.full((self.batch,), self.keys, device=bench.device)
        return operands

    def seen(self, head: int, row: int) -> Array:
        """Indices of the keys that a query row sees."""
        if self.block:
            blocks = np.flatnonzero(self.listed[head, row // self.block])
            keys: Array = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
            return keys
        position = self.offset + row
        return np.arange(max(0, position - self.left), min(self.keys, position + self.right + 1))

    @cached_property
    def cost(self) -> tuple[int, int]:
        """(floating-point operations, bytes of Q, seen K and V, and Y in 16 bits): the work that cannot be avoided."""
        if self.block:
            pairs, read = int(self.listed.sum()) * self.block**2, self.keys
        else:
            position = self.offset + np.arange(self.queries)
            first = np.maximum(position - self.left, 0)
            pairs = self.heads * int((np.minimum(position + self.right, self.keys - 1) - first + 1).sum())
            read = self.keys - int(first[0])
        moved = self.batch * self.size * (self.heads * self.queries + self.kv_heads * read)
        return 4 * self.size * self.batch * pairs, 2 * 2 * moved


SITES = {
    "a": Site(1, 12, 12, 4096, 4096, 64, 256, 256, must=(22, 16)),
    "b": Site(8, 12, 12, 4096, 4096, 64, 256, 256, must=(150, 120)),
    "c": Site(1, 32, 8, 32768, 32768, 128, 4095, 0, must=(4400, 3700)),
    "d": Site(8, 12, 12, 4096, 4096, 64, block=64, random=3, must=(230, 180)),
    "e": Site(1, 32, 8, 1, 32768, 128, 4095, 0, must=(12, 9)),
}
TINY = {
    "a": Site(1, 2, 2, 80, 80, 16, 12, 12),
    "b": Site(2, 2, 2, 80, 80, 16, 12, 12),
    "c": Site(1, 4, 2, 96, 96, 32, 31, 0),
    "d": Site(2, 2, 2, 96, 96, 16, block=16, random=1),
    "e": Site(1, 4, 2, 1, 96, 32, 31, 0),
}
GROUPS = ("options", "doubling", "scaling", "cache")
STAGES = ("features", *SITES, *GROUPS)


def _as_lists(listed: Array) -> tuple[Array, Array]:
    """(counts, indices) of a bool array over blocks; the indices have room for the longest row."""
    counts = listed.sum(-1).astype(np.int32)
    order = np.argsort(~listed, -1, kind="stable").astype(np.int32)
    return counts, np.ascontiguousarray(order[..., : max(int(counts.max()), 1)])


@dataclass
class Bench:
    """Where and how things run; a dry run computes on the CPU and times nothing."""

    torch: Any
    device: str
    dtype: Any
    deadline: float
    dry: bool
    match: str = ""
    not_run: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    arguments: tuple[str, ...] = ()

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    @cached_property
    def anchored(self) -> bool:
        """Whether the anchors are meant for this device."""
        return not self.dry and ANCHOR_DEVICE in self.torch.cuda.get_device_name()

    @cached_property
    def flush(self) -> Any:
        """A buffer of several times the L2 cache; writing it takes longer than to enqueue what is timed."""
        size = self.torch.cuda.get_device_properties(0).L2_cache_size
        return self.torch.empty(max(4 * size, 1 << 29), dtype=self.torch.int8, device=self.device)

    def skip(self, what: str) -> None:
        """Note that there was no time for something."""
        self.not_run.append(what)
        print(f"{what}: not run, the time budget is spent")

    def judge(self, what: str, met: bool) -> None:
        """Note whether an anchor is met, on the device that it is meant for."""
        if self.anchored and not met:
            self.missed.append(what)


# ---- contestants ----


def longspan_kernel(site: Site, operands: Mapping[str, Any], **attributes: Any) -> Run:
    """Our kernels: planned once, with buffers that every run uses again."""
    from longspan.plugins.gpu import launch

    from tests.plugins.kernel_agreement import plan

    planned = plan(site.operator, operands, site.attributes() | attributes, lse=False)
    buffers = launch.allocate(planned, operands["Q"].device)
    return lambda: launch.run(planned, operands, buffers)[0]


def flex_attention(site: Site, operands: Mapping[str, Any], bench: Bench) -> Run:
    """Torch's FlexAttention, compiled, with partial and full blocks listed as our kernels have them."""
    from torch.nn.attention import flex_attention as flex

    q, k, v = (operands[name] for name in "QKV")
    block, offset, left, right = site.block or 128, site.offset, site.left, site.right
    if site.block:
        partial, full = np.zeros_like(site.listed[None]), site.listed[None]
    else:
        row, column = np.ogrid[: -(-site.queries // block), : -(-site.keys // block)]
        first = offset + row * block
        last = np.minimum(first + block, site.keys) - 1
        begin, end = column * block, np.minimum(column * block + block, site.keys) - 1
        touched = (begin <= last + right) & (end >= first - left)
        whole = (end <= first + right) & (begin >= last - left) & (end == begin + block - 1)
        partial, full = (touched & ~whole)[None, None], (touched & whole)[None, None]

    table = bench.torch.from_numpy(full).to(bench.device)

    def mask(_b: Any, head: Any, query: Any, key: Any) -> Any:
        if site.block:  # asked by the uncompiled version only: listed blocks are full
            return table[0, head, query // block, key // block]
        return (key >= query + offset - left) & (key <= query + offset + right)

    def room(listed: Array) -> tuple[Any, Any]:
        """FlexAttention wants room for every block in both lists."""
        arrays = listed.sum(-1), np.argsort(~listed, -1, kind="stable")
        counts, indices = (bench.torch.from_numpy(array.astype(np.int32)).to(bench.device) for array in arrays)
        return counts, indices

    (some, which), (some_full, which_full) = room(partial), room(full)
    lengths = site.queries, site.keys
    blocks = flex.BlockMask.from_kv_blocks(
        some, which, some_full, which_full, BLOCK_SIZE=block, mask_mod=mask, seq_lengths=lengths
    )
    if bench.dry:
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        compute = flex.flex_attention
    else:
        bench.torch.compiler.reset()
        compute = bench.torch.compile(flex.flex_attention, dynamic=False)
    # Its tiles must divide the blocks.
    tiles: Any = {"BLOCK_M": block, "BLOCK_N": block} if block < 128 and not bench.dry else None
    grouped = site.heads != site.kv_heads
    return lambda: compute(q, k, v, block_mask=blocks, enable_gqa=grouped, kernel_options=tiles)


def dense_attention(site: Site, operands: Mapping[str, Any], bench: Bench) -> Run:
    """Torch's dense attention: with a mask, or for one query with the keys of its window cut out."""
    torch, (q, k, v) = bench.torch, (operands[name] for name in "QKV")
    attend, mask, grouped = torch.nn.functional.scaled_dot_product_attention, None, site.heads != site.kv_heads
    if site.queries == 1:
        k, v = (x[:, :, site.offset - site.left :] for x in (k, v))
    elif site.block:
        mask = torch.from_numpy(site.listed).to(bench.device)
        mask = mask.repeat_interleave(site.block, 1).repeat_interleave(site.block, 2)[None]
    else:
        row = torch.arange(site.queries, device=bench.device)[:, None]
        key = torch.arange(site.keys, device=bench.device)
        mask = (key >= row - site.left) & (key <= row + site.right)
    return lambda: attend(q, k, v, attn_mask=mask, enable_gqa=grouped)


def flash_attention(module: str, site: Site, operands: Mapping[str, Any], bench: Bench) -> Run:
    """FlashAttention-2 (`flash_attn`) or -3 (`flash_attn_interface`); for one query its kernel for caches."""
    if bench.dry:
        raise Unavailable("needs a CUDA device")
    if site.block:
        raise Unavailable("takes no block lists")
    try:
        flash = importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not importable ({error})") from error
    q, k, v = (operands[name].transpose(1, 2).contiguous() for name in "QKV")
    options = {"causal": site.right == 0, "window_size": (site.left, site.right)}
    lengths = bench.torch.full((site.batch,), site.keys, dtype=bench.torch.int32, device=bench.device)

    def run() -> Any:
        if site.queries > 1:
            found = flash.flash_attn_func(q, k, v, **options)
        else:
            found = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **options)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return run


def _ort_node(operator: str, site: Site, operands: Mapping[str, Any], bench: Bench) -> tuple[Any, dict[str, Any]]:
    """The node of one of ONNX Runtime's own operators, and its inputs; the first output is (B, S_q, H·D)."""
    from onnx import helper

    torch = bench.torch
    joined = {
        name: operands[name].transpose(1, 2).reshape(site.batch, -1, operands[name].shape[1] * site.size)
        for name in "QKV"
    }

    def filled(value: float, *shape: int, dtype: Any = torch.int32) -> Any:
        return torch.full(shape, value, dtype=dtype, device=bench.device)

    more: dict[str, Any]
    if operator == "GroupQueryAttention":
        # A prompt, or one query behind a cache, to which the last key is written in place.
        feeds = {"q": joined["Q"], "k": joined["K"][:, site.offset :], "v": joined["V"][:, site.offset :]}
        if site.offset:
            feeds |= {"past_key": operands["K"].clone(), "past_value": operands["V"].clone()}
        feeds |= {"last": filled(site.keys - 1, site.batch), "total": filled(site.keys).cpu()}
        names = [name if name in feeds else "" for name in ("q", "k", "v", "past_key", "past_value", "last", "total")]
        more = {"num_heads": site.heads, "kv_num_heads": site.kv_heads, "local_window_size": site.left + 1}
        outputs = ["y", "present_key", "present_value"]
    else:
        # Its projections are part of the operator, and of its time: here they are the identity.
        width, dtype = site.heads * site.size, joined["Q"].dtype
        weight = torch.eye(width, dtype=dtype, device=bench.device).repeat(1, 3)
        bias, mask = filled(0, 3 * width, dtype=dtype), filled(0, site.batch, site.queries, dtype=dtype)
        feeds = {"x": joined["Q"], "weight": weight, "bias": bias, "mask": mask, "global_weight": weight,
                 "global_bias": bias, "global": filled(0, site.batch, site.queries)}  # fmt: skip
        names, outputs, more = list(feeds), ["y"], {"num_heads": site.heads, "window": site.left}
    node = helper.make_node(operator, names, outputs, domain="com.microsoft", **more)
    return node, {name: tensor.contiguous() for name, tensor in feeds.items()}


def ort_attention(operator: str, site: Site, operands: Mapping[str, Any], bench: Bench) -> Run:
    """ONNX Runtime's own operator, in float16, on torch's stream; inputs and outputs stay on the device."""
    unlike = {
        "GroupQueryAttention": site.block or site.right,
        "LongformerAttention": site.block or site.left != site.right or site.heads != site.kv_heads,
    }
    if unlike[operator]:
        raise Unavailable("computes no such pattern")
    try:
        import onnxruntime as ort
        from onnx import TensorProto, helper
    except ImportError as error:
        raise Unavailable(f"not importable ({error})") from error
    provider = "CPUExecutionProvider" if bench.dry else "CUDAExecutionProvider"
    if provider not in ort.get_available_providers() or (bench.dry and operator == "LongformerAttention"):
        raise Unavailable(f"this ONNX Runtime has no {operator} for {'the CPU' if bench.dry else 'CUDA'}")
    torch = bench.torch
    node, feeds = _ort_node(operator, site, {name: operands[name].to(torch.float16) for name in "QKV"}, bench)
    types = {torch.float16: (TensorProto.FLOAT16, np.float16), torch.int32: (TensorProto.INT32, np.int32)}
    inputs = [helper.make_tensor_value_info(name, types[x.dtype][0], tuple(x.shape)) for name, x in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in node.output]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "node", inputs, outputs), opset_imports=opsets, ir_version=10)
    provided: dict[str, str] = {}
    waits = ort.RunOptions()
    if not bench.dry:  # 0, the default stream, would mean none: `main` has set another
        provided = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
        waits.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session = ort.InferenceSession(model.SerializeToString(), providers=[(provider, provided)])
    binding, bound = session.io_binding(), dict(feeds)
    cache = (site.batch, site.kv_heads, site.keys, site.size)
    for name in node.output:
        shape = (site.batch, site.queries, site.heads * site.size) if name == "y" else cache
        shared = feeds.get(name.replace("present", "past"))
        bound[name] = torch.empty(shape, dtype=torch.float16, device=bench.device) if shared is None else shared
    for name, tensor in bound.items():
        bind = binding.bind_output if name in node.output else binding.bind_input
        bind(name, tensor.device.type, 0, types[tensor.dtype][1], tuple(tensor.shape), tensor.data_ptr())

    def run() -> Any:
        session.run_with_iobinding(binding, waits)
        return bound["y"].view(site.batch, site.queries, site.heads, site.size).transpose(1, 2)

    return run


PEERS: dict[str, Callable[[Site, Mapping[str, Any], Bench], Run]] = {
    "FlexAttention": flex_attention,
    "SDPA": dense_attention,
    "FlashAttention-2": lambda *site: flash_attention("flash_attn", *site),
    "FlashAttention-3": lambda *site: flash_attention("flash_attn_interface", *site),
    "ORT GroupQueryAttention": lambda *site: ort_attention("GroupQueryAttention", *site),
    "ORT LongformerAttention": lambda *site: ort_attention("LongformerAttention", *site),
}


# ---- correctness ----


def error_of(site: Site, operands: Mapping[str, Any], y: Any) -> tuple[float, float]:
    """Largest error of some rows, and how many times the allowed one the worst of them is.

    The reference of a row is dense float64 attention over the keys it sees. A term of the softmax is rounded once
    before it is multiplied, and Y once: each moves a result by no more than a roundoff of sum(p·|v|); scores in float32
    move it by less, which a second roundoff of that sum covers.
    """
    from longspan.plugins.sliding_window_attention.definition import Attributes
    from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

    largest = share = 0.0
    rows = np.unique(np.linspace(0, site.queries - 1, 8).astype(int))
    for head in range(0, site.heads, max(site.heads // 4, 1)):
        shared = slice(head * site.kv_heads // site.heads, head * site.kv_heads // site.heads + 1)
        for row in rows:
            seen = slice(None), shared, site.seen(head, int(row))
            one = slice(None), slice(head, head + 1), slice(row, row + 1)
            q, k, v, got = (x.double().cpu().numpy() for x in (operands["Q"][one], *(operands[n][seen] for n in "KV"),
                                                               y[one]))  # fmt: skip
            want, sums = (sliding_window_attention(q, k, x, attributes=Attributes())[0] for x in (v, abs(v)))
            error = abs(got - want)
            largest = max(largest, float(np.nan_to_num(error, nan=np.inf).max()))
            allowed = UNIT_ROUNDOFF * (2 * sums + abs(want))
            share = max(share, float(np.nan_to_num(error / allowed, nan=np.inf).max()))
    return largest, share


def _chosen_runs(match: str, dry: bool) -> list[Any]:
    from tests.plugins.kernel_agreement import runs

    # The interpreter multiplies bfloat16 by bit patterns; few cases show that the plumbing works.
    found = [run for run in runs() if match in run.name and not (dry and run.dtype == "bfloat16")]
    return found[::40] if dry and not match else found


def run_shard(shard: str, bench: Bench) -> int:
    """Execute every n-th feature case in this process; one line of JSON each."""
    from tests.plugins.kernel_agreement import disagreement

    index, count = map(int, shard.split("/"))
    for run in _chosen_runs(bench.match, bench.dry)[index::count]:
        try:
            errors = disagreement(run, bench.device)
            line = {"run": run.name, **asdict(errors), "message": errors.message}
        except Exception as error:  # a case that cannot be computed is a result too
            line = {"run": run.name, "message": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(line), flush=True)
    return 0


def run_features(bench: Bench, jobs: int, share: float) -> dict[str, Any]:
    """Every case of the kernels' tests on the device, in processes of their own: one that crashes ends just itself."""
    names = [run.name for run in _chosen_runs(bench.match, bench.dry)]
    limit = time.monotonic() + share * bench.left
    lines: dict[str, dict[str, Any]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(job) for job in range(min(jobs, max(len(names), 1)))]
        children = []
        for job, log in enumerate(logs):
            command = [sys.executable, str(Path(__file__)), *bench.arguments, "--shard", f"{job}/{len(logs)}"]
            with log.open("w") as out, log.with_suffix(".err").open("w") as err:
                children.append(subprocess.Popen(command, stdout=out, stderr=err))
        for child, log in zip(children, logs, strict=True):
            ended = ""
            try:
                if child.wait(max(limit - time.monotonic(), 0.1)):
                    ended = f"ended with {child.returncode}: {log.with_suffix('.err').read_text()[-400:].strip()}"
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            done = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            lines |= {line["run"]: line for line in done}
            faults += [f"a process of the features {ended}"] if ended else []
    wrong = [f"{name}: {line['message']}" for name, line in lines.items() if line["message"]]
    missing = [name for name in names if name not in lines]
    print(f"\nfeatures: {len(lines) - len(wrong)} of {len(names)} agree with the reference, {len(wrong)} do not, "
          f"{len(missing)} were not run")  # fmt: skip
    for message in [*wrong, *faults]:
        print(f"  {message}")
    bench.wrong += [*wrong, *faults]
    bench.not_run += missing
    return {"cases": len(names), "wrong": wrong, "not_run": missing, "faults": faults, "runs": list(lines.values())}


# ---- time ----


@dataclass(frozen=True)
class Contestant:
    """Something to time: its run, how it is launched, and its error."""

    run: Run
    launched: str
    error: float | None = None


def captured(torch: Any, run: Run) -> Contestant:
    """The run as a CUDA graph that was seen to compute; launched from the host where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Contestant(run, f"from the host, as no graph can hold it ({error})"[:300])
    # A run that escapes the capture leaves an empty graph, which would be very fast.
    expected = _sample(expected)
    result.fill_(1)
    graph.replay()
    if not torch.allclose(_sample(result), expected, rtol=0, atol=0.05):
        return Contestant(run, "from the host, as its graph computes something else")

    def replay(_alive: Any = result) -> None:
        graph.replay()

    return Contestant(replay, "graph")


def _sample(tensor: Any) -> Any:
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() >> 16)].float()


def timings(bench: Bench, contestants: Mapping[str, Run], seconds: float = 0.2) -> dict[str, list[float]]:
    """Microseconds of each repetition on the device, cold: in turns, each after the L2 cache was overwritten.

    Writing the buffer takes the device longer than the host takes to enqueue the run behind it, so the host is not
    part of the time.
    """
    cuda = bench.torch.cuda
    # A first round warms up and tells how many repetitions fit.
    once = sum(_round(bench, contestants).values())
    count = int(min(100, max(10, seconds * 1e6 * len(contestants) / max(once, 1.0))))
    rounds = [_round(bench, contestants) for _ in range(count)]
    cuda.synchronize()
    return {name: [each[name] for each in rounds] for name in contestants}


def _round(bench: Bench, contestants: Mapping[str, Run]) -> dict[str, float]:
    cuda, events = bench.torch.cuda, {}
    for name, run in contestants.items():
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        bench.flush.zero_()
        begin.record()
        run()
        end.record()
        events[name] = begin, end
    cuda.synchronize()
    return {name: 1e3 * begin.elapsed_time(end) for name, (begin, end) in events.items()}


def back_to_back(bench: Bench, run: Run, count: int = 20) -> float:
    """Microseconds per run of `count` in a row, with whatever the one before left in the cache."""
    cuda = bench.torch.cuda
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    bench.flush.zero_()
    run()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    cuda.synchronize()
    return float(1e3 * begin.elapsed_time(end) / count)


@dataclass(frozen=True)
class Machine:
    """What the device did in this run.

    Attributes:
        flops_per_second: A product of two square bf16 matrices.
        bytes_per_second: A copy, read and written bytes counted.
        launch_us: A graph that does next to nothing, timed like everything else.
    """

    flops_per_second: float
    bytes_per_second: float
    launch_us: float

    def floor_us(self, site: Site) -> float:
        """What a site would need at these rates."""
        flops, moved = site.cost
        return 1e6 * max(flops / self.flops_per_second, moved / self.bytes_per_second)


def measure_machine(bench: Bench) -> Machine:
    """Time a product, a copy and nothing."""
    torch = bench.torch
    free = torch.cuda.mem_get_info()[0]
    size, count = 8192, min(1 << 30, free // 8)
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=bench.device)
    product, one = torch.empty_like(a), torch.zeros(1, device=bench.device)
    source = torch.zeros(count, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source),
                            "nothing": lambda: one.zero_()}  # fmt: skip
    graphs = {name: captured(torch, run).run for name, run in runs.items()}
    us = {name: float(np.median(samples)) for name, samples in timings(bench, graphs).items()}
    return Machine(2 * size**3 / us["product"] * 1e6, 2 * count / us["copy"] * 1e6, us["nothing"])


def enter(name: str, bench: Bench, site: Site, operands: Mapping[str, Any], run: Run) -> Contestant:
    """Check a contestant, then make it ready to be timed.

    Raises:
        Unavailable: its result is wrong.
    """
    error, share = error_of(site, operands, run())
    if not share <= 1:
        raise Unavailable(f"wrong: off by {error:.1e}, {share:.1f} times what rounding explains; not timed")
    if bench.dry:
        return Contestant(run, "once", error)
    if name.startswith("ORT"):  # torch cannot capture what another library allocates
        return Contestant(run, "from the host", error)
    return replace(captured(bench.torch, run), error=error)


def run_case(name: str, bench: Bench, machine: Machine | None) -> dict[str, Any]:
    """Check, then time our kernels and their peers on one site."""
    site = TINY[name] if bench.dry else SITES[name]
    operands = site.operands(bench)
    ready: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    print(f"\ncase {name}: {site}")
    for contestant, make in {OURS: lambda *_: longspan_kernel(site, operands), **PEERS}.items():
        if bench.left <= 0:
            bench.skip(f"case {name}, {contestant}")
            continue
        # LongformerAttention's queries, keys and values are one.
        given = {**operands, "K": operands["Q"], "V": operands["Q"]} if "Longformer" in contestant else operands
        try:
            ready[contestant] = enter(contestant, bench, site, given, make(site, operands, bench))
        except Unavailable as error:
            absent[contestant] = str(error)
        except Exception as error:  # a peer's failure is its own; ours is a wrong result
            absent[contestant] = f"{type(error).__name__}: {error}"[:400]
        if contestant in absent:
            print(f"{contestant:26} {absent[contestant]}")
            bench.wrong += [f"case {name}: {absent[contestant]}"] if contestant == OURS else []
    found: dict[str, Any] = {"site": asdict(site), "absent": absent, "flops": site.cost[0], "bytes": site.cost[1],
                             "errors": {each: ready[each].error for each in ready},
                             "launched": {each: ready[each].launched for each in ready}}  # fmt: skip
    if bench.dry or machine is None:
        for contestant in ready:
            print(f"{contestant:26} error {ready[contestant].error:.1e}, not timed: dry run")
        return found
    samples = timings(bench, {each: ready[each].run for each in ready})
    warm = {each: back_to_back(bench, ready[each].run) for each in ready}
    return found | _report(name, site, samples, warm, bench, machine)


def _report(
    name: str, site: Site, samples: Mapping[str, list[float]], warm: Mapping[str, float], bench: Bench, machine: Machine
) -> dict[str, Any]:
    medians = {each: float(np.median(values)) for each, values in samples.items()}
    floor, ours, ratios = machine.floor_us(site), medians.get(OURS), {}
    print(f"{'':26}{'median us':>11}{'p10':>11}{'p90':>11}{'in a row':>11}{'of floor':>10}{'ratio':>8}")
    for each, values in samples.items():
        low, high = np.percentile(values, (10, 90))
        line = f"{each:26}{medians[each]:11.1f}{low:11.1f}{high:11.1f}{warm[each]:11.1f}{floor / medians[each]:10.0%}"
        if ours is not None and each != OURS:
            ratios[each] = medians[each] / ours
            line += f"{ratios[each]:7.2f}x"
            if each in MUST_RATIO and bench.anchored:
                line += f" (must {MUST_RATIO[each]}x)"
                bench.judge(f"{name}/{each}", ratios[each] >= MUST_RATIO[each])
        print(line)
    print(f"floor {floor:.1f} us, launch {machine.launch_us:.1f} us")
    if ours is not None and site.must and bench.anchored:
        print(f"anchor on an {ANCHOR_DEVICE}: must {site.must[0]} us, stretch {site.must[1]} us")
        bench.judge(f"{name}/time", ours <= site.must[0])
    return {"microseconds": dict(samples), "medians": medians, "back_to_back": dict(warm), "ratios": ratios,
            "floor_us": floor, "floor_share": None if ours is None else floor / ours}  # fmt: skip


def group_sites(group: str, dry: bool) -> dict[str, tuple[Site, dict[str, Any]]]:
    """The sites of an invariant by label, each with what it has beyond its site: an attribute or an optional input."""
    sites = TINY if dry else SITES
    if group == "options":
        options: dict[str, dict[str, Any]] = {"plain": {}, "sinks": {"sinks": True}, "softcap": {"softcap": 50.0},
                                              "padding": {"attn_mask": True}}  # fmt: skip
        return {label: (sites["a"], more) for label, more in options.items()}
    if group == "doubling":
        counts = (1, 2, 4) if dry else (4, 8, 16, 32)
        return {f"{count} blocks": (replace(sites["d"], random=count, others=False), {}) for count in counts}
    if group == "scaling":
        lengths = (32, 64, 96) if dry else (4096, 8192, 16384, 32768, 65536)
        return {f"{length} tokens": (replace(sites["a"], queries=length, keys=length), {}) for length in lengths}
    lengths = (64, 96, 128) if dry else (4096, 32768, 131072)
    return {f"{length} keys": (replace(sites["e"], keys=length), {}) for length in lengths}


def run_group(group: str, bench: Bench) -> dict[str, Any]:
    """Time our kernels on the sites of an invariant."""
    torch, ready = bench.torch, {}
    sites = group_sites(group, bench.dry)
    print(f"\n{group}")
    for label, (site, more) in sites.items():
        operands = site.operands(bench)
        more = dict(more)
        if more.pop("sinks", False):
            operands["sinks"] = torch.zeros(site.heads, dtype=bench.dtype, device=bench.device)
        if more.pop("attn_mask", False):
            operands["attn_mask"] = torch.arange(site.keys, device=bench.device)[None] < site.keys - 8
        run = longspan_kernel(site, operands, **more)
        if not bool(run().isfinite().all()):
            bench.wrong.append(f"{group}, {label}: the result is not finite")
        ready[label] = Contestant(run, "once") if bench.dry else captured(torch, run)
    found: dict[str, Any] = {"labels": list(sites), "launched": {each: ready[each].launched for each in ready}}
    if bench.dry:
        print(f"{', '.join(ready)}: run, not timed: dry run")
        return found
    samples = timings(bench, {each: ready[each].run for each in ready})
    medians = {each: float(np.median(values)) for each, values in samples.items()}
    ratios = group_ratios(group, medians, [site for site, _ in sites.values()])
    most = {"options": MUST_OPTION, "doubling": MUST_DOUBLE, "scaling": MUST_SLOPE, "cache": MUST_CACHE}[group]
    for label, median in medians.items():
        print(f"{label:26}{median:11.1f} us")
    for label, ratio in ratios.items():
        print(f"{label:40}{ratio:8.3f} (must be at most {most})")
        bench.judge(f"{group}/{label}", ratio <= most)
    return found | {"microseconds": samples, "medians": medians, "ratios": ratios}


def group_ratios(group: str, medians: Mapping[str, float], sites: list[Site]) -> dict[str, float]:
    """What an invariant bounds: each time over that of the first or of the one before, or the slope over the length."""
    labels, times = list(medians), list(medians.values())
    if group == "scaling":
        return {"slope": float(np.polyfit(np.log([site.keys for site in sites]), np.log(times), 1)[0])}
    if group == "doubling":
        return {f"{labels[i]} / {labels[i - 1]}": times[i] / times[i - 1] for i in range(1, len(times))}
    return {f"{labels[i]} / {labels[0]}": times[i] / times[0] for i in range(1, len(times))}


# ---- program ----


def use_checkout() -> None:
    """Make `longspan` and `tests` those of this checkout, whether or not anything is installed.

    Raises:
        SystemExit: another installation of longspan is imported instead, or the checkout is not whole.
    """
    package = ModuleType("longspan")
    package.__path__ = [str(ROOT)]
    sys.modules["longspan"] = package
    sys.path.insert(0, str(ROOT))
    plugins = importlib.import_module("longspan.plugins")
    if plugins.__file__ is None or not Path(plugins.__file__).resolve().is_relative_to(ROOT):
        raise SystemExit(
            f"error: longspan.plugins is {plugins.__file__}, not this checkout's; next step: run this file with a "
            "Python that longspan is not installed for"
        )
    if not (ROOT / "tests" / "plugins" / "kernel_agreement.py").is_file():
        raise SystemExit("error: tests/plugins is not beside benchmarks/; next step: run this file from a checkout")


def environment(torch: Any, dry: bool) -> dict[str, Any]:
    """Device, driver, versions and commit; what cannot be found out is None."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def said(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=ROOT)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None

    packages = ("torch", "triton", "numpy", "flash-attn", "flash-attn-3", "onnxruntime-gpu", "onnxruntime")
    found = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": said("git", "rev-parse", "HEAD"),
        "versions": {package: version(package) for package in packages},
    }
    if dry:
        return found | {"device": None}
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    return found | {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size, "query": query,
        "nvidia_smi": said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"),
    }  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    first = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--run", default=",".join(STAGES), metavar="STAGE,…", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--match", default="", help="just the features whose name holds this text")
    parser.add_argument("--budget", type=float, default=450, help="seconds for everything (default 450)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 12), help="processes of the features")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu_attention_DEVICE.json")
    parser.add_argument("--strict", action="store_true", help="exit 1 when an anchor is missed")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny shapes, interpreted, nothing timed")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.run = options.run.split(",")
    strange = sorted(set(options.run) - set(STAGES))
    if strange:
        parser.error(f"--run: no stage {', '.join(strange)}; there are: {', '.join(STAGES)}")
    if options.jobs < 1 or options.budget <= 0:
        parser.error("--jobs and --budget must be positive")
    return options


def no_device(torch: Any) -> str:
    """Why nothing can be run, or ""."""
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", which is built without CUDA")
        return f"no CUDA device ({built}): nothing was run, nothing was measured; --dry-run needs none"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        wanted, got = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        return f"{torch.cuda.get_device_name()} has compute capability {got}: the kernels need {wanted} or more"
    return ""


def run_all(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Run the stages chosen, as far as the budget goes."""
    results: dict[str, Any] = {}
    timed = [stage for stage in options.run if stage != "features"]
    if "features" in options.run:
        results["features"] = run_features(bench, options.jobs, 0.5 if timed else 1.0)
    machine = None
    if timed and not bench.dry:
        machine = measure_machine(bench)
        results["machine"] = asdict(machine)
        print(f"\nbf16 product {machine.flops_per_second / 1e12:.0f} TFLOP/s, copy "
              f"{machine.bytes_per_second / 1e12:.2f} TB/s, empty graph {machine.launch_us:.1f} us")  # fmt: skip
    for stage in timed:
        if bench.left <= 0:
            bench.skip(stage)
            continue
        try:
            results[stage] = run_group(stage, bench) if stage in GROUPS else run_case(stage, bench, machine)
        except Exception as error:  # the stages after it still count
            bench.wrong.append(f"{stage}: {type(error).__name__}: {error}"[:400])
            print(bench.wrong[-1])
        if not bench.dry:
            bench.torch.cuda.empty_cache()
    return results


def main(arguments: list[str]) -> int:
    """Run the program; returns the exit code."""
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        print(f"{error}: torch, triton and numpy are needed; nothing was run", file=sys.stderr)
        return NO_DEVICE
    reason = "" if options.dry_run else no_device(torch)
    if reason:
        print(reason, file=sys.stderr)
        return NO_DEVICE
    use_checkout()
    device, dtype = ("cpu", torch.float16) if options.dry_run else ("cuda", torch.bfloat16)
    passed = ("--match", options.match, *(["--dry-run"] if options.dry_run else []))
    deadline = time.monotonic() + options.budget
    if not options.dry_run:
        torch.cuda.set_stream(torch.cuda.Stream())
    bench = Bench(torch, device, dtype, deadline, options.dry_run, options.match, arguments=passed)
    if options.shard:
        return run_shard(options.shard, bench)
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu_attention.py", *arguments]), "dry_run": options.dry_run,
        "type": str(dtype).removeprefix("torch."), **environment(torch, options.dry_run),
    }  # fmt: skip
    begin = time.monotonic()
    with torch.no_grad():
        results |= run_all(options, bench)
    results |= {"seconds": round(time.monotonic() - begin, 1), "wrong": bench.wrong, "not_run": bench.not_run,
                "anchors_missed": bench.missed if bench.anchored else None}  # fmt: skip
    print(
        f"\nwrong: {len(bench.wrong)}; not run: {len(bench.not_run)}; anchors missed: "
        f"{(', '.join(bench.missed) or 'none') if bench.anchored else f'not judged, they are for an {ANCHOR_DEVICE}'}"
    )
    out = options.json
    if out is None and not options.dry_run:
        slug = re.sub(r"[^a-z0-9]+", "_", results["device"].lower()).strip("_")
        out = ROOT / "benchmarks" / "results" / f"gpu_attention_{slug}.json"
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    if bench.wrong or (options.strict and bench.missed):
        return WRONG
    return INCOMPLETE if bench.not_run else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
