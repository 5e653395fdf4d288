"""BioMedGPT-10B: the release's layout, its tensors, its configurations and its chat template (OpenBioMed ``main``)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from biomedgpt_edge.manifest import Policy
from biomedgpt_edge.prompt import PromptTemplate
from biomedgpt_edge.protein_tokens import ALPHABET, MAX_RESIDUES, SPECIAL_POSITIONS

from ..checkpoint import Checkpoint, GptqCheckpoint, JoinedCheckpoint, open_checkpoint, open_gptq
from ..errors import CheckpointError, ModelConfigError
from ..graphs.config import EsmConfig, GinConfig
from .base import LLM, MOLECULE, PROTEIN, Configs, Family, Modality, Source
from .base import Layout as AnyLayout
from .llama_folder import ADDED_TOKENS, LlamaFolder, llama_problems, vocabulary_rows, weight_files
from .tensors import (
    ESM_BUFFERS,
    GIN_BUFFERS,
    LLAMA_BUFFERS,
    Expected,
    esm_tensors,
    gin_tensors,
    key_problems,
    llama_tensors,
    require_fit,
)

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

FAMILY = Family("biomedgpt-10b", "BioMedGPT-10B", PROMPT_TEMPLATE, POLICY)

# The release's layout.
WEIGHTS = PurePosixPath("fusion_ckpts/biomedgpt_10b.pth")
TEXT_FOLDER = PurePosixPath("text_ckpts/biomedgpt-lm-7b")
PROTEIN_FOLDER = PurePosixPath("protein_ckpts/esm2-3b")

GIN_LAYERS, GIN_WIDTH = 5, 300

# What may be there without being read; everything else must match exactly.
IGNORED = rf"{re.escape(LLM)}({LLAMA_BUFFERS})|{re.escape(PROTEIN)}({ESM_BUFFERS})|{re.escape(MOLECULE)}({GIN_BUFFERS})"


@dataclass(frozen=True)
class Layout(AnyLayout):
    """Where the parts of a release lie.

    Attributes:
        protein: the protein encoder's folder; None to leave that encoder out.
        molecule: whether the molecule encoder is wanted.
    """

    fusion: Path
    text: Path
    protein: Path | None
    molecule: bool = True
    family: ClassVar[Family] = FAMILY

    @classmethod
    def locate(
        cls,
        checkpoint: Path | None,
        *,
        fusion: Path | None = None,
        text: Path | None = None,
        protein: Path | None = None,
        without: Collection[Modality] = (),
    ) -> Layout:
        """The release's own layout below ``checkpoint``, each part also by a path of its own.

        Raises:
            CheckpointError: lists every file that is missing.
        """
        wants_protein = "protein" not in without
        if protein is not None and not wants_protein:
            raise CheckpointError(
                "a protein encoder was given, and the bundle is to be without one.",
                seen=str(protein),
                remedy="Leave out --protein, or --without protein.",
            )
        if checkpoint is None and (fusion is None or text is None or (wants_protein and protein is None)):
            raise CheckpointError(
                "neither a checkpoint folder nor all of its parts were given.", remedy="Give --checkpoint."
            )
        root = checkpoint or Path()
        layout = cls(
            fusion or root / WEIGHTS,
            text or root / TEXT_FOLDER,
            (protein or root / PROTEIN_FOLDER) if wants_protein else None,
            molecule="molecule" not in without,
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
        return LlamaFolder(self.text).tokenizer

    @property
    def side_files(self) -> dict[str, Path]:
        """Files beside the weights that an export reads, by the part they play."""
        files = LlamaFolder(self.text).side_files
        if self.protein is not None:
            files |= {f"protein/{name}": self.protein / name for name in ("config.json", "vocab.txt")}
        return files

    def open(self) -> Source:
        """See :meth:`families.base.Layout.open`."""
        with ExitStack() as opened:
            fusion = opened.enter_context(open_checkpoint(self.fusion))
            configs, decoder = self._configs(fusion, opened)
            own_decoder = [] if decoder is not None else list(_under(LLM, llama_tensors(configs.llama, configs.rows)))
            unused = self._unused() + [LLM] * (decoder is not None)
            ignored = re.compile("|".join([IGNORED, *(rf"{re.escape(prefix)}.*" for prefix in unused)]))
            problems = key_problems([*own_decoder, *_encoder_tensors(configs)], fusion, ignored)
            if decoder is not None:
                problems += llama_problems(configs.llama, configs.rows, decoder)
            require_fit(problems)
            opened.pop_all()
        files = _fusion_files(fusion)
        if decoder is None:
            return Source(configs, fusion, {**files, **self.side_files})
        joined = JoinedCheckpoint({LLM: decoder, "": fusion})
        return Source(configs, joined, {**files, **weight_files(decoder), **self.side_files}, decoder)

    def _configs(self, fusion: Checkpoint, opened: ExitStack) -> tuple[Configs, GptqCheckpoint | None]:
        """From the configuration files, and the language model's weights where its folder has them quantized."""
        esm = None
        if self.protein is not None:
            esm = EsmConfig.read(self.protein / "config.json")
            _check_protein_alphabet(self.protein / "vocab.txt", esm)
        folder = LlamaFolder(self.text)
        llama = folder.config()
        decoder = opened.enter_context(open_gptq(self.text)) if folder.quantized() else None
        rows = llama.vocabulary + ADDED_TOKENS if decoder is None else vocabulary_rows(llama, decoder)
        folder.check_tokenizer(llama, rows)
        gin = GinConfig(GIN_LAYERS, _gin_width(fusion)) if self.molecule else None
        return Configs(llama, rows, esm, gin), decoder

    def _unused(self) -> list[str]:
        """Prefixes of the tensors that belong to encoders that are left out."""
        molecule, protein = [MOLECULE, "proj_mol."], [PROTEIN, "proj_prot."]
        return molecule * (not self.molecule) + protein * (self.protein is None)


def _fusion_files(fusion: Checkpoint) -> dict[str, Path]:
    """By the part they play, so that folder names change no byte of a bundle."""
    if len(fusion.files) == 1:
        return {"fusion": fusion.files[0]}
    return {f"fusion/{path.name}": path for path in fusion.files}


def _gin_width(fusion: Checkpoint) -> int:
    """The molecule encoder has no configuration file; its width is that of its tensors."""
    key = f"{MOLECULE}x_embedding1.weight"
    shape = fusion.shape(key) if key in fusion.keys() else ()
    # Without that matrix the comparison of all keys names it, beside whatever else is wrong.
    return shape[1] if len(shape) == 2 else GIN_WIDTH


def _encoder_tensors(configs: Configs) -> Iterator[Expected]:
    hidden = configs.llama.hidden_size
    if configs.esm is not None:
        yield from _under(PROTEIN, esm_tensors(configs.esm))
    if configs.gin is not None:
        yield from _under(MOLECULE, gin_tensors(configs.gin))
        yield from _projection_tensors("proj_mol", configs.gin.width, hidden)
    if configs.esm is not None:
        yield from _projection_tensors("proj_prot", configs.esm.hidden_size, hidden)


def _projection_tensors(name: str, width: int, hidden: int) -> Iterator[Expected]:
    yield f"{name}.weight", (hidden, width)
    yield f"{name}.bias", (hidden,)


def _under(prefix: str, tensors: Iterator[Expected]) -> Iterator[Expected]:
    return ((prefix + name, shape) for name, shape in tensors)


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
