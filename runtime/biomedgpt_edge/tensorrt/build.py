"""Builds the engines of a bundle: its standard graphs, derived for that, through TensorRT's parser and builder."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..available_memory import available_memory
from ..bundle import Bundle
from ..cuda import Device, find_device
from ..device_cache import Verify, cache_folder
from ..errors import OptionError, PlatformError, UnsupportedGraphError
from ..manifest import DerivedGraph
from ..memory import LEAST_POSITIONS, mebibytes
from ..portable import Derivation, derived_graph, forget, of_standard
from .inspection import Layer, read_layers
from .library import TensorRt, capability_of, load_tensorrt, require_capability
from .profiles import Profile, decoder_profiles, molecule_profiles, protein_profiles
from .store import Engines, Key, building, new_engines, stored_engines

# Of the machine's memory while an engine is built, without the pages of files: the library, and so many times the
# weights; once more where the library has no streams to write an engine to. Measured with TensorRT for RTX 1.7: 8,601
# MiB for the 3,251 MiB of a 7B.
_BASE_BYTES = 320 * 2**20
_TIMES_WEIGHTS = 2.7
# An engine has the weights of its graph once, whatever the number of profiles, and kernels.
_KERNEL_BYTES = 32 * 2**20
GPU = "gpu"
_SECONDS_BETWEEN_LINES = 5.0
_STREAMED = "build_serialized_network_to_stream"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """For what engines are built.

    Attributes:
        device: in the key of the engines; see :class:`Key`.
        capability: such as "8.9".
        gpu: the one of this machine, None where another one's are built.
    """

    library: TensorRt
    device: str
    capability: str
    gpu: Device | None

    @property
    def description(self) -> str:
        """For people."""
        what = f"compute capability {self.capability}" if self.gpu is None else f"{self.gpu.name} ({self.capability})"
        return f"{what}, with {self.library.name}"


def find_target(device: str = GPU) -> Target:
    """The GPU of this machine, or a compute capability such as ``sm89``.

    Raises:
        PlatformError: there is no TensorRT, or no GPU.
        OptionError: the library does not run on that.
    """
    if device != GPU:
        # Only that one builds for GPUs that are elsewhere.
        library = load_tensorrt("tensorrt_rtx") if _installed("tensorrt_rtx") else load_tensorrt()
        capability = capability_of(device, library)
        return Target(library, capability, capability, None)
    library, gpu = load_tensorrt(), find_device()
    require_capability(gpu.capability, library)
    # Those of tensorrt are for one model of GPU, those of tensorrt_rtx for a compute capability.
    name = gpu.capability if library.flavour == "tensorrt_rtx" else f"{gpu.capability} {gpu.name}"
    return Target(library, name, gpu.capability, gpu)


def _installed(flavour: Any) -> bool:
    try:
        load_tensorrt(flavour)
    except PlatformError:
        return False
    return True


@dataclass(frozen=True)
class Part:
    """An engine to be built."""

    derivation: Derivation
    profiles: list[Profile]

    @property
    def name(self) -> str:
        """Of its file, and for people."""
        return self.derivation.part.replace(" ", "_")

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.derivation.derived.data_size

    def peak_memory(self, library: TensorRt) -> int:
        """Bytes of this machine's memory while it is built."""
        times = _TIMES_WEIGHTS if hasattr(library.api.Builder, _STREAMED) else _TIMES_WEIGHTS + 1
        return int(_BASE_BYTES + times * self.weights)


@dataclass(frozen=True)
class Plan:
    """What building takes.

    Attributes:
        context: positions of a KV cache.
    """

    bundle: Bundle
    target: Target
    context: int
    parts: tuple[Part, ...]

    @property
    def key(self) -> Key:
        """Of the engines."""
        return Key.of(self.bundle, self.target.library, self.target.device, self.context)

    @property
    def peak_memory(self) -> int:
        """Bytes of this machine's memory; one engine is built after the other."""
        return max(part.peak_memory(self.target.library) for part in self.parts)

    @property
    def disk(self) -> int:
        """Bytes in the device cache: the engines, and the weights of the one that is being built."""
        return sum(part.weights + _KERNEL_BYTES for part in self.parts) + max(part.weights for part in self.parts)

    @property
    def gpu_memory(self) -> int:
        """Bytes of the GPU's memory that one answer needs: engines and a KV cache."""
        spec = self.bundle.manifest.decoder
        kv = 2 * 2 * spec.layers * spec.kv_heads * spec.head_size * self.context
        return sum(part.weights + _KERNEL_BYTES for part in self.parts) + kv

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"engines for {self.target.description}, {self.context:,} positions",
            f"will take {mebibytes(self.peak_memory)} of memory, {mebibytes(self.disk)} in {cache_folder()}, and "
            f"{mebibytes(self.gpu_memory)} on the GPU when they run",
        ]

    def require_room(self) -> None:
        """Refuses what this machine is too small for, before anything is built.

        Raises:
            PlatformError: too little memory here or on the GPU, or too little room in the device cache.
        """
        available = available_memory()
        if available is not None and available < self.peak_memory:
            raise PlatformError(
                f"building takes {mebibytes(self.peak_memory)} of memory, and {mebibytes(available)} are available.",
                seen=available,
                limit=self.peak_memory,
                remedy="Close other programs, or use --device cuda, which builds nothing.",
            )
        gpu = self.target.gpu
        if gpu is not None and gpu.memory < self.gpu_memory:
            raise PlatformError(
                f"the engines and a KV cache take {mebibytes(self.gpu_memory)}, and the {gpu.name} has "
                f"{mebibytes(gpu.memory)}.",
                seen=gpu.memory,
                limit=self.gpu_memory,
                remedy="Give fewer positions (--context), or a bundle of a smaller model.",
            )
        folder = cache_folder()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self.disk:
            raise PlatformError(
                f"building takes {mebibytes(self.disk)} in {folder}, where {mebibytes(free)} are free.",
                seen=free,
                limit=self.disk,
                remedy="Free some space ('biomedgpt-edge cache clear'), or set BIOMEDGPT_EDGE_CACHE to another disk.",
            )


def plan_engines(bundle: Bundle, target: Target, context: int | None = None) -> Plan:
    """What has to be built for ``bundle``.

    Args:
        context: positions of a KV cache; left out, those of the model.

    Raises:
        OptionError: the bundle holds no graphs for TensorRT, or ``context`` is out of range.
    """
    spec = bundle.manifest.decoder
    positions = spec.context if context is None else context
    if not LEAST_POSITIONS <= positions <= spec.context:
        raise OptionError(
            f"context is {positions}.",
            seen=positions,
            limit=f"{LEAST_POSITIONS} to {spec.context}",
            remedy="Leave it out for the model's own.",
        )
    derivations = of_standard(bundle)
    manifest = bundle.manifest
    there = {
        "decoder": spec,
        "molecule encoder": manifest.molecule_encoder,
        "protein encoder": manifest.protein_encoder,
    }
    lacking = [part for part, one in there.items() if one is not None and one.standard is None]
    if lacking:
        raise OptionError(
            f"{bundle.path} holds no standard graph, for TensorRT, of its {' and '.join(lacking)}.",
            seen=bundle.manifest.precision,
            remedy="Export it with this version and precision int4 or fp16, or add them with 'biomedgpt-export "
            "relayout' on a workstation.",
        )
    profiles = {
        "decoder": decoder_profiles(spec, positions),
        "molecule encoder": molecule_profiles(positions),
        "protein encoder": protein_profiles(),
    }
    return Plan(bundle, target, positions, tuple(Part(one, profiles[one.part]) for one in derivations))


def engines_for(plan: Plan, verify: Verify, report: Report, *, again: bool = False) -> Engines:
    """Those that were built before, or new ones.

    Args:
        again: build them in any case.

    Raises:
        PlatformError: see :meth:`Plan.require_room`; TensorRT fails; or the cache cannot be written.
        UnsupportedGraphError: it does not know something in a graph; named.
    """
    found = None if again else stored_engines(plan.key, verify)
    if found is not None:
        return found
    try:
        with building(plan.key):
            # Another process may have built them meanwhile.
            found = None if again else stored_engines(plan.key, verify)
            if found is None:
                _build_all(plan, report)
                found = stored_engines(plan.key, "sizes")
    except OSError as error:
        raise PlatformError(
            f"engines cannot be kept in {plan.key.folder.parent}: {error.strerror or error}.",
            seen=str(plan.key.folder.parent),
            remedy="Set BIOMEDGPT_EDGE_CACHE to a writable folder.",
        ) from error
    if found is None:
        raise PlatformError("the engines that were built are gone.", remedy="Try again; keep the device cache.")
    return found


def _build_all(plan: Plan, report: Report) -> None:
    for line in plan.lines():
        report(line)
    plan.require_room()
    # Before minutes are spent on one, all of them are known to be understood.
    for part in plan.parts:
        derived = part.derivation.derived
        require_supported(plan.target.library, plan.bundle.file(derived.graph), derived)
    with new_engines(plan.key) as folder:
        for part in plan.parts:
            started = time.perf_counter()
            report(f"{part.derivation.part}: unpacking {mebibytes(part.weights)}")
            graph = derived_graph(part.derivation, "once")
            try:
                build_engine(plan.target, graph, part.profiles, folder / f"{part.name}.engine", plan.context, report)
            finally:
                forget(part.derivation)
            report(f"{part.derivation.part}: built in {time.perf_counter() - started:.0f} s")


def require_supported(library: TensorRt, graph: Path, derived: DerivedGraph) -> None:
    """Whether the parser takes every node of ``graph``; its weights need not be there.

    Raises:
        UnsupportedGraphError: not; names the nodes.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / graph.name
        shutil.copyfile(graph, copy)
        # Zeros that take no room stand for the weights.
        with copy.with_name(derived.data).open("wb") as data:
            data.truncate(derived.data_size)
        library.messages.begin()
        parser, _ = _parser(library)
        if not parser.parse_from_file(str(copy)):
            raise _refused(library, parser, graph)


def _parser(library: TensorRt) -> tuple[Any, Any]:
    """A parser, and what it belongs to, which has to outlive it."""
    api = library.api
    builder = api.Builder(library.logger)
    typed = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    return api.OnnxParser(network, library.logger), (builder, network)


def build_engine(
    target: Target, graph: Path, profiles: Sequence[Profile], out: Path, context: int, report: Report
) -> list[Layer]:
    """Builds one engine and writes it to ``out``; returns its layers.

    Args:
        context: of the KV cache in the graph, where it has one.

    Raises:
        UnsupportedGraphError: the parser refuses the graph; names the nodes.
        PlatformError: the builder fails.
    """
    library, api = target.library, target.library.api
    library.messages.begin()
    parser, (builder, network) = _parser(library)
    if not parser.parse_from_file(str(graph)):
        raise _refused(library, parser, graph)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name.startswith("past_"):
            batch, heads, _, size = tensor.shape
            tensor.shape = (batch, heads, context, size)
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    # Memory that an engine takes while it runs would keep it out of CUDA graphs.
    if hasattr(api.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)
    monitor = _monitor(api, lambda line: report(f"{out.stem}: {line}"))
    config.progress_monitor = monitor
    if target.gpu is None:
        config.num_compute_capabilities = 1
        name = f"SM{target.capability.replace('.', '')}"
        config.set_compute_capability(api.ComputeCapability.__members__[name], 0)
    for profile in profiles:
        added = builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            added.set_shape(name, *shapes)
        config.add_optimization_profile(added)
    with out.open("xb") as file, _interrupting(monitor):
        built = _build(api, builder, network, config, file)
    if monitor.error is not None:
        raise monitor.error
    if not built:
        raise PlatformError(
            f"{library.name} cannot build {graph.name}: {'; '.join(library.messages.errors[-2:]) or 'it says no why'}.",
            seen=library.messages.errors[-2:],
            remedy="Free memory, update TensorRT, or use --device cuda.",
        )
    return read_layers(library.messages.layers)


@contextlib.contextmanager
def _interrupting(monitor: Any) -> Iterator[None]:
    """Ctrl-C ends a build at its next step: the exception would be lost in whatever the library calls just then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: object) -> None:
        monitor.error = KeyboardInterrupt()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _build(api: Any, builder: Any, network: Any, config: Any, file: BinaryIO) -> bool:
    """Writes an engine to ``file``, piece by piece where the library can: whole, it lies in memory once more.

    Raises:
        OSError: it cannot be written.
    """
    if hasattr(builder, _STREAMED):
        writer = _writer(api, file)
        built = bool(builder.build_serialized_network_to_stream(network, config, writer))
        # The library goes on where a piece could not be written.
        if writer.error is not None:
            raise writer.error
        return built
    whole = builder.build_serialized_network(network, config)
    if whole is not None:
        file.write(memoryview(whole))
    return whole is not None


def _writer(api: Any, file: BinaryIO) -> Any:
    base = api.IStreamWriter

    class Writer(base):  # type: ignore[misc, valid-type]
        """What the builder writes to."""

        def __init__(self) -> None:
            base.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # No exception may cross the library.
            try:
                return file.write(data) if self.error is None else 0
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def _refused(library: TensorRt, parser: Any, graph: Path) -> UnsupportedGraphError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [
        f"{error.node_name() or 'a tensor'} ({error.node_operator() or 'no node'}): {error.desc()}" for error in errors
    ]
    return UnsupportedGraphError(
        f"{library.name} does not take {graph.name}: {'; '.join(found[:4]) or 'no reason given'}.",
        seen=[error.node_name() for error in errors][:8],
        remedy="Use a newer TensorRT, or --device cuda.",
    )


def _monitor(api: Any, tell: Report) -> Any:
    base = api.IProgressMonitor

    class Monitor(base):  # type: ignore[misc, valid-type]
        """Tells how far a build is, and ends it where there is a reason to.

        Attributes:
            error: the reason.
        """

        def __init__(self) -> None:
            base.__init__(self)
            self.error: BaseException | None = None
            self._steps = dict[str, int]()
            self._started = self._told = time.monotonic()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            now = time.monotonic()
            if self.error is None and now - self._told >= _SECONDS_BETWEEN_LINES:
                self._told = now
                # No exception may cross the library.
                try:
                    tell(f"{now - self._started:.0f} s, {name.lower()}, {step + 1} of {self._steps.get(name, '?')}")
                except OSError as error:
                    self.error = error
            return self.error is None

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
