"""The operators of csrc/ort in sessions of ONNX Runtime: those of int4, and attention and int8 with them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from . import _native
from .errors import PlatformError
from .ort_session import SESSION_ERRORS

# Of domain onnx_header.INT4_DOMAIN.
OPSET = 1
# Installed beside the extension module, wherever that is.
LIBRARY = Path(_native.__file__).with_name("_ort_ops.so")


def register_int4_ops(options: ort.SessionOptions) -> None:
    """Lets sessions that are made with ``options`` have these operators; once for each of them.

    Raises:
        PlatformError: ONNX Runtime is older than 1.17 or cannot load the library, or one of the operators computes
            something wrong on this processor.
    """
    try:
        options.register_custom_ops_library(str(LIBRARY))
    except SESSION_ERRORS as error:
        raise PlatformError(
            f"the operators for records cannot be used with ONNX Runtime {ort.__version__}: {error}.",
            seen=ort.__version__,
            remedy="Install biomedgpt-edge again with a current onnxruntime, or use a bundle whose decoder is portable "
            "('biomedgpt-export relayout' makes one of it).",
        ) from error


def check_int4_ops() -> None:
    """Raises what :func:`register_int4_ops` raises, where the operators cannot be used here."""
    register_int4_ops(ort.SessionOptions())
