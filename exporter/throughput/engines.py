"""An engine as one of the models that are timed: what it needs, what it takes, and what must be seen to run."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass

from ..bundle import Bundle
from ..devices import CPU, CUDA, PROVIDERS, require_providers
from ..engines.manifest import Engine
from ..engines.onnxruntime.session import CPU_PROVIDER, TENSORRT_PROVIDER, SessionPlan
from ..engines.request import ORT
from ..engines.running.reach import Reach, in_words
from ..engines.running.seen import KERNEL, built_as, fallback, sites_seen
from ..engines.runtimes import RUNTIMES
from ..errors import EnvironmentLacks, FallbackRan, InvalidRequest
from .settings import BenchSettings, resolve_lengths
from .variants import Variant


@dataclass(frozen=True)
class TimedEngine:
    """An engine that can be timed here.

    Attributes:
        engine: The engine.
        variant: How it is run.
        device: Where: ``"cpu"`` or ``"cuda"``.
        others: Why ONNX Runtime cannot run the other variants there; empty where it can.
        notes: What a reader should know.
    """

    engine: Engine
    variant: Variant
    device: str
    others: str
    notes: tuple[str, ...]


def timed_engine(bundle: Bundle, name: str, require_kernel: bool = False) -> TimedEngine:
    """Open an engine once, so that whatever it lacks is said before anything is measured.

    Args:
        bundle: The bundle.
        name: Of the engine.
        require_kernel: Refuse an engine without our kernel at every site.

    Raises:
        InvalidRequest: there is no such engine, or it has no weights.
        BundleCorrupted: its files are damaged.
        EnvironmentLacks: what it needs is missing here.
        FallbackRan: `require_kernel`, and something else runs at a site.
    """
    engine = Engine.open(bundle, name)
    timed = _ort(engine) if engine.manifest.target == ORT else _tensorrt(engine)
    reason = fallback(engine.manifest, built_as(engine.manifest)) if require_kernel else ""
    if not reason and require_kernel and timed.variant.kernel_nodes != len(engine.manifest.sites):
        reason = f"plugin layers are seen at {timed.variant.kernel_nodes} of {len(engine.manifest.sites)} sites"
    if reason:
        raise FallbackRan(f"--engine {engine.name}: --require-kernel: {reason}")
    return timed


def _ort(engine: Engine) -> TimedEngine:
    plan = SessionPlan.from_dict(engine.manifest.session)
    first = plan.providers[0].name
    require_providers([provider.name for provider in plan.providers])
    lowerings = built_as(engine.manifest).values()
    kernels = 0 if first == TENSORRT_PROVIDER else sum(1 for lowering in lowerings if lowering == KERNEL)
    variant = Variant("engine", engine.file, kernel_nodes=kernels, engine=engine.path, provider=first)
    device = CPU if first == CPU_PROVIDER else CUDA
    return TimedEngine(engine, variant, device, _missing(device), (_described(engine, first),))


def _tensorrt(engine: Engine) -> TimedEngine:
    from ..engines.running.requirements import require_runnable
    from ..engines.running.runners import start_process

    fitting = require_runnable(engine)
    process, opened = start_process(engine, fitting)
    process.close()
    seen = sites_seen(engine.manifest, opened["layers"])
    variant = Variant(
        "engine",
        engine.file,
        library=None if fitting.library is None else str(fitting.library),
        kernel_nodes=sum(1 for ran in seen.values() if ran == KERNEL),
        engine=engine.path,
        module=fitting.module,
        provider=fitting.module,
    )
    where = f"{RUNTIMES[engine.manifest.target].title} {process.version} on {fitting.gpu.name}"
    return TimedEngine(engine, variant, CUDA, _missing(CUDA), (_described(engine, where), *fitting.notes))


def _described(engine: Engine, where: str) -> str:
    lowerings = collections.Counter(built_as(engine.manifest).values())
    sites = ", ".join(f"{lowering} at {count} sites" for lowering, count in sorted(lowerings.items()))
    return f"engine {engine.name}: {where}, {engine.manifest.dtype}, {sites}"


def _missing(device: str) -> str:
    try:
        require_providers(PROVIDERS[device])
    except EnvironmentLacks as error:
        return str(error)
    return ""


def settings_for(settings: BenchSettings, bundle: Bundle, timed: TimedEngine) -> tuple[BenchSettings, str]:
    """Settings that an engine takes, and what it leaves out of the default lengths; empty where it takes them all.

    Raises:
        InvalidRequest: the batch, or a length that the user gave, lies outside its optimization profiles.
    """
    manifest, profiles = bundle.manifest, timed.engine.manifest.profiles
    settings = dataclasses.replace(settings, providers=PROVIDERS[timed.device], engine=timed.engine.name)
    lengths = resolve_lengths(settings, manifest)
    if not profiles:
        return dataclasses.replace(settings, lengths=lengths), ""
    reaches = [Reach.of(profile, manifest) for profile in profiles]
    fitting = [reach for reach in reaches if reach.batches[0] <= settings.batch <= reach.batches[1]]
    if not fitting:
        rows = in_words(reaches, lambda reach: reach.batches)
        raise InvalidRequest(f"--batch {settings.batch}: the engine takes {rows} rows")
    inside = tuple(length for length in lengths if any(reach.holds(length) for reach in fitting))
    beyond = [length for length in lengths if length not in inside]
    tokens = in_words(fitting, lambda reach: reach.lengths)
    if settings.lengths and beyond:
        raise InvalidRequest(
            f"--lengths {', '.join(map(str, beyond))}: the engine takes {tokens} tokens with a batch of "
            f"{settings.batch}"
        )
    note = f"the engine takes {tokens} tokens, so {', '.join(map(str, beyond))} were not measured" if beyond else ""
    own = inside or tuple(sorted({length for reach in fitting for length in reach.own_lengths}))
    return dataclasses.replace(settings, lengths=own), note
