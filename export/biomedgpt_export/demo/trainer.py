"""The losses and optimizers of the three training stages.

1. ``gin``: labels of every atom (groups, hydrogens, rings).
2. ``esm``: secondary structure per residue, location per protein.
3. ``joint``: questions and answers through the whole model, the losses of the first two stages kept at a low weight.

GIN's batch statistics are measured after stage 1 and frozen, so that stage 3 trains exactly what inference computes.
What a step sees depends on the seed and the step only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biomedgpt_edge.protein_tokens import MAX_RESIDUES
from biomedgpt_edge.tokenizer import Tokenizer

from ..errors import TrainingDataError
from . import answers
from .batches import (
    IGNORE,
    BatchOrder,
    Example,
    MoleculeBatch,
    ProteinBatch,
    assemble,
    molecule_batch,
    protein_batch,
)
from .chemistry import ATOM_CLASSES, COUNTS, GROUPS
from .data import MoleculeTable, ProteinRecord, ProteinSplit
from .model import ESM_PAD_ID, DemoConfig, DemoModel, TrainingHeads
from .tokenizer import PIECES, PromptEncoder, protein_exchange

STAGES = ("gin", "esm", "joint")
_OTHER_SHARE = 0.03
_PROTEIN_EVERY = 5
# (share, most residues, proteins per batch): long proteins are rare in training but come up at inference.
_PROTEIN_LIMITS = ((0.84, 256, 16), (0.12, 512, 8), (0.04, MAX_RESIDUES, 4))
_ENCODER_RATE = 0.25


@dataclass(frozen=True)
class TrainOptions:
    """What the command line sets; ``steps`` (of the joint stage) takes the place of ``minutes``."""

    data: Path
    out: Path
    minutes: float = 45.0
    steps: int | None = None
    threads: int = 1
    seed: int = 0
    bf16: bool = True
    rate: float = 3e-3
    molecules_per_batch: int = 48
    log_every: int = 100
    save_every: int = 500
    pieces: int = PIECES
    sizes: DemoConfig | None = None


class Trainer:
    """Model, data and the losses of the three stages."""

    def __init__(self, options: TrainOptions, table: MoleculeTable, split: ProteinSplit, tokenizer: Tokenizer) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.table = table
        self.split = split
        self.prompts = PromptEncoder(tokenizer)
        config = options.sizes or DemoConfig(pieces=len(tokenizer))
        self.config = replace(config, pieces=len(tokenizer))
        self.model = DemoModel(self.config)
        self.heads = TrainingHeads(
            self.config,
            groups=len(GROUPS),
            atom_classes=ATOM_CLASSES,
            locations=len(answers.LOCATIONS),
            count_classes=tuple(COUNTS.values()),
        )
        self.dtype = torch.bfloat16 if options.bf16 else torch.float32
        self._orders()

    def _orders(self) -> None:
        trained = np.flatnonzero(~self.table.held_out)
        if not len(trained) or not self.split.located or not self.split.structured:
            raise TrainingDataError(
                "no training molecules, or no proteins with a location or a structure.",
                seen=[len(trained), len(self.split.located), len(self.split.structured)],
                remedy="Use the full data files.",
            )
        seed, size = self.options.seed * 10, self.options.molecules_per_batch
        self.trained = trained
        self.mixed = BatchOrder(self.table.sizes[trained], 2 * size, seed + 1, None)
        self.sorted = BatchOrder(self.table.sizes[trained], size, seed + 2, 4.0)
        most = max(count for _, _, count in _PROTEIN_LIMITS)
        lengths = [
            np.array([len(r.sequence) for r in records]) for records in (self.split.located, self.split.structured)
        ]
        self.protein_orders = [
            BatchOrder(np.minimum(n, MAX_RESIDUES), most, seed + 3 + i, 40.0) for i, n in enumerate(lengths)
        ]

    # ---------------------------------------------------------------------------------------------- batches

    def rng(self, stage: str, step: int) -> random.Random:
        """Random choices of one step."""
        return random.Random(f"{self.options.seed}:{stage}:{step}")

    def molecules(self, order: BatchOrder, k: int) -> tuple[list[int], MoleculeBatch]:
        """Table rows of batch ``k`` of ``order``, and the batch."""
        rows = self.trained[order.batch(k)]
        return rows.tolist(), molecule_batch(self.table, rows)

    def proteins(self, k: int, rng: random.Random) -> ProteinBatch:
        """Located and structured proteins in turn; batches of long ones are smaller."""
        which = k % 2
        records = (self.split.located, self.split.structured)[which]
        chosen = [records[i] for i in self.protein_orders[which].batch(k // 2).tolist()]
        shares = [share for share, _, _ in _PROTEIN_LIMITS]
        _, limit, _ = rng.choices(_PROTEIN_LIMITS, shares)[0]
        longest = min(limit, max(len(record.sequence) for record in chosen))
        count = next(count for _, most, count in _PROTEIN_LIMITS if longest <= most)
        rng.shuffle(chosen)
        return protein_batch(chosen[:count], limit, rng)

    # ----------------------------------------------------------------------------------------------- losses

    @contextmanager
    def precision(self) -> Iterator[None]:
        """bf16 matrix products, where asked for; weights stay fp32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16):
            yield

    def gin_loss(self, step: int) -> dict[str, Tensor]:
        """Atom labels of one mixed batch."""
        _, batch = self.molecules(self.mixed, step)
        with self.precision():
            nodes = self.model.mol_structure_encoder(batch.graph)
            return {"total": self.heads.atom_loss(nodes, batch.atom_groups, batch.atom_labels)}

    def esm_loss(self, step: int) -> dict[str, Tensor]:
        """Labels of one batch of proteins."""
        batch = self.proteins(step, self.rng("esm", step))
        with self.precision():
            hidden = self.model.prot_structure_encoder(batch.ids, self.dtype)
            loss = self._protein_label_loss(hidden, batch)
        return {"total": loss, "location" if step % 2 == 0 else "structure": loss}

    def joint_loss(self, step: int) -> dict[str, Tensor]:
        """One batch of questions and answers: proteins every fifth step, else molecules."""
        rng = self.rng("joint", step)
        if step % _PROTEIN_EVERY == _PROTEIN_EVERY - 1:
            return self._protein_answers(step // _PROTEIN_EVERY, rng)
        return self._molecule_answers(step - step // _PROTEIN_EVERY, rng)

    def _molecule_answers(self, k: int, rng: random.Random) -> dict[str, Tensor]:
        rows, batch = self.molecules(self.sorted, k)
        examples = [self.molecule_example(row, batch.starts[i], rng) for i, row in enumerate(rows)]
        with self.precision():
            nodes = self.model.mol_structure_encoder(batch.graph)
            answer, states = self._answer_loss(examples, self.model.proj_mol(nodes))
            # Examples without soft tokens have nothing to count.
            given = torch.tensor([bool(example.count) for example in examples])
            counts = self.heads.count_loss(states[given], batch.groups[given], batch.counts[given])
            atoms = self.heads.atom_loss(nodes, batch.atom_groups, batch.atom_labels)
        return {"total": answer + 0.05 * counts + 0.2 * atoms, "molecules": answer, "counts": counts, "atoms": atoms}

    def molecule_example(self, row: int, start: int, rng: random.Random) -> Example:
        """One molecule with a question about it, or now and then a question nobody here can answer."""
        count = int(self.table.sizes[row])
        given = "molecule"
        if rng.random() < _OTHER_SHARE:
            given = rng.choice(("molecule", "nothing"))
            question, answer = answers.other_exchange(given, rng)
        else:
            question, answer = answers.molecule_exchange(self.table.facts(row), rng)
        return self._example(given, question, answer, start, count)

    def _protein_answers(self, k: int, rng: random.Random) -> dict[str, Tensor]:
        batch = self.proteins(k, rng)
        width = batch.ids.shape[1]
        examples = [self.protein_example(record, i * width, rng) for i, record in enumerate(batch.records)]
        with self.precision():
            hidden = self.model.prot_structure_encoder(batch.ids, self.dtype)
            answer, _ = self._answer_loss(examples, self.model.proj_prot(hidden).flatten(0, 1))
            labels = self._protein_label_loss(hidden, batch)
        return {"total": answer + 0.3 * labels, "locations" if k % 2 == 0 else "structures": answer}

    def protein_example(self, record: ProteinRecord, start: int, rng: random.Random) -> Example:
        """One protein with the question its record answers, or one nobody here can answer."""
        exchange = (
            answers.other_exchange("protein", rng) if rng.random() < _OTHER_SHARE else protein_exchange(record, rng)
        )
        return self._example("protein", *exchange, start, len(record.sequence) + 2)

    def _example(self, given: str, question: str, answer: str, start: int, count: int) -> Example:
        before, after = self.prompts.prompt(given, question)
        return Example(before, start, 0 if given == "nothing" else count, after, self.prompts.answer(answer))

    def _protein_label_loss(self, hidden: Tensor, batch: ProteinBatch) -> Tensor:
        if batch.locations is not None:
            return F.cross_entropy(self.heads.location_logits(hidden, batch.ids == ESM_PAD_ID), batch.locations)
        return F.cross_entropy(
            self.heads.residue_logits(hidden).flatten(0, 1), batch.residues.flatten(), ignore_index=IGNORE
        )

    def _answer_loss(self, examples: list[Example], soft: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers' tokens, and the middle residual at each last prompt position ``[B, d]``."""
        index, labels, last = assemble(examples, self.config.pieces + 1)
        final, middle = self.model.llm.model(self.model.splice(index, soft.to(self.dtype)))
        wanted = labels.flatten() != IGNORE
        logits = self.model.llm.lm_head(final.flatten(0, 1)[wanted]).float()
        return F.cross_entropy(logits, labels.flatten()[wanted]), middle[torch.arange(len(last)), last]

    # ------------------------------------------------------------------------------------------- optimizers

    def loss(self, stage: str) -> Callable[[int], dict[str, Tensor]]:
        """The stage's loss function."""
        return {"gin": self.gin_loss, "esm": self.esm_loss, "joint": self.joint_loss}[stage]

    def optimizers(self, stage: str) -> list[torch.optim.Optimizer]:
        """Muon for the decoder's matrices, AdamW for the rest; encoders at a lower rate once they are pre-trained."""
        rate = self.options.rate
        gin = [*self.model.mol_structure_encoder.parameters(), *self.heads.atom.parameters()]
        esm = [*self.model.prot_structure_encoder.parameters(), *self.heads.residue.parameters(),
               *self.heads.attention.parameters(), *self.heads.location.parameters()]  # fmt: skip
        if stage == "gin":
            return [_adamw(gin, 2e-3)]
        if stage == "esm":
            return [_adamw(esm, 1.5e-3)]
        matrices = [p for p in self.model.llm.model.layers.parameters() if p.ndim == 2]
        taken = {id(p) for p in (*gin, *esm, *matrices)}
        everything = [*self.model.parameters(), *self.heads.parameters()]
        rest = [p for p in everything if id(p) not in taken]
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        muon.param_groups[0]["base"] = rate
        return [_adamw(rest, rate), _adamw([*gin, *esm], rate * _ENCODER_RATE), muon]

    def set_mode(self, stage: str) -> None:
        """Training mode; GIN's batch statistics move in stage 1 only."""
        self.model.train()
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


def _adamw(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    optimizer.param_groups[0]["base"] = rate
    return optimizer
