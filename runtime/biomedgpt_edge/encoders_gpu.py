"""Molecule and protein encoders on the GPU, by ONNX Runtime's CUDA provider or as TensorRT engines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ._native import CudaArray
from .bundle import Bundle
from .cuda import Stream
from .decoder.cuda import NativeDecoder
from .decoder.onnx_cuda import cuda_graph
from .device_cache import Verify
from .encoders import Encoders, Features, Run, by_token, molecule_signature, protein_signature
from .errors import ClosedError, PromptTooLongError
from .manifest import Manifest
from .ort_cuda import GPU, PROVIDER, open_cuda_session
from .ort_session import Signature, running
from .portable import of_protein_encoder
from .tensorrt.build import Part, Plan
from .tensorrt.session import EngineSession
from .tensorrt.store import Engines

Feeds = Mapping[str, npt.NDArray[Any]]
MOLECULE, PROTEIN = "molecule_encoder", "protein_encoder"
_UNSYNCHRONIZED, _WAIT_EVERY = "disable_synchronize_execution_providers", 64


class CudaEncoders(Encoders):
    """On ONNX Runtime's CUDA provider: molecules in float32, which is their bundle's own graph, proteins in float16."""

    def __init__(self, bundle: Bundle, *, threads: int, verify: Verify) -> None:
        super().__init__(bundle, threads=threads, verify=verify)
        self.identity = f"onnxruntime {ort.__version__}, {PROVIDER}"

    def _open_molecule(self) -> Run:
        spec = self._bundle.manifest.molecule_encoder
        if spec is None:
            raise TypeError("a molecule passed the check of a bundle without an encoder for them")
        return self._opened(self._bundle.file(spec.graph), molecule_signature(spec), "atom_type", "atom_features")

    def _open_protein(self) -> Run:
        spec = self._bundle.manifest.protein_encoder
        if spec is None:
            raise TypeError("a protein passed the check of a bundle without an encoder for them")
        path = cuda_graph(self._bundle, spec, of_protein_encoder(self._bundle), self._verify)
        return self._opened(path, protein_signature(spec), "residue_ids", "residue_features")

    def _opened(self, path: Path, signature: tuple[Signature, Signature], counted: str, output: str) -> Run:
        """Runs the graph at ``path``; ``counted`` is an input whose last axis has as many as there are soft tokens."""
        # The stream lives as long as the session that was told of it.
        stream = Stream()
        session = open_cuda_session(path, inputs=signature[0], outputs=signature[1], stream=stream.handle)

        def run(feeds: Feeds) -> Features:
            with running(path.name):
                (features,) = session.run([output], dict(feeds))
            stream.wait()
            return by_token(features)

        return run


class NativeEncoders(CudaEncoders):
    """The same on the stream of our own decoder, whose prompts they are for: features stay on the GPU."""

    def __init__(self, bundle: Bundle, decoder: NativeDecoder, *, threads: int, verify: Verify) -> None:
        super().__init__(bundle, threads=threads, verify=verify)
        self._decoder: NativeDecoder | None = decoder

    def release(self) -> None:
        """See :class:`Encoders`: what was queued is done first."""
        if self._decoder is not None:
            self._decoder.wait()
        super().release()

    def close(self) -> None:
        """See :class:`Encoders`."""
        super().close()
        self._decoder = None

    def _opened(self, path: Path, signature: tuple[Signature, Signature], counted: str, output: str) -> Run:
        decoder = self._decoder
        if decoder is None:
            raise ClosedError("the engine is closed.", remedy="Load the bundle again.")
        decoder.trim()
        # ONNX Runtime waits for the device when it makes a session, and puts copies into the stream when inputs are
        # bound: nothing for the midst of a capture.
        with decoder.lock:
            session = open_cuda_session(path, inputs=signature[0], outputs=signature[1], stream=decoder.stream)
        *outer, _, width = signature[1][output][1]
        if width is None:
            raise TypeError(f"{output} has no fixed width")
        runs = itertools.count(1)

        def run(feeds: Feeds) -> CudaArray:
            features = decoder.array((feeds[counted].shape[-1], width))
            options = ort.RunOptions()
            # Who reads the features is in the same stream. What a run staged for its kernels is freed with a wait only.
            options.add_run_config_entry(_UNSYNCHRONIZED, str(int(next(runs) % _WAIT_EVERY != 0)))
            with decoder.lock, running(path.name):
                binding = session.io_binding()
                for name, array in feeds.items():
                    binding.bind_cpu_input(name, array)
                binding.bind_output(output, *GPU, np.float32, [*outer, *features.shape], features.pointer)
                session.run_with_iobinding(binding, options)
            return features

        return run


class TensorRtEncoders(Encoders):
    """As engines in float16."""

    def __init__(self, bundle: Bundle, plan: Plan, engines: Engines, *, threads: int) -> None:
        super().__init__(bundle, threads=threads)
        self.identity = f"{plan.key}"
        self._plan = plan
        self._engines = engines

    def _open_molecule(self) -> Run:
        session, part = self._opened(MOLECULE, "atom_features")
        width = _width(self._bundle.manifest, MOLECULE)

        def run(feeds: Feeds) -> Features:
            atoms = len(feeds["atom_type"])
            return self._features(session, part, atoms, dict(feeds), "atom_features", (atoms, width))

        return run

    def _open_protein(self) -> Run:
        session, part = self._opened(PROTEIN, "residue_features")
        width = _width(self._bundle.manifest, PROTEIN)

        def run(feeds: Feeds) -> Features:
            length = feeds["residue_ids"].shape[1]
            inputs = {**feeds, "position_ids": np.arange(length, dtype=np.int64)[np.newaxis]}
            return by_token(self._features(session, part, length, inputs, "residue_features", (1, length, width)))

        return run

    def _features(
        self, session: EngineSession, part: Part, length: int, inputs: Feeds, output: str, shape: tuple[int, ...]
    ) -> Features:
        longest = part.profiles[-1].lengths[2]
        if length > longest:
            raise PromptTooLongError(
                f"an input has {length:,} atoms or residues; its engine was built for {longest:,}.",
                seen=length,
                limit=longest,
                remedy="Give a smaller one, or use --device cpu.",
            )
        features: Features = session.run(length, inputs, {output: shape})[output]
        return features

    def _opened(self, name: str, output: str) -> tuple[EngineSession, Part]:
        part = next(part for part in self._plan.parts if part.name == name)
        longest = part.profiles[-1].lengths[2]
        session = EngineSession(
            self._plan.target.library, self._engines.files[name], part.profiles, rows={output: longest}
        )
        return session, part


def _width(manifest: Manifest, name: str) -> int:
    spec = getattr(manifest, name)
    width: int = spec.width
    return width
