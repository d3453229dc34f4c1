"""reference.py: its steps are the whole study and their commands parse; a step that fails or is interrupted stops it,
and what is finished stays; what it says of the runs is what the runs say."""
import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import user_error
from test_readme import CONFIGS
from test_train import write_texts

import analyze
import claims
import data
import oracle
import reference
import router
import train
from common import UserError, load_run, parse_config
from model import BIG, SMALL, DuoGPT, random_route

ROOT = Path(__file__).parent.parent


def quiet(main, *flags):
    """-> exit code, what main prints"""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(list(flags))
    return code or 0, out.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# the list of steps

def parsed(command):
    """-> the module of a step's script, and its flags, read by the script's own parser"""
    script, *flags = [part.replace("{out}", "out/x") for part in command]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    flags.append("--device=cpu")
    if script == "results/joint_study.py":
        return module, module.parser().parse_args(flags)
    config = {**CONFIGS, "effects": "EffectsConfig"}[script.removesuffix(".py")]
    return module, parse_config(getattr(module, config), flags, module.PRESETS)


@pytest.mark.parametrize("preset", reference.PRESETS)
def test_every_command_is_accepted(preset):
    for _, minutes, command in reference.steps(preset):
        module, config = parsed(command)
        assert config.preset == preset and minutes > 0 and (ROOT / command[0]).exists()
        if module is train:
            train.check(config, 1)
            assert config.resume
        if module is oracle:
            job, L = oracle.check(config), 12
            assert not job or oracle.parse_budgets(job.budgets, L, job.choices)
        if module is router:
            assert router.check(config) and router.parse_budgets(config.budget or "4", 12, "sb")


def test_the_list_is_complete():
    """What the issue asks for, of every seed."""
    steps = reference.steps("gpu")
    names = [name for name, *_ in steps]
    assert len(set(names)) == len(names)
    of_seed = [[name.split("/")[1] for name in names if name.startswith(f"seed{seed}/")] for seed in (1, 2, 3)]
    assert of_seed[0] == of_seed[1] == of_seed[2] and sum(map(len, of_seed)) == len(names)
    sizes = ["base", "narrow", "wide", "shallow", "deep", "shallow_long", "deep_short"]
    assert set(of_seed[0]) == {
        "train", "reference", "oracle", "routers", "zoo", "zoo_budgets", "effects", "dense", "freeze", "analyze",
        "dense0", "dense0.25", "dense0.5", "dense0.75", "noskip", "joint_k2", "joint_k4", "joint_k6", *sizes[1:],
        *(f"{size}_{criterion}" for size in sizes for criterion in ("label", "expected"))}
    plan = {(job.choices, job.budgets == "6", job.criterion) for job in oracle.PLANS["gpu"][1]}
    assert plan >= {("sb", False, "label"), ("xb", True, "label"), ("xsb", False, "label"), ("sb", False, "expected")}


def test_a_step_needs_only_earlier_ones_of_its_seed():
    made = set()
    for name, _, (script, *flags) in reference.steps("gpu"):
        seed = name.split("/")[0]
        folders = {flag.split("=")[0]: flag.split("/")[-1] for flag in flags if "{out}" in flag}
        own = folders.pop("--out_dir")
        assert own == "joint" or own.split("_")[0] == seed and all(f.split("_")[0] == seed for f in folders.values())
        assert set(folders.values()) <= made
        if script == "train.py":
            assert own not in made  # two trainings in one folder
            made.add(own)
        elif own != "joint":
            assert own in made
        if own == "joint" or script in ("train.py", "router.py"):
            base = int(seed[4:]) + 100 * name.endswith("/reference")
            assert f"--seed={base}" in flags


def test_sizes():
    """Widths 256, 384, 512 and 6, 12, 24 layers; each sees as many tokens per parameter, to half a step, or, where
    depth alone is to differ, as many tokens as the base."""
    found = {name: reference.sized("gpu", name) for name in reference.SIZES}
    assert {name: (size.n_embd, size.n_head, size.n_layer) for name, size in found.items()} == {
        "base": (384, 6, 12), "narrow": (256, 4, 12), "wide": (512, 8, 12), "shallow": (384, 6, 6),
        "deep": (384, 6, 24), "shallow_long": (384, 6, 6), "deep_short": (384, 6, 24)}
    base = train.TrainConfig()
    steps = reference.steps("gpu")
    for name, _, command in steps[:len(steps) // 3]:  # of one seed
        if name.split("/")[1] in (*found, "reference") and command[0] == "train.py":
            config = parsed(command)[1]
            exact = base.max_steps * reference.n_parameters(config) / reference.n_parameters(base)
            exact = base.max_steps if name.endswith(("_long", "_short")) else exact
            assert abs(config.max_steps - exact) <= 0.5
            assert (config.batch_size, config.block_size) == (base.batch_size, base.block_size)


@pytest.mark.parametrize("preset", ["gpu", "debug"])
def test_dense_models_cost_what_duo_costs(preset):
    """model.flops of all-BIG at that width = Duo's mean at that share, to what half a unit of width costs."""
    config = reference.sized(preset, "base")
    B, T, L = 4, 32, config.n_layer

    def flops(config, route):
        with torch.device("meta"):
            model = DuoGPT(train.model_shape(config, 128))
        return model.flops(route)
    for share in reference.SHARES:
        width = reference.dense_width(config, share)
        route = random_route(B, T, L, 0.0, share, torch.Generator().manual_seed(1))
        duo, unit = flops(config, route).double().mean().item(), 6 * config.n_embd * L
        assert abs(flops(reference.replace(config, big_width=width), BIG) - duo) <= 0.5 * unit
    assert reference.dense_width(config, 1) == train.model_shape(config, 64).big_width
    assert flops(reference.replace(config, big_width=reference.dense_width(config, 0)), BIG) == flops(config, SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# running them

COUNT = "import sys; open(sys.argv[1].split('=')[1], 'a').write('.')"
SCRIPTS = {
    "count.py": COUNT,
    "fail.py": "import sys; print('working'); print('x.py: error: --k=7: too many'); sys.exit(2)",
    "wait.py": COUNT + """
import signal, time
def save(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1].split('=')[1] + ".ready", "w").close()
time.sleep(60)""",
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of three steps -> a function that runs it (exit code, printed), with scripts that may be replaced; its
    out_dir's name has blanks and braces."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    plan = [(f"seed{i}/{what}", 1, [script, f"--out_dir={{out}}/made{i}{what}"])
            for i, what, script in ((1, "a", "count.py"), (1, "b", "fail.py"), (2, "a", "count.py"))]
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "steps", lambda preset: plan)
    monkeypatch.setattr(reference, "collect", lambda config: print("collected"))
    out = tmp_path / "the {out} folder"

    def go(*flags):
        return quiet(reference.main, f"--out_dir={out}", "--device=cpu", "--preset=debug", *flags)
    go.out, go.folder, go.plan = out, tmp_path, plan
    return go


def test_a_failed_step_stops_with_a_clear_line_and_nothing_is_lost(small):
    message = user_error(small, "seed1/b", "exit code 2", "--k=7: too many", "seed1_b.log", "goes on")
    assert "working" not in message
    assert (small.out / "made1a").read_text() == "."
    assert sorted(path.name for path in (small.out / "steps").iterdir()) == [
        "seed1_a.json", "seed1_a.log", "seed1_b.log"]
    (small.folder / "fail.py").write_text(COUNT)
    code, printed = small()
    assert code == 0 and "took 0.0 min" in printed and "2 of 3 steps are left" in printed
    assert printed.endswith("collected\n")
    assert [(small.out / f"made{name}").read_text() for name in ("1a", "1b", "2a")] == [".", ".", "."]
    log = (small.out / "steps" / "seed1_b.log").read_text()
    assert "--k=7" in log  # the first try's output stays
    line = json.loads((small.out / "steps" / "seed1_b.json").read_text())
    assert set(line) == {"command", "minutes", "preset", "device", "commit", "torch"} and line["device"] == "cpu"
    small()
    assert (small.out / "made1a").read_text() == "."  # a third call runs nothing


def test_only(small):
    code, printed = small("--only=seed2")
    assert code == 0 and "collected" not in printed and "seed1" not in printed
    assert not (small.out / "made1a").exists() and (small.out / "made2a").exists()
    code, printed = small("--only=collect")
    assert code == 0 and printed.endswith("collected\n") and not (small.out / "made1a").exists()
    user_error(lambda: small("--only=seed4"), "--only=seed4", "--list")


def test_only_a_step_of_that_name():
    """--only=seed1/deep is that training, not its searches nor deep_short; --only=seed1/dee all that begin so."""
    def listed(only):
        printed = quiet(reference.main, "--list", "--device=cpu", f"--only={only}")[1]
        return [line.split()[0] for line in printed.splitlines() if line.startswith("seed")]
    assert listed("seed1/deep") == ["seed1/deep"]
    assert listed("seed1/dee") == [f"seed1/{name}" for name in (
        "deep", "deep_label", "deep_expected", "deep_short", "deep_short_label", "deep_short_expected")]


def test_the_study_is_a_part_of_each_plan():
    """On a GPU the steps pass what RESULTS.md's sequences and steps are; other presets keep the scripts' own."""
    for name, _, command in reference.steps("gpu"):
        script, flags = command[0], set(command)
        assert (script == "oracle.py") == ("--tokens=16384" in flags), name
        assert (script in ("router.py", "effects.py")) == ("--tokens=32768" in flags), name
        assert (script == "router.py") == ("--steps=300" in flags), name
    assert not any(flag.startswith(("--tokens", "--steps")) for _, _, command in reference.steps("cpu")
                   for flag in command)


def test_list_runs_nothing(small):
    code, printed = small("--list")
    assert code == 0 and not small.out.exists() and "about 3 minutes" in printed and "H100" in printed
    assert [line.split()[0] for line in printed.splitlines()[:3]] == [name for name, *_ in small.plan]


def test_another_command_is_not_the_same_step(small):
    small("--only=seed2")
    moved = small.out.rename(small.folder / "moved")  # the folder's name is no part of the command
    assert quiet(reference.main, f"--out_dir={moved}", "--device=cpu", "--only=seed2")[0] == 0
    small.plan[2][2].append("--more=1")
    user_error(lambda: quiet(reference.main, f"--out_dir={moved}", "--device=cpu"), "seed2_a.json", "--out_dir")
    assert (moved / "made2a").read_text() == "."


def test_an_interrupted_step_saves_and_goes_on(small):
    (small.folder / "fail.py").write_text(SCRIPTS["wait.py"])

    def interrupt():
        while not (small.out / "made1b.ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    before, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=interrupt)
    thread.start()
    code, printed = small()
    thread.join()
    assert code == 130 and printed.splitlines()[-1].startswith("interrupted in seed1/b")
    assert "saved" in (small.out / "steps" / "seed1_b.log").read_text()  # we waited for it
    assert not (small.out / "steps" / "seed1_b.json").exists() and not (small.out / "made2a").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    (small.folder / "fail.py").write_text(COUNT)
    assert small()[0] == 0
    assert [(small.out / f"made{name}").read_text() for name in ("1a", "1b", "2a")] == [".", "..", "."]


def test_a_step_that_ctrl_c_reached_first(small):
    (small.folder / "fail.py").write_text("raise SystemExit(130)")
    code, printed = small()
    assert code == 130 and "interrupted in seed1/b" in printed and not (small.out / "steps" / "seed1_b.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# from the runs to the study's files

def test_findings_over_seeds(tmp_path):
    """One verdict of all seeds that tested a claim, at least two, is the study's; else it is undecided."""
    verdicts = {"F1": ["holds"] * 3, "F2": ["fails"] * 3, "F3": ["holds", "fails", "holds"],
                "F4": ["holds", "undecided", "holds"], "F5": ["not tested"] * 3, "F6": ["holds", "not tested", "holds"],
                "F7": [None, "holds", "holds"]}
    for i, seed in enumerate(reference.SEEDS):
        lines = [{"id": id, "claim": f"claim {id}", "unit": "nats", "command": "python x.py", "verdict": each[i],
                  "effect": None if each[i] == "not tested" else i + 1.0, "ci": [i, i + 2], "router": "linear"}
                 for id, each in verdicts.items() if each[i]]
        lines += [lines[0] | {"router": "mlp"}] * (seed == 3)
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "findings.json").write_text(json.dumps(lines))
    found = reference.findings(reference.ReferenceConfig(out_dir=str(tmp_path)), "findings.json")
    found = {(line["id"], line["router"]): line for line in found}
    assert {id: line["verdict"] for (id, name), line in found.items() if name == "linear"} == {
        "F1": "holds", "F2": "fails", "F3": "undecided", "F4": "undecided", "F5": "not tested", "F6": "holds",
        "F7": "holds"}
    one = found["F1", "linear"]
    assert one["effects"] == [1, 2, 3] and one["effect"] == 2 and one["deviation"] == 1
    assert one["cis"] == [[0, 2], [1, 3], [2, 4]] and one["base_seeds"] == [1, 2, 3] and one["claim"] == "claim F1"
    assert found["F1", "mlp"]["verdict"] == "undecided" and found["F1", "mlp"]["base_seeds"] == [3]
    assert found["F5", "linear"]["effect"] is None and found["F6", "linear"]["effects"] == [1, 3]
    assert found["F7", "linear"]["base_seeds"] == [2, 3]


def test_gains_over_seeds(tmp_path):
    """Oracle and routers on every base seed: their mean, and the range of the seeds' intervals. Counted are the whole
    text, two choices and routers of the study's own seed."""
    row = {"domain": "all", "choices": "sb", "name": "mlp", "budget": 4.0, "sequences": 8,
           "recovered": [0.1, None, 0.2]}
    for seed in (1, 3):
        (tmp_path / f"seed{seed}").mkdir()
        controls = [{"domain": domain, "k": k, "sequences": 8, "gain": [seed + k, seed, 9 + seed], "foresight": None}
                    for domain in ("code", "all") for k in (2, 4)]
        routers = [row | {"seed": own, "flops": own, "versus": {"fixed": [-own, -own - 1, 1 - own]}} | change
                   for own, change in ((seed, {}), (seed, {"domain": "code"}), (seed, {"choices": "xb"}), (2, {}))]
        (tmp_path / f"seed{seed}" / "oracle.json").write_text(json.dumps({"controls": {"sequential": controls}}))
        (tmp_path / f"seed{seed}" / "routers.json").write_text(json.dumps(routers))
    reference.collect(reference.ReferenceConfig(out_dir=str(tmp_path), preset="debug"))
    found, routed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("oracle", "routers"))
    assert [line["k"] for line in found] == [2, 4] and "foresight" not in found[0]
    assert found[1]["gain"] == {"mean": 6, "of_seeds": [[5, 1, 10], [7, 3, 12]], "range": [1, 12]}
    (line,) = routed
    assert (line["name"], line["budget"], line["base_seeds"], line["sequences"]) == ("mlp", 4, [1, 3], [8, 8])
    assert line["fixed"]["mean"] == -2 and line["fixed"]["range"] == [-4, 0] and "all_big" not in line
    assert line["recovered"]["mean"] == pytest.approx(0.1) and line["flops"] == 2


def in_process(command, log):
    """reference.execute without a process for each step, which would spend its time importing"""
    _, script, *flags = command
    module = importlib.import_module(str(Path(script).relative_to(ROOT)).removesuffix(".py").replace("/", "."))
    code, printed = quiet(module.main, *flags)
    log.write_text(printed)
    return code, False


STUDY = {"SEEDS": (1, 2), "SIZES": {"base": (1, 1), "wide": (1, 1 / 2)}, "BUDGETS": (), "SHARES": (0.0, 0.5)}
TINY = {"vocab_size": 300, "n_layer": 6, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "max_steps": 6,
        "warmup_steps": 1, "eval_sequences": 4}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two seeds and two sizes ("wide" has half the layers here), by the real scripts, without routers
    -> its out_dir, what the last call printed, ablations.json"""
    here = tmp_path_factory.mktemp("reference")
    write_texts(here / "texts", n=60)
    wanted = re.compile("(train|reference|dense.*|noskip|(base|wide).*)$")
    plan = reference.steps
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setitem(train.PRESETS, "debug", TINY | {"corpus": str(here / "texts"), "data_dir": str(here / "data")})
        for name, value in (STUDY | {"execute": in_process}).items():
            patch.setattr(reference, name, value)
        patch.setitem(oracle.PLANS, "debug", ([], [oracle.Job(32)], 0))
        patch.setattr(oracle.OracleConfig.__dataclass_fields__["data_dir"], "default", str(here / "data"))
        patch.setattr(reference, "steps", lambda preset: [
            step for step in plan(preset) if wanted.match(step[0].split("/")[1])])
        flags = [f"--out_dir={here / 'out'}", "--device=cpu", "--preset=debug"]
        assert quiet(reference.main, *flags, "--only=seed1")[0] == 0
        first = quiet(reference.main, *flags, "--only=collect")[1]
        assert "findings.json: left out" in first
        half = json.loads((here / "out/ablations.json").read_text())
        assert half["fig8"][0]["duo - dense"]["seeds"] == [1] and "seed1" in half["runs"]
        code, printed = quiet(reference.main, *flags)
        assert code == 0
        yield here / "out", printed, json.loads((here / "out" / "ablations.json").read_text())


def test_collect_says_what_it_wrote(study):
    out, printed, found = study
    assert "ablations.json" in printed.splitlines()[-1]
    assert set(found) == {"fig8", "without_skips", "scale", "runs"} and {"seed1", "seed2_dense0"} < set(found["runs"])
    assert set(found["runs"]["seed1"]) == {"device", "torch", "commit"}


@torch.no_grad()
def test_fig8_is_what_the_runs_say(study):
    out, _, found = study
    for row, name in zip(found["fig8"], ("dense0", "dense0.5", "dense"), strict=True):
        pair, dense = row["duo - dense"], []
        for seed in (1, 2):
            model, _, rest = load_run(out / f"seed{seed}_{name}", "cpu")
            corpus, config = data.load(Path(rest["corpus"])), train.TrainConfig(**rest["train_config"])
            x, y = (torch.cat(part) for part in zip(*(data.eval_windows(corpus, domain, 8, config.block_size)
                                                      for domain in corpus.domains)))  # router.py's 64 tokens
            dense.append(analyze.batch_losses(model, x, y, BIG).mean())
        assert pair["losses"][1] == pytest.approx(dense, rel=1e-6)
        gaps = np.subtract(*pair["losses"])
        assert pair["difference"][0] == pytest.approx(gaps.mean(), abs=1e-9)
        assert pair["deviation_over_seeds"] == pytest.approx(gaps.std(ddof=1))
        assert pair["difference"][1] <= pair["difference"][0] <= pair["difference"][2]
    duo = load_run(out / "seed1", "cpu")[0]
    assert found["fig8"][-1]["duo - dense"]["losses"][0][0] == pytest.approx(
        analyze.batch_losses(duo, x, y, BIG).mean(), rel=1e-6)
    assert found["fig8"][0]["duo - dense"]["losses"][0][0] == pytest.approx(
        analyze.batch_losses(duo, x, y, SMALL).mean(), rel=1e-6)
    # both tables see the same Duo on the same routes
    assert [row["duo - dense"]["losses"][0] for row in found["fig8"]] == [
        row["duo - other"]["losses"][0] for row in found["without_skips"][:5:2]]
    assert [(row["p_skip"] > 0) for row in found["without_skips"]] == [False] * 5 + [True] * 2


def test_scale_is_what_the_oracles_say(study):
    out, _, found = study
    assert [(row["size"], row["n_layer"]) for row in found["scale"]] == [("base", 6), ("wide", 3)]
    assert found["scale"][0]["parameters"] == 2 * found["scale"][1]["parameters"]
    for row in found["scale"]:
        for share, label in row["all-BIG - oracle"].items():
            expected, oracle_too = row["all-BIG - expected-loss oracle"][share], np.array(label["losses"])
            assert expected["losses"][0] == pytest.approx(label["losses"][0])  # all-BIG is one route, however chosen
            assert label["difference"][0] == pytest.approx((oracle_too[0] - oracle_too[1]).mean())
        assert row["all-BIG - oracle"]["any"]["difference"][0] > 0
    report = json.loads((out / "seed2_wide" / "oracle.json").read_text())
    for search, key in (("sb_frozen_dp", "all-BIG - oracle"),
                        ("sb_frozen_dp_expected", "all-BIG - expected-loss oracle")):
        rows = [r for r in report["searches"][search]["rows"] if r["domain"] in ("all", "text")]
        losses = {r["budget"]: r["loss"] for r in rows}
        assert found["scale"][1][key]["1/3"]["losses"][1][1] == pytest.approx(losses["1"], rel=1e-6)


def test_the_small_files_are_enough(study, tmp_path):
    """Collecting where only losses.json and gains_*.json of each run were brought gives the same ablations."""
    out, _, found = study
    for path in (*out.glob("seed*/losses.json"), *out.glob("seed*/gains_*.json")):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in STUDY.items():
            patch.setattr(reference, name, value)
        patch.setitem(train.PRESETS, "debug", TINY)
        reference.collect(reference.ReferenceConfig(out_dir=str(tmp_path), preset="debug"))
        assert json.loads((tmp_path / "ablations.json").read_text()) == found
        with pytest.raises(UserError, match="gains_label.json: of 6 layers of width 16, not the cpu preset's"):
            reference.collect(reference.ReferenceConfig(out_dir=str(tmp_path), preset="cpu"))
        path = tmp_path / "seed2_wide" / "gains_label.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": "other"}))
        with pytest.raises(UserError, match="seed2_wide/gains_label.json: is about other text than .*seed1_wide"):
            reference.collect(reference.ReferenceConfig(out_dir=str(tmp_path), preset="debug"))


def test_f12_from_the_small_files(tmp_path):
    """What reference.py says of stage 1 is claims.f12 of the losses; where a run is missing, that it was not tested."""
    rng, runs = np.random.default_rng(1), {}
    for ending, routes in (("", ("0/0.5", "0/1")), ("_dense", ("big",)), ("_freeze", ("0/0.5",))):
        (tmp_path / f"seed1{ending}").mkdir()
        runs[ending] = {route: rng.normal(3, 0.1, 50) for route in routes}
        (tmp_path / f"seed1{ending}" / "losses.json").write_text(json.dumps(
            {"windows": "a", "losses": {route: values.tolist() for route, values in runs[ending].items()}}))
    line = {"id": "F12", "claim": "x", "unit": "nats", "command": "", "verdict": "not tested", "effect": None, "ci": []}
    (tmp_path / "seed1" / "findings.json").write_text(json.dumps([line]))
    config = reference.ReferenceConfig(out_dir=str(tmp_path), preset="debug")
    (found,) = reference.findings(config, "findings.json")
    expected = claims.f12(runs[""]["0/1"], runs["_dense"]["big"], runs[""]["0/0.5"], runs["_freeze"]["0/0.5"])
    assert found["effects"] == [expected["effect"]] and found["verdicts"] == [expected["verdict"]]
    assert found["verdict"] == "undecided"  # one seed
    (tmp_path / "seed1_freeze" / "losses.json").unlink()
    (found,) = reference.findings(config, "findings.json")
    assert found["verdict"] == "not tested" and found["base_seeds"] == []
    path = tmp_path / "seed1_dense" / "losses.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": "b"}))
    with pytest.raises(UserError, match="seed1_dense.*is about other text than"):
        reference.losses_of(config, [1], "_dense")


def test_run_sh():
    shown = subprocess.run(["bash", ROOT / "run.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert [line.split("  ")[0].strip() for line in shown.splitlines()] == [
        "bash run.sh", "bash run.sh test", "bash run.sh reference", "bash run.sh setup"]
