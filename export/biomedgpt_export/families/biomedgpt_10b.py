"""BioMedGPT-10B: the release's layout, its tensors, its configurations and its chat template (OpenBioMed ``main``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from biomedgpt_edge.errors import BundleCorruptError
from biomedgpt_edge.manifest import Policy
from biomedgpt_edge.molecule_graph import BOND_DIRECTIONS, BOND_TYPES
from biomedgpt_edge.prompt import PromptTemplate
from biomedgpt_edge.protein_tokens import ALPHABET, MAX_RESIDUES, SPECIAL_POSITIONS
from biomedgpt_edge.tokenizer import Tokenizer

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, KeyMismatchError, ModelConfigError
from ..graphs.config import EsmConfig, GinConfig, LlamaConfig

FAMILY = "biomedgpt-10b"

# The system string of the authors' demonstration notebook, for molecules and proteins alike.
PROMPT_TEMPLATE = PromptTemplate(
    system=(
        "You are working as an excellent assistant in chemistry and molecule discovery. Below a human expert gives "
        "the representation of a molecule or a protein. Answer questions about it. "
    ),
    separator="###",
    human="Human",
    assistant="Assistant",
    molecule=("<molecule>", "</molecule>"),
    protein=("<protein>", "</protein>"),
)

POLICY = Policy(
    licence="MIT (code); the language model derives from Llama 2, whose community licence applies to its weights",
    use_policy="https://github.com/PharMolix/OpenBioMed/blob/main/USE_POLICY.md",
    notice=(
        "For research and development; not to be offered as a service to the general public. "
        "Answers can be wrong and are no medical advice."
    ),
)

# The release's layout.
WEIGHTS = PurePosixPath("fusion_ckpts/biomedgpt_10b.pth")
TEXT_FOLDER = PurePosixPath("text_ckpts/biomedgpt-lm-7b")
PROTEIN_FOLDER = PurePosixPath("protein_ckpts/esm2-3b")

LLM, PROTEIN, MOLECULE = "llm.", "prot_structure_encoder.", "mol_structure_encoder."
GIN_LAYERS, GIN_WIDTH = 5, 300
# The tokenizer adds [PAD] behind the vocabulary of the configuration; its row was never trained and is never chosen.
ADDED_TOKENS = 1

_FLOATS = ("float16", "bfloat16", "float32", "float64")

# Buffers and unused heads that one or the other library version stores; anything else must match exactly.
IGNORED = re.compile(
    r"llm\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|prot_structure_encoder\.(encoder\.layer\.\d+\.attention\.self\.)?rotary_embeddings\.inv_freq"
    r"|prot_structure_encoder\.embeddings\.(position_embeddings\.weight|position_ids)"
    r"|prot_structure_encoder\.(pooler\.dense|contact_head\.regression)\.(weight|bias)"
    r"|mol_structure_encoder\.batch_norms\.\d+\.num_batches_tracked"
)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a release lie."""

    fusion: Path
    text: Path
    protein: Path

    @classmethod
    def locate(
        cls,
        checkpoint: Path | None,
        *,
        fusion: Path | None = None,
        text: Path | None = None,
        protein: Path | None = None,
    ) -> Layout:
        """The release's own layout below ``checkpoint``, each part also by a path of its own.

        Raises:
            CheckpointError: lists every file that is missing.
        """
        if checkpoint is None and None in (fusion, text, protein):
            raise CheckpointError(
                "neither a checkpoint folder nor all three parts were given.", remedy="Give --checkpoint."
            )
        root = checkpoint or Path()
        layout = cls(
            fusion or root / WEIGHTS,
            text or root / TEXT_FOLDER,
            protein or root / PROTEIN_FOLDER,
        )
        needed = [layout.fusion, *layout.side_files.values()]
        missing = [str(path) for path in needed if not path.exists()]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}.",
                seen=missing,
                remedy="The release holds fusion_ckpts/, text_ckpts/ and protein_ckpts/ side by side.",
            )
        return layout

    @property
    def tokenizer(self) -> Path:
        return self.text / "tokenizer.model"

    @property
    def side_files(self) -> dict[str, Path]:
        """Files beside the weights that an export reads, by the part they play."""
        return {
            "text/config.json": self.text / "config.json",
            "text/tokenizer.model": self.tokenizer,
            "protein/config.json": self.protein / "config.json",
            "protein/vocab.txt": self.protein / "vocab.txt",
        }


@dataclass(frozen=True)
class Configs:
    """The three parts' configurations."""

    llama: LlamaConfig
    esm: EsmConfig
    gin: GinConfig

    @property
    def rows(self) -> int:
        """Rows of the vocabulary matrices."""
        return self.llama.vocabulary + ADDED_TOKENS

    @classmethod
    def read(cls, layout: Layout, checkpoint: Checkpoint) -> Configs:
        """From the configuration files; the molecule encoder has none, its width is that of its tensors."""
        esm = EsmConfig.read(layout.protein / "config.json")
        _check_protein_alphabet(layout.protein / "vocab.txt", esm)
        llama = LlamaConfig.read(layout.text / "config.json")
        _check_tokenizer(layout.tokenizer, llama)
        key = f"{MOLECULE}x_embedding1.weight"
        shape = checkpoint.shape(key) if key in checkpoint.keys() else ()
        # Without that matrix the comparison of all keys names it, beside whatever else is wrong.
        width = shape[1] if len(shape) == 2 else GIN_WIDTH
        return cls(llama, esm, GinConfig(GIN_LAYERS, width))


def check_keys(configs: Configs, checkpoint: Checkpoint) -> None:
    """Compares every tensor's name and shape with what the configurations imply.

    Raises:
        KeyMismatchError: lists everything that is missing, unexpected or misshapen.
    """
    expected = dict(_expected(configs))
    present = [key for key in checkpoint.keys() if not IGNORED.fullmatch(key)]
    problems = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in present]
    problems += [f"unexpected: {key} {list(checkpoint.shape(key))}" for key in present if key not in expected]
    problems += [
        f"misshapen: {key} is {list(checkpoint.shape(key))}, the configuration implies {list(expected[key])}"
        for key in present
        if key in expected and checkpoint.shape(key) != expected[key]
    ]
    problems += [
        f"not floating point: {key} is {checkpoint.dtype(key)}"
        for key in present
        if key in expected and checkpoint.dtype(key) not in _FLOATS
    ]
    if problems:
        raise KeyMismatchError(
            f"the checkpoint does not fit its configuration in {len(problems)} places:\n  "
            + "\n  ".join(problems)
            + "\n",
            problems,
            remedy="Check that the weights and the config.json files belong together.",
        )


def _expected(configs: Configs) -> Iterator[tuple[str, tuple[int, ...]]]:
    for prefix, names in (
        (LLM, llama_tensors(configs.llama, configs.rows)),
        (PROTEIN, esm_tensors(configs.esm)),
        (MOLECULE, gin_tensors(configs.gin)),
        ("", _projection_tensors(configs)),
    ):
        for name, shape in names:
            yield prefix + name, shape


def llama_tensors(config: LlamaConfig, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers' ``LlamaForCausalLM``."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.heads * config.head_size, config.kv_heads * config.head_size
    yield "model.embed_tokens.weight", (rows, hidden)
    for layer in range(config.layers):
        name = f"model.layers.{layer}"
        for part, size in (("q", query), ("k", key_value), ("v", key_value)):
            yield f"{name}.self_attn.{part}_proj.weight", (size, hidden)
            if config.attention_bias:
                yield f"{name}.self_attn.{part}_proj.bias", (size,)
        yield f"{name}.self_attn.o_proj.weight", (hidden, query)
        if config.attention_bias:
            yield f"{name}.self_attn.o_proj.bias", (hidden,)
        yield f"{name}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{name}.mlp.up_proj.weight", (inner, hidden)
        yield f"{name}.mlp.down_proj.weight", (hidden, inner)
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.tied_head:
        yield "lm_head.weight", (rows, hidden)


def esm_tensors(config: EsmConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers' ``EsmModel``."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "embeddings.word_embeddings.weight", (config.vocabulary, hidden)
    for layer in range(config.layers):
        name = f"encoder.layer.{layer}"
        linears = {
            **{f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")},
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (inner, hidden),
            "output.dense": (hidden, inner),
        }
        for part, shape in linears.items():
            yield f"{name}.{part}.weight", shape
            yield f"{name}.{part}.bias", shape[:1]
        for norm in ("attention.LayerNorm", "LayerNorm"):
            yield f"{name}.{norm}.weight", (hidden,)
            yield f"{name}.{norm}.bias", (hidden,)
    yield "encoder.emb_layer_norm_after.weight", (hidden,)
    yield "encoder.emb_layer_norm_after.bias", (hidden,)


def gin_tensors(config: GinConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of GraphMVP's ``GNN``."""
    width = config.width
    yield "x_embedding1.weight", (GinConfig.ATOM_TYPES, width)
    yield "x_embedding2.weight", (GinConfig.CHIRALITY_TAGS, width)
    for layer in range(config.layers):
        yield f"gnns.{layer}.mlp.0.weight", (2 * width, width)
        yield f"gnns.{layer}.mlp.0.bias", (2 * width,)
        yield f"gnns.{layer}.mlp.2.weight", (width, 2 * width)
        yield f"gnns.{layer}.mlp.2.bias", (width,)
        yield f"gnns.{layer}.edge_embedding1.weight", (BOND_TYPES, width)
        yield f"gnns.{layer}.edge_embedding2.weight", (BOND_DIRECTIONS, width)
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"batch_norms.{layer}.{part}", (width,)


def _projection_tensors(configs: Configs) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = configs.llama.hidden_size
    for name, width in (("proj_mol", configs.gin.width), ("proj_prot", configs.esm.hidden_size)):
        yield f"{name}.weight", (hidden, width)
        yield f"{name}.bias", (hidden,)


def _check_tokenizer(path: Path, config: LlamaConfig) -> None:
    """The ids that a tokenizer gives are rows of the vocabulary matrix; another one's would be read without a sign."""
    try:
        pieces = len(Tokenizer(path))
    except BundleCorruptError as error:
        raise ModelConfigError(f"{path} cannot be used: {error.message}", remedy=error.remedy) from error
    if pieces != config.vocabulary:
        raise ModelConfigError(
            f"{path} has {pieces:,} pieces, and the configuration a vocabulary of {config.vocabulary:,}.",
            seen=pieces,
            limit=config.vocabulary,
            remedy="Use the tokenizer.model that came with the weights.",
        )


def _check_protein_alphabet(path: Path, config: EsmConfig) -> None:
    """The runtime's residue ids are ESM-2's; another vocabulary would be read wrongly without a sign."""
    letters = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if letters != ALPHABET or config.vocabulary != len(ALPHABET):
        raise ModelConfigError(
            f"{path} is not the alphabet of ESM-2 ({len(letters)} entries, {config.vocabulary} in the configuration).",
            limit=len(ALPHABET),
            remedy="Use the vocab.txt of an ESM-2 model.",
        )
    if config.context < MAX_RESIDUES + SPECIAL_POSITIONS:
        raise ModelConfigError(
            f"the protein encoder has {config.context} positions.",
            seen=config.context,
            limit=MAX_RESIDUES + SPECIAL_POSITIONS,
            remedy=f"ESM-2 reads {MAX_RESIDUES} residues.",
        )
