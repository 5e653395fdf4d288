"""What commands share: where text goes, and the words about a bundle."""

from __future__ import annotations

import sys

from ..bundle import Bundle


def tell(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def policy_lines(bundle: Bundle) -> list[str]:
    """The terms under which the bundle's model may be used."""
    manifest = bundle.manifest
    lines = [f"{manifest.name} ({manifest.family}, {manifest.precision}). {manifest.policy.notice}"]
    limits = manifest.about.get("limits")
    if isinstance(limits, str):
        lines.append(limits)
    lines.append(f"Use policy: {manifest.policy.use_policy}  Licence: {manifest.policy.licence}")
    return lines
