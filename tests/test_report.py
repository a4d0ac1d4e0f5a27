"""report.html of a trained run: valid, self-contained, safe with any token, drawn in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from stores import make_store

from saetrain import train
from saetrain.dashboard.report import charts, page, page_features, write_report
from saetrain.errors import TrainingError
from saetrain.settings import TrainSettings

FACE = "🙂".encode()
NASTY = (
    b"</script><script>boom()</script>",
    b"<!--",
    b"\"quoted\" 'too' \\",
    "\u2028".encode(),
    b"\xff\xfe",
    b"\n",
    b"\t",
    b"&amp; {{js}}",
    "日本語".encode(),
    "\u202e".encode(),
    b"\x00",
    b" " + b"long" * 40,
    FACE[:2],  # the rest of it is the next token of the texts below
    FACE[2:],
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class WithVocab:
    """A snapshot with other token texts."""

    def __init__(self, snapshot, vocab: list[bytes]) -> None:
        self._snapshot, self._vocab = snapshot, vocab

    def __getattr__(self, name: str):
        return getattr(self._snapshot, name)

    def vocab(self) -> list[bytes]:
        return self._vocab


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WithVocab]:
    """A run trained on a store of planted directions whose tokens are hard to print."""
    folder = tmp_path_factory.mktemp("report")
    atoms = np.random.default_rng(7).normal(size=(24, 16))

    def acts(hook, rng, tokens, d):
        codes = (rng.random((len(tokens), 24)) < 0.1) * rng.exponential(1.0, (len(tokens), 24))
        return codes @ atoms + 2.0 + 0.05 * rng.normal(size=(len(tokens), d))

    store = make_store(folder / "store", segments=(1024, 1024), acts=acts)
    values = {
        "store": str(folder / "store"),
        "runs_dir": str(folder / "runs"),
        "sae": {"name": "topk", "n_latents": 48, "k": 4, "dead_after_tokens": 300},
        "batch_tokens": 64,
        "tokens": 64 * 20,
        "held_out_fraction": 0.3,
        "log_every": 2,
        "eval": {"every_steps": 5},
        "progress": False,
        "report": False,
    }
    result = train(TrainSettings.from_mapping(values))
    words = [b"<eos>", FACE, *(NASTY * 4)[:48]]
    snapshot = WithVocab(store.snapshot(), words)
    write_report(result.run_dir, snapshot=snapshot)
    return result.run_dir, snapshot


class Page(HTMLParser):
    """Elements as (tag, attributes), scripts and styles by id, and the text of the rest."""

    VOID = ("meta", "link", "img", "input", "br", "hr")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.stack: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("script", "style"):
            key = self.elements[-1][1].get("id")
            self.scripts[key] = self.scripts.get(key, "") + data
        else:
            self.text += data

    def having(self, name: str) -> list[dict]:
        """Attributes of the elements of class `name`."""
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def data_of(html: Path) -> dict:
    return json.loads(Page(html.read_text("utf-8")).scripts["data"])


def test_page_is_valid_and_asks_for_nothing(run) -> None:
    source = (run[0] / "report.html").read_text("utf-8")
    found = Page(source)
    assert found.stack == []
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert not {"link", "img", "iframe", "object", "base"} & {t for t, _ in found.elements}
    for tag, attributes in found.elements:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    code = source.replace(found.scripts["data"], "")
    assert set(re.findall(r"https?://[^\s\"')]+", code)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in code
    assert "@import" not in code
    assert "default-src 'none'" in code


def test_embedded_data_comes_back_whatever_the_tokens(run) -> None:
    found = Page((run[0] / "report.html").read_text("utf-8"))
    assert set(found.scripts) == {None, "data"}
    assert found.scripts["data"].isascii()
    features = json.loads((run[0] / "features.json").read_text("utf-8"))
    assert json.loads(found.scripts["data"])["features"] == page_features(features)
    vocab, seen = run[1].vocab(), set()
    for card in features["cards"]:
        for example in card["examples"]:
            tokens = [vocab[i] for i in example["id"]]
            joined = b"".join(tokens).decode("utf-8", "surrogateescape")
            assert "".join(example["text"]) == re.sub("[\udc80-\udcff]", "\ufffd", joined)
            assert example["length"] == len(example["text"]) == len(example["act"])
            seen |= set(tokens)
    assert seen >= set(NASTY)


def test_long_contexts_are_cut_around_the_peak() -> None:
    example = {
        **{"segment": 0, "ctx": 1, "first": 10, "length": 300, "peak": 150, "value": 2.0},
        **{"id": list(range(300)), "text": [f"t{i}" for i in range(300)]},
        **{"act": list(range(300)), "hex": {"3": "ff", "150": "e2", "299": "ac"}},
    }
    cut = page_features({"cards": [{"examples": [example]}], "latents": 0})["cards"][0]
    cut = cut["examples"][0]
    assert cut["first"] == 64
    assert cut["text"] == [f"t{i}" for i in range(54, 247)]
    assert cut["text"][cut["peak"]] == "t150"
    assert cut["act"] == list(range(54, 247))
    assert cut["hex"]["96"] == "e2"
    assert "id" not in cut


def test_cards_say_what_the_evaluation_says(run) -> None:
    features = json.loads((run[0] / "features.json").read_text("utf-8"))
    scores = json.loads((run[0] / "eval.json").read_text())
    assert features["n_tokens"] == scores["tokens"]
    assert features["n_contexts"] == scores["contexts"]
    assert features["n_dead"] == scores["dead_latents"]
    assert sum(features["latents"]["fires"]) == round(scores["l0"] * scores["tokens"])
    assert len(features["cards"]) == min(20, 48 - features["n_dead"])
    for card in features["cards"]:
        values = [e["value"] for e in card["examples"]]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(card["max"], rel=1e-4)
        assert card["fires"] == features["latents"]["fires"][card["id"]]
        for e in card["examples"]:
            assert e["act"][e["peak"]] == pytest.approx(e["value"], rel=1e-3)
            assert max(a for a in e["act"] if a is not None) == e["act"][e["peak"]]


def test_numbers_stand_beside_their_formula_and_token_count(run) -> None:
    data = data_of(run[0] / "report.html")
    scores = json.loads((run[0] / "eval.json").read_text())
    tiles = {t["label"]: t for t in data["tiles"]}
    assert tiles["FVE"]["value"] == f"{scores['fve']:.4g}"
    assert tiles["FVE"]["formula"] == "1 − Σ|x−y|² / (Σ|x−m0|² − n|x̄−m0|²)"
    assert set(tiles) == {"FVE", "PCA of equal rank", "L0", "MSE", "Dead latents"}
    assert all(f"{scores['tokens']:,} held-out tokens" in t["note"] for t in tiles.values())
    facts = dict(data["facts"])
    assert facts["Hook"] == "resid.2"
    assert facts["SAE"] == "topk, 48 latents on width 16, k = 4"
    assert run[1].store_id.startswith(facts["Store"])
    assert "torch" in facts["Versions"]
    assert str(run[0].parent) not in json.dumps(data), "the page names a folder of this machine"


def test_curves_join_rows_of_a_step_and_thin_long_logs() -> None:
    rows = [{"step": s, "tokens": 10 * s, "loss": 1 / s, "fve": 0.5} for s in range(1, 2001)]
    rows.insert(3, {"step": 2, "eval/fve": 0.4})
    rows.append({"step": 2001, "eval/fve": 0.45})  # an evaluation alone
    found = {c["title"]: c for c in charts(rows, {"fve": 0.6, "l0": 3.0})}
    assert list(found) == ["Loss", "FVE", "L0"]
    total = found["Loss"]["series"][0]["points"]
    assert found["Loss"]["stride"] == 3
    assert total[:2] == [[1, 10, 1.0], [4, 40, 0.25]]
    assert total[-1] == [2000, 20000, 1 / 2000]
    assert found["FVE"]["series"][1]["points"] == [[2, 20, 0.4], [2001, 20010, 0.6]]
    terms = [{"step": 1, "loss": 3.0, "loss/b": 1.0, "loss/a": 2.0}]
    assert [s["name"] for s in charts(terms, {})[0]["series"]] == ["total", "a", "b"]
    assert charts([], {}) == []


def test_numbers_that_are_not_finite_are_named() -> None:
    data = {"title": "a<b", "x": [float("nan"), np.float64("-inf"), 1.0], 3: {"y": float("inf")}}
    source = page(data)
    embedded = json.loads(Page(source).scripts["data"])
    assert embedded == {"title": "a<b", "x": ["nan", "-inf", 1.0], "3": {"y": "inf"}}
    assert "<title>a&lt;b</title>" in source


def test_a_run_without_a_store_gets_a_page_without_features(run, tmp_path: Path) -> None:
    copy = shutil.copytree(run[0], tmp_path / "run")
    (copy / "features.json").unlink()
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({k: v for k, v in record.items() if "id" not in k}))
    data = data_of(write_report(copy))
    assert data["features"] is None
    assert data["tiles"]
    assert not (copy / "features.json").exists()


def test_the_store_of_the_settings_is_found_and_another_is_refused(run, tmp_path: Path) -> None:
    copy = shutil.copytree(run[0], tmp_path / "run")
    example = data_of(write_report(copy))["features"]["cards"][0]["examples"][0]
    assert re.fullmatch(r"( w\d+|<eos>)+", "".join(example["text"]))  # the store's own vocabulary
    other = make_store(tmp_path / "other", segments=(64,), context=16).snapshot()
    with pytest.raises(TrainingError, match="was trained on store sha256"):
        write_report(copy, snapshot=other)
    (copy / "eval.json").unlink()
    with pytest.raises(TrainingError, match=r"eval\.json is missing"):
        write_report(copy)


# What a reader does: open a context, read a curve by key, point at a token, filter.
POKE = """<script>
document.querySelector(".kwic button").click();
document.querySelector(".plot").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
document.querySelector(".t.peak").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
const box = document.querySelector("input[type=search]");
const ask = (q) => {
  box.value = q;
  box.dispatchEvent(new Event("input"));
  return document.querySelectorAll("article:not([hidden])").length;
};
root.dataset.found = [ask("BOOM()"), ask("nowhere"), ask(""), ask("QUERY")];
root.dataset.wide = String(root.scrollWidth > innerWidth);
root.dataset.tip = tip.hidden ? "" : tip.textContent;
</script></body>"""


def dump_dom(html: Path, profile: Path) -> str:
    """The DOM after the scripts ran, as headless Chromium writes it. There is no network."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
        "--window-size=500,800 --proxy-server=127.0.0.1:9 --dump-dom"
    )
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", html.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8")


# F74: the page is drawn in a browser, from disk.
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not drawn")
def test_browser_draws_curves_cards_and_tokens(run, tmp_path: Path) -> None:
    poked = tmp_path / "report.html"
    source = (run[0] / "report.html").read_text("utf-8")
    cards = json.loads((run[0] / "features.json").read_text("utf-8"))["cards"]
    poke = POKE.replace("QUERY", str(cards[1]["id"]))
    poked.write_text(source.replace("</body>", poke), encoding="utf-8")
    found = Page(dump_dom(poked, tmp_path / "profile"))
    html = found.elements[0][1]
    assert "data-error" not in html, html["data-error"]
    assert html["data-ready"] == "true"
    assert html["data-wide"] == "false", "the page scrolls sideways on a small screen"
    assert "100 % of max" in html["data-tip"]
    assert "step 20, 1,280 tokens" in found.text
    left = [c["id"] for c in cards if str(cards[1]["id"]) in str(c["id"])]
    with_text = sum("boom()" in "".join(t for e in c["examples"] for t in e["text"]) for c in cards)
    assert html["data-found"] == f"{with_text},0,{len(cards)},{len(left)}"
    check_cards(found, cards, left)
    check_plots(found, json.loads((run[0] / "eval.json").read_text())["density"])
    check_text(found)


def check_cards(found: Page, cards: list[dict], left: list[int]) -> None:
    """One card per feature, one line per context, tokens marked; the filter leaves `left`."""
    drawn = found.having("card")
    assert [c["id"] for c in drawn] == [f"feature-{c['id']}" for c in cards]
    assert [c["id"] for c in drawn if "hidden" not in c] == [f"feature-{f}" for f in left]
    assert f"{len(left)} of {len(cards)} shown" in found.text
    n_lines = sum(len(c["examples"]) for c in cards)
    assert len(found.having("kwic")) == n_lines
    assert len(found.having("peak")) == n_lines + 1  # and one in the opened context
    assert len(found.having("full")) == 1
    shown = [
        a
        for c in cards
        for e in c["examples"]
        for a in e["act"][max(0, e["peak"] - 48) : e["peak"] + 49]
    ]
    opened = cards[0]["examples"][0]["act"]
    assert len(found.having("on")) == sum(bool(a) for a in shown + opened)
    assert len(found.having("out")) == sum(a is None for a in shown + opened)
    assert all(re.fullmatch(r"--a: ?[01]\.\d+;?", a["style"]) for a in found.having("on"))


def check_plots(found: Page, density: dict) -> None:
    lines = found.having("line")
    assert len(lines) >= 4
    assert all(re.fullmatch(r"M[\d.]+,[\d.]+(L[\d.]+,[\d.]+)*", a["d"]) for a in lines)
    assert len(found.having("bar")) == sum(c > 0 for c in density["counts"]) + 1
    zero = [a for a in found.having("bar") if "zero" in a["class"]]
    assert zero[0]["data-tip"].startswith(f"{density['zero']} latent")
    for label in ("training tokens", "density: share of tokens a latent fires on", "10⁻¹"):
        assert label in found.text


def check_text(found: Page) -> None:
    """Nasty tokens are text, and nothing of them became an element."""
    assert "</script><script>boom()</script>" in found.text
    assert {k for k in found.scripts if k} == {"data"}
    assert not any("boom()" in s for k, s in found.scripts.items() if k != "data")
    for piece in ("🙂", "日本語", "↵", "⇥", "⟨U+202E⟩", "␀", "&amp; {{js}}", "\ufffd"):
        assert piece in found.text, piece
    tips = [a["data-tip"] for _, a in found.elements if "data-tip" in a]
    assert any(t.startswith("bytes 99 82\n") for t in tips)
    assert any("not counted" in t for t in tips)


def test_static_files_are_small_and_in_the_package() -> None:
    static = files("saetrain.dashboard") / "static"
    lines = {p.name: len(p.read_text("utf-8").splitlines()) for p in static.iterdir()}
    assert set(lines) == {f"{n}.{e}" for n in ("report", "sweep") for e in ("html", "css", "js")}
    assert max(lines.values()) < 300
