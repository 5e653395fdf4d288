"""Options that several commands take, and how their values become molecules, proteins and generation options."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..decoder.graph import WANTED
from ..decoder.kv_cache import KV_ELEMENTS
from ..devices import DEVICES, ENCODERS
from ..engine import Engine
from ..errors import InputFileError
from ..inputs import Molecule, Protein
from ..prompt import Input
from ..sampling import DEFAULT_MAX_NEW_TOKENS, OptionArguments

_MOLECULE_FILES = (".sdf", ".sd", ".mol")
_PROTEIN_FILES = (".fasta", ".fa", ".faa", ".fas", ".seq", ".txt")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="B", help="bundle folder (default: the packaged demo model)")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="of the first NVIDIA GPU: native: our own kernels; cuda: ONNX Runtime; tensorrt: engines built for it "
        "('engines build'), or built now (default: %(default)s)",
    )
    parser.add_argument(
        "--encoders",
        choices=ENCODERS,
        default="auto",
        help="what reads inputs for --device native: cuda: ONNX Runtime on the same GPU, cpu: this processor (default: "
        "cuda where the installed ONNX Runtime has it)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all available)")
    parser.add_argument(
        "--decoder",
        choices=WANTED,
        default="auto",
        help="records for our own operators alone, portable for those of ONNX Runtime, derived on this machine where "
        "the bundle holds records (default: what the bundle holds, or what works here)",
    )


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache",
        choices=KV_ELEMENTS,
        help="what keys and values are stored as: fewer bytes to keep, and to read for each token (default: fp16 in "
        "records; portable decoders have fp32 alone)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What :func:`load_engine` reads."""
    add_bundle(parser)
    add_kv_cache(parser)
    parser.add_argument("--low-memory", action="store_true", help="close each encoder as soon as it has read an input")
    parser.add_argument("--memory-limit", metavar="SIZE", help="such as 6GiB: shortens the context to what fits")
    parser.add_argument(
        "--keep-soft-tokens", action="store_true", help="keep what encoders made of inputs on disk ('cache clear')"
    )
    parser.add_argument("--prefault", action="store_true", help="read all of the decoder's weights first")


def load_engine(options: argparse.Namespace) -> Engine:
    """The engine that the options of :func:`add_engine` ask for."""
    return Engine.load(
        options.bundle,
        device=options.device,
        encoders=options.encoders,
        threads=options.threads,
        decoder=options.decoder,
        kv_cache=options.kv_cache,
        low_memory=options.low_memory,
        memory_limit=options.memory_limit,
        keep_soft_tokens=options.keep_soft_tokens,
        prefault=options.prefault,
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """``--molecule`` and ``--protein``, kept in the order in which they were given."""
    parser.add_argument(
        "--molecule",
        dest="inputs",
        action="append",
        default=[],
        type=_tagged("molecule"),
        metavar="SMILES|FILE.sdf",
        help="a molecule (also .mol, or an InChI); may be repeated",
    )
    parser.add_argument(
        "--protein",
        dest="inputs",
        action="append",
        type=_tagged("protein"),
        metavar="SEQUENCE|FILE.fasta",
        help="a protein; may be repeated",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="cut proteins over 1,022 residues instead of refusing them"
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that reach P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
    parser.add_argument("--seed", type=int, metavar="S", help="of the draw: the same seed, the same answer")
    parser.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        help="try several tokens at once where the text repeats (default: where no token can change)",
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")


def read_inputs(options: argparse.Namespace) -> list[Input]:
    """The molecules and proteins of the command line, in order.

    Raises:
        InputError: one of them cannot be used.
    """
    return [
        read_molecule(value) if kind == "molecule" else read_protein(value, truncate=options.truncate)
        for kind, value in options.inputs
    ]


def read_molecule(value: str) -> Molecule:
    """A SMILES string, an InChI, or the path of an SDF or MOL file."""
    if Path(value).suffix.lower() in _MOLECULE_FILES:
        return Molecule.from_sdf(value)
    return Molecule.from_inchi(value) if value.startswith("InChI=") else Molecule.from_smiles(value)


def read_protein(value: str, *, truncate: bool) -> Protein:
    """A sequence, or the path of a FASTA file."""
    if Path(value).suffix.lower() in _PROTEIN_FILES:
        return Protein.from_fasta(value, truncate=truncate)
    # No sequence holds these, so this can only be a path.
    if any(mark in value for mark in "/\\.") or Path(value[:255]).exists():
        raise InputFileError(
            f"{value} is no FASTA file by its name.", seen=value, remedy=f"Known endings: {', '.join(_PROTEIN_FILES)}."
        )
    return Protein.from_sequence(value, truncate=truncate)


def generation_options(options: argparse.Namespace) -> OptionArguments:
    return OptionArguments(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=tuple(options.stop),
        speculate=options.speculate,
    )


def _tagged(kind: str):  # type: ignore[no-untyped-def]
    return lambda value: (kind, value)
