"""README is code too: its commands parse, its tables come from results/, its numbers agree with them."""
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import reference
from common import parse_config
from results import make

ROOT = Path(__file__).parent.parent
README, RESULTS, ZOO = PAGES = [(ROOT / name).read_text() for name in ("README.md", "RESULTS.md", "ZOO.md")]
TEXT, ZOO_TEXT = (" ".join(page.split()) for page in (README + RESULTS, ZOO))  # sentences, however lines are broken
CONFIGS = {"train": "TrainConfig", "sample": "SampleConfig", "bench": "BenchConfig", "data": "DataConfig",
           "oracle": "OracleConfig", "router": "RouterConfig", "analyze": "AnalyzeConfig", "effects": "EffectsConfig",
           "reference": "ReferenceConfig"}
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun --nproc_per_node=\d+) (\w+\.py[^`|#\n]*)", "".join(PAGES))))


def results(name):
    return json.loads((ROOT / "results" / name).read_text())


def test_commands_are_found():
    assert len(COMMANDS) > 10 and {c.split(".py")[0] for c in COMMANDS} >= {"train", "sample", "bench"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    if flags == ["--help"]:
        return
    flags = ["--device=cpu" if flag == "--device=cuda" else flag for flag in flags]
    parse_config(getattr(module, CONFIGS[script.removesuffix(".py")]), flags, module.PRESETS)


def test_flags_exist():
    known = {"--nproc_per_node"}
    for name, config in CONFIGS.items():
        module = importlib.import_module(name)
        known |= {f"--{field}" for field in getattr(module, config).__dataclass_fields__} | {"--help"}
    assert set(re.findall(r"--[a-z_]+", re.sub(r"<!--.*?-->", "", "".join(PAGES)))) <= known


def test_run_sh_knows_its_commands():
    assert set(re.findall(r"bash run\.sh(?: (\w+))?", README)) == {"", "test", "reference"}
    done = subprocess.run(["bash", "-n", ROOT / "run.sh"], check=False)
    assert done.returncode == 0


def test_tables_are_up_to_date():
    for page in PAGES:
        assert make.fill(page) == page, "run `python results/make.py`"
    assert set(re.findall("<!-- table: (.*) -->", "".join(PAGES))) == set(make.TABLES)


def test_files_named_exist():
    for name in re.findall(r"`((?:\w+/)?\w+\.(?:py|md|sh|svg))`|\]\(((?!http)[^)]+)\)", "".join(PAGES)):
        assert (ROOT / "".join(name)).exists(), name


def oracle_numbers():
    """The sentences about the oracle that quote a number."""
    report, cpu = results("h100_oracle.json"), results("cpu_oracle.json")
    one, best = ({line["id"]: line for line in report["findings"]}[id] for id in ("F2", "F3"))
    assert one["verdict"] == best["verdict"] == "holds"
    assert {k for k, n in enumerate(best["detail"]["best_k_resampled"]) if n} == {5, 6}
    row, on_laptop = (next(row for row in controls if row["domain"] == "all" and row["k"] == 6)
                      for controls in (report["controls"]["sequential"], cpu["controls"]["frozen"]))
    own, reference = report["models"]["own"], report["models"]["reference"]
    apart = sum(own[d]["big"]["loss"] - reference[d]["big"]["loss"] for d in own) / len(own)

    deep = results("cpu_oracle_24.json")["quality"]
    least = min(deep, key=lambda row: row["loss"])
    gained = next(row["loss"] for row in deep if row["k"] == 24) - least["loss"]

    searches = report["searches"]

    def loss(name, budget):
        return next(row["loss"] for row in searches[name]["rows"] if (row["domain"], row["budget"]) == ("all", budget))
    two, six = (loss("sb_sequential_exhaustive_expected_2+4+6+8+10", k) for k in "26")
    one_big, all_big = loss("sb_frozen_exhaustive_expected", "1"), loss("sb_sequential_exhaustive", "12")
    three_way = next(name for name in searches if name.startswith("xsb_frozen"))

    def shown(part):
        return "{:.3f} ({:.3f} to {:.3f})".format(*part)
    return [f"The searches took {sum(search['seconds'] for search in searches.values()) / 60:.0f} minutes",
            f"all-big {own['code']['big']['loss']:.3f} and {own['prose']['big']['loss']:.3f} at its end",
            f"the best of 3^12 has {loss(three_way, 'any'):.2f} nats",
            f"are {all_big - six:.3f} better at k = 6 and {all_big - two:.3f} at k = 2",
            f"with one BIG layer {one_big - all_big:.3f} worse",
            f"by {one['effect']:.3f} nats ({one['ci'][0]:.3f} to {one['ci'][1]:.3f})", "best at k = 5 or 6",
            f"gains {row['gain'][0]:.3f} nats, of which {shown(row['foresight'])} could be foreseen",
            f"which itself is {apart:.2f} nats better", f"up to {row['hindsight'][0]:.3f} is hindsight",
            f"gain {gained:.2f} nats over all-big, with {least['k']} BIG layers",
            f"{shown(on_laptop['gain'])}, of which {shown(on_laptop['foresight'])} is foresight"]


def base_numbers():
    """The sentences about oracle and routers on the study's three bases that quote a number."""
    gains = {row["k"]: row for row in results("h100/oracle.json")}
    rows = {(row["name"], row["budget"]): row for row in results("h100/routers.json")}
    mlp = {k: rows["mlp", k] for k in (2, 4, 6, 8, 10)}
    assert all(row["base_seeds"] == [1, 2, 3] for row in gains.values())
    assert {tuple(row["sequences"]) for row in gains.values()} == {(128,) * 3}
    for (name, k), row in rows.items():  # on every base
        assert set(row["sequences"]) == {256} and row["base_seeds"] == [1, 2, 3], (name, k)
        if name in make.PAPER_ROUTERS:
            clear = [part[2] < 0 for part in row["best100_data_set"]["of_seeds"]]
            assert all(clear) == (k == 2 or k == 4 and name != "distilled" or k == 6 and name in ("gumbel", "mlp"))
            assert k < 8 or not any(clear)
    ahead = [np.mean(results(f"h100/seed{s}/losses.json")["losses"]["0/1"])
             - np.mean(results(f"h100/seed{s}_reference/losses.json")["losses"]["big"]) for s in (1, 2, 3)]
    before = results("h100_oracle.json")["controls"]["sequential"]
    before = next(row for row in before if (row["domain"], row["k"]) == ("all", 6))

    def shown(part, sign=1):
        ends = sorted(sign * end for end in part["range"])
        return f"{sign * part['mean']:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"

    def reached(k):
        return -mlp[k]["fixed"]["mean"] / gains[k]["foresight"]["mean"]
    return [f"gains {shown(gains[6]['gain']).replace(' (', ' nats (')} over the best fixed pattern at 6",
            f"at most {shown(gains[6]['hindsight'])} of that needs the answer",
            f"{shown(gains[6]['foresight'])} could be foreseen",
            f"reach {shown(mlp[6]['fixed'], -1)} of those {gains[6]['foresight']['mean']:.3f} at k = 6, of "
            f"{gains[4]['foresight']['mean']:.3f} at k = 4 they reach {shown(mlp[4]['fixed'], -1)}",
            f"loses {shown(mlp[4]['all_big'])} to all-big",
            f"and so {min(ahead):.2f} to {max(ahead):.2f} nats better than all-big",
            f"{gains[6]['foresight']['mean']:.3f} for {before['foresight'][0]:.3f} at k = 6",
            f"{gains[6]['learnable']['mean']:.3f} for {before['learnable'][0]:.3f}",
            f"At k = 4 the MLP finds {reached(4):.0%} of what these bases' stronger models foresee, at k = 6 "
            f"{reached(6):.0%}"]


def joint_numbers():
    """The sentences about joint training and routed time that quote a number."""
    report, h100, two = (results(f"{name}.json") for name in ("cpu_joint", "h100/joint/gpu_joint_k4", "cpu_joint_k2"))
    six, h100_two = (results(f"h100/joint/gpu_joint_k{k}.json") for k in (6, 2))
    by_seed = {name: [seed["loss"]["all"]["joint - equal"][0] for seed in study["seeds"]] for name, study in
               (("cpu", report), ("h100", h100), ("two", two), ("six", six), ("h100_two", h100_two))}
    assert max(max(by_seed[name]) for name in ("cpu", "h100", "two")) < 0  # below, in every seed of these studies
    assert min(by_seed["six"]) < 0 < max(by_seed["six"]) and min(by_seed["h100_two"]) > 0
    unclear = [seed["loss"]["all"]["joint - equal"][1] < 0 for seed in h100_two["seeds"]]
    assert unclear == [True, False, False]
    first, last = zip(*((seed["big_by_layer"][0], seed["big_by_layer"][-1]) for seed in h100_two["seeds"]), strict=True)
    assert min(first[0], first[2]) >= 0.97 and round(first[1], 2) == 0.58 and round(last[1], 2) == 0.85
    assert two["mean_over_seeds"]["all"]["joint - full"][1] > 0
    full = [seed["loss"]["all"]["joint - full"][0] for seed in report["seeds"]]
    over = {name: report["mean_over_seeds"]["all"][f"joint - {name}"] for name in ("equal", "full")}
    ours = {name: h100["mean_over_seeds"]["all"][f"joint - {name}"] for name in ("equal", "full")}
    assert all(min(seed["big_by_layer"][0], seed["big_by_layer"][-1]) > 0.88 and max(seed["big_by_layer"][1:3]) < 0.02
               for seed in h100["seeds"])
    leads = [np.mean(results(f"h100/joint/{run}/losses.json")["losses"]["k4"]) for run in make.LEADS]
    assert round(max(leads) - min(leads), 3) == 0.010
    waited = results("h100_router_bench_before.json")["router"][0]
    waited = waited["us/token, routed"] / waited["us/token, all-big"]
    before, laptop = results("h100_joint_leads.json"), results("cpu_joint_leads.json")
    tau1 = {str(run["seed"]): run for run in before["runs"] if run["lead"] == "tau1"}
    falling = sum(before["before"]["loss"][s] - tau1[s]["loss"]["all"][0] for s in "123") / 3
    of_any = next(row["loss"][0] for row in before["any"] if row["k"] == 4)
    four = next(row for row in report["any"] if row["k"] == 4)["loss"]["all"]["any"][0]
    cpu_times, times = (results(f"{name}_router_bench.json")["router"] for name in ("cpu", "h100"))
    prefill = [row["time_saved / flops_saved"] for row in cpu_times if "prefill" in row["what"]]
    routed = [row["time_saved / flops_saved"] for row in times[:2]]
    known = [row["time_saved, known"] / row["flops_saved"] for row in times[:2]]

    def below(part):
        return "{:.3f} nats ({:.3f} to {:.3f})".format(*(abs(x) for x in (part[0], part[2], part[1])))
    return ["in every seed, by {:.4f}, {:.4f} and {:.4f}".format(*(-gap for gap in by_seed["h100"])),
            "({:.4f}, {:.4f} and {:.4f} in the three seeds)".format(*by_seed["six"]),
            "({:.4f}, {:.4f} and {:.4f}, the first not clearly)".format(*by_seed["h100_two"]),
            "({:.3f} below, {:.3f} to {:.3f}, but above in one seed)".format(
                *(abs(end) for end in six["mean_over_seeds"]["all"]["joint - equal"])),
            "with 2 it is {:.3f} ({:.3f} to {:.3f}) worse".format(*h100_two["mean_over_seeds"]["all"]["joint - equal"]),
            f"the laptop's {-two['mean_over_seeds']['all']['joint - equal'][0]:.3f} below at k = 2",
            f"by {below(ours['equal'])} on an H100's 98 M tokens, by {-over['equal'][0]:.3f} "
            f"({-over['equal'][2]:.3f} to {-over['equal'][1]:.3f}) on a laptop's",
            "stays {:.3f} ({:.3f} to {:.3f}) ahead".format(*ours["full"]),
            f"remains out of reach: {ours['full'][0]:.3f} nats", "within 0.010 of each other",
            f"a tau that falls to 0.1 instead of staying put costs {falling:.3f}",
            f"were {-tau1['1']['minus_static'][0]:.3f} worse than routing",
            f"end at {laptop['short_fall']:.3f}", f"has {laptop['preset']:.3f}; one seed",
            f"{of_any:.3f} at k = 4 beside {before['before']['loss']['1']:.3f} for the base",
            "saves {:.2f} and {:.2f} of what is counted; the goal was 0.85".format(*routed),
            "save {:.2f} and {:.2f}. The rest".format(*known),
            f"took {waited:.1f} times as long as all-big, where it now takes "
            f"{1 - times[0]['time_saved, not compiled']:.2f} times",
            f"that H100 saves {times[0]['time_saved, not compiled']:.0%}, and",
            f"without it the mean is {-sum(by_seed['h100'][1:]) / 2:.4f}",
            "takes {:.1f} times as long as all-big at batch 1, {:.1f} times at 64".format(
                *(1 - row["time_saved"] for row in times[2:])),
            f"saves {times[0]['flops_saved']:.0%} of the FLOPs and {times[0]['time_saved']:.0%} of the time on an "
            f"H100, compiled", f"{cpu_times[0]['flops_saved']:.0%} and {cpu_times[0]['time_saved']:.0%} on a laptop's",
            f"it is {-over['equal'][0]:.3f} nats below the dense model of equal FLOPs, in every seed",
            f"on these tokens {-over['full'][0]:.3f} below it", f"goes from {min(full):.3f} to {max(full):.3f}",
            f"{report['sequences']} validation sequences",
            f"costs {four - report['seeds'][0]['loss']['all']['joint'][0]:.3f} nats against the base",
            f"save {min(prefill):.2f} to {max(prefill):.2f} of what is counted"]


def ablation_numbers():
    """The sentences about stage 1 against other trainings, and about size, that quote a number."""
    report, cpu = results("h100/ablations.json"), results("cpu_ablations.json")
    gaps, laptop = ([row["duo - dense"]["difference"] for row in study["fig8"]] for study in (report, cpu))
    assert [row["p_big"] for row in report["fig8"]] == [row["p_big"] for row in cpu["fig8"]] == [0, 0.25, 0.5, 0.75, 1]
    assert max(gaps) == gaps[0] and max(laptop) == laptop[1]
    for study, sequences in ((report, 1024), (cpu, 128)):
        assert max(row["duo - other"]["difference"][2] for row in study["freeze_then_small"]) < 0
        for part in ("without_skips", "freeze_then_small"):
            assert {row["duo - other"]["sequences"] for row in study[part]} == {sequences}
            assert all(row["duo - other"]["seeds"] == [1, 2, 3] for row in study[part])
    times = [theirs[0] / ours[0] for ours, theirs in zip(gaps, laptop, strict=True)]
    all_big, cpu_big = (study["without_skips"][4]["duo - other"]["difference"] for study in (report, cpu))
    useless = [[-row["duo - other"]["difference"][0] for row in study["without_skips"][5:]] for study in (cpu, report)]
    gains, all_bigs, rows_of = [], [], {}
    for study, sequences in ((report, 128), (cpu, 16)):
        rows = {row["size"]: row["all-BIG - oracle"]["any"] for row in study["scale"]}
        rows_of = rows_of or rows  # of the GPU
        assert {(row["sequences"], *row["seeds"]) for row in rows.values()} == {(sequences, 1, 2, 3)}
        depths = [np.subtract(*rows[size]["losses"]) for size in ("shallow_long", "base", "deep_short", "deep")]
        assert all((more > less).all() for less, more in zip(depths, depths[1:], strict=False))  # in every seed
        gains.append({size: row["difference"][0] for size, row in rows.items()})
        all_bigs.append({size: np.mean(row["losses"][0]) for size, row in rows.items()})
    gain, at_home = gains
    six = np.subtract(*rows_of["shallow_long"]["losses"]) - np.subtract(*rows_of["shallow"]["losses"])
    assert six.min() < 0 < six.max()  # the seeds disagree
    big = [all_bigs[1][size] for size in ("shallow_long", "base", "deep_short")]
    assert big == sorted(big)
    foreseen = {row["size"]: row["all-BIG - expected-loss oracle"]["any"]["difference"][0] for row in report["scale"]}
    widths, depths = ("narrow", "base", "wide"), ("shallow_long", "base", "deep_short")
    foreseen_at_home = {row["size"]: row["all-BIG - expected-loss oracle"]["any"]["difference"][0]
                        for row in cpu["scale"]}
    assert foreseen_at_home["deep"] < foreseen_at_home["deep_short"]
    reference = [np.mean(results(f"h100/seed{s}_reference/losses.json")["losses"]["big"]) for s in (1, 2, 3)]
    return [f"costs {min(gaps)[0]:.2f} to {max(gaps)[0]:.2f} nats at each",
            "gains {:.3f} at all-big ({:.3f} to {:.3f}), of {:.3f}".format(*all_big, gaps[-1][0]),
            "is itself {:.3f} ({:.3f} to {:.3f}) above a dense model".format(*gaps[-1]),
            f"costs {min(times):.1f} to {max(times):.1f} times that",
            f"{min(laptop)[0]:.2f} to {max(laptop)[0]:.2f}; skips",
            f"skips cost {cpu_big[0]:.3f} at all-big",
            "are {:.2f} and {:.2f} worse, not {:.1f} and {:.1f}".format(*useless[0], *useless[1]),
            f"its own; {np.mean(reference):.3f} nats on all 1,024 sequences)",
            "after 3,000 steps each the oracle gains {:.2f}, {:.2f} and {:.2f} nats at 6, 12 and 24 layers".format(
                *(gain[size] for size in depths)),
            f"makes no clear difference at 6 layers ({gain['shallow_long'] - gain['shallow']:.3f}) and adds "
            f"{gain['deep'] - gain['deep_short']:.3f} at 24",
            "Width adds nothing: {:.2f}, {:.2f} and {:.2f} at 256, 384 and 512".format(
                *(gain[size] for size in widths)),
            f"while all-big gets better by {all_bigs[0]['narrow'] - all_bigs[0]['wide']:.2f}",
            f"from {max(foreseen.values()):.2f} to {min(foreseen.values()):.2f}; after 3,000 steps each it is "
            "{:.2f}, {:.2f} and {:.2f} at 6, 12 and 24 layers".format(*(foreseen[size] for size in depths)),
            "gains {:.2f}, {:.2f} and {:.2f} nats at 6, 12 and 24 layers, more with depth in every seed".format(
                *(at_home[size] for size in depths)),
            f"24 layers gain {at_home['deep']:.2f}. So", "Width does less: {:.2f}, {:.2f} and {:.2f} at 32".format(
                *(at_home[size] for size in widths))]


def retrofit_numbers():
    """The sentences about the retrofitted model that quote a number."""
    run, oracle, routers = (results(f"h100/smol/{name}.json") for name in ("losses", "oracle", "routers"))
    greedy = {row["budget"]: row["loss"] for row in oracle["searches"]["sb_frozen_greedy"]["rows"]
              if row["domain"] == "all"}
    best = min((str(k) for k in range(31)), key=greedy.__getitem__)
    random = {share: np.mean(run["losses"][f"0/{share}"]) - np.mean(run["losses"]["0/1"]) for share in ("0.5", "0.75")}
    routed = {row["budget"]: row["versus"]["all_big"][0] for row in routers if row["domain"] == "all"}
    assert greedy["4"] < greedy["30"] and "with 4 of 30 the oracle still beats all-big" in TEXT
    alls = [np.mean(run["losses"]["0/1"]), next(row["all_big"][0] for row in routers if row["domain"] == "all"),
            greedy["30"]]
    near = max(greedy[k] - greedy[best] for k in ("17", "18", "19"))
    return ["All-big has {:.3f} on the 284 sequences of the random routes, {:.3f} on the routers' 128, {:.3f}".format(
                *alls), f"about {best} (17 to 19 are within {near:.3f})",
            f"gain {greedy['30'] - greedy['29']:.3f} nats over all 30",
            f"three quarters BIG lose {random['0.75']:.2f} nats",
            f"A router with 20 of 30 loses {routed[20]:.2f}",
            f"with 10 of 30 {routed[10]:.2f}, where random routes of 15 lose {random['0.5']:.2f}"]


def frozen_router_numbers():
    """The sentences about routers on a frozen base that quote a number."""
    rows = {(row["name"], row["budget"]): row for row in results("h100_routers.json")["rows"]
            if (row["domain"], row["choices"]) == ("all", "sb")}
    paper = [row for (name, _), row in rows.items() if name in ("linear", "gumbel", "mlp", "advantage", "distilled")]

    def best(k, versus):
        return min((row for row in paper if row["budget"] == k), key=lambda row: row["loss"])["versus"][versus][0]
    for row in paper:  # clearly below best of 100?
        clear = row["versus"]["best100_data_set"][2] < 0
        assert clear == (row["budget"] == 2 or row["budget"] == 4 and row["name"] != "distilled"
                         or row["budget"] in (3.6, 6) and row["name"] in ("linear", "gumbel", "mlp")), row
    for row in results("h100_findings_bases.json")["bases"][1]["routers"]:  # with another base seed?
        assert (row["versus"]["best100_data_set"][2] < 0) == (row["budget"] in (2, 4, 6)), row
    assert {name for name in ("linear", "gumbel", "mlp") if rows[name, 10]["versus"]["all_big"][2] < 0} == {
        "gumbel", "mlp"}
    cpu = {(row["name"], row["budget"]): row for row in results("cpu_routers.json")["rows"] if row["domain"] == "all"}
    assert all(cpu["linear", k]["versus"]["all_big"][2] < 0 for k in (6, 8))
    assert all(cpu["mlp", k]["loss"] > cpu["linear", k]["loss"] for k in (4, 8))
    found = {row["k"]: -rows["mlp", row["k"]]["versus"]["fixed"][0] / row["foresight"][0]
             for row in results("h100_routers.json")["controls"]["rows"]}
    return [f"the MLP finds {found[2]:.0%} of what can be foreseen, at k = 4 {found[4]:.0%}, at k = 8 {found[8]:.0%}",
            f"at k = 4 the best is {best(4, 'all_big'):.3f} nats above all-big (hope: 0.005), at k = 6 "
            f"{best(6, 'all_big'):.3f} (hope: 0)"]


def zoo_numbers():
    """ZOO.md's sentences that quote a number of the H100's run, and those of the laptop's findings."""
    rows = {(row["name"], row["budget"]): row for row in results("h100_routers.json")["rows"]
            if (row["domain"], row["choices"]) == ("all", "sb")}
    h100, cpu = ({line["system"]: line["detail"] for line in results(f"{name}_zoo.json")} for name in ("h100", "cpu"))
    fixed = {name: row["versus"]["fixed"][0] for (name, k), row in rows.items() if k == 4}
    told = h100["openmoe"]["choices_told_by"]
    assert max(told["linear"][x]["told"][0] for x in ("domain", "position")) < 0.01
    assert max(of["openmoe"]["choices_told_by"]["oracle"]["token id"]["told"][2] for of in (h100,)) < 0.002
    arch, rmoe = h100["arch"], h100["rmoe"]
    lost = [before - after for before, after in zip(arch["before"], arch["after"], strict=True)]
    early, drop = (h100["openmoe"][part] for part in ("early", "drop"))
    early = dict(zip(early["share_of_training"], early["of_the_way"], strict=True))
    at = {k: {name: row["versus"]["fixed"][0] for (name, budget), row in rows.items() if budget == k} for k in (6, 8)}
    lora = [min(loss for name, loss in of.items() if "lora" not in name) -
            max(loss for name, loss in of.items() if "lora" in name) for of in at.values()]
    glider, rewire, loras = h100["glider"], h100["rewire"], h100["lora_mixer"]["routers"]
    code_profile, prose_profile = np.array(glider["profiles"])
    assert (code_profile != prose_profile).sum() == 4 and glider["chosen_s"] == 0.25
    assert glider["gains_held_in"][0][1] < 0 < glider["gains_held_in"][0][2]
    assert all(part[2] < 0 for part in glider["gains_held_in"][1:]) and glider["gains_held_out"][-1][2] < 0
    assert loras["linear"]["minus_single"][1] < 0 < loras["linear"]["minus_single"][2]
    for text in ("code", "prose"):  # by its own vector, by another's and by noise nothing is gained, at any rate tried
        for part in [rewire[text]["gain"][name] for name in ("own", "other", "random")] + [*rewire[text][
                "rates"].values()]:
            assert part[1] < 0 < part[2]
    assert set(rewire["code"]["rates"]) == {"0.05", "0.5", "2.0", "8.0"}
    timed = {row["name"]: row["time_saved"] for row in results("h100_router_table.json")
             if row["domain"] == "all"}

    def shown(part, sign=1):
        part = part if sign > 0 else (-part[0], -part[2], -part[1])
        return "{:.3f} ({:.3f} to {:.3f})".format(*part)
    wide, narrow = results("h100_router_bench.json")["router"][0], next(
        row for row in results("h100_router_table.json") if (row["name"], row["domain"]) == ("linear", "all")
        and row["time_saved"] is not None)
    here = 1 - narrow["flops"] / make.measured("seed1_dense")["flops"]["big"]
    assert (f"on this day {narrow['time_saved']:.0%} of {here:.0%} (RESULTS.md's wider model, not compiled, on "
            f"another: {wide['time_saved, not compiled']:.0%} of {wide['flops_saved']:.0%})") in ZOO_TEXT
    known = h100["tryage"]["known"]
    assert known["accuracy"] < known["chance"]
    for k, level in ((2, False), (4, False), (6, True), (8, True)):
        here = [row["linear_minus_tryage"] for row in h100["tryage"]["budgets"] if row["k"] == k]
        assert level == any(part[2] > 0 for part in here), k
    times = {row["name"]: row for row in results("cpu_router_times.json")["rows"]}
    assert 0.5 < times["linear"]["time_saved"] / times["linear"]["flops_saved"] < 0.7
    assert all(times[name]["time_saved"] < 0.5 * times["linear"]["time_saved"] for name in ("rmoe", "lora_mixer"))
    two = rows["tryage", 2]["versus"]["fixed"][0] - rows["linear", 2]["versus"]["fixed"][0]
    bases = {(row["name"], row["budget"]): row["fixed"] for row in results("h100/routers.json")}
    claims = {line["system"]: line for line in results("h100/zoo.json")}
    clear = [part[0] > 0 or part[1] < 0 for part in claims["rmoe"]["cis"]], [part[1] < 0 for part in claims[
        "lora_mixer"]["cis"]]
    assert clear == ([False, False, True], [True, False, False])

    def ahead(k, loss):
        """How far the two LoRAs are below the best router without, by loss(row)"""
        best = min(loss(part) for (name, budget), part in bases.items() if budget == k and "lora" not in name)
        return [best - loss(bases[name, k]) for name in ("lora_mixer", "lora_single")]
    of_seeds = {k: np.ravel([ahead(k, lambda part, i=i: part["of_seeds"][i][0]) for i in range(3)]) for k in (2, 4, 8)}
    assert of_seeds[2].min() < 0 and of_seeds[4].min() < 0
    mean = ahead(8, lambda part: part["mean"])
    assert "better than all others at k = 8, by {:.3f} routed and {:.3f} not routed ({:.3f} to {:.3f} by base;".format(
        *mean, of_seeds[8].min(), of_seeds[8].max()) in TEXT
    few = bases["lora_mixer_few", 4]["mean"] - bases["lora_single_few", 4]["mean"]
    slow = {row["name"]: 1 - row["time_saved"] for row in results("h200_router_times.json")}
    return ["share more information than without the state ({:.4f} nats more, {:.4f} to {:.4f})".format(
                *rmoe["rmoe_minus_np_mutual_information"]),
            f"recurrence is {rmoe['rmoe_minus']['mlp'][0]:.3f} better",
            f"tells {told['linear']['token id']['told'][0]:.0%} of the linear router's choices",
            f"recognized {arch['after'][2]:.0%} of the time once its descriptor is added, "
            f"{arch['before'][2]:.0%} before",
            f"lose {100 * lost[0]:.0f} and {100 * lost[1]:.0f} points", f"does as well ({arch['untrained'][2]:.0%})",
            f"({-arch['loss_before_minus_after'][0]:.3f} nats worse after",
            f"each budget: {fixed['tryage'] - fixed['linear']:.3f} nats at k = 4 on the H100, {two:.3f} at k = 2",
            f"(R² of {known['r2_advantage']:.2f})",
            f"keeps {fixed['token_id'] / fixed['linear']:.0%} of the linear router's gain",
            f"overflows {drop['overflow']['in'][-1][0]:.0%} of the time and is {drop['loss_minus_linear'][-1][0]:.2f} "
            "nats worse than under a linear router; unfamiliar text overflows a little more "
            f"({drop['overflow']['out'][-1][0]:.0%})",
            "larger ones cost them {:.3f} to {:.3f} nats".format(*(-glider["gains_held_in"][i][0] for i in (1, -1))),
            f"C++, gains {shown(glider['gain_held_out'])} at that",
            f"{shown(rewire['code']['gain']['own'], -1)} gained on code",
            f"{shown(rewire['prose']['gain']['own'])} lost on prose",
            f"would gain {-rewire['code']['gain']['future'][0]:.3f}: there",
            f"a forward takes {1 - timed['rewire_prose']:.0f} times as long there",
            "({:.4f}, {:.4f} to {:.4f})".format(*(-loras["lora_mixer"]["minus_single"][i] for i in (0, 2, 1))),
            f"routing is {loras['lora_mixer_few']['minus_single'][0]:.3f} worse there, {few:.3f} on the three bases, "
            f"{cpu['lora_mixer']['routers']['lora_mixer_few']['minus_single'][0]:.3f} on the laptop",
            f"is {loras['lora_mixer']['information']:.0%} of its entropy, {loras['lora_sharp']['information']:.0%} "
            f"under SBL-; on few sequences it is {loras['lora_mixer_few']['information']:.0%}",
            f"makes a forward {1 - times['rewire']['time_saved']:.0f} times as long",
            f"at least {lora[0]:.3f} and {lora[1]:.3f} better than every router without LoRAs",
            f"and {loras['linear']['minus_single'][0]:.3f} nats (one seed; its interval holds 0)",
            f"is {early[0.1]:.0%} of the way",
            f"It costs {cpu['rewire']['flops'] / cpu['rewire']['flops_all_big']:.0f} times",
            f"and {rows['rewire_prose', 4]['router_flops'] / 64.49e6:.0f} times on the H100",
            "the state gains {:.4f}, {:.4f} and {:.4f}, only".format(*claims["rmoe"]["effects"]),
            f"and the MLP is {bases['rmoe', 4]['mean'] - bases['mlp', 4]['mean']:.3f} better again",
            "routing costs {:.4f} on the first, clear of 0, and nothing on the others ({:.4f}, {:.4f})".format(
                *(-effect for effect in claims["lora_mixer"]["effects"])),
            f"at k = 8 {of_seeds[8].min():.3f} to {of_seeds[8].max():.3f}, at 2 and 4 not",
            "{:.1f} times as long as all-big under the linear router, {:.1f} times under RMoE, {:.1f}".format(
                *(slow[name] for name in ("linear", "rmoe", "lora_mixer")))]


def test_numbers_in_the_text():
    speed = {row["variant"]: row for row in results("h100_train_speed.json")["train"]}
    dense, sparse = speed["ours, dense (all BIG)"], speed["ours, p(big) = 0.5"]
    factor = sparse["tokens_per_second"] / dense["tokens_per_second"]
    assert f"Sparsity gives a factor of {factor:.2f} and everything else {dense['speed_against_nanogpt']:.2f}" in TEXT
    two = results("h100_two_gpus.json")
    n, one = two["tokens_per_second"], two["one_gpu_tokens_per_second"]
    assert f"{n / 1e6:.2f} M tokens/s against {one / 1e6:.2f} M on one, {n / one:.2f} times" in TEXT
    bench = results("h100_oracle_bench.json")
    two, three = bench["oracle"]
    rate, share = two["tflop_per_second"], two["tflop_per_second"] / bench["matmul_tflops"]
    assert f"{two['tokens_per_second']:,.0f} tokens/s on one H100" in TEXT
    assert f"{rate:.0f} TFLOP/s counted, {share:.0%} of what" in TEXT
    assert f"with skips: {three['tokens_per_second']:.0f} tokens/s" in TEXT
    counted, measured = two["counted_ratio"], two["measured_ratio"]
    assert f"counts {counted:.1f} times the work and takes {measured:.1f} times as long" in TEXT
    for part in [*joint_numbers(), *ablation_numbers(), *base_numbers(), *retrofit_numbers()]:
        assert part in TEXT, part
    cpu = results("cpu_oracle_bench.json")["oracle"][0]
    assert f"{cpu['counted_ratio']:.1f} times less work" in TEXT
    assert f"{cpu['measured_ratio']:.1f} times faster" in TEXT
    for part in [*oracle_numbers(), *frozen_router_numbers()]:
        assert part in TEXT, part
    for part in zoo_numbers():
        assert part in ZOO_TEXT, part
    later = results("cpu_stage1_later.json")
    code, prose = (later["end"]["domains"][domain] for domain in ("code", "prose"))
    assert (f"`{later['fingerprint']}`, three days of releases later, at {code['random']['loss']:.3f} (code, random), "
            f"{code['big']['loss']:.3f} (code, all-big) and {prose['big']['loss']:.3f} (prose, all-big)") in TEXT
    run = results("h100_run.json")
    assert f"98 M tokens in {run['wall_seconds']} s in all, of which compiling took {run['compile_seconds']}" in TEXT
    cpu = results("cpu_run.json")
    assert "took {} minutes and {} seconds".format(*divmod(cpu["wall_seconds"], 60)) in TEXT
    assert "takes {} to {} s on 2 cores".format(*cpu["prepare_gpu_corpus_seconds"]) in TEXT
    for name in ("h100", "cpu"):
        log = [json.loads(line) for line in (ROOT / f"results/{name}_stage1.jsonl").read_text().splitlines()]
        assert f"`{log[0]['fingerprint']}`" in TEXT
        end = next(line for line in log if line["kind"] == "end")
        for domain, routes in end["domains"].items():
            assert routes["big"]["loss"] < end["bigram"][domain]


def test_the_files_of_the_h100_are_what_its_runs_say(tmp_path):
    """results/h100: findings, ablations and joint training, made once more from what each run left."""
    names = ("findings.json", "ablations.json", *(f"joint/gpu_joint_k{k}.json" for k in (2, 4, 6)))
    shutil.copytree(ROOT / "results" / "h100", tmp_path / "h100")
    for name in names:
        (tmp_path / "h100" / name).unlink()
    assert not reference.main([f"--out_dir={tmp_path / 'h100'}", "--device=cpu", "--only=collect"])

    def numbers(value):
        """-> the same with every number to 9 digits: another processor may add in another order"""
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            return {key: numbers(part) for key, part in pairs}
        return float(f"{value:.9g}") if isinstance(value, float) else value
    for name in names:
        made, kept = (json.loads((folder / name).read_text()) for folder in (tmp_path / "h100", ROOT / "results/h100"))
        assert numbers(made) == numbers(kept), name
