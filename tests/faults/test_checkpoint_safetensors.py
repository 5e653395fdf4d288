"""safetensors files and sharded checkpoints: complete ones are read, everything else is a named error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from biomedgpt_edge.errors import ClosedError
from biomedgpt_export.checkpoint import open_checkpoint
from biomedgpt_export.errors import CheckpointError, KeyMismatchError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(4.0), "b": torch.ones(2, 2)},
    "model-00002-of-00002.safetensors": {"c": torch.zeros(3, dtype=torch.int64)},
}


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def write_sharded(folder: Path) -> Path:
    for name, tensors in SHARDS.items():
        save_file(tensors, folder / name)
    return write_index(folder, {key: name for name, tensors in SHARDS.items() for key in tensors})


# --- one file ---------------------------------------------------------------------------------------------------------


def test_all_types_and_shapes_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = {f"{dtype}".removeprefix("torch."): (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in DTYPES}
    expected |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}
    save_file(expected, path)
    for target in (path, tmp_path):
        with open_checkpoint(target) as checkpoint:
            assert sorted(checkpoint.keys()) == sorted(expected)
            assert checkpoint.files == [path]
            for key, tensor in expected.items():
                assert checkpoint.shape(key) == tuple(tensor.shape)
                assert f"torch.{checkpoint.dtype(key)}" == str(tensor.dtype)
                assert torch.equal(checkpoint.tensor(key), tensor)


def test_a_header_of_any_length_is_no_other_format(tmp_path: Path) -> None:
    """The length is the first thing in the file: 128 is the byte that a pickle begins with."""
    path = tmp_path / "w.safetensors"
    first_bytes = set()
    for length in range(0, 256, 8):
        save_file({"w": torch.ones(2)}, path, metadata={"note": "x" * length})
        first_bytes.add(path.read_bytes()[0])
        with open_checkpoint(path) as checkpoint:
            assert torch.equal(checkpoint.tensor("w"), torch.ones(2))
    assert 128 in first_bytes


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"\x80\x02}q\x00X\x01\x00\x00\x00", "a bare pickle"),
        (b"GGUF\x03\0\0\0{\0\0\0", "a GGUF file"),
        (b"<html><body>", "an HTML page"),
        (b"\x1f\x8b\x08\0\0\0\0\0\x02\xff", "a gzip archive"),
    ],
)
def test_another_format_is_named(tmp_path: Path, head: bytes, named: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(head + bytes(100))
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(path)


def test_closed_and_unknown(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        kept = checkpoint.tensor("w")
        with pytest.raises(KeyMismatchError, match="no tensor named 'v'"):
            checkpoint.tensor("v")
    assert kept.item() == 1
    with pytest.raises(ClosedError):
        checkpoint.tensor("w")


def test_a_file_cut_anywhere_is_an_error_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"w\.safetensors"):
            open_checkpoint(path)


def test_a_flipped_bit_in_the_header_is_an_error_or_another_file_of_the_same_bytes(tmp_path: Path) -> None:
    """The format has no checksum: a changed name or type may go through, a wrong size may not."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2)}, path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(header):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            with open_checkpoint(path) as checkpoint:
                tensors = [checkpoint.tensor(key) for key in checkpoint.keys()]
        except CheckpointError:
            continue
        assert sum(tensor.nbytes for tensor in tensors) == len(data) - header


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,15]}}',
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
        b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}',
        b'{"w":{"dtype":"PICKLE","shape":[4],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F8_E4M3","shape":[16],"data_offsets":[0,16]}}',
        b"[" * 100_000,
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40])
def test_a_declared_header_of_terabytes_is_not_allocated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(path)


def test_a_root_makes_no_sense_here(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="no root 'model'"):
        open_checkpoint(tmp_path / "w.safetensors", root="model")


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_read_as_one_checkpoint_from_folder_or_index(tmp_path: Path) -> None:
    index = write_sharded(tmp_path)
    for target in (tmp_path, index):
        with open_checkpoint(target) as checkpoint:
            assert checkpoint.keys() == ["a", "b", "c"]
            assert checkpoint.files == [index, *(tmp_path / name for name in SHARDS)]
            assert checkpoint.shape("b") == (2, 2)
            assert checkpoint.dtype("c") == "int64"
            assert torch.equal(checkpoint.tensor("a"), torch.arange(4.0))
            with pytest.raises(KeyMismatchError):
                checkpoint.tensor("d")
        with pytest.raises(ClosedError):
            checkpoint.tensor("a")


def test_shards_of_torch_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(tmp_path, shards, "pytorch_model.bin.index.json")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensor("a").tolist() == [1, 1]


def test_a_folder_with_several_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).keys() == ["old"]
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).keys() == ["new"]


def test_all_disagreements_between_index_and_shards_are_listed(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    first, second = SHARDS
    index = write_index(tmp_path, {"a": first, "b": second, "ghost": second})
    with pytest.raises(KeyMismatchError) as caught:
        open_checkpoint(index)
    assert caught.value.problems == [
        f"b is not in {second}, where the index puts it",
        f"ghost is not in {second}, where the index puts it",
        f"b in {first} is not in the index",
        f"c in {second} is not in the index",
    ]


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    index = write_sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_checkpoint(index)
    shard.unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    "name",
    [
        *("../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\model.safetensors"),
        *("C:model.safetensors", "model\0.safetensors", "", "..", ".", "model.safetensors/", "model.txt"),
        "model.safetensors.index.json",
    ],
)
def test_shard_names_are_plain_file_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint(write_index(folder, {"w": name}))


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "private.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "shard.safetensors").symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        open_checkpoint(write_index(folder, {"w": "shard.safetensors"}))
    (folder / "model.safetensors").symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        open_checkpoint(folder)


def test_links_inside_the_folder_and_those_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(1)}, blobs / "0123")
    (snapshot / "shard.safetensors").symlink_to("../../blobs/0123")
    assert open_checkpoint(write_index(snapshot, {"w": "shard.safetensors"})).keys() == ["w"]
    (snapshot / "alias.safetensors").symlink_to("shard.safetensors")
    assert open_checkpoint(write_index(snapshot, {"w": "alias.safetensors"})).keys() == ["w"]


def test_a_link_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(CheckpointError):
        open_checkpoint(write_index(tmp_path, {"w": "loop.safetensors"}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": {"w": 1}}',
        b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}',
        b"\xff\xfe",
        b"[" * 200_000,
    ],
)
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(path)
