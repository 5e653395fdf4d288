"""``.pth`` files: what torch.save writes is read as torch.load reads it; a damaged archive is a named error."""

from __future__ import annotations

import itertools
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biomedgpt_edge.errors import ClosedError
from biomedgpt_export.checkpoint import open_checkpoint
from biomedgpt_export.checkpoint.torch_archive import MAX_DIRECTORY_BYTES
from biomedgpt_export.checkpoint.torch_file import MAX_REPEATED_ELEMENTS
from biomedgpt_export.errors import CheckpointError, KeyMismatchError, UnsafeCheckpointError
from support import bounded_memory

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def write_archive(path: Path, members: dict[str, bytes], **info: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content, **info)
    return path


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def one_tensor(
    *,
    storage: str = "FloatStorage",
    elements: int = 4,
    offset: int = 0,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    member: str = "0",
) -> bytes:
    """The pickle of {"w": tensor}, with whatever numbers a hostile writer likes."""
    reference = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(member) + text("cpu")
    reference += integer(elements) + b"tQ"
    view = integer(offset) + integers(size) + integers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + view + b"tRs."


def assert_same_as_torch(path: Path) -> None:
    expected = torch.load(path, weights_only=True)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.keys() == list(expected)
        for key, tensor in expected.items():
            read = checkpoint.tensor(key)
            assert checkpoint.shape(key) == tuple(tensor.shape) == tuple(read.shape)
            assert f"torch.{checkpoint.dtype(key)}" == str(tensor.dtype) == str(read.dtype)
            assert read.stride() == tensor.stride()
            assert read.storage_offset() == tensor.storage_offset()
            assert torch.equal(read, tensor)


# --- files that are as they should be -------------------------------------------------------------------------------


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for index in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        values = torch.arange(torch.Size(shape).numel()).reshape(shape) % 100
        tensor = values.to(draw(st.sampled_from(DTYPES)))
        state[f"t{index}"] = tensor
        for view in range(draw(st.integers(0, 2))):
            state[f"t{index}.view{view}"] = draw(views(tensor))
    return state


@st.composite
def views(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    kind = draw(st.sampled_from(["same", "transposed", "strided", "tail", "expanded"]))
    if kind == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    if tensor.dim() == 0 or kind == "same":
        return tensor
    if kind == "transposed":
        return tensor.transpose(0, -1)
    return tensor[::2] if kind == "strided" else tensor[1:]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts())
def test_any_state_dict_is_read_as_torch_reads_it(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    assert_same_as_torch(saved(tmp_path / "state.pth", state))


def test_the_state_dict_of_a_module_with_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_same_as_torch(saved(tmp_path / "module.pth", module.state_dict()))


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "p.pt", OrderedDict(w=torch.nn.Parameter(torch.ones(2))))
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.tensor("w").requires_grad
        assert torch.equal(checkpoint.tensor("w"), torch.ones(2))


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    with open_checkpoint(saved(tmp_path / "tied.pth", {"a": weight, "b": weight})) as checkpoint:
        assert checkpoint.tensor("a").data_ptr() == checkpoint.tensor("b").data_ptr()


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.zeros(4)})
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        checkpoint.tensor("w").add_(1)
    assert path.read_bytes() == before


def test_tensors_outlive_the_checkpoint_but_no_new_ones_come(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "w.pth", {"w": torch.arange(4)}))
    tensor = checkpoint.tensor("w")
    checkpoint.close()
    checkpoint.close()
    assert tensor.tolist() == [0, 1, 2, 3]
    with pytest.raises(ClosedError):
        checkpoint.tensor("w")


def test_files_are_what_a_provenance_hash_needs(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.ones(1)})
    assert open_checkpoint(path).files == [path]


def test_an_unknown_name_is_an_error_with_that_name(tmp_path: Path) -> None:
    with (
        open_checkpoint(saved(tmp_path / "w.pth", {"w": torch.ones(1)})) as checkpoint,
        pytest.raises(KeyMismatchError, match=r"no tensor named 'lm_head\.weight'"),
    ):
        checkpoint.tensor("lm_head.weight")


def test_archives_without_crc_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "w.pth", {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_as_torch(path)


def test_repacked_archives_without_alignment_are_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype="<f4")
    for padding in range(4):
        members = {"data.pkl": one_tensor(), "version": b"3" + b"\n" * padding, "data/0": values.tobytes()}
        with open_checkpoint(write_archive(tmp_path / f"{padding}.pth", members)) as checkpoint:
            assert checkpoint.tensor("w").tolist() == values.tolist()


# --- where the tensors are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["model", "state_dict"])
def test_a_nested_state_dict_is_found_by_its_root_whatever_lies_beside_it(tmp_path: Path, root: str) -> None:
    state = OrderedDict(w=torch.ones(2))
    optimizer = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    path = saved(tmp_path / "train.pth", {root: state, "epoch": 3, "big": 2**40, "optimizer": optimizer, "best": None})
    with open_checkpoint(path, root=root) as checkpoint:
        assert checkpoint.keys() == ["w"]


def test_without_its_root_a_nested_state_dict_is_refused_and_the_root_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "train.pth", {"epoch": 3, "model": {"w": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"'epoch' is a int.*seem to lie under 'model'"):
        open_checkpoint(path)


def test_a_missing_root_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "train.pth", {"net": {"w": torch.ones(2)}, "epoch": 1})
    with pytest.raises(CheckpointError, match="no entry 'model': it has 'net', 'epoch'"):
        open_checkpoint(path, root="model")


@pytest.mark.parametrize("extra", [3, "text", None, [torch.ones(1)], {"w": 1}])
def test_nothing_but_tensors_may_lie_in_the_state_dict(tmp_path: Path, extra: object) -> None:
    path = saved(tmp_path / "mixed.pth", {"w": torch.ones(1), "extra": extra})
    with pytest.raises(CheckpointError, match=r"'extra' is a .*, not a tensor"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], 5])
def test_what_is_no_dict_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match="no state dict"):
        open_checkpoint(saved(tmp_path / "odd.pth", content))


# --- files of other kinds -------------------------------------------------------------------------------------------


def foreign_files() -> dict[str, tuple[bytes, str]]:
    return {
        "text": (b"hello, this is not a checkpoint", "does not start like a zip file"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        "html": (b"<!DOCTYPE html><html></html>", "HTML page"),
        "npy": (b"\x93NUMPY\x01\x00", "NumPy array"),
        "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
        "pickle": (b"\x80\x04}.", "bare pickle"),
        "empty": (b"", "is empty"),
        "end_record_only": (b"PK\x05\x06" + bytes(18), "does not start like a zip file"),
    }


@pytest.mark.parametrize("kind", foreign_files())
def test_foreign_files_are_named(tmp_path: Path, kind: str) -> None:
    content, message = foreign_files()[kind]
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_the_format_before_torch_1_6_is_named_with_a_way_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6.*Convert it"):
        open_checkpoint(path)


def test_numpy_archives_and_torchscript_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", w=np.ones(2))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pth")
    with pytest.raises(CheckpointError, match="NumPy archive"):
        open_checkpoint(tmp_path / "arrays.pth")
    script = write_archive(
        tmp_path / "script.pt", {"data.pkl": b"\x80\x02N.", "constants.pkl": b"\x80\x02).", "code/a": b""}
    )
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(script)


def test_a_zip_around_the_checkpoint_is_not_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "outer.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("biomedgpt_10b.pth", b"x")
    with pytest.raises(CheckpointError, match=r"not one written by torch\.save"):
        open_checkpoint(path)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Cannot read"):
        open_checkpoint(tmp_path / "missing.pth")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="by its name"):
        open_checkpoint(tmp_path / "weights.h5")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs on this system")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe.pth")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "s.pth"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}, path)
    return path.read_bytes()


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, small_archive: bytes) -> None:
    path = tmp_path / "cut.pth"
    for length in range(len(small_archive)):
        path.write_bytes(small_archive[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, small_archive: bytes) -> None:
    path = tmp_path / "flipped.pth"
    path.write_bytes(small_archive)
    expected = torch.load(path, weights_only=True)
    refused = 0
    for position in range(len(small_archive)):
        damaged = bytearray(small_archive)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            with open_checkpoint(path) as checkpoint:
                read = {key: checkpoint.tensor(key) for key in checkpoint.keys()}
        except CheckpointError:
            refused += 1
            continue
        assert list(read) == list(expected)
        assert all(torch.equal(read[key], expected[key]) for key in expected)
    assert refused > 500


def test_bytes_missing_in_the_middle_are_noticed(tmp_path: Path, small_archive: bytes) -> None:
    path = tmp_path / "hole.pth"
    for start in range(0, len(small_archive) - 64, 37):
        path.write_bytes(small_archive[:start] + small_archive[start + 64 :])
        with pytest.raises(CheckpointError):  # noqa: PT012 - where it is noticed depends on the place
            checkpoint = open_checkpoint(path)
            for key in checkpoint.keys():
                checkpoint.tensor(key)


def test_damaged_values_are_noticed_when_they_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.full((64,), 1.5)})
    data = path.read_bytes()
    path.write_bytes(data.replace(torch.tensor([1.5] * 64).numpy().tobytes(), b"\x01" * 256))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="data/0 is damaged"):
        checkpoint.tensor("w")


# --- archives that lie ------------------------------------------------------------------------------------------------

GOOD = {"data.pkl": one_tensor(), "version": b"3\n", "byteorder": b"little", "data/0": bytes(16)}


def test_the_handmade_archive_of_these_tests_is_readable(tmp_path: Path) -> None:
    assert open_checkpoint(write_archive(tmp_path / "good.pth", GOOD)).keys() == ["w"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"byteorder": b"big"}, "little-endian"),
        ({"version": b"99\n"}, "unknown archive version"),
        ({"version": b"-1\n"}, "unknown archive version"),
        ({"version": b"9" * 65}, "version is too large"),
        ({"data/0": bytes(15)}, "holds 4 elements of float32, the archive says 15 bytes"),
        ({"data/0": bytes(20)}, "holds 4 elements"),
        ({"../evil": b""}, "unsafe name"),
        ({"a/../../evil": b""}, "unsafe name"),
        ({"a\\b": b""}, "unsafe name"),
    ],
)
def test_contradictions_in_the_archive_are_refused(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_archive(tmp_path / "bad.pth", GOOD | change))


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    members = {name: content for name, content in GOOD.items() if name != "data/0"}
    with pytest.raises(CheckpointError, match=r"data of 'w' \(data/0\) is missing"):
        open_checkpoint(write_archive(tmp_path / "bad.pth", members))


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_checkpoint(write_archive(tmp_path / "bad.pth", GOOD, compress_type=zipfile.ZIP_DEFLATED))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", b"\x01" * 16)
    with pytest.raises(CheckpointError, match="two members"):
        open_checkpoint(path)


def test_members_outside_the_folder_are_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("elsewhere/data/0", b"")
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(path)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD | {"data/1": bytes(16)})
    data = bytearray(path.read_bytes())
    # In the directory, a name follows 46 bytes of which 20 to 28 are the two sizes.
    entry = data.rindex(b"archive/data/0") - 46
    data[entry + 20 : entry + 28] = 2 * (80).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="overlaps"):
        open_checkpoint(path)


def test_a_directory_of_declared_gigabytes_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    size = 1 << 31
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(size + 4)
        file.write(b"PK\x05\x06" + bytes(4) + b"\x01\0\x01\0" + size.to_bytes(4, "little") + (4).to_bytes(4, "little"))
        file.write(bytes(2))
    with bounded_memory(48 << 20), pytest.raises(CheckpointError, match="zip directory is too large") as caught:
        open_checkpoint(path)
    assert caught.value.limit == MAX_DIRECTORY_BYTES


def test_a_pickle_of_declared_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, archive.open("archive/data.pkl", "w") as member:
        for _ in range(17):
            member.write(bytes(1 << 20))
    with bounded_memory(48 << 20), pytest.raises(CheckpointError, match=r"data\.pkl is too large"):
        open_checkpoint(path)


# --- tensors that lie -------------------------------------------------------------------------------------------------

HUGE = 2**63


@pytest.mark.parametrize(
    "view",
    [
        {"size": (5,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": HUGE},
        {"size": (-1,)},
        {"size": (2,), "stride": (-1,)},
        {"size": (2,), "stride": (4,)},
        {"size": (HUGE,), "stride": (0,)},
        {"size": (2**32, 2**32), "stride": (0, 0)},
        {"size": (2**32, 2**32, 0), "stride": (0, 0, 0)},
        {"size": (2,), "stride": (2**64 + 1,)},
        {"size": (1,), "stride": (HUGE,)},
        {"size": (1 << 1000,), "stride": (1,)},
        {"size": (4,), "stride": (1, 1)},
        {"size": (4,), "stride": ()},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"size": (MAX_REPEATED_ELEMENTS + 1,), "stride": (0,)},
        {"offset": HUGE, "size": (0,)},
    ],
)
def test_views_that_leave_their_storage_are_refused(tmp_path: Path, view: dict[str, Any]) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD | {"data.pkl": one_tensor(**view)})
    with bounded_memory(48 << 20), pytest.raises(CheckpointError, match="does not fit its storage"):
        open_checkpoint(path)


@pytest.mark.parametrize("elements", [-4, 0, 3, 5, 2**62, 2**64 + 4, 1 << 1000])
def test_storages_of_another_size_than_their_member_are_refused(tmp_path: Path, elements: int) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD | {"data.pkl": one_tensor(elements=elements)})
    with bounded_memory(48 << 20), pytest.raises(CheckpointError, match="elements"):
        open_checkpoint(path)


@pytest.mark.parametrize("member", ["../0", "", "0/../0", "\N{DIGIT ZERO}\N{ARABIC-INDIC DIGIT ONE}", "9" * 10])
def test_storage_keys_are_numbers(tmp_path: Path, member: str) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD | {"data.pkl": one_tensor(member=member)})
    with pytest.raises(CheckpointError, match="does not describe a storage"):
        open_checkpoint(path)


def test_storage_types_that_are_no_plain_numbers_are_refused_by_name(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "bad.pth", GOOD | {"data.pkl": one_tensor(storage="QUInt8Storage")})
    with pytest.raises(UnsafeCheckpointError, match=r"torch\.QUInt8Storage"):
        open_checkpoint(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offset=st.integers(-2, 6),
    axes=st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 5)), max_size=3),
)
def test_exactly_the_views_inside_the_storage_are_read(
    tmp_path: Path, offset: int, axes: list[tuple[int, int]]
) -> None:
    size, stride = tuple(a for a, _ in axes), tuple(b for _, b in axes)
    path = write_archive(
        tmp_path / "view.pth",
        {
            "data.pkl": one_tensor(offset=offset, size=size, stride=stride),
            "data/0": np.arange(4, dtype="<f4").tobytes(),
        },
    )
    touched = [
        offset + sum(i * s for i, s in zip(index, stride, strict=True))
        for index in itertools.product(*(range(n) for n in size))
    ]
    allowed = min((offset, *size, *stride)) >= 0 and all(0 <= element < 4 for element in touched)
    if not allowed:
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    else:
        assert open_checkpoint(path).tensor("w").flatten().tolist() == [float(element) for element in touched]
