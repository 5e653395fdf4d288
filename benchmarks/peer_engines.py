"""One engine in a process of its own, told over pipes what to run: what `peers.py` starts for each contestant.

Every engine has the same two verbs, forget everything and append tokens; what is timed is made of these, so that all
are timed alike; what ours alone does has bursts of its own. Protocol: a JSON object per line. Requests name a burst
(`load`, `prefill`, `decode`, `ttft`, `rows`, `linear_layers`); answers hold seconds, or `error`. An engine that is not
installed says so at `load`.

Usage: python benchmarks/peer_engines.py ENGINE --records B --portable B --models DIR --threads N
       (stdin: requests, stdout: answers)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import peer_gguf
import peer_models
import peer_openvino
from biomedgpt_edge.bench.counters import Memory
from biomedgpt_edge.splice import EmbeddingTable, TokenPart, splice
from peer_models import Models

# Of the standard molecule question: positions of the template before the molecule, and all.
PREFIX, QUESTION = 47, 94
# Positions after which logits are compared: so many that it matters what came before the last of them.
COMPARED = 64
# Positions of engines that cannot grow: more than any burst has.
ROOM = 1024

Logits = npt.NDArray[np.float32]


class Contestant(Protocol):
    """A loaded model with one sequence."""

    def clear(self, capacity: int) -> None:
        """Forgets the sequence; the next has room for ``capacity`` positions."""
        ...

    def append(self, tokens: Sequence[int]) -> Logits:
        """Appends tokens; returns the logits after the last, ``[vocabulary]``."""
        ...


class Ours:
    """This runtime: the decoder in records, through the states that answers run through."""

    def __init__(self, models: Models, threads: int) -> None:
        from biomedgpt_edge.engine import Engine

        self._models, self._threads = models, threads
        self._engine = Engine.load(models.records, threads=threads, verify="sizes")
        self._state = self._engine.decoder.open(1)
        self._linear_layers: LinearLayers | None = None

    def clear(self, capacity: int) -> None:
        self._state.close()
        self._state = self._engine.decoder.open(capacity)

    def append(self, tokens: Sequence[int]) -> Logits:
        if len(tokens) == 1:
            return self._state.step(tokens[0])
        return self._state.prefill(embedded(tokens, self._engine.bundle.embeddings))

    def guess(self, tokens: Sequence[int]) -> Logits:
        """Appends what speculation would; returns the logits after each, ``[n, vocabulary]``."""
        return self._state.steps(tokens)

    def take_back(self, count: int) -> None:
        """Forgets the last tokens."""
        self._state.truncate(self._state.length - count)

    @property
    def linear_layers(self) -> LinearLayers:
        """Loaded when first asked for: pages are those of the decoder."""
        self._linear_layers = self._linear_layers or LinearLayers(self._models, self._threads)
        return self._linear_layers


def embedded(tokens: Sequence[int], table: EmbeddingTable) -> Logits:
    """Rows of the bundle's table, which stays mapped: float32 ``[T, hidden]``."""
    return splice([TokenPart(np.array(tokens, np.int64))], table, threads=1)


class LinearLayers:
    """All linear layers of a decoding step, the head included, and nothing else.

    Attributes:
        bytes: of their weights, which a step reads.
    """

    def __init__(self, models: Models, threads: int) -> None:
        import onnxruntime as ort

        from biomedgpt_edge.int4_ops import register_int4_ops

        graph = peer_models.linear_layers(models)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        register_int4_ops(options)
        self.bytes = peer_models.bytes_of_tensors(graph)
        self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        rng = np.random.default_rng(0)
        # The binding holds addresses only. Outputs of a width share one, which no operator reads.
        self._arrays: list[Logits] = []
        for node in self._session.get_inputs():
            self._arrays.append(rng.standard_normal((1, node.shape[1]), np.float32))
            self._bind(self._binding.bind_input, node.name, self._arrays[-1])
        widths = {node.shape[1] for node in self._session.get_outputs()}
        targets = {width: np.empty((1, width), np.float32) for width in widths}
        self._arrays.extend(targets.values())
        for node in self._session.get_outputs():
            self._bind(self._binding.bind_output, node.name, targets[node.shape[1]])

    def run(self) -> None:
        """One pass for one row."""
        self._session.run_with_iobinding(self._binding)

    @staticmethod
    def _bind(bind: Callable[..., None], name: str, array: Logits) -> None:
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


class PlainOnnxRuntime:
    """MatMulNBits in bare onnxruntime: the portable bundle's graph, the cache in buffers bound once per sequence."""

    def __init__(self, models: Models, threads: int, *, prepacked: bool = False) -> None:
        import onnxruntime as ort

        from biomedgpt_edge.bundle import Bundle

        opened = Bundle.open(models.portable)
        self._spec = opened.manifest.decoder
        self._embeddings = opened.embeddings
        graph = opened.file(self._spec.graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        if prepacked:
            graph = _prepacked(graph, models.folder / peer_models.PREPACKED, threads)
        self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._cache: dict[str, Any] = {}
        self._length = 0

    def clear(self, capacity: int) -> None:
        spec = self._spec
        shape = (1, spec.kv_heads, capacity, spec.head_size)
        names = [f"{part}.{layer}" for layer in range(spec.layers) for part in ("key", "value")]
        self._cache = {name: np.zeros(shape, np.float32) for name in names}
        self._length = 0

    def append(self, tokens: Sequence[int]) -> Logits:
        self._length += len(tokens)
        binding = self._session.io_binding()
        feeds = {
            "inputs_embeds": embedded(tokens, self._embeddings)[np.newaxis],
            "logit_positions": np.array([len(tokens) - 1], np.int64),
            "seqlens_k": np.array([self._length - 1], np.int32),
            "total_sequence_length": np.array(self._length, np.int32),
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, array in self._cache.items():
            place = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
            binding.bind_input(f"past_{name}", *place)
            binding.bind_output(f"present_{name}", *place)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[-1].numpy()[0]
        return logits


def _prepacked(graph: Path, folder: Path, threads: int) -> Path:
    """The graph as ONNX Runtime stores it with weights packed for this processor; made at the first load."""
    import onnxruntime as ort

    if not folder.exists():
        with peer_models.staged(folder) as staging:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.optimized_model_filepath = str(staging / peer_models.MODEL)
            data = f"{peer_models.MODEL}.data"
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
            options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
            ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return folder / peer_models.MODEL


class OnnxRuntimeGenai:
    """onnxruntime-genai over the same graph."""

    def __init__(self, models: Models, threads: int) -> None:
        import onnxruntime_genai as og

        folder = peer_models.genai_folder(models, threads)
        self._og = og
        self._model = og.Model(str(folder))
        self._generator: Any = None

    def clear(self, capacity: int) -> None:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity)
        self._generator = self._og.Generator(self._model, parameters)

    def append(self, tokens: Sequence[int]) -> Logits:
        self._generator.append_tokens(np.array([tokens], np.int32))
        logits: Logits = np.asarray(self._generator.get_logits()).reshape(-1)
        return logits


class LlamaCpp:
    """llama.cpp through llama-cpp-python: mapped, repacked for the processor, attention as its own tools choose it."""

    def __init__(self, models: Models, threads: int, *, kind: str) -> None:
        import llama_cpp

        path = peer_gguf.gguf_file(models, kind)
        options = {"n_ctx": min(ROOM, models.spec.context), "n_threads": threads, "n_threads_batch": threads}
        self._logits = llama_cpp.llama_get_logits_ith
        self._llama = llama_cpp.Llama(str(path), n_batch=512, flash_attn=True, verbose=False, **options)

    def clear(self, capacity: int) -> None:
        self._llama.reset()  # `eval` removes what lies beyond from the cache

    def append(self, tokens: Sequence[int]) -> Logits:
        self._llama.eval(list(tokens))
        return np.ctypeslib.as_array(self._logits(self._llama.ctx, -1), (self._llama.n_vocab(),))


class OpenVino:
    """OpenVINO's runtime with the model as OpenVINO GenAI loads it.

    GenAI itself takes a prompt and generates; it has no call that appends given tokens. ``hints`` are properties of the
    CPU plugin; without any, activations are bfloat16 where the processor multiplies that, and the cache is uint8.
    """

    def __init__(self, models: Models, threads: int, *, hints: Mapping[str, object]) -> None:
        import openvino as ov

        graph = peer_openvino.openvino_folder(models) / peer_openvino.MODEL
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **hints}
        self._request = ov.Core().compile_model(str(graph), "CPU", options).create_infer_request()
        self._length = 0

    def clear(self, capacity: int) -> None:
        self._request.reset_state()
        self._length = 0

    def append(self, tokens: Sequence[int]) -> Logits:
        start, self._length = self._length, self._length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(start, self._length)[np.newaxis],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits: Logits = self._request.infer(feeds, share_inputs=True, share_outputs=True)["logits"][0, -1]
        return logits


class Torch:
    """transformers' Llama in eager PyTorch, bfloat16, with the bundle's weights. What loading takes says nothing."""

    def __init__(self, models: Models, threads: int) -> None:
        import torch
        from transformers.cache_utils import DynamicCache

        torch.set_num_threads(threads)
        self._torch, self._fresh_cache = torch, DynamicCache
        self._model = peer_models.torch_model(models)
        self._cache: Any = None

    def clear(self, capacity: int) -> None:
        self._cache = self._fresh_cache()

    def append(self, tokens: Sequence[int]) -> Logits:
        ids = self._torch.tensor([list(tokens)])
        with self._torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Logits = out.logits[0, -1].float().numpy()
        return logits


ENGINES: dict[str, Callable[[Models, int], Contestant]] = {
    "ours": Ours,
    "onnxruntime": PlainOnnxRuntime,
    "onnxruntime-prepacked": lambda models, threads: PlainOnnxRuntime(models, threads, prepacked=True),
    "onnxruntime-genai": OnnxRuntimeGenai,
    "llama.cpp-q4_0": lambda models, threads: LlamaCpp(models, threads, kind="Q4_0"),
    "llama.cpp-q4_k": lambda models, threads: LlamaCpp(models, threads, kind="Q4_K"),
    "openvino": lambda models, threads: OpenVino(models, threads, hints={}),
    # Of use where bfloat16 is what the plugin would choose: here activations are quantized to int8, as others do it.
    "openvino-f32": lambda models, threads: OpenVino(
        models, threads, hints={"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    ),
    "torch-bf16": Torch,
}
# Makes its weights whenever it is loaded.
WITHOUT_FILE = "torch-bf16"


class Worker:
    """Answers requests with one engine."""

    def __init__(self, engine: str, models: Models, threads: int) -> None:
        self._name = engine
        self._make = lambda: ENGINES[engine](models, threads)
        self._vocabulary = models.spec.vocabulary
        self._memory = Memory()
        self._engine: Contestant | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Of one request.

        Raises:
            KeyError: there is no such burst.
        """
        bursts: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "prefill": self._prefill,
            "decode": self._decode,
            "ttft": self._ttft,
            "rows": self._rows,
            "linear_layers": self._linear_layers,
        }
        return bursts[request.pop("do")](**request)

    def _load(self) -> dict[str, Any]:
        if self._name != WITHOUT_FILE:
            # Writes what is derived, and fills the page cache: some read their files in the first step only.
            before = self._make()
            before.clear(COMPARED)
            before.append(self._text(1, 0))
            del before
        self._memory.restart()
        started = time.perf_counter()
        engine = self._engine = self._make()
        loaded = time.perf_counter() - started
        forgotten, text = (self._text(COMPARED, seed) for seed in (0, 1))
        engine.clear(COMPARED)
        engine.append(forgotten[:1])
        # Some pack their weights now.
        ready = time.perf_counter() - started
        self._memory.look()
        engine.append(forgotten[1:])
        engine.clear(COMPARED)
        engine.append(text[:30])
        engine.append(text[30:31])
        logits = engine.append(text[31:]).tolist()
        memory = {"peak_rss": self._memory.peak_rss, "anonymous": self._memory.anonymous}
        return {"seconds": loaded, "with_first_step": ready, **memory, "logits": logits}

    def _prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        engine = self._loaded()
        engine.clear(tokens + 1)
        return {"seconds": _seconds(lambda: engine.append(self._text(tokens, seed)))}

    def _decode(self, depth: int, tokens: int, seed: int) -> dict[str, Any]:
        engine = self._loaded()
        engine.clear(depth + tokens + 1)
        engine.append(self._text(depth, seed))
        # The same tokens for all, for weights differ and so would answers.
        times = [_seconds(lambda token=token: engine.append([token])) for token in self._text(tokens, seed + 1)]
        return {"seconds": sum(times) / len(times), "itl": times}

    def _ttft(self, warm: bool, seed: int) -> dict[str, Any]:
        engine = self._loaded()
        engine.clear(QUESTION + 1)
        text = self._text(QUESTION, seed)
        if warm:
            engine.append(text[:PREFIX])
            text = text[PREFIX:]
        return {"seconds": _seconds(lambda: engine.append(text).argmax())}

    def _rows(self, depth: int, rows: int, tokens: int, seed: int) -> dict[str, Any]:
        """``rows`` tokens in one call, ``tokens`` times at one depth."""
        engine = self._ours()
        engine.clear(depth + rows)
        engine.append(self._text(depth, seed))
        guessed = self._text(rows, seed + 1)
        times = []
        for _ in range(1 + tokens):  # the first makes what later ones use again
            times.append(_seconds(lambda: engine.guess(guessed)))
            engine.take_back(rows)
        return {"seconds": sum(times[1:]) / tokens}

    def _linear_layers(self, tokens: int, seed: int) -> dict[str, Any]:
        layers = self._ours().linear_layers
        times = [_seconds(layers.run) for _ in range(1 + tokens)]
        return {"seconds": sum(times[1:]) / tokens, "bytes": layers.bytes}

    def _ours(self) -> Ours:
        engine = self._loaded()
        if not isinstance(engine, Ours):
            raise TypeError(f"asked {type(engine).__name__} for a burst of ours")
        return engine

    def _loaded(self) -> Contestant:
        if self._engine is None:
            raise RuntimeError("asked for a burst before load")
        return self._engine

    def _text(self, count: int, seed: int) -> list[int]:
        # Beyond the specials at its beginning, before [PAD] at its end.
        return [int(token) for token in np.random.default_rng(seed).integers(3, self._vocabulary - 1, count)]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--records", type=Path, required=True, help="bundle with the decoder in records")
    parser.add_argument("--portable", type=Path, required=True, help="the same with MatMulNBits")
    parser.add_argument("--models", type=Path, required=True, help="folder for what is derived from them")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    # Libraries print as they like; answers go where only this script writes.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(options.engine, Models(options.records, options.portable, options.models), options.threads)
    for line in sys.stdin:
        print(json.dumps(_answer(worker, json.loads(line))), file=answers, flush=True)


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Whatever else an engine raises ends this process, and its last line on stderr is the reason in the result."""
    try:
        return worker.answer(request)
    except ModuleNotFoundError as error:
        return {"error": f"{error.name} is not installed"}


if __name__ == "__main__":
    main()
