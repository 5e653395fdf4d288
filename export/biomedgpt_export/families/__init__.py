"""One file per model family: where its files lie, what its tensors are called, its configuration and its template."""

from __future__ import annotations

from . import biomedgpt_10b, biomedgpt_lm_7b
from .base import Layout

# Layouts of checkpoints by the name of their family.
LAYOUTS: dict[str, type[Layout]] = {
    layout.family.name: layout for layout in (biomedgpt_10b.Layout, biomedgpt_lm_7b.Layout)
}
