"""Checkpoints whose matrices are already quantized by GPTQ: the layout of AutoGPTQ and GPTQModel, 4 bits.

Each quantized linear layer ``<module>`` has, instead of ``weight`` ``[N, K]``:

* ``qweight`` int32 ``[K / 8, N]``: eight neighbouring input columns per word, the first in the lowest bits;
* ``qzeros`` int32 ``[groups, N / 8]``: eight neighbouring outputs per word; in format ``gptq`` less one each;
* ``scales`` float16 ``[groups, N]``;
* ``g_idx`` int32 ``[K]``: the group of each column; only activation order makes it other than ``k // group_size``;
* ``bias`` ``[N]``, if the layer has one.

The weight is ``scales[g, n] * (q - zeros[g, n])``. Sources: AutoGPTQ ``nn_modules/qlinear/qlinear_cuda.py``, GPTQModel
``nn_modules/qlinear/__init__.py`` and ``utils/model.py``; neither is needed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, KeyMismatchError
from ..finite import is_finite
from .base import Checkpoint, missing_key
from .gptq_config import BITS, V1, V2, GptqConfig

_PER_WORD = 32 // BITS
_VALUE_MASK = 2**BITS - 1
#: What symmetric quantization has for every zero point: the middle of 0 to 15, rounded up.
SYMMETRIC_ZERO = 8
# One in each of the eight values of a word.
_ONES = 0x11111111

_FLOATS = ("float16", "bfloat16", "float32")
_WEIGHT, _QWEIGHT, _BIAS = ".weight", ".qweight", ".bias"
_BESIDE_QWEIGHT = (".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class GptqWeight:
    """One matrix ``[N, K]`` as the checkpoint has it, its columns in the checkpoint's order.

    Attributes:
        values: uint8 ``[N, K]``, 0 to 15.
        zeros: uint8 ``[N, groups]``, 0 to 15.
        scales: float16 ``[N, groups]``; finite, of either sign (AutoRound writes negative ones), or zero.
        group_of: int64 ``[K]``, the group of each column.
        group_size: columns per group; the last group may have fewer.
    """

    values: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group_of: torch.Tensor
    group_size: int

    @property
    def trivial(self) -> bool:
        """Whether groups are runs of neighbouring columns."""
        return _trivial(self.group_of, self.group_size)

    def dequantize(self) -> torch.Tensor:
        """float32 ``[N, K]``, without any rounding: 11 bits of a scale times 4 bits of a difference need 15 of 24."""
        weight = self.values.float()
        weight -= self.zeros[:, self.group_of]
        weight *= self.scales[:, self.group_of]
        return weight

    def sorted(self) -> tuple[torch.Tensor, GptqWeight]:
        """The weight with its columns by group, and which column each of them was, int64 ``[K]``; ties keep order."""
        order = torch.argsort(self.group_of, stable=True)
        moved = dataclasses.replace(self, values=self.values[:, order], group_of=self.group_of[order])
        return order, moved


@dataclass(frozen=True)
class _Sizes:
    """Of one quantized layer, known from the shapes alone."""

    rows: int
    columns: int
    group_size: int

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group_size)


class GptqCheckpoint(Checkpoint):
    """A checkpoint in the GPTQ layout, shown as one of ordinary float32 matrices under their ordinary names.

    Opening compares the names, shapes and types of all tensors with the configuration, and reads everything of every
    layer but its packed values: scales, zero points and group indices are sound, or nothing is handed out.

    Attributes:
        config: what the checkpoint says about itself.
        zero_biases: biases of quantized layers that are zero throughout. AutoGPTQ used to write them for layers that
            have none, so that a family may ignore them.

    Raises:
        KeyMismatchError: tensors are missing, misshapen or left over; all of them are listed.
        CheckpointError: no matrix is quantized, or numbers contradict the configuration.
    """

    def __init__(self, inner: Checkpoint, config: GptqConfig) -> None:
        self.files = [*inner.files, *config.files]
        self.config = config
        self._inner = inner
        self._layers = _layers(inner, config)
        hidden = {module + part for module in self._layers for part in _BESIDE_QWEIGHT}
        shown = [key for key in inner.keys() if key not in hidden]
        # A dict for its order and its look-ups.
        self._keys = dict.fromkeys(_shown_name(key) for key in shown)
        self._asymmetric, self._reordered = set[str](), set[str]()
        for module, sizes in self._layers.items():
            _, zeros, group_of = self._groups(module)
            if not (zeros == SYMMETRIC_ZERO).all():
                self._asymmetric.add(module)
            if not _trivial(group_of, sizes.group_size):
                self._reordered.add(module)
        biases = [module + _BIAS for module in self._layers if module + _BIAS in inner.keys()]
        self.zero_biases = frozenset(key for key in biases if not inner.tensor(key).any())

    def keys(self) -> list[str]:
        return list(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        sizes = self._sizes(key)
        return self._inner.shape(key) if sizes is None else (sizes.rows, sizes.columns)

    def dtype(self, key: str) -> str:
        return self._inner.dtype(key) if self._sizes(key) is None else "float32"

    def tensor(self, key: str) -> torch.Tensor:
        weight = self.quantized(key)
        return self._inner.tensor(key) if weight is None else weight.dequantize()

    def quantized_keys(self) -> list[str]:
        """Names of the matrices that are quantized, in file order."""
        return [module + _WEIGHT for module in self._layers]

    def asymmetric(self, key: str) -> bool:
        """Whether a matrix is quantized with zero points other than 8."""
        return key.removesuffix(_WEIGHT) in self._asymmetric

    def reordered(self, key: str) -> bool:
        """Whether the groups of a matrix are other than runs of neighbouring columns."""
        return key.removesuffix(_WEIGHT) in self._reordered

    def quantized(self, key: str) -> GptqWeight | None:
        """The exact numbers of a quantized matrix; None for a tensor that is not quantized."""
        sizes = self._sizes(key)
        if sizes is None:
            return None
        module = key.removesuffix(_WEIGHT)
        scales, zeros, group_of = self._groups(module)
        values = _unpacked(self._inner.tensor(module + _QWEIGHT).T)
        return GptqWeight(values, zeros, scales, group_of, sizes.group_size)

    def close(self) -> None:
        self._inner.close()

    def _sizes(self, key: str) -> _Sizes | None:
        if key not in self._keys:
            raise missing_key(self.files[0], key)
        return self._layers.get(key.removesuffix(_WEIGHT)) if key.endswith(_WEIGHT) else None

    def _groups(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scales float16 ``[N, groups]``, zero points uint8 ``[N, groups]``, group of each column int64 ``[K]``."""
        scales = _exact_half(self._inner.tensor(f"{module}.scales"), module)
        return scales.T.contiguous(), self._zeros(module), self._group_of(module)

    def _zeros(self, module: str) -> torch.Tensor:
        stored = self._inner.tensor(f"{module}.qzeros")
        zeros = nibbles = _unpacked(stored)
        if self.config.format == V1:
            if not self.config.borrows and (nibbles == _VALUE_MASK).any():
                raise _ambiguous_zero(module)
            zeros = _unpacked(stored.long() + _ONES)
        if self.config.sym and not (zeros == SYMMETRIC_ZERO).all():
            raise _not_symmetric(module, zeros, nibbles, self.config)
        return zeros.T.contiguous()

    def _group_of(self, module: str) -> torch.Tensor:
        sizes = self._layers[module]
        in_order = torch.arange(sizes.columns) // sizes.group_size
        if f"{module}.g_idx" not in self._inner.keys():
            return in_order
        group_of = self._inner.tensor(f"{module}.g_idx").long()
        if group_of.min() < 0 or group_of.max() >= sizes.groups:
            raise CheckpointError(
                f"{module}.g_idx has groups from {int(group_of.min())} to {int(group_of.max())}.",
                seen=int(group_of.max()),
                limit=f"0 to {sizes.groups - 1}",
                remedy="Copy or download the checkpoint again.",
            )
        if not torch.equal(torch.bincount(group_of, minlength=sizes.groups), torch.bincount(in_order)):
            raise CheckpointError(
                f"{module}.g_idx puts columns into groups of other sizes than {sizes.group_size}.",
                seen=int(torch.bincount(group_of).max()),
                limit=sizes.group_size,
                remedy="Quantize the model again; a group of another size has no scale of its own.",
            )
        if self.config.desc_act is False and not torch.equal(group_of, in_order):
            raise CheckpointError(
                f"{module}.g_idx reorders columns, and the configuration says desc_act = false.",
                seen=f"{module}.g_idx",
                remedy="Some kernels would then ignore g_idx. Set desc_act to true if the model needs it.",
            )
        return group_of


def _trivial(group_of: torch.Tensor, group_size: int) -> bool:
    return torch.equal(group_of, torch.arange(len(group_of)) // group_size)


def _shown_name(key: str) -> str:
    return key.removesuffix(_QWEIGHT) + _WEIGHT if key.endswith(_QWEIGHT) else key


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """The values of words ``[A, B]``, of which the low 32 bits count: uint8 ``[A, 8 B]``."""
    words = words.contiguous()
    values = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8)
    for place in range(_PER_WORD):
        # Of a negative word the shift drags the sign along, which the mask takes away.
        values[..., place] = (words >> BITS * place) & _VALUE_MASK
    return values.flatten(-2)


def _exact_half(scales: torch.Tensor, module: str) -> torch.Tensor:
    """The scales as float16, if that is what they are."""
    halves = scales.half()
    if not is_finite(scales):
        raise CheckpointError(
            f"{module}.scales holds NaN or infinity.",
            seen=f"{module}.scales",
            remedy="Download or quantize the checkpoint again.",
        )
    if not torch.equal(halves.float(), scales.float()):
        raise CheckpointError(
            f"{module}.scales is {scales.dtype} and holds values that float16 cannot.",
            seen=f"{module}.scales",
            limit="float16",
            remedy="Save the checkpoint with float16 scales, or export the original weights.",
        )
    return halves


def _ambiguous_zero(module: str) -> CheckpointError:
    return CheckpointError(
        f"{module}.qzeros stores {_VALUE_MASK}, which in format {V1} can be a zero point of 0 or of {_VALUE_MASK + 1}; "
        "loaders differ.",
        seen=_VALUE_MASK,
        limit=_VALUE_MASK - 1,
        remedy=f"Quantize again in format {V2}, or with sym = true.",
    )


def _not_symmetric(module: str, zeros: torch.Tensor, stored: torch.Tensor, config: GptqConfig) -> CheckpointError:
    """Zero points other than 8 under ``sym``; those of the other format get that said."""
    remedy = "Set sym to false if the model was quantized so, or download it again."
    other = V2 if config.format == V1 else V1
    if (stored == (SYMMETRIC_ZERO if other == V2 else SYMMETRIC_ZERO - 1)).all():
        remedy = f"In format {other} they would be {SYMMETRIC_ZERO}: set checkpoint_format to {other} if it is that."
    return CheckpointError(
        f"{module}.qzeros holds zero points from {int(zeros.min())} to {int(zeros.max())} in format {config.format}, "
        f"and the configuration says sym = true.",
        seen=int(zeros.max()),
        limit=SYMMETRIC_ZERO,
        remedy=remedy,
    )


def _layers(checkpoint: Checkpoint, config: GptqConfig) -> dict[str, _Sizes]:
    """The quantized layers by module name, after a comparison of all their shapes."""
    keys = checkpoint.keys()
    modules = [key.removesuffix(_QWEIGHT) for key in keys if key.endswith(_QWEIGHT)]
    if not modules:
        raise CheckpointError(
            f"{checkpoint.files[0]} holds no quantized matrix, and its configuration describes how they are quantized.",
            seen=len(keys),
            remedy="Take the weights and the configuration from the same model.",
        )
    layers = {}
    problems = [f"without qweight: {key}" for key in _stray(keys, set(modules))]
    for module in modules:
        sizes = _sizes_of(checkpoint, module, config)
        if sizes is None:
            problems.append(f"misshapen: {module}{_QWEIGHT} is {list(checkpoint.shape(module + _QWEIGHT))}")
            continue
        layers[module] = sizes
        problems += _problems(checkpoint, module, sizes, config)
    if problems:
        raise KeyMismatchError(
            f"the quantized checkpoint does not fit its configuration in {len(problems)} places:\n  "
            + "\n  ".join(problems)
            + "\n",
            problems,
            remedy="Check that the weights and the configuration belong together.",
        )
    return layers


def _stray(keys: list[str], modules: set[str]) -> Iterator[str]:
    for key in keys:
        for part in _BESIDE_QWEIGHT:
            if key.endswith(part) and key.removesuffix(part) not in modules:
                yield key


def _sizes_of(checkpoint: Checkpoint, module: str, config: GptqConfig) -> _Sizes | None:
    shape = checkpoint.shape(module + _QWEIGHT)
    if len(shape) != 2 or 0 in shape or shape[1] % _PER_WORD:
        return None
    columns = shape[0] * _PER_WORD
    return _Sizes(shape[1], columns, config.columns_per_group(columns))


def _problems(checkpoint: Checkpoint, module: str, sizes: _Sizes, config: GptqConfig) -> Iterator[str]:
    """What is wrong with the tensors of one layer, as far as names, shapes and types tell."""
    keys = checkpoint.keys()
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        _QWEIGHT: ((sizes.columns // _PER_WORD, sizes.rows), ("int32",)),
        ".qzeros": ((sizes.groups, sizes.rows // _PER_WORD), ("int32",)),
        ".scales": ((sizes.groups, sizes.rows), _FLOATS),
        ".g_idx": ((sizes.columns,), ("int32", "int64")),
        _BIAS: ((sizes.rows,), _FLOATS),
    }
    # Tools that never reorder columns may leave g_idx out.
    optional = {_BIAS} if config.desc_act else {_BIAS, ".g_idx"}
    for part, (shape, dtypes) in expected.items():
        key = module + part
        if key not in keys:
            if part not in optional:
                yield f"missing: {key} {list(shape)}"
        elif checkpoint.shape(key) != shape:
            yield f"misshapen: {key} is {list(checkpoint.shape(key))}, {list(shape)} is implied"
        elif checkpoint.dtype(key) not in dtypes:
            yield f"of another type: {key} is {checkpoint.dtype(key)}, not {' or '.join(dtypes)}"
    if module + _WEIGHT in keys:
        yield f"both quantized and not: {module + _WEIGHT}"
