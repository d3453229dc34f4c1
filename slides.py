"""Slides to teach from (`python analyze.py --slides`): the story of a run in nine pictures, large type, light and dark.

Most are figures.py's, cut to the axes that carry one message. Each function gives a figure, that message, and what the
footer says about the data. Every number of a message is computed, and its words follow the number's sign and interval:
a run that turns out the other way gets another title.

Files, in out_dir/slides: light/1_stage1.png ... and the same in dark/, 1920 x 1080, and slides.html, which shows them.
"""
import io
import json
import math
import textwrap

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color, to_rgb
from matplotlib.text import Text

import claims
import figures
import zoo_figures
from common import write_atomic
from figures import COLOUR, INK, MARKER, Missing, need, notes_of, plt
from model import BIG, SMALL
from story import router_gains

THEMES = {"light": ("#ffffff", INK), "dark": ("#14181f", "#e8ecf2")}  # page, ink: the report's
SIZE, DPI = 22, 120  # points of the type; 16 x 9 inches
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nanoduo: slides of a run</title>
<style>body { margin: 0 } img { width: 100vw; height: 100vh; object-fit: contain; display: block }</style>
<img id="slide" alt="">
<script>
// arrow keys, space or a click: next, previous; t: light or dark, which is at first as the system has it
const slides = SLIDES;
let at = 0, dark = matchMedia("(prefers-color-scheme: dark)").matches;
function show(step) {
  at = Math.max(0, Math.min(at + step, slides.length - 1));
  [slide.src, slide.alt] = [(dark ? "dark/" : "light/") + slides[at][0], slides[at][1]];
  document.body.style.background = dark ? "#14181f" : "#ffffff";
}
onkeydown = event => {
  if (event.key === "t") dark = !dark;
  show({ArrowRight: 1, ArrowDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1}[event.key] || 0);
};
onclick = () => show(1);
if (slides.length) show(0);
</script>
"""


def nats(value):
    return f"{abs(value):.{2 if abs(value) >= 0.095 else 3}f} nats"


def than(part, other):
    """(gain, low, high) -> how much better or worse than `other`, in words"""
    gain, low, high = part
    return (f"{nats(gain)} {'better' if low > 0 else 'worse'} than {other}" if low > 0 or high < 0 else
            f"not clearly apart from {other} ({gain:+.3f} nats)")


# ---------------------------------------------------------------------------------------------------------------------
# looks

def cut(figure, *axes, **changes):
    """These axes alone, side by side, without legends; lines for the last row. -> the last one, with `changes`"""
    for axis in [axis for axis in figure.axes if axis not in axes]:
        axis.remove()
    for legend in [*figure.legends, *filter(None, (axis.get_legend() for axis in axes))]:
        legend.remove()
    grid = figure.add_gridspec(1, len(axes))
    for i, axis in enumerate(axes):
        axis.set_subplotspec(grid[i])
        for line in axis.lines:
            line.set(lw=2.2 * line.get_lw(), ms=2.2 * line.get_ms(), mew=2 * line.get_mew())
        for part in axis.collections:
            part.set_linewidth(2.2 * part.get_linewidth())
    axis.set(**changes)
    return axis


def label_ends(axis, line_height=0.068):
    """In place of a legend: each line's name at the right, at the height where it ends; those nearer
    than a line of text (as a share of the axes' height) pushed apart."""
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
    low, high = axis.get_ylim()
    lines = [line for line in axis.lines if not line.get_label().startswith("_") and len(line.get_ydata())
             and np.min(line.get_ydata()) < high and np.max(line.get_ydata()) > low]
    ends = axis.transData.transform([(axis.get_xlim()[0], line.get_ydata()[-1]) for line in lines])
    y = axis.transAxes.inverted().transform(ends)[:, 1].clip(0, 1)
    order = np.argsort(y, kind="stable")
    for a, b in [*zip(order, order[1:])] * 100:
        lack = max(0, line_height - (y[b] - y[a])) / 2
        y[a], y[b] = y[a] - lack, y[b] + lack
    for line, height in zip(lines, y, strict=True):
        axis.text(1.015, height, line.get_label().partition(" (")[0], va="center", transform=axis.transAxes,
                  color=readable(line.get_color()))


def readable(colour):
    """A policy's colour as text: nearer to the ink, so that yellow can be read on white."""
    return tuple(0.55 * np.array(to_rgb(colour)) + 0.45 * np.array(to_rgb(plt.rcParams["text.color"])))


def key(axis, order=lambda name: 0, **where):
    """A legend beside the axes, each name once, sorted by order(name)."""
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    names = sorted(handles, key=order)
    axis.legend([handles[name] for name in names], names, labelspacing=1, **where or {
        "loc": "center left", "bbox_to_anchor": (1.01, 0.5)})


def finish(figure, message, footer):
    """Size, title and footer; what figures.py draws in its own ink, in this theme's."""
    figure.set_size_inches(1920 / DPI, 1080 / DPI)
    ink = plt.rcParams["text.color"]
    for text in figure.findobj(Text):
        text.set_fontsize(max(SIZE, text.get_fontsize()))
    for part in figure.findobj(lambda artist: isinstance(artist, (plt.Line2D, LineCollection))):
        if same_color(part.get_color(), INK):
            part.set(color=ink, **{"mec": ink} if isinstance(part, plt.Line2D) else {})
    width = min(70, len(message) // math.ceil(len(message) / 70) + 10)  # lines of about the same length
    figure.text(0.02, 0.965, textwrap.fill(message, width), va="top", fontsize=30)
    figure.text(0.02, 0.02, textwrap.fill(footer, 165), va="bottom", fontsize=12, alpha=0.8)
    figure.get_layout_engine().set(rect=(0.015, 0.09, 0.97, 0.75))


# ---------------------------------------------------------------------------------------------------------------------
# the slides, in the order of the story

def stage1(run):
    figure, _ = figures.stage1(run)
    label_ends(cut(figure, *figure.axes, ylabel=""))
    last = [line for line in run["metrics"] if line["kind"] == "eval"][-1]["domains"].values()
    means = {kind: np.mean([losses[kind]["loss"] for losses in last]) for kind in next(iter(last))}
    how = run["metrics"][0].get("config", {}).get("train_route", "random")
    return figure, ("Random routing trains one model for every budget: " if how == "random" else
                    f"Trained with {how} routes: ") + ", ".join(
        f"all-{kind} {loss:.2f}".replace("all-random", "random routes") for kind, loss in means.items()
    ) + " nats", "means over the domains' validation text"


def gap(run):
    context, patterns, windows = run["contexts"].get("oracle"), run["patterns"], run["windows"]
    need(context and patterns if context == run["patterns_context"] else None,
         "no search of all budgets with baselines of its context", run["commands"]["oracle"])
    fixed = claims.baseline_losses(patterns)["fixed"].T, claims.shared(patterns, windows)
    one = run | {"routers": {}, "base": run["base"] | {"fixed": fixed}, "windows": windows | {  # all in one context,
        "domain": np.zeros(len(windows["idx"]), int), "domains": [""]}}  # and in one panel
    figure, _ = figures.figure_4b(one)
    axis = cut(figure, figure.axes[0], xlabel="k (BIG layers per token)")
    for shade in list(axis.collections):  # the sequences' spread, which all policies share; the difference is paired
        shade.remove()
    axis.relim()
    axis.autoscale()
    rows, base = figures.on_common_windows(one)
    k = int((base["fixed"] - base["oracle"]).mean(0).argmax())
    at_k = {figures.POLICIES[name]: losses[:, k].mean() for name, losses in base.items()}
    key(axis, lambda name: -at_k[name])  # from above to below, as the curves
    part = claims.interval(base["fixed"][:, k] - base["oracle"][:, k])
    return figure, (f"The oracle knows the next token: at k={k} perplexity {math.exp(at_k['oracle']):.1f} against "
                    f"{math.exp(at_k['fixed']):.1f}, {than(part, 'the best fixed pattern')}"), (
        f"{len(rows)} sequences, {context} context, 95% interval of the gain {part[1]:+.3f} to {part[2]:+.3f}".replace(
            "+nan to +nan", "not known"))


def split(run):
    controls = [row | {"learnable": [math.nan] * 3} for row in run["controls"]]  # a bar's two parts are enough here
    figure, _ = figures.split(run | {"routers": {}, "controls": controls})
    axis = cut(figure, figure.axes[0], ylabel="gain over the best\nfixed pattern (nats)")
    key(axis, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    row = max(controls, key=lambda row: row["gain"][0])
    foreseen = (f"at least {nats(row['foresight'][0])} of it could be foreseen"
                if claims.number(row["foresight"][1]) > 0 else "none of it could be foreseen for sure")
    return figure, (f"At k={row['k']} the oracle gains {nats(row['gain'][0])}: {foreseen}, at most "
                    f"{nats(row['hindsight'][0])} is hindsight" if row["gain"][0] > 0 else
                    "The oracle gains nothing over the best fixed pattern: there is nothing to foresee"), (
        f"{row['sequences']} sequences, {run['controls_context']} context")


def selection(run):
    figure, _ = figures.selection(run)
    axis = cut(figure, figure.axes[0], ylabel="loss - all-big's (nats)")
    label_ends(axis)
    lowest = min((line for line in axis.lines if line.get_label().startswith("k=")), key=lambda x: x.get_ydata()[-1])
    k, tries = lowest.get_label(), lowest.get_xdata()[-1]
    curve = run["patterns"]["curve"][int(k[2:])][:, run["patterns"]["curve_n"] == tries][:, 0]
    part = claims.interval(run["patterns"]["fixed"][-1].mean(-1) - curve)
    return figure, (f"Picked by the label: per token, the best of {tries} random routes ({k}) is "
                    f"{than(part, 'all-big')}"), (f"{len(curve)} sequences, {run['patterns_context']} context")


def where(run):
    label = need(run["label"], "no search of {SMALL, BIG} routes", run["commands"]["oracle"])
    figure, _ = figures.figure_2abc(run | {"label": label | {"domain": 0 * label["domain"], "domains": np.array([""])}})
    axis = cut(figure, next(axis for axis in figure.axes if axis.lines), title="", ylabel="layer (0 is the first)")
    big = {}
    for line in axis.lines:
        k = line.get_label()
        big[k] = (figures.lane(label, k[2:])[0] == BIG).mean(1)  # [S, L]
        axis.annotate(k, (line.get_xdata()[-1], line.get_ydata()[-1]), (0, 14), textcoords="offset points",
                      ha="center", color=readable(COLOUR["oracle"]))
    L, (fewest, *_), (*_, most) = label["routes"].shape[-1], big.values(), big.values()
    _, low, high = claims.interval(np.hstack((fewest, most)), lambda m: (
        claims.centre_of_mass(m[..., :L]) - claims.centre_of_mass(m[..., L:])))
    ks = [*big]
    moves = ("The oracle's BIG layers lie " + (f"earlier at {ks[-1]} than at {ks[0]}" if low > 0 else
             f"later at {ks[-1]} than at {ks[0]}" if high < 0 else f"as deep at {ks[-1]} as at {ks[0]}, so far as can "
             "be seen"))
    depths = ", ".join(f"{claims.centre_of_mass(each.mean(0)):.2f} at {k}" for k, each in big.items())
    return figure, f"{moves}: mean depth {depths}", (
        f"depth: 0 the first layer, 1 the last; {len(label['idx'])} sequences, {label['context']} context")


def tokens(run):
    losses, label = figures.token_losses(run), run["label"]
    figure, _ = figures.figure_5(run | {"label": label | {"domains": label["domains"][:1]}}, n=26)
    label_ends(cut(figure, figure.axes[0]), line_height=0.095)  # the token names leave less height
    hard = losses["all-small"] >= np.quantile(losses["all-small"], 0.9)
    stuck = (losses["all-small"] - losses["oracle"]) < 0.5
    return figure, (f"Of the hardest tenth of tokens {stuck[hard].mean():.0%} gain less than half a nat by the best "
                    f"route, of all others {stuck[~hard].mean():.0%}"), (
        f"{len(label['idx'])} sequences, {label['context']} context; the text: a part of one")


def routers(run):
    mine = {stem: arrays for stem, arrays in run["routers"].items() if notes_of(arrays)["name"] in figures.NAMES}
    need(mine, "no routers", run["commands"]["router"])
    need(run["patterns"], "no fixed patterns", run["commands"]["oracle"])
    need(run["base"]["fixed"] if run["contexts"].get("fixed") == "sequential" else None,  # as the routers are
         "fixed patterns on the routers' text need the checkpoint", run["commands"]["train"])
    figure, _ = figures.pareto(run | {"routers": mine, "times": {}, "base": {
        name: part for name, part in run["base"].items() if name != "expected"}})
    axis = cut(figure, figure.axes[1], title="")
    heights = [bars.lines[0].get_ydata()[0] for bars in axis.containers]  # of few sequences the view is too near
    axis.set_ylim(min(axis.get_ylim()[0], 1.1 * min(heights)), max(axis.get_ylim()[1], 1.1 * max(heights)))
    key(axis)
    rows, gains = run["base"]["fixed"][1], [part for _, _, part in router_gains(run)]
    better, worse = sum(low > 0 for _, low, _ in gains), sum(high < 0 for *_, high in gains)
    return figure, (f"Of {len(gains)} routers {better} beat the best fixed pattern of equal compute, {worse} are "
                    f"worse, {len(gains) - better - worse} cannot be told apart"), (
        f"{len(rows)} sequences, routers' seeds {sorted({notes_of(arrays)['seed'] for arrays in mine.values()})}")


def savings(run):
    model, label, router = run["model"], run["label"], next(iter(figures.kinds(run)), "")
    need(None if model is None else [model], "FLOPs and times need the checkpoint", run["commands"]["train"])
    need(run["times"], "no times were measured", f"python analyze.py --out_dir={run['folder']}" if label
         else run["commands"]["oracle"])
    L, times = model.config.n_layer, {}
    for name, quartiles in run["times"].items():
        policy, _, k = name.rpartition(" ")
        times.setdefault(policy, {})[float(k)] = quartiles
    flops = [model.flops(torch.tensor([BIG] * k + [SMALL] * (L - k))) / model.flops(BIG) for k in range(L + 1)]
    figure, ((axis,),) = figures.grid_of(1, 1)
    axis.plot(flops, color=plt.rcParams["text.color"], label="FLOPs")
    for name, policy, title in (("fixed", "fixed", "time: one pattern"), (router, "router", f"time: {router} router"),
                                ("oracle", "oracle", "time: oracle's routes")):
        if name in times:
            middle, low, high = np.array([*times[name].values()]).T
            axis.plot([*times[name]], middle, color=COLOUR[policy], marker=MARKER[policy], ms=4, label=title)
            axis.vlines([*times[name]], low, high, color=COLOUR[policy])
    axis.axhline(1, color=COLOUR["all-big"], ls="--", label="all-big")
    axis.grid()
    label_ends(cut(figure, axis, xlabel="k (BIG layers per token)", ylabel="share of all-big's", ylim=(0, None)))
    both = times["fixed"].keys() & times.get(router, {}).keys()
    k = min(both or times["fixed"], key=lambda k: abs(k - L / 2))

    def change(policy):
        share = times[policy][k][0]
        return f"{'falls' if share < 1 else 'rises'} by {abs(1 - share):.0%}"
    return figure, f"At k={k:g} FLOPs fall by {1 - flops[int(k)]:.0%}; time {change('fixed')} with one pattern" + (
        f", {change(router)} with the {router} router" if both else ""), (
        f"{run['times_on']['device']}, {run['times_on']['batch']}, rounds: {run['times_on']['rounds']} (median, "
        "quartiles); FLOPs without the router's, times without the oracle's search")


def zoo(run):
    lines = {name: run["zoo"][name] for name in reversed(zoo_figures.SYSTEMS) if name in run["zoo"]}
    need(lines, "zoo.json has no findings of this checkpoint",
         f"{run['commands']['routers']} --name=all --budget=4 && {run['commands']['effects']}")
    figure, ((axis,),) = figures.grid_of(1, 1)
    sign = {"holds": "\u2713 holds", "fails": "\u2717 fails", "undecided": "? undecided"}
    for y, line in enumerate(lines.values()):
        part = np.array([claims.number(value) for value in (line["effect"], *line["ci"])])
        middle, bars = zoo_figures.parts_of([part / np.nanmax(np.abs(part))])
        axis.errorbar(middle, [y], xerr=bars, color=COLOUR["router"], marker="D", ms=11, lw=3.3, capsize=7)
        unit = line["unit"].partition(",")[0]
        axis.text(1.2, y, f"{sign[line['verdict']]}: {round(line['effect'], 4) + 0:+.4f}\n{unit}", va="center")
    axis.axvline(0, color=INK)
    axis.set_yticks(range(len(lines)), [zoo_figures.SYSTEMS[name][0].replace(": ", ":\n") for name in lines])
    axis.set(xticks=[], xlim=(-1.1, 1.1), ylim=(-0.5, len(lines) - 0.5), xlabel="own units;\nright is better")
    count = [sum(line["verdict"] == verdict for line in lines.values()) for verdict in sign]
    lacking = ", ".join(name for name in zoo_figures.SYSTEMS if name not in lines)
    many = [line["sequences"] for line in lines.values()]
    seeds = sorted({seed for line in lines.values() for seed in line["seeds"]})
    return figure, ("{} claims from other papers, tested here: holds {}, fails {}, undecided {}".format(
        len(lines), *count)), f"{min(many)} to {max(many)} sequences, routers' seeds {seeds}" + (
        f"; not measured ({run['commands']['effects']}): {lacking}" if lacking else "")


SLIDES = (stage1, gap, split, selection, where, tokens, routers, savings, zoo)


def write(run, command):
    """All slides that the run's files allow -> [(file, message)], [(name, what is missing)]"""
    drawn, lacking, folder, facts = [], [], run["folder"] / "slides", run["facts"]
    for number, function in enumerate(SLIDES, 1):
        file = f"{number}_{function.__name__}.png"
        for theme, (page, ink) in THEMES.items():
            (folder / theme).mkdir(parents=True, exist_ok=True)
            inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
            with plt.rc_context(dict.fromkeys(inked, ink) | {"font.size": SIZE, "axes.titlesize": SIZE,
                                                             "savefig.facecolor": page}):
                try:
                    figure, message, about = function(run)
                except Missing as error:
                    lacking += [(function.__name__, str(error))] if theme == "light" else []
                    (folder / theme / file).unlink(missing_ok=True)  # of an earlier state of the run
                    continue
                finish(figure, message, f"run {run['folder'].name}, corpus {facts['trained on']} "
                       f"{facts['corpus fingerprint']}; {about}; base seed {run['seed']}; {command}")
                png = io.BytesIO()
                figure.savefig(png, dpi=DPI)
                plt.close(figure)
            write_atomic(folder / theme / file, png.getbuffer())
        if (folder / theme / file).exists():
            drawn.append((file, message))
    listed = json.dumps(drawn).replace("<", "\\u003c")
    write_atomic(folder / "slides.html", PAGE.replace("SLIDES", listed).encode())
    return drawn, lacking
