"""slides.py: sizes and themes, titles that follow the run's numbers (also the other way round), and what is missing."""
import contextlib
import io
import json
import math

import matplotlib.image
import numpy as np
import pytest
from conftest import user_error
from matplotlib.text import Text
from test_analyze import planted
from test_zoo_figures import planted as zoo_findings

import analyze
import figures
import slides
from common import parse_config
from model import BIG, SMALL, DuoConfig, DuoGPT

L = 12


def router(run, lead):
    """A router that loses `lead` less than the best fixed pattern of the k = 4 it spends"""
    label = run["label"]
    routes = np.full((*label["idx"].shape, L), SMALL)
    routes[..., :4] = BIG
    losses = run["base"]["fixed"][0][:, 4, None] - lead + 0 * label["losses"][0]
    noise = np.random.default_rng(3).normal(0, 0.01, losses.shape)
    notes = {"name": "linear", "budget": 4.0, "choices": "sb", "seed": 5, "skip_budget": None}
    return {"routes": routes, "losses": losses + noise, "notes": json.dumps(notes), "domain": label["domain"]}


@pytest.fixture
def run(tmp_path):
    """All that the nine slides are made of, by hand: the oracle has its least loss, 2, at k=6; see deep_files()."""
    run = analyze.read(parse_config(analyze.AnalyzeConfig, [f"--out_dir={planted(tmp_path)}", "--device=cpu"],
                                    analyze.PRESETS))
    domains = {name: {kind: {"loss": loss} for kind, loss in (("small", 4.5), ("random", 4.25), ("big", 4.125))}
               for name in ("code", "prose")}
    run["metrics"] = [{"kind": "eval", "step": step, "domains": domains} for step in (1, 2)]
    curve = np.tile(np.array([3, 2.5, 2.25]), (L + 1, 40, 1)) + np.random.default_rng(1).normal(0, 0.01, (1, 40, 1))
    run["patterns"] = run["patterns"] | {"curve": curve, "curve_n": np.array([1, 2, 4])}
    parts = {"gain": [0.5, 0.4, 0.6], "foresight": [0.125, 0.1, 0.15], "hindsight": [0.375, 0.3, 0.4]}
    run["controls"] = [{"domain": "all", "k": 6, "sequences": 40, "learnable": [0, 0, 0], **parts}]
    run["routers"] = {"linear_k4_s5": router(run, 0.1)}
    run["model"] = DuoGPT(DuoConfig(n_layer=L, n_head=2, n_embd=16, block_size=8, vocab_size=40))
    times = {"fixed 4": 0.75, "fixed 12": 1.0, "oracle 4": 0.9, "linear 4": 1.25}
    run["times"] = {name: [time, time - 0.1, time + 0.1] for name, time in times.items()}
    run["times_on"] = {"device": "a CPU", "batch": "2 sequences", "rounds": 3}
    run["zoo"] = zoo_findings()
    yield run
    figures.plt.close("all")


def title(name, run, **changes):
    return getattr(slides, name)(run | changes)[1]


def test_every_slide_in_both_themes(run):
    drawn, lacking = slides.write(run, "python analyze.py --slides")
    folder = run["folder"] / "slides"
    assert not lacking and [file[:2] for file, _ in drawn] == [f"{i}_" for i in range(1, 10)]
    for file, _ in drawn:
        for theme, (page, _) in slides.THEMES.items():
            picture = matplotlib.image.imread(folder / theme / file)
            assert picture.shape[:2] == (1080, 1920)
            empty = [np.allclose(part[..., :3], matplotlib.colors.to_rgb(page), atol=0.02) for part in (
                picture[:10], picture[-10:], picture[:, :8], picture[:, -8:],  # nothing is cut at the edges
                picture[40:90, 40:500], picture[1000:, 40:500])]  # title, footer
            assert empty == [True] * 4 + [False] * 2
    page = (folder / "slides.html").read_text()
    assert len(page.splitlines()) <= 40 and "http" not in page and json.dumps(drawn) in page


@pytest.mark.parametrize("name, changes, script", [
    ("stage1", {"metrics": []}, "train"), ("gap", {"patterns": {}, "patterns_context": ""}, "oracle"),
    ("split", {"controls": []}, "train"), ("selection", {"patterns": {}}, "oracle"), ("where", {"label": {}}, "oracle"),
    ("tokens", {"label": {}}, "oracle"), ("routers", {"routers": {}}, "router"), ("routers", {"contexts": {}}, "train"),
    ("savings", {"times": {}}, "analyze"), ("savings", {"model": None}, "train"), ("zoo", {"zoo": {}}, "router")])
def test_what_is_missing_is_named(run, name, changes, script, monkeypatch):
    """... with the command that makes it, and a picture of an earlier state of the run does not stay."""
    monkeypatch.setattr(slides, "SLIDES", (getattr(slides, name),))
    old = [run["folder"] / "slides" / theme / f"1_{name}.png" for theme in slides.THEMES]
    for path in old:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
    drawn, ((lacking, text),) = slides.write(run | changes, "")
    assert drawn == [] and lacking == name and f"make it with `python {script}.py" in text
    assert not any(path.exists() for path in old)


@pytest.mark.parametrize("theme", slides.THEMES)
def test_type_is_large_and_has_contrast(run, theme):
    def light(colour):  # WCAG's relative luminance
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        return np.dot(np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), (0.2126, 0.7152, 0.0722))
    page, ink = slides.THEMES[theme]
    with figures.plt.rc_context({"text.color": ink}):
        shades = [ink, *(slides.readable(colour) for colour in figures.COLOUR.values())]
        figure, message, _ = slides.tokens(run)  # figures.py's smallest type
        slides.finish(figure, message, "footer")
    for shade in shades:
        low, high = sorted((light(shade), light(page)))
        assert (high + 0.05) / (low + 0.05) > 4.5
    assert all(text.get_fontsize() >= 20 for text in figure.findobj(Text) if text.get_text() != "footer")


def test_titles_have_the_runs_numbers(run):
    assert title("stage1", run) == ("Random routing trains one model for every budget: all-small 4.50, random routes "
                                    "4.25, all-big 4.12 nats")
    fixed, oracle = run["patterns"]["fixed"][6].mean(), run["label"]["losses"][7].mean()  # labels: any, 0, ...
    text = title("gap", run)
    assert f"at k=6 perplexity {math.exp(oracle):.1f} against {math.exp(fixed):.1f}, " in text
    assert f"{fixed - oracle:.2f} nats better than the best fixed pattern" in text
    assert title("split", run) == ("At k=6 the oracle gains 0.50 nats: at least 0.12 nats of it could be foreseen, at "
                                   "most 0.38 nats is hindsight")
    big = run["patterns"]["fixed"][-1].mean()
    assert f"best of 4 random routes (k=2) is {big - run['patterns']['curve'][2, :, -1].mean():.2f} nats better" in (
        title("selection", run))
    assert "earlier at k=8 than at k=4: mean depth 0.64 at k=4, 0.50 at k=6" in title("where", run)
    assert "gain less than half a nat" in title("tokens", run)
    assert title("routers", run).startswith("Of 1 routers 1 beat the best fixed pattern of equal compute, 0 are worse")
    flops = run["model"].flops
    share = (4 * flops(BIG) + 8 * flops(SMALL)) / 12 / flops(BIG)
    assert title("savings", run) == (f"At k=4 FLOPs fall by {1 - share:.0%}; time falls by 25% with one pattern, rises "
                                     "by 25% with the linear router")
    assert title("zoo", run) == "7 claims from other papers, tested here: holds 7, fails 0, undecided 0"


def test_titles_follow_the_data_the_other_way_round(run):
    domains = {"code": {kind: {"loss": loss} for kind, loss in (("small", 3), ("big", 5))}}
    metrics = [{"kind": "start", "config": {"train_route": "big"}}, {"kind": "eval", "step": 1, "domains": domains}]
    assert title("stage1", run, metrics=metrics) == "Trained with big routes: all-small 3.00, all-big 5.00 nats"
    worse = run["patterns"] | {"fixed": run["patterns"]["fixed"] - 2}
    assert "nats worse than the best fixed pattern" in title("gap", run, patterns=worse)
    assert "nats worse than all-big" in title("selection", run, patterns=worse)
    row = run["controls"][0]
    assert "none of it could be foreseen for sure" in title(
        "split", run, controls=[row | {"foresight": [0.01, -0.1, 0.1]}])
    assert "nothing to foresee" in title("split", run, controls=[row | {"gain": [-0.1, -0.2, 0.0]}])
    mirrored = run["label"] | {"routes": run["label"]["routes"][..., ::-1]}
    assert "lie later at k=8 than at k=4" in title("where", run, label=mirrored)
    even = np.where(np.arange(L) % 2, BIG, SMALL) + 0 * run["label"]["routes"]
    assert "as deep at k=8 as at k=4" in title("where", run, label=run["label"] | {"routes": even})
    for lead, words in ((-0.1, "0 beat the best fixed pattern of equal compute, 1 are worse"), (0, "1 cannot be told")):
        assert words in title("routers", run, routers={"linear_k4_s5": router(run, lead)})
    slow = {name: [2 - time for time in part] for name, part in run["times"].items()}
    assert "time rises by 25% with one pattern, falls by 25% with" in title("savings", run, times=slow)
    lines = {name: line | {"verdict": "fails"} for name, line in run["zoo"].items() if name in ("rmoe", "glider")}
    figure, text, about = slides.zoo(run | {"zoo": lines})
    assert text.endswith("holds 0, fails 2, undecided 0") and "openmoe, tryage" in about and "effects.py" in about


def test_footer(run, monkeypatch):
    footers = []
    monkeypatch.setattr(slides, "SLIDES", (slides.routers,))
    monkeypatch.setattr(slides, "finish", lambda figure, message, footer: footers.append(footer))
    slides.write(run, "python analyze.py --slides")
    for part in (run["folder"].name, "40 sequences", "routers' seeds [5]", "base seed 7", "analyze.py --slides"):
        assert part in footers[0] and part in footers[1]


def test_command_and_bad_input(run, tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "SLIDES", (slides.gap, slides.routers))
    argv = [f"--out_dir={run['folder']}", "--device=cpu", "--slides"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert not analyze.main(argv)
    for part in ("1_gap.png: The oracle knows", "not drawn: routers: no routers; make it with `python router.py"):
        assert part in out.getvalue()
    assert out.getvalue().endswith("slides.html\n") and not (run["folder"] / "report.html").exists()
    user_error(lambda: analyze.main([*argv, "--check"]), "--slides", "--check")
    (tmp_path / "none").mkdir()
    user_error(lambda: analyze.main([f"--out_dir={tmp_path / 'none'}", "--device=cpu", "--slides"]), "--slides",
               "no searches", "python oracle.py")
