"""The losses and optimizers of the training stages.

1. ``gin``: labels of every atom (groups, hydrogens, rings).
2. ``esm``: secondary structure per residue; of the whole, location, membrane, shares of helix and strand and features,
   which a teacher says.
3. ``joint``: questions and answers through the whole model, the losses of the first two stages kept at a low weight.
4. ``everyday``: the same at a lower rate; every other batch of molecules is of those that people type first.

GIN's batch statistics are measured after stage 1 and frozen, so that later stages train what inference computes;
towards the end, that is also what an int4 bundle computes (quantization-aware training).
What a step sees depends on the seed and the step only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biomedgpt_edge.protein_tokens import SPECIAL_POSITIONS
from biomedgpt_edge.tokenizer import Tokenizer

from ..errors import TrainingDataError
from ..quantize.rtn import RoundToNearest
from .answers import STRUCTURES, structure_class, tenths
from .batches import (
    IGNORE,
    BatchOrder,
    MoleculeBatch,
    ProteinBatch,
    assemble,
    example,
    molecule_batch,
    moved,
    protein_batch,
)
from .chemistry import ATOM_CLASSES, COUNTS, GROUPS, MoleculeFacts
from .conversations import Conversation, about_molecule, about_nothing, about_protein, molecule_chat, protein_chat
from .model import SHARE_SPREAD, DemoConfig, DemoModel, TrainingHeads
from .molecules import MoleculeTable
from .protein_pool import ProteinPool
from .protein_teacher import LEARNT_FEATURES, MEMBRANE_LABELS, PLACES, ProteinTeacher
from .proteins import ProteinFacts, ProteinSplit
from .tokenizer import PIECES, PromptEncoder

STAGES = ("gin", "esm", "joint", "everyday")
_CHAT_SHARE = 0.12
_NOTHING_SHARE = 0.03
_PROTEIN_EVERY = 4
_POOLS = {
    "esm": {"tokens": 4096, "chimeras": 3000, "structured": 8000},
    # Chimeras are good to learn features from, but nothing that anyone asks about.
    "joint": {"tokens": 3072, "chimeras": 0, "structured": 4000},
    "everyday": {"tokens": 3072, "chimeras": 0, "structured": 4000},
}
# What an answer says of a protein: location, membrane, structure class, tenths of helix and of strand.
_FOUND_CLASSES = (len(PLACES), len(MEMBRANE_LABELS), len(STRUCTURES), 11, 11)
_PROTEIN_WEIGHTS = {"places": 1.0, "membrane": 0.3, "shares": 0.5, "learnt": 0.3}
_RESIDUE_WEIGHT = 0.5
_ENCODER_RATE = 0.25
_EVERYDAY_RATE = 0.2
# In the last part of the joint stage layers compute with the weights that an int4 bundle would store. In the stage
# after it in half of the steps only: rounded in all of them, the two precisions drifted apart, in either direction
# (held-out formulas .858 in int4 and .834 in fp32; since then .862 and .863).
_ROUNDED_SHARE = 0.3
_ROUNDED_EVERYDAY = 0.5


@dataclass(frozen=True)
class TrainOptions:
    """What the command line sets; ``steps`` are those of the joint stage, the others follow from them."""

    data: Path
    out: Path
    steps: int = 3300
    threads: int = 1
    seed: int = 0
    bf16: bool = True
    device: str = "cpu"
    rate: float = 3e-3
    molecules_per_batch: int = 48
    log_every: int = 50
    save_every: int = 250
    pieces: int = PIECES
    sizes: DemoConfig | None = None


@dataclass(frozen=True)
class Deck:
    """A table of molecules, and the order in which they are drawn."""

    table: MoleculeTable
    order: BatchOrder


class Trainer:
    """Model, data and the losses of the stages."""

    def __init__(
        self,
        options: TrainOptions,
        table: MoleculeTable,
        everyday: MoleculeTable,
        split: ProteinSplit,
        tokenizer: Tokenizer,
    ) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device(options.device)
        self.table = table
        self.everyday = everyday
        self.split = split
        self.prompts = PromptEncoder(tokenizer)
        config = options.sizes or DemoConfig(pieces=len(tokenizer))
        self.config = replace(config, pieces=len(tokenizer))
        self.model = DemoModel(self.config).to(self.device)
        self.heads = TrainingHeads(
            self.config,
            groups=len(GROUPS),
            atom_classes=ATOM_CLASSES,
            locations=len(PLACES),
            learnt=LEARNT_FEATURES,
            count_classes=tuple(COUNTS.values()),
            found_classes=_FOUND_CLASSES,
        ).to(self.device)
        self.dtype = torch.bfloat16 if options.bf16 else torch.float32
        self._orders()

    def _orders(self) -> None:
        known = [record for record in self.split.located if record.membrane in MEMBRANE_LABELS]
        counts = {
            "molecules": len(self.table),
            "proteins with a location": len(self.split.located),
            "proteins that are known to be in a membrane or not": len(known),
            "proteins with a structure": len(self.split.structured),
        }
        if not all(counts.values()):
            missing = ", ".join(name for name, count in counts.items() if not count)
            raise TrainingDataError(
                f"there is nothing to train on: no {missing}.", seen=counts, remedy="Use the full data files."
            )
        seed, size = self.options.seed * 10, self.options.molecules_per_batch
        self.mixed = Deck(self.table, BatchOrder(self.table.sizes, 2 * size, seed + 1, None))
        self.sorted = Deck(self.table, BatchOrder(self.table.sizes, size, seed + 2, 4.0))
        self.sorted_again = Deck(self.table, BatchOrder(self.table.sizes, size, seed + 3, 4.0))
        self.sorted_everyday = Deck(self.everyday, BatchOrder(self.everyday.sizes, size, seed + 4, 4.0))
        teacher = ProteinTeacher(self.split.located, self.split.structured)
        self.pools = {
            stage: ProteinPool(self.split, teacher, f"{self.options.seed}:{stage}", **_POOLS[stage]) for stage in _POOLS
        }

    # ---------------------------------------------------------------------------------------------- batches

    def rng(self, stage: str, step: int) -> random.Random:
        """Random choices of one step."""
        return random.Random(f"{self.options.seed}:{stage}:{step}")

    def molecules(self, deck: Deck, k: int, every: int = 1) -> tuple[list[int], MoleculeBatch]:
        """Table rows of batch ``k`` of ``deck`` or ``every`` so manieth of them, and the batch."""
        rows = deck.order.batch(k)[::every]
        return rows.tolist(), moved(molecule_batch(deck.table, rows), self.device)

    # ----------------------------------------------------------------------------------------------- losses

    @contextmanager
    def precision(self) -> Iterator[None]:
        """bf16 matrix products, where asked for; weights stay fp32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            yield

    def gin_loss(self, step: int) -> dict[str, Tensor]:
        """Atom labels of one mixed batch."""
        _, batch = self.molecules(self.mixed, step)
        with self.precision():
            nodes = self.model.mol_structure_encoder(batch.graph)
            return {"total": self.heads.atom_loss(nodes, batch.atom_groups, batch.atom_labels)}

    def esm_loss(self, step: int) -> dict[str, Tensor]:
        """Labels of one batch of proteins."""
        batch = moved(protein_batch(self.pools["esm"].batch(step)), self.device)
        with self.precision():
            hidden = self.model.prot_structure_encoder(batch.ids, self.dtype)
            return self._protein_losses(hidden, batch)

    def joint_loss(self, step: int) -> dict[str, Tensor]:
        """One batch of questions and answers: proteins every fourth step, else molecules."""
        rng, k = self.rng("joint", step), step // _PROTEIN_EVERY
        if step % _PROTEIN_EVERY == _PROTEIN_EVERY - 1:
            return self._protein_answers("joint", k, rng)
        return self._molecule_answers(self.sorted, step - k, rng)

    def everyday_loss(self, step: int) -> dict[str, Tensor]:
        """The same, and the molecules are in turn everyday ones and any."""
        rng, k = self.rng("everyday", step), step // _PROTEIN_EVERY
        if step % _PROTEIN_EVERY == _PROTEIN_EVERY - 1:
            return self._protein_answers("everyday", k, rng)
        half, any_molecule = divmod(step - k, 2)
        return self._molecule_answers(self.sorted_again if any_molecule else self.sorted_everyday, half, rng)

    def _molecule_answers(self, deck: Deck, k: int, rng: random.Random) -> dict[str, Tensor]:
        # Chats are batches of their own: one long prompt among short ones would be padding for all the others.
        chat = rng.random() < _CHAT_SHARE
        rows, batch = self.molecules(deck, k, every=2 if chat else 1)
        known = [deck.table.facts(row) for row in rows]
        conversations = [self._molecule_conversation(known, i, chat, rng) for i in range(len(rows))]
        subjects = [range(start, end) for start, end in zip(batch.starts, batch.starts[1:], strict=False)]
        with self.precision():
            nodes = self.model.mol_structure_encoder(batch.graph)
            answer, states = self._answer_loss(conversations, subjects, self.model.proj_mol(nodes))
            # Conversations without a molecule have nothing to count.
            given = torch.tensor([bool(conversation.subjects) for conversation in conversations])
            counts = self.heads.count_loss(states[given], batch.groups[given], batch.counts[given])
            atoms = self.heads.atom_loss(nodes, batch.atom_groups, batch.atom_labels)
        return {"total": answer + 0.05 * counts + 0.2 * atoms, "molecules": answer, "counts": counts, "atoms": atoms}

    def _molecule_conversation(
        self, known: list[MoleculeFacts], subject: int, chat: bool, rng: random.Random
    ) -> Conversation:
        if chat:
            return molecule_chat(known, subject, rng)
        alone = rng.random() < _NOTHING_SHARE
        return Conversation((about_nothing(rng) if alone else about_molecule(known[subject], subject, rng),))

    def _protein_answers(self, stage: str, k: int, rng: random.Random) -> dict[str, Tensor]:
        batch = moved(protein_batch(self.pools[stage].batch(k)), self.device)
        chat = rng.random() < _CHAT_SHARE
        with self.precision():
            hidden = self.model.prot_structure_encoder(batch.ids, self.dtype)
            known = self._found(hidden.detach())
        conversations = [
            protein_chat(known, i, rng) if chat else Conversation((about_protein(one, i, rng),))
            for i, one in enumerate(known)
        ]
        count, width = batch.ids.shape
        subjects = [range(i * width, (i + 1) * width) for i in range(count)]
        with self.precision():
            answer, states = self._answer_loss(conversations, subjects, self.model.proj_prot(hidden).flatten(0, 1))
            said = self.heads.found_loss(states, torch.tensor([_classes(one) for one in known], device=self.device))
            labels = self._protein_losses(hidden, batch)["total"]
        return {"total": answer + 0.1 * said + 0.3 * labels, "proteins": answer, "found": said, "labels": labels}

    def _found(self, hidden: Tensor) -> list[ProteinFacts]:
        """What the encoder finds, from ``hidden [B, T, d]``: what the decoder is to say.

        The encoder learns from labels and the teacher; all the decoder has to learn is to say it. Taught the labels
        themselves, which the encoder often has no way of knowing, it learnt to say less than the encoder knew (of
        locations, 43 % were right on held-out proteins where the encoder had 59).
        """
        first = hidden[:, 0]
        places = self.heads.location(first).argmax(1).tolist()
        membrane = self.heads.membrane(first).argmax(1).tolist()
        shares = self.heads.stretch(self.heads.shares(_pooled(hidden)).float()).clamp(0, 1).tolist()
        return [
            ProteinFacts(PLACES[place], MEMBRANE_LABELS[label], helix, strand)
            for place, label, (helix, strand) in zip(places, membrane, shares, strict=True)
        ]

    def _protein_losses(self, hidden: Tensor, batch: ProteinBatch) -> dict[str, Tensor]:
        """What is known of whole proteins, from ``hidden [B, T, d]`` at ``<cls>`` or its mean, and of residues.

        ``batch.share`` makes proteins weigh the same: long ones come in small batches.
        """
        first = hidden[:, 0]
        shares = self.heads.shares(_pooled(hidden)).float()
        losses = {
            "places": F.cross_entropy(self.heads.location(first).float(), batch.places),
            "membrane": F.cross_entropy(self.heads.membrane(first).float(), batch.membrane),
            "shares": ((shares - batch.shares) / SHARE_SPREAD).square().mean(),
            "learnt": (self.heads.learnt(first).float() - batch.learnt).square().mean(),
        }
        total = batch.share * torch.stack([_PROTEIN_WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        if batch.structured:
            logits = self.heads.residue(hidden).float().flatten(0, 1)
            losses["residues"] = F.cross_entropy(logits, batch.residues.flatten(), ignore_index=IGNORE)
            total = total + _RESIDUE_WEIGHT * batch.structured * losses["residues"]
            known = batch.residues[:, 1] != IGNORE
            true = torch.stack([(batch.residues[known] == label).sum(1) for label in (0, 1)], 1)
            self.heads.stretch.observe(shares.detach()[known], true / (batch.residues.shape[1] - SPECIAL_POSITIONS))
        return losses | {"total": total}

    def _answer_loss(
        self, conversations: list[Conversation], subjects: list[range], soft: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers' tokens, and the middle residual at each last prompt position ``[B, d]``.

        ``subjects`` are the rows of ``soft [S, d]`` of each molecule or protein of the batch.
        """
        examples = [
            example(self.prompts.texts(one), [subjects[i] for i in one.subjects], self.prompts.answer(one.answer))
            for one in conversations
        ]
        index, labels, last = (t.to(self.device) for t in assemble(examples, self.config.pieces + 1))
        final, middle = self.model.llm.model(self.model.splice(index, soft.to(self.dtype)))
        wanted = labels.flatten() != IGNORE
        logits = self.model.llm.lm_head(final.flatten(0, 1)[wanted]).float()
        return F.cross_entropy(logits, labels.flatten()[wanted]), middle[torch.arange(len(last)), last]

    # ------------------------------------------------------------------------------------------- optimizers

    def loss(self, stage: str) -> Callable[[int], dict[str, Tensor]]:
        """The stage's loss function."""
        losses = {"gin": self.gin_loss, "esm": self.esm_loss, "joint": self.joint_loss, "everyday": self.everyday_loss}
        return losses[stage]

    def optimizers(self, stage: str) -> list[torch.optim.Optimizer]:
        """Muon for matrices of transformers, AdamW for the rest; encoders at a lower rate once they are pre-trained."""
        rate = self.options.rate * (_EVERYDAY_RATE if stage == "everyday" else 1)
        esm = self.model.prot_structure_encoder
        gin = [*self.model.mol_structure_encoder.parameters(), *self.heads.atom.parameters()]
        of_proteins = ("residue", "shares", "location", "membrane", "learnt")
        heads = [p for name in of_proteins for p in getattr(self.heads, name).parameters()]
        if stage == "gin":
            return [_adamw(gin, 2e-3)]
        if stage == "esm":
            matrices = _matrices(esm.encoder)
            return [_adamw(_others([*esm.parameters(), *heads], matrices), 2e-3), _muon(matrices, 2e-3)]
        encoders = [*gin, *esm.parameters(), *heads]
        matrices = _matrices(self.model.llm.model.layers)
        rest = _others([*self.model.parameters(), *self.heads.parameters()], [*encoders, *matrices])
        return [_adamw(rest, rate), _adamw(encoders, rate * _ENCODER_RATE), _muon(matrices, rate)]

    def set_mode(self, stage: str, step: int, steps: int) -> None:
        """Training mode for ``step`` of ``steps``: GIN's batch statistics move in stage 1 only, and the weights are
        rounded in the last part of the joint stage and in some steps of the one after it.
        """
        self.model.train()
        rounded = (stage == "joint" and step >= (1 - _ROUNDED_SHARE) * steps) or (
            stage == "everyday" and self.rng("rounding", step).random() < _ROUNDED_EVERYDAY
        )
        self.model.round_weights(RoundToNearest() if rounded else None)
        if stage != "gin":
            self.model.mol_structure_encoder.batch_norms.eval()

    @torch.no_grad()
    def measure_batch_statistics(self, batches: int = 60) -> None:
        """GIN's running statistics as the plain average over mixed batches, in the precision of inference."""
        norms = [norm for norm in self.model.mol_structure_encoder.batch_norms if isinstance(norm, nn.BatchNorm1d)]
        self.model.mol_structure_encoder.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for k in range(batches):
            _, batch = self.molecules(self.mixed, k)
            with self.precision():
                self.model.mol_structure_encoder(batch.graph)
        for norm in norms:
            norm.momentum = 0.1


def _pooled(hidden: Tensor) -> Tensor:
    """Mean ``[B, d]`` over the residues of ``hidden [B, T, d]``, which all have the same length."""
    return hidden[:, 1:-1].mean(1)


def _classes(known: ProteinFacts) -> list[int]:
    """One class per entry of ``_FOUND_CLASSES``."""
    return [
        PLACES.index(known.location),
        MEMBRANE_LABELS.index(known.membrane),
        STRUCTURES.index(structure_class(known.helix, known.strand)),
        tenths(known.helix),
        tenths(known.strand),
    ]


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.ndim == 2]


def _others(parameters: list[nn.Parameter], taken: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are not ``taken``."""
    known = {id(parameter) for parameter in taken}
    return [parameter for parameter in parameters if id(parameter) not in known]


def _adamw(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    optimizer.param_groups[0]["base"] = rate
    return optimizer


def _muon(matrices: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    optimizer.param_groups[0]["base"] = rate
    return optimizer
