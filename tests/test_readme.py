"""README is code too: its commands parse, its tables come from results/, its numbers agree with them."""
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import parse_config

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
    sys.path.insert(0, str(ROOT / "results"))
    make = importlib.import_module("make")
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
    reached = {line["budget"]: -line["versus"]["fixed"][0] for line in results("h100_routers.json")["rows"]
               if (line["name"], line["domain"]) == ("mlp", "all")}
    half = next(line for line in results("h100_inference.json")["inference"]
                if (line["route"], line["width"]) == ("half-big", 1024))
    return [f"gains {row['gain'][0]:.3f} nats over the best fixed pattern at 6",
            f"at most {row['hindsight'][0]:.3f} of that needs the answer",
            f"{row['foresight'][0]:.3f} could be foreseen",
            f"{reached[6]:.3f} of it at k = 6, {reached[4]:.3f} at k = 4",
            f"half of the FFNs big saves {half['flops_saved']:.0%} of a forward's FLOPs and "
            f"{half['time_saved']:.0%} of its time",
            f"The searches took {sum(search['seconds'] for search in searches.values()) / 60:.0f} minutes",
            f"all-big {own['code']['big']['loss']:.3f} and {own['prose']['big']['loss']:.3f} at its end",
            f"the best of 3^12 has {loss(three_way, 'any'):.2f} nats",
            f"are {all_big - six:.3f} better at k = 6 and level at k = 2 ({all_big - two:.3f})",
            f"with one BIG layer {one_big - all_big:.3f} worse",
            f"by {one['effect']:.3f} nats ({one['ci'][0]:.3f} to {one['ci'][1]:.3f})", "best at k = 5 or 6",
            f"gains {row['gain'][0]:.3f} nats, of which {shown(row['foresight'])} could be foreseen",
            f"which itself is {apart:.2f} nats better", f"up to {row['hindsight'][0]:.3f} is hindsight",
            f"gain {gained:.2f} nats over all-big, with {least['k']} BIG layers",
            f"{shown(on_laptop['gain'])}, of which {shown(on_laptop['foresight'])} is foresight"]


def joint_numbers():
    """The sentences about joint training and routed time that quote a number."""
    report, times = results("cpu_joint.json"), results("cpu_router_bench.json")["router"]
    h100 = results("h100_joint.json")
    above = h100["mean_over_seeds"]["all"]["joint - equal"][0]
    by_seed = [seed["loss"]["all"]["joint - equal"][0] for seed in h100["seeds"]]
    equal, full = ([seed["loss"]["all"][f"joint - {name}"][0] for seed in report["seeds"]]
                   for name in ("equal", "full"))
    assert max(equal) < 0
    two = results("cpu_joint_k2.json")
    assert max(seed["loss"]["all"]["joint - equal"][0] for seed in two["seeds"]) < 0
    assert two["mean_over_seeds"]["all"]["joint - full"][1] > 0
    over = {name: report["mean_over_seeds"]["all"][f"joint - {name}"][0] for name in ("equal", "full")}
    four = next(row for row in report["any"] if row["k"] == 4)["loss"]["all"]["any"][0]
    prefill = [row["time_saved / flops_saved"] for row in times if "prefill" in row["what"]]
    leads = results("h100_joint_leads.json")
    at = {(run["lead"], str(run["seed"])): run for run in leads["runs"]}
    exploring = {s: at["tau1", s]["loss"]["all"][0] for s in "123"}
    apart = [exploring[s] - leads["dense_equal"][s] for s in "123"]
    gained = [leads["before"]["loss"][s] - exploring[s] for s in "123"]
    better = [-part for part in at["tau1", "1"]["minus_static"]]
    short = sum(exploring[s] - leads["dense_full"][s] for s in "123") / 3
    assert at["short", "1"]["loss"]["all"][0] < leads["before"]["loss"]["1"] > at["static", "1"]["loss"]["all"][0]
    of_any = next(row["loss"][0] for row in leads["any"] if row["k"] == 4)
    routed, known = ((prefill[f"us/token, {name}"] / prefill["us/token, all-big"]) for prefill in
                     results("h100_router_bench.json")["router"][:1] for name in ("routed", "known"))
    return [f"the joint model is {above:.3f} nats above the dense one of equal FLOPs, from {min(by_seed):.3f} to "
            f"{max(by_seed):.3f} by seed", f"on an H100's 98 M it was {above:.3f} above, and is level",
            f"is {better[0]:.3f} ({better[2]:.3f} to {better[1]:.3f}) better than those four layers",
            f"{-sum(apart) / 3:.3f} below it on average, from {min(apart):.3f} to {max(apart):.3f} by seed, and "
            f"{sum(gained) / 3:.3f} better than before in the mean of three seeds (seed 1 chose it; without it the "
            f"gain is {sum(gained[1:]) / 2:.3f})", f"remains out of reach: {short:.3f} nats",
            f"{of_any:.3f} at k = 4 beside {leads['before']['loss']['1']:.3f} for the base trained for 4 alone",
            f"took {routed:.1f} times as long as all-big", f"and {known:.1f} times with the choices given",
            f"it is {-over['equal']:.3f} nats below the dense model of equal FLOPs, in every seed",
            f"on these tokens {-over['full']:.3f} below it", f"goes from {min(full):.3f} to {max(full):.3f}",
            f"{report['sequences']} validation sequences",
            f"with 4 BIG layers of 12 is {-over['equal']:.3f} nats below a dense one of equal FLOPs on a laptop's",
            f"costs {four - report['seeds'][0]['loss']['all']['joint'][0]:.3f} nats against the base",
            f"save {min(prefill):.2f} to {max(prefill):.2f} of what is counted"]


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
    by_seed = zip(rows["glider", 4]["loss_of_seeds"], rows["linear", 4]["loss_of_seeds"])
    costs = " and ".join(f"{glider - linear:.3f}" for glider, linear in by_seed).replace(" and ", ", ", 1)
    known = h100["tryage"]["known"]
    assert known["accuracy"] < known["chance"]
    for k, level in ((2, False), (4, False), (6, True), (8, True)):
        here = [row["linear_minus_tryage"] for row in h100["tryage"]["budgets"] if row["k"] == k]
        assert level == any(part[2] > 0 for part in here), k
    times = {row["name"]: row for row in results("cpu_router_times.json")["rows"]}
    assert 0.5 < times["linear"]["time_saved"] / times["linear"]["flops_saved"] < 0.7
    assert all(times[name]["time_saved"] < 0.5 * times["linear"]["time_saved"] for name in ("rmoe", "lora_mixer"))
    two = rows["tryage", 2]["versus"]["fixed"][0] - rows["linear", 2]["versus"]["fixed"][0]
    return ["share more information than without the state ({:.4f} nats more, {:.4f} to {:.4f})".format(
                *rmoe["rmoe_minus_np_mutual_information"]),
            f"recurrence is {rmoe['rmoe_minus']['mlp'][0]:.3f} better",
            f"tells {told['linear']['token id']['told'][0]:.0%} of the linear router's choices",
            f"from 0 to {arch['after'][2]:.0%} of the time",
            f"lose {100 * lost[0]:.0f} and {100 * lost[1]:.0f} points", f"does as well ({arch['untrained'][2]:.0%})",
            f"({-arch['loss_before_minus_after'][0]:.3f} nats worse after",
            f"each budget: {fixed['tryage'] - fixed['linear']:.3f} nats at k = 4 on the H100, {two:.3f} at k = 2",
            f"(R² of {known['r2_advantage']:.2f})",
            f"keeps {fixed['token_id'] / fixed['linear']:.0%} of the linear router's gain",
            f"overflows {drop['overflow']['in'][-1][0]:.0%} of the time and is {drop['loss_minus_linear'][-1][0]:.2f} "
            "nats worse than under a linear router; unfamiliar text overflows a little more "
            f"({drop['overflow']['out'][-1][0]:.0%})",
            f"costs {fixed['glider'] - fixed['linear']:.3f} nats against the linear router at k = 4: {costs} by seed",
            f"makes a forward {1 - times['rewire']['time_saved']:.0f} times as long",
            f"at least {lora[0]:.3f} and {lora[1]:.3f} better than every router without LoRAs",
            f"are routed, and {h100['lora_mixer']['routers']['linear']['minus_single'][0]:.3f} nats",
            f"routing is {cpu['lora_mixer']['routers']['lora_mixer_few']['minus_single'][0]:.3f} worse",
            f"is {early[0.1]:.0%} of the way",
            f"It costs {cpu['rewire']['flops'] / cpu['rewire']['flops_all_big']:.0f} times",
            f"and {rows['rewire_prose', 4]['router_flops'] / 64.49e6:.0f} times on the H100"]


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
    for part in joint_numbers():
        assert part in TEXT, part
    cpu = results("cpu_oracle_bench.json")["oracle"][0]
    assert f"{cpu['counted_ratio']:.1f} times less work" in TEXT
    assert f"{cpu['measured_ratio']:.1f} times faster" in TEXT
    for part in [*oracle_numbers(), *frozen_router_numbers()]:
        assert part in TEXT, part
    for part in zoo_numbers():
        assert part in ZOO_TEXT, part
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
