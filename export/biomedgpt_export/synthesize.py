"""A random BioMedGPT-10B checkpoint in the layout of the release, for tests and for timing without the weights.

The values mean nothing; names, shapes, types and files are those of ``biomedgpt_10b.pth`` and the two folders beside
it, including the buffers that a converter has to ignore. The same scale and seed give the same bytes: values come from
the raw output of a bit generator, which NumPy keeps stable where it does not keep ``Generator.normal`` stable.

The ``.pth`` is written tensor by tensor in blocks, in the format that ``checkpoint.torch_archive`` reads, so memory
does not grow with the scale.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import secrets
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from biomedgpt_edge.protein_tokens import ALPHABET

from .errors import ExportError, OutputExistsError
from .families.biomedgpt_10b import WEIGHTS
from .families.release_files import ESM_POSITIONS, ReleaseSizes, side_files

_BLOCK_VALUES = 1 << 20
_MAX_SEED = 1 << 64
_MAX_LAYERS = 1000


@dataclass(frozen=True)
class Scale:
    """Dimensions of the three networks. Those of GIN are the same in every BioMedGPT."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    positions: int
    pieces: int
    esm_hidden: int
    esm_layers: int
    esm_heads: int
    esm_ffn: int
    gin_hidden: int = 300
    gin_layers: int = 5


SCALES = {
    "tiny": Scale(
        hidden=128,
        layers=2,
        heads=4,
        ffn=344,
        positions=2048,
        pieces=1000,
        esm_hidden=64,
        esm_layers=2,
        esm_heads=4,
        esm_ffn=256,
    ),
    "1b": Scale(
        hidden=2048,
        layers=22,
        heads=32,
        ffn=5632,
        positions=2048,
        pieces=32000,
        esm_hidden=640,
        esm_layers=30,
        esm_heads=20,
        esm_ffn=2560,
    ),
    "full": Scale(
        hidden=4096,
        layers=32,
        heads=32,
        ffn=11008,
        positions=2048,
        pieces=32000,
        esm_hidden=2560,
        esm_layers=36,
        esm_heads=40,
        esm_ffn=10240,
    ),
}


@dataclass(frozen=True)
class Noise:
    """Independent values, nearly normal."""

    std: float
    mean: float = 0.0


@dataclass(frozen=True)
class Spread:
    """Independent values, uniform between bounds."""

    low: float
    high: float


@dataclass(frozen=True)
class Exact:
    """Values that the architecture fixes."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the state dict; ``dtype`` is ``float16``, ``float32`` or ``int64``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: Noise | Spread | Exact

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * np.dtype(self.dtype).itemsize


def synthesize(
    out: Path,
    *,
    scale: str,
    seed: int,
    report: Callable[[str], None],
    layers: int | None = None,
    protein_layers: int | None = None,
) -> None:
    """Write a random checkpoint of the given scale to a new folder.

    Args:
        out: the folder to make; its parents are made too.
        scale: a key of :data:`SCALES`.
        seed: what the values depend on; the tokenizer and the configurations do not.
        layers, protein_layers: of the decoder and of the protein encoder, if fewer or more than the scale has.
        report: takes a line of progress per file.

    Raises:
        OutputExistsError: something is already there. It is left as it is.
        ExportError: unknown scale, impossible seed, or not enough space.
    """
    if scale not in SCALES:
        raise ExportError(f"There is no scale {scale!r}.", seen=scale, remedy=f"Known: {', '.join(sorted(SCALES))}.")
    sizes = SCALES[scale]
    sizes = replace(sizes, layers=layers or sizes.layers, esm_layers=protein_layers or sizes.esm_layers)
    if not (0 < sizes.layers <= _MAX_LAYERS and 0 < sizes.esm_layers <= _MAX_LAYERS):
        raise ExportError(
            "The number of layers is out of range.", seen=[sizes.layers, sizes.esm_layers], limit=f"1 to {_MAX_LAYERS}"
        )
    if not 0 <= seed < _MAX_SEED:
        raise ExportError("The seed must be a non-negative integer below 2^64.", seen=seed, limit=_MAX_SEED - 1)
    if os.path.lexists(out):
        raise OutputExistsError(f"{out} exists already.", seen=str(out), remedy="Remove it or name another folder.")
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        staging.mkdir(parents=True)
        _write_all(staging, sizes, seed, report)
        # rename() replaces an empty folder without a word, so this cannot rest on the check above alone.
        if os.path.lexists(out):
            raise OutputExistsError(f"{out} appeared in the meantime.", seen=str(out))
        staging.rename(out)
    except OSError as error:
        raise ExportError(f"Cannot write {out}: {error}.", seen=str(out)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_all(folder: Path, scale: Scale, seed: int, report: Callable[[str], None]) -> None:
    specs = tensor_specs(scale)
    total = sum(spec.nbytes for spec in specs)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ExportError(f"The checkpoint takes {total:,} bytes, but {free:,} are free.", seen=free, limit=total)
    sizes = ReleaseSizes(
        pieces=scale.pieces,
        hidden=scale.hidden,
        layers=scale.layers,
        heads=scale.heads,
        ffn=scale.ffn,
        positions=scale.positions,
        # The real model's, which differs from what many Llama loaders assume.
        rms_norm_eps=1e-6,
        esm_hidden=scale.esm_hidden,
        esm_layers=scale.esm_layers,
        esm_heads=scale.esm_heads,
        esm_ffn=scale.esm_ffn,
    )
    files = side_files(sizes, train_tokenizer(scale.pieces))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("xb") as file:
            file.write(content)
            os.fsync(file.fileno())
        report(f"{name}: {len(content):,} bytes")
    (folder / WEIGHTS).parent.mkdir()
    with (folder / WEIGHTS).open("xb") as file:
        write_torch_archive(file, specs, seed)
        os.fsync(file.fileno())
    report(f"{WEIGHTS}: {len(specs)} tensors, {total:,} bytes of values")


# --- names, shapes and values ---------------------------------------------------------------------------------------


def tensor_specs(scale: Scale) -> list[TensorSpec]:
    """All tensors of the file, in the order of the model's modules."""
    return [*_gin(scale), *_esm(scale), *_llm(scale), *_projections(scale)]


def _linear(name: str, out: int, into: int, dtype: str, *, gain: float = 1.0) -> list[TensorSpec]:
    """Weight and bias; variance 1/fan-in keeps the size of activations from layer to layer."""
    return [
        TensorSpec(f"{name}.weight", (out, into), dtype, Noise(gain / math.sqrt(into))),
        TensorSpec(f"{name}.bias", (out,), dtype, Noise(0.05)),
    ]


def _layer_norm(name: str, width: int, dtype: str) -> list[TensorSpec]:
    # Not exactly 1 and 0, or a converter that forgets the norm's weights would pass its tests.
    return [
        TensorSpec(f"{name}.weight", (width,), dtype, Noise(0.1, mean=1.0)),
        TensorSpec(f"{name}.bias", (width,), dtype, Noise(0.05)),
    ]


def _inverse_frequencies(head_dim: int) -> Exact:
    return Exact(tuple(10000.0 ** (-i / head_dim) for i in range(0, head_dim, 2)))


def _gin(scale: Scale) -> Iterator[TensorSpec]:
    width, dtype, root = scale.gin_hidden, "float32", "mol_structure_encoder"
    # Sums and relus of random layers draw all atoms together, so they start far apart.
    yield TensorSpec(f"{root}.x_embedding1.weight", (120, width), dtype, Noise(1.5))
    yield TensorSpec(f"{root}.x_embedding2.weight", (3, width), dtype, Noise(0.5))
    for k in range(scale.gin_layers):
        layer = f"{root}.gnns.{k}"
        # Messages are plain sums over about three neighbours; the gain takes their growth back.
        yield from _linear(f"{layer}.mlp.0", 2 * width, width, dtype, gain=0.7)
        yield from _linear(f"{layer}.mlp.2", width, 2 * width, dtype)
        yield TensorSpec(f"{layer}.edge_embedding1.weight", (6, width), dtype, Noise(0.2))
        yield TensorSpec(f"{layer}.edge_embedding2.weight", (3, width), dtype, Noise(0.2))
    for k in range(scale.gin_layers):
        norm = f"{root}.batch_norms.{k}"
        yield from _layer_norm(norm, width, dtype)
        yield TensorSpec(f"{norm}.running_mean", (width,), dtype, Noise(0.5))
        yield TensorSpec(f"{norm}.running_var", (width,), dtype, Spread(0.5, 3.0))
        yield TensorSpec(f"{norm}.num_batches_tracked", (), "int64", Exact((1000,)))


def _esm(scale: Scale) -> Iterator[TensorSpec]:
    width, dtype, root = scale.esm_hidden, "float16", "prot_structure_encoder"
    positions = ESM_POSITIONS
    yield TensorSpec(f"{root}.embeddings.position_ids", (1, positions), "int64", Exact(tuple(range(positions))))
    yield TensorSpec(f"{root}.embeddings.word_embeddings.weight", (len(ALPHABET), width), dtype, Noise(1.0))
    yield TensorSpec(f"{root}.embeddings.position_embeddings.weight", (positions, width), dtype, Noise(0.02))
    for j in range(scale.esm_layers):
        layer = f"{root}.encoder.layer.{j}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.self.{part}", width, width, dtype)
        frequencies = _inverse_frequencies(width // scale.esm_heads)
        yield TensorSpec(
            f"{layer}.attention.self.rotary_embeddings.inv_freq", (len(frequencies.values),), dtype, frequencies
        )
        yield from _linear(f"{layer}.attention.output.dense", width, width, dtype)
        yield from _layer_norm(f"{layer}.attention.LayerNorm", width, dtype)
        yield from _linear(f"{layer}.intermediate.dense", scale.esm_ffn, width, dtype)
        yield from _linear(f"{layer}.output.dense", width, scale.esm_ffn, dtype)
        yield from _layer_norm(f"{layer}.LayerNorm", width, dtype)
    yield from _layer_norm(f"{root}.encoder.emb_layer_norm_after", width, dtype)
    yield from _linear(f"{root}.pooler.dense", width, width, dtype)
    yield from _linear(f"{root}.contact_head.regression", 1, scale.esm_layers * scale.esm_heads, dtype)


def _llm(scale: Scale) -> Iterator[TensorSpec]:
    width, ffn, dtype = scale.hidden, scale.ffn, "float16"
    rows = scale.pieces + 1  # [PAD], added to the tokenizer after pre-training
    # Large beside what the layers add, so that the next token depends on the prompt and greedy margins are clear.
    yield TensorSpec("llm.model.embed_tokens.weight", (rows, width), dtype, Noise(0.5))
    for i in range(scale.layers):
        layer = f"llm.model.layers.{i}"
        shapes = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
        shapes |= {"mlp.gate_proj": (ffn, width), "mlp.down_proj": (width, ffn), "mlp.up_proj": (ffn, width)}
        for part, shape in shapes.items():
            yield TensorSpec(f"{layer}.{part}.weight", shape, dtype, Noise(1 / math.sqrt(shape[1])))
        frequencies = _inverse_frequencies(width // scale.heads)
        yield TensorSpec(f"{layer}.self_attn.rotary_emb.inv_freq", (len(frequencies.values),), dtype, frequencies)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(f"{layer}.{norm}.weight", (width,), dtype, Noise(0.1, mean=1.0))
    yield TensorSpec("llm.model.norm.weight", (width,), dtype, Noise(0.1, mean=1.0))
    yield TensorSpec("llm.lm_head.weight", (rows, width), dtype, Noise(1 / math.sqrt(width)))


def _projections(scale: Scale) -> Iterator[TensorSpec]:
    # Encoder outputs have a size near one; soft tokens should have the size of embedding rows.
    yield from _linear("proj_mol", scale.hidden, scale.gin_hidden, "float32", gain=0.5)
    yield from _linear("proj_prot", scale.hidden, scale.esm_hidden, "float32", gain=0.5)


def value_blocks(spec: TensorSpec, seed: int) -> Iterator[npt.NDArray[Any]]:
    """The values of a tensor, flat, in little-endian blocks. Each tensor has a stream of its own."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if isinstance(spec.fill, Exact):
        yield np.array(spec.fill.values, dtype=dtype)
        return
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(spec.name.encode())]))
    for start in range(0, spec.elements, _BLOCK_VALUES):
        count = min(_BLOCK_VALUES, spec.elements - start)
        raw = bits.random_raw((count + 1) // 2).astype("<u8", copy=False)
        if isinstance(spec.fill, Noise):
            values = _nearly_normal(raw) * np.float32(spec.fill.std) + np.float32(spec.fill.mean)
        else:
            share = raw.view("<u4").astype(np.float64) / 2.0**32
            values = (spec.fill.low + (spec.fill.high - spec.fill.low) * share).astype(np.float32)
        yield values[:count].astype(dtype)


def _nearly_normal(raw: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Two values of mean 0 and variance 1 per word: sums of four bytes, exact in every version of every library."""
    pairs = raw.view("<u2")
    halves = (pairs & 0xFF) + (pairs >> 8)
    sums = (halves[0::2] + halves[1::2]).astype(np.float32)
    values: npt.NDArray[np.float32] = (sums - np.float32(510)) * np.float32(1 / math.sqrt(4 * (256**2 - 1) / 12))
    return values


# --- the torch archive ----------------------------------------------------------------------------------------------

_STORAGE_TYPES = {"float16": "HalfStorage", "float32": "FloatStorage", "int64": "LongStorage"}
_ALIGNMENT = 64
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER_BYTES = 30


def write_torch_archive(file: BinaryIO, specs: list[TensorSpec], seed: int) -> None:
    """Write a state dict as ``torch.save`` would, holding one block of values at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str, blocks: Iterator[bytes], size: int) -> None:
            with archive.open(_member_info(f"biomedgpt_10b/{name}", file.tell(), size), "w") as target:
                for block in blocks:
                    target.write(block)

        def small(name: str, content: bytes) -> None:
            member(name, iter((content,)), len(content))

        small("data.pkl", pickle_state_dict(specs))
        small("byteorder", b"little")
        for index, spec in enumerate(specs):
            member(f"data/{index}", (block.tobytes() for block in value_blocks(spec, seed)), spec.nbytes)
        small("version", b"3\n")


def _member_info(name: str, position: int, size: int) -> zipfile.ZipInfo:
    """A member whose bytes begin at a multiple of 64, as torch's own writer pads them, and nothing else varies."""
    info = zipfile.ZipInfo(name, _ZIP_EPOCH)
    info.create_system = 3
    info.file_size = size
    unpadded = position + _LOCAL_HEADER_BYTES + len(name) + 4
    padding = -unpadded % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


def pickle_state_dict(specs: list[TensorSpec]) -> bytes:
    """The pickle of an OrderedDict of contiguous tensors, spec ``i`` stored as ``data/i``.

    Assembled by hand because a real pickler would need the tensors; ``checkpoint.torch_pickle`` has the vocabulary.
    """
    empty_ordered_dict = b"ccollections\nOrderedDict\n)R"
    out = io.BytesIO()
    out.write(b"\x80\x02" + empty_ordered_dict + b"(")
    for index, spec in enumerate(specs):
        strides = tuple(math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape)))
        storage_type = f"ctorch\n{_STORAGE_TYPES[spec.dtype]}\n".encode()
        storage = (_text("storage"), storage_type, _text(str(index)), _text("cpu"), _integer(spec.elements))
        out.write(_text(spec.name) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(" + b"".join(storage) + b"tQ")
        out.write(_integer(0) + _integers(spec.shape) + _integers(strides))
        out.write(b"\x89" + empty_ordered_dict + b"tR")
    out.write(b"u.")
    return out.getvalue()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


# --- tokenizer ------------------------------------------------------------------------------------------------------


def train_tokenizer(pieces: int) -> bytes:
    """A SentencePiece model with the settings of Llama's, learnt from the text below as far as that goes.

    Raises:
        ExportError: the text does not yield pieces.
    """
    learnt = _learnt_tokenizer(min(pieces, _LEARNT_PIECES))
    return learnt if pieces <= _LEARNT_PIECES else _padded_tokenizer(learnt, pieces)


def _padded_tokenizer(learnt: bytes, pieces: int) -> bytes:
    """The same with pieces that no text has: no two neighbours merge into the beginning of one."""
    # Generated code, of which type checkers know nothing.
    format_of_models = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = format_of_models.ModelProto.FromString(learnt)
    lowest = min(piece.score for piece in model.pieces)
    for number in range(len(model.pieces), pieces):
        model.pieces.add(piece=f"\N{LEFT WHITE SQUARE BRACKET}{number}", score=lowest - 1)
    model.trainer_spec.vocab_size = pieces
    padded: bytes = model.SerializeToString(deterministic=True)
    return padded


def _learnt_tokenizer(pieces: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXT.strip().split("\n")),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ExportError(f"Cannot train a tokenizer of {pieces} pieces: {error}.", seen=pieces) from error
    return model.getvalue()


# About as many as the text yields.
_LEARNT_PIECES = 1000
_TEXT = """
You are working as an excellent assistant in chemistry and molecule discovery. Below a human expert gives
the representation of a molecule or a protein. Answer questions about it. ### Human: <molecule></molecule>
Please describe this molecule. ### Assistant: The molecule is a carboxylic acid. ### Human: <protein></protein>
You are working as an excellent assistant in biology. Below a human gives the representation of a molecule or a
protein. Answer some questions about it. ### Human: What is the function of this protein? ### Assistant: It binds zinc.
What are the official names of this protein? What is the protein family that this protein belongs to?
What are the subcellular locations of this protein? Please describe this drug. Is it soluble in water?
The molecule is an organic compound with a benzene ring that carries a hydroxy group and an acetyl group.
It is a member of the class of phenols, a weak acid, and an inhibitor of the enzyme cyclooxygenase.
It has a role as an analgesic, an antipyretic, an anticoagulant and a non-steroidal anti-inflammatory drug.
Aspirin relieves pain, lowers fever and reduces inflammation; caffeine stimulates the central nervous system.
It is an alcohol in which one hydrogen of ethane has been replaced by a hydroxy group; it dissolves in ether.
A ketone, an aldehyde, an ester, an amide, an amine and a nitrile differ in their functional groups.
The compound is a tertiary amine, a monocarboxylic acid, an aromatic ether and an organofluorine compound.
It derives from a hydride of naphthalene. It is the conjugate base of an ammonium cation and a chloride salt.
Carbon, nitrogen, oxygen, sulfur, phosphorus, fluorine, chlorine, bromine and iodine form covalent bonds.
Single, double, triple and aromatic bonds join the atoms; chirality depends on the order of the neighbours.
A steroid has four fused rings, a peptide has amino acids joined by amide bonds, a sugar has many hydroxy groups.
Glucose, fructose, cholesterol, adenosine, dopamine, serotonin, penicillin, morphine, ibuprofen and quinine.
The protein catalyses the hydrolysis of peptide bonds, with a preference for lysine and arginine residues.
It is a kinase that phosphorylates serine, threonine and tyrosine residues of its substrates in the cytoplasm.
It belongs to the G-protein coupled receptor family and is located in the cell membrane as a multi-pass protein.
The enzyme transfers electrons from cytochrome c to molecular oxygen in the inner membrane of the mitochondrion.
Involved in the repair of damaged DNA, in the transcription of genes and in the translation of messenger RNA.
May play a role in signal transduction, apoptosis, cell growth, differentiation and the immune response.
Transports sodium, potassium and calcium ions across the plasma membrane against a concentration gradient.
Found in the nucleus, the endoplasmic reticulum, the Golgi apparatus, the lysosome, the ribosome and the cytosol.
Secreted by the liver, the kidney, the pancreas, the heart, the brain and the muscle of mammals and birds.
Belongs to the short-chain dehydrogenase family, the insulin family, the globin family, the histone H4 family.
A mutation of the gene causes anaemia, diabetes, cancer or a disorder of metabolism in newborn children.
The antibody recognises the surface antigen of the virus and prevents its entry into the host cell.
Bacteria, yeast, plants, insects and fish have related sequences, conserved over hundreds of millions of years.
The patient was treated with 25 mg of the drug twice a day for 6 weeks; blood pressure fell by 13.8 percent.
In a randomized, double-blind, placebo-controlled study of 1,470 adults, the difference was not significant.
Conclusions: our results suggest that early treatment improves survival, but larger trials are required.
Methods: samples were collected, washed, diluted, heated to 37 degrees and measured by mass spectrometry.
Results: we observed a strong correlation (r = 0.92, p < 0.05) between exposure and the level of expression.
Adverse effects include nausea, headache, dizziness, vomiting, rash, fatigue and, rarely, liver toxicity.
Does it cross the blood-brain barrier? Yes, no, maybe. Which target does it bind? How is it metabolized?
The quick brown fox jumps over the lazy dog; why would they know what every young physician should have read?
CC(=O)OC1=CC=CC=C1C(=O)O is aspirin, CN1C=NC2=C1C(=O)N(C(=O)N2C)C is caffeine, CCO is ethanol, c1ccccc1 is benzene.
MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEGLYTHM
@ [X] {Y} | ~ ^ _ * & % $ + ! ` ' " / \\ JZ - 0123456789
"""
