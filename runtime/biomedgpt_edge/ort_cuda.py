"""ONNX Runtime's CUDA provider: what it needs, what of that is missing, and sessions that run on it or not at all.

Without CUDA's or cuDNN's libraries ONNX Runtime writes a line to its log and runs on the processor. Here that is an
error which names the library and the package that brings it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import build_and_package_info

from .cuda import find_device
from .errors import PlatformError
from .ort_session import Signature, open_session

PROVIDER = "CUDAExecutionProvider"
# Where inputs and outputs are bound.
GPU = ("cuda", 0)
# onnxruntime and onnxruntime-gpu are one module: what uninstalling the first removes, the second has to bring again.
INSTALL = (
    "pip install 'biomedgpt-edge[cuda]' && pip uninstall -y onnxruntime && "
    "pip install --force-reinstall --no-deps onnxruntime-gpu"
)
# By the CUDA version that the provider was built with: what it is linked to or opens by name (onnxruntime-gpu 1.31),
# and the packages of PyPI that bring it; JetPack and the CUDA toolkit bring all but cuDNN and the driver's, too.
_LIBRARIES: Mapping[int, Mapping[str, str]] = {
    13: {
        "libcuda.so.1": "the NVIDIA driver",
        "libcudart.so.13": "nvidia-cuda-runtime",
        "libcublasLt.so.13": "nvidia-cublas",
        "libcublas.so.13": "nvidia-cublas",
        "libcurand.so.10": "nvidia-curand",
        "libcufft.so.12": "nvidia-cufft",
        "libnvrtc.so.13": "nvidia-cuda-nvrtc",
        "libcudnn.so.9": "nvidia-cudnn-cu13",
    },
    12: {
        "libcuda.so.1": "the NVIDIA driver",
        "libcudart.so.12": "nvidia-cuda-runtime-cu12",
        "libcublasLt.so.12": "nvidia-cublas-cu12",
        "libcublas.so.12": "nvidia-cublas-cu12",
        "libcurand.so.10": "nvidia-curand-cu12",
        "libcufft.so.11": "nvidia-cufft-cu12",
        "libnvrtc.so.12": "nvidia-cuda-nvrtc-cu12",
        "libcudnn.so.9": "nvidia-cudnn-cu12",
    },
}


@dataclass(frozen=True)
class Library:
    """One that the provider needs.

    Attributes:
        package: that brings it.
        error: why it cannot be loaded; "" where it can.
    """

    name: str
    package: str
    error: str


def has_provider() -> bool:
    """Whether this build of ONNX Runtime has it."""
    return PROVIDER in ort.get_available_providers()


def built_with() -> str:
    """The CUDA version that the installed build was made with; "" where it has no such provider, or does not say."""
    version: str = getattr(build_and_package_info, "cuda_version", "")
    return version if has_provider() else ""


def cuda_libraries() -> list[Library]:
    """What the provider of the installed build needs; none where there is no provider, or one of an unknown CUDA."""
    known = _LIBRARIES.get(int(built_with().partition(".")[0] or 0), {})
    if known:
        # Packages of PyPI put libraries where the system does not look. It prints what it does not find.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return [Library(name, package, _load_error(name)) for name, package in known.items()]


def _load_error(name: str) -> str:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return ""


def require_cuda() -> None:
    """Raises:
    PlatformError: the provider, a library that it needs, the driver or the GPU is missing; named.
    """
    if not has_provider():
        raise PlatformError(
            f"this onnxruntime ({ort.__version__}) has no CUDA provider.",
            seen=", ".join(ort.get_available_providers()),
            remedy=f"Install the one for GPUs in its place: {INSTALL}.",
        )
    missing = [library for library in cuda_libraries() if library.error]
    if missing:
        names = ", ".join(f"{library.name} ({library.package})" for library in missing)
        raise PlatformError(
            f"onnxruntime's CUDA provider cannot be used, since libraries are missing: {names}.",
            seen=[library.name for library in missing],
            remedy=f"Install the driver, and what it needs: {INSTALL}.",
        )
    find_device()


def open_cuda_session(
    path: Path, *, inputs: Signature, outputs: Signature, stream: int, cuda_graphs: bool = False
) -> ort.InferenceSession:
    """Opens the graph at ``path`` on the first GPU, all of it.

    Args:
        stream: the ``cudaStream_t`` that everything is put into; it has to be there as long as the session.
        cuda_graphs: whether runs with the option ``gpu_graph_id`` become CUDA graphs.

    Raises:
        PlatformError: see :func:`require_cuda`; or the GPU has too little memory.
        BundleCorruptError: see :func:`open_session`.
    """
    require_cuda()
    options: Mapping[str, str] = {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(cuda_graphs)),
    }
    session = open_session(path, threads=1, inputs=inputs, outputs=outputs, provider=(PROVIDER, options))
    if PROVIDER not in session.get_providers():
        raise PlatformError(
            f"onnxruntime {ort.__version__} does not run {path.name} on the GPU, and does not say why.",
            seen=session.get_providers(),
            remedy="Run 'biomedgpt-edge doctor', and look at the driver.",
        )
    return session
