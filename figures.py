"""The figures: the paper's 2 to 8 on our run, and our own. analyze.py gives each function its material; each returns a
matplotlib figure and a caption that says what to see, or raises Missing with the command that would make its input.

Material (a dict, made by analyze.read): metrics, the lines of metrics.jsonl; windows {idx, targets [S, T], domain [S],
domains}; label, expected, skip, ramps: arrays of oracle.py's files ({} where there is none); patterns, its baselines,
and curves; routers {file stem: arrays}; base {policy: (losses per sequence [n, L + 1], which n windows)}; quality,
controls: rows of oracle.json, on the whole text; times: of analyze.time_policies; comparisons: of analyze.compare;
words [V]; zoo: of zoo_figures.py.

Losses are in nats per token, bands and bars are 95% bootstrap intervals over sequences. Text and axes are drawn in INK,
which the report replaces by the colour of its text, so that figures follow light and dark.
"""
import json
import math
import re

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from claims import at_budget, interval, number
from model import BIG, SKIP, SMALL
from router import NAMES

INK = "#10233f"
# One colour a policy, everywhere: the eight of Okabe and Ito, safe for colour-blind readers. The report has them too.
COLOUR = {"oracle": "#d55e00", "router": "#cc79a7", "fixed": "#56b4e9", "random": "#009e73", "best of 100": "#a39700",
          "expected-loss oracle": "#7f7f7f", "all-small": "#e69f00", "all-big": "#0072b2"}
CHOICE = {SKIP: "#bbbbbb", SMALL: COLOUR["all-small"], BIG: COLOUR["all-big"]}
MARKER = {"oracle": "o", "router": "D", "fixed": "s", "random": "v", "best of 100": "^", "expected-loss oracle": "P",
          "all-small": "<", "all-big": ">"}
# All routers have one colour, kinds differ by marker. zoo.py's kinds are hollow and in INK.
ROUTER_MARKER = dict(zip(NAMES, "DXdph", strict=True))
ZOO_MARKER = {"rmoe": "o", "token_id": "s", "capacity": "^", "tryage": "v", "arch": "<", "glider": ">", "rewire": "*",
              "lora_mixer": "P", "lora_single": "X"}
plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "svg.fonttype": "path", "svg.hashsalt": "nanoduo",
                     "savefig.facecolor": "white", "axes.facecolor": "none", "text.color": INK, "axes.labelcolor": INK,
                     "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "grid.color": "#808080", "grid.alpha": 0.3,
                     "text.parse_math": False, "figure.max_open_warning": 0, "image.interpolation": "nearest"})


class Missing(Exception):
    """What a figure lacks, and the command that would make it."""


def need(what, message, command):
    """Raise Missing where `what` is empty or None."""
    if what is None or not len(what):
        raise Missing(f"{message}; make it with `{command}`")
    return what


# ---------------------------------------------------------------------------------------------------------------------
# parts of figures

def grid_of(rows, columns, width=10.0, height=3.2, **options):
    """-> figure, axes [rows, columns]"""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained",
                                **options)
    return figure, axes


def band(axis, x, samples, policy, transform=lambda m: m, **options):
    """samples [S, K], one column for each x: the mean and its interval."""
    means = np.array([interval(column) for column in samples.T])  # [K, 3]
    style = {"color": COLOUR[policy], "marker": MARKER[policy], "ms": 4, "lw": 1.5, "label": policy} | options
    axis.plot(x, transform(means[:, 0]), **style)
    axis.fill_between(x, *transform(means[:, 1:]).T, color=COLOUR[policy], alpha=0.12, lw=0)


def point(axis, x, part, policy, x_part=None, **options):
    """A point with its interval: part (estimate, low, high); x_part the same of x."""
    def bars(interval):
        value, low, high = map(number, interval)
        return np.nan_to_num(np.abs(np.array([[value - low], [high - value]])))
    style = {"color": COLOUR[policy], "marker": MARKER[policy], "ms": 6, "lw": 1.2, "capsize": 2, "ls": "none"}
    axis.errorbar([x], [part[0]], bars(part), None if x_part is None else bars(x_part), **style | options)


def legend_below(figure, axes, columns=4):
    """One legend for all axes, each name once. axes: one, or several that together have all names"""
    handles = {}
    for axis in np.ravel(axes):
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def log_scale(axis, ticks, form):
    """A logarithmic x axis with plain numbers (matplotlib's own labels are formulas, and text is never one here)."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [form.format(tick) for tick in ticks])
    axis.minorticks_off()


def notes_of(arrays):
    return json.loads(str(arrays["notes"]))


def lane(arrays, label):
    """-> routes [S, T, L], losses [S, T] of one budget of an oracle file"""
    i = [str(name) for name in arrays["labels"]].index(label)
    return arrays["routes"][i], arrays["losses"][i]


def has(arrays, *labels):
    return bool(arrays) and set(labels) <= {str(label) for label in arrays["labels"]}


def context_of(arrays):
    return {"sequential": "each token keeps the keys and values of its own route (sequential context)",
            "frozen": "earlier tokens are all-BIG (frozen context)"}[str(arrays["context"])]


def is_control(name):
    """Is this kind of zoo.py there only for another one to be compared with?"""
    return name.endswith(("_few", "_np", "_detach", "_prose")) or name in ("lora_balance", "lora_budget", "lora_sharp")


def all_kinds(run):
    """-> {name of a {SMALL, BIG} router: {budget: arrays}}, of the first seed; the paper's router, linear, first.
    Without zoo.py's controls."""
    found = {}
    for arrays in run["routers"].values():
        notes = notes_of(arrays)
        if notes["choices"] == "sb" and not is_control(notes["name"]):
            found.setdefault(notes["name"], {}).setdefault(notes["budget"], arrays)
    return {name: dict(sorted(found[name].items())) for name in sorted(found, key=lambda n: (n != "linear", n))}


def kinds(run):
    """The same of the paper's routers alone: what the figures show, except where they say otherwise."""
    return {name: routers for name, routers in all_kinds(run).items() if name in NAMES}


def share_maps(lanes, domains, colour, what):
    """lanes: [(title, chosen [S, T, L] bool, domain [S])] -> a figure: a heat map over layer and position for each lane
    and domain, and the share by layer, with its interval, at the right."""
    figure, axes = grid_of(len(domains), len(lanes) + 1, height=2.9, width=2.7 * len(lanes) + 4)
    for row, name in zip(axes, domains, strict=True):
        for i, (title, chosen, domain) in enumerate(lanes):
            here = chosen[domain == list(domains).index(name)].astype(float)  # [S, T, L]
            S, T, L = here.shape
            wide = max(1, min(T // 4, round(64 / S)))  # positions a cell: of fewer than 64 tokens a share is mere noise
            cells = here[:, :T // wide * wide].reshape(S, T // wide, wide, L).mean((0, 2))  # [T / wide, L]
            image = row[i].imshow(cells.T, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="cividis",
                                  extent=(0, T // wide * wide, -0.5, L - 0.5))
            row[i].set(title=f"{name}, {title}", xlabel="position (tokens)")
            parts = np.array([interval(here.mean(1)[:, layer]) for layer in range(L)])
            style = ("-", "--", ":", "-.")[i % 4]
            row[-1].plot(parts[:, 0], range(L), style, color=colour, label=title)
            row[-1].fill_betweenx(range(L), parts[:, 1], parts[:, 2], color=colour, alpha=0.2, lw=0)
        row[0].set_ylabel("layer (0 is the first)")
        row[-1].set(xlim=(0, 1), ylim=(-0.5, L - 0.5), xlabel=f"share of {what}", title=f"{name}, all positions")
        row[-1].grid()
    if len(lanes) > 1:
        axes[0, -1].legend(fontsize=8)
    figure.colorbar(image, ax=axes[:, :-1], shrink=0.8, pad=0.02, label=f"share of {what}")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# stage 1

def stage1(run):
    evals = [line for line in run["metrics"] if line["kind"] == "eval"]
    need(evals, "no evaluations in metrics.jsonl", run["commands"]["train"])
    domains, training = list(evals[0]["domains"]), [line for line in run["metrics"] if line["kind"] == "train"]
    figure, axes = grid_of(1, len(domains), height=3.6)
    bigram = next((line["bigram"] for line in reversed(run["metrics"]) if "bigram" in line), {})
    for axis, domain in zip(axes[0], domains, strict=True):
        axis.plot([line["step"] for line in training], [line["loss"] for line in training], color="#808080", alpha=0.4,
                  lw=0.8, label="training batches (both domains)")
        for kind in evals[0]["domains"][domain]:
            policy = kind if kind == "random" else f"all-{kind}"
            axis.plot([line["step"] for line in evals], [line["domains"][domain][kind]["loss"] for line in evals],
                      color=COLOUR[policy], marker=MARKER[policy], label=policy)
        if domain in bigram:
            axis.axhline(bigram[domain], color="#808080", ls=":", label="bigram")
        losses = [v["loss"] for line in evals for v in line["domains"][domain].values()]
        axis.set(xlabel="training step", ylabel="loss (nats per token)", title=f"{domain}, validation",
                 ylim=(min(losses) - 0.2, max(losses) + 0.8))
        axis.grid()
    legend_below(figure, axes[0, 0], 5)
    last = evals[-1]["domains"]
    gains = [f"{last[d]['small']['loss'] - last[d]['big']['loss']:.2f} on {d}" for d in domains if "small" in last[d]]
    return figure, ("One model, evaluated under three policies while it trains (the log holds means, so no intervals). "
                    + (f"At the end all-big is better than all-small by {' and '.join(gains)} nats: that much the BIG "
                       "FFNs are worth, and that much a policy can move." if gains else ""))


# ---------------------------------------------------------------------------------------------------------------------
# the paper's figures

def example(run, idx, domain, name):
    """-> the row of a sequence to show: of the domain (the first one where it is not there), the one with the most
    different tokens"""
    names = [str(other) for other in run["windows"]["domains"]]
    rows = np.flatnonzero(domain == (names.index(name) if name in names else 0))
    return int(max(rows, key=lambda row: len(np.unique(idx[row]))))


def figure_2abc(run):
    label = need(run["label"], "no search of {SMALL, BIG} routes", run["commands"]["oracle"])
    digits = [str(k) for k in label["labels"] if str(k).isdigit()]
    ks = need([k for k in ("4", "6", "8") if k in digits] or digits[1:3] or digits, "no search at a fixed k",
              run["commands"]["oracle"])
    figure = share_maps([(f"k={k}", lane(label, k)[0] == BIG, label["domain"]) for k in ks], label["domains"],
                        COLOUR["oracle"], "BIG")
    return figure, (f"Where the oracle puts its BIG layers; {context_of(label)}. Bright cells are BIG for most tokens. "
                    "The paper sees later layers at k=4, an even spread at k=6 and earlier layers at k=8.")


def figure_2d(run):
    skip = need(run["skip"], "no search of {SKIP, BIG} routes with 6 skips", run["commands"]["skip"])
    n = notes_of(skip)["job"]["budgets"]
    routes = lane(skip, "6")[0]
    figure = share_maps([(f"{n} BIG, the rest SKIP", routes == SKIP, skip["domain"])], skip["domains"],
                        COLOUR["oracle"], "SKIP")
    share = (routes == SKIP).mean((0, 1))
    return figure, ("Half of the layers are skipped: which? The paper sees some layers nearly always skipped, and no "
                    f"order of early exit. Here the most skipped layer is {share.argmax()} ({share.max():.0%} of "
                    f"tokens), the least skipped {share.argmin()} ({share.min():.0%}). {len(routes)} sequences.")


def figure_3(run):
    name, routers = next(iter(need(kinds(run), "no routers", run["commands"]["router"]).items()))
    ks = [k for k in (4, 6, 8) if k in routers] or list(routers)[:3]
    lanes = [(f"k={k:g}", routers[k]["routes"] == BIG, routers[k]["domain"]) for k in ks]
    figure = share_maps(lanes, run["windows"]["domains"], COLOUR["router"], "BIG")
    return figure, (f"The same for the trained router ({name}, hard choices, its budget met on average). The paper's "
                    "router prefers later layers at every budget and gives early tokens more.")


POLICIES = {"random": "random", "best100_data_set": "best of 100", "fixed": "fixed", "router": "router",
            "expected": "expected-loss oracle", "oracle": "oracle"}


def on_common_windows(run):
    """-> rows [n], the windows on which all policies are known, and {policy: losses per sequence [n, L + 1], nan at a k
    that was not searched}"""
    base = {key: run["base"][key] for key in POLICIES if key in run["base"] and np.isfinite(run["base"][key][0]).any()}
    need(base.get("oracle"), "no search of all budgets", run["commands"]["oracle"])
    rows = np.arange(len(run["windows"]["idx"]))
    for _, which in base.values():
        rows = np.intersect1d(rows, which)
    return rows, {key: values[[list(which).index(i) for i in rows]] for key, (values, which) in base.items()}


def router_points(run, rows, kinds=kinds):
    """-> [(name, budget, number of BIG spent per sequence [n], losses per sequence [n])] on the windows `rows`"""
    return [(name, k, (arrays["routes"] == BIG).sum(-1).mean(-1)[rows], arrays["losses"].mean(-1)[rows])
            for name, routers in kinds(run).items() for k, arrays in routers.items()]


def mixed_contexts(run):
    """A sentence, where not everything is of one context."""
    frozen = [POLICIES[key] for key in POLICIES if run["contexts"].get(key) == "frozen"]
    return (f" {', '.join(frozen)}: frozen context (earlier tokens all-BIG); the rest is sequential."
            if frozen else " All in the sequential context.")


def figure_4a(run):
    rows, base = on_common_windows(run)
    domain, domains, L = run["windows"]["domain"][rows], run["windows"]["domains"], base["oracle"].shape[1] - 1
    k = min(6, L // 2)
    base = {key: values for key, values in base.items() if np.isfinite(values[:, k]).all()}
    routers = [(name, spent, losses) for name, budget, spent, losses in router_points(run, rows) if budget == k]
    figure, axes = grid_of(1, len(domains), height=3.6)
    names = [POLICIES[key] for key in POLICIES if key in base] + [f"router: {name}" for name, _, _ in routers]
    for d, axis in enumerate(axes[0]):
        here = domain == d
        parts = [(POLICIES[key], interval(base[key][here, k])) for key in POLICIES if key in base]
        parts += [("router", interval(losses[here])) for _, _, losses in routers]
        for i, (policy, part) in enumerate(parts):
            point(axis, i, np.exp(part), policy, ms=8, capsize=4)
            axis.annotate(f"{math.exp(part[0]):.1f}", (i, math.exp(part[0])), (9, -3), textcoords="offset points")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set(ylabel="perplexity", title=f"{domains[d]}, k={k}", xlim=(-0.5, len(names) - 0.2))
        axis.grid(axis="y")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1))
    return figure, (f"Perplexity at k={k} BIG per token on the same {len(rows)} sequences. The paper: the oracle is "
                    "far below the best of 100 random patterns; the router stands near that and near the best fixed "
                    "one."
                    + mixed_contexts(run) + " The intervals hold the sequences' spread, which all policies share; "
                    "paired differences (below) are much sharper.")


def figure_4b(run):
    rows, base = on_common_windows(run)
    domain, domains = run["windows"]["domain"][rows], run["windows"]["domains"]
    ks, routers = np.arange(base["oracle"].shape[1]), router_points(run, rows)
    figure, axes = grid_of(1, len(domains), height=4)
    for d, axis in enumerate(axes[0]):
        here = domain == d
        for key in base:
            there = np.isfinite(base[key]).all(0)
            band(axis, ks[there], base[key][here][:, there], POLICIES[key], np.exp)
        for name, group in grouped(routers):
            for _, spent, losses in group:
                point(axis, spent[here].mean(), np.exp(interval(losses[here])), "router", label=f"router: {name}",
                      marker=ROUTER_MARKER[name])
        axis.set(xlabel="BIG layers per token (achieved)", ylabel="perplexity", title=domains[d])
        axis.grid()
    legend_below(figure, axes[0, 0])
    oracle = base["oracle"].mean(0)
    return figure, (f"Perplexity against k on the same {len(rows)} sequences. The paper: fixed and router fall with k; "
                    "the oracle falls to k=6 and turns, and with one BIG layer already beats all-big. Here the oracle "
                    f"is best at k={oracle.argmin()}; one BIG layer gives {math.exp(oracle[1]):.1f}, all-big "
                    f"{math.exp(oracle[-1]):.1f} (both domains)." + mixed_contexts(run))


def grouped(routers):
    """[(name, budget, spent, losses)] -> [(name, [(budget, spent, losses)])]"""
    names = list(dict.fromkeys(name for name, *_ in routers))
    return [(name, [tuple(rest) for other, *rest in routers if other == name]) for name in names]


def figure_4c(run):
    ramps = need(run["ramps"], "no search of ramps", run["commands"]["ramps"])
    figure, axes = grid_of(1, len(ramps["domains"]), height=3.2)
    names = {"4": "constant 4", "6-2": "6 down to 2", "2-6": "2 up to 6"}
    for d, axis in enumerate(axes[0]):
        here = ramps["domain"] == d
        losses = {label: lane(ramps, label)[1].mean(-1)[here] for label in names}
        for i, label in enumerate(names):
            part = interval(losses[label] - losses["4"])
            point(axis, i, part, "oracle", ms=8, capsize=4)
            # By the upper end of the interval: beside the point it would run into the next one's.
            top = part[0] if math.isnan(part[2]) else part[2]
            axis.annotate(f"perplexity {math.exp(losses[label].mean()):.2f}", (i, top), (0, 6),
                          textcoords="offset points", ha="center")
        axis.set_xticks(range(3), names.values())
        axis.set(ylabel="loss - constant's (nats per token)", xlabel="BIG per token along the sequence",
                 title=str(ramps["domains"][d]), xlim=(-0.6, 2.6))
        axis.margins(y=0.15)
        axis.grid(axis="y")
    return figure, ("The oracle with 4 BIG per token on average, constant or changing along the sequence. The paper: "
                    f"constant is best. Paired with it; {len(ramps['domain'])} sequences; {context_of(ramps)}.")


def visible(word):
    """A token as a short label: spaces and line ends shown, what fonts lack replaced."""
    word = word if len(word) < 12 else word[:10] + "…"
    word = word.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return "".join(c if c.isprintable() and ord(c) < 0x3000 else "�" for c in word)


def token_losses(run):
    """-> {policy: losses [S, T]} of the label file, from its budgets 0, L and any"""
    label, L = need(run["label"], "no search of {SMALL, BIG} routes", run["commands"]["oracle"]), None
    L = label["routes"].shape[-1]
    if not has(label, "0", str(L), "any"):
        raise Missing(f"the search lacks the budgets 0, {L} and any; make them with `{run['commands']['oracle']}`")
    return {name: lane(label, key)[1] for name, key in (("all-small", "0"), ("all-big", str(L)), ("oracle", "any"))}


def figure_5(run, n=32):
    losses, label = token_losses(run), run["label"]
    T = label["idx"].shape[1]
    figure, axes = grid_of(len(label["domains"]), 1, height=3)
    first = min(T // 4, max(0, T - n))  # some way into the sequence: the first tokens have no context
    for d, axis in enumerate(axes[:, 0]):
        row = example(run, label["idx"], label["domain"], str(label["domains"][d]))
        where = np.arange(first, min(first + n, T))
        words = [visible(run["words"][i]) for i in label["targets"][row, where]]
        for policy, values in losses.items():
            axis.plot(values[row, where], color=COLOUR[policy], marker=MARKER[policy], ms=5, lw=1, label=policy)
        axis.set_xticks(range(len(where)), words, rotation=90, fontsize=8, family="monospace")
        axis.set(ylabel="loss (nats)", title=f"{label['domains'][d]}: the token that is predicted",
                 xlim=(-0.5, n - 0.5))
        axis.grid()
    legend_below(figure, axes[0, 0], 3)
    hard = losses["all-small"] > np.quantile(losses["all-small"], 0.9)
    stuck = (losses["all-small"] - losses["oracle"])[hard] < 0.5
    return figure, ("Loss of each token of a text under all-small, all-big and the oracle (free budget). The paper: "
                    "some tokens of high loss do not improve under any route. Here, of the tenth of tokens with the "
                    f"highest small loss, {stuck.mean():.0%} gain less than half a nat ({len(stuck)} tokens; "
                    f"{context_of(label)}).")


def lay_out(words, columns, lines):
    """Where tokens stand in a block of text -> [(token, line, column, piece)]: line ends, shown as a sign, and wraps
    obeyed, indentation left out."""
    placed, line, column = [], 0, 0
    for i, word in enumerate(words):
        for part in re.findall(r"[^\n]+|\n", word.replace("\t", "    ")):
            if part == "\n":
                if line < lines and column < columns:
                    placed.append((i, line, column, "↵"))
                line, column, part = line + 1, 0, ""
            while part:
                piece, part = part[:columns - column], part[columns - column:]
                if line < lines and (piece.strip() or column):
                    placed.append((i, line, column, piece))
                column += len(piece)
                if column == columns:
                    line, column = line + 1, 0
    return placed


def figure_6(run, columns=64, lines=16):
    losses, label = token_losses(run), run["label"]
    row = example(run, label["idx"], label["domain"], "code")
    placed = lay_out([run["words"][i] for i in label["targets"][row]], columns, lines)
    lines = max(6, *(line + 1 for _, line, _, _ in placed))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.24 * lines + 0.9), layout="constrained")
    gap = losses["all-small"] - losses["oracle"]
    panels = (("all-small", losses["all-small"][row], "(a) loss under all-small"),
              ("oracle", gap[row], "(b) gap: small loss - oracle loss"))
    for axis, (policy, values, title) in zip(axes, panels, strict=True):
        most = np.quantile(values, 0.95) or 1
        ramp = ListedColormap([(*matplotlib.colors.to_rgb(COLOUR[policy]), a) for a in np.linspace(0, 0.75, 64)])
        for token, line, column, piece in placed:
            axis.add_patch(plt.Rectangle((column, line), len(piece), 1, color=ramp(values[token] / most), lw=0))
            shown = "".join(c if c.isprintable() and ord(c) < 0x3000 else "�" for c in piece)
            axis.text(column, line + 0.75, shown, family="monospace", fontsize=10.3)
        axis.set(xlim=(0, columns), ylim=(lines, 0), title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        scale = matplotlib.cm.ScalarMappable(plt.Normalize(0, most), ramp)
        figure.colorbar(scale, ax=axis, location="bottom", shrink=0.7, aspect=40, pad=0.01, label="nats")
    return figure, ("The same text twice: what is hard for the small model, and where the oracle can help. The paper: "
                    "difficulty is the potential for a lower loss, which is not the loss. A token "
                    "strong in colour on the left and weak on the right is hard, and stays hard.")


def figure_7(run, n=48):
    wanted = (("sb", 3.6, None, "70% SMALL, 30% BIG"), ("xb", 6.0, None, "50% BIG, 50% SKIP"),
              ("xsb", 6.0, 2.4, "50% BIG, 30% SMALL, 20% SKIP"))
    papers = [(notes_of(arrays), arrays) for arrays in run["routers"].values() if notes_of(arrays)["name"] in NAMES]
    need(papers, "no routers", run["commands"]["router"])
    found, lacking = [], []
    for choices, big, skip, title in wanted:
        near = sorted(((abs(note["budget"] - big) + abs((note["skip_budget"] or 0) - (skip or 0)),
                        note["name"] != "linear", i) for i, (note, _) in enumerate(papers)
                       if note["choices"] == choices), key=lambda item: item[:2])
        if near and near[0][0] <= 0.5:
            note, arrays = papers[near[0][2]]
            found.append((f"{title}: {note['name']}, k={note['budget']:g}", arrays))
        if not near or near[0][0] > 0.5:
            budget = f"{big:g}" if skip is None else f"{big:g}/{skip:g}"
            lacking.append(f"{title} with `{run['commands']['routers']} --name=linear --choices={choices} "
                           f"--budget={budget}`")
    need(found, "no router of these budgets", run["commands"]["router"])
    figure, axes = grid_of(len(found), 1, height=2.6)
    row = example(run, run["windows"]["idx"], run["windows"]["domain"], "code")
    words = [visible(run["words"][i]) for i in run["windows"]["idx"][row, :n]]
    for axis, (title, arrays) in zip(axes[:, 0], found, strict=True):
        routes = arrays["routes"][row, :n]  # [n, L]
        axis.imshow(routes.T, origin="lower", aspect="auto", cmap=ListedColormap([CHOICE[c] for c in range(3)]),
                    vmin=0, vmax=2)
        axis.set(ylabel="layer", yticks=range(0, routes.shape[1], 2), title=f"{title}; in this sequence "
                 f"{(arrays['routes'][row] == BIG).sum(-1).mean():.2f} BIG per token")
        axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7, family="monospace")
    there = set(np.concatenate([np.unique(arrays["routes"][row, :n]) for _, arrays in found]).tolist())
    keys = [plt.Rectangle((0, 0), 1, 1, color=CHOICE[c], label=name)
            for c, name in ((BIG, "BIG"), (SMALL, "SMALL"), (SKIP, "SKIP")) if c in there]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure, ("The router's choice in each layer (upwards) for the first tokens of one sequence. The paper shows "
                    "three mixes." + (f" Not made here: {'; '.join(lacking)}." if lacking else ""))


def figure_8(run):
    compared = run["comparisons"]
    need(compared, "no dense model and no freeze-then-small run to compare with (and the paper's sweep over p(big) is "
         "not part of this version)", run["commands"]["dense"])
    pairs = [(a, b, title) for a, b, title in (("dense", "all_big", "all-big against a dense model of its size"),
                                               ("freeze", "joint", "random k: freeze-then-small against joint"))
             if a in compared]
    figure, axes = grid_of(1, len(pairs), height=3.2)
    names = {"dense": "dense", "all_big": "Duo, all-big", "freeze": "freeze, then small", "joint": "Duo, joint"}
    style = {"dense": ("all-big", {"color": INK}), "freeze": ("random", {"color": INK}), "all_big": ("all-big", {}),
             "joint": ("random", {})}  # ink: another model
    text = []
    for axis, (a, b, title) in zip(axes[0], pairs, strict=True):
        for i, key in enumerate((a, b)):
            part = interval(compared[key])
            point(axis, i, part, style[key][0], ms=8, capsize=4, **style[key][1])
            axis.annotate(f"{part[0]:.3f}", (i, part[0]), (9, -3), textcoords="offset points")
        axis.set_xticks((0, 1), (names[a], names[b]))
        axis.set(ylabel="loss (nats per token)", title=title, xlim=(-0.5, 1.7))
        axis.grid(axis="y")
        text.append("{} minus {}: {:+.3f} ({:+.3f} to {:+.3f})".format(names[b], names[a],
                                                                       *interval(compared[b] - compared[a])))
    return figure, ("Stage-1 quality against runs trained apart, paired on the same tokens. " + "; ".join(text) + ". "
                    "The paper also sweeps p(big) against dense models of equal FLOPs: not part of this version.")


# ---------------------------------------------------------------------------------------------------------------------
# ours

def router_style(name):
    """-> how a router's point looks"""
    style = ({"marker": ROUTER_MARKER[name]} if name in NAMES else
             {"marker": ZOO_MARKER.get(name, "."), "color": INK, "mfc": "none", "lw": 0.7})
    return {"label": f"router: {name}"} | style


def against_fixed(axis, groups, fixed):
    """Routers (see grouped) minus the best fixed pattern of the same number of BIG; those of one budget would hide each
    other, so they stand side by side."""
    values, which = fixed
    budgets = sorted({budget for name, group in groups if name not in NAMES for budget, *_ in group})
    for (name, group), shift in zip(groups, np.linspace(-0.36, 0.36, len(groups)), strict=True):
        for budget, spent, losses in [row for row in group if row[0] in budgets]:
            columns = np.column_stack((losses[which], spent[which], values))
            part = interval(columns, lambda m: m[..., 0] - at_budget(m[..., 1], m[..., 2:]))
            point(axis, budgets.index(budget) + shift, part, "router", **router_style(name))
    axis.axhline(0, color=COLOUR["fixed"], lw=1.5)
    for i in range(1, len(budgets)):
        axis.axvline(i - 0.5, color="#808080", ls=":", lw=1)
    axis.set_xticks(range(len(budgets)), [f"k={k:g}" for k in budgets])
    axis.set(xlim=(-0.5, len(budgets) - 0.5), xlabel="budget, kinds side by side",
             ylabel="loss - best fixed's (nats per token)", title="the systems of zoo.py; below 0: better than fixed")
    axis.grid(axis="y")


def pareto(run):
    base, windows = run["base"], run["windows"]
    need(base.get("all_big"), "no losses under any policy", run["commands"]["oracle"])
    big, place = base["all_big"][0][:, -1], {row: i for i, row in enumerate(base["all_big"][1])}
    L = base["all_big"][0].shape[1] - 1

    def minus_big(values, which):  # -> [n, K], paired with all-big on the same sequences
        return values - big[[place[i] for i in which]][:, None]
    columns = 2 if run["times"] else 1
    times = {key: tuple(value) for key, value in run["times"].items()}
    routers = grouped(router_points(run, np.arange(len(windows["idx"])), all_kinds))
    papers = [group for group in routers if group[0] in NAMES]
    # Fourteen kinds in one panel cannot be told apart: the zoo's have a row of their own, beside what they must beat.
    zoo = [group for group in routers if group[0] not in NAMES] if "fixed" in base else []
    zoo = [group for group in papers if group[0] == "linear"] + zoo if zoo else []
    figure, axes = grid_of(2 + bool(zoo), columns, height=3.6, width=5.4 * columns)

    def draw(axis, by_time, keys, groups):
        for key in [key for key in keys if key in base]:
            values, which = base[key]
            ks = np.flatnonzero(np.isfinite(values).all(0))
            family = "oracle" if key in ("oracle", "expected") else "fixed"
            if by_time:
                ks = [k for k in ks if f"{family} {k}" in times]
            x = [times[f"{family} {k}"][0] for k in ks] if by_time else ks
            if len(ks):
                band(axis, x, minus_big(values[:, ks], which), POLICIES[key])
        for name, group in groups:
            for budget, spent, losses in group:
                stamp = times.get(f"{name} {budget:g}")
                if not by_time or stamp:
                    point(axis, stamp[0] if by_time else spent.mean(),
                          interval(minus_big(losses[:, None], np.arange(len(losses)))), "router",
                          stamp if by_time and name in NAMES else None, **router_style(name))
        axis.axhline(0, color=COLOUR["all-big"], lw=1, ls="--", label="all-big")
        axis.set(xlabel="time of a forward / all-big's, same batch" if by_time else "BIG layers per token (achieved)",
                 ylabel="loss - all-big's (nats per token)")
        axis.grid()

    def zoom(axis, groups, title):
        sizes = [abs(interval(minus_big(losses[:, None], np.arange(len(losses))))[i]) for _, group in groups
                 for *_, losses in group for i in (1, 2)]
        if "fixed" in base:
            sizes.append(abs(minus_big(*base["fixed"]).mean(0)[min(2, L)]))
        span = max(0.02, 1.3 * max([size for size in sizes if np.isfinite(size)], default=0))
        axis.set(ylim=(-0.7 * span, span), title=title)
    for i in range(columns):
        draw(axes[0, i], i == 1, POLICIES, papers)
        draw(axes[1, i], i == 1, ("fixed", "expected"), papers)
        zoom(axes[1, i], papers, "nearer: policies that do not know the next token")
    axes[0, 0].set_title("all policies, both domains")
    if zoo:
        against_fixed(axes[2, 0], zoo, base["fixed"])
    if zoo and run["times"]:
        draw(axes[2, 1], True, ("fixed",), zoo)
        zoom(axes[2, 1], zoo, "as near: the systems of zoo.py")
    legend_below(figure, axes[:, 0], columns=2 * columns)
    text = "Left: what a budget buys. " if run["times"] else "What a budget buys. "
    if run["times"]:
        text += (f"Right: what it costs in time on {run['times_on']['device']}, {run['times_on']['batch']}, each "
                 "policy in turn with all-big in one session (median, bar: quartiles); oracle and expected-loss "
                 "oracle: the "
                 "time to run their routes, which does not hold the search. ")
    else:
        text += f"No times: they need the checkpoint, `{run['commands']['train']}`. "
    return figure, text + ("Below 0 is better than all-big; left and down is better. Each loss is paired with "
                           "all-big's "
                           "on the same text." + mixed_contexts(run)
                           + (" Last row: zoo.py's routers beside linear, without their controls; left, paired with "
                              "the best fixed pattern of what each spends." if zoo else ""))


def split(run):
    rows = need(run["controls"], "no expected-loss oracle, so the gain cannot be split", run["commands"]["reference"])
    figure, axes = grid_of(1, 1, height=4, width=8)
    axis, ks = axes[0, 0], np.array([row["k"] for row in rows])
    foresight, hindsight = (np.array([row[key] for row in rows], float) for key in ("foresight", "hindsight"))  # [K, 3]
    axis.bar(ks, foresight[:, 0], 0.7, color=COLOUR["expected-loss oracle"], label="foresight: could be foreseen")
    axis.bar(ks, hindsight[:, 0], 0.7, foresight[:, 0].clip(0), color=COLOUR["oracle"], alpha=0.6,
             label="hindsight: needs the label")
    for part, bottom in ((foresight, 0 * foresight[:, 0]), (hindsight, foresight[:, 0].clip(0))):
        axis.errorbar(ks, bottom + part[:, 0], np.abs(part[:, 1:].T - part[:, 0]), color=INK, ls="none", lw=1,
                      capsize=2)
    learnable = np.array([row["learnable"] for row in rows], float)
    if np.isfinite(learnable).any():
        axis.errorbar(ks, learnable[:, 0], np.abs(learnable[:, 1:].T - learnable[:, 0]), color=INK,
                      marker="v", mfc="none", ls="none", capsize=2, label="split-label oracle's gain")
    if "fixed" in run["base"]:
        fixed, which = run["base"]["fixed"]
        for name, group in grouped(router_points(run, np.arange(len(run["windows"]["idx"])))):
            for _, spent, losses in group:
                both = np.column_stack((losses[which], spent[which], fixed))
                gain = interval(both, lambda m: at_budget(m[..., 1], m[..., 2:]) - m[..., 0])
                point(axis, spent.mean(), gain, "router", label=f"router's gain: {name}", marker=ROUTER_MARKER[name])
    axis.axhline(0, color=INK, lw=0.8)
    axis.set(xlabel="k (BIG layers per token)", ylabel="gain over the best fixed pattern (nats)", xticks=ks)
    axis.grid(axis="y")
    legend_below(figure, axis, 2)
    at = int(np.argmax([row["gain"][0] for row in rows]))
    best = rows[at]
    ends = "" if np.isnan(foresight[at]).any() else "({:.3f} to {:.3f}) ".format(*foresight[at, 1:])  # few sequences
    return figure, ("The oracle's gain over the best fixed pattern of the same k, split in two. Grey: what the "
                    "expected-loss oracle, which does not know the label, already gets (a lower bound of what a "
                    "causal router "
                    f"could have). Orange: what only the label tells. At k={best['k']} it gains {best['gain'][0]:.3f} "
                    f"nats, of which {foresight[at, 0]:.3f} {ends}are foresight. {best['sequences']} sequences, "
                    f"{run['controls_context']} context; routers against fixed "
                    "patterns of the sequential context. Not in the paper.")


def selection(run):
    patterns = need(run["patterns"], "no baselines", run["commands"]["oracle"])
    L, n = patterns["curve"].shape[0] - 1, patterns["curve_n"]
    figure, axes = grid_of(1, 1, height=4, width=8)
    axis, ks = axes[0, 0], [k for k in (2, 4, 6, 8, 10) if k < L] or list(range(1, L))
    for i, k in enumerate(ks):
        most = math.comb(L, k)
        where = n <= most
        gain = patterns["curve"][k][:, where] - patterns["fixed"][L].mean(-1)[:, None]  # paired: [S, N]
        parts = np.array([interval(column) for column in gain.T])
        style = {"color": COLOUR["random"], "alpha": 1 - 0.13 * i, "marker": "ovs^D"[i % 5], "ms": 4}
        axis.plot(n[where], parts[:, 0], label=f"k={k}", **style)
        axis.fill_between(n[where], parts[:, 1], parts[:, 2], color=COLOUR["random"], alpha=0.08, lw=0)
    axis.axhline(0, color=COLOUR["all-big"], ls="--", label="all-big")
    log_scale(axis, [4 ** i for i in range(6) if 4 ** i <= n[-1]], "{:g}")
    axis.set(xlabel="N, random routes tried per token", ylabel="loss of the best of N - all-big's (nats per token)")
    axis.grid()
    legend_below(figure, axis, 6)
    mean = patterns["curve"].mean(1)
    beats = {k: next((int(m) for m, x in zip(n, mean[k]) if x < mean[L][0]), None) for k in ks}
    some = next(((k, m) for k, m in beats.items() if m), None)
    return figure, ("Draw N random routes for each token and keep the one whose loss on the true label turns out "
                    "least: no cleverness, only selection. " + (f"At k={some[0]}, {some[1]} random tries are enough "
                                                                "to pass "
                    "all-big. " if some else "") + f"{patterns['curve'].shape[1]} sequences, {run['patterns_context']} "
                    "context. Not in the paper.")


def searches(run):
    need(run["quality"], "no comparison of the searches", run["commands"]["oracle"])
    names = list(dict.fromkeys(row["search"] for row in run["quality"]))
    figure, axes = grid_of(1, 2, height=3.8)
    ks = sorted({row["k"] for row in run["quality"]})
    k = 6 if 6 in ks else ks[len(ks) // 2]
    markers = {"greedy": "*", "dp, early": "o", "dp, small": "<", "dp, big": ">"}  # all are oracles: one colour
    for name in names:
        marker = next(sign for family, sign in markers.items() if name.startswith(family))
        rows = [row for row in run["quality"] if row["search"] == name]
        width = name.rpartition(" ")[2] if name.startswith("dp") else ""
        label = name.partition(", width")[0]
        at_k = next(row for row in rows if row["k"] == k)["gap"]
        gaps = [row["gap"][0] for row in rows]
        for axis, value, part in ((axes[0, 0], at_k[0], at_k), (axes[0, 1], np.mean(gaps), None)):
            point(axis, rows[0]["work"], part or (value, np.nan, np.nan), "oracle", marker=marker,
                  label=label, mfc=COLOUR["oracle"] if label == "greedy" else "none", capsize=2 if part else 0)
            axis.annotate(width, (rows[0]["work"], value), (5, 4), textcoords="offset points", fontsize=8)
    for axis, title in zip(axes[0], (f"k={k}, with interval", f"mean over k={ks[0]}..{ks[-1]}"), strict=True):
        log_scale(axis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1), "{:.0%}")
        axis.set(xlabel="work / exhaustive search's (FLOPs)", ylabel="loss above exhaustive's (nats)", title=title,
                 ylim=(-0.002, None))
        axis.grid()
    legend_below(figure, axes[0, 0])
    against = run["quality"][0]["against"]
    return figure, (f"What the cheaper searches cost and miss, against {against}; numbers at the points are DP's "
                    "widths, markers how it judges a route that is not finished (by a read-out on the spot, or by "
                    "running the "
                    f"rest all-small or all-big). {run['quality'][0]['tokens']} tokens, frozen context. Left and down "
                    "is better. Not in the paper.")


FIGURES = {  # file name: (title, function, the claims that it is about)
    "stage1": ("Stage 1: loss while training", stage1, ()),
    "figure_2abc": ("Paper, figure 2 a-c: where the oracle spends", figure_2abc, ("F6", "F8 (oracle)")),
    "figure_2d": ("Paper, figure 2 d: what the oracle skips", figure_2d, ("F10",)),
    "figure_3": ("Paper, figure 3: where the router spends", figure_3, ("F7", "F8")),
    "figure_4a": ("Paper, figure 4 a: policies at one budget", figure_4a, ("F1", "F5")),
    "figure_4b": ("Paper, figure 4 b: perplexity against budget", figure_4b, ("F2", "F3", "F4")),
    "figure_4c": ("Paper, figure 4 c: constant budget or ramps", figure_4c, ("F9",)),
    "figure_5": ("Paper, figure 5: token by token", figure_5, ()),
    "figure_6": ("Paper, figure 6: difficulty is not loss", figure_6, ("F11",)),
    "figure_7": ("Paper, figure 7: the router's choices", figure_7, ()),
    "figure_8": ("Paper, figure 8: stage 1 against other trainings", figure_8, ("F12",)),
    "pareto": ("Quality against budget and against time", pareto, ()),
    "split": ("How much of the oracle's gain could be foreseen?", split, ()),
    "selection": ("Selection alone", selection, ()),
    "searches": ("Cheaper searches", searches, ()),
}
