"""Pickles that try to run something, or to exhaust the reader: refused by name, with nothing run."""

from __future__ import annotations

import contextlib
import copyreg
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_export.checkpoint import open_checkpoint
from biomedgpt_export.checkpoint.torch_pickle import MAX_PICKLE_BYTES, read_pickle
from biomedgpt_export.errors import CheckpointError, UnsafeCheckpointError
from support import bounded_memory


def checkpoint_with(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
    return path


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


class Reduced:
    """Pickles as a call of the given function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def code(sentinel: Path) -> str:
    return f"open({str(sentinel)!r}, 'w').close()"


# Each takes the file that its code would create, and gives the pickle and the name that the error must contain.
Route = Callable[[Path], tuple[bytes, str]]


def by_global(sentinel: Path) -> tuple[bytes, str]:
    return b"\x80\x02cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR.", "builtins.exec"


def by_os_system(sentinel: Path) -> tuple[bytes, str]:
    return b"\x80\x02cos\nsystem\n(" + text(f"touch '{sentinel}'") + b"tR.", "os.system"


def by_stack_global(sentinel: Path) -> tuple[bytes, str]:
    return pickle.dumps(Reduced(exec, code(sentinel)), protocol=4), "builtins.exec"


def by_stack_global_from_memo(sentinel: Path) -> tuple[bytes, str]:
    data = b"\x80\x04" + short("builtins") + b"\x94" + short("exec") + b"\x94" + b"00" + b"h\x00h\x01\x93"
    return data + b"(" + text(code(sentinel)) + b"tR.", "builtins.exec"


def by_inst(sentinel: Path) -> tuple[bytes, str]:
    return b"(" + text(code(sentinel)) + b"ibuiltins\nexec\n.", "builtins.exec"


def by_obj(sentinel: Path) -> tuple[bytes, str]:
    return b"(cbuiltins\nexec\n" + text(code(sentinel)) + b"o.", "builtins.exec"


def by_newobj(sentinel: Path) -> tuple[bytes, str]:
    made = b"cfunctools\npartial\n(cbuiltins\nexec\n" + text(code(sentinel)) + b"t\x81"
    return b"\x80\x02" + made + b")R.", "functools.partial"


def by_copyreg(sentinel: Path) -> tuple[bytes, str]:
    register = b"ccopyreg\nadd_extension\n(" + text("builtins") + text("exec") + b"K\xf0tR0"
    return b"\x80\x02" + register + b"\x82\xf0(" + text(code(sentinel)) + b"tR.", "copyreg.add_extension"


def by_reconstructor(sentinel: Path) -> tuple[bytes, str]:
    rebuilt = b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR0"
    return b"\x80\x02" + rebuilt + b"cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR.", "copyreg._reconstructor"


def by_setstate(sentinel: Path) -> tuple[bytes, str]:
    # functools.partial.__setstate__ takes the function to call from the state.
    partial = b"cfunctools\npartial\n(cbuiltins\nprint\ntR"
    state = b"(cbuiltins\nexec\n(" + text(code(sentinel)) + b"t}Nt"
    return b"\x80\x02" + partial + state + b"b)R.", "functools.partial"


def by_getattr(sentinel: Path) -> tuple[bytes, str]:
    module = b"cimportlib\nimport_module\n(" + text("builtins") + b"tR"
    function = b"cbuiltins\ngetattr\n(" + module + text("exec") + b"tR"
    return b"\x80\x02" + function + b"(" + text(code(sentinel)) + b"tR.", "builtins.getattr"


def by_dotted_name(sentinel: Path) -> tuple[bytes, str]:
    data = b"\x80\x04" + short("torch._utils") + short("sys.modules.__class__") + b"\x930"
    return data + b"cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR.", "torch._utils.sys.modules.__class__"


def by_torch_jit(sentinel: Path) -> tuple[bytes, str]:
    run = b"cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR0"
    return b"\x80\x02" + run + b"ctorch.jit\nload\n(" + text("x.pt") + b"tR.", "torch.jit.load"


def by_numpy(sentinel: Path) -> tuple[bytes, str]:
    run = b"cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR0"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text("b") + b"tR."
    return b"\x80\x02" + run + array, "numpy.core.multiarray._reconstruct"


def by_allowed_module(sentinel: Path) -> tuple[bytes, str]:
    return b"\x80\x02ctorch._utils\n_import_dotted_name\n(" + text(code(sentinel)) + b"tR.", "_import_dotted_name"


def before_a_break(sentinel: Path) -> tuple[bytes, str]:
    return b"\x80\x02cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR\xff\xff", "builtins.exec"


def after_a_decimal(sentinel: Path) -> tuple[bytes, str]:
    return b"I" + b"1" * 5000 + b"\n0cbuiltins\nexec\n(" + text(code(sentinel)) + b"tR.", "builtins.exec"


RUNS = [by_global, by_os_system, by_stack_global, by_stack_global_from_memo, by_inst, by_obj, by_newobj, by_copyreg]
RUNS += [by_reconstructor, by_setstate, by_getattr]
REFUSED = [*RUNS, by_dotted_name, by_torch_jit, by_numpy, by_allowed_module, before_a_break, after_a_decimal]


@pytest.mark.parametrize("route", RUNS)
def test_these_pickles_do_run_code_where_pickle_reads_them(tmp_path: Path, route: Route) -> None:
    """The control: what the next test refuses is not harmless by a mistake in the test."""
    data, _ = route(tmp_path / "sentinel")
    try:
        pickle.loads(data)
    finally:
        if route is by_copyreg:
            copyreg.remove_extension("builtins", "exec", 0xF0)
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("route", REFUSED)
def test_pickles_that_name_code_are_refused_by_name_and_nothing_runs(tmp_path: Path, route: Route) -> None:
    data, name = route(tmp_path / "sentinel")
    path = checkpoint_with(tmp_path / "evil.pth", data)
    with pytest.raises(UnsafeCheckpointError) as caught:
        open_checkpoint(path)
    assert name in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "sentinel").exists()


def test_all_offending_names_are_listed() -> None:
    data = b"\x80\x02(cos\nsystem\ncposix\nsystem\nccollections\nOrderedDict\n\x82\x05t."
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_pickle(data, "x")
    assert caught.value.seen == ["os.system", "posix.system", "copyreg extension 5"]


def test_code_beside_the_root_is_refused_too(tmp_path: Path) -> None:
    data = b"\x80\x02}(" + text("model") + b"}" + text("args") + b"cargparse\nNamespace\n)\x81u."
    with pytest.raises(UnsafeCheckpointError, match=r"argparse\.Namespace"):
        open_checkpoint(checkpoint_with(tmp_path / "train.pth", data), root="model")


ORDERED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    "data",
    [
        ORDERED + b")R}" + text("__class__") + b"Nsb.",
        ORDERED + b")RN}" + text("update") + b"Ns\x86b.",
        ORDERED + b"}" + text("_metadata") + b"Nsb.",
        b"ctorch\nFloatStorage\n}" + text("dtype") + b"Nsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__") + b"Ns\x86b.",
    ],
)
def test_attributes_are_set_on_nothing(data: bytes) -> None:
    with pytest.raises(UnsafeCheckpointError, match="BUILD"):
        read_pickle(b"\x80\x02" + data, "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02}}.",
        b"\x80\x02(}.",
        b"\x80\x02t.",
        b"\x80\x02\x85.",
        b"\x80\x02K\x01\x86.",
        b"\x80\x02R.",
        b"\x80\x02}u.",
        b"\x80\x02}NNs.",
        b"\x80\x02}(Nu.",
        b"\x80\x02}K\x01K\x02sK\x01K\x02s.",
        b"\x80\x02}G?\xf0\0\0\0\0\0\0Ns.",
        b"\x80\x02}\x88Ns.",
        b"\x80\x02N)R.",
        b"\x80\x02" + ORDERED + b"NR.",
        b"\x80\x02" + ORDERED + b"N\x85R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR.",
        b"\x80\x02h\x00.",
        b"\x80\x02q\x00.",
        b"\x80\x02NQ.",
        b"\x80\x02Na.",
        b"\x80\x02N.N",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02X\x01\0\0\0\xff.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02C\x01a.",
        b"\x80\x04\x8f.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 1_000_000 + b"\n.",
        b"\x80\x02c",
    ],
)
def test_malformed_pickles_are_named_errors(data: bytes) -> None:
    with bounded_memory(32 << 20), pytest.raises(CheckpointError):
        read_pickle(data, "x")


def test_a_persistent_id_in_text_is_refused() -> None:
    with pytest.raises(UnsafeCheckpointError, match="PERSID"):
        read_pickle(b"Psomething\n.", "x")


def test_a_memo_index_of_gigabytes_costs_nothing() -> None:
    assert read_pickle(b"\x80\x02}r\xff\xff\xff\x7f.", "x") == {}


def test_nesting_as_deep_as_the_limits_allow_does_not_overflow_the_stack() -> None:
    depth = 900_000
    with pytest.raises(CheckpointError, match="a dict key is a tuple"):
        read_pickle(b"\x80\x02})" + b"\x85" * depth + b"Ns.", "x")


def test_a_dict_inside_itself_is_no_state_dict(tmp_path: Path) -> None:
    path = checkpoint_with(tmp_path / "loop.pth", b"\x80\x02}q\x00" + text("model") + b"h\x00s.")
    for root in (None, "model"):
        with pytest.raises(CheckpointError, match="not a tensor"):
            open_checkpoint(path, root=root)


def test_sharing_that_doubles_at_every_step_is_not_unfolded(tmp_path: Path) -> None:
    doubled = b"]q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(99))
    data = b"\x80\x02}" + text("w") + doubled + b"s."
    with pytest.raises(CheckpointError, match="'w' is a tuple, not a tensor"):
        open_checkpoint(checkpoint_with(tmp_path / "laughs.pth", data))


def test_size_and_length_are_limited() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        read_pickle(bytes(MAX_PICKLE_BYTES + 1), "x")
    with pytest.raises(CheckpointError, match="too many operations"):
        read_pickle(b"N" * 1_100_000, "x")


FRAGMENTS = [
    *(
        b"\x80\x02",
        b"(",
        b")",
        b"}",
        b"]",
        b"t",
        b"R",
        b"b",
        b"Q",
        b"s",
        b"u",
        b"a",
        b"e",
        b".",
        b"N",
        b"\x88",
        b"\x85",
    ),
    *(b"K\x03", b"J\xff\xff\xff\xff", b"q\x00", b"h\x00", text("w"), text("storage"), text("_metadata")),
    *(ORDERED, b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=3)), max_size=30))
def test_any_bytes_give_plain_data_or_a_named_error(parts: list[bytes]) -> None:
    with contextlib.suppress(CheckpointError):
        read_pickle(b"".join(parts) + b".", "x")
