"""One engine in a process of its own, told over pipes what to run: what `peers.py` starts for each contestant.

Every engine has the same two verbs, forget everything and append tokens; what is timed is made of these, so that all
are timed alike. Protocol: a JSON object per line. Requests name a burst (`load`, `prefill`, `decode`, `ttft`); answers
hold seconds, or `error`. An engine that is not installed says so at `load`.

Usage: python benchmarks/peer_engines.py ENGINE --bundle B --models DIR --threads N   (stdin: requests, stdout: answers)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import peer_models
from biomedgpt_edge.bench.counters import Memory
from peer_models import Models

# Of the standard molecule question: positions of the template before the molecule, and all.
PREFIX, QUESTION = 47, 94

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
    """This runtime, through the decoder that answers run through."""

    def __init__(self, models: Models, threads: int) -> None:
        from biomedgpt_edge.engine import Engine

        self._engine = Engine.load(models.bundle, threads=threads, verify="sizes")
        self._state = self._engine.decoder.open(1)

    def clear(self, capacity: int) -> None:
        self._state.close()
        self._state = self._engine.decoder.open(capacity)

    def append(self, tokens: Sequence[int]) -> Logits:
        from biomedgpt_edge.splice import TokenPart, splice

        if len(tokens) == 1:
            return self._state.step(tokens[0])
        embeddings = splice([TokenPart(np.array(tokens, np.int64))], self._engine.bundle.embeddings, threads=1)
        return self._state.prefill(embeddings)


class PlainOnnxRuntime:
    """MatMulNBits in bare onnxruntime: the portable graph, its cache in buffers that are bound once per sequence."""

    def __init__(self, models: Models, threads: int, *, prepacked: bool = False) -> None:
        import onnxruntime as ort

        from biomedgpt_edge.bundle import Bundle

        opened = Bundle.open(models.bundle)
        self._spec = opened.manifest.decoder
        self._table = peer_models.table_of(opened)
        graph = models.portable_graph
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
            "inputs_embeds": self._table[np.array(tokens)][np.newaxis],
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


def _prepacked(graph: Path, target: Path, threads: int) -> Path:
    """The graph as ONNX Runtime stores it with weights packed for this processor; made at the first load."""
    import onnxruntime as ort

    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(target)
        data = f"{target.name}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return target


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
    """llama.cpp through llama-cpp-python, over random blocks of one kind."""

    def __init__(self, models: Models, threads: int, *, kind: str) -> None:
        from llama_cpp import Llama

        path = peer_models.gguf_file(models, kind)
        context = models.spec.context
        options = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "n_batch": 512}
        self._llama = Llama(str(path), logits_all=False, verbose=False, **options)

    def clear(self, capacity: int) -> None:
        self._llama.reset()

    def append(self, tokens: Sequence[int]) -> Logits:
        import llama_cpp

        self._llama.eval(list(tokens))
        pointer = llama_cpp.llama_get_logits(self._llama.ctx)
        return np.ctypeslib.as_array(pointer, (self._llama.n_vocab(),))


class Torch:
    """transformers' Llama in eager PyTorch, bfloat16."""

    def __init__(self, models: Models, threads: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.cache_utils import DynamicCache

        torch.set_num_threads(threads)
        spec = models.spec
        config = LlamaConfig(
            vocab_size=spec.vocabulary,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            max_position_embeddings=spec.context,
        )
        self._torch, self._fresh_cache = torch, DynamicCache
        torch.set_default_dtype(torch.bfloat16)
        self._model = LlamaForCausalLM(config).eval()
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
    "torch-bf16": Torch,
}


# Those that compute with the bundle's own weights: their logits are ours, but for rounding.
SAME_WEIGHTS = ("ours", "onnxruntime", "onnxruntime-prepacked", "onnxruntime-genai")


class Worker:
    """Answers requests with one engine."""

    def __init__(self, engine: str, models: Models, threads: int) -> None:
        self._make = lambda: ENGINES[engine](models, threads)
        self._vocabulary = models.spec.vocabulary
        self._memory = Memory()
        self._engine: Contestant | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Of one request.

        Raises:
            KeyError: there is no such burst.
        """
        bursts = {"load": self._load, "prefill": self._prefill, "decode": self._decode, "ttft": self._ttft}
        return bursts[request.pop("do")](**request)

    def _load(self) -> dict[str, Any]:
        self._make()  # writes what is derived, and fills the page cache
        self._memory.restart()
        started = time.perf_counter()
        self._engine = self._make()
        seconds = time.perf_counter() - started
        self._memory.look()
        memory = {"peak_rss": self._memory.peak_rss, "anonymous": self._memory.anonymous}
        self._engine.clear(4)
        self._engine.append([5, 6, 7])
        return {"seconds": seconds, **memory, "logits": self._engine.append([8]).tolist()}

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
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="folder for what is derived from the bundle")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    # Libraries print as they like; answers go where only this script writes.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(options.engine, Models(options.bundle, options.models), options.threads)
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
