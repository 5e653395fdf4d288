"""``biomedgpt-export``: bundles from checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from biomedgpt_edge.errors import PlatformError

_EXTRA = ("torch", "transformers", "onnx", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (see ``biomedgpt-export --help``)."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the exporter needs {', '.join(missing)}. Install it with pip install 'biomedgpt-edge[export]'.",
            file=sys.stderr,
        )
        return PlatformError.exit_code
    from .commands import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
