"""What was quantized stays quantized: units on disk, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_export.errors import JournalError
from biomedgpt_export.quantize.int4 import Int4Weight
from biomedgpt_export.quantize.journal import Journal, Unit
from biomedgpt_export.quantize.rtn import RoundToNearest

PLAN = {"seed": 1, "parts": ["a", "b"]}


def unit(seed: int = 0) -> Unit:
    generator = torch.Generator().manual_seed(seed)
    return Unit(
        {
            name: RoundToNearest().quantize(name, torch.randn(5, columns, generator=generator))
            for name, columns in (("layers.0.qkv_proj", 64), ("layers.0.o_proj", 40))
        },
        {"loss": 0.25},
    )


def same(one: Int4Weight, other: Int4Weight) -> bool:
    return (
        torch.equal(one.packed, other.packed)
        and torch.equal(one.scales, other.scales)
        and (one.columns, one.group_size) == (other.columns, other.group_size)
    )


def test_units_come_back_as_they_were(tmp_path: Path) -> None:
    journal, made = Journal(tmp_path / "work", PLAN), unit()
    assert journal.units() == []
    assert journal.read("decoder.layers.0") is None
    journal.write("decoder.layers.0", made)
    again = Journal(tmp_path / "work", dict(reversed(PLAN.items())))
    found = again.read("decoder.layers.0")
    assert found is not None
    assert found.notes == {"loss": 0.25}
    assert found.matrices.keys() == made.matrices.keys()
    assert all(same(found.matrices[name], matrix) for name, matrix in made.matrices.items())
    assert again.units() == ["decoder.layers.0"]


def test_the_same_unit_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        Journal(tmp_path / name, PLAN).write("x", unit())
    files = [(tmp_path / name / "x.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]


def test_every_damage_means_that_the_unit_is_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, PLAN)
    journal.write("x", unit())
    path = tmp_path / "x.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert journal.read("x") is None, length
    for position in range(0, len(whole), 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert journal.read("x") is None, position
    path.write_bytes(whole + b"x")
    assert journal.read("x") is None
    journal.write("x", unit())
    assert journal.read("x") is not None


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes of a file replaced by other ones, which may be none, or more."""
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 64)))
    return whole[:start] + data.draw(st.binary(max_size=64)) + whole[stop:]


@settings(max_examples=200)
@given(data=st.data())
def test_a_unit_with_random_damage_is_done_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    journal, made = Journal(tmp_path_factory.mktemp("work"), PLAN), unit()
    journal.write("x", made)
    path = journal.folder / "x.safetensors"
    content = damaged(data, path.read_bytes())
    path.write_bytes(content)
    found = journal.read("x")
    # Nothing but what was written is ever taken up; bytes without a meaning may differ.
    assert found is None or all(same(found.matrices[name], matrix) for name, matrix in made.matrices.items())


@settings(max_examples=100)
@given(data=st.data())
def test_a_plan_with_random_damage_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("work")
    Journal(folder, PLAN)
    path = folder / "plan.json"
    path.write_bytes(damaged(data, path.read_bytes()))
    try:
        same_plan = json.loads(path.read_bytes()) == PLAN
    except ValueError:
        same_plan = False
    if same_plan:
        Journal(folder, PLAN)
    else:
        with pytest.raises(JournalError):
            Journal(folder, PLAN)


def test_work_is_not_continued_with_another_plan(tmp_path: Path) -> None:
    Journal(tmp_path, PLAN)
    with pytest.raises(JournalError, match="begun with another parts, seed") as caught:
        Journal(tmp_path, {"seed": 2})
    assert caught.value.seen == {"parts": ["a", "b"], "seed": 1}
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(JournalError, match="cannot be read"):
        Journal(tmp_path, PLAN)
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(JournalError, match="another"):
        Journal(tmp_path, PLAN)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, PLAN)
    journal.write("x", unit())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.write("x", unit(1))
    with pytest.raises(OSError, match="No space left"):
        journal.write("y", unit(1))
    monkeypatch.undo()
    found = journal.read("x")
    assert found is not None
    assert same(found.matrices["layers.0.o_proj"], unit().matrices["layers.0.o_proj"])
    assert journal.units() == ["x"]


def test_removing_it_removes_everything(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work", PLAN)
    journal.write("x", unit())
    journal.remove()
    assert list(tmp_path.iterdir()) == []
