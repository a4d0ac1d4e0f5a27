"""Which rows of the feature list the tests name, in comments: `# F22`, `# F22, F38a`, `# F30-F34`.

`pytest -s tests/test_features.py` prints the rows that no test names yet.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).parent  # F38: the suite itself
MARKED = re.compile(r"#\s*F\d")
ROW = re.compile(r"\bF(\d+[a-z]?)(?:\s*[-–]\s*F?(\d+)\b)?")


def feature_rows(text: str) -> dict[str, str]:
    """Row number -> title, in the order of the list."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    rows = dict(line.split("\t", 1) for line in lines)
    assert len(rows) == len(lines), "a row number appears twice"
    return rows


def marks(source: str) -> list[str]:
    """Row numbers that the comments of a file name; a range counts for every number in it."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and MARKED.match(token.string):
            for first, last in ROW.findall(token.string):
                found += [str(n) for n in range(int(first), int(last) + 1)] if last else [first]
    return found


def not_rows(named: Iterable[str], rows: Mapping[str, str]) -> list[str]:
    return sorted({f"F{n}" for n in named} - {f"F{n}" for n in rows})


def test_every_mark_is_a_row_of_the_list() -> None:
    rows = feature_rows((TESTS / "features.txt").read_text("utf-8"))
    assert len(rows) == 104
    named = {file.name: marks(file.read_text("utf-8")) for file in sorted(TESTS.rglob("*.py"))}
    wrong = {name: bad for name, m in named.items() if (bad := not_rows(m, rows))}
    assert wrong == {}, "marks that are no row of tests/features.txt"
    open_rows = [n for n in rows if n not in {m for found in named.values() for m in found}]
    print(f"\n{len(rows) - len(open_rows)} of {len(rows)} rows are named by tests; not named:")
    print("\n".join(f"  F{n:<5} {rows[n]}" for n in open_rows))


def test_marks_are_found_where_they_are_and_nowhere_else() -> None:
    source = 'x = "# F1"  # F22, F38a and F30–F32\n# a plain F9\ny = 2  #F103: z\n'
    assert marks(source) == ["22", "38a", "30", "31", "32", "103"]
    assert not_rows(["1", "38a", "99"], {"1": "one", "38a": "keys"}) == ["F99"]
    assert feature_rows("# head\n1\tone\n\n18a\ttwo\tparts\n") == {"1": "one", "18a": "two\tparts"}
    with pytest.raises(AssertionError, match="twice"):
        feature_rows("1\tone\n1\ttwo\n")
