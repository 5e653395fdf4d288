"""Soft tokens by content, and how long a context fits into memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.kv_cache import KvElement, KvLayout, kv_layout
from biomedgpt_edge.device_cache import ArrayFolder
from biomedgpt_edge.embedding import HostEmbedder
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import MemoryLimitError, OptionError, PromptTooLongError
from biomedgpt_edge.manifest import RECORDS
from biomedgpt_edge.memory import LEAST_POSITIONS, context_within, parse_size
from biomedgpt_edge.soft_tokens import SoftTokenCache
from biomedgpt_edge.splice import FeaturePart, TokenPart, splice

ASPIRIN = Molecule.from_smiles("CC(=O)Oc1ccccc1C(=O)O")
PROTEIN = Protein.from_sequence("MKTAYIAKQR")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every input that an encoder reads."""
    from biomedgpt_edge.encoders import Encoders

    seen: list[object] = []
    original = Encoders.encode

    def recording(self: Encoders, item: Molecule | Protein) -> np.ndarray:
        seen.append(item)
        return original(self, item)

    monkeypatch.setattr(Encoders, "encode", recording)
    return seen


def rows(count: int, value: float = 0.0) -> np.ndarray:
    return np.full((count, 4), value, np.float32)


def loaded(**options: object) -> Engine:
    return Engine.load(threads=1, verify="sizes", **options)  # type: ignore[arg-type]


def test_an_input_that_comes_again_is_neither_encoded_nor_projected_and_gives_the_same_bits(
    cache: Path, encoded: list[object]
) -> None:
    with loaded() as engine:
        first = engine.prepare("Hello", ASPIRIN, PROTEIN, ASPIRIN)
        assert encoded == [ASPIRIN, PROTEIN]
        again = engine.prepare("Hello", ASPIRIN, PROTEIN, ASPIRIN)
        np.testing.assert_array_equal(first.embeddings, again.embeddings)
        assert again.timings.encode == 0
        parts = [
            TokenPart(s.ids) if not hasattr(s, "content") else FeaturePart(engine._encoders.encode(item), p)  # type: ignore[union-attr]
            for s, item, p in zip(
                first.segments,
                [None, ASPIRIN, None, PROTEIN, None, ASPIRIN, None],
                [None, *[engine.bundle.molecule_projection, None, engine.bundle.protein_projection, None] * 2],
                strict=False,
            )
        ][:5]
        whole = splice(parts, engine.bundle.embeddings, threads=1, allow_16bit=True)
        np.testing.assert_array_equal(first.embeddings[: len(whole)], whole)
    assert not (cache / "soft_tokens").exists(), "nothing of an input is written unless asked for"


def test_on_disk_they_outlive_the_process_in_a_private_folder(cache: Path, encoded: list[object]) -> None:
    with loaded(keep_soft_tokens=True) as engine:
        expected = engine.prepare("Hello", ASPIRIN).embeddings
    with loaded(keep_soft_tokens=True) as engine:
        np.testing.assert_array_equal(engine.prepare("Hello", ASPIRIN).embeddings, expected)
    assert len(encoded) == 1
    (path,) = (cache / "soft_tokens").iterdir()
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with loaded(keep_soft_tokens=True) as engine:
        np.testing.assert_array_equal(engine.prepare("Hello", ASPIRIN).embeddings, expected)
    assert len(encoded) == 2
    with loaded(keep_soft_tokens=True, allow_16bit=False) as other:
        other.prepare("Hello", ASPIRIN)
    assert len(encoded) == 3, "rounded otherwise, they are others"


def test_what_was_used_longest_ago_leaves_memory_first() -> None:
    table = Bundle.open(DEMO_BUNDLE).embeddings
    kept = SoftTokenCache(3 * 16 * 10, HostEmbedder(table, threads=1, allow_16bit=False))
    for name in "abc":
        kept.put(name, rows(10))
    kept.get("a", (10, 4))
    kept.put("d", rows(10))
    assert [name for name in "abcd" if kept.get(name, (10, 4)) is not None] == ["a", "c", "d"]
    kept.put("a", rows(20))
    assert [name for name in "acd" if kept.get(name, (10, 4)) is not None] == ["a", "d"]
    kept.put("huge", rows(1000))
    assert kept.get("huge", (1000, 4)) is None


def test_what_was_used_longest_ago_leaves_the_disk_first(cache: Path) -> None:
    import os

    folder = ArrayFolder("some", limit=2 * (160 + 32))
    for when, name in enumerate("ab"):
        folder.save(name, rows(10, when))
        os.utime(cache / "some" / name, ns=(when, when))
    found = folder.load("a", (10, 4))
    assert found is not None
    assert found[0, 0] == 0
    folder.save("c", rows(10, 2))
    assert sorted(path.name for path in (cache / "some").iterdir()) == ["a", "c"]
    folder.save("huge", rows(1000))
    assert sorted(path.name for path in (cache / "some").iterdir()) == ["a", "c"]
    assert folder.load("a", (5, 8)) is not None
    assert folder.load("a", (11, 4)) is None
    assert folder.counts.damaged == 1


def test_with_low_memory_encoders_are_open_while_they_read_and_no_longer(cache: Path) -> None:
    with loaded(low_memory=True) as low, loaded() as other:
        for engine in (low, other):
            engine.prepare("Hello", ASPIRIN, PROTEIN)
        assert (low._encoders._molecule, low._encoders._protein) == (None, None)
        assert None not in (other._encoders._molecule, other._encoders._protein)
        answers = [engine.ask("Hello", ASPIRIN, PROTEIN, max_new_tokens=4).token_ids for engine in (low, other)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("6G", 6 * 2**30), ("6gb", 6 * 10**9), ("1.5 GiB", 3 * 2**29), ("700MB", 7 * 10**8), (9, 9)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "6 apples", "GiB", True, "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="memory_limit is"):
        parse_size(text)


def within(bundle: Bundle, limit: int, *, low_memory: bool = False, kv: KvLayout | None = None) -> int:
    kv = KvLayout.rows(bundle.manifest.decoder) if kv is None else kv
    return context_within(bundle, limit, kv, low_memory=low_memory)


def needed(bundle: Bundle, *, low_memory: bool = False, kv: KvLayout | None = None) -> int:
    with pytest.raises(MemoryLimitError) as caught:
        within(bundle, 1, low_memory=low_memory, kv=kv)
    assert isinstance(caught.value.limit, int)
    return caught.value.limit


def test_the_context_is_what_the_memory_leaves() -> None:
    bundle = Bundle.open(DEMO_BUNDLE)
    spec, least = bundle.manifest.decoder, needed(bundle)
    assert within(bundle, least) == LEAST_POSITIONS
    assert within(bundle, 2**40) == spec.context
    per_position = 4 * 2 * spec.layers * spec.kv_heads * spec.head_size
    more = within(bundle, least + 1000 * per_position) - LEAST_POSITIONS
    assert 0 < more < 1000, "a position takes more than its keys and values"
    assert needed(bundle, low_memory=True) < least
    with pytest.raises(MemoryLimitError, match=r"Give at least .* MiB, which leaves 160 positions") as caught:
        within(bundle, least - 1)
    assert "low_memory" in caught.value.remedy


def test_an_engine_keeps_to_the_context_that_fits(cache: Path) -> None:
    bundle = Bundle.open(DEMO_BUNDLE)
    least = needed(bundle, kv=kv_layout(bundle.manifest.decoder, RECORDS, None))
    with loaded(memory_limit=least) as engine:
        chat = engine.chat()
        assert chat.ask("Hello", ASPIRIN, max_new_tokens=4).token_ids
        assert chat._conversation is not None
        assert chat._conversation._kept is not None
        with pytest.raises(PromptTooLongError, match="the memory limit leaves room for 160 together"):
            engine.ask("Hello", ASPIRIN, max_new_tokens=256)
        engine.ask("Hello", ASPIRIN, max_new_tokens=4)
        assert chat._conversation._kept is None, "a chat that waits gives its memory to who asks"


def like_the_7b() -> Bundle:
    bundle = Bundle.open(DEMO_BUNDLE)
    spec = dataclasses.replace(
        bundle.manifest.decoder,
        layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        heads=32,
        kv_heads=32,
        head_size=128,
    )
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, decoder=spec))


def test_a_decoder_like_the_7b_takes_a_mebibyte_per_position() -> None:
    large = like_the_7b()
    more = within(large, needed(large) + 100 * 2**20) - LEAST_POSITIONS
    assert 90 <= more < 100


@pytest.mark.parametrize(("element", "least"), [("fp32", 96), ("fp16", 190), ("int8", 360)])
def test_a_cache_of_fewer_bytes_leaves_room_for_more(element: KvElement, least: int) -> None:
    large = like_the_7b()
    kv = KvLayout.blocks(large.manifest.decoder, element)
    more = within(large, needed(large, kv=kv) + 100 * 2**20, kv=kv) - LEAST_POSITIONS
    assert least <= more < least * 1.1
