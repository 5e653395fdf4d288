"""How long a context fits into a number of bytes."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from .bundle import Bundle
from .decoder.kv_cache import KvLayout
from .errors import MemoryLimitError, OptionError
from .generate import PREFILL_CHUNK
from .soft_tokens import CACHE_BYTES

# Interpreter, libraries and working memory: a whole process with the demo, whose bundle has 9 MB, peaks at 116 MiB.
RUNTIME_BYTES = 128 * 2**20
# The standard question about a small molecule and a few sentences of answer.
LEAST_POSITIONS = 160
_UNITS = {"": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}, "B": 1}
_UNITS |= {f"{p}{end}": 1024**n for n, p in enumerate("KMGT", 1) for end in ("", "IB")}


def parse_size(value: int | str) -> int:
    """Bytes: a number, or a text such as ``6GiB``, ``6G`` (the same) or ``6.5GB``.

    Raises:
        OptionError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = None if match is None or isinstance(value, bool) else _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise OptionError(f"memory_limit is {str(value)[:40]!r}.", seen=str(value)[:40], remedy="Give such as 6GiB.")
    return int(float(match[1]) * unit)


def context_within(bundle: Bundle, limit: int, kv: KvLayout, *, low_memory: bool) -> int:
    """Positions of prompt and answer that one answer at a time may have, at most the model's context.

    Counted are the files of the bundle that are in use together, with ``low_memory`` the larger encoder alone; soft
    tokens that are kept; what a chunk of the prompt takes on its way; and of each position its keys and values, its
    embedding and its attention scores.

    Args:
        limit: bytes.
        kv: of the decoder that is used.

    Raises:
        MemoryLimitError: too few are left for an answer.
    """
    spec = bundle.manifest.decoder
    fixed = _fixed_bytes(bundle, low_memory)
    scratch = 4 * PREFILL_CHUNK * (4 * spec.hidden_size + 3 * spec.intermediate_size)
    # GroupQueryAttention writes the scores of a whole call; our own has a tile of them.
    scores = 0 if kv.in_blocks else spec.heads * PREFILL_CHUNK
    per_position = kv.bytes_per_position + 4 * (spec.hidden_size + scores)
    needed = fixed + scratch + LEAST_POSITIONS * per_position
    if limit < needed:
        smaller = "" if low_memory else " With low_memory, encoders leave when they are not needed."
        raise MemoryLimitError(
            f"memory_limit is {mebibytes(limit)}; the model and what it runs with take "
            f"{mebibytes(fixed + scratch)}, and each position {per_position / 2**10:,.0f} KiB.",
            seen=limit,
            limit=needed,
            remedy=f"Give at least {mebibytes(needed)}, which leaves {LEAST_POSITIONS} positions.{smaller}",
        )
    return min(spec.context, (limit - fixed - scratch) // per_position)


def _fixed_bytes(bundle: Bundle, low_memory: bool) -> int:
    manifest = bundle.manifest
    specs = [spec for spec in (manifest.molecule_encoder, manifest.protein_encoder) if spec is not None]
    encoders = dict.fromkeys((PurePosixPath(spec.graph).stem for spec in specs), 0)
    others = 0
    for entry in manifest.files:
        stem = PurePosixPath(entry.path).stem
        if stem in encoders:
            encoders[stem] += entry.size
        else:
            others += entry.size
    # ONNX Runtime widens weights in fp16 to fp32 when it loads them.
    widened = 2 if manifest.precision == "fp16" else 1
    return RUNTIME_BYTES + CACHE_BYTES + widened * (others + (max if low_memory else sum)([0, *encoders.values()]))


def mebibytes(size: int) -> str:
    """Bytes, for people."""
    return f"{-(-size // 2**20):,} MiB"
