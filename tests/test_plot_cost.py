"""The plot of cost against work, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.plot_cost import QUICK, Point, main, table


def test_the_plot_and_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    try:
        assert main(["--quick", "--out", str(tmp_path / "cost.png")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.strip().splitlines()
    axes = [line.split("|")[1].strip() for line in lines[2:]]
    want = {"latents": QUICK.widths, "batch": QUICK.batches, "configs": QUICK.configs}
    assert axes == [axis for axis, places in want.items() for _ in places]


def test_a_row_of_the_table() -> None:
    assert table([Point("latents", 4096, 2048, 30.0, 20.0)]).endswith(
        "| latents | 4,096 | 30.0 | 20.0 | 1.50 |"
    )
