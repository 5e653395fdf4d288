"""The training files: where they come from, what they hash to, and their rows."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import TrainingDataError

MOLECULES_FILE = "molecules.smi.gz"
CHEBI_FILE = "chebi20_validation.tsv"
LOCATION_FILE = "proteins_location.tsv.gz"
STRUCTURE_FILE = "proteins_secondary_structure.tsv.gz"
DATA_FILES = (MOLECULES_FILE, CHEBI_FILE, LOCATION_FILE, STRUCTURE_FILE)

SOURCES: dict[str, dict[str, str]] = {
    MOLECULES_FILE: {
        "source": "MoleculeNet: MUV, ChEMBL, Tox21, ClinTox and ESOL molecules, as collected by DeepChem",
        "terms": "MIT; ChEMBL data CC BY-SA 3.0",
    },
    CHEBI_FILE: {"source": "ChEBI-20 validation split, as in MolT5", "terms": "BSD-3-Clause; ChEBI data CC BY 4.0"},
    LOCATION_FILE: {"source": "DeepLoc, as collected by HannesStark", "terms": "MIT"},
    STRUCTURE_FILE: {"source": "NetSurfP-2.0, CASP12 and CB513, as collected by FLIP", "terms": "AFL-3.0"},
}


def file_hashes(data: Path) -> dict[str, str]:
    """SHA-256 of each training file.

    Raises:
        TrainingDataError: a file is missing.
    """
    missing = [name for name in DATA_FILES if not (data / name).is_file()]
    if missing:
        raise TrainingDataError(
            f"{data} lacks {', '.join(missing)}.", seen=missing, remedy="Name the folder that holds the training files."
        )
    return {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in DATA_FILES}


def rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Tab-separated rows of a plain or gzipped file.

    Raises:
        TrainingDataError: a row has too few columns or nothing in the first one, or the file is empty, damaged or not
            text.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TrainingDataError(f"{path.name} cannot be read: {error}.", remedy="Fetch the file again.") from error
    if not lines:
        raise TrainingDataError(f"{path.name} is empty.", remedy="Fetch the file again.")
    for line_number, line in enumerate(lines, start=1):
        if not line:
            continue
        row = line.split("\t")
        if len(row) < columns:
            raise TrainingDataError(
                f"{path.name}, line {line_number}: {len(row)} columns, expected {columns}.", seen=line[:80]
            )
        if not row[0].strip():
            raise TrainingDataError(f"{path.name}, line {line_number}: the first column is empty.", seen=line[:80])
        yield row


def molecule_lines(data: Path) -> list[str]:
    """SMILES of the molecules file, in its order."""
    return [row[0].split()[0] for row in rows(data / MOLECULES_FILE, 1)]


def chebi_lines(data: Path) -> list[str]:
    """SMILES of the ChEBI file, in its order; the first row is the header, and backslashes are doubled in it."""
    return [row[1].replace("\\\\", "\\") for row in list(rows(data / CHEBI_FILE, 2))[1:]]


def order(text: str) -> int:
    """A number that depends on ``text`` only, evenly spread over 32 bits: decides sides of a split without a seed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
