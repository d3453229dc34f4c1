"""zoo_figures.py and what analyze.py makes of zoo.json: each figure shows the numbers of its finding; what is missing
is named; and the Pareto chart stays readable with all of zoo.py's kinds."""
import contextlib
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_analyze import Page, again, named_commands, parses

import analyze
import effects
import figures
import gates
import router
import zoo
import zoo_figures

PART = [0.02, 0.01, 0.03]


def line(system, detail, **changes):
    return {"system": system, "claim": f"<b> {system} helps", "paper": "a paper's number", "effect": 0.0217,
            "ci": [0.0117, 0.0317], "unit": "nats", "verdict": "holds", "seeds": [1, 2], "sequences": 64,
            "command": f"python effects.py --name={system}", "checkpoint": "now", "detail": detail} | changes


def planted():
    """-> {system: a finding with every field that its figure needs}, numbers that are easily found again"""
    kinds = ["linear", "mlp", "rmoe_np", "rmoe_detach", "rmoe"]
    per_kind = {name: [[i / 10, i / 10 - 0.01, i / 10 + 0.01], [0.5, 0.4, 0.6]] for i, name in enumerate(kinds)}
    told = {x: {"told": [share, share - 0.01, share + 0.01]}
            for x, share in (("token id", 0.6), ("domain", 0.1), ("position", 0.0))}
    told["position"]["told"] = [0.0, None, None]  # nan in JSON
    gains = dict.fromkeys(("own", "other", "random", "future"), PART)
    chunks = {name: [0.0, -0.1 * i] for i, name in enumerate(gains)}
    known = dict.fromkeys(("accuracy", "chance", "majority", "r2_advantage", "r2_raw"), 0.25)
    return {
        "rmoe": line("rmoe", {"kinds": kinds, "budgets": [4.0, 8.0], "minus_fixed": per_kind, "by_seed": {"1": PART},
                              "mutual_information": per_kind}),
        "openmoe": line("openmoe", {
            "budget": 4.0, "choices_told_by": dict.fromkeys(("oracle", "linear", "rmoe_np", "token_id"), told),
            "early": {"share_of_training": [0.1, 1.0], "agreement": [0.7, 1.0], "by_chance": [0.5, 0.6]},
            "drop": {"places": 9, "overflow": {"in": [PART] * 8, "out": [PART] * 8},
                     "loss_minus_linear": [PART] * 8}}),
        "tryage": line("tryage", {
            "budgets": [{"k": k, "seed": s, "achieved": k + 0.1, "linear": 3.0 + s, "linear_minus_tryage": PART}
                        for k in (4.0, 8.0) for s in (1, 2)],
            "curve_price_budget_loss": [[1.0, 0.0, 5.0], [0.1, 6.0, 4.0]], "known": known}),
        "arch": line("arch", {"domains": ["code", "prose", "cpp"], "chance": 1 / 3, "loss_before_minus_after": PART,
                              **{name: [0.9, 0.8, 0.7] for name in ("before", "after", "untrained", "softmax",
                                                                    "softmax_retrained")}}),
        "glider": line("glider", {"s": [0, 1, 4], "domains": ["code", "cpp"], "chosen_s": 4, "best_s_on_mix": 1,
                                  "gains_held_in": [PART, [0.05, 0.04, 0.06]], "gains_held_out": [PART, PART]}),
        "rewire": line("rewire", {"every": 4.0, "flops": 30.0, "flops_all_big": 2.0, "budget": 4.0,
                                  "code": {"gain": gains, "by_chunk": chunks}}, seeds=[1]),
        "lora_mixer": line("lora_mixer", {"budget": 4.0, "routers": {name: {"minus_single": PART} for name in (
            "lora_mixer", "lora_single", "linear", "lora_sharp", "lora_mixer_few", "lora_single_few")}}),
    }


COMMANDS = {"effects": "python effects.py --out_dir=x", "routers": "python router.py --out_dir=x"}


def drawn(system, finding):
    return zoo_figures.FIGURES[f"zoo_{system}"][1]({"zoo": {system: finding}, "commands": COMMANDS})


@pytest.fixture(autouse=True)
def close():
    yield
    figures.plt.close("all")


def heights(axis, label):
    """-> y of the points with that label"""
    return [np.asarray(c.lines[0].get_ydata(), float).tolist() for c in axis.containers if c.get_label() == label]


@pytest.mark.parametrize("system", list(zoo_figures.SYSTEMS))
def test_figure_and_its_message(system):
    figure, caption = drawn(system, planted()[system])
    title = figure.get_suptitle()
    for text in (title, caption):
        assert "0.0217 (+0.0117 to +0.0317)" in text and "64 sequences" in text and "olds: " in text
        assert ("1 seed" if system == "rewire" else "2 seeds") in text and "nan" not in text.split()
        assert "above 0 is better" in text
    assert "a paper's number" in caption and f"{system} helps" in caption
    for axis in figure.axes:
        assert axis.get_xlabel() or any(label.get_text() for label in axis.get_xticklabels())
        for label in (axis.get_legend().get_texts() if axis.get_legend() else ()):
            assert label.get_text()
    figure.draw_without_rendering()


def test_figures_show_the_findings_numbers():
    lines = planted()
    axes = drawn("rmoe", lines["rmoe"])[0].axes
    assert heights(axes[0], "rmoe") == heights(axes[1], "rmoe") == [[0.4, 0.5]]
    assert heights(axes[0], "mlp") == [[0.1, 0.5]]
    axes = drawn("openmoe", lines["openmoe"])[0].axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["oracle", "linear", "token_id"]  # no control
    assert list(axes[1].get_lines()[0].get_ydata()) == [0.7, 1.0]
    axes = drawn("tryage", lines["tryage"])[0].axes
    ours, linear = axes[0].get_lines()
    assert ours.get_ydata().tolist() == [5, 4] and list(linear.get_ydata()) == [4.5, 4.5]  # mean over seeds
    assert len(axes[1].containers) == 2  # seeds
    (axis,) = drawn("arch", lines["arch"])[0].axes
    bar = next(found for found in axis.get_lines() if len(found.get_xdata()) == 2 and found.get_lw() == 1.5
               and found.get_ls() == "-")
    assert list(bar.get_ydata()) == pytest.approx([0.0117 + 1 / 3, 0.0317 + 1 / 3])
    (axis,) = drawn("glider", lines["glider"])[0].axes
    assert heights(axis, "held-in (code)") == [[0.02, 0.05]]
    axes = drawn("rewire", lines["rewire"])[0].axes
    (future,) = (found for found in axes[0].get_lines() if found.get_label().startswith("learned on the future"))
    assert future.get_xdata().tolist() == [2, 6] and future.get_ydata().tolist() == pytest.approx([0, -0.3])
    (axis,) = drawn("lora_mixer", lines["lora_mixer"])[0].axes
    names = [label.get_text().split("\n")[0] for label in axis.get_xticklabels()]
    assert names == ["lora_mixer", "lora_sharp", "linear"]
    assert len(heights(axis, "few sequences")[0]) == 1 and len(heights(axis, "many sequences")[0]) == 2


NEEDED = [(system, key) for system, finding in planted().items() for key in finding["detail"] if (system, key) not in (
    ("rewire", "budget"), ("rewire", "code"))]


@pytest.mark.parametrize("system, key", NEEDED)
def test_a_missing_field_is_named(system, key):
    finding = planted()[system]
    del finding["detail"][key]
    with pytest.raises(figures.Missing, match=rf"(?s){system}.*{key}.*effects.py.*--name={system}"):
        drawn(system, finding)


@pytest.mark.parametrize("system", list(zoo_figures.SYSTEMS))
def test_partial_findings(system):
    """Nothing measured, and every field that holds a list or a table empty."""
    names = ",".join(effects.COMPARED[system])
    with pytest.raises(figures.Missing, match=f"no finding on {system} of this checkpoint.*router.py --out_dir=x "
                                              f"--name={names} --budget=4 && python effects.py"):
        drawn(system, None)
    finding = planted()[system]
    finding["detail"] = {}
    with pytest.raises(figures.Missing):
        drawn(system, finding)
    for key, value in planted()[system]["detail"].items():
        if isinstance(value, list | dict):
            finding = planted()[system]
            finding["detail"][key] = type(value)()
            try:
                drawn(system, finding)
            except figures.Missing as error:
                assert system in str(error)


def test_fewer_routers_are_drawn_as_they_are():
    lines = planted()
    lines["rmoe"]["detail"]["kinds"] = ["rmoe_np", "rmoe"]
    del lines["openmoe"]["detail"]["choices_told_by"]["oracle"]
    lines["lora_mixer"]["detail"]["routers"] = {name: {"minus_single": PART} for name in ("lora_mixer", "lora_single")}
    for system in ("rmoe", "openmoe", "lora_mixer"):
        assert drawn(system, lines[system])


# ---------------------------------------------------------------------------------------------------------------------
# the report

def run_with(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "oracle.json").write_text(json.dumps({"checkpoint": "now", "seed": 7}))
    (folder / "zoo.json").write_text(json.dumps(lines))
    printed = again(folder)[1]
    return printed, (folder / "report.html").read_text()


def test_report(tmp_path):
    lines = planted()
    lines["glider"]["checkpoint"] = "another"
    printed, page = run_with(tmp_path, list(lines.values()))
    Page(page)  # is valid
    there = [system for system in lines if system != "glider"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {f"zoo_{system}" for system in there}
    section = page[page.index('<h2 id="zoo">'):page.index('<h2 id="missing">')]
    for system in there:
        assert f'<th scope="row">{system}</th>' in section and f'<figure id="zoo_{system}">' in section
        assert f"&lt;b&gt; {system} helps" in section and f"python effects.py --name={system}" in section
    assert "glider" not in section.replace("zoo_glider", "") and "zoo_" not in page[:page.index('<h2 id="zoo">')]
    (missing,) = (text for text in printed.splitlines() if text.startswith("not drawn: GLIDER"))
    make, command = named_commands(missing)
    parses(make)
    parses(command)
    assert "{{" not in page and section.count("+0.0217 (+0.0117 to +0.0317), nats; ") >= 5


def test_report_without_findings(tmp_path):
    assert "None was measured in this run" in run_with(tmp_path, [])[1]


# ---------------------------------------------------------------------------------------------------------------------
# many kinds in the other figures

def all_routers(S=6, T=4, L=12):
    """-> material for pareto(): a router of every kind there is, at two budgets"""
    g = np.random.default_rng(1)
    routers = {}
    for name in (*router.NAMES, *zoo.KINDS):
        for k in (4.0, 8.0):
            routes = np.ones((S, T, L), np.uint8)
            routes[..., :int(k)] = 2
            notes = {"name": name, "choices": "sb", "budget": k, "skip_budget": None, "seed": 1}
            routers[f"{name}_k{k:g}_s1"] = {"notes": json.dumps(notes), "routes": routes, "domain": np.zeros(S, int),
                                            "losses": 3 + g.normal(0, 0.1, (S, T))}
    losses = 3 + g.normal(0, 0.1, (S, L + 1))
    return {"routers": routers, "times": {}, "contexts": {},
            "commands": dict.fromkeys(("train", "oracle"), "python x.py"),
            "base": {key: (losses, np.arange(S)) for key in ("all_big", "fixed", "oracle", "random")},
            "windows": {"idx": np.zeros((S, T), int), "domain": np.zeros(S, int), "domains": np.array(["code"])}}


def test_pareto_of_all_kinds():
    run = all_routers()
    figure, _ = figures.pareto(run)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    shown = {name.removeprefix("router: ") for name in names if name.startswith("router: ")}
    assert shown == {*router.NAMES, *figures.ZOO_MARKER} and len(names) == len(set(names))
    assert set(zoo.KINDS) - shown == {name for name in zoo.KINDS if figures.is_control(name)}
    for axis in figure.axes[:2]:  # the paper's, and no others
        assert not {f"router: {name}" for name in zoo.KINDS} & set(axis.get_legend_handles_labels()[1])
    assert not {f"router: {name}" for name in router.NAMES[1:]} & set(figure.axes[2].get_legend_handles_labels()[1])
    shown = {round(float(c.lines[0].get_ydata()[0]), 6) for c in figure.axes[2].containers
             if c.get_label() == "router: rmoe"}
    fixed = run["base"]["fixed"][0].mean(0)
    assert shown == {round(run["routers"][f"rmoe_k{k}_s1"]["losses"].mean() - fixed[k], 6) for k in (4, 8)}
    markers = [*figures.ZOO_MARKER.values()], [*figures.ROUTER_MARKER.values()]
    assert all(len(set(group)) == len(group) for group in markers)
    figure.draw_without_rendering()
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0  # the legend is not cut


def test_the_papers_figures_stay_about_its_routers():
    run = all_routers()
    assert set(figures.kinds(run)) == set(router.NAMES)
    only_zoo = copy.copy(run) | {"routers": {stem: arrays for stem, arrays in run["routers"].items()
                                             if stem.startswith("rmoe")}}
    only_zoo["commands"] = dict.fromkeys(("router", "routers", "train"), "python router.py")
    for name in ("figure_3", "figure_7"):
        with pytest.raises(figures.Missing, match="no routers"):
            figures.FIGURES[name][1](only_zoo)


def test_rewire_and_controls_are_not_timed(monkeypatch, tmp_path):
    run = all_routers()
    (tmp_path / "routers").mkdir()
    for stem in run["routers"]:
        (tmp_path / "routers" / f"{stem}.pt").touch()
    monkeypatch.setattr(router, "load_router", lambda path, *rest: (path.stem, {}))
    model = type("Model", (), {"config": type("Config", (), {"n_layer": 12})})
    timed = analyze.policies(run | {"model": model, "label": {}, "patterns": {}, "folder": tmp_path,
                                    "checkpoint": "now", "device": "cpu"})
    kinds = {name.partition(" ")[0] for name in timed} - {"fixed"}
    assert kinds == {*router.NAMES, *figures.ZOO_MARKER} - {"rewire"}


def test_a_router_is_timed_where_it_is_attached(monkeypatch, tmp_path):
    seen = []

    class Attached(gates.Router):
        def __init__(self):
            torch.nn.Module.__init__(self)

        @contextlib.contextmanager
        def attached(self, model):
            seen.append("in")
            yield
            seen.append("out")

    class Model:
        config = SimpleNamespace(n_layer=12)

        def __call__(self, idx, route):
            seen.append("fixed" if isinstance(route, int) else "routed")
    monkeypatch.setattr(analyze, "policies", lambda made: {"fixed 12": 2, "rmoe 4": Attached()})
    made = {"folder": tmp_path, "model": Model(), "label": {"idx": np.zeros((2, 4), int)}, "checkpoint": "now",
            "device": torch.device("cpu")}
    assert set(analyze.time_policies(made, 1)["times"]) == {"fixed 12", "rmoe 4"}
    assert seen == ["fixed", "in", "routed", "out"] * 2
