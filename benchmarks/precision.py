"""What each precision choice costs a trained model: one change at a time, each against the same checkpoint in float32.

Every row is a bundle of its own, exported as `biomedgpt-export bundle` does and compared with the float32 one as
`biomedgpt-export compare` does: its size, mean KL divergence of the next token (nats), how often both would choose the
same token, and the cosine of their soft tokens. What a row does not name is fp16, so that it shows the cost of what it
names alone; the last rows are whole recipes.

Random weights say nothing here, and neither do questions that the model was calibrated with, or cannot answer.

Usage: python benchmarks/precision.py --checkpoint DIR [--questions FILE.jsonl] [--calibration FILE.jsonl]
                                      [--choices decoder-rtn,decoder-gptq] [--threads 1]
                                      [--work DIR] [--json FILE]
Needs `pip install -c constraints.txt '.[export]'`. DIR is a folder in the release's layout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.errors import BioMedGPTError
from biomedgpt_export.calibration import PROOF, Example, read_examples, readable
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.proof import BundleSide, compared


@dataclass(frozen=True)
class Choice:
    """One row: a key for the command line, what the table says, and the fields of `ExportOptions` that it sets."""

    key: str
    name: str
    options: dict[str, Any]

    @property
    def calibrated(self) -> bool:
        return self.options.get("quantizer") == "gptq" or self.options.get("protein_encoder") == "int8"


_DECODER = {"precision": "int4", "protein_encoder": "fp16"}
CHOICES = (
    Choice("fp16", "all fp16", {"precision": "fp16"}),
    Choice("decoder-rtn", "decoder int4, nearest", {**_DECODER, "quantizer": "rtn"}),
    Choice("decoder-gptq", "decoder int4, GPTQ", {**_DECODER, "quantizer": "gptq"}),
    Choice("lm-head-int8", "decoder int4, GPTQ; LM head int8", {**_DECODER, "quantizer": "gptq", "lm_head": "int8"}),
    Choice("embeddings-int8", "embeddings int8", {"precision": "fp16", "embeddings": "int8"}),
    Choice("protein-int8", "protein encoder int8", {"precision": "fp16", "protein_encoder": "int8"}),
    Choice(
        "protein-rtn",
        "protein encoder int4, nearest",
        {"precision": "fp16", "protein_encoder": "int4", "quantizer": "rtn"},
    ),
    Choice(
        "protein-gptq",
        "protein encoder int4, GPTQ",
        {"precision": "fp16", "protein_encoder": "int4", "quantizer": "gptq"},
    ),
    Choice("int4", "all int4, GPTQ", {"precision": "int4", "quantizer": "gptq"}),
    Choice(
        "int4-int8",
        "decoder int4, GPTQ; protein encoder and embeddings int8",
        {"precision": "int4", "quantizer": "gptq", "protein_encoder": "int8", "embeddings": "int8"},
    ),
)


def choices(keys: str | None) -> tuple[Choice, ...]:
    """The rows that were asked for, all of them where no keys were given.

    Raises:
        ValueError: there is no such row.
    """
    if keys is None:
        return CHOICES
    known = {choice.key: choice for choice in CHOICES}
    unknown = [key for key in keys.split(",") if key not in known]
    if unknown:
        raise ValueError(f"no choice {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[key] for key in keys.split(","))


class Comparison:
    """Exports of one checkpoint, against its float32 bundle."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._layout = Layout.locate(options.checkpoint)
        self._calibration = options.calibration
        self._threads = options.threads
        self._work = work
        self._exact = self._exported("fp32", {"precision": "fp32"})
        side = self._side(self._exact)
        self._examples: list[Example] = readable(read_examples(options.questions), side.inputs, "comparison", _report)

    def row(self, choice: Choice) -> dict[str, Any]:
        """Size in bytes and the figures of `proof.compared`."""
        given = {"calibration": self._calibration} if choice.calibrated else {}
        bundle = self._exported(choice.key, {**choice.options, **given})
        figures = compared(self._side(self._exact), self._side(bundle), self._examples)
        return {"choice": choice.key, "name": choice.name, "bytes": _bytes(bundle), **figures}

    def exact_bytes(self) -> int:
        """Of the float32 bundle."""
        return _bytes(self._exact)

    def _exported(self, name: str, options: dict[str, Any]) -> Bundle:
        out = self._work / name
        _report(f"exporting {name}")
        # One arithmetic for all: MatMulNBits' is the one that float32 layers can be compared with.
        common: dict[str, Any] = {"proof": "none", "threads": self._threads, "decoder_layout": "portable"}
        export_bundle(ExportOptions(self._layout, out, **common, **options), lambda line: None)
        return Bundle.open(out)

    def _side(self, bundle: Bundle) -> BundleSide:
        return BundleSide(bundle, self._threads)


HEADER = "| | MB | mean KL, nats | same token | cosine of soft tokens: mean | least |\n|---|---|---|---|---|---|"


def line(row: dict[str, Any]) -> str:
    """Of a table in Markdown."""
    cosine = row["cosine"]
    cells = [
        row["name"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['kl']['mean']:.2g}",
        f"{100 * row['top1_agreement']:.1f} %",
        *(f"{cosine[part]:.4f}" if cosine else "" for part in ("mean", "least")),
    ]
    return f"| {' | '.join(cells)} |"


def _bytes(bundle: Bundle) -> int:
    return sum(entry.size for entry in bundle.manifest.files)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--questions", type=Path, default=PROOF, metavar="FILE.jsonl")
    parser.add_argument("--calibration", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--choices", metavar="KEYS", help=", ".join(choice.key for choice in CHOICES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where bundles lie meanwhile, all of them at once")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        wanted = choices(options.choices)
    except ValueError as error:
        parser.error(str(error))
    facts = machine.describe(options.threads)
    try:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            comparison = Comparison(options, Path(work))
            exact_bytes = comparison.exact_bytes()
            print(f"{HEADER}\n| all fp32 | {exact_bytes / 1e6:.1f} | | | | |", flush=True)
            rows = []
            for choice in wanted:
                rows.append(comparison.row(choice))
                print(line(rows[-1]), flush=True)
    except BioMedGPTError as error:
        raise SystemExit(f"error: {error}") from error
    tokens = min(row["positions"] for row in rows)
    print(f"\n{rows[0]['questions']} questions, {tokens} tokens or more in each row")
    print(f"{facts['cpu']}, {facts['threads used']} threads; {facts['versions']}")
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "exact_bytes": exact_bytes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
