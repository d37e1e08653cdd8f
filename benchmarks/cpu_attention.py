"""Time the CPU kernels against their floor and their peers, in one process.

The floor is the time that torch's sgemm would need for the same floating-point operations, measured in this very run.
All contestants run with the same number of threads; their repetitions are interleaved, so that a machine that is busy
or changes its clock hits all alike. Results are compared with the float64 reference before anything is timed.

On a busy machine wall-clock time says little: a product that waits for its slowest thread suffers more than a kernel
that hands out small tasks. The share of the floor is therefore given in processor time as well, against sgemm on one
thread.

    python benchmarks/cpu_attention.py                  # all of these: cases a, b, d and layout, what options and
                                                        # twice the blocks cost, scaling with the length
    python benchmarks/cpu_attention.py --case a --quick
    python benchmarks/cpu_attention.py --case c --slow --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cpu_block_sparse
import cpu_contest
import numpy as np
from cpu_contest import (
    MUST_FLOOR,
    ONE_THREAD,
    Array,
    Floor,
    Run,
    compare_options,
    interleave,
    node_session,
    record,
    sgemm,
    table,
)
from longspan.exporter.throughput.machine import describe_machine
from longspan.plugins.sliding_window_attention.definition import Attributes, cost, infer_shapes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention
from onnx import helper

SCALING_LENGTHS = (4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Site:
    """Sizes and window of one attention layer, float32."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    size: int
    left: int
    right: int
    causal: bool = False

    def attributes(self, **more: Any) -> dict[str, Any]:
        """Attributes of the node."""
        window = {"left_window_size": self.left, "right_window_size": self.right, "is_causal": int(self.causal)}
        return window | more

    def operands(self) -> dict[str, Array]:
        """Random Q, K and V."""
        rng = np.random.default_rng(0)
        heads = {"Q": self.heads, "K": self.kv_heads, "V": self.kv_heads}
        return {
            name: rng.standard_normal((self.batch, count, self.length, self.size), dtype=np.float32)
            for name, count in heads.items()
        }

    def flops(self) -> int:
        """Floating-point operations of the pairs inside the window."""
        query = (self.batch, self.heads, self.length, self.size)
        key = (self.batch, self.kv_heads, self.length, self.size)
        attributes = Attributes.from_mapping(self.attributes())
        return cost(infer_shapes({"Q": query, "K": key, "V": key}, attributes), attributes).flops


SITES = {
    "a": Site(1, 12, 12, 4096, 64, 256, 256),
    "b": Site(8, 12, 12, 4096, 64, 256, 256),
    "c": Site(1, 32, 8, 32768, 128, 4095, 0, causal=True),
    "tiny": Site(1, 4, 2, 300, 32, 32, 32),  # no anchor: whether this program works
}
MUST_RATIO = {"flex_attention": 1.9, "GroupQueryAttention": 4.0}
MUST_SLOPE = 1.05
OTHERS = ("options", "block-options", "doubling", "scaling")
DEFAULT = ("a", "b", "d", "layout", *OTHERS)


def kernel(operands: Mapping[str, Array], attributes: Mapping[str, Any], threads: int, **optional: Array) -> Run:
    """The operator through ONNX Runtime."""
    return cpu_contest.kernel("SlidingWindowAttention", {**operands, **optional}, attributes, threads)


def group_query_attention(site: Site, operands: Mapping[str, Array], threads: int) -> Run:
    """ONNX Runtime's own kernel: causal, with as many keys per query as the window has."""
    keys = site.left + site.right + (1 if site.causal else 0)
    feeds: dict[str, Array] = {
        name: array.transpose(0, 2, 1, 3).reshape(site.batch, site.length, -1) for name, array in operands.items()
    }
    feeds["last"] = np.full(site.batch, site.length - 1, np.int32)
    feeds["total"] = np.array(site.length, np.int32)
    node = helper.make_node(
        "GroupQueryAttention",
        ["Q", "K", "V", "", "", "last", "total"],
        ["Y", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=site.heads,
        kv_num_heads=site.kv_heads,
        local_window_size=keys,
    )
    run = node_session(node, {name: np.ascontiguousarray(array) for name, array in feeds.items()}, threads, False)
    split = (site.batch, site.length, site.heads, site.size)
    return lambda: run().reshape(split).transpose(0, 2, 1, 3)  # a view


def _window(site: Site) -> Callable[..., Any]:
    right = 0 if site.causal else site.right
    return lambda _b, _h, q, k: (k >= q - site.left) & (k <= q + right)


def flex_attention(site: Site, operands: Mapping[str, Array], threads: int) -> Run:
    """Torch's block-sparse attention, compiled."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(operands[name]) for name in ("Q", "K", "V")]
    mask = create_block_mask(_window(site), None, None, site.length, site.length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = tensors
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=site.heads != site.kv_heads).numpy()


def dense_attention(site: Site, operands: Mapping[str, Array]) -> Run:
    """Torch's dense attention with the window as a mask."""
    import torch

    tensors = [torch.from_numpy(operands[name]) for name in ("Q", "K", "V")]
    index = torch.arange(site.length)
    mask = _window(site)(0, 0, index[:, None], index[None, :])
    q, k, v = tensors
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, attn_mask=mask, enable_gqa=site.heads != site.kv_heads).numpy()


def check(site: Site, operands: Mapping[str, Array], contestants: Mapping[str, Run]) -> dict[str, float]:
    """Largest error of each contestant on some rows; the reference of a row is dense attention over its own window."""
    rows = np.unique(np.linspace(0, site.length - 1, 24).astype(int))
    right = 0 if site.causal else site.right
    want = {}
    for row in rows:
        keys = slice(max(0, row - site.left), row + right + 1)
        want[row] = sliding_window_attention(
            operands["Q"][:, :, row : row + 1],
            operands["K"][:, :, keys],
            operands["V"][:, :, keys],
            attributes=Attributes(),
        )[0]
    errors = {}
    for name, run in contestants.items():
        got = run()
        errors[name] = max(float(np.abs(got[:, :, row : row + 1] - want[row]).max()) for row in rows)
        # Scores are sums of `size` products of normals, about N(0, 1) after scaling; outputs are means of normals.
        if not errors[name] < 1e-5:
            raise SystemExit(f"{name}: error {errors[name]:.1e} against the reference, allowed 1e-5; nothing was timed")
    return errors


def run_case(name: str, threads: int, repetitions: int, quick: bool) -> dict[str, Any]:
    """Time one case of the anchors and print the ratios."""
    site = SITES[name]
    operands = site.operands()
    contestants: dict[str, Run] = {"longspan": kernel(operands, site.attributes(), threads)}
    if not quick:
        contestants["flex_attention"] = flex_attention(site, operands, threads)
        if name == "a":
            contestants["dense SDPA"] = dense_attention(site, operands)
    errors = check(site, operands, contestants)
    if name != "c":
        # Causal only: it and our kernel are compared on a causal window of as many keys.
        causal = replace(site, left=site.left + site.right - 1, right=0, causal=True)
        pair = {
            "GroupQueryAttention": group_query_attention(site, operands, threads),
            "longspan, causal": kernel(operands, causal.attributes(), threads),
        }
        errors |= check(causal, operands, pair)
        contestants |= pair
    timings = interleave({ONE_THREAD: sgemm(1), "sgemm": sgemm(threads), **contestants}, repetitions)
    ours = timings["longspan"]
    floor = Floor.of(site.flops(), timings, "longspan")
    print(f"\ncase {name}: {site}")
    table(timings, errors)
    print(floor)
    verdicts = {"floor": floor.floor_share >= MUST_FLOOR}
    ratios = {}
    for peer in [peer for peer in timings if peer not in (ONE_THREAD, "sgemm", "longspan", "longspan, causal")]:
        mine = timings.get("longspan, causal", ours) if peer == "GroupQueryAttention" else ours
        ratios[peer] = timings[peer].best / mine.best
        must = MUST_RATIO.get(peer) if name == "a" else None
        if must is not None:
            verdicts[peer] = ratios[peer] >= must
        wanted = f" (must {must}x)" if must else ""
        print(f"{ratios[peer]:.2f}x {peer}, medians {timings[peer].median / mine.median:.2f}x{wanted}")
    return {
        "site": asdict(site),
        "timings": record(timings),
        "errors": errors,
        **asdict(floor),
        "ratios": ratios,
        "verdicts": verdicts,
    }


def run_options(threads: int, repetitions: int) -> dict[str, Any]:
    """What sinks, a soft cap and padding add to case a."""
    site = SITES["a"]
    operands = site.operands()
    kept = np.ones((1, site.length), bool)
    kept[:, -64:] = False
    contestants = {
        "plain": kernel(operands, site.attributes(), threads),
        "sinks": kernel(operands, site.attributes(), threads, sinks=np.zeros(site.heads, np.float32)),
        "softcap": kernel(operands, site.attributes(softcap=50.0), threads),
        "padding": kernel(operands, site.attributes(), threads, attn_mask=kept),
    }
    return compare_options("case a", contestants, repetitions)


def peak_bytes() -> int:
    """Largest resident size of this process so far (not ru_maxrss, which starts with that of the parent)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: peak memory can be measured on Linux only")


def run_length(length: int, threads: int) -> None:
    """Child process: time one length and print seconds and the bytes that running it added to the peak."""
    site = replace(SITES["a"], length=length)
    tiny = replace(site, length=64)
    kernel(tiny.operands(), tiny.attributes(), threads)()  # the runtime's own memory
    before = peak_bytes()
    run = kernel(site.operands(), site.attributes(), threads)
    seconds = interleave({"run": run}, 5)["run"].best
    added = peak_bytes() - before
    print(json.dumps({"length": length, "seconds": seconds, "peak_bytes": added}))


def run_scaling(threads: int) -> dict[str, Any]:
    """Time and peak memory over the length, each in its own process, and their slopes on logarithmic axes."""
    points = []
    for length in SCALING_LENGTHS:
        command = [sys.executable, str(Path(__file__)), "--length", str(length), "--threads", str(threads)]
        points.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    axis = np.log([point["length"] for point in points])
    slopes = {key: float(np.polyfit(axis, np.log([p[key] for p in points]), 1)[0]) for key in ("seconds", "peak_bytes")}
    print("\nscaling, case a at other lengths")
    for point in points:
        print(f"{point['length']:8} {point['seconds'] * 1e3:9.1f} ms {point['peak_bytes'] / 2**20:8.0f} MiB")
    time_slope, memory_slope = slopes["seconds"], slopes["peak_bytes"]
    print(f"slope of time {time_slope:.3f}, of peak memory {memory_slope:.3f} (must be at most {MUST_SLOPE})")
    return {
        "points": points,
        "slopes": slopes,
        "verdicts": {key: slope <= MUST_SLOPE for key, slope in slopes.items()},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", nargs="+", choices=[*SITES, *cpu_block_sparse.SITES, *OTHERS], help="what to run")
    parser.add_argument("--slow", action="store_true", help="allow case c, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="no torch peers, few repetitions")
    parser.add_argument("--repetitions", type=int, help="of each contestant (default 15, quick 5, case c 3)")
    parser.add_argument("--threads", type=int, default=2, help="of every contestant (default 2)")
    parser.add_argument("--json", type=Path, help="write all samples and ratios here")
    parser.add_argument("--strict", action="store_true", help="exit 1 when an anchor is missed")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.case = options.case or (["a", "d"] if options.quick else list(DEFAULT))
    if "c" in options.case and not options.slow:
        parser.error("case c takes minutes: add --slow")
    return options


def main() -> int:
    options = parse()
    if options.length:
        run_length(options.length, options.threads)
        return 0
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/cpu_attention.py", *sys.argv[1:]]),
        "machine": asdict(describe_machine()),
        "threads": options.threads,
        "load_before": os.getloadavg(),
    }
    repetitions = options.repetitions or (5 if options.quick else 15)
    for name in options.case:
        if name == "options":
            results[name] = run_options(options.threads, repetitions)
        elif name == "block-options":
            results[name] = cpu_block_sparse.run_options(options.threads, repetitions)
        elif name == "doubling":
            results[name] = cpu_block_sparse.run_doubling(options.threads, repetitions)
        elif name == "scaling":
            results[name] = run_scaling(options.threads)
        elif name in cpu_block_sparse.SITES:
            results[name] = cpu_block_sparse.run_case(name, options.threads, repetitions, options.quick)
        else:
            count = min(repetitions, 3) if name == "c" else repetitions
            results[name] = run_case(name, options.threads, count, options.quick)
    results["load_after"] = os.getloadavg()
    missed = [f"{name}/{key}" for name in options.case for key, met in results[name]["verdicts"].items() if not met]
    print(f"\nanchors missed: {', '.join(missed) or 'none'}; load average {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(missed) and options.strict)


if __name__ == "__main__":
    sys.exit(main())
