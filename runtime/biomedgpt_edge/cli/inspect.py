"""``biomedgpt-edge inspect``: what a bundle is."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..decoder.graph import choose
from ..engine import DEMO_BUNDLE
from ..errors import PlatformError
from ..manifest import RECORDS, DerivedGraph, Manifest
from .output import policy_lines, printable


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", default=str(DEMO_BUNDLE), metavar="B", help="default: the demo model")
    parser.add_argument("--json", action="store_true", help="print the whole manifest")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    if options.json:
        print(json.dumps({"path": str(bundle.path), "digest": bundle.digest, **json.loads(bundle.manifest.to_json())}))
        return 0
    for line in _lines(bundle):
        print(printable(line))
    return 0


def _lines(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    decoder, total = manifest.decoder, sum(entry.size for entry in manifest.files)
    lines = [
        *policy_lines(bundle),
        "",
        f"bundle      {bundle.path} ({_size(total)}, sha256 {bundle.digest[:16]}…)",
        f"decoder     {decoder.layers} layers, hidden {decoder.hidden_size}, {decoder.heads} heads "
        f"({decoder.kv_heads} KV), FFN {decoder.intermediate_size}, vocabulary {decoder.vocabulary}, "
        f"context {decoder.context}",
        f"layout      {decoder.layout}{_portable(decoder.portable)}",
        f"used here   {_used(bundle)}",
        f"for GPUs    {_for_gpus(manifest)}",
        *_encoder_lines(manifest),
        f"made from   {', '.join(f'{s.path} ({_size(s.size)}, {s.sha256[:12]}…)' for s in manifest.sources)}",
        "",
        "files",
        *[f"  {entry.path:<32}{_size(entry.size):>10}  {entry.sha256[:16]}…" for entry in manifest.files],
    ]
    for title, facts in (
        ("quantization", manifest.quantization),
        ("parity", manifest.parity),
        ("about", manifest.about),
    ):
        if facts:
            lines += ["", title, *_facts(facts, "  ")]
    return lines


def _portable(portable: DerivedGraph | None) -> str:
    if portable is None:
        return ""
    return f", and {portable.graph}, whose {_size(portable.data_size)} are derived where it is used"


def _for_gpus(manifest: Manifest) -> str:
    """What the devices on a GPU run."""
    decoder = manifest.decoder
    found = [f"{decoder.graph} (--device native)"] if decoder.layout == RECORDS else []
    if decoder.cuda is not None:
        found.append(f"{decoder.cuda} (--device cuda)")
    if decoder.standard is not None:
        parts = (decoder, manifest.molecule_encoder, manifest.protein_encoder)
        size = sum(part.standard.data_size for part in parts if part is not None and part.standard is not None)
        found.append(f"standard graphs, {_size(size)} of weights derived to build engines (--device tensorrt)")
    return ", ".join(found) or "nothing: 'biomedgpt-export relayout' adds it to bundles in int4 and fp16"


def _used(bundle: Bundle) -> str:
    """What computes the decoder on this machine unless something else is asked for."""
    try:
        return choose(bundle).description
    except PlatformError as error:
        return f"nothing: {error}"


def _encoder_lines(manifest: Manifest) -> list[str]:
    molecule, protein = manifest.molecule_encoder, manifest.protein_encoder
    return [
        "molecules   "
        + (f"GIN, {molecule.layers} layers, width {molecule.width}" if molecule else "not in this bundle"),
        "proteins    "
        + (
            f"ESM-2, {protein.layers} layers, width {protein.width}, {protein.heads} heads, "
            f"{protein.layout}{_portable(protein.portable)}"
            if protein
            else "not in this bundle"
        ),
    ]


def _facts(facts: dict[str, object], indent: str) -> list[str]:
    """Nested facts as indented lines; numbers that belong together share one, long texts are cut."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and all(isinstance(inner, (int, float)) for inner in value.values()):
            lines.append(f"{indent}{key}: " + (", ".join(f"{name} {inner}" for name, inner in value.items()) or "none"))
        elif isinstance(value, dict):
            lines += [f"{indent}{key}", *_facts(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: {'' if value else 'none'}".rstrip())
            lines += [f"{indent}  {_short(item)}" for item in value]
        else:
            lines.append(f"{indent}{key}: {_short(value)}")
    return lines


def _short(value: object, limit: int = 100) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}… (whole with --json)"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count:,} B"
