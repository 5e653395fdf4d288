"""ONNX Runtime sessions over a bundle's graphs, with its failures turned into typed errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from . import _native
from .errors import BioMedGPTError, BundleCorruptError, PlatformError

_LOG_FATAL_AND_ERRORS = 3
SESSION_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)

_REMEDY = "Run 'biomedgpt-edge verify' on the bundle; if it is whole, update onnxruntime."

_GPU_MARKS = ("CUDA failure", "CUDA error", "CUDNN", "CUBLAS")
_MEMORY_MARKS = ("Failed to allocate memory", "bad_alloc", "BFCArena", "out of memory")

# What it says of a graph that another provider does not take, or that did not start.
_NOT_ALL = "assigned to the default CPU EP"
CPU: tuple[str, Mapping[str, str]] = ("CPUExecutionProvider", {})

# name -> element type and dimensions; None stands for a dimension that varies.
Signature = Mapping[str, tuple[str, Sequence[int | None]]]


def identity(threads: int) -> str:
    """What the bits of a session's results depend on beside the graph and the processor."""
    return f"biomedgpt-edge {_native.__version__}, onnxruntime {ort.__version__}, CPU, {threads} threads"


@contextmanager
def running(graph: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises while it runs ``graph`` into a typed error.

    Raises:
        PlatformError: this machine gave no memory for it.
        BundleCorruptError: the graph fails although it could be loaded.
    """
    try:
        yield
    except (*SESSION_ERRORS, RuntimeError, MemoryError, UnicodeDecodeError) as error:
        raise _failure(f"run {graph}", error) from error


def _failure(what: str, error: Exception) -> BioMedGPTError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, MemoryError) or any(mark in str(error) for mark in _MEMORY_MARKS):
        return PlatformError(
            f"this machine has too little memory to {what}: {reason}.",
            remedy="Close other programs, or ask about fewer or smaller inputs.",
        )
    if any(mark in str(error) for mark in _GPU_MARKS):
        return PlatformError(
            f"the GPU failed to {what}: {reason[:400]}.", remedy="Run 'biomedgpt-edge doctor', and start again."
        )
    return BundleCorruptError(f"ONNX Runtime {ort.__version__} cannot {what}: {reason}.", remedy=_REMEDY)


def open_session(
    path: Path,
    *,
    threads: int,
    inputs: Signature,
    outputs: Signature,
    spinning: bool = True,
    register: Callable[[ort.SessionOptions], None] | None = None,
    provider: tuple[str, Mapping[str, str]] = CPU,
) -> ort.InferenceSession:
    """Opens the graph at ``path`` on the CPU, or by another ``provider`` alone.

    Its signature is compared with what the manifest implies.

    After a run, a session's threads keep their processors busy for a while, waiting for the next one: good for tokens
    that follow one another. Without ``spinning`` they sleep at once and leave the processors to whoever is next.
    ``register`` gives the session operators that ONNX Runtime does not have.

    Raises:
        PlatformError: this machine gave no memory for it, or the provider does not take all of it.
        BundleCorruptError: ONNX Runtime refuses the graph, or its inputs or outputs are not the expected ones.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL_AND_ERRORS
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    # A file called .ort would be read in ONNX Runtime's own format, which onnx_header has not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if register is not None:
        register(options)
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        # There is nothing to fall back to, and trying prints to the terminal.
        session = ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except (*SESSION_ERRORS, RuntimeError, MemoryError, UnicodeDecodeError) as error:
        if provider != CPU and _NOT_ALL in str(error):
            raise PlatformError(
                f"onnxruntime {ort.__version__} does not run all of {path.name} with the {provider[0]}.",
                seen=provider[0],
                remedy="Run 'biomedgpt-edge doctor': the provider may not have started. If all is there, update "
                "onnxruntime-gpu.",
            ) from error
        # UnicodeDecodeError comes from a message that quotes a damaged name.
        raise _failure(f"load {path.name}", error) from error
    for kind, expected, found in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        given = {node.name: (node.type, [d if isinstance(d, int) else None for d in node.shape]) for node in found}
        wanted = {name: (element, list(shape)) for name, (element, shape) in expected.items()}
        if given != wanted:
            wrong = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
            raise BundleCorruptError(
                f"the {kind} {', '.join(wrong[:4])} of {path.name} are not what the manifest implies.",
                seen=wrong[:4],
                remedy="Export the bundle again.",
            )
    return session
