"""Molecule and protein encoders: opened on first use, and closed again when their memory is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import CudaArray
from .bundle import Bundle
from .decoder.graph import Choice, choose, protein_encoder_graph
from .device_cache import Verify
from .errors import MissingModalityError
from .inputs import Molecule, Protein
from .int4_ops import register_int4_ops
from .manifest import RECORDS, MoleculeEncoderSpec, ProteinEncoderSpec
from .molecule_graph import BOND_DIRECTIONS, BOND_TYPES, dense
from .ort_session import Signature, identity, open_session, running
from .protein_tokens import residue_ids

# Of this machine or, where they are made for our own decoder on a GPU, on that.
Features = npt.NDArray[np.float32] | CudaArray
# Graph inputs by name -> features, float32 [soft tokens, encoder width].
Run = Callable[[Mapping[str, npt.NDArray[Any]]], Features]


class Encoders:
    """Both encoders of a bundle, on ONNX Runtime's CPU provider.

    Attributes:
        identity: what the bits of features depend on beside the bundle and the processor.

    Args:
        choice: which graphs are used; left out, the bundle's, or what is derived from them where these cannot be.
        verify: how to look at what was derived before; see :meth:`Engine.load`.
    """

    def __init__(self, bundle: Bundle, *, threads: int, choice: Choice | None = None, verify: Verify = "once") -> None:
        self._bundle = bundle
        self._threads = threads
        self._choice = choice
        self._verify: Verify = verify
        self._lock = threading.Lock()
        self._molecule: Run | None = None
        self._protein: Run | None = None
        derived = choice is not None and choice.derived
        self.identity = f"{identity(threads)}, derived: {derived}"

    def check(self, item: Molecule | Protein) -> None:
        """Raises:
        MissingModalityError: this bundle has no encoder for ``item``.
        """
        manifest = self._bundle.manifest
        spec = manifest.molecule_encoder if isinstance(item, Molecule) else manifest.protein_encoder
        if spec is None:
            what = "molecules" if isinstance(item, Molecule) else "proteins"
            raise MissingModalityError(
                f"the bundle '{manifest.name}' was exported without an encoder for {what}.",
                seen=what,
                remedy="Use a bundle that has one, or leave this input out.",
            )

    def encode(self, item: Molecule | Protein) -> Features:
        """Features of ``item``, float32 ``[soft tokens, encoder width]``; a protein's still lack the final LayerNorm.

        Raises:
            MissingModalityError: see :meth:`check`.
            PlatformError, BundleCorruptError: the graph has to be derived, and cannot be; see :func:`decoder_graph`.
        """
        self.check(item)
        return self._encode_molecule(item) if isinstance(item, Molecule) else self._encode_protein(item)

    def release(self) -> None:
        """Frees both encoders as soon as no other thread runs them; they open again when they are needed."""
        with self._lock:
            self._molecule = self._protein = None

    def close(self) -> None:
        """Frees both for good."""
        self.release()

    def _encode_molecule(self, molecule: Molecule) -> Features:
        graph = dense(molecule.graph)
        feeds: dict[str, npt.NDArray[Any]] = {
            "atom_type": graph.atom_type,
            "chirality": graph.chirality,
            "adjacency": graph.adjacency,
            "edge_counts": graph.edge_counts,
        }
        with self._lock:
            run = self._molecule = self._molecule or self._open_molecule()
        return run(feeds)

    def _encode_protein(self, protein: Protein) -> Features:
        with self._lock:
            run = self._protein = self._protein or self._open_protein()
        return run({"residue_ids": residue_ids(protein.sequence)[np.newaxis]})

    def _open_molecule(self) -> Run:
        spec = self._bundle.manifest.molecule_encoder
        if spec is None:
            raise TypeError("a molecule passed the check of a bundle without an encoder for them")
        inputs, outputs = molecule_signature(spec)
        session = open_session(
            self._bundle.file(spec.graph),
            threads=self._threads,
            spinning=False,  # the projection comes next, with threads of its own
            inputs=inputs,
            outputs=outputs,
        )
        return lambda feeds: _run(session, "the molecule encoder", "atom_features", feeds)

    def _open_protein(self) -> Run:
        spec = self._bundle.manifest.protein_encoder
        if spec is None:
            raise TypeError("a protein passed the check of a bundle without an encoder for them")
        self._choice = choose(self._bundle) if self._choice is None else self._choice
        # Looked at each time: another process may have cleared the cache since the encoder was released.
        graph = protein_encoder_graph(self._bundle, spec, self._choice, self._verify)
        self._verify = "once" if self._verify == "full" else self._verify
        inputs, outputs = protein_signature(spec)
        session = open_session(
            graph.path,
            threads=self._threads,
            spinning=False,  # the projection comes next, with threads of its own
            inputs=inputs,
            outputs=outputs,
            register=register_int4_ops if graph.layout == RECORDS else None,
        )
        return lambda feeds: _run(session, "the protein encoder", "residue_features", feeds)


def molecule_signature(spec: MoleculeEncoderSpec) -> tuple[Signature, Signature]:
    """Inputs and outputs of a molecule encoder's graph."""
    inputs: Signature = {
        "atom_type": ("tensor(int64)", [None]),
        "chirality": ("tensor(int64)", [None]),
        "adjacency": ("tensor(float)", [None, None]),
        "edge_counts": ("tensor(float)", [None, BOND_TYPES + BOND_DIRECTIONS]),
    }
    return inputs, {"atom_features": ("tensor(float)", [None, spec.width])}


def protein_signature(spec: ProteinEncoderSpec) -> tuple[Signature, Signature]:
    """The same of a protein encoder's."""
    inputs: Signature = {"residue_ids": ("tensor(int64)", [1, None])}
    return inputs, {"residue_features": ("tensor(float)", [1, None, spec.width])}


def _run(session: Any, what: str, output: str, feeds: Mapping[str, npt.NDArray[Any]]) -> Features:
    with running(what):
        (features,) = session.run([output], dict(feeds))
    return by_token(features)


def by_token(features: Any) -> npt.NDArray[np.float32]:
    """What a graph gives, as ``[soft tokens, width]``: that of a protein encoder has a batch of one."""
    array: npt.NDArray[np.float32] = np.ascontiguousarray(features)
    return array.reshape(-1, array.shape[-1])
