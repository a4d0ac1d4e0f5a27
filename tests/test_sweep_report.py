"""The page of a sweep: what differs, the best trade-off by brute force, drawn in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_report import CHROMIUM, Page, data_of, dump_dom
from training import planted_store, settings

from saetrain import train
from saetrain.cli import main
from saetrain.dashboard.sweep import sweep_data, thinned, write_sweep
from saetrain.differing import differing, flat, names
from saetrain.errors import ConfigError
from saetrain.hopeless import HopelessRun

NASTY = "</script><script>boom()</script>"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished runs, one of them with a page of its own, and one that was stopped."""
    folder = tmp_path_factory.mktemp("sweep")
    planted_store(folder / "store", segments=(1024,))
    for k in (2, 4):
        for lr in (3e-4, 3e-3):
            sae = {"name": "topk", "n_latents": 48, "k": k, "dead_after_tokens": 300}
            more = {"report": (k, lr) == (4, 3e-3), "sae_name": f"k{k}", "sae_series": "s"}
            train(
                settings(
                    folder / "store",
                    folder / "runs",
                    sae=sae,
                    optim={"lr": lr},
                    log_every=2,
                    **more,
                )
            )
    hopeless = settings(
        folder / "store", folder / "runs", early_stop={"at_step": 4, "min_fve": 0.999}, seed=1
    )
    with pytest.raises(HopelessRun):
        train(hopeless)
    return folder / "runs"


def scores(sweep: Path) -> dict[str, dict]:
    found = {}
    for file in sweep.rglob("eval.json"):
        found[str(file.parent.relative_to(sweep))] = json.loads(file.read_text())
    return found


def test_the_page_has_every_run_and_only_what_differs(sweep: Path, capsys) -> None:
    main(["report", str(sweep)])
    assert capsys.readouterr().out == f"wrote {sweep / 'sweep.html'}\n"
    data = data_of(sweep / "sweep.html")
    assert set(data["settings"]) == {"sae.k", "optim.lr", "seed"}
    by_name = {r["name"]: r for r in data["runs"]}
    evaluated = scores(sweep)
    assert len(by_name) == 5
    assert len(evaluated) == 4
    for name, metrics in evaluated.items():
        numbers = by_name[name]["numbers"]
        assert (numbers["fve"], numbers["l0"]) == (metrics["fve"], metrics["l0"])
    (stopped,) = (r for r in data["runs"] if r["name"] not in evaluated)
    assert stopped["state"] == "stopped"
    assert stopped["reason"].startswith("stopped early at step 4: fve")
    assert stopped["numbers"] == {}
    assert stopped["logged"]["fve"] == stopped["curves"]["fve"][-1][1]
    links = [r["link"] for r in data["runs"] if r["link"]]
    assert len(links) == 1
    assert (sweep / links[0]).is_file()
    assert {"fve", "l0"} <= set(data["numbers"])
    assert "fve" in data["more"]
    assert "l0" not in data["more"]


def test_the_page_asks_for_nothing_and_names_no_folder_of_this_machine(sweep: Path) -> None:
    source = write_sweep(sweep).read_text("utf-8")
    page = Page(source)
    assert page.stack == []
    assert not {"link", "img", "iframe", "object", "base"} & {t for t, _ in page.elements}
    assert "default-src 'none'" in source
    assert set(re.findall(r"https?://[^\s\"')]+", source)) == {"http://www.w3.org/2000/svg"}
    assert str(sweep.parent) not in source
    controls = [a["id"] for t, a in page.elements if t == "select"]
    assert controls == ["x", "y", "by", "curve"]


POKE = """<script>
const heads = [...document.querySelectorAll("#table th button")];
const head = (name) => heads.find((b) => b.textContent === name);
const column = (name) => [...document.querySelectorAll("#table tbody tr")]
  .map((r) => r.cells[heads.indexOf(head(name))].textContent);
const best = () => [...document.querySelectorAll("#table tr.best")]
  .map((r) => +r.dataset.i).sort().join(" ");
root.dataset.front = best();
head("FVE").click();
root.dataset.down = column("FVE").join(" ");
head("FVE").click();
root.dataset.up = column("FVE").join(" ");
root.dataset.sorted = document.querySelector("[aria-sort=ascending]").textContent;
const link = document.querySelector("#pareto a");
link.dispatchEvent(new FocusEvent("focus"));
root.dataset.at = document.querySelectorAll("tr.at, .point.at, .run-line.at").length;
root.dataset.text = document.getElementById("line").textContent;
const x = document.getElementById("x");
x.value = "mse";
x.dispatchEvent(new Event("change"));
root.dataset.mse = best();
root.dataset.wide = String(root.scrollWidth > innerWidth);
</script></body>"""


def better(runs: list[dict], signs: dict[str, int]) -> str:
    """Runs that no other dominates, by comparing all pairs; numbers of the runs, in order."""
    points = {
        i: [s * r["numbers"][n] for n, s in signs.items()]
        for i, r in enumerate(runs)
        if r["numbers"]
    }
    front = [
        i
        for i, p in points.items()
        if not any(
            q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points.values()
        )
    ]
    return " ".join(map(str, front))


# F123: L0 against FVE and any other pair, a click through to each run, in headless Chromium.
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not drawn")
def test_browser_sorts_marks_and_draws(sweep: Path, tmp_path: Path) -> None:
    page = write_sweep(sweep, tmp_path / "page.html")
    poked = tmp_path / "poked.html"
    poked.write_text(page.read_text("utf-8").replace("</body>", POKE), encoding="utf-8")
    runs = data_of(page)["runs"]
    found = Page(dump_dom(poked, tmp_path / "profile"))
    html = found.elements[0][1]
    assert "data-error" not in html, html["data-error"]
    assert html["data-ready"] == "true"
    assert html["data-front"] == better(runs, {"l0": -1, "fve": 1})
    assert html["data-mse"] == better(runs, {"mse": -1, "fve": 1})
    up, down = ([float(v) for v in html[f"data-{way}"].split()] for way in ("up", "down"))
    assert up == sorted(up)
    assert down == up[::-1]
    assert len(up) == 5
    assert html["data-sorted"] == "FVE"
    assert html["data-at"] == "3", "the run is marked in the plot, in the curves and in the table"
    assert re.search(r"sae\.k=\d .*optim\.lr=\S+ .*— FVE \S+ at step 30", html["data-text"])
    assert html["data-wide"] == "false", "the page scrolls sideways on a small screen"
    assert "5 runs: 4 finished, 1 stopped" in found.text
    drawn = found.having("point")
    assert len(drawn) == 4
    assert len(found.having("run-line")) == 5
    assert len(found.having("front")) == (len(html["data-mse"].split()) > 1)
    links = [a["href"] for t, a in found.elements if t == "a" and "href" in a]
    assert len(set(links)) == 1
    assert (tmp_path / links[0]).is_file()
    assert all("aria-label" in a for t, a in found.elements if t == "a" and "data-i" in a)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not drawn")
def test_nasty_names_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "x<y"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "run.json").write_text(json.dumps({"status": "failed", "reason": NASTY}))
    (folder / "run" / "config.json").write_text(json.dumps({"hook": NASTY}))
    found = Page(dump_dom(write_sweep(folder), tmp_path / "profile"))
    html = found.elements[0][1]
    assert "data-error" not in html, html["data-error"]
    assert html["data-ready"] == "true"
    assert NASTY in found.text
    assert not any("boom()" in s for k, s in found.scripts.items() if k != "data")
    # Nothing to draw: no empty boxes.
    assert "No run has been evaluated yet." in found.text
    assert "1 run: 1 failed" in found.text
    assert "hidden" in next(a for _, a in found.elements if a.get("id") == "curves")
    assert all("hidden" in a for a in found.having("chart")[:1] + found.having("bar-top")[:1])


ODD = """<script>
const cells = (c) => [...document.querySelectorAll("#table tbody tr")]
  .map((r) => r.cells[c].textContent);
const names = [...document.querySelectorAll("#table th button")];
root.dataset.heads = names.map((b) => b.textContent).join(" ");
const mse = names.findIndex((b) => b.textContent === "MSE");
root.dataset.latents = cells(2).join(" ");
names[mse].click();
root.dataset.up = cells(mse).join(" ");
names[mse].click();
root.dataset.down = cells(mse).join(" ");
</script></body>"""


# F123
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not drawn")
def test_odd_numbers_and_exact_settings(tmp_path: Path) -> None:
    """A diverged run, one with a NaN and a failed one; settings are shown to the last digit."""
    fve, mse = (0.9, -1e6, 0.5), (1.0, float("nan"), 0.5)
    for i in range(4):
        run = tmp_path / "sweep" / f"run{i}"
        run.mkdir(parents=True)
        config = {"sae": {"n_latents": 16384 + i}, "seed": 0}
        (run / "config.json").write_text(json.dumps(config))
        state = {"status": "finished"} if i < 3 else {"status": "failed", "reason": "why"}
        (run / "run.json").write_text(json.dumps({**state, "n_steps": 10}))
        if i < 3:
            scores = {"fve": fve[i], "l0": 8.0 + i, "mse": mse[i], "cos": 0.5}
            (run / "eval.json").write_text(json.dumps(scores))
    page = write_sweep(tmp_path / "sweep")
    page.write_text(page.read_text("utf-8").replace("</body>", ODD), encoding="utf-8")
    found = Page(dump_dom(page, tmp_path / "profile"))
    html = found.elements[0][1]
    assert "data-error" not in html, html["data-error"]
    assert html["data-heads"] == "run state sae.n_latents FVE L0 MSE reason"  # cos is the same
    assert html["data-latents"] == "16384 16385 16386 16387"
    assert html["data-up"] == "0.5 1 nan –"  # what is no number comes last, either way
    assert html["data-down"] == "1 0.5 nan –"
    assert "FVE below -0.1 is drawn at the edge" in found.text
    heights = [float(a["cy"]) for a in found.having("point")]
    assert max(heights) - min(heights) > 200  # the diverged run does not squeeze the others
    assert abs(heights[0] - heights[2]) > 50
    assert all("stroke" in a["style"] for a in found.having("run-line"))


def test_what_differs() -> None:
    one = flat({"a": {"b": 1, "c": {}}, "d": [1, 2], "wandb": {"name": "x"}})
    two = flat({"a": {"b": 2, "c": {}}, "d": [1, 2], "wandb": {"name": "y"}, "e": None})
    assert one == {"a.b": 1, "a.c": {}, "d": [1, 2], "wandb.name": "x"}
    assert differing([one, two]) == ["a.b"]
    assert differing([one, {**two, "f": 3}]) == ["a.b", "f"]
    assert differing([one]) == []
    assert names([one, two | {"f": "x"}]) == ["a.b=1", "a.b=2 f=x"]
    assert names([one]) == [""]
    assert names([{"z": 1, "a": 2}, {"a": 3}]) == ["a=2 z=1", "a=3"]
    mixed = [{"f": 1, "k": 4}, {"f": 1, "k": 8}, {"f": 2}]  # another architecture has no k
    assert differing(mixed) == ["k", "f"]
    assert names(mixed) == ["k=4 f=1", "k=8 f=1", "f=2"]
    long = names([{"a": "x" * 100}, {"a": 1.5, "l": [1, 2]}])
    assert long == ["a=" + "x" * 69 + "…", "a=1.5 l=[1,2]"]


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    rows = [{"step": s, "loss": float(s)} for s in range(1, 1001)]
    got = thinned(rows, "loss")
    assert got[0] == [1, 1.0]
    assert got[-1] == [1000, 1000.0]
    assert 100 <= len(got) <= 151
    assert thinned(rows, "fve") == []


def test_numbers_that_are_the_same_everywhere_are_left_out() -> None:
    def run(**numbers: float) -> dict:
        return {"config": {}, "numbers": numbers, "logged": {}, "curves": {}}

    data = sweep_data(
        "x", [run(fve=0.5, l0=4.0, cos=0.9, odd=1.0), run(fve=0.5, l0=5.0, cos=0.8, odd=1.0)]
    )
    assert data["numbers"] == ["fve", "l0", "cos"]


def test_folders_without_runs_are_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        write_sweep(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        write_sweep(tmp_path / "no")
    with pytest.raises(SystemExit):
        main(["report"])
    assert "saetrain report DIR" in capsys.readouterr().out


def test_a_damaged_run_is_named_beside_the_others(tmp_path: Path, capsys) -> None:
    good = {"run.json": '{"status": "finished"}', "eval.json": '{"fve": 0.5, "l0": 4.0}'}
    damages = {"a": {}, "b": {"run.json": '{"st'}, "c": {"eval.json": "[1]"}}
    damages |= {"d": {"metrics.jsonl": '{"step": 1}\n\0\0\n'}, "e": {"config.json": "{"}}
    for name, damage in damages.items():
        (tmp_path / name).mkdir()
        for file, text in {**good, **damage}.items():
            (tmp_path / name / file).write_text(text)
    main(["sweep-status", str(tmp_path)])
    told = capsys.readouterr().out
    assert "4 damaged, 1 finished" in told
    for name, damage in damages.items():
        assert all(f"{name}/{file} is damaged" in told for file in damage)
    assert "metrics.jsonl is damaged in line 2" in told
    runs = data_of(write_sweep(tmp_path))["runs"]
    assert [r["state"] for r in runs] == ["finished", *["damaged"] * 4]
    assert [bool(r["numbers"]) for r in runs] == [True, *[False] * 4]
