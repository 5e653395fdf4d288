"""The tokenizer: text stays text, and streamed pieces join to the whole without ever splitting a character."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from biomedgpt_edge.errors import BundleCorruptError
from biomedgpt_edge.tokenizer import Tokenizer
from biomedgpt_export.synthesize import train_tokenizer

PIECES = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(PIECES))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def without_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that has no byte pieces, so that characters it does not know become <unk>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the molecule is an acid", "the protein binds zinc"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [tokenizer._model.PieceToId(f"<0x{value:02X}>") for value in data]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_the_number_of_pieces_and_the_control_ids_are_those_of_the_file(tokenizer: Tokenizer) -> None:
    assert (len(tokenizer), tokenizer.bos_id, tokenizer.eos_id) == (PIECES, 1, 2)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("a\x00b")
@example("\x00")
@example("  two  spaces ")
def test_a_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    # The word mark stands for a space, also where a text holds it itself.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "<0x0A>", "[PAD]", "a</s>b<s>", "<pad>"])
def test_names_of_special_tokens_are_encoded_as_their_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert min(ids) > tokenizer.eos_id
    assert not any(tokenizer._model.IsByte(token) for token in ids)
    assert tokenizer.decode(ids) == text


def test_every_piece_gets_the_word_mark_and_neither_bos_nor_eos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("</molecule>")
    assert tokenizer._model.IdToPiece(ids[0]).startswith("\u2581")
    assert tokenizer.encode("") == []
    assert tokenizer._model.IdToPiece(tokenizer.encode("it ")[-1]) == "\u2581"


class TestStream:
    @given(st.lists(st.one_of(st.integers(0, PIECES - 1), st.integers(3, 258), st.integers(0, 2)), max_size=24))
    def test_pieces_join_to_the_whole_text_and_end_between_characters(
        self, tokenizer: Tokenizer, ids: list[int]
    ) -> None:
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        for piece in pieces:
            piece.encode("utf-8")

    @given(st.lists(st.integers(0, 39), max_size=24))
    def test_the_same_holds_without_byte_pieces(self, without_bytes: Tokenizer, ids: list[int]) -> None:
        assert "".join(streamed(without_bytes, ids)) == without_bytes.decode(ids)

    @given(st.binary(max_size=12))
    @example(b"\xf0\x9f\x98\x80")
    @example(b"\xed\xa0\x80")
    @example(b"\xf4\x90\x80\x80")
    @example(b"\xc0\x80\xe0\x80\x80")
    @example(b"\xf8\x88\x80\x80\x80")
    @example(b"\xe2\x82\xe2\x82\xac")
    def test_any_bytes_join_to_what_sentencepiece_makes_of_them(self, tokenizer: Tokenizer, data: bytes) -> None:
        ids = byte_ids(tokenizer, data)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)

    @given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=5))
    def test_a_character_made_of_bytes_comes_with_its_last_byte(self, tokenizer: Tokenizer, text: str) -> None:
        stream = tokenizer.stream()
        for character in text:
            *start, last = byte_ids(tokenizer, character.encode())
            assert [stream.push(token) for token in start] == [""] * len(start)
            assert stream.push(last) == character
        assert stream.flush() == ""

    def test_an_unfinished_character_ends_as_one_mark_per_byte(self, tokenizer: Tokenizer) -> None:
        stream = tokenizer.stream()
        assert [stream.push(token) for token in byte_ids(tokenizer, "😀".encode()[:3])] == ["", "", ""]
        assert stream.flush() == "\ufffd" * 3
        assert stream.flush() == ""

    def test_a_piece_after_an_unfinished_character_brings_it_out_first(self, tokenizer: Tokenizer) -> None:
        stream = tokenizer.stream()
        stream.push(byte_ids(tokenizer, b"\xe2")[0])
        assert stream.push(tokenizer._model.PieceToId("a")) == "\ufffda"

    def test_only_the_very_first_word_mark_is_taken_away(self, tokenizer: Tokenizer) -> None:
        space = tokenizer._model.PieceToId("\u2581")
        assert streamed(tokenizer, [tokenizer.bos_id, space, space, space]) == ["", "", " ", " ", ""]

    def test_streams_do_not_share_anything(self, tokenizer: Tokenizer) -> None:
        first, second = tokenizer.stream(), tokenizer.stream()
        first.push(byte_ids(tokenizer, b"\xe2")[0])
        assert second.flush() == ""


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_file_that_is_no_model_is_a_named_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(BundleCorruptError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(path)


def test_a_missing_file_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf"])
def test_a_tokenizer_that_rewrites_text_is_refused_since_it_could_make_a_separator(tmp_path: Path, rule: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the molecule is an acid", "the protein binds zinc"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        remove_extra_whitespaces=False,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(BundleCorruptError, match="normalizes text"):
        Tokenizer(path)
