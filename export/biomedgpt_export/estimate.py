"""What an export takes, before it begins: its steps in order, the memory that they need, about how long they last.

Memory is what a process cannot give back. Pages of the checkpoint, which is mapped, come on top while there is room,
and go when there is none. Time is the arithmetic of each step, at the speed of a few short products on this machine;
reading and writing files is not in it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .calibration import Questions
from .device import CPU, moved
from .errors import MemoryNeedError
from .families.base import Configs
from .graphs.config import EsmConfig, LlamaConfig
from .graphs.linear import GraphPrecision
from .plan import gigabytes
from .quantize.layerwise import HESSIAN_ROWS
from .quantize.rtn import RoundToNearest
from .streamed import ROWS_AT_ONCE
from .streamed_model import DECODER_PART, PROTEIN_PART

# Bytes of a float32, in which everything but stored weights is computed.
_FLOAT = 4
# The solver's copies of H [K, K]: the record, H in order, H damped and reversed, its factor, the factor turned back.
_SQUARES = 5
# While columns are chosen: the record, H in order, its factor.
_SQUARES_CHOOSING = 3
# And float32 copies of the matrix then: its columns, their errors, the squares of these, and int8 levels.
_COLUMNS_CHOOSING = 3.25
# Bytes per value of a matrix that is dequantized: levels in uint8, in float32, and scaled.
_DEQUANTIZED = 9
# Bytes per value of the matrices that are stacked, in the checkpoint's dtype.
_STACKED = 4
# Bytes per value of the matrices of a layer that were quantized and are kept until all of them were.
_CHOSEN = 0.55
# float32 rows of gate, its SiLU, up and their product, of as many rows as are computed at once.
_WIDE_ROWS = 4
# Bytes per value of the embedding table that is written: what safetensors copies (thrice), and the check for NaN.
_TABLE = {"fp32": 13, "fp16": 7, "int8": 13}
# Bytes per value of a matrix that is rounded for its graph: stacked, padded, divided, rounded, each float32.
_ROUNDED = 16
# Bytes per value of a matrix whose rounding is checked: stored, difference, step, each float32, and a search for NaN.
_COMPARED = 14
# What ONNX Runtime keeps of a weight, bytes: int4 packed for its kernels, with sums of blocks; fp16 is widened when a
# graph is loaded, fp32 mapped, and both are then copied into the order of the kernels, int8 where it is exact likewise.
_SESSION: Mapping[GraphPrecision, float] = {"int4": 0.65, "int8": 3.0, "fp16": 6.0, "fp32": 4.0}
_SESSION_EXACT: Mapping[GraphPrecision, float] = {**_SESSION, "int8": 8.0}
# Bytes per logit that is judged: both models' in float32, and log-probabilities, their differences and products in
# float64.
_JUDGED = 48
# Prompts of the parity runs: each is shorter, and this is their mean.
_PARITY_POSITIONS = 256
_PARITY_MEAN = 110
_PARITY_LOGITS = 3 * _FLOAT
# Allocators, sessions, tokenizer, molecule encoder: what does not grow with the model.
_REST = 192 * 2**20

# Arithmetic, in passes like those of rounding to nearest, which stands for all that goes value by value.
# GPTQ: 22 trials of scales at 6 passes, and each column's error on half a block behind it, over the 12 of rounding.
_GPTQ_PASSES = 18.0
# The check of rounding, and dequantizing a layer once for all prompts of the parity runs.
_CHECK_PASSES, _PARITY_PASSES = 1.2, 0.8
# Passes of float64 per logit that is judged.
_JUDGED_PASSES = 10.0
# The comparison's passes over a text: the recorded answer and the continuation, through both models, and the
# continuation once more as it is made.
_PROOF_RUNS = 5
# Through the source, the graph, and the graph up to the steps with a cache.
_PARITY_RUNS = 3
# Exports of models of some 50 to 110 million weights took 1.1 to 1.8 times the processor time that is counted.
_SLOWEST = 2.0

_LESS_CALIBRATION = "Give fewer or shorter calibration questions (--calibration), or --quantizer rtn."
_LESS_PROOF = "Compare on fewer or shorter questions (--questions), or not (--proof none)."


@dataclass(frozen=True)
class Work:
    """Counted arithmetic: operations of products and of factorizations, values rounded, bytes hashed."""

    products: float = 0
    factorized: float = 0
    rounded: float = 0
    hashed: float = 0


@dataclass(frozen=True)
class Step:
    """A step of an export.

    Attributes:
        memory: bytes of RAM.
        quantizes: it runs on the quantizer's device.
        remedy: with which options it takes less memory, or is left out.
    """

    text: str
    memory: float
    work: Work
    quantizes: bool = False
    remedy: str = ""


@dataclass(frozen=True)
class Speed:
    """Of one device: how much of each kind of :class:`Work` it does in a second."""

    products: float
    factorized: float
    rounded: float
    hashed: float

    @classmethod
    def measured(cls, device: torch.device) -> Speed:
        """Takes about a second."""
        generator = torch.Generator().manual_seed(0)
        square = moved(torch.randn(1024, 1024, generator=generator), device)
        positive = square @ square.T + 1024 * torch.eye(1024, device=device)
        matrix = moved(torch.randn(256, 4096, generator=generator), device)
        content, rounding = bytes(16 * 2**20), RoundToNearest()
        return cls(
            2 * 1024**3 / _seconds(lambda: square @ square, device),
            1024**3 / 3 / _seconds(lambda: torch.linalg.cholesky(positive), device),
            matrix.numel() / _seconds(lambda: rounding.quantize("", matrix), device),
            len(content) / _seconds(lambda: hashlib.sha256(content), CPU),
        )

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes."""
        return (
            work.products / self.products
            + work.factorized / self.factorized
            + work.rounded / self.rounded
            + work.hashed / self.hashed
        )


@dataclass(frozen=True)
class Estimate:
    """Of one export.

    Attributes:
        device: where the steps run that quantize.
    """

    steps: Sequence[Step]
    device: torch.device

    @property
    def memory(self) -> int:
        """Bytes of RAM at the peak, beside those that the process has before it begins."""
        return int(max(step.memory for step in self.steps))

    def require_memory(self, available: int | None) -> None:
        """Compares with what the machine has.

        Raises:
            MemoryNeedError: too little.
        """
        if available is not None and available < self.memory:
            beyond = [step for step in self.steps if step.memory > available]
            largest = max(beyond, key=lambda step: step.memory)
            remedies = dict.fromkeys(step.remedy for step in beyond if step.remedy)
            raise MemoryNeedError(
                f"the export will take about {gigabytes(self.memory)} of memory to {largest.text}, and "
                f"{gigabytes(available)} are available.",
                seen=available,
                limit=self.memory,
                remedy=" ".join([*remedies, "Close other programs, or use a larger machine."]),
            )

    def lines(self, available: int | None) -> Iterable[str]:
        """For people; measures this machine first."""
        host = Speed.measured(CPU)
        quantizer = host if self.device == CPU else Speed.measured(self.device)
        seconds = [(quantizer if step.quantizes else host).seconds(step.work) for step in self.steps]
        yield "steps:"
        for number, (step, lasts) in enumerate(zip(self.steps, seconds, strict=True), 1):
            yield f"  {number}. {step.text}: {gigabytes(step.memory)} of memory, {_range(lasts)}"
        has = "how much is available is not known" if available is None else f"{gigabytes(available)} are available"
        yield f"memory: about {gigabytes(self.memory)} at most, {has}"
        yield f"time: {_range(sum(seconds))}, without reading and writing files"


@dataclass(frozen=True)
class _Tower:
    """A stack of equal layers.

    Attributes:
        groups: rows and columns of the matrices of a layer, those stacked that read the same activations.
        head: likewise, where there is one.
        row: float32 values that are kept of a position while a layer is computed.
        cached: those that a graph keeps of it from each layer.
    """

    layers: int
    hidden: int
    groups: Sequence[tuple[int, int]]
    head: tuple[int, int] | None
    row: int
    cached: int = 0

    @property
    def layer_values(self) -> int:
        return sum(rows * columns for rows, columns in self.groups)

    @property
    def all_groups(self) -> list[tuple[int, int]]:
        return [*self.groups, *([] if self.head is None else [self.head])]

    @property
    def values(self) -> int:
        head = 0 if self.head is None else self.head[0] * self.head[1]
        return self.layers * self.layer_values + head

    @property
    def largest(self) -> int:
        return max(rows * columns for rows, columns in self.all_groups)

    def counted(self) -> list[tuple[int, tuple[int, int]]]:
        """How often each group is there."""
        head = [] if self.head is None else [(1, self.head)]
        return [*((self.layers, group) for group in self.groups), *head]


def _decoder(config: LlamaConfig, rows: int) -> _Tower:
    hidden, wide = config.hidden_size, config.intermediate_size
    query, key_value = config.heads * config.head_size, 2 * config.kv_heads * config.head_size
    groups = [(query + key_value, hidden), (hidden, query), (2 * wide, hidden), (hidden, wide)]
    row = _row(hidden, query, key_value, wide)
    return _Tower(config.layers, hidden, groups, (rows, hidden), row, key_value)


def _protein_encoder(config: EsmConfig) -> _Tower:
    hidden, wide = config.hidden_size, config.intermediate_size
    groups = [(3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide)]
    return _Tower(config.layers, hidden, groups, None, _row(hidden, hidden, 2 * hidden, wide))


def _row(hidden: int, query: int, key_value: int, wide: int) -> int:
    """The residual stream, normed, projected, and attended to (each sequence, then all), or the stream before and after
    attention, normed, wide and narrow again."""
    return max(2 * hidden + query + key_value + 2 * query, 4 * hidden + wide)


@dataclass(frozen=True)
class Subject:
    """What is exported, as far as memory and time depend on it.

    Attributes:
        precisions: of the linear layers of decoder and protein encoder, by part.
        table: precision of the token embeddings.
        gptq: parts that GPTQ quantizes, on ``device``.
        head: whether it quantizes the decoder's head with it.
        smooths: whether outliers of the protein encoder are smoothed out.
        calibration, comparison: what the model is run on for GPTQ and for the proof.
        checkpoint, bundle: bytes of the files.
    """

    configs: Configs
    precisions: Mapping[str, GraphPrecision]
    table: str
    gptq: Collection[str]
    head: bool
    smooths: bool
    device: torch.device
    calibration: Questions | None
    comparison: Questions | None
    checkpoint: int
    bundle: int

    def estimate(self) -> Estimate:
        """All steps, in their order."""
        steps = [*self._calibrating(), *self._writing(), self._parity(), *self._proof()]
        return Estimate(steps, self.device)

    @property
    def _towers(self) -> dict[str, _Tower]:
        found = {DECODER_PART: _decoder(self.configs.llama, self.configs.rows)}
        if self.configs.esm is not None:
            found[PROTEIN_PART] = _protein_encoder(self.configs.esm)
        return found

    @property
    def _table_values(self) -> int:
        return self.configs.rows * self.configs.llama.hidden_size

    def _calibrating(self) -> Iterable[Step]:
        questions = self.calibration
        if questions is None:
            return
        towers, residues = self._towers, questions.residues
        what = ""
        if PROTEIN_PART in towers:
            what = f"{towers[PROTEIN_PART].layers} layers on {len(residues)} proteins, {sum(residues):,} positions"
        if self.smooths:
            run = self._walk(PROTEIN_PART, "protein encoder", what, sum(residues))
            yield replace(run, text=f"smooth the protein encoder: {what}", quantizes=False)
        if not self.gptq:
            return
        yield Step(f"hash the checkpoint, {gigabytes(self.checkpoint)}", _REST, Work(hashed=self.checkpoint))
        if residues and what:
            yield self._walk(PROTEIN_PART, "protein encoder", what, sum(residues))
        if DECODER_PART in self.gptq:
            count, positions = len(questions.lengths), sum(questions.lengths)
            layers = f"{towers[DECODER_PART].layers} layers" + " and the head" * self.head
            what = f"{layers} on {count} prompts, {positions:,} positions"
            yield self._walk(DECODER_PART, "decoder", what, positions)

    def _walk(self, part: str, name: str, what: str, positions: int) -> Step:
        """Through all layers of a part, which are quantized on the way or not."""
        tower = self._towers[part]
        if not self.head:
            tower = replace(tower, head=None)
        rows = positions * tower.row * _FLOAT
        if part not in self.gptq:
            work = Work(2.0 * positions * tower.values)
            memory = _REST + rows + _exact(tower)
            return Step(f"run the {name}: {what}", memory, work, quantizes=True, remedy=_LESS_CALIBRATION)
        solving = max(self._solving(*group) for group in tower.all_groups) + _CHOSEN * tower.layer_values
        work = Work(
            products=sum(n * (2.0 * positions * (r * k + k * k) + 2.0 * k * k * r) for n, (r, k) in tower.counted()),
            factorized=sum(n * k**3 / 3 for n, (_, k) in tower.counted()),
            rounded=_GPTQ_PASSES * tower.values,
        )
        text, memory = f"calibrate and quantize the {name}: {what}", _REST + rows + solving
        return Step(text, memory, work, quantizes=True, remedy=_LESS_CALIBRATION)

    def _solving(self, rows: int, columns: int) -> float:
        """Bytes on the host while a matrix is quantized and computed with."""
        values, squares = rows * columns, columns * columns
        if self.device != CPU:
            return (_STACKED + _DEQUANTIZED) * values
        solver = _FLOAT * max(_SQUARES * squares, _SQUARES_CHOOSING * squares + _COLUMNS_CHOOSING * values)
        recording = _FLOAT * (squares + HESSIAN_ROWS * columns)
        wide = _FLOAT * (values + _WIDE_ROWS * ROWS_AT_ONCE * max(columns, rows))
        return _STACKED * values + max(solver, recording, wide)

    def _writing(self) -> Iterable[Step]:
        towers, table = self._towers, self._table_values
        yield Step("write embeddings and projections", _REST + _TABLE[self.table] * table, Work(rounded=table))
        names = ["molecule encoder"] * (self.configs.gin is not None)
        names += ["protein encoder"] * (PROTEIN_PART in towers) + ["decoder"]
        largest = max(tower.largest for tower in towers.values())
        values = sum(tower.values for tower in towers.values())
        yield Step(f"write graphs: {', '.join(names)}", _REST + _ROUNDED * largest, Work(rounded=values))
        # Where GPTQ had to know them, the hashes of the checkpoint are there already.
        more = 0 if self.gptq else self.checkpoint
        what = "the bundle" + " and the checkpoint" * bool(more)
        size = self.bundle + more
        yield Step(f"hash {what}, {gigabytes(size)}", _REST, Work(hashed=size))

    def _parity(self) -> Step:
        towers, table, prompts = self._towers, self._table_values, 1 + len(self.configs.inputs)
        # Head, table and one layer, which is there once more while it is loaded.
        modules = 2 * table * _FLOAT + sum(2 * _FLOAT * tower.layer_values for tower in towers.values())
        chosen = sum(_CHOSEN * towers[part].layer_values for part in self.gptq)
        loading = _DEQUANTIZED * max(max(tower.largest for tower in towers.values()), table)
        running = _PARITY_POSITIONS * (self._running(towers[DECODER_PART]) + _PARITY_LOGITS * self.configs.rows)
        # One after the other: rounding, the encoder, the decoder, the source modules.
        sessions = max(self._sessions(_SESSION_EXACT))
        memory = chosen + max(_COMPARED * table, sessions + running, modules + loading + running)
        values = sum(tower.values for tower in towers.values())
        work = Work(
            products=_PARITY_RUNS * prompts * 2.0 * _PARITY_MEAN * values,
            rounded=(_CHECK_PASSES + _PARITY_PASSES) * values,
        )
        kinds = ", ".join([*(kind.__name__.lower() for kind in self.configs.inputs), "text"])
        return Step(f"check parity with the source modules: {kinds}", _REST + memory, work)

    def _proof(self) -> Iterable[Step]:
        questions = self.comparison
        if questions is None:
            return
        towers, table, positions = self._towers, self._table_values, sum(questions.lengths)
        decoder, longest, answers = towers[DECODER_PART], max(questions.lengths), questions.answers
        # Each question comes with its recorded answer, and with a continuation.
        walking = 2 * positions * decoder.row * _FLOAT + _exact(decoder)
        if PROTEIN_PART in towers:
            encoder = towers[PROTEIN_PART]
            walking = max(walking, sum(questions.residues) * encoder.row * _FLOAT + _exact(encoder))
        judging = 2 * positions * decoder.hidden * _FLOAT + table * _FLOAT + max(answers) * self.configs.rows * _JUDGED
        memory = sum(self._sessions(_SESSION)) + longest * self._running(decoder) + max(walking, judging)
        products = _PROOF_RUNS * 2.0 * positions * decoder.values
        if PROTEIN_PART in towers:
            products += _PROOF_RUNS * 2.0 * sum(questions.residues) * towers[PROTEIN_PART].values
        work = Work(products, rounded=2 * _JUDGED_PASSES * sum(answers) * self.configs.rows)
        text = f"compare with the source on {len(answers)} questions"
        yield Step(text, _REST + memory, work, remedy=_LESS_PROOF)

    def _sessions(self, kept: Mapping[GraphPrecision, float]) -> list[float]:
        return [kept[self.precisions[part]] * tower.values for part, tower in self._towers.items()]

    @staticmethod
    def _running(tower: _Tower) -> int:
        """Bytes per position of a graph that runs: its cache, and twice what is kept while a layer is computed."""
        return _FLOAT * (tower.layers * tower.cached + 2 * tower.row)


def _exact(tower: _Tower) -> float:
    """Bytes of the matrices that a layer computes with as the checkpoint has them, and of its widest rows."""
    wide = max(max(group) for group in tower.groups)
    return (_STACKED + _FLOAT) * tower.largest + _FLOAT * _WIDE_ROWS * ROWS_AT_ONCE * wide


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The best of three, after one to warm up."""
    times = []
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    """What was begun on a GPU is over."""
    if device != CPU:
        torch.cuda.synchronize(device)


def _range(seconds: float) -> str:
    low, high = seconds, _SLOWEST * seconds
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if high >= 2 * size:
            return f"about {low / size:.1f} to {high / size:.1f} {unit}"
    return f"about {low:.0f} to {max(1, high):.0f} s"
