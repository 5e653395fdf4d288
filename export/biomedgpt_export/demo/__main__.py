"""``python -m biomedgpt_export.demo``: trains and scores the demo model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from biomedgpt_edge.errors import PlatformError

# Module -> package of the extra.
_EXTRA = {"torch": "torch", "sklearn": "scikit-learn", "Bio": "biopython"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    missing = [package for module, package in _EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"error: the demo's training needs {', '.join(missing)}. "
            "Install it with pip install 'biomedgpt-edge[demo]'.",
            file=sys.stderr,
        )
        return PlatformError.exit_code
    from .commands import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
