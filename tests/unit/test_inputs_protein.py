"""Proteins: what a sequence may hold, how it is cut, and which record of a FASTA file is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge.errors import InputFileError, ProteinError
from biomedgpt_edge.inputs import Protein
from biomedgpt_edge.protein_tokens import ALLOWED_RESIDUES, MAX_RESIDUES


def fasta(folder: Path, content: str | bytes) -> Path:
    path = folder / "proteins.fasta"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestFromSequence:
    @pytest.mark.parametrize("text", ["MKT", "mkt", " M k\tT\r\n", "M\u00a0KT", "\n".join("MKT")])
    def test_case_and_white_space_do_not_matter(self, text: str) -> None:
        protein = Protein.from_sequence(text)
        assert (protein.sequence, protein.notes, protein.n_soft_tokens) == ("MKT", (), 5)
        assert protein == Protein.from_sequence("MKT")

    def test_the_residues_decide_about_the_digest(self) -> None:
        assert Protein.from_sequence("mkt", name="a").digest == Protein.from_sequence("MKT").digest
        assert Protein.from_sequence("MKT").digest != Protein.from_sequence("MKTT").digest

    @given(st.text(sorted(ALLOWED_RESIDUES), min_size=1, max_size=30))
    def test_every_allowed_letter_is_kept(self, sequence: str) -> None:
        assert Protein.from_sequence(sequence.lower()).sequence == sequence

    def test_one_stop_at_the_end_is_dropped_with_a_note(self) -> None:
        protein = Protein.from_sequence("MKT*\n")
        assert protein.sequence == "MKT"
        assert protein.notes == ("the stop mark '*' at the end of the sequence was dropped",)

    @pytest.mark.parametrize(("text", "place"), [("MK*T", 3), ("MKT**", 4), ("*MKT", 1)])
    def test_any_other_stop_is_refused_with_its_position(self, text: str, place: int) -> None:
        with pytest.raises(ProteinError, match=rf"'\*' at {place}"):
            Protein.from_sequence(text)

    @pytest.mark.parametrize("text", ["", "  \n", "*"])
    def test_an_empty_sequence_is_refused(self, text: str) -> None:
        with pytest.raises(ProteinError, match="the protein sequence is empty"):
            Protein.from_sequence(text)

    @pytest.mark.parametrize("letter", ["J", "1", "-", ".", "<", "É", "ß", "ı", "ſ", "Ａ", "\u200b", "\x00", "\ud800"])
    def test_another_letter_is_refused_with_its_position(self, letter: str) -> None:
        with pytest.raises(ProteinError) as caught:
            Protein.from_sequence(f"MKT{letter}MKT{letter}")
        assert f"{letter!r} at 4, 8" in str(caught.value)
        assert "holds 2 letters" in str(caught.value)
        assert "20 amino acids and X, B, U, Z, O" in caught.value.remedy

    def test_many_wrong_letters_are_shortened(self) -> None:
        wrong = "".join(chr(0x4E00 + n) for n in range(5000)) + "1" * 50
        with pytest.raises(ProteinError, match="holds 5050 letters") as caught:
            Protein.from_sequence(wrong)
        assert len(str(caught.value)) < 500
        assert len(json.dumps(caught.value.as_dict())) < 1500

    def test_a_fasta_text_is_refused_at_its_mark(self) -> None:
        with pytest.raises(ProteinError, match="'>' at 1"):
            Protein.from_sequence(">sp|P1\nMKT")

    @pytest.mark.parametrize("value", [None, b"MKT", ["M"]])
    def test_something_else_than_text_is_refused(self, value: object) -> None:
        with pytest.raises(ProteinError, match=f"expected a sequence, got {type(value).__name__}"):
            Protein.from_sequence(value)  # type: ignore[arg-type]

    @pytest.mark.parametrize("length", [1021, 1022])
    @pytest.mark.parametrize("truncate", [True, False])
    def test_up_to_1022_residues_are_read_whole(self, length: int, truncate: bool) -> None:
        protein = Protein.from_sequence("M" * length, truncate=truncate)
        assert (len(protein.sequence), protein.notes) == (length, ())
        assert protein.n_soft_tokens == length + 2

    def test_1023_residues_are_refused(self) -> None:
        with pytest.raises(ProteinError, match=r"has 1,023 residues.*at most 1,022.*truncate=True") as caught:
            Protein.from_sequence("M" * 1023)
        assert (caught.value.seen, caught.value.limit) == (1023, MAX_RESIDUES)

    def test_1023_residues_are_cut_on_request_with_a_note(self) -> None:
        protein = Protein.from_sequence("M" * 1022 + "W", truncate=True)
        assert protein.sequence == "M" * 1022
        assert protein.notes == ("the protein was cut: the first 1,022 of its 1,023 residues were used",)

    def test_the_stop_does_not_count_as_a_residue(self) -> None:
        assert len(Protein.from_sequence("M" * 1022 + "*").sequence) == 1022
        protein = Protein.from_sequence("M" * 1023 + "*", truncate=True)
        assert [note.split(":")[0] for note in protein.notes][1] == "the protein was cut"

    def test_a_wrong_letter_behind_the_cut_is_refused_all_the_same(self) -> None:
        with pytest.raises(ProteinError, match="'J' at 1024"):
            Protein.from_sequence("M" * 1023 + "J", truncate=True)


class TestFromFasta:
    def test_one_record_needs_no_choice(self, tmp_path: Path) -> None:
        protein = Protein.from_fasta(fasta(tmp_path, ">sp|P69222|IF1 Translation factor\nMAKE\nDTLE\n"))
        assert (protein.sequence, protein.name) == ("MAKEDTLE", "sp|P69222|IF1")

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_line_ends_blank_lines_comments_and_a_byte_order_mark_do_not_matter(self, tmp_path: Path, end: str) -> None:
        text = "\ufeff;made by hand\n\n>a one\nmk\n;in between\n\n  t*  \n"
        protein = Protein.from_fasta(fasta(tmp_path, text.replace("\n", end)))
        assert (protein.sequence, protein.name) == ("MKT", "a")
        assert len(protein.notes) == 1

    def test_records_are_chosen_by_place_or_identifier(self, tmp_path: Path) -> None:
        path = fasta(tmp_path, ">a\nMK\n>b second\nMKT\n>3\nMKTT\n")
        assert Protein.from_fasta(path, record=2).sequence == "MKT"
        assert Protein.from_fasta(path, record="b").sequence == "MKT"
        assert Protein.from_fasta(path, record="3").sequence == "MKTT"

    def test_several_records_without_a_choice_are_refused_by_name(self, tmp_path: Path) -> None:
        path = fasta(tmp_path, "".join(f">p{n}\nMKT\n" for n in range(10)))
        with pytest.raises(InputFileError, match=r"holds 10 proteins \('p0', .*'p7' and 2 more\)"):
            Protein.from_fasta(path)

    @pytest.mark.parametrize(
        ("record", "message"), [("x", "holds 0 records called 'x'"), (0, "no record 0"), (3, "no record 3")]
    )
    def test_a_record_that_is_not_there_is_refused(self, tmp_path: Path, record: int | str, message: str) -> None:
        with pytest.raises(InputFileError, match=message):
            Protein.from_fasta(fasta(tmp_path, ">a\nMK\n>b\nMKT\n"), record=record)

    def test_an_identifier_that_two_records_have_is_refused_but_their_places_are_not(self, tmp_path: Path) -> None:
        path = fasta(tmp_path, ">a\nMK\n>a\nMKT\n")
        with pytest.raises(InputFileError, match="holds 2 records called 'a'"):
            Protein.from_fasta(path, record="a")
        assert Protein.from_fasta(path, record=2).sequence == "MKT"

    @pytest.mark.parametrize("content", ["", "\n;only a comment\n"])
    def test_a_file_without_records_is_refused(self, tmp_path: Path, content: str) -> None:
        with pytest.raises(InputFileError, match="holds no proteins"):
            Protein.from_fasta(fasta(tmp_path, content))

    def test_a_sequence_without_a_header_is_refused_with_its_line(self, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match="not FASTA: line 2 comes before"):
            Protein.from_fasta(fasta(tmp_path, "\nMKT\n>a\nMKT\n"))

    def test_an_empty_record_is_refused_only_if_it_is_chosen(self, tmp_path: Path) -> None:
        path = fasta(tmp_path, ">a\n>b\nMKT\n")
        assert Protein.from_fasta(path, record="b").sequence == "MKT"
        with pytest.raises(ProteinError, match="empty"):
            Protein.from_fasta(path, record="a")

    def test_a_header_without_an_identifier_gives_no_name(self, tmp_path: Path) -> None:
        assert Protein.from_fasta(fasta(tmp_path, ">\nMKT\n")).name == ""

    def test_truncation_reaches_the_sequence(self, tmp_path: Path) -> None:
        path = fasta(tmp_path, ">a\n" + "M" * 1023)
        assert len(Protein.from_fasta(path, truncate=True).sequence) == 1022
        with pytest.raises(ProteinError, match="1,023 residues"):
            Protein.from_fasta(path)

    def test_missing_and_binary_files_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match="there is no file"):
            Protein.from_fasta(tmp_path / "absent.fasta")
        with pytest.raises(InputFileError, match=r"not a text file \(byte 1\)"):
            Protein.from_fasta(fasta(tmp_path, b">\xff\nMKT"))


@pytest.mark.parametrize("sequence", ["", "mk1", "MKJ", "A" * 1023])
def test_even_the_plain_constructor_makes_valid_proteins_only(sequence: str) -> None:
    with pytest.raises(ProteinError):
        Protein(sequence)


def test_a_sequence_that_looks_like_dna_is_read_with_a_note() -> None:
    assert "not as DNA or RNA" in Protein.from_sequence("ATGGTGCTGACCGAAGGTCA").notes[0]
    assert Protein.from_sequence("ATGG").notes == ()
