"""The decoder's CUDA kernels on a GPU: builds them, checks them, times them, and compares them with what else there is.

In this order: every kernel and the whole decoder against double precision, with fresh random numbers (csrc/tests); the
greedy tokens of the demo bundle and of the tiny reference against the processor's; each kernel's time by events
(csrc/tests/time_decoder.cpp); tokens and prompts at the size of a 7B with random weights; the time to the first token
of a molecule and of a protein, encoders and splice included; torch in the same shape; ONNX Runtime's CUDA provider. A
step whose parts are absent is skipped by name, one that fails is named and makes the exit code 1.

Shares are of the limit that binds: bytes over the bandwidth of a copy, or operations over the rate of a product of bf16
matrices, both measured in the same run. Results go to --json, by default benchmarks/results/gpu-<device>.json.

Usage: python benchmarks/gpu_suite.py [--dry] [--work DIR] [--json FILE] [--rounds 9] [--without checks,tokens,...]
--dry goes through all of it on a machine without a GPU, in the emulation and a small shape: its times mean nothing.
Needs cmake, a C++ compiler, nvcc, pybind11 and numpy; uses onnxruntime, onnx, tokenizers, torch, transformers and RDKit
where they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
# Steps of a chain: time is taken around all of them.
CHAIN = 64
MOLECULE_POSITIONS = 94
# Of the standard question, besides 24 atoms; and of the protein, besides its first and last token.
WORDS, ATOMS, RESIDUES = 70, 24, 400
DEPTHS, PROMPTS, ROWS = (0, 128, 512, 1536), (MOLECULE_POSITIONS, 128, 512), (1, 2, 4, 8)
# Rows of a prompt in a call.
CHUNK = 256
# Steps by name; the device and the build are not to be left out.
STEPS = (
    "checks",
    "tokens",
    "kernels",
    "decoder",
    "first token",
    "splice",
    "torch",
    "torch int4",
    "onnxruntime",
    "sanitizer",
)
# Cases of gpu_tests that run on a GPU, by what their names hold; the others are those of the emulation.
_ON_THE_GPU = ("_on_the_gpu", "cuda_")
# Seconds for each tool of compute-sanitizer, under which kernels run many times slower.
_SANITIZER_LIMIT = 100
# Of the whole run: what sanitizers may use is what other steps leave of eight minutes.
_SUITE_SECONDS, _LEAST_SECONDS = 460, 10
# A GPU is lent for minutes: what is broken in one step must not cost the others.
_BROKEN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError, ImportError)
# Launches between two events, for what takes microseconds.
_LAUNCHES = 20


class Skip(Exception):
    """A step that cannot be done here, and why."""


class Failed(Exception):
    """A step whose result is wrong."""


@dataclass(frozen=True)
class Shape:
    """Of a decoder, in int4."""

    hidden: int
    intermediate: int
    heads: int
    head_size: int
    vocabulary: int
    layers: int
    capacity: int
    group: int = 128


FULL = Shape(4096, 11008, 32, 128, 32000, 32, 2048)
SMALL = Shape(128, 256, 4, 32, 300, 2, 160)


@dataclass
class Figure:
    """A measured time.

    Attributes:
        microseconds: the median of rounds.
        bytes, operations: that had to be moved and done; 0 where none of the limits applies.
    """

    name: str
    rows: int
    microseconds: float
    bytes: float = 0
    operations: float = 0
    share: float | None = None


@dataclass
class Run:
    """What a run found out.

    Attributes:
        began: seconds of a clock that only goes forward.
        rates: bytes per second of a copy; operations per second of a product of bf16 matrices, where torch is there.
    """

    dry: bool
    work: Path
    rounds: int
    began: float = field(default_factory=time.monotonic)
    device: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return SMALL if self.dry else FULL

    @property
    def depths(self) -> list[int]:
        steps = self.chain
        return [depth for depth in DEPTHS if depth + steps <= self.shape.capacity]

    @property
    def chain(self) -> int:
        return 2 if self.dry else CHAIN


# --- the machine and the build ----------------------------------------------------------------------------------------


def find_device(run: Run) -> None:
    """Asks nvidia-smi what there is."""
    if run.dry:
        run.device = {"name": "none (dry)", "machine": platform.machine()}
        return
    fields = ("name", "driver_version", "compute_cap", "memory.total")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failed(f"nvidia-smi cannot be asked ({error}); --dry needs no GPU") from error
    run.device = dict(zip(fields, (part.strip() for part in found.splitlines()[0].split(",")), strict=True))
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    run.device["nvcc"] = nvcc.splitlines()[-2].strip()


def build(run: Run) -> None:
    """Compiles for this GPU; --dry, for the emulation."""
    import pybind11

    capability = str(run.device.get("compute_cap", "")).replace(".", "")
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBIOMEDGPT_BUILD_PYTHON=ON",
        "-DBIOMEDGPT_BUILD_TESTS=ON",
        f"-DBIOMEDGPT_CUDA={'OFF' if run.dry else 'ON'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *([] if run.dry else [f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real"]),
        *(["-GNinja"] if shutil.which("ninja") and not (run.work / "CMakeCache.txt").exists() else []),
    ]
    targets = ["gpu_tests", "time_decoder", *(["_emulated"] if run.dry else ["_native", "_ort_ops"])]
    jobs = str(os.cpu_count() or 2)
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(run.work), *options],
        ["cmake", "--build", str(run.work), "--parallel", jobs, "--target", *targets],
    ):
        _output(command)


def _output(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        raise Failed(f"{Path(command[0]).name} exited with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def _module(run: Run, name: str, module: str) -> ModuleType:
    path = next(run.work.glob(f"{name}.*so"))
    known = sys.modules.get(module)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise Failed(f"{path} is no module")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def native_decoder(run: Run) -> type[Any]:
    """The class of the kernels; --dry, the emulated one."""
    if run.dry:
        # Everything else is that of the package, which is installed.
        return _module(run, "_emulated", "_emulated").CudaDecoder  # type: ignore[no-any-return]
    # Nothing has to be installed: the packages beside this file, with the module that was built.
    for folder in ("export", "runtime"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    return _module(run, "_native", "biomedgpt_edge._native").CudaDecoder  # type: ignore[no-any-return]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_kernels(run: Run) -> None:
    """The C++ tests with numbers that no run had before, or those of a run that is to be seen again."""
    seed = os.environ.get("BIOMEDGPT_TEST_SEED") or str(time.time_ns() % 2**31)
    cases = () if run.dry else _ON_THE_GPU
    try:
        said = _output([str(run.work / "gpu_tests"), *cases], BIOMEDGPT_TEST_SEED=seed)
    except Failed as failed:
        raise Failed(f"BIOMEDGPT_TEST_SEED={seed}: {failed}") from failed
    last = said.strip().splitlines()[-1]
    if not run.dry and "skipped" in said:
        raise Failed(f"the tests found no GPU: {last}")
    print(f"  seed {seed}: {last}")


def check_tokens(run: Run) -> None:
    """Greedy tokens on the GPU and on the processor, behind random prompts, of each bundle that there is."""
    native_decoder(run)
    try:
        from biomedgpt_edge import bundle, decoder  # noqa: F401
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from error
    _check_tokens_of(run, "the demo bundle", ROOT / "runtime" / "biomedgpt_edge" / "demo_bundle")
    try:
        _check_tokens_of(run, "the tiny reference", _tiny_reference(run.work / "tiny-reference"))
    except Skip as skipped:
        run.skipped["tokens of the tiny reference"] = str(skipped)


def _tiny_reference(out: Path) -> Path:
    """Its int4 bundle, exported to ``out`` unless it is there."""
    try:
        from biomedgpt_export.exporter import export_bundle
        from biomedgpt_export.families.biomedgpt_10b import Layout
        from biomedgpt_export.options import ExportOptions
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from error
    if not out.exists():
        source = Layout.locate(ROOT / "tests" / "data" / "biomedgpt-tiny")
        export_bundle(ExportOptions(source, out, "int4", quantizer="rtn", proof="none"), lambda line: None)
    return out


def _check_tokens_of(run: Run, name: str, folder: Path) -> None:
    from biomedgpt_edge.bundle import Bundle
    from biomedgpt_edge.decoder.cuda import NativeDecoder
    from biomedgpt_edge.decoder.graph import choose, decoder_graph
    from biomedgpt_edge.decoder.onnx import OnnxDecoder

    bundle = Bundle.open(folder)
    ours = NativeDecoder(bundle, context=64 if run.dry else None, native=native_decoder(run))
    theirs = OnnxDecoder(bundle, threads=2, graph=decoder_graph(bundle, choose(bundle), "once"))
    random = np.random.default_rng()
    steps, prompts = (2, 1) if run.dry else (24, 8)
    same = near = 0
    for _ in range(prompts):
        prompt = bundle.embeddings.lookup([int(token) for token in random.integers(3, len(bundle.tokenizer), 20)])
        with ours.open(64) as a, theirs.open(64) as b:
            x, y = a.prefill(prompt), b.prefill(prompt)
            for _ in range(steps):
                found, expected = (logits[: len(bundle.tokenizer)] for logits in (x, y))
                token = int(expected.argmax())
                same += int(found.argmax()) == token
                # The processor's activations have eight bits there: two logits as near as that may change places.
                near += abs(float(found.max() - found[token])) <= 0.03 * float(np.abs(expected).max())
                x, y = a.step(token), b.step(token)
    total = prompts * steps
    print(f"  {name}: {same} of {total} greedy tokens are the processor's, {near} within 3 % of its largest logit")
    if near < total:
        raise Failed(f"{total - near} of {total} tokens of {name} are others than the processor's")


# --- times ------------------------------------------------------------------------------------------------------------


def time_kernels(run: Run) -> None:
    """Each kernel alone, at the shape's sizes."""
    shape = run.shape
    sizes = (shape.hidden, shape.intermediate, shape.heads, shape.heads, shape.head_size, shape.vocabulary)
    numbers = (*sizes, shape.group, shape.capacity, 1 if run.dry else run.rounds)
    said = _output([str(run.work / "time_decoder"), *map(str, numbers)])
    for line in said.splitlines():
        found = json.loads(line)
        figure = Figure(found["kernel"], found["rows"], found["microseconds"], found["bytes"], found["operations"])
        if figure.name == "copy":
            run.rates["bytes"] = figure.bytes / figure.microseconds * 1e6
        run.figures.append(figure)


def random_matrix(random: np.random.Generator, rows: int, columns: int, group: int, matrices: int = 1) -> Any:
    """int4 records of a matrix whose weights are about 1 / sqrt(columns), as ``_native.CudaDecoder`` takes it."""
    panels, groups, size = -(-rows // 32) * matrices, -(-columns // group), 32 * (group // 2 + 2)
    records = random.integers(0, 256, (panels, groups, size), np.uint8)
    records[:, :, 16 * group :] = np.full(32, 1 / (4.6 * columns**0.5), np.float16).view(np.uint8)
    return records.reshape(panels, groups * size), rows, columns, group, 4, None


def random_model(shape: Shape) -> dict[str, Any]:
    """The same matrices in every layer: each is brought to the GPU anew."""
    random = np.random.default_rng(1)
    hidden, width = shape.hidden, shape.heads * shape.head_size
    ones = np.ones(hidden, np.float32)
    layer = (
        ones,
        random_matrix(random, 3 * width, hidden, shape.group),
        random_matrix(random, hidden, width, shape.group),
        ones,
        random_matrix(random, shape.intermediate, hidden, shape.group, 2),
        random_matrix(random, hidden, shape.intermediate, shape.group),
    )
    angles = np.outer(np.arange(shape.capacity), 10000.0 ** (-np.arange(shape.head_size // 2) * 2 / shape.head_size))
    return {
        "hidden": hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads,
        "kv_heads": shape.heads,
        "head_size": shape.head_size,
        "epsilon": 1e-6,
        "choosable": shape.vocabulary,
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "final_norm": ones,
        "embeddings": random.standard_normal((shape.vocabulary, hidden), np.float32).astype(np.float16),
        "embedding_scales": None,
        "head": random_matrix(random, shape.vocabulary, hidden, shape.group),
        "layers": (layer,) * shape.layers,
    }


def weight_bytes(shape: Shape) -> float:
    """That a token reads of the weights."""
    width = shape.heads * shape.head_size
    matrices = 4 * shape.hidden * width + 3 * shape.hidden * shape.intermediate
    return (shape.layers * matrices + shape.vocabulary * shape.hidden) * (0.5 + 2 / shape.group)


def time_decoder(run: Run) -> None:
    """The whole decoder: chains of tokens at a depth, several rows at once, prompts."""
    shape = run.shape
    decoder = native_decoder(run)(random_model(shape), shape.capacity)
    print(f"  {decoder.bytes / 2**20:,.0f} MiB on {decoder.device}, {decoder.cache_bytes / 2**20:,.0f} for a KV cache")
    cache, greedy = decoder.new_cache(), (0.0, 0, 1.0, 0.0)
    embeddings = np.random.default_rng(2).standard_normal((shape.capacity, shape.hidden), np.float32)

    def prefill(positions: int, start: int = 0) -> None:
        for begin in range(start, positions, CHUNK):
            end = min(begin + CHUNK, positions)
            rows = list(range(begin, end))
            decoder.run([cache] * len(rows), rows, embeddings[begin:end], [len(rows) - 1], None, [greedy])

    weights, by_position = weight_bytes(shape), 4.0 * shape.layers * shape.heads * shape.head_size
    for depth in run.depths:
        if depth:
            prefill(depth)

        def chain(depth: int = depth) -> None:
            decoder.run_chain(cache, depth, 5, [greedy] * run.chain)

        moved = weights + by_position * (depth + run.chain / 2)
        run.figures.append(Figure(f"token at {depth}", 1, median(run, chain) / run.chain, moved))
    for rows in ROWS:
        positions, logits = list(range(100, 100 + rows)), np.empty((rows, shape.vocabulary), np.float32)

        def step(rows: int = rows, positions: list[int] = positions, logits: npt.NDArray[np.float32] = logits) -> None:
            decoder.run([cache] * rows, positions, [7] * rows, list(range(rows)), logits)

        run.figures.append(Figure("step with logits", rows, median(run, step), weights))
    for positions_of_prompt in PROMPTS:
        if positions_of_prompt > shape.capacity:
            continue

        def prompt(count: int = positions_of_prompt) -> None:
            prefill(count)

        operations = 2 * weights / (0.5 + 2 / shape.group) * positions_of_prompt
        run.figures.append(Figure("prompt to token", positions_of_prompt, median(run, prompt), weights, operations))
    run.device["launches overlap"] = decoder.overlaps


def median(run: Run, work: Callable[[], None]) -> float:
    """Microseconds on the host's clock, after a round to warm up."""
    times = []
    for _ in range(2 if run.dry else run.rounds + 1):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e6)
    return float(statistics.median(times[1:]))


@dataclass(frozen=True)
class Question:
    """A prompt with soft tokens.

    Attributes:
        soft, width: of its features.
        norm: epsilon of the norm that is folded into the projection.
        encode: makes the features, ``[soft, width]``, here or on the GPU.
        bytes, operations: of the encoder, where limits of the GPU apply to it.
    """

    name: str
    soft: int
    width: int
    norm: float | None
    encode: Callable[[], Any]
    bytes: float = 0
    operations: float = 0


def time_first_token(run: Run) -> None:
    """From what encoders read to the first token on the host, as the runtime does it; weights are random."""
    decoder = native_decoder(run)(random_model(run.shape), run.shape.capacity)
    sources: dict[str, Callable[[Run, Any], Question]] = {
        "of a molecule": _molecule,
        "of a protein, encoder by torch": _protein_by_torch,
        "of a protein, encoder by onnxruntime": _protein_by_onnxruntime,
    }
    for name, source in sources.items():
        try:
            _time_question(run, decoder, source(run, decoder))
        except Skip as skipped:
            run.skipped[f"first token {name}"] = str(skipped)


def _time_question(run: Run, decoder: Any, question: Question) -> None:
    shape, before, behind = run.shape, WORDS // 2, WORDS // 2 + question.soft
    weight = decoder.array((shape.hidden, question.width), "float16")
    weight.upload((np.random.default_rng(3).standard_normal(weight.shape) * 0.02).astype(np.float16))
    bias = decoder.array((shape.hidden,), "float32")
    bias.upload(np.zeros(shape.hidden, np.float32))
    words, positions = np.arange(3, 3 + WORDS), WORDS + question.soft
    cache, greedy = decoder.new_cache(), (0.0, 0, 1.0, 0.0)

    def ask() -> None:
        features = question.encode()
        if isinstance(features, np.ndarray):
            made = features
            features = decoder.array(made.shape, "float32")
            features.upload(made)
        rows = decoder.array((positions, shape.hidden), "float32")
        decoder.splice(rows[:before], (("tokens", 0, words[:before]),), True)
        decoder.splice(rows[before:behind], (("features", 0, features, weight, bias, question.norm),), True)
        decoder.splice(rows[behind:], (("tokens", 0, words[before:]),), True)
        for begin in range(0, positions, CHUNK):
            places = list(range(begin, min(begin + CHUNK, positions)))
            chunk = rows[begin : places[-1] + 1]
            decoder.run([cache] * len(places), places, chunk, [len(places) - 1], None, [greedy])

    weights = weight_bytes(shape)
    operations = 2 * weights / (0.5 + 2 / shape.group) * positions + 2.0 * question.soft * question.width * shape.hidden
    figure = Figure(f"first token, {question.name}", positions, median(run, ask))
    figure.bytes = weights * -(-positions // CHUNK) + question.bytes
    figure.operations = operations + question.operations
    run.figures.append(figure)
    decoder.free_cache(cache)


def _molecule(run: Run, decoder: Any) -> Question:
    """A ring of carbon; the encoder is the packaged demo's, whose shape is that of the 10B, on the processor."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Skip("onnxruntime is not installed") from error
    path = ROOT / "runtime" / "biomedgpt_edge" / "demo_bundle" / "molecule_encoder.onnx"
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    neighbours = np.roll(np.eye(ATOMS, dtype=np.float32), 1, axis=1)
    counts = np.zeros((ATOMS, 9), np.float32)
    # Two aromatic bonds without a direction, and a loop to itself, for each.
    counts[:, 3], counts[:, 4], counts[:, 6] = 2, 1, 3
    feeds = {
        "atom_type": np.full(ATOMS, 5),
        "chirality": np.zeros(ATOMS, np.int64),
        "adjacency": np.eye(ATOMS, dtype=np.float32) + neighbours + neighbours.T,
        "edge_counts": counts,
    }
    width = session.get_outputs()[0].shape[1]
    name = f"molecule of {ATOMS} atoms, its encoder on the processor"
    return Question(name, ATOMS, width, None, lambda: session.run(None, feeds)[0])


def _esm_sizes(run: Run) -> dict[str, int]:
    """Of ESM-2 3B."""
    layers, hidden, inner, heads = (2, 64, 128, 4) if run.dry else (36, 2560, 10240, 40)
    return {"layers": layers, "hidden_size": hidden, "intermediate_size": inner, "heads": heads, "vocabulary": 33}


def _protein(run: Run, engine: str, encode: Callable[[], Any]) -> Question:
    sizes, soft = _esm_sizes(run), 10 if run.dry else RESIDUES + 2
    weights = sizes["layers"] * (4 * sizes["hidden_size"] ** 2 + 2 * sizes["hidden_size"] * sizes["intermediate_size"])
    name = f"protein of {soft - 2} residues, its encoder by {engine}"
    return Question(name, soft, sizes["hidden_size"], 1e-5, encode, 2.0 * weights, 2.0 * weights * soft)


def _residue_ids(run: Run) -> npt.NDArray[np.int64]:
    return np.arange(10 if run.dry else RESIDUES + 2)[np.newaxis] % 20 + 4


def _protein_by_torch(run: Run, decoder: Any) -> Question:
    """ESM-2 3B of transformers in float16, on the decoder's stream: its features are read where they are."""
    torch = _torch() if run.dry else _cuda_torch(run, "")
    try:
        from transformers import EsmConfig, EsmModel
    except ImportError as error:
        raise Skip("transformers is not installed") from error
    sizes = _esm_sizes(run)
    config = EsmConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["intermediate_size"],
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        token_dropout=True,
        pad_token_id=1,
        mask_token_id=32,
    )
    place, dtype = ("cpu", torch.float32) if run.dry else ("cuda", torch.float16)
    with torch.device(place):
        model = EsmModel(config, add_pooling_layer=False).to(dtype).eval()
    ids = torch.from_numpy(_residue_ids(run)).to(place)
    stream = None if run.dry else torch.cuda.ExternalStream(decoder.stream)

    def encode() -> Any:
        with torch.inference_mode(), torch.cuda.stream(stream):
            return model(ids).last_hidden_state[0]

    return _protein(run, "torch, float16", encode)


def _protein_by_onnxruntime(run: Run, decoder: Any) -> Question:
    """The same as the exporter's graph in float16, by the CUDA provider, as the runtime runs it."""
    if not run.dry:
        _require_provider(run)
    try:
        from biomedgpt_edge.encoders import protein_signature
        from biomedgpt_edge.ort_cuda import open_cuda_session
        from biomedgpt_edge.ort_session import open_session
        from biomedgpt_export.graphs.config import EsmConfig
        from gpu_graphs import write_esm
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from error
    config = EsmConfig(**_esm_sizes(run), context=1026, rope_base=10000.0, norm_eps=1e-5, token_dropout=True)
    path, spec = write_esm(_emptied(run.work / "esm"), config)
    inputs, outputs = protein_signature(spec)
    feeds = {"residue_ids": _residue_ids(run)}
    if run.dry:
        session = open_session(path, threads=1, inputs=inputs, outputs=outputs)
        return _protein(run, "onnxruntime, float16", lambda: session.run(None, feeds)[0][0])
    session = open_cuda_session(path, inputs=inputs, outputs=outputs, stream=decoder.stream)
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def encode() -> Any:
        features = decoder.array((RESIDUES + 2, config.hidden_size), "float32")
        binding = session.io_binding()
        binding.bind_cpu_input("residue_ids", feeds["residue_ids"])
        shape = [1, *features.shape]
        binding.bind_output("residue_features", "cuda", 0, np.float32, shape, features.pointer)
        session.run_with_iobinding(binding, options)
        return features

    return _protein(run, "onnxruntime, float16", encode)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _require_provider(run: Run) -> None:
    """Skips where ONNX Runtime or its CUDA provider is missing."""
    native_decoder(run)
    try:
        from biomedgpt_edge.errors import PlatformError
        from biomedgpt_edge.ort_cuda import require_cuda
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from error
    try:
        require_cuda()
    except PlatformError as error:
        raise Skip(error.message) from error


def time_splice(run: Run) -> None:
    """A prompt with a protein of 1,024 residues, by our kernel and by torch in float16."""
    torch = _cuda_torch(run, "the splice op is not emulated")
    from torch.nn.functional import embedding, linear

    native_decoder(run)
    splice = sys.modules["biomedgpt_edge._native"].splice_cuda
    words, residues, width, hidden = 74, 1024, 2560, FULL.hidden

    def halves(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.float16) * 0.05

    table, features, weight = halves(32000, hidden), halves(residues, width), halves(hidden, width)
    out, bias = halves(words + residues, hidden), torch.zeros(hidden, device="cuda")
    ids = np.arange(words, dtype=np.int64)
    on_gpu, half_bias = torch.from_numpy(ids).cuda(), bias.half()
    segments = (("tokens", 0, ids), ("features", words, features, weight, bias, None))
    stream = torch.cuda.current_stream().cuda_stream

    def theirs() -> None:
        out[:words] = embedding(on_gpu, table)
        out[words:] = linear(features, weight, half_bias)

    moved, operations = 2.0 * (weight.numel() + features.numel() + out.numel()), 2.0 * residues * width * hidden
    ways: dict[str, Callable[[], object]] = {
        "splice of 1,024 residues": lambda: splice(out, table, None, segments, stream, True),
        "torch: the same, float16, eager": theirs,
        "torch: the same, float16, compiled": torch.compile(theirs, mode="max-autotune-no-cudagraphs"),
    }
    for name, work in ways.items():
        run.figures.append(Figure(name, residues, _by_events(run, work), moved, operations))


# --- what else there is -----------------------------------------------------------------------------------------------


def time_torch(run: Run) -> None:
    """Products of bf16 matrices, which is the limit of prompts; and tokens of the same shape in bf16."""
    torch = _torch()
    if not run.dry and not torch.cuda.is_available():
        raise Skip("this torch sees no GPU")
    place = "cpu" if run.dry else "cuda"
    size = 64 if run.dry else 8192
    a, b = (torch.randn(size, size, device=place, dtype=torch.bfloat16) for _ in range(2))
    taken, operations = _torch_median(run, lambda: torch.mm(a, b)), 2.0 * size**3
    run.rates["operations"] = operations / taken * 1e6
    run.figures.append(Figure("torch: product of bf16 matrices", size, taken, operations=operations))
    for name, step in _torch_tokens(run, place):
        taken = _torch_median(run, step)
        run.figures.append(Figure(f"torch: token at 128, {name}", 1, taken, 4 * weight_bytes(run.shape)))


def time_torch_int4(run: Run) -> None:
    """All products of a token with torch's own int4 weights, and nothing else of it."""
    torch = _cuda_torch(run, "torch's int4 products need a GPU")
    shape = run.shape
    width, ops = shape.heads * shape.head_size, torch.ops.aten
    sizes = [(3 * width, shape.hidden), (shape.hidden, width), (2 * shape.intermediate, shape.hidden)]
    sizes.append((shape.hidden, shape.intermediate))

    def packed(rows: int, columns: int) -> tuple[Any, Any, Any]:
        levels = torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.uint8)
        scales = torch.full((columns // shape.group, rows, 2), 0.01, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
        return x, ops._convert_weight_to_int4pack(levels, 8), scales

    matrices = [packed(*size) for _ in range(shape.layers) for size in sizes] + [packed(shape.vocabulary, shape.hidden)]

    def work() -> None:
        for x, weight, scales in matrices:
            ops._weight_int4pack_mm(x, weight, shape.group, scales)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    taken = _torch_median(run, graph.replay)
    run.figures.append(Figure("torch: products of a token, int4", 1, taken, weight_bytes(shape)))


def time_onnxruntime(run: Run) -> None:
    """Tokens and prompts of the same shape by ONNX Runtime's CUDA provider, through the runtime's ``--device cuda``."""
    if not run.dry:
        _require_provider(run)
    try:
        from biomedgpt_edge.decoder.onnx_cuda import CudaDecoder
        from biomedgpt_export.graphs.config import LlamaConfig
        from gpu_graphs import decoder_bundle
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from error
    shape = run.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_size=shape.head_size,
        vocabulary=shape.vocabulary,
        context=shape.capacity,
        rope_base=10000.0,
        norm_eps=1e-6,
        attention_bias=False,
        tied_head=False,
    )
    bundle = decoder_bundle(_emptied(run.work / "onnxruntime"), config, shape.group)
    if run.dry:
        import onnxruntime as ort

        ort.InferenceSession(str(bundle.file(bundle.manifest.decoder.cuda)), providers=["CPUExecutionProvider"])
        raise Skip("dry: the graph is written and loaded, and not run")
    decoder = CudaDecoder(bundle)
    rows = np.random.default_rng(4).standard_normal((max(PROMPTS), shape.hidden), np.float32)
    weights = weight_bytes(shape)
    for positions in PROMPTS:
        with decoder.open(positions) as state:

            def prompt(state: Any = state, positions: int = positions) -> None:
                state.truncate(0)
                state.prefill(rows[:positions])

            operations = 2 * weights / (0.5 + 2 / shape.group) * positions
            taken = median(run, prompt)
            run.figures.append(Figure("onnxruntime cuda: prompt to logits", positions, taken, weights, operations))
    with decoder.open(shape.capacity) as state:
        state.prefill(rows[:128])

        def token() -> None:
            for _ in range(run.chain):
                state.step(5)
            state.truncate(128)

        run.figures.append(Figure("onnxruntime cuda: token at 128", 1, median(run, token) / run.chain, weights))


def check_sanitizer(run: Run) -> None:
    """The same cases under compute-sanitizer: addresses, races in shared memory, barriers."""
    if run.dry:
        raise Skip("csrc/tests/sanitize.sh looks at the emulation")
    if shutil.which("compute-sanitizer") is None:
        raise Skip("compute-sanitizer is not on the PATH")
    for tool in ("memcheck", "racecheck", "synccheck"):
        left = _SUITE_SECONDS - (time.monotonic() - run.began)
        if left < _LEAST_SECONDS:
            run.skipped[f"sanitizer, {tool}"] = "the other steps left no time for it"
            continue
        limit = min(_SANITIZER_LIMIT, left)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(run.work / "gpu_tests")]
        try:
            done = subprocess.run([*command, *_ON_THE_GPU], capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            run.skipped[f"sanitizer, {tool}"] = f"it took more than {limit:.0f} s"
            continue
        if done.returncode != 0:
            run.failed[f"sanitizer, {tool}"] = f"exited with {done.returncode}: {done.stdout[-2000:]}"
        print(f"  {tool}: {done.stdout.strip().splitlines()[-1]}")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Skip("torch is not installed") from error
    return torch


def _cuda_torch(run: Run, why_not_dry: str) -> Any:
    if run.dry:
        raise Skip(why_not_dry)
    torch = _torch()
    if not torch.cuda.is_available():
        raise Skip("this torch sees no GPU")
    return torch


def _by_events(run: Run, work: Callable[[], object]) -> float:
    """Microseconds of one launch, the median of rounds, by events of torch's stream."""
    torch = _torch()
    times = []
    for _ in range(run.rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_LAUNCHES):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / _LAUNCHES)
    return float(statistics.median(times[1:]))


def _torch_median(run: Run, work: Callable[[], object]) -> float:
    import torch

    def waited() -> None:
        work()
        if not run.dry:
            torch.cuda.synchronize()

    return median(run, waited)


def _torch_tokens(run: Run, place: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """A token of a Llama in bf16, with one layer's weights in all of them: eager, and compiled with CUDA graphs."""
    import torch
    from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

    shape, depth = run.shape, min(128, run.shape.capacity - 1)
    width = shape.heads * shape.head_size

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=place, dtype=torch.bfloat16) / columns**0.5

    layers = [
        (weight(3 * width, shape.hidden), weight(shape.hidden, width), weight(2 * shape.intermediate, shape.hidden),
         weight(shape.hidden, shape.intermediate))
        for _ in range(shape.layers)
    ]  # fmt: skip
    head = weight(shape.vocabulary, shape.hidden)
    keys, values = (
        torch.randn(shape.layers, 1, shape.heads, depth + 1, shape.head_size, device=place, dtype=torch.bfloat16)
        for _ in range(2)
    )
    x = torch.randn(1, shape.hidden, device=place, dtype=torch.bfloat16)

    def token(x: torch.Tensor) -> torch.Tensor:
        for index, (qkv, out, gate_up, down) in enumerate(layers):
            normed = rms_norm(x, (shape.hidden,))
            query, key, value = (normed @ qkv.T).view(3, 1, shape.heads, 1, shape.head_size).unbind()
            keys[index, :, :, depth:] = key
            values[index, :, :, depth:] = value
            attended = scaled_dot_product_attention(query, keys[index], values[index])
            x = x + attended.reshape(1, width) @ out.T
            gate, up = (rms_norm(x, (shape.hidden,)) @ gate_up.T).chunk(2, dim=-1)
            x = x + (silu(gate) * up) @ down.T
        return (x @ head.T).argmax()

    with torch.inference_mode():
        yield "bf16, eager", lambda: token(x)
        if run.dry:
            run.skipped["torch, compiled"] = "dry"
            return
        compiled = torch.compile(token, mode="reduce-overhead")
        yield "bf16, compiled", lambda: compiled(x)


# --- what people see --------------------------------------------------------------------------------------------------


def add_shares(run: Run) -> None:
    """Of the larger of both limits."""
    for figure in run.figures:
        least = [
            amount / run.rates[rate] * 1e6
            for rate, amount in (("bytes", figure.bytes), ("operations", figure.operations))
            if amount and rate in run.rates
        ]
        if least and not run.dry:
            figure.share = max(least) / figure.microseconds


def print_table(run: Run) -> None:
    """Every figure, and what is missing."""
    print(f"\n{run.device.get('name')}" + "".join(f", {key} {run.device[key]}" for key in list(run.device)[1:]))
    for name, rate in run.rates.items():
        print(f"measured limit: {rate / 1e12:,.3f} T{'B' if name == 'bytes' else 'OP'}/s")
    print(f"{'':44} {'rows':>5} {'µs':>12} {'share of the limit':>19}")
    for figure in run.figures:
        share = "" if figure.share is None else f"{figure.share:.0%}"
        print(f"{figure.name:44} {figure.rows:>5} {figure.microseconds:>12,.1f} {share:>19}")
    for name, why in run.skipped.items():
        print(f"skipped {name}: {why}")
    for name, why in run.failed.items():
        print(f"FAILED {name}: {why}")
    if run.dry:
        print("dry: these times are those of an emulation, and mean nothing")


def write_json(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "schema": 1,
        "dry": run.dry,
        "device": run.device,
        "python": platform.python_version(),
        "shape": asdict(run.shape),
        "rates": run.rates,
        "figures": [asdict(figure) for figure in run.figures],
        "skipped": run.skipped,
        "failed": run.failed,
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="without a GPU, emulated")
    parser.add_argument("--work", type=Path, help="where to build (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without", default="", help=f"steps to leave out, of {','.join(STEPS)}")
    options = parser.parse_args(arguments)
    without = {name for name in options.without.split(",") if name}
    if without - set(STEPS) or options.rounds < 1:
        parser.error(f"--without takes {', '.join(STEPS)}, and --rounds a number from 1 on")
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(options.dry, (options.work or Path(temporary)).absolute(), options.rounds)
        return _run(run, without, options.json)


def _run(run: Run, without: set[str], path: Path | None) -> int:
    steps: dict[str, Callable[[Run], None]] = {
        "device": find_device,
        "build": build,
        "checks": check_kernels,
        "tokens": check_tokens,
        "kernels": time_kernels,
        "decoder": time_decoder,
        "first token": time_first_token,
        "splice": time_splice,
        "torch": time_torch,
        "torch int4": time_torch_int4,
        "onnxruntime": time_onnxruntime,
        "sanitizer": check_sanitizer,
    }
    for name, step in steps.items():
        if name in without:
            run.skipped[name] = "not wanted"
            continue
        begin = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            step(run)
        except Skip as skipped:
            run.skipped[name] = str(skipped)
        except Failed as failed:
            run.failed[name] = str(failed)
            if name in ("device", "build"):
                break
        except _BROKEN as error:
            run.failed[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(f"  {time.perf_counter() - begin:.1f} s", flush=True)
        # A run that is cut off loses the step it was in, and no figure.
        _save(run, path)
    _save(run, path)
    print_table(run)
    return 1 if run.failed else 0


def _save(run: Run, path: Path | None) -> None:
    add_shares(run)
    device = str(run.device.get("name", "none")).lower().replace(" ", "-")
    if path is not None or not run.dry:
        write_json(run, path or ROOT / "benchmarks" / "results" / f"gpu-{device}.json")


if __name__ == "__main__":
    sys.exit(main())
