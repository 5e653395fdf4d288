"""Molecules: every way to make one gives the features of its SMILES, and every refusal says why."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from biomedgpt_edge.errors import InputFileError, MoleculeError
from biomedgpt_edge.inputs import MAX_ATOMS, MAX_INPUT_FILE_BYTES, MAX_MOLECULE_CHARACTERS, Molecule

CORPUS = [
    line.split("\t")[0]
    for line in (Path(__file__).parents[1] / "data" / "molecules.tsv").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
STEREO = ["F/C=C/F", r"F/C=C\F", "C[C@H](N)C(=O)O", "OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O", r"C/C=C\[C@@H](F)Cl"]
HUNDRED = CORPUS[::2][:80] + CORPUS[200:]


def canonical(smiles: str) -> Molecule:
    return Molecule.from_smiles(Chem.CanonSmiles(smiles))


def flat(smiles: str) -> Chem.Mol:
    mol = Chem.MolFromSmiles(smiles)
    AllChem.Compute2DCoords(mol)
    return mol


def solid(smiles: str) -> Chem.Mol:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=7) == 0
    return mol


def block(smiles: str, name: str = "", *, v3000: bool = False) -> str:
    return name + Chem.MolToMolBlock(flat(smiles), forceV3000=v3000)


def written(folder: Path, content: str | bytes, name: str = "file.sdf") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestFromSmiles:
    def test_keeps_the_spelling_and_counts_one_soft_token_per_atom(self) -> None:
        molecule = Molecule.from_smiles("  OCC\n")
        assert (molecule.smiles, molecule.name, molecule.n_soft_tokens, molecule.notes) == ("OCC", "", 3, ())
        assert molecule.featurize_seconds > 0

    @pytest.mark.parametrize("text", ["CCO ethyl alcohol", "CCO\tethyl alcohol", "CCO   ethyl alcohol  "])
    def test_text_after_white_space_is_the_name(self, text: str) -> None:
        molecule = Molecule.from_smiles(text)
        assert (molecule.smiles, molecule.name) == ("CCO", "ethyl alcohol")
        assert molecule == Molecule.from_smiles("CCO ethyl alcohol")

    def test_a_name_may_hold_any_character(self) -> None:
        assert Molecule.from_smiles("CCO Äthanol (α) ###").name == "Äthanol (α) ###"

    def test_an_extension_between_bars_is_read_and_is_no_name(self) -> None:
        molecule = Molecule.from_smiles("C[C@H](N)O |&1:1| racemic")
        assert (molecule.smiles, molecule.name) == ("C[C@H](N)O", "racemic")
        with pytest.raises(MoleculeError, match="DATIVE"):
            Molecule.from_smiles("[NH3][Cu] |C:0.0|")

    def test_equal_molecules_are_equal_hash_alike_and_have_one_digest(self) -> None:
        one, same, other = (Molecule.from_smiles(smiles) for smiles in ("CCO", "CCO", "OCC"))
        assert one == same
        assert len({one, same, other}) == 2
        assert one.digest == same.digest != other.digest

    @pytest.mark.parametrize("text", ["", " ", "\n\t"])
    def test_an_empty_text_is_refused(self, text: str) -> None:
        with pytest.raises(MoleculeError, match="the SMILES string is empty"):
            Molecule.from_smiles(text)

    @pytest.mark.parametrize("value", [None, b"CCO", 7, ["CCO"]])
    def test_something_else_than_text_is_refused_with_its_type(self, value: object) -> None:
        with pytest.raises(MoleculeError, match=f"expected a SMILES string, got {type(value).__name__}"):
            Molecule.from_smiles(value)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("smiles", "character", "place"),
        [
            ("CCé", "'é'", 3),
            ("\ufeffCCO", r"'\\ufeff'", 1),
            ("CCO\u200b", r"'\\u200b'", 4),
            ("CC\u2212O", "'−'", 3),
            ("CCO\x00N", r"'\\x00'", 4),
            ("C\ud800", r"'\\ud800'", 2),
            ("СС", "'С'", 1),
        ],
    )
    def test_a_character_that_no_smiles_has_is_named_and_not_dropped(
        self, smiles: str, character: str, place: int
    ) -> None:
        with pytest.raises(MoleculeError, match=f"holds {character} at character {place}"):
            Molecule.from_smiles(smiles)

    def test_several_lines_are_refused_and_not_cut_to_the_first(self) -> None:
        with pytest.raises(MoleculeError, match="has 2 lines") as caught:
            Molecule.from_smiles("CCO\nCCC")
        assert (caught.value.seen, caught.value.limit) == (2, 1)

    @pytest.mark.parametrize(
        ("smiles", "reason"),
        [
            ("C1CC", "unclosed ring"),
            ("N(C)(C)(C)C", "Explicit valence for atom # 0 N, 4, is greater than permitted"),
            ("c1cccc1", "Can't kekulize mol"),
            ("CC(=O", r"\(around position \d\)"),
            ("CCX", r"syntax error \(around position 3\)"),
            ("C>>C", "syntax error"),
        ],
    )
    def test_what_rdkit_cannot_read_is_refused_with_its_reason(self, smiles: str, reason: str) -> None:
        with pytest.raises(MoleculeError, match=re.escape(f"RDKit cannot read the SMILES '{smiles}'") + f".*{reason}"):
            Molecule.from_smiles(smiles)

    def test_a_refusal_never_repeats_a_long_text(self) -> None:
        with pytest.raises(MoleculeError) as caught:
            Molecule.from_smiles("C" * 3000 + "(")
        assert len(str(caught.value)) < 300
        assert len(str(caught.value.seen)) < 120
        assert "(3001 characters)" in str(caught.value)

    def test_reading_and_refusing_print_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        Molecule.from_smiles("[H]")
        for smiles in ("C1CC", "CC(=O", "N(C)(C)(C)C"):
            with pytest.raises(MoleculeError):
                Molecule.from_smiles(smiles)
        assert capfd.readouterr() == ("", "")

    def test_too_many_atoms_are_refused_before_anything_slow(self) -> None:
        assert Molecule.from_smiles("C" * MAX_ATOMS).n_soft_tokens == MAX_ATOMS
        with pytest.raises(MoleculeError, match=r"the molecule has 4,097 atoms.*at most 4,096") as caught:
            Molecule.from_smiles("C" * (MAX_ATOMS + 1))
        assert (caught.value.seen, caught.value.limit) == (MAX_ATOMS + 1, MAX_ATOMS)
        with pytest.raises(MoleculeError, match=r"the SMILES has 4,000,000 characters"):
            Molecule.from_smiles("C" * 4_000_000)
        with pytest.raises(MoleculeError, match="has 20,001 atoms"):
            Molecule.from_smiles("C(" * 20_000 + "C" + ")" * 20_000)

    def test_refusals_are_json(self) -> None:
        for smiles in ("", "C1CC", "CC*", "CC~O", "CCé", "C" * 5000, "C\nC"):
            with pytest.raises(MoleculeError) as caught:
                Molecule.from_smiles(smiles)
            fields = json.loads(json.dumps(caught.value.as_dict()))
            assert fields["code"] == "input.molecule"
            assert fields["remedy"]


class TestFromRdkit:
    @pytest.mark.parametrize(
        "made",
        [
            pytest.param(Chem.MolFromSmiles, id="as read"),
            pytest.param(lambda s: Chem.AddHs(Chem.MolFromSmiles(s)), id="with explicit hydrogens"),
            pytest.param(lambda s: Chem.MolFromSmiles(s, sanitize=False), id="unsanitized"),
            pytest.param(flat, id="with drawing coordinates"),
            pytest.param(lambda s: Chem.RWMol(Chem.MolFromSmiles(s)), id="editable"),
            pytest.param(lambda s: pickle.loads(pickle.dumps(Chem.MolFromSmiles(s))), id="pickled"),
        ],
    )
    def test_a_molecule_read_from_smiles_has_exactly_the_features_of_that_smiles(self, made: object) -> None:
        for smiles in HUNDRED + STEREO:
            assert Molecule.from_rdkit(made(smiles)).graph == Molecule.from_smiles(smiles).graph, smiles  # type: ignore[operator]

    @pytest.mark.parametrize("smiles", ["C[C@@H](C)C", "F/C(C)=C(C)/C", r"C/C=[N+](\[O-])/[O-]"])
    @pytest.mark.parametrize("sanitize", [True, False])
    def test_marks_that_mean_nothing_go_from_an_unsanitized_molecule_too(self, smiles: str, sanitize: bool) -> None:
        mol = Chem.MolFromSmiles(smiles, sanitize=False)
        if sanitize:
            Chem.SanitizeMol(mol)
        assert Molecule.from_rdkit(mol).graph == Molecule.from_smiles(smiles).graph

    @pytest.mark.parametrize("clear", [True, False])
    def test_a_kekulized_molecule_is_aromatic_again(self, clear: bool) -> None:
        for smiles in ["c1ccccc1O", "Cc1c[nH]c2ccccc12", *HUNDRED[:30]]:
            mol = Chem.MolFromSmiles(smiles)
            Chem.Kekulize(mol, clearAromaticFlags=clear)
            assert Molecule.from_rdkit(mol).graph == Molecule.from_smiles(smiles).graph

    @pytest.mark.parametrize("smiles", STEREO)
    def test_a_drawing_gives_the_features_of_the_canonical_spelling(self, smiles: str) -> None:
        assert Molecule.from_rdkit(Chem.MolFromMolBlock(block(smiles))) == canonical(smiles)
        assert Molecule.from_rdkit(Chem.MolFromMolBlock(block(smiles), sanitize=False)) == canonical(smiles)

    @pytest.mark.parametrize("smiles", STEREO)
    def test_a_conformer_gives_the_features_of_the_canonical_spelling(self, smiles: str) -> None:
        mol = Chem.MolFromMolBlock(Chem.MolToMolBlock(solid(smiles)), removeHs=False)
        assert Molecule.from_rdkit(mol).graph == canonical(Chem.MolToSmiles(Chem.RemoveHs(solid(smiles)))).graph

    def test_a_wedged_molecule_is_spelled_again(self) -> None:
        mol = flat("C[C@H](N)C(=O)O")
        Chem.WedgeMolBonds(mol, mol.GetConformer())
        assert any(bond.GetBondDir() == Chem.BondDir.BEGINWEDGE for bond in mol.GetBonds()) or any(
            bond.GetBondDir() == Chem.BondDir.BEGINDASH for bond in mol.GetBonds()
        )
        assert Molecule.from_rdkit(mol).graph == canonical("C[C@H](N)C(=O)O").graph

    @pytest.mark.parametrize("make", [flat, solid, lambda s: Chem.MolFromSmiles(s, sanitize=False)])
    def test_the_callers_molecule_stays_as_it_is(self, make: object) -> None:
        mol = make(r"C/C=C\[C@@H](F)Cl")  # type: ignore[operator]
        mol.SetProp("_Name", "mine")
        before = mol.ToBinary(Chem.PropertyPickleOptions.AllProps)
        assert Molecule.from_rdkit(mol).name == "mine"
        assert mol.ToBinary(Chem.PropertyPickleOptions.AllProps) == before

    def test_its_smiles_spells_the_same_molecule(self) -> None:
        for smiles in HUNDRED[:40]:
            molecule = Molecule.from_rdkit(Chem.MolFromSmiles(smiles))
            assert Chem.CanonSmiles(molecule.smiles) == Chem.CanonSmiles(smiles)

    @pytest.mark.parametrize("value", [None, "CCO", 7])
    def test_something_else_than_a_molecule_is_refused_with_its_type(self, value: object) -> None:
        with pytest.raises(MoleculeError, match=f"expected an RDKit molecule, got {type(value).__name__}"):
            Molecule.from_rdkit(value)

    def test_a_molecule_without_atoms_is_refused(self) -> None:
        with pytest.raises(MoleculeError, match="no atoms"):
            Molecule.from_rdkit(Chem.Mol())

    def test_an_impossible_molecule_is_refused_with_the_reason(self) -> None:
        with pytest.raises(MoleculeError, match="Explicit valence for atom # 0 N, 4, is greater"):
            Molecule.from_rdkit(Chem.MolFromSmiles("N(C)(C)(C)C", sanitize=False))

    @pytest.mark.parametrize("smarts", ["[CH3]-[OH]", "cC", "c1ccccc1"])
    def test_a_search_pattern_is_refused(self, smarts: str) -> None:
        with pytest.raises(MoleculeError, match=r"atom 1 .* is a query"):
            Molecule.from_rdkit(Chem.MolFromSmarts(smarts))

    @pytest.mark.parametrize(("smarts", "named"), [("[C,N]O", "wildcard"), ("[#6]~[#8]", "UNSPECIFIED")])
    def test_a_pattern_without_elements_or_bond_types_is_refused_by_them(self, smarts: str, named: str) -> None:
        with pytest.raises(MoleculeError, match=named):
            Molecule.from_rdkit(Chem.MolFromSmarts(smarts))

    def test_too_many_atoms_are_refused(self) -> None:
        with pytest.raises(MoleculeError, match="has 5,000 atoms"):
            Molecule.from_rdkit(Chem.MolFromSmiles("C" * 5000))


class TestFromInchi:
    @pytest.mark.parametrize("smiles", [*STEREO, "c1ccccc1O", "[Na+].[Cl-]", "[2H]C", "OC(=O)CC(O)=O"])
    def test_gives_the_canonical_spelling_of_the_molecule(self, smiles: str) -> None:
        assert Molecule.from_inchi(Chem.MolToInchi(Chem.MolFromSmiles(smiles))) == canonical(smiles)

    @pytest.mark.parametrize(
        "text", ["", "CCO", "LFQSCWFLJHTTHZ-UHFFFAOYSA-N", "InChI=1S/", "InChI=1S/C2H6O/c1-2-9", "inchi=1S/CH4/h1H4"]
    )
    def test_what_is_no_inchi_is_refused(self, text: str, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(MoleculeError, match=r"cannot read the InChI .* starts with 'InChI=1S/'"):
            Molecule.from_inchi(text)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("tail", ["\x00junk", "é", "\nInChI=1S/CH4/h1H4", "\ud800"])
    def test_a_character_that_no_inchi_has_is_named_and_nothing_is_cut_off(self, tail: str) -> None:
        with pytest.raises(MoleculeError, match="at character 34"):
            Molecule.from_inchi("InChI=1S/C2H6O/c1-2-3/h3H,2H2,1H3" + tail)

    def test_something_else_than_text_is_refused(self) -> None:
        with pytest.raises(MoleculeError, match="expected an InChI, got NoneType"):
            Molecule.from_inchi(None)  # type: ignore[arg-type]

    def test_too_many_atoms_are_refused(self) -> None:
        with pytest.raises(MoleculeError, match="has 9,999 atoms"):
            Molecule.from_inchi("InChI=1S/9999CH4/h9999*1H4")


class TestFromSdf:
    @pytest.mark.parametrize("smiles", [*STEREO, "c1ccccc1O", "[Na+].[Cl-]", "CN(=O)=O"])
    @pytest.mark.parametrize("v3000", [False, True])
    def test_gives_the_canonical_spelling_of_the_drawing(self, tmp_path: Path, smiles: str, v3000: bool) -> None:
        assert Molecule.from_sdf(written(tmp_path, block(smiles, v3000=v3000))) == canonical(smiles)

    @pytest.mark.parametrize("smiles", STEREO)
    def test_reads_stereo_from_three_dimensions(self, tmp_path: Path, smiles: str) -> None:
        mol = solid(smiles)
        molecule = Molecule.from_sdf(written(tmp_path, Chem.MolToMolBlock(mol)))
        assert molecule == canonical(Chem.MolToSmiles(Chem.RemoveHs(mol)))

    def test_its_smiles_has_exactly_its_features(self, tmp_path: Path) -> None:
        for smiles in HUNDRED[::4]:
            molecule = Molecule.from_sdf(written(tmp_path, block(smiles)))
            assert Molecule.from_smiles(molecule.smiles).graph == molecule.graph

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_line_ends_do_not_matter(self, tmp_path: Path, end: str) -> None:
        text = block("C[C@H](N)O", "alaninol") + "> <note>\nx\n\n$$$$\n"
        molecule = Molecule.from_sdf(written(tmp_path, text.replace("\n", end)))
        assert (molecule.name, molecule.graph) == ("alaninol", canonical("C[C@H](N)O").graph)

    def test_a_byte_order_mark_is_no_part_of_the_name(self, tmp_path: Path) -> None:
        assert Molecule.from_sdf(written(tmp_path, "\ufeff" + block("CCO", "ethanol"))).name == "ethanol"

    def test_a_record_is_chosen_by_its_number(self, tmp_path: Path) -> None:
        path = written(tmp_path, "".join(block(s, s) + "$$$$\n" for s in ("CC", "CCO", "CCN")))
        assert [Molecule.from_sdf(path, record=n).name for n in (1, 2, 3)] == ["CC", "CCO", "CCN"]
        with pytest.raises(InputFileError, match=r"holds 3 molecules, and a question is about one.*record=1"):
            Molecule.from_sdf(path)

    @pytest.mark.parametrize("record", [0, -1, 2])
    def test_a_number_without_a_record_is_refused(self, tmp_path: Path, record: int) -> None:
        with pytest.raises(InputFileError, match=f"there is no record {record}.*counted from 1"):
            Molecule.from_sdf(written(tmp_path, block("CCO")), record=record)

    @pytest.mark.parametrize("record", [True, "1", 1.0])
    def test_a_record_that_is_no_number_is_refused(self, tmp_path: Path, record: object) -> None:
        with pytest.raises(InputFileError, match="no number"):
            Molecule.from_sdf(written(tmp_path, block("CCO")), record=record)  # type: ignore[arg-type]

    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_a_file_without_molecules_is_refused(self, tmp_path: Path, content: str) -> None:
        with pytest.raises(InputFileError, match=r"file.sdf holds no molecules"):
            Molecule.from_sdf(written(tmp_path, content))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("garbage\n", "Counts line too short"),
            ("$$$$\n", "no reason"),
            (block("CCO").replace("V2000", "V4000"), "Unsupported CTAB version"),
            (block("CCO").replace("M  END\n", ""), "Problems encountered parsing Mol data"),
            (block("CCO").replace(" O  ", " Qq "), "Element 'Qq' not found"),
            (block("OC").replace("  1  2  1", "  1  2  3"), "Explicit valence for atom # 0 O"),
        ],
    )
    def test_a_record_that_cannot_be_read_is_refused_with_its_number_and_reason(
        self, tmp_path: Path, content: str, reason: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(MoleculeError, match=f"cannot read molecule 1 of file.sdf: .*{reason}"):
            Molecule.from_sdf(written(tmp_path, content))
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("symbol", ["A", "Q", "R#", "X", "*"])
    def test_a_placeholder_atom_is_refused_by_its_number_in_the_file(self, tmp_path: Path, symbol: str) -> None:
        drawn = block("OCCN").replace(" N  ", f" {symbol:3}", 1)
        with pytest.raises(MoleculeError, match="atom 4 is a wildcard"):
            Molecule.from_sdf(written(tmp_path, drawn))

    @pytest.mark.parametrize("kind", [5, 6, 7, 8, 9])
    def test_a_query_or_dative_bond_is_refused_by_its_numbers_in_the_file(self, tmp_path: Path, kind: int) -> None:
        drawn = block("NCC[Fe]").replace("  3  4  1", f"  3  4  {kind}")
        with pytest.raises(MoleculeError, match=r"between atoms 3 \(C\) and 4 \(Fe\) is of type"):
            Molecule.from_sdf(written(tmp_path, drawn))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match=r"there is no file .*absent\.sdf"):
            Molecule.from_sdf(tmp_path / "absent.sdf")

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match="cannot be read"):
            Molecule.from_sdf(tmp_path)

    @pytest.mark.parametrize("path", ["a\x00b.sdf", "x" * 5000])
    def test_an_impossible_path_is_refused(self, path: str) -> None:
        with pytest.raises(InputFileError, match="cannot be read"):
            Molecule.from_sdf(path)

    def test_a_binary_file_is_refused_with_the_first_bad_byte(self, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match=r"not a text file \(byte 3\)"):
            Molecule.from_sdf(written(tmp_path, b"abc\xff\x00"))

    def test_a_file_over_the_limit_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "large.sdf"
        with path.open("wb") as file:
            file.truncate(MAX_INPUT_FILE_BYTES + 1)
        with pytest.raises(InputFileError, match=r"more than 16,777,216 bytes") as caught:
            Molecule.from_sdf(path)
        assert caught.value.limit == MAX_INPUT_FILE_BYTES

    @pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no endless device here")
    def test_an_endless_file_is_read_only_up_to_the_limit(self) -> None:
        with pytest.raises(InputFileError, match=r"more than 16,777,216 bytes"):
            Molecule.from_sdf("/dev/zero")

    def test_too_many_atoms_are_refused(self, tmp_path: Path) -> None:
        lines = "\n\n\n  0  0  0     0  0            999 V3000\nM  V30 BEGIN CTAB\nM  V30 COUNTS 5000 0 0 0 0\n"
        atoms = "".join(f"M  V30 {n + 1} C 0 0 0 0\n" for n in range(5000))
        content = f"{lines}M  V30 BEGIN ATOM\n{atoms}M  V30 END ATOM\nM  V30 END CTAB\nM  END\n"
        assert len(content) > MAX_MOLECULE_CHARACTERS
        with pytest.raises(MoleculeError, match="has 5,000 atoms"):
            Molecule.from_sdf(written(tmp_path, content))


@pytest.mark.parametrize(
    ("smiles", "words"),
    [
        ("[2H]C(Cl)(Cl)Cl", ["isotopes"]),
        ("[13CH4]", ["isotopes"]),
        ("[Na+].[Cl-]", ["charges"]),
        ("CC(=O)[O-]", ["charges"]),
        ("[2H][NH3+]", ["isotopes", "charges"]),
        ("C[N+](=O)[O-]", []),
        ("CCO", []),
    ],
)
def test_what_the_model_cannot_see_is_noted(smiles: str, words: list[str]) -> None:
    notes = Molecule.from_smiles(smiles).notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
