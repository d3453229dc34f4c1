"""Make the tables of README, RESULTS and ZOO, and their pictures, from the files here: python results/make.py

The tables stand between <!-- table: name --> and <!-- end -->; tests/test_readme.py checks that they are up to date.
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from claims import interval

HERE = Path(__file__).parent
PAGES = [HERE.parent / name for name in ("README.md", "RESULTS.md", "ZOO.md")]


def lines(name):
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def markdown(header, rows):
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)


def mean_and_spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def stage1(name):
    """Validation loss in nats per token at each evaluation; the last row of bits per byte; the bigram's loss."""
    log = lines(name)
    evals = [line for line in log if line["kind"] == "eval"]
    end = next(line for line in log if line["kind"] == "end")
    order = [(domain, route) for domain in end["domains"] for route in end["domains"][domain]]
    rows = [[line["step"]] + [f"{line['domains'][d][r]['loss']:.3f}" for d, r in order] for line in evals]
    rows.append(["bits per byte"] + [f"{end['domains'][d][r]['bits_per_byte']:.3f}" for d, r in order])
    bigram = [f"{end['bigram'][d]:.3f}" if r == "big" else "" for d, r in order]
    rows.append(["bigram, nats", *bigram])
    return markdown(["step"] + [f"{d}, {'random' if r == 'random' else 'all-' + r}" for d, r in order], rows)


def speed():
    report = json.loads((HERE / "h100_train_speed.json").read_text())
    rows = [[r["variant"], f"{r['tokens_per_second'] / 1e3:.0f}k", f"{r['speed_against_nanogpt']:.2f}",
             f"{r['flops_saved']:.1%}", f"{r['time_saved']:.1%}" if r["variant"] != "nanoGPT" else ""]
            for r in report["train"]]
    return markdown(["model", "tokens/s", "against nanoGPT", "FLOPs saved", "time saved"], rows)


KINDS = {"matrix products": ("nvjet", "cublas"), "attention": ("cudnn_generated",),
         "loss over 50,304 entries": ("softmax", "logsumexp"), "optimizer and clipping": ("multi_tensor",),
         "element-wise": ("",)}


def by_kind(kernels):
    """[(milliseconds, count, name)] -> {kind: milliseconds}"""
    total = dict.fromkeys(KINDS, 0)
    for ms, _, name in kernels:
        total[next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))] += ms
    return total


def profile():
    """Where the time of a training step goes: the longest kernels, summed by kind."""
    report = json.loads((HERE / "h100_profile.json").read_text())
    total = by_kind(report["kernels"])
    rows = [[kind, f"{ms:.1f}", f"{ms / report['step_ms']:.0%}"] for kind, ms in total.items()]
    rest = report["step_ms"] - sum(total.values())
    rows.append(["hundreds of shorter kernels", f"{rest:.1f}", f"{rest / report['step_ms']:.0%}"])
    return markdown(["kernels", "ms per step", "share"], rows)


def skip_share():
    """Which sequences skip, what that costs on two-way routes, what it gains on routes with skips."""
    groups = defaultdict(list)
    for run in lines("h100_skip_share.jsonl"):
        loss = run["loss"]
        groups[run["skip_every"], run["p_skip"]].append([
            statistics.mean(loss[f"{d}/{r}"] for d in ("code", "prose") for r in kinds)
            for kinds in (("big", "two"), ("three",), ("bigskip",))])
    rows = []
    for (every, share), runs in sorted(groups.items(), key=lambda item: statistics.mean(run[0] for run in item[1])):
        sequences = {0: "none", 1: "all"}.get(every, f"every {every}th")
        rows.append([sequences, share, *map(mean_and_spread, zip(*runs, strict=True))])
    return markdown(["sequences that skip", "share", "all-big and random", "three-way random", "half BIG, half SKIP"],
                    rows)


def execution(name):
    report = json.loads((HERE / name).read_text())
    rows = [[r["p_big"], r["pass"], f"{r['flops_saved']:.1%}", f"{r['time_saved']:.1%}", f"{r['speedup']:.2f}"]
            for r in report["execution"]]
    return markdown(["p(big)", "pass", "FLOPs saved", "time saved", "dense time / sparse time"], rows)


def inference(name):
    report = json.loads((HERE / name).read_text())
    rows = [[f"{r['route']}, width {r['width']}", f"{r['flops_saved']:.1%}", f"{r['time_saved']:.1%}"]
            for r in report["inference"]]
    return markdown(["route", "FLOPs saved", "time saved"], rows)


def inference_profile():
    """The twelve longest kernels of each forward at width 1,024, summed by kind."""
    report = json.loads((HERE / "h100_inference.json").read_text())
    rows = [r for r in report["inference"] if r["width"] == 1024]
    kinds = ("matrix products", "attention", "element-wise")
    return markdown(["kernels, ms", *(r["route"] for r in rows)],
                    [[kind, *(f"{by_kind(r['kernels'])[kind]:.2f}" for r in rows)] for kind in kinds])


def cell(part, digits=3):
    """(estimate, low, high) -> text"""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*part, d=digits)


def oracle():
    """Losses of the oracle at each budget, sequential context, beside what every token shares."""
    report = json.loads((HERE / "h100_oracle.json").read_text())
    base = {(row["domain"], str(row["k"])): row for row in report["baselines"]["sequential"]}
    found = {(row["domain"], row["budget"]): row for row in report["searches"]["sb_sequential_exhaustive"]["rows"]}
    rows = []
    for label in dict.fromkeys(label for _, label in found):
        other = base.get(("all", label))
        rows.append([{"any": "free", "6-2": "6 down to 2", "2-6": "2 up to 6"}.get(label, label),
                     *(cell((found[d, label]["loss"], *found[d, label]["ci"])) for d in ("code", "prose", "all")),
                     *(f"{other[key][0]:.3f}" if other else "" for key in ("random", "best100_data_set", "fixed"))])
    return markdown(["k", "oracle, code", "oracle, prose", "oracle, both", "mean pattern, both", "best of 100, both",
                     "best fixed, both"], rows)


def controls():
    """The oracle's gain over the best fixed pattern, split: sequential context, both domains together."""
    report = json.loads((HERE / "h100_oracle.json").read_text())
    return markdown(["k", "best fixed", "oracle gains", "= foresight", "+ hindsight", "split-label oracle gains"],
                    [[row["k"], f"{row['fixed']:.3f}",
                      *(cell(row[key]) for key in ("gain", "foresight", "hindsight", "learnable"))]
                     for row in report["controls"]["sequential"] if row["domain"] == "all"])


def study(name):
    """-> a file that the H100's study collected over base seeds"""
    return json.loads((HERE / "h100" / f"{name}.json").read_text())


def findings():
    """Each claim on the H100, over base seeds, and on the laptop: the part that is furthest from being met."""
    bases = [line for line in study("findings") if (line["router"] or "mlp") == "mlp"]
    laptop = {line["id"]: line for line in json.loads((HERE / "cpu_findings.json").read_text())
              if line.get("router", "linear") == "linear"}

    def over(line):
        seeds = len(line["base_seeds"])
        parts = "; ".join(cell((effect, *ci)) for effect, ci in zip(line["effects"], line["cis"], strict=True))
        verdict = line["verdicts"][0] + " on one seed" if seeds == 1 else line["verdict"]
        return f"{verdict}, {parts}"

    def shown(line):
        frozen = "frozen" in (line["context"], *line.get("baseline_contexts", {}).values())
        where = (", frozen" if line["context"] == "frozen" else ", oracle frozen") if frozen else ""
        value = cell((line["effect"], *(float("nan") if v is None else v for v in line["ci"])))
        return f"{line['verdict']}, {value}{where}, {line['sequences']} sequences"
    return markdown(["claim", "unit", "GPU, three base seeds", "laptop"],
                    [[f"{line['id']}: {line['claim']}", laptop[line["id"]]["unit"], over(line),
                      shown(laptop[line["id"]])] for line in bases])


PAPER_ROUTERS = ("linear", "gumbel", "mlp", "advantage", "distilled")


def router_rows(domain="all"):
    """-> {(name, k): row} of the H100's run, averaged over router seeds"""
    rows = json.loads((HERE / "h100_routers.json").read_text())["rows"]
    return {(row["name"], row["budget"]): row for row in rows if (row["domain"], row["choices"]) == (domain, "sb")}


def share(part):
    return "{:.1%} ({:.1%} to {:.1%})".format(*part)


def routers():
    """The five kinds, both domains: what they spend, and their loss against baselines at that spending."""
    rows = sorted((row for row in router_rows().values() if row["name"] in PAPER_ROUTERS and row["budget"] % 2 == 0),
                  key=lambda row: (row["budget"], row["loss"]))
    return markdown(["router", "k", "seeds", "BIG", "loss", "minus best fixed", "minus best of 100", "minus all-big",
                     "recovered"],
                    [[row["name"], f"{row['budget']:g}", len(row["seeds"]), f"{row['achieved']:.2f}",
                      f"{row['loss']:.3f}",
                      *(cell(row["versus"][key], 4) for key in ("fixed", "best100_data_set", "all_big")),
                      share(row["recovered"])] for row in rows])


def routers_cpu():
    """The laptop's: baselines of their own context only, all on the routers' sequences."""
    rows = [row for row in json.loads((HERE / "cpu_routers.json").read_text())["rows"] if row["domain"] == "all"]
    return markdown(["router", "k", "BIG", "loss", "minus best fixed", "minus all-big"],
                    [[row["name"], f"{row['budget']:g}", f"{row['achieved']:.2f}", f"{row['loss']:.3f}",
                      *(cell(row["versus"][key]) for key in ("fixed", "all_big"))]
                     for row in sorted(rows, key=lambda row: (row["budget"], row["loss"]))])


def foresight():
    """What could be foreseen on the routers' own base, and what they find of it: gains over the best fixed pattern."""
    report, rows = json.loads((HERE / "h100_routers.json").read_text()), router_rows()

    def gain(name, k):
        mean, low, high = rows[name, k]["versus"]["fixed"]
        return cell((-mean, -high, -low), 4)
    return markdown(["k", "linear router gains", "MLP router gains", "expected-loss oracle (foresight)", "oracle"],
                    [[row["k"], gain("linear", row["k"]), gain("mlp", row["k"]), cell(row["foresight"]),
                      cell(row["gain"])] for row in report["controls"]["rows"]])


def zoo(domain):
    """All systems, one domain, minus the best fixed pattern at the same spending; the project's own kinds beside."""
    of, both, rows = router_rows(domain), router_rows(), []
    for name in sorted({name for name, k in of if k == 4}, key=lambda name: of[name, 4.0]["versus"]["fixed"][0]):
        deciding = both[name, 4.0]["router_flops"] / 1e6
        seeds = sorted({len(of[name, k]["seeds"]) for k in (2.0, 4.0, 6.0, 8.0) if (name, k) in of})
        rows.append([name, " to ".join(map(str, seeds)), "0" if not deciding else f"{deciding:.2f}"
                     if deciding < 100 else f"{deciding:,.0f}"])
        rows[-1] += [cell(of[name, k]["versus"]["fixed"], 4) if (name, k) in of else "" for k in (2.0, 4.0, 6.0, 8.0)]
        rows[-1].append(share(both[name, 4.0]["recovered"]))
    return markdown(["system", "seeds", "MFLOP to decide", *(f"k = {k}" for k in (2, 4, 6, 8)),
                     "recovered, k = 4, both domains"], rows)


def of_bases(part, digits=3):
    """A value of the study's oracle.json or routers.json -> its mean over base seeds, the range of their intervals"""
    return cell((part["mean"], *part["range"]), digits)


def oracle_bases():
    """The oracle's gain over the best fixed pattern on every base seed, and what it is made of."""
    return markdown(["k", "oracle gains", "= foresight", "+ hindsight", "split-label oracle gains"],
                    [[row["k"], *(of_bases(row[key]) for key in ("gain", "foresight", "hindsight", "learnable"))]
                     for row in study("oracle")])


def routers_bases():
    """The paper's routers on every base seed, one router each, by budget."""
    rows = sorted((row for row in study("routers") if row["name"] in PAPER_ROUTERS),
                  key=lambda row: (row["budget"], row["fixed"]["mean"]))
    return markdown(["router", "k", "minus best fixed", "minus best of 100", "minus all-big"],
                    [[row["name"], f"{row['budget']:g}",
                      *(of_bases(row[key], 4) for key in ("fixed", "best100_data_set", "all_big"))] for row in rows])


def zoo_bases():
    """All systems on every base seed, one router each: their loss minus the best fixed pattern's, by k = 4."""
    rows = {(row["name"], row["budget"]): row["fixed"] for row in study("routers")}
    names = sorted((name for name, k in rows if k == 4), key=lambda name: rows[name, 4]["mean"])
    return markdown(["system", "k = 2", "k = 4", "k = 6", "k = 8"],
                    [[name, *(of_bases(rows[name, k], 4) if (name, k) in rows else "" for k in (2, 4, 6, 8))]
                     for name in names])


def zoo_times():
    """What deciding costs in time: FLOPs and time that each system saves against all-big, on a laptop, k = 4."""
    report = json.loads((HERE / "cpu_router_times.json").read_text())
    def runs(row):
        several = f" ({min(row['time_saved_of_runs']):.0%} to {max(row['time_saved_of_runs']):.0%})"
        return f"{row['time_saved']:.0%}" + several * (len(row["time_saved_of_runs"]) > 1)
    return markdown(["system", "BIG", "MFLOP to decide", "FLOPs saved", "time saved"],
                    [[row["name"], f"{row['big']:.2f}", f"{row['router_flops'] / 1e6:.3f}", f"{row['flops_saved']:.0%}",
                      runs(row)] for row in report["rows"]])


def zoo_times_h100():
    """FLOPs and time that systems save against all-big on an H100, k = 4."""
    all_big = measured("seed1_dense")["flops"]["big"]
    rows = [row for row in json.loads((HERE / "h100_router_table.json").read_text())
            if row["domain"] == "all" and row["time_saved"] is not None]
    return markdown(["system", "BIG", "MFLOP to decide", "FLOPs saved", "time saved"],
                    [[row["name"], f"{row['achieved']:.2f}", f"{row['router_flops'] / 1e6:.2f}",
                      f"{1 - row['flops'] / all_big:.0%}", f"{row['time_saved']:.0%}"]
                     for row in sorted(rows, key=lambda row: -row["time_saved"]) if not row["name"].endswith("few")])


def effects():
    """What each system's paper claims, measured: on one base, on three bases, on a laptop."""
    over = {line["system"]: line for line in study("zoo")}
    runs = [{line["system"]: line for line in json.loads((HERE / f"{name}_zoo.json").read_text())}
            for name in ("h100", "cpu")]

    def shown(line):
        if line is None:
            return "not measured"
        n = len(line["seeds"])
        return (f"{line['verdict']}, {cell((line['effect'], *line['ci']), 4)}, {line['sequences']} sequences, {n} "
                f"seed{'s' * (n > 1)}")

    def bases(line):
        parts = [cell((effect, *ci), 4) for effect, ci in zip(line["effects"], line["cis"], strict=True)]
        return f"{line['verdict']}, {'; '.join(parts)}, {line['sequences'][0]} sequences each"
    return markdown(["system", "claim", "unit", "GPU, one base each", "GPU, three bases, a router each", "laptop"],
                    [[name, line["claim"], line["unit"], shown(runs[0].get(name)), bases(over[name]), shown(line)]
                     for name, line in runs[1].items()])


def joint(name):
    """Router and base trained together against dense models, mean over seeds; the last column is paired."""
    report = json.loads((HERE / name).read_text())
    titles = {"joint": f"router and base together, k = {report['k']}", "equal": "dense, FLOPs of the former",
              "full": "dense, all BIG"}
    rows = []
    for key, title in titles.items():
        minus = f"joint - {key}"
        rows.append([title, f"{statistics.mean(seed['flops'][key] for seed in report['seeds']) / 1e6:.2f}",
                     mean_and_spread([seed["loss"]["all"][key][0] for seed in report["seeds"]]),
                     "" if key == "joint" else cell(report["mean_over_seeds"]["all"][minus]),
                     "" if key == "joint" else f"{report['standard_deviation_over_seeds'][minus]:.3f}"])
    return markdown(["model", "MFLOP per token", "loss", "joint minus it", "spread over seeds"], rows)


def measured(run):
    """-> losses.json of a run of the H100's study"""
    return json.loads((HERE / "h100" / run / "losses.json").read_text())


LEADS = {  # of joint training on the H100: what differs
    "lead_half_tau1_s1": "tau = 1; the budget falls in the first half of the steps",
    "lead_tau1_s1": "tau = 1; in the first 15%",
    "gpu_joint_k4_s1": "tau = 2; in the first 15% (the preset's)",
    "lead_layers_s1": "tau = 1; a share of a third for each layer, from the first step",
    "lead_layers_falling_s1": "tau = 1; a share for each layer, which falls in the first 15%",
}


def joint_leads():
    """Settings of joint training on the H100, k = 4, seed 1, against that seed's dense models: paired."""
    dense = {name: np.array(measured(f"joint/gpu_{name}_s1")["losses"]["big"]) for name in ("width598", "full")}
    rows = []
    for run, title in LEADS.items():
        found = measured(f"joint/{run}")
        losses = np.array(found["losses"]["k4"])
        rows.append([title, f"{found['big_per_token']['k4']:.2f}", f"{losses.mean():.3f}",
                     *(cell(interval(losses - other), 4) for other in dense.values())])
    return markdown(["joint training, k = 4", "BIG", "loss", "minus dense of equal FLOPs", "minus full dense"], rows)


def over_seeds(part):
    """-> cells of reference.over_seeds: both sides, their difference, its deviation over seeds"""
    spread = part["deviation_over_seeds"]
    return [*(mean_and_spread(side) if len(side) > 1 else f"{side[0]:.3f}" for side in part["losses"]),
            cell(part["difference"]), "" if spread is None else f"{spread:.3f}"]


def fig8(name):
    """Duo at a share of BIG against a dense model of as many FLOPs (paper, Fig. 8)."""
    report = json.loads((HERE / name).read_text())
    return markdown(["share of BIG", "MFLOP per token", "Duo", "dense", "Duo minus it", "spread over seeds"],
                    [[f"{row['p_big']:g}", f"{row['flops'] / 1e6:.{1 if row['flops'] > 1e7 else 2}f}",
                      *over_seeds(row["duo - dense"])] for row in report["fig8"]])


def stage1_changes(name):
    """Duo against the same training without skips, and with SMALL trained beside a frozen BIG; the same seeds."""
    report = json.loads((HERE / name).read_text())
    titles = ["all-small", "a quarter BIG", "half BIG", "three quarters BIG", "all-big",
              "a third each SKIP, SMALL, BIG", "half SKIP, half BIG"]
    rows = []
    for title, plain, frozen in zip(titles, report["without_skips"], report["freeze_then_small"], strict=True):
        duo, _, *without = over_seeds(plain["duo - other"])
        rows.append([title, duo, *without, *over_seeds(frozen["duo - other"])[2:]])
    return markdown(["random routes", "Duo", "minus Duo without skips", "spread over seeds",
                     "minus freeze-then-small", "spread over seeds"], rows)


def scale(name):
    """The oracle's gain over all-BIG, and what of it could be foreseen, against the model's size."""
    report, rows = json.loads((HERE / name).read_text()), []
    for row in sorted(report["scale"], key=lambda row: (row["parameters"], row["steps"])):
        parts = [row[f"all-BIG - {kind}"] for kind in ("oracle", "expected-loss oracle")]
        rows.append([f"{row['n_layer']} x {row['n_embd']}", f"{row['parameters'] / 1e6:.1f} M", f"{row['steps']:,}",
                     over_seeds(parts[0]["any"])[0],
                     *(cell(part[share]["difference"]) for part in parts for share in ("any", "1/3"))])
    return markdown(["layers x width", "parameters", "steps", "all-big", "oracle gains, any k", "k = a third",
                     "could be foreseen, any k", "k = a third"], rows)


def retrofit():
    """A pretrained model whose FFNs are BIG (paper, appendix A): random routes, routers, and the greedy oracle."""
    folder, rows = HERE / "h100" / "smol", []
    run, oracle, routers = (json.loads((folder / f"{name}.json").read_text()) for name in
                            ("losses", "oracle", "routers"))
    losses = {routes: np.array(values) for routes, values in run["losses"].items()}
    L, big = 30, losses["0/1"]
    for routes, title in (("0/1", "all-big: the model itself"), ("0/0.75", "random"), ("0/0.5", "random"),
                          ("0/0.25", "random"), ("0/0", "all-small")):
        rows.append([title, f"{L * float(routes.split('/')[1]):g}", f"{run['flops'][routes] / 1e6:.0f}",
                     f"{losses[routes].mean():.3f}", "" if routes == "0/1" else cell(interval(losses[routes] - big)),
                     len(big)])
    for row in routers:
        if row["domain"] == "all":
            rows.append(["MLP router", f"{row['achieved']:.1f}", f"{row['flops'] / 1e6:.0f}", f"{row['loss']:.3f}",
                         cell(row["versus"]["all_big"]), row["sequences"]])
    found = {row["budget"]: row for row in oracle["searches"]["sb_frozen_greedy"]["rows"] if row["domain"] == "all"}
    for budget in ("30", "29", "18", "10", "4", "0"):
        row = found[budget]
        rows.append(["oracle, greedy", f"{row['big']:g}", "", f"{row['loss']:.3f}",
                     "" if budget == "30" else f"{row['loss'] - found['30']['loss']:.3f}", row["sequences"]])
    return markdown(["route", "BIG of 30", "MFLOP per token", "loss", "minus all-big", "sequences"], rows)


def any_h100():
    report = json.loads((HERE / "h100_joint_leads.json").read_text())
    return markdown(["told k", "BIG", "MFLOP per token", "loss"],
                    [[row["k"], f"{row['big_per_token']:.2f}", f"{row['flops'] / 1e6:.2f}", f"{row['loss'][0]:.3f}"]
                     for row in report["any"]])


def any_budget(name):
    """One base and one router that is told k."""
    report = json.loads((HERE / name).read_text())
    return markdown(["told k", "BIG", "MFLOP per token", "loss", "minus full dense"],
                    [[row["k"], f"{row['big_per_token']:.2f}", f"{row['flops'] / 1e6:.2f}",
                      f"{row['loss']['all']['any'][0]:.3f}", cell(row["loss"]["all"]["any - full"])]
                     for row in report["any"]])


def router_time(name):
    """Where a run was timed compiled, too, time saved is of that, and a last column of the other."""
    rows = json.loads((HERE / name).read_text())["router"]
    eager = any("us/token, all-big, compiled" in row for row in rows)
    table = [[row["what"], f"{row['big']:.2f}", f"{row['flops_saved']:.1%}", f"{row['time_saved']:.1%}",
              f"{row['time_saved, known']:.1%}"] for row in rows]
    if eager:
        table = [[*cells, f"{row.get('time_saved, not compiled', row['time_saved']):.1%}"]
                 for cells, row in zip(table, rows, strict=True)]
    return markdown(["", "BIG", "FLOPs saved", "time saved", "time saved, choices known",
                     *["time saved, not compiled"] * eager], table)


def searches():
    """DP and greedy over all k: against exhaustive search at 12 layers, against the widest early DP at 24."""
    rows = {}
    for name in ("cpu_oracle.json", "cpu_oracle_24.json"):
        quality = json.loads((HERE / name).read_text())["quality"]
        for search in dict.fromkeys(row["search"] for row in quality):
            of = [row for row in quality if row["search"] == search]
            gaps = [row["gap"][0] for row in of]
            rows.setdefault(search, []).extend([f"{of[0]['work']:.1%}", f"{statistics.mean(gaps):.4f}",
                                                f"{max(gaps):.4f}"])
    rows["dp, early, width 32"] += ["100.0%", "0", "0"]
    return markdown(["search", "12 layers: work", "mean gap", "largest", "24 layers: work", "mean gap", "largest"],
                    sorted(([search, *row] for search, row in rows.items()), key=lambda row: float(row[1][:-1])))


TABLES = {"stage1-h100": lambda: stage1("h100_stage1.jsonl"), "stage1-cpu": lambda: stage1("cpu_stage1.jsonl"),
          "speed": speed, "profile": profile, "skip-share": skip_share,
          "execution-h100": lambda: execution("h100_execution.json"),
          "execution-cpu": lambda: execution("cpu_bench.json"),
          "inference-h100": lambda: inference("h100_inference.json"),
          "inference-cpu": lambda: inference("cpu_bench.json"),
          "inference-profile": inference_profile, "oracle-h100": oracle, "controls-h100": controls,
          "findings": findings, "routers-h100": routers, "routers-cpu": routers_cpu, "foresight-h100": foresight,
          "zoo-h100-code": lambda: zoo("code"), "zoo-h100-prose": lambda: zoo("prose"), "zoo-times-cpu": zoo_times,
          "oracle-bases": oracle_bases, "routers-bases": routers_bases, "zoo-bases": zoo_bases, "effects": effects,
          "joint-cpu": lambda: joint("cpu_joint.json"), "joint-cpu-k2": lambda: joint("cpu_joint_k2.json"),
          "joint-h100": lambda: joint("h100/joint/gpu_joint_k4.json"),
          "joint-h100-k2": lambda: joint("h100/joint/gpu_joint_k2.json"),
          "joint-h100-k6": lambda: joint("h100/joint/gpu_joint_k6.json"),
          "joint-leads-h100": joint_leads, "any-h100": any_h100,
          "any-cpu": lambda: any_budget("cpu_joint.json"),
          "router-time-cpu": lambda: router_time("cpu_router_bench.json"),
          "router-time-h100": lambda: router_time("h100_router_bench.json"),
          "fig8-h100": lambda: fig8("h100/ablations.json"), "fig8-cpu": lambda: fig8("cpu_ablations.json"),
          "stage1-changes-h100": lambda: stage1_changes("h100/ablations.json"),
          "stage1-changes-cpu": lambda: stage1_changes("cpu_ablations.json"),
          "retrofit-h100": retrofit,
          "scale-h100": lambda: scale("h100/ablations.json"), "scale-cpu": lambda: scale("cpu_ablations.json"),
          "zoo-times-h100": zoo_times_h100,
          "searches-cpu": searches}


def fill(text):
    """A page's text -> the same with each of its tables made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if start not in text:
            continue
        before, rest = text.split(start)
        text = before + start + make() + "\n" + rest[rest.index(end):]
    return text


def draw():
    """The picture: left, what a route is (drawn at random); right, the loss under three policies, measured."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import torch

    from model import random_route

    colour = {"skip": "#dddddd", "small": "#e69f00", "big": "#0072b2", "random": "#009e73"}
    plt.rcParams.update({"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "nanoduo"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.15), layout="constrained")
    words = ["def", " mean", "(", "x", "):", " return", " sum", "(", "x", ")"]
    route = random_route(1, len(words), 12, 0.2, 0.4, torch.Generator().manual_seed(3))[0]  # [T, L]
    for t in range(len(words)):
        for layer, choice in enumerate(route[t].tolist()):
            kind = ("skip", "small", "big")[choice]
            size = (0.12, 0.4, 0.84)[choice]
            left.add_patch(plt.Rectangle((t - size / 2, layer - 0.42), size, 0.84, color=colour[kind], lw=0))
    left.set(xlim=(-0.7, len(words) - 0.3), ylim=(-0.7, 11.7), yticks=range(0, 12), ylabel="layer",
             title="every token takes its own route")
    left.set_xticks(range(len(words)), [word.replace(" ", "·") for word in words], rotation=45, ha="right")
    left.spines[:].set_visible(False)
    keys = [plt.Rectangle((0, 0), 1, 1, color=colour[kind], label=kind.upper()) for kind in ("big", "small", "skip")]
    left.legend(handles=keys, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False)
    evals = [line for line in lines("h100_stage1.jsonl") if line["kind"] == "eval"]
    for domain, style in (("prose", "--"), ("code", "-")):
        for kind in ("small", "random", "big"):
            loss = [line["domains"][domain][kind]["loss"] for line in evals]
            name = kind if kind == "random" else f"all-{kind}"
            right.plot([line["step"] for line in evals], loss, style, color=colour[kind], marker="o", ms=3,
                       label=f"{domain}, {name}")
    right.set(xlabel="training step (32,768 tokens each)", ylabel="validation loss (nats per token)",
              title="one model, three policies")
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, ncols=2, fontsize=9)
    figure.savefig(HERE / "stage1.svg", metadata={"Date": None})
    figure.savefig(HERE / "stage1.png", dpi=110)


def draw_ways():
    """RESULTS.md's picture: left, what each way to spend less costs per FLOP; right, the oracle's gain against size."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    report = study("ablations")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), width_ratios=(1.15, 1), layout="constrained")

    def curve(points, **style):
        """points: (FLOPs per token, losses of the base seeds)"""
        left.errorbar([flops / 1e6 for flops, _ in points], [statistics.mean(losses) for _, losses in points],
                      [statistics.stdev(losses) for _, losses in points], ms=4, capsize=2, **style)
    flops = [row["flops"] for row in report["fig8"]]
    pairs = [row["duo - dense"]["losses"] for row in report["fig8"]]
    together = [study(f"joint/gpu_joint_k{k}")["seeds"] for k in (2, 4, 6)]
    of = {name: [(statistics.mean(seed["flops"][name] for seed in seeds),
                  [seed["loss"]["all"][name][0] for seed in seeds]) for seeds in together]
          for name in ("joint", "equal")}
    curve(sorted([*zip(flops, [pair[1] for pair in pairs], strict=True), *of["equal"]]), color="#000000", marker="s",
          label="dense, a model for each")
    curve(of["joint"], color="#d55e00", marker="o", ls="none", label="trained with a router, k = 2, 4, 6")
    all_big = statistics.mean(pairs[-1][0])
    routed = sorted((row["flops"] / 1e6, all_big + row["all_big"]["mean"]) for row in study("routers")
                    if row["name"] == "mlp")
    left.plot(*zip(*routed, strict=True), "^--", color="#0072b2", ms=4, label="MLP router on frozen Duo, k = 2 to 10")
    curve(list(zip(flops, [pair[0] for pair in pairs], strict=True)), color="#009e73", marker="o",
          label="Duo, random routes")
    frozen = [row["duo - other"]["losses"][1] for row in report["freeze_then_small"][:5]]
    curve(list(zip(flops, frozen, strict=True)), color="#999999", marker="v", label="freeze-then-small, random routes")
    left.set(xlabel="MFLOP per token", ylabel="validation loss (nats per token)", title="what spending less costs")
    left.legend(frameon=False, fontsize=9)

    rows = sorted(report["scale"], key=lambda row: (row["n_layer"], row["n_embd"], row["steps"]))
    for key, colour, title, shift in (("all-BIG - oracle", "#0072b2", "the oracle gains", -0.2),
                                      ("all-BIG - expected-loss oracle", "#e69f00", "could be foreseen", 0.2)):
        middle, low, high = np.transpose([row[key]["any"]["difference"] for row in rows])
        right.bar(np.arange(len(rows)) + shift, middle, 0.38, color=colour, label=title,
                  yerr=[middle - low, high - middle], capsize=2)
    right.set_xticks(range(len(rows)), [f"{row['n_layer']} x {row['n_embd']}\n{row['steps']:,}" for row in rows],
                     fontsize=7.5)
    right.set(xlabel="layers x width, training steps", ylabel="nats over all-big",
              title="the oracle's gain against size")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "ways.png", dpi=110, metadata={"Software": None})


def draw_zoo():
    """ZOO.md's pictures: as analyze.py draws them, from the committed findings."""
    import zoo_figures

    findings = json.loads((HERE / "h100_zoo.json").read_text())
    for system in ("rmoe", "arch", "openmoe", "glider", "rewire", "lora_mixer"):
        line = next(line for line in findings if line["system"] == system)
        figure, _ = getattr(zoo_figures, system)(line)
        figure.savefig(HERE / f"zoo_{system}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
    draw()
    draw_ways()
    draw_zoo()
