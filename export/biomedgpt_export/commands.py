"""The commands of ``biomedgpt-export``; imported once the extra's packages are known to be there."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from biomedgpt_edge.available_memory import available_memory
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.kv_cache import KV_ELEMENTS
from biomedgpt_edge.errors import BioMedGPTError

from .calibration import PROOF, read_examples, readable
from .exporter import estimate_bundle, export_bundle, plan_bundle
from .families import LAYOUTS
from .families.base import MODALITIES
from .families.biomedgpt_10b import FAMILY
from .graphs.linear import GRAPH_PRECISIONS, HEAD_PRECISIONS, PRECISIONS
from .options import DECODER_LAYOUTS, PROOFS, QUANTIZERS, TABLE_PRECISIONS, ExportOptions, read_about
from .proof import BundleSide, compared, table
from .quantize.int4 import GROUP_SIZES
from .relayout import relayout
from .synthesize import SCALES, synthesize

_LAYOUT_HELP = (
    "of a decoder in int4 and of a protein encoder in int8: records for our own operators, portable for ONNX Runtime's"
)


def run(arguments: Sequence[str] | None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    # So that being terminated removes what is half written, as being interrupted does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BioMedGPTError as error:
        _report(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _report("interrupted; no bundle was written")
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="biomedgpt-export",
        description="Export BioMedGPT checkpoints as bundles.",
        epilog="exit codes: 0 done, 2 wrong usage, 3 input, 4 the bundle does not work, 5 missing packages or memory, "
        "6 the export cannot start or finish, 130 interrupted",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_bundle(commands.add_parser("bundle", help="export a checkpoint as a bundle"))
    _add_synthesize(commands.add_parser("synthesize", help="write a random checkpoint in the release layout"))
    _add_compare(commands.add_parser("compare", help="what one bundle loses against another"))
    _add_relayout(commands.add_parser("relayout", help="the same bundle with its decoder in another layout"))
    return parser


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=sorted(LAYOUTS), required=True, help="the model family of the checkpoint")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="the release's folder; of BioMedGPT-10B fusion_ckpts/biomedgpt_10b.pth, text_ckpts/biomedgpt-lm-7b, "
        "protein_ckpts/esm2-3b; of BioMedGPT-LM-7B that with config.json and the weights, which may be GPTQ's",
    )
    parser.add_argument("--fusion", type=Path, metavar="FILE", help="the weights, if they lie elsewhere")
    parser.add_argument(
        "--text", type=Path, metavar="DIR",
        help="language model configuration and tokenizer, likewise; with its weights too, if GPTQ has quantized them",
    )  # fmt: skip
    parser.add_argument("--protein", type=Path, metavar="DIR", help="protein encoder configuration, likewise")
    parser.add_argument(
        "--without", choices=MODALITIES, action="append", default=[], help="leave this encoder out; may be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write; must not exist")
    parser.add_argument("--precision", choices=PRECISIONS, default="int4", help="of the linear layers (default: int4)")
    parser.add_argument(
        "--protein-encoder", choices=GRAPH_PRECISIONS, help="of those of the protein encoder (default: the same)"
    )
    parser.add_argument(
        "--embeddings", choices=TABLE_PRECISIONS, default="fp16", help="of the token embeddings (default: fp16)"
    )
    parser.add_argument(
        "--lm-head", choices=HEAD_PRECISIONS, help="of the LM head beside a decoder in int4 (default: int4)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="columns that share a scale in int4 (default: for each matrix the largest that divides its width)",
    )
    parser.add_argument("--decoder-layout", choices=DECODER_LAYOUTS, help=f"{_LAYOUT_HELP} (default: records)")
    parser.add_argument(
        "--quantizer", choices=QUANTIZERS, help="how int4 values are chosen that the checkpoint lacks (default: gptq)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE.jsonl",
        help="questions with answers for GPTQ and for an int8 protein encoder (default: a set of its own)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where GPTQ runs: cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--proof", choices=PROOFS, default="quick", help="on how many questions it is compared with its source"
    )
    parser.add_argument(
        "--questions", type=Path, metavar="FILE.jsonl", help="on which ones (default: a set of its own)"
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="write no bundle whose mean KL divergence from the source is larger",
    )
    parser.add_argument("--name", help="what the bundle calls itself (default: the family's)")
    parser.add_argument(
        "--about", type=Path, metavar="FILE.json", help="facts for the manifest; 'policy' in it: own terms"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="processor threads for GPTQ and the parity runs (default: 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, say what it would write and take, and stop")
    parser.set_defaults(run=_run_bundle)


def _add_synthesize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=[FAMILY.name], required=True, help="the model family to imitate")
    parser.add_argument("--scale", choices=sorted(SCALES), required=True, help="how large")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--layers", type=int, metavar="N", help="of the decoder, instead of those of the scale")
    parser.add_argument("--protein-layers", type=int, metavar="N", help="of the protein encoder, likewise")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.set_defaults(run=_run_synthesize)


def _run_bundle(options: argparse.Namespace) -> None:
    layout = LAYOUTS[options.family].locate(
        options.checkpoint,
        fusion=options.fusion,
        text=options.text,
        protein=options.protein,
        without=options.without,
    )
    about, policy = read_about(options.about) if options.about else ({}, None)
    chosen = ExportOptions(
        layout=layout,
        out=options.out,
        precision=options.precision,
        protein_encoder=options.protein_encoder,
        embeddings=options.embeddings,
        lm_head=options.lm_head,
        group_size=options.group_size,
        decoder_layout=options.decoder_layout,
        quantizer=options.quantizer,
        calibration=options.calibration,
        device=options.device,
        proof=options.proof,
        questions=options.questions,
        max_kl=options.max_kl,
        name=options.name,
        about=about,
        policy=policy,
        threads=options.threads,
    )
    if options.dry_run:
        print("\n".join(plan_bundle(chosen).lines()))
        estimated, available = estimate_bundle(chosen), available_memory()
        print("\n".join(estimated.lines(available)))
        estimated.require_memory(available)
    else:
        export_bundle(chosen, _report)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="the bundle to compare with")
    parser.add_argument("second", type=Path, metavar="B", help="the bundle that is compared; it answers the questions")
    parser.add_argument(
        "--questions", type=Path, metavar="FILE.jsonl", default=PROOF, help="what to ask (default: a set of its own)"
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument(
        "--kv-cache", choices=KV_ELEMENTS, help="what B stores keys and values as, if in records (default: fp16)"
    )
    parser.set_defaults(run=_run_compare)


def _run_compare(options: argparse.Namespace) -> None:
    first = BundleSide(Bundle.open(options.first), options.threads)
    second = BundleSide(Bundle.open(options.second), options.threads, options.kv_cache)
    inputs = tuple(kind for kind in first.inputs if kind in second.inputs)
    figures = compared(first, second, readable(read_examples(options.questions), inputs, "comparison", _report))
    print(json.dumps(figures, indent=1) if options.json else "\n".join(table(figures)))


def _add_relayout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="B", help="the bundle")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write; must not exist")
    parser.add_argument("--decoder-layout", choices=DECODER_LAYOUTS, required=True, help=_LAYOUT_HELP)
    parser.set_defaults(run=_run_relayout)


def _run_relayout(options: argparse.Namespace) -> None:
    relayout(options.bundle, options.out, options.decoder_layout, _report)


def _run_synthesize(options: argparse.Namespace) -> None:
    synthesize(
        options.out,
        scale=options.scale,
        seed=options.seed,
        report=_report,
        layers=options.layers,
        protein_layers=options.protein_layers,
    )


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
