"""Molecule and protein encoders: opened on first use, and closed again when their memory is wanted."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import Bundle
from .decoder.graph import Choice, choose, protein_encoder_graph
from .device_cache import Verify
from .errors import MissingModalityError
from .inputs import Molecule, Protein
from .int4_ops import register_int4_ops
from .manifest import RECORDS
from .molecule_graph import BOND_DIRECTIONS, BOND_TYPES, dense
from .ort_session import open_session, running
from .protein_tokens import residue_ids

Features = npt.NDArray[np.float32]


class Encoders:
    """Both encoders of a bundle.

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
        self._molecule: ort.InferenceSession | None = None
        self._protein: ort.InferenceSession | None = None

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

    def _encode_molecule(self, molecule: Molecule) -> Features:
        graph = dense(molecule.graph)
        feeds = {
            "atom_type": graph.atom_type,
            "chirality": graph.chirality,
            "adjacency": graph.adjacency,
            "edge_counts": graph.edge_counts,
        }
        session = self._molecule_session()
        with running("the molecule encoder"):
            (features,) = session.run(["atom_features"], feeds)
        return np.ascontiguousarray(features)

    def _encode_protein(self, protein: Protein) -> Features:
        feeds = {"residue_ids": residue_ids(protein.sequence)[np.newaxis]}
        session = self._protein_session()
        with running("the protein encoder"):
            (features,) = session.run(["residue_features"], feeds)
        return np.ascontiguousarray(features[0])

    def _molecule_session(self) -> ort.InferenceSession:
        spec = self._bundle.manifest.molecule_encoder
        with self._lock:
            if self._molecule is None and spec is not None:
                self._molecule = open_session(
                    self._bundle.file(spec.graph),
                    threads=self._threads,
                    spinning=False,  # the projection comes next, with threads of its own
                    inputs={
                        "atom_type": ("tensor(int64)", [None]),
                        "chirality": ("tensor(int64)", [None]),
                        "adjacency": ("tensor(float)", [None, None]),
                        "edge_counts": ("tensor(float)", [None, BOND_TYPES + BOND_DIRECTIONS]),
                    },
                    outputs={"atom_features": ("tensor(float)", [None, spec.width])},
                )
            return self._molecule

    def _protein_session(self) -> ort.InferenceSession:
        spec = self._bundle.manifest.protein_encoder
        with self._lock:
            if self._protein is None and spec is not None:
                self._choice = choose(self._bundle) if self._choice is None else self._choice
                # Looked at each time: another process may have cleared the cache since the encoder was released.
                graph = protein_encoder_graph(self._bundle, spec, self._choice, self._verify)
                self._verify = "once" if self._verify == "full" else self._verify
                self._protein = open_session(
                    graph.path,
                    threads=self._threads,
                    spinning=False,  # the projection comes next, with threads of its own
                    inputs={"residue_ids": ("tensor(int64)", [1, None])},
                    outputs={"residue_features": ("tensor(float)", [1, None, spec.width])},
                    register=register_int4_ops if graph.layout == RECORDS else None,
                )
            return self._protein
