"""Profiles of engines leave no gap: whatever is run has the shapes of the one that is chosen for it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.generate import PREFILL_CHUNK
from biomedgpt_edge.memory import LEAST_POSITIONS
from biomedgpt_edge.protein_tokens import MAX_RESIDUES
from biomedgpt_edge.speculation import DRAFT
from biomedgpt_edge.tensorrt.profiles import (
    ATTENDED_STEP,
    STEP_TOKENS,
    Profile,
    decoder_profiles,
    molecule_profiles,
    profile_for,
    protein_profiles,
)

SPEC = Bundle.open(DEMO_BUNDLE).manifest.decoder
CONTEXTS = [LEAST_POSITIONS, 256, 257, 300, 2048]


def takes(profile: Profile, name: str, shape: tuple[int, ...]) -> bool:
    low, _, high = profile.shapes[name]
    return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))


def require_each_in_one(profiles: list[Profile], least: int, most: int) -> None:
    """Every length from ``least`` to ``most`` lies in one profile, which is the one that is chosen, and no other."""
    for length in range(least, most + 1):
        holding = [i for i, profile in enumerate(profiles) if profile.lengths[0] <= length <= profile.lengths[2]]
        assert holding == [profile_for(profiles, length)], f"length {length}"
    assert profile_for(profiles, most + 1) is None


def require_ordered(profiles: list[Profile]) -> None:
    for profile in profiles:
        assert sorted(profile.lengths) == list(profile.lengths)
        for name, shapes in profile.shapes.items():
            for sizes in zip(*shapes, strict=True):
                assert 1 <= sizes[0] <= sizes[1] <= sizes[2], f"{name} of {profile.lengths}"


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_chunk_of_a_prompt_has_one_profile(context: int) -> None:
    profiles = decoder_profiles(SPEC, context)
    require_each_in_one(profiles, 1, min(PREFILL_CHUNK, context))
    require_ordered(profiles)


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_molecule_that_a_prompt_can_hold_has_one_profile(context: int) -> None:
    profiles = molecule_profiles(context)
    require_each_in_one(profiles, 1, context)
    require_ordered(profiles)


def test_every_protein_has_one_profile() -> None:
    profiles = protein_profiles()
    require_each_in_one(profiles, 3, MAX_RESIDUES + 2)
    require_ordered(profiles)
    assert profiles[-1].lengths[2] == 1024


@given(context=st.integers(LEAST_POSITIONS, 4096), data=st.data())
def test_whatever_a_decoder_runs_has_the_shapes_of_its_profile(context: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, min(PREFILL_CHUNK, context)))
    start = data.draw(st.integers(0, context - length))
    # As many rows of logits as there are tokens in steps, and one behind a chunk of a prompt.
    wanted = data.draw(st.sampled_from([1, min(length, STEP_TOKENS)]))
    attended = min(context, math.ceil((start + length) / ATTENDED_STEP) * ATTENDED_STEP)
    profiles = decoder_profiles(SPEC, context)
    index = profile_for(profiles, length)
    assert index is not None
    assert (index == 0) == (length <= STEP_TOKENS)
    assert takes(profiles[index], "inputs_embeds", (1, length, SPEC.hidden_size))
    assert takes(profiles[index], "position_ids", (1, length))
    assert takes(profiles[index], "mask", (1, 1, length, attended))
    assert takes(profiles[index], "logit_positions", (wanted,))


@given(context=st.integers(LEAST_POSITIONS, 4096), data=st.data())
def test_shapes_of_a_molecule_go_with_its_atoms(context: int, data: st.DataObject) -> None:
    atoms = data.draw(st.integers(1, context))
    profiles = molecule_profiles(context)
    index = profile_for(profiles, atoms)
    assert index is not None
    assert takes(profiles[index], "atom_type", (atoms,))
    assert takes(profiles[index], "chirality", (atoms,))
    assert takes(profiles[index], "adjacency", (atoms, atoms))
    assert all(
        sizes[0] == count
        for sizes, count in zip(profiles[index].shapes["edge_counts"], profiles[index].lengths, strict=True)
    )


def test_tokens_have_a_profile_of_their_own_and_prompts_follow_without_a_gap() -> None:
    profiles = decoder_profiles(SPEC, SPEC.context)
    assert profiles[0].lengths == (1, 1, 1 + DRAFT)
    assert profiles[-1].lengths[2] == PREFILL_CHUNK
    for one, following in pairwise(profiles):
        assert following.lengths[0] == one.lengths[2] + 1
