"""Compare every attention site of a model: where an error begins.

The output of each site is taken from the float64 oracle, where each call of a longspan torch op is recorded, and from
each way through the runtime, where the outputs of the sites' nodes, and of no others, become outputs of a copy of the
graph. Marking every tensor, as is usual, takes the memory of a whole run at once and stops the runtime from fusing
anything; the sites alone are a small part, and the nodes around them stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from ...plugins.definition import DOMAIN
from ..bundle import Bundle
from ..sites.record import AttentionSite
from .cases import Case
from .comparison import infer
from .errors_between import Array, measure
from .inputs import Feed
from .judging import judge_output
from .report import Judged, OutputReport, SitesReport
from .runners import RuntimePath, TorchRunners, open_session
from .tolerances import Overrides, Scale

if TYPE_CHECKING:
    import onnx


class _Recorder(TorchDispatchMode):
    """Keeps the first output of every longspan op, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Array] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == DOMAIN:
            first = result[0] if isinstance(result, (tuple, list)) else result
            # numpy has no bfloat16 of torch's; a copy, because the model may go on writing into its own tensor.
            self.calls.append((first.float() if first.itemsize < 4 else first).detach().cpu().numpy().copy())
        return result


@contextlib.contextmanager
def recorded() -> Iterator[list[Array]]:
    """The first output of each longspan op that torch calls inside the context; float64 calls stay float64."""
    with _Recorder() as recorder:
        yield recorder.calls


def expose(bundle: Bundle) -> tuple[bytes, dict[str, str]]:
    """The bundle's graph with the output of every site among its outputs, and their names by node.

    Weights beside the file are not read; a session finds them with `open_session(…, weights=…)`.
    """
    import onnx

    model = onnx.load(bundle.model_path, load_external_data=False)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    nodes = {node.name: node for node in model.graph.node}
    names = {site.node: nodes[site.node].output[0] for site in bundle.manifest.sites}
    present = {value.name for value in model.graph.output}
    for name in names.values():
        if name not in present:
            model.graph.output.append(known.get(name) or _of_type(name, model))
    return model.SerializeToString(), names


def _of_type(name: str, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """A value of the model's own floating-point type, for a graph that does not record its types."""
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    kinds = [weight.data_type for weight in model.graph.initializer if weight.data_type in floats]
    return onnx.helper.make_tensor_value_info(name, kinds[0] if kinds else onnx.TensorProto.FLOAT, None)


def compare_sites(
    bundle: Bundle, torch: TorchRunners, paths: Sequence[RuntimePath], case: Case, feed: Feed, failing: Sequence[str]
) -> SitesReport:
    """Compare every site in one case by each path that runs.

    Args:
        bundle: The bundle.
        torch: The model in torch; its runners must be active.
        paths: Ways through the runtime.
        case: What `feed` is.
        feed: The inputs.
        failing: Names of the paths whose model outputs are beyond their tolerance in this case.
    """
    sites = bundle.manifest.sites
    with recorded() as oracle:
        infer(torch.oracle, feed)
    if len(oracle) != len(sites):
        why = f"torch called {len(oracle)} longspan operators, the graph has {len(sites)}: they cannot be told apart"
        return SitesReport(case, (), {path.name: why for path in paths if path.runner is not None})
    with recorded() as own:
        infer(torch.own, feed)
    graph, names = expose(bundle)
    got: dict[str, dict[str, Array]] = {}
    notes: dict[str, str] = {}
    for path in paths:
        if path.runner is None:
            continue
        try:
            session = open_session(graph, path.library, device=path.device, weights=bundle.path.absolute())
            wanted = [names[site.node] for site in sites]
            got[path.name] = dict(zip((site.node for site in sites), session.run(wanted, feed), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            notes[path.name] = f"ONNX Runtime: {str(error).strip().splitlines()[0]}"
    outputs = tuple(
        _compare(site, index, case, torch.width, sites, oracle[index], own[index], got)
        for index, site in enumerate(sites)
    )
    report = SitesReport(case, outputs, notes)
    for name in failing:
        if name in got and report.first_off(name) is None:
            notes[name] = (
                "every site is within its tolerance, so the error arises behind the last one or between them; "
                "polygraphy run --onnxrt --onnx-outputs names the node"
            )
    return report


def _compare(
    site: AttentionSite,
    index: int,
    case: Case,
    width: int,
    sites: Sequence[AttentionSite],
    oracle: Array,
    own: Array,
    got: dict[str, dict[str, Array]],
) -> OutputReport:
    finite = np.isfinite(oracle)
    where = None if finite.all() else finite
    scale = Scale.of(sites, width, case.length)
    dtype = next((str(outputs[site.node].dtype) for outputs in got.values()), "float32")
    report = OutputReport(
        name=site.node,
        dtype=dtype,
        magnitude=float(np.abs(oracle, where=finite, out=np.zeros_like(oracle)).max(initial=0.0)),
        torch_error=measure(own, oracle, where).max_abs,
        terms=scale.terms,
        # Only the sites up to this one have rounded.
        depth=index + 1,
        lowering={path: Judged(measure(outputs[site.node], oracle, where), 0.0) for path, outputs in got.items()},
        approximation=None,
    )
    return judge_output(report, Overrides())
