"""How a GPTQ checkpoint says it was quantized: ``quantize_config.json``, or ``quantization_config`` in ``config.json``.

AutoGPTQ writes the first, transformers the second, GPTQModel both (``quantization/config.py`` of either tool). Only
what decides how the stored numbers are to be read is kept; how they were found (damping, sequence, data) is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .base import read_json

OWN_FILE, MODEL_FILE, MODEL_ENTRY = "quantize_config.json", "config.json", "quantization_config"

BITS = 4
#: One group per row.
WHOLE_ROW = -1
#: Zero points are stored less one in the first, as they are in the second.
V1, V2 = "gptq", "gptq_v2"

# GPTQModel 7 writes both names of a field, older tools and transformers one or the other.
_ALIASES = {"checkpoint_format": "format", "quant_method": "method"}
# What the tools assume where a file is silent.
_DEFAULTS: dict[str, object] = {"format": V1, "method": "gptq", "pack_dtype": "int32"}
_FIELDS = (*_DEFAULTS, "bits", "group_size", "sym", "desc_act")
# Rotated inputs, quantized activations and adapters are computed beside the weights, where no graph of ours has them.
_BESIDE_THE_WEIGHTS = ("rotation", "activation", "adapter")
# GPTQModel lowers the zero points of version 1 by one subtraction on eight of them, so that a zero point of 0 borrows
# from its neighbour (utils/model.py, convert_gptq_v2_to_v1_format_module). Other tools lose the neighbours.
_BORROWING_TOOL = "gptqmodel"


@dataclass(frozen=True)
class GptqConfig:
    """What the numbers of a checkpoint mean.

    Attributes:
        group_size: input columns that share a scale and a zero point; :data:`WHOLE_ROW` for all of them.
        format: :data:`V1` or :data:`V2`.
        sym: whether every zero point is 8; None where the files do not say.
        desc_act: whether columns were grouped in another order than theirs; None where the files do not say.
        borrows: whether version 1 zero points can be told apart even where one is 0.
        files: where all this is written.
    """

    group_size: int
    format: str = V1
    sym: bool | None = None
    desc_act: bool | None = None
    borrows: bool = False
    files: tuple[Path, ...] = ()

    def columns_per_group(self, columns: int) -> int:
        """How many of ``columns`` share a scale."""
        return columns if self.group_size == WHOLE_ROW else min(self.group_size, columns)

    @classmethod
    def read(cls, folder: Path) -> GptqConfig | None:
        """The configuration of a model folder; None if the folder does not say that it is quantized.

        Raises:
            CheckpointError: it is quantized in a way that is not read here, or two files disagree.
        """
        sources = dict(_sources(folder))
        if not sources:
            return None
        fields: dict[str, object] = {}
        for path, values in sources.items():
            _require_readable(values, path)
            for name, value in _known_fields(values, path):
                if fields.setdefault(name, value) != value:
                    raise CheckpointError(
                        f"{path} says {name} = {_short(value)}, {next(iter(sources)).name} beside it says "
                        f"{_short(fields[name])}.",
                        seen=_short(value),
                        remedy="Take both from the same revision of the model.",
                    )
        tools = [tool for values in sources.values() for tool in _tools(values)]
        return cls._from(_DEFAULTS | fields, any(tool == _BORROWING_TOOL for tool in tools), tuple(sources))

    @classmethod
    def _from(cls, fields: Mapping[str, object], borrows: bool, files: tuple[Path, ...]) -> GptqConfig:
        where = " and ".join(str(path) for path in files)
        _require(fields, "method", ("gptq",), where)
        _require(fields, "format", (V1, V2), where)
        _require(fields, "bits", (BITS,), where)
        _require(fields, "pack_dtype", ("int32",), where)
        size = fields.get("group_size")
        if type(size) is not int or not (size == WHOLE_ROW or 1 <= size < 2**31):
            raise _unreadable(where, "group_size", size, f"{WHOLE_ROW} or a positive number")
        for name in ("sym", "desc_act"):
            if name in fields and type(fields[name]) is not bool:
                raise _unreadable(where, name, fields[name], "true or false")
        return cls(
            size,
            str(fields["format"]),
            sym=None if "sym" not in fields else bool(fields["sym"]),
            desc_act=None if "desc_act" not in fields else bool(fields["desc_act"]),
            borrows=borrows,
            files=files,
        )


def _sources(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The objects that describe the quantization, by file."""
    for name, entry in ((OWN_FILE, None), (MODEL_FILE, MODEL_ENTRY)):
        path = folder / name
        if not path.exists():
            continue
        content = read_json(path)
        if entry is not None and isinstance(content, dict):
            content = content.get(entry)
            if content is None:
                continue
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no object that describes a quantization.", seen=str(path))
        yield path, content


def _known_fields(values: Mapping[str, Any], path: Path) -> Iterator[tuple[str, object]]:
    """The fields that count, under one name each; null means that a field is not there."""
    fields: dict[str, object] = {}
    for key, value in values.items():
        name = _ALIASES.get(key, key)
        if name not in _FIELDS or value is None:
            continue
        value = value.lower() if isinstance(value, str) else value
        if fields.setdefault(name, value) != value:
            raise CheckpointError(
                f"{path} says {name} = {_short(fields[name])} and {key} = {_short(value)}.", seen=_short(value)
            )
    yield from fields.items()


def _require_readable(values: Mapping[str, Any], path: Path) -> None:
    """Refuse what changes the layout or the model and has no field that could be compared."""
    if values.get("is_marlin_format"):
        raise _unreadable(str(path), "is_marlin_format", True, "false, since Marlin reorders all numbers")
    for name in _BESIDE_THE_WEIGHTS:
        if values.get(name):
            raise _unreadable(str(path), name, values[name], "none, since the model computes more than its weights say")
    rules = values.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise _unreadable(str(path), "dynamic", rules, "an object of rules")
    common = _DEFAULTS | dict(_known_fields(values, path))
    for pattern, rule in rules.items():
        # GPTQModel: '-:' leaves the modules that match unquantized, which their tensors show; others override fields.
        if not pattern.startswith("-:"):
            _require_common(common, pattern, rule, path)


def _require_common(common: Mapping[str, object], pattern: str, rule: object, path: Path) -> None:
    if not isinstance(rule, dict) or rule.get("adapter"):
        raise _unreadable(str(path), f"dynamic[{pattern[:60]!r}]", rule, "an object without an adapter")
    for name, value in _known_fields(rule, path):
        if name not in common or value != common[name]:
            raise CheckpointError(
                f"{path} has a dynamic rule {pattern[:60]!r} with {name} = {_short(value)}, and {name} = "
                f"{_short(common.get(name))} for everything else.",
                seen=_short(value),
                limit=_short(common.get(name)),
                remedy="Read are rules that leave modules out ('-:'), or that repeat what holds for all.",
            )


def _tools(values: Mapping[str, Any]) -> Iterator[str]:
    """Names of the tools that wrote the checkpoint, from ``meta.quantizer``: ``["gptqmodel:7.2.0"]``."""
    meta = values.get("meta")
    named = meta.get("quantizer") if isinstance(meta, dict) else None
    for tool in named if isinstance(named, list) else [named]:
        if isinstance(tool, str):
            yield tool.partition(":")[0].strip().lower()


def _require(fields: Mapping[str, object], name: str, known: tuple[object, ...], where: str) -> None:
    value = fields.get(name)
    # True is equal to 1 and 4.0 to 4; a file that says so was not written by any of the tools.
    if value not in known or type(value) is not type(known[0]):
        raise _unreadable(where, name, value, " or ".join(map(str, known)))


def _unreadable(where: str, name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {name} is {_short(value)}; read here is {expected}.",
        seen=_short(value),
        limit=expected,
        remedy="Export the original weights, or quantize them to 4 bits in the format gptq or gptq_v2.",
    )


def _short(value: object) -> str:
    return f"{value!r:.60}"
