"""Flags of the token table: who wrote a token, text or image, and what readers want."""

from itertools import product

import numpy as np
import pytest

from actcache.store import (
    FLAG_BOS,
    FLAG_DOC_START,
    FLAG_IMAGE,
    FLAG_SPECIAL,
    ROLES,
    SettingsError,
    eligible,
    roles_of,
)
from actcache.store.layout import ROLE_SHIFT

EVERY = np.arange(256, dtype=np.uint8)


def test_flags_and_roles_share_a_byte_without_overlap():
    bits = [FLAG_SPECIAL, FLAG_DOC_START, FLAG_BOS, FLAG_IMAGE]
    bits += [1 << ROLE_SHIFT, 2 << ROLE_SHIFT, 4 << ROLE_SHIFT]
    assert len(set(bits)) == 7
    assert sum(bits) == 127  # bit 7 is free
    assert len(ROLES) <= 8
    for code, extra in product(range(8), (0, 1, 2, 4, 8, 15, 128, 143)):
        assert roles_of(np.array([code << ROLE_SHIFT | extra], np.uint8))[0] == code


@pytest.mark.parametrize("modality", ["all", "text", "image"])
@pytest.mark.parametrize("roles", [None, (), ("assistant",), ("user", "none")])
@pytest.mark.parametrize("skip_special", [True, False])
def test_eligible_equals_a_plain_loop(modality, roles, skip_special):  # F17
    def wanted(flag):
        name = ROLES[flag >> 4 & 7] if (flag >> 4 & 7) < len(ROLES) else "?"
        image = bool(flag & 8)
        return (
            not (skip_special and flag & 1)
            and (modality == "all" or image == (modality == "image"))
            and (roles is None or name in roles)
        )

    found = eligible(EVERY, skip_special=skip_special, modality=modality, roles=roles)
    assert found.tolist() == [wanted(int(f)) for f in EVERY]


def test_tables_without_roles_and_images_read_as_before():
    old = np.array([0, 1, 2, 3, 5, 7], np.uint8)
    assert roles_of(old).tolist() == [0] * 6
    assert eligible(old).tolist() == [True, False, True, False, False, False]
    assert not eligible(old, modality="image").any()


def test_names_that_are_not_known():
    with pytest.raises(SettingsError, match=r"expected names of none, system.*got 'assistent'"):
        eligible(EVERY, roles=["assistent"])
    with pytest.raises(SettingsError, match="modality=video: expected all, text or image"):
        eligible(EVERY, modality="video")
