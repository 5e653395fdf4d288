"""The pickle of a ``torch.save`` file, interpreted without the pickle module.

``torch.save`` describes the tensors of a state dict in a protocol-2 pickle. Its instruction set is Python's
(``Lib/pickletools.py`` documents each opcode), its vocabulary is small: ``torch._utils._rebuild_tensor_v2`` applied to
(storage, offset, size, stride, ...), where the storage is a persistent id ``("storage", <type>, <key>, <device>,
<elements>)``, inside dicts (``torch/_utils.py`` and ``torch/serialization.py``).

A ``pickle.Unpickler`` with a restricted ``find_class`` keeps foreign code out but not hostile data: BUILD sets
attributes of whatever it is given, one LONG_BINPUT makes the C implementation allocate gigabytes for its memo, and a
dict key of a few million nested tuples overflows the C stack in ``hash``. So the opcodes that ``torch.save`` writes are
interpreted here, and all they can build is dicts, lists, tuples, scalars and the inert descriptions below. A first
pass refuses every other opcode and name before anything is built.
"""

from __future__ import annotations

import io
import pickletools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from ..errors import CheckpointError, UnsafeCheckpointError

#: The 10B's pickle is about 200 KB and 40,000 operations.
MAX_PICKLE_BYTES = 16 << 20
MAX_OPERATIONS = 1_000_000
_MAX_NAMES_SHOWN = 20
_MAX_NAME_CHARACTERS = 100


@dataclass(frozen=True)
class StorageType:
    """A ``torch.*Storage`` class that the pickle names."""

    dtype: str
    item_bytes: int


@dataclass(frozen=True)
class StorageRef:
    """A run of elements in the member ``data/<key>`` of the archive."""

    key: str
    type: StorageType
    elements: int


@dataclass(frozen=True)
class TensorView:
    """A tensor: a strided view of a storage, offset and strides counted in elements."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Builder:
    """One of the three callables a state dict needs."""

    name: str


_ORDERED_DICT = _Builder("collections.OrderedDict")
_REBUILD_TENSOR = _Builder("torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = _Builder("torch._utils._rebuild_parameter")

_GLOBALS: dict[str, StorageType | _Builder] = {
    **{builder.name: builder for builder in (_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER)},
    "torch.DoubleStorage": StorageType("float64", 8),
    "torch.FloatStorage": StorageType("float32", 4),
    "torch.HalfStorage": StorageType("float16", 2),
    "torch.BFloat16Storage": StorageType("bfloat16", 2),
    "torch.LongStorage": StorageType("int64", 8),
    "torch.IntStorage": StorageType("int32", 4),
    "torch.ShortStorage": StorageType("int16", 2),
    "torch.CharStorage": StorageType("int8", 1),
    "torch.ByteStorage": StorageType("uint8", 1),
    "torch.BoolStorage": StorageType("bool", 1),
    "torch.ComplexFloatStorage": StorageType("complex64", 8),
    "torch.ComplexDoubleStorage": StorageType("complex128", 16),
}

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
# Opcodes that import, call or instantiate by routes a state dict never takes.
_OBJECT_OPCODES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})
# Text arguments are taken as raw lines: parsing a decimal of a million digits is itself an attack.
_LINES_OF = {"GLOBAL": 2, "INST": 2, "PERSID": 1, "INT": 1, "LONG": 1, "FLOAT": 1, "STRING": 1, "UNICODE": 1}
_LINES_OF |= {"GET": 1, "PUT": 1}

_UNSAFE_REMEDY = (
    "Nothing of it was run. Only plain state dicts are read: ask its author for the weights as safetensors, and do "
    "not load it with torch.load(weights_only=False)."
)


def read_pickle(data: bytes, label: str) -> object:
    """The object a state-dict pickle describes, tensors as :class:`TensorView`.

    Raises:
        UnsafeCheckpointError: it names or does something other than the rebuilding of tensors.
        CheckpointError: it is malformed, too large or uses values no state dict has.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{label}: the pickle is too large.", seen=len(data), limit=MAX_PICKLE_BYTES)
    _refuse_foreign_operations(data, label)
    return _Machine(label).run(data)


def _operations(data: bytes, label: str) -> Iterator[tuple[int, str, Any]]:
    """Position, name and argument of each opcode up to STOP."""
    stream = io.BytesIO(data)
    for _ in range(MAX_OPERATIONS):
        position = stream.tell()
        opcode = _OPCODES.get(stream.read(1).decode("latin-1"))
        if opcode is None:
            raise CheckpointError(f"{label}: the pickle is cut off or malformed at byte {position}.", seen=position)
        argument: Any = None
        if opcode.name in _LINES_OF:
            argument = ".".join(_line(stream) for _ in range(_LINES_OF[opcode.name]))
        elif opcode.arg is not None:
            try:
                argument = opcode.arg.reader(stream)
            except ValueError as error:
                raise CheckpointError(f"{label}: the pickle is malformed at byte {position}: {error}.") from error
        yield position, opcode.name, argument
        if opcode.name == "STOP":
            if stream.read(1):
                raise CheckpointError(f"{label}: bytes follow the end of the pickle.", seen=position + 1)
            return
    raise CheckpointError(f"{label}: the pickle has too many operations.", limit=MAX_OPERATIONS)


def _line(stream: io.BytesIO) -> str:
    return stream.readline().removesuffix(b"\n").decode("utf-8", "backslashreplace")


def _refuse_foreign_operations(data: bytes, label: str) -> None:
    """Read the opcodes without acting on them; list every name and route that a state dict has no use for."""
    names: dict[str, None] = {}
    foreign: dict[str, None] = {}
    strings = _StringTrace()
    try:
        for _, operation, argument in _operations(data, label):
            if operation == "STACK_GLOBAL":
                names[strings.last_two()] = None
            elif operation in {"GLOBAL", "INST"} and argument not in _GLOBALS:
                names[argument] = None
            elif operation.startswith("EXT"):
                names[f"copyreg extension {argument}"] = None
            elif operation in _OBJECT_OPCODES:
                names[f"opcode {operation}"] = None
            elif operation not in _HANDLERS:
                foreign[operation] = None
            strings.follow(operation, argument)
    except CheckpointError:
        # A pickle runs up to the byte where it breaks, so what was seen before that is the graver finding.
        if not names:
            raise
    if names:
        shown = [name[:_MAX_NAME_CHARACTERS] for name in names]
        listing = ", ".join(shown[:_MAX_NAMES_SHOWN]) + (", ..." if len(shown) > _MAX_NAMES_SHOWN else "")
        raise UnsafeCheckpointError(
            f"{label} refers to {listing}: more than a state dict of plain tensors needs.",
            seen=shown[:_MAX_NAMES_SHOWN],
            remedy=_UNSAFE_REMEDY,
        )
    if foreign:
        raise CheckpointError(
            f"{label}: the pickle uses {', '.join(sorted(foreign))}, which torch.save does not write for a state dict.",
            seen=sorted(foreign),
            remedy="Save again with torch.save(model.state_dict(), path) and its default protocol.",
        )


class _StringTrace:
    """Follows string constants well enough to say which name STACK_GLOBAL would import.

    Only for the message: a pickle with STACK_GLOBAL is refused whether or not the name can be told.
    """

    def __init__(self) -> None:
        self._recent: deque[str] = deque(maxlen=2)
        self._memo: dict[object, str] = {}
        self._memo_size = 0

    def follow(self, operation: str, argument: Any) -> None:
        if operation.endswith(("UNICODE", "UNICODE8", "STRING")):
            self._recent.append(str(argument).strip("'\""))
        elif operation == "MEMOIZE" or operation.endswith("PUT"):
            index = self._memo_size if operation == "MEMOIZE" else argument
            self._memo_size += 1
            if self._recent:
                self._memo[str(index)] = self._recent[-1]
        elif operation.endswith("GET") and str(argument) in self._memo:
            self._recent.append(self._memo[str(argument)])

    def last_two(self) -> str:
        return ".".join(self._recent) or "a name made up at run time"


class _Machine:
    """The pickle virtual machine, reduced to the opcodes of a state dict."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stack: list[object] = []
        self._outer: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def run(self, data: bytes) -> object:
        for position, operation, argument in _operations(data, self._label):
            if operation == "STOP":
                break
            try:
                _HANDLERS[operation](self, argument)
            except (IndexError, KeyError) as error:
                raise self._malformed(f"{operation} at byte {position} finds nothing to work on") from error
        if len(self._stack) != 1 or self._outer:
            raise self._malformed("it does not end with one value")
        return self._stack[0]

    def _malformed(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._label}: the pickle is malformed: {what}.")

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self, _: object) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[object]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def name(self, name: str) -> None:
        self._stack.append(_GLOBALS[name])

    def tuple_of(self, length: int) -> None:
        if len(self._stack) < length:
            raise IndexError(length)
        items = tuple(self._stack[len(self._stack) - length :])
        del self._stack[len(self._stack) - length :]
        self._stack.append(items)

    def tuple_to_mark(self, _: object) -> None:
        items = tuple(self._pop_to_mark())
        self._stack.append(items)

    def append(self, _: object) -> None:
        self._extend([self._stack.pop()])

    def append_to_mark(self, _: object) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise self._malformed("values are appended to something that is not a list")
        target.extend(items)

    def set_item(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_to_mark(self, _: object) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self._malformed("items are set on something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Optimizer states count their parameters, hence integers. Hashing anything deeper is unsafe, see above.
            if type(key) not in (str, int):
                raise self._malformed(f"a dict key is a {type(key).__name__}")
            if key in target:
                raise self._malformed(f"the key {str(key)[:_MAX_NAME_CHARACTERS]!r} occurs twice")
            target[key] = value

    def persistent_id(self, _: object) -> None:
        match self._stack.pop():
            case ("storage", StorageType() as type_, str() as key, str(), int() as elements) if _is_member_key(key):
                if elements < 0 or isinstance(elements, bool):
                    raise self._malformed(f"storage {key} has {elements} elements")
                self._stack.append(StorageRef(key, type_, elements))
            case _:
                raise self._malformed("a persistent id does not describe a storage")

    def reduce(self, _: object) -> None:
        arguments, builder = self._stack.pop(), self._stack.pop()
        if builder is _ORDERED_DICT and arguments == ():
            self._stack.append({})
        elif builder is _REBUILD_TENSOR:
            self._stack.append(self._tensor(arguments))
        elif builder is _REBUILD_PARAMETER and isinstance(arguments, tuple) and len(arguments) == 3:
            if not isinstance(arguments[0], TensorView):
                raise self._malformed("a parameter is made of something that is not a tensor")
            self._stack.append(arguments[0])
        else:
            raise self._malformed("REDUCE calls something with arguments that torch.save does not write")

    def _tensor(self, arguments: object) -> TensorView:
        match arguments:
            # The optional seventh entry carries conjugate and negative bits, which change the values.
            case (StorageRef() as storage, int() as offset, tuple() as size, tuple() as stride, bool(), _):
                pass
            case (StorageRef() as storage, int() as offset, tuple() as size, tuple() as stride, bool(), _, None):
                pass
            case _:
                raise self._malformed("a tensor is rebuilt from arguments that torch.save does not write")
        if any(type(number) is not int for number in (offset, *size, *stride)):
            raise self._malformed("offset, size or stride of a tensor is not an integer")
        return TensorView(storage, offset, cast("tuple[int, ...]", size), cast("tuple[int, ...]", stride))

    def build(self, _: object) -> None:
        # nn.Module.state_dict() hangs version numbers of its modules on the dict; weights do not depend on them.
        state, target = self._stack.pop(), self._stack[-1]
        if not (isinstance(target, dict) and isinstance(state, dict) and list(state) == ["_metadata"]):
            raise UnsafeCheckpointError(
                f"{self._label} sets attributes of an object by BUILD: more than a state dict of plain tensors needs.",
                seen="BUILD",
                remedy=_UNSAFE_REMEDY,
            )


def _is_member_key(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= 9


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, argument: None,
    "STOP": lambda machine, argument: None,
    "MARK": _Machine.mark,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
    "NONE": lambda machine, argument: machine.push(None),
    "NEWTRUE": lambda machine, argument: machine.push(True),
    "NEWFALSE": lambda machine, argument: machine.push(False),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    "EMPTY_TUPLE": lambda machine, argument: machine.push(()),
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_to_mark,
    "EMPTY_DICT": lambda machine, argument: machine.push({}),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_to_mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
}
