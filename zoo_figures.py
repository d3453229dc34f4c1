"""One figure for each system of zoo.py: the effect that its paper claims, as effects.py measured it.

figures.py's material has `zoo`: {system: its finding in zoo.json}. Each function below gets that finding (its `detail`
is what the function of the same name in effects.py, effects_prompt.py or effects_adapt.py returns) and gives a figure
and what to see in it; draw() adds what the paper claims and our verdict, and says what is missing. One colour for the
system itself, in all of these; its controls have it too, but hollow; other routers are drawn in INK.
"""
import functools

import numpy as np

import effects
from claims import number
from figures import COLOUR, INK, Missing, grid_of, is_control, legend_below, need, plt

OURS = {"color": COLOUR["router"], "marker": "D"}
CONTROL = {"color": COLOUR["router"], "mfc": "none"}
OTHER = {"color": INK, "mfc": "none"}
GREY = "#808080"


def parts_of(rows):
    """[(estimate, low, high), ...] of JSON -> the estimates [n] and the lengths of their bars [2, n]"""
    parts = np.array([[number(value) for value in row] for row in rows], float).reshape(-1, 3)
    return parts[:, 0], np.nan_to_num(np.abs(parts[:, 1:].T - parts[:, 0]))


def points(axis, x, rows, **style):
    """Points at x with the intervals `rows`."""
    middle, bars = parts_of(rows)
    axis.errorbar(x, middle, bars, **{"ls": "none", "ms": 6, "lw": 1.2, "capsize": 2} | style)


def side_by_side(n, width):
    """-> where n points stand beside each other, around 0"""
    return np.linspace(-width / 2, width / 2, n) if n > 1 else np.zeros(n)


# ---------------------------------------------------------------------------------------------------------------------
# the figures

def rmoe(line):
    detail = line["detail"]
    budgets, kinds = need_field(detail, "budgets"), need_field(detail, "kinds")
    style = {"rmoe": OURS, "rmoe_np": CONTROL | {"marker": "o"}, "rmoe_detach": CONTROL | {"marker": "s"},
             "linear": OTHER | {"marker": "v"}, "mlp": OTHER | {"marker": "^"}}
    label = {"rmoe_np": "rmoe_np: state not passed", "rmoe_detach": "rmoe_detach: its gradient cut"}
    figure, axes = grid_of(1, 2, height=3.6)
    for axis, key in zip(axes[0], ("minus_fixed", "mutual_information"), strict=True):
        for name, shift in zip(kinds, side_by_side(len(kinds), 0.4), strict=True):
            points(axis, np.arange(len(budgets)) + shift, detail[key][name], label=label.get(name, name),
                   **style[name])
        axis.set_xticks(range(len(budgets)), [f"k={k:g}" for k in budgets])
        axis.set(xlabel="budget (BIG layers per token)", xlim=(-0.5, len(budgets) - 0.5))
        axis.grid(axis="y")
    axes[0, 0].axhline(0, color=COLOUR["fixed"], ls="--", lw=1)
    axes[0, 0].set(ylabel="loss - best fixed's (nats per token)", title="(a) loss; dashed: the best fixed pattern")
    axes[0, 1].set(ylabel="mutual information (nats)", title="(b) of two layers' choices, mean over all pairs")
    legend_below(figure, axes[0, 0], 3)
    both = ", ".join("seed {}: {:+.4f} ({:+.4f} to {:+.4f})".format(seed, *map(number, part))
                     for seed, part in detail["by_seed"].items())
    return figure, (f"If the state is what helps, rmoe lies below rmoe_np in (a) and above it in (b). Of each seed "
                    f"alone, rmoe_np's loss minus rmoe's: {both}.")


TOLD_BY = {"token id": OURS, "domain": OTHER | {"marker": "s"}, "position": OTHER | {"marker": "|", "ms": 9}}


def openmoe(line):
    detail = line["detail"]
    told, early, drop = detail["choices_told_by"], detail["early"], detail["drop"]
    kinds = [name for name in told if not is_control(name) and name != "oracle"]
    kinds = ["oracle"] * ("oracle" in told) + sorted(kinds, key=lambda name: told[name]["token id"]["told"][0])
    need(kinds, "no router's choices in zoo.json", line["command"])
    figure, axes = plt.subplot_mosaic("AB;AC;AD", figsize=(10, 7.6), layout="constrained")
    axis = axes["A"]
    for x, style in TOLD_BY.items():
        middle, bars = parts_of([told[name][x]["told"] for name in kinds])
        axis.errorbar(middle, range(len(kinds)), xerr=bars, ls="none", capsize=2, lw=1.2, label=x, **style)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set(xlabel="share of the choices' entropy that it tells", xlim=(-0.06, 1),
             title=f"(a) what tells a router's choices? k={detail['budget']:g}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    axis.grid()
    axis = axes["B"]
    share = 100 * np.array(early["share_of_training"])
    axis.plot(share, early["agreement"], label="choices that are the final ones", **OURS)
    axis.plot(share, early["by_chance"], label="of such shares, by chance", color=GREY, ls="--")
    axis.set_xscale("log")
    axis.set_xticks(share, [f"{x:g}%" for x in share])
    axis.minorticks_off()
    axis.set(xlabel="share of training done (linear router)", ylabel="agreement",
             title="(b) when is it settled?")
    eighths = np.arange(8) + 0.5
    for where, style, name in (("in", OURS, "validation text"), ("out", OTHER | {"marker": "s"}, "C++, never seen")):
        middle, bars = parts_of(drop["overflow"][where])
        axes["C"].errorbar(eighths[:len(middle)], middle, bars, capsize=2, lw=1.2, label=name, **style)
    axes["C"].set(ylabel="share of choices", title="(c) who wants BIG and finds no place")
    points(axes["D"], eighths[:len(drop["loss_minus_linear"])], drop["loss_minus_linear"], **OURS | {"ls": "-"})
    axes["D"].axhline(0, color=INK, lw=0.8)
    axes["D"].set(ylabel="loss - linear's (nats)", title="(d) what the capacity router loses by it")
    for name in "CD":
        axes[name].set(xlabel="eighth of the sequence", xticks=range(9), xlim=(0, 8))
    for name in "BCD":
        axes[name].grid(axis="y")
    for name in "BC":
        axes[name].legend(fontsize=8)
    return figure, ("(a) 1: it tells all, 0: no more than a shuffled one. (b) One linear router, calibrated anew at "
                    f"each moment. (c, d) The capacity router has {drop['places']} places for BIG in each layer of a "
                    "sequence, first come, first served.")


def tryage(line):
    detail, seeds = line["detail"], sorted({row["seed"] for row in line["detail"]["budgets"]})
    rows, curve = need_field(detail, "budgets"), np.array(need_field(detail, "curve_price_budget_loss"), float)
    budgets, known = sorted({row["k"] for row in rows}), detail["known"]
    at_k = {k: [row for row in rows if row["k"] == k] for k in budgets}
    figure, axes = grid_of(1, 2, height=3.6)
    left, right = axes[0]
    left.plot(curve[:, 1], curve[:, 2], label="tryage: one head, its price swept", **OURS)
    left.plot([np.mean([row["achieved"] for row in at_k[k]]) for k in budgets],
              [np.mean([row["linear"] for row in at_k[k]]) for k in budgets], ls="none", ms=8,
              label="linear: a router for each budget", **OTHER | {"marker": "o"})
    left.set(xlabel="BIG layers per token", ylabel="loss (nats per token)", title="(a) the curve of one head")
    left.grid()
    for seed, shift in zip(seeds, side_by_side(len(seeds), 0.3), strict=True):
        mine = [row for row in rows if row["seed"] == seed]
        points(right, [budgets.index(row["k"]) + shift for row in mine],
               [row["linear_minus_tryage"] for row in mine], **OURS)
    right.axhline(0, color=INK, lw=0.8)
    right.set_xticks(range(len(budgets)), [f"k={k:g}" for k in budgets])
    right.set(xlabel="budget that the linear router was trained for", ylabel="linear's loss - tryage's (nats)",
              title="(b) above 0: the one head is better", xlim=(-0.5, len(budgets) - 0.5))
    right.grid(axis="y")
    legend_below(figure, left, 2)
    numbers = [number(known[key]) for key in ("accuracy", "chance", "majority", "r2_advantage", "r2_raw")]
    return figure, ("The head picks the best pattern of its library for {:.1%} of the tokens (chance {:.1%}, always "
                    "the most frequent one {:.1%}); R^2 of what it predicts: {:.3f} of advantages, {:.3f} of raw "
                    "losses.".format(*numbers)
                    + (" In (b) one point for each seed." if len(seeds) > 1 else ""))


def arch(line):
    detail = line["detail"]
    domains = need_field(detail, "domains")
    ways = {"before": ("matcher, before", CONTROL | {"marker": "o"}), "after": ("matcher, after adding", OURS),
            "untrained": ("the same, untrained", CONTROL | {"marker": "s"}),
            "softmax": ("softmax head, cannot add", OTHER | {"marker": "v"}),
            "softmax_retrained": ("softmax head, trained anew", OTHER | {"marker": "^"})}
    figure, axes = grid_of(1, 1, height=3.8, width=8)
    axis = axes[0, 0]
    for (key, (label, style)), shift in zip(ways.items(), side_by_side(len(ways), 0.5), strict=True):
        x = np.arange(len(domains)) + shift
        axis.plot(x, need_field(detail, key), ls="none", ms=7, label=label, **style)
        if key == "after":  # of the new domain the interval is known: the effect is this, minus chance
            low, high = (number(bound) + detail["chance"] for bound in line["ci"])
            axis.plot([x[-1], x[-1]], [low, high], color=style["color"], lw=1.5)
    axis.axhline(detail["chance"], color=GREY, ls=":", label="chance")
    axis.set_xticks(range(len(domains)), [*domains[:-1], f"{domains[-1]} (new)"])
    axis.set(ylabel="share of tokens given to their domain", ylim=(-0.05, 1.05), xlim=(-0.5, len(domains) - 0.5))
    axis.grid(axis="y")
    legend_below(figure, axis, 3)
    return figure, (f"{domains[-1]} is added to the matcher by its descriptor and a row of the table, without "
                    "training. Its loss before minus after, at one budget: {:+.4f} ({:+.4f} to {:+.4f}) nats.".format(
                        *map(number, detail["loss_before_minus_after"])))


def glider(line):
    detail = line["detail"]
    s = need_field(detail, "s")
    figure, axes = grid_of(1, 1, height=3.6, width=8)
    axis = axes[0, 0]
    names = need_field(detail, "domains")
    for key, style, label, shift in (
            ("held_in", OURS | {"ls": "-"}, f"held-in ({', '.join(names[:-1])})", -0.04),
            ("held_out", OTHER | {"marker": "s", "ls": "--"}, f"held-out ({names[-1]})", 0.04)):
        points(axis, np.arange(1, len(s)) + shift, need_field(detail, f"gains_{key}"), label=label, **style)
    axis.axhline(0, color=INK, lw=0.8)
    axis.axvline(s.index(detail["chosen_s"]), color=GREY, ls=":", label="s chosen on training text")
    axis.set_xticks(range(len(s)), [f"{x:g}" for x in s])
    axis.set(xlabel="s, weight of the global score (0: local alone)", ylabel="gain over s = 0 (nats per token)",
             xlim=(-0.3, len(s) - 0.7))
    axis.grid(axis="y")
    legend_below(figure, axis, 3)
    return figure, ("Above 0 the global score helps. Each s is calibrated anew, so all spend the same. The s that is "
                    f"best on the mix of all domains is {detail['best_s_on_mix']:g}.")


def rewire(line):
    detail = line["detail"]
    domains = need([name for name, value in detail.items() if isinstance(value, dict) and "by_chunk" in value],
                   "no domain's gains in zoo.json", line["command"])
    style = {"own": OURS | {"ls": "-"}, "other": CONTROL | {"marker": "s", "ls": "--"},
             "random": OTHER | {"marker": "v", "ls": ":"},
             "future": {"color": COLOUR["oracle"], "marker": "^", "ls": "-."}}
    label = {"own": "its own delta", "other": "another document's", "random": "random, of the same norm",
             "future": "learned on the future: a bound"}
    figure, axes = grid_of(1, len(domains) + 1, height=3.8, width=4 + 3 * len(domains), sharey=True)
    for axis, domain in zip(axes[0], domains, strict=False):
        for control, look in style.items():
            values = np.array(detail[domain]["by_chunk"][control], float)
            axis.plot((np.arange(len(values)) + 0.5) * detail["every"], values, label=label[control], **look)
        axis.set(xlabel="position (tokens)", title=f"{domain}, by position")
    for d, domain in enumerate(domains):
        for (control, look), shift in zip(style.items(), side_by_side(4, 0.5), strict=True):
            points(axes[0, -1], [d + shift], [detail[domain]["gain"][control]], **look | {"ls": "none"})
    axes[0, -1].set_xticks(range(len(domains)), domains)
    axes[0, -1].set(title="mean, with interval", xlim=(-0.5, len(domains) - 0.5))
    axes[0, 0].set_ylabel("loss - loss without delta (nats)")
    for axis in axes[0]:
        axis.axhline(0, color=INK, lw=0.8)
        axis.grid(axis="y")
    legend_below(figure, axes[0, 0], 4)
    flops = detail["flops"] / detail["flops_all_big"]
    return figure, ("Below 0 the delta helps. The router was trained on prose alone; with and without delta it spends "
                    "the same BIG, on average over positions. With its learning the router costs "
                    f"{flops:.1f} times an all-big forward.")


def lora_mixer(line):
    routers = line["detail"]["routers"]
    names = [name for name in routers if not name.endswith("_few") and name != "lora_single"]
    names += [name.removesuffix("_few") for name in routers if name.endswith("_few") and name != "lora_single_few"]
    names = sorted(dict.fromkeys(names), key=lambda name: name == "linear")
    need(names, "nothing to compare with lora_single", line["command"])
    means = {"lora_mixer": "lora_mixer\nthe paper's loss", "lora_sharp": "lora_sharp\nlow entropy",
             "lora_balance": "lora_balance\nbalance alone", "lora_budget": "lora_budget\nneither",
             "linear": "linear\nno LoRA"}
    figure, axes = grid_of(1, 1, height=3.6, width=8.5)
    axis = axes[0, 0]
    if "linear" in routers:  # it has no LoRA, and learned from many
        points(axis, [len(names) - 1], [routers["linear"]["minus_single"]], **OTHER | {"marker": "v"})
    for end, shift, style, label in (("", -0.1, OURS, "many sequences"),
                                     ("_few", 0.1, CONTROL | {"marker": "o"}, "few sequences")):
        there = [i for i, name in enumerate(names) if name + end in routers and name != "linear"]
        if there:
            points(axis, np.array(there) + shift, [routers[names[i] + end]["minus_single"] for i in there],
                   label=label, **style)
    axis.axhline(0, color=INK, lw=0.8)
    axis.set_xticks(range(len(names)), [means.get(name, name) for name in names])
    axis.set(ylabel="loss - lora_single's (nats per token)", xlim=(-0.5, len(names) - 0.5))
    axis.grid(axis="y")
    legend_below(figure, axis, 2)
    return figure, (f"Below 0 is better than one LoRA of the same total rank, trained on as much; all at "
                    f"k={line['detail']['budget']:g}.")


# ---------------------------------------------------------------------------------------------------------------------
# what all have in common

def need_field(detail, key):
    """A field that must hold something; empty is as bad as missing."""
    if not len(detail[key]):
        raise KeyError(key)
    return detail[key]


def shown(line):
    """-> effect (interval) of a finding, as text"""
    return "{:+.4f} ({:+.4f} to {:+.4f})".format(*(round(number(value), 4) + 0 for value in
                                                   (line["effect"], *line["ci"])))  # + 0: no -0.0000


def how_many_seeds(line):
    n = len(line["seeds"])
    return f"{n} seed" + "s" * (n != 1)


def draw(system, title, function, run):
    """One system's figure -> figure, caption. Raises Missing where zoo.json lacks the finding, or a part of it."""
    command = (f"{run['commands']['routers']} --name={','.join(effects.COMPARED[system])} --budget=4 && "
               f"{run['commands']['effects']} --name={system}")
    line = need(run["zoo"].get(system), f"zoo.json has no finding on {system} of this checkpoint", command)
    try:
        figure, text = function(line)
        figure.suptitle(f"{title} {line['verdict'].capitalize()}: {shown(line)}\n{line['unit']}; above 0 is better; "
                        f"{line['sequences']} sequences, {how_many_seeds(line)}", fontsize=10)
        return figure, (f"Claim: “{line['claim']}”. The paper: {line['paper']}. Here the claim "
                        f"{VERDICT[line['verdict']]}: {shown(line)}, {line['unit']}; above 0 is better; "
                        f"{line['sequences']} sequences, {how_many_seeds(line)}. {text}")
    except LookupError as error:
        raise Missing(f"the finding on {system} in zoo.json is not complete ({error}); make it with `{command}`"
                      ) from None


VERDICT = {"holds": "holds", "fails": "fails", "undecided": "stays undecided"}
SYSTEMS = {
    "rmoe": ("RMoE: does a state over depth help?", rmoe),
    "openmoe": ("OpenMoE: what do choices follow?", openmoe),
    "tryage": ("Tryage: one head for all budgets?", tryage),
    "arch": ("Arch-Router: a new domain without training?", arch),
    "glider": ("GLIDER: does a global score help a local router?", glider),
    "rewire": ("Rewiring: does learning at test time help?", rewire),
    "lora_mixer": ("LoRA-Mixer: are routed LoRAs better than one?", lora_mixer),
}
FIGURES = {f"zoo_{system}": (title, functools.partial(draw, system, title, function), ())  # as in figures.py
           for system, (title, function) in SYSTEMS.items()}
