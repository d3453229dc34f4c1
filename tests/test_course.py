"""COURSE.md is held to the code: its snippets stand where it says, its commands parse, its numbers are measured."""
import importlib
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from common import parse_config
from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT
from train import PRESETS, TrainConfig, model_shape

ROOT = Path(__file__).parent.parent
COURSE = (ROOT / "COURSE.md").read_text()
TEXT = " ".join(COURSE.split())  # sentences, however their lines are broken
SNIPPET = re.compile(r"`(\w+\.py)`, lines (\d+)-(\d+)[^`]*?\n\n```python\n(.*?)```", re.S)
CONFIGS = {"train": "TrainConfig", "sample": "SampleConfig", "bench": "BenchConfig", "oracle": "OracleConfig",
           "router": "RouterConfig", "analyze": "AnalyzeConfig"}
COMMANDS = [line for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", COURSE, re.M | re.S) if not language
            for line in block.splitlines()]
STOPS = ["model", "train", "oracle", "router", "zoo", "analyze"]


def results(name):
    text = (ROOT / "results" / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def test_lines_fit_a_page():
    assert max(map(len, COURSE.splitlines())) <= 120


def test_stops_in_reading_order():
    assert re.findall(r"^## Stop \d: `(\w+)\.py`", COURSE, re.M) == STOPS
    for stop in re.split(r"^## ", COURSE, flags=re.M)[1:7]:
        found = re.findall(r"^\*\*(The question|Read|Look at|Predict|What you should have seen|Why)\b", stop, re.M)
        assert Counter(found) == Counter(["The question", "Read", "Look at", "Predict", "What you should have seen",
                                          "Why"]), stop[:20]
        assert "\n```\npython " in stop, stop[:20]


def test_every_snippet_is_found():
    assert COURSE.count("```python") == len(SNIPPET.findall(COURSE)) >= 6
    assert {name for name, *_ in SNIPPET.findall(COURSE)} >= {"model.py", "train.py", "oracle.py", "zoo.py"}


@pytest.mark.parametrize("name, first, last, quoted", SNIPPET.findall(COURSE))
def test_snippets_stand_where_they_are_said_to(name, first, last, quoted):
    lines, quoted = (ROOT / name).read_text().splitlines(), quoted.splitlines()
    assert len(quoted) <= 12
    there = [i + 1 for i in range(len(lines)) if lines[i:i + len(quoted)] == quoted]
    assert [int(first)] == there, f"COURSE.md says {name}, line {first}; the code stands at {there or 'no place'}"
    assert int(last) == int(first) + len(quoted) - 1


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith("python -m")])
def test_commands_parse(command):
    script, *flags = shlex.split(command.removeprefix("python "))
    module = importlib.import_module(script.removesuffix(".py"))
    parse_config(getattr(module, CONFIGS[script.removesuffix(".py")]), flags, module.PRESETS)


def test_commands_in_the_text_parse():
    inline = re.findall(r"`python ((\w+)\.py [^`]+)`", COURSE)
    assert inline  # analyze.py --slides
    for command, name in inline:
        module = importlib.import_module(name)
        parse_config(getattr(module, CONFIGS[name]), shlex.split(command)[1:], module.PRESETS)


def test_names_exist():
    for name in set(re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|md|sh|ipynb|json|jsonl))`", COURSE)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m pytest (exercises/\w+\.py)", COURSE):
        assert (ROOT / name).exists(), name
    code = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    for owner, method in re.findall(r"`([A-Z][a-z]\w+)\.(\w+)`", COURSE):  # Block.forward_dense
        assert any(re.search(rf"^class {owner}\b", text, re.M) and f"    def {method}(" in text
                   for text in code.values()), (owner, method)
    for name in re.findall(r"`([a-z_]+)`", COURSE):
        assert any(re.search(rf"\bdef {name}\(|\b{name}\b", text) for text in code.values()), name


def test_the_exercises_listed_are_those_in_the_folder():
    files = sorted(path.stem for path in (ROOT / "exercises").glob("ex??_*.py"))
    listed = re.findall(r"^\| (\d+) \| `exercises/(\w+)\.py`", COURSE, re.M)
    assert [name for _, name in listed] == files and len(files) == 10
    assert [int(number) for number, _ in listed] == list(range(1, 11)) == [int(name[2:4]) for name in files]
    at_stops = re.findall(r"^\| \d \| `\w+\.py`.*\| ([\d, ]+) \|$", COURSE, re.M)  # the table of stops
    assert sorted(int(n) for cell in at_stops for n in cell.split(",")) == list(range(1, 11))


# ---------------------------------------------------------------------------------------------------------------------
# numbers

def test_minutes(monkeypatch):
    """The table of stops says what the commands of each stop took, and the commands are those of the page."""
    walk = results("cpu_course.json")
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    course = importlib.import_module("course")
    assert [(row["stop"], row["command"]) for row in walk["commands"]] == course.commands(COURSE)
    assert [command for _, command in course.commands(COURSE)] == [line for line in COMMANDS if "pytest" not in line]
    seconds = Counter()
    for row in walk["commands"]:
        seconds[row["stop"]] += row["seconds"]
    table = re.findall(r"^\| (\d) \| `(\w+)\.py`.*\| (\d+) min \| (\d+) min \|", COURSE, re.M)
    assert [(int(stop), name, int(running)) for stop, name, _, running in table] == [
        (stop, name, max(1, round(seconds[stop] / 60))) for stop, name in enumerate(STOPS, 1)]
    assert 100 <= sum(int(reading) for *_, reading, _ in table) <= 120  # two hours, with some to spare


def code_numbers():
    """What follows from the code: costs, and the size of the tree."""
    small, large = (DuoGPT(model_shape(TrainConfig(**PRESETS[name]), vocab)) for name, vocab in (("cpu", 1024),
                                                                                                ("gpu", 4096)))
    shape = small.config
    assert isinstance(shape, DuoConfig) and shape.big_width == 16 * shape.small_width
    read_out = 2 * shape.n_embd * shape.vocab_size
    skip, less, more = ((small.flops(choice) - read_out) // shape.n_layer for choice in (SKIP, SMALL, BIG))
    L = shape.n_layer
    return ["16 times the weights of SMALL's",
            f"one layer costs a token {skip:,} FLOPs for SKIP, {less:,} for SMALL and {more:,} for BIG; the read-out "
            f"adds {read_out:,}",
            f"all-big takes {small.flops(BIG) / small.flops(SMALL):.2f} times the FLOPs of all-small",
            f"which is wider, {large.flops(BIG) / large.flops(SMALL):.2f} times",
            f"there are {2 ** L:,} routes. One by one they need {L * 2 ** L:,} FFNs per token",
            f"agree up to a layer, {sum(2 ** layer for layer in range(1, L + 1)):,}"]


def stage1_numbers():
    half = next(row for row in results("cpu_bench.json")["inference"]
                if (row["width"], row["route"]) == (512, "half-big"))
    end = results("cpu_stage1.jsonl")[-1]
    code, prose = ({route: row["loss"] for route, row in end["domains"][d].items()} for d in ("code", "prose"))
    return [f"half-big saves {half['flops_saved']:.0%} of the FLOPs and {half['time_saved']:.0%} of the time",
            f"On code {code['small']:.3f} nats per token all-small, {code['random']:.3f} random, {code['big']:.3f} "
            f"all-big; on prose {prose['small']:.3f}, {prose['random']:.3f} and {prose['big']:.3f}",
            f"bigram has {end['bigram']['code']:.3f} and {end['bigram']['prose']:.3f}",
            f"Random is {code['random'] - code['big']:.2f} (code) and {prose['random'] - prose['big']:.2f} (prose) "
            f"above all-big, all-small {code['small'] - code['big']:.2f} and {prose['small'] - prose['big']:.2f}"]


def oracle_numbers():
    report, bench = results("cpu_oracle.json"), results("cpu_oracle_bench.json")["oracle"][0]
    rows = {row["k"]: row for row in report["controls"]["frozen"] if row["domain"] == "all"}
    best, four = min(rows, key=lambda k: rows[k]["label"]), rows[4]
    greedy = [row for row in report["quality"] if row["search"] == "greedy"]
    assert rows[1]["label"] < rows[12]["label"]
    assert all(0 < row["foresight"][0] < 0.1 for k, row in rows.items() if 0 < k < 12)
    return [f"both domains, {four['sequences']} sequences). The oracle is best at k = {best}, with "
            f"{rows[best]['label']:.3f} nats; all-big has {rows[12]['label']:.3f}",
            f"One BIG layer, well placed, has {rows[1]['label']:.3f}",
            f"At k = 4 the oracle gains {four['gain'][0]:.3f} nats over the best fixed pattern: "
            f"{four['foresight'][0]:.3f} of that is foresight, {four['hindsight'][0]:.3f} hindsight",
            "gains nothing over the fixed pattern: {:.3f} ({:.3f} to {:.3f})".format(*four["learnable"]),
            f"Greedy search does {greedy[0]['work']:.0%} of the work of exhaustive search and is at most "
            f"{max(row['gap'][0] for row in greedy):.3f} nats worse",
            f"counts {bench['counted_ratio']:.1f} times less work than one route after the other, and is "
            f"{bench['measured_ratio']:.1f} times faster",
            f"under {math.ceil(10 * max(row['foresight'][0] for row in rows.values())) / 10:.1f} nats of foresight",
            f"not {four['gain'][0]:.1f}",
            f"The oracle's gain at k = 4 was {four['gain'][0]:.1f} nats, its foresight {four['foresight'][0]:.2f}"]


def router_numbers():
    walk = results("cpu_course.json")["routers"]
    rows = [row for row in results("h100_routers.json")["rows"] if (row["domain"], row["budget"]) == ("all", 4)]
    paper = [row for row in rows if row["name"] in ("linear", "gumbel", "mlp", "advantage", "distilled")]
    best = min(paper, key=lambda row: row["loss"])
    assert len(paper) == 5
    four = next(row for row in results("h100_routers.json")["controls"]["rows"] if row["k"] == 4)
    own = next(row for row in walk if (row["name"], row["budget"]) == ("linear", 4))
    low, estimate, high = sorted(-value for value in own["minus_fixed"])
    return [f"the linear router at k = 4 gained {estimate:.3f} nats ({low:.3f} to {high:.3f}) over the best fixed "
            f"pattern, on {own['sequences']} sequences",
            f"gains {-best['versus']['fixed'][0]:.3f} nats over the best fixed pattern at k = 4, "
            f"{best['recovered'][0]:.1%} of the gap", f"{four['foresight'][0]:.3f} of {four['gain'][0]:.3f}"]


def zoo_numbers():
    line = next(line for line in results("cpu_zoo.json") if line["system"] == "rmoe")
    seeds = line["detail"]["by_seed"]
    assert line["verdict"] == "undecided" and seeds["2"][1] < 0 < seeds["2"][2]
    h100 = {row["name"]: row["loss"] for row in results("h100_routers.json")["rows"]
            if (row["domain"], row["budget"]) == ("all", 4)}
    assert abs(h100["rmoe"] - h100["rmoe_np"]) < 0.001
    above = {row["name"]: row["minus_fixed"][0] for row in results("cpu_course.json")["routers"]}
    assert above["rmoe_np"] > above["rmoe"] > 0 > above["linear"]
    return [f"RMoE was {above['rmoe']:.3f} nats above (worse than) the best fixed pattern, its control "
            f"{above['rmoe_np']:.3f}",
            f"RMoE is {line['effect']:.3f} nats better than its control ({line['ci'][0]:.3f} to {line['ci'][1]:.3f}), "
            f"but {seeds['1'][0]:.3f} in one seed and {seeds['2'][0]:.3f} in the other",
            "level to 0.001 at k = 4"]


def test_the_costs_are_printed(capsys):
    (source,) = re.findall(r'^python -c "(.*)"$', COURSE, re.M)
    exec(source, {})
    skip, small, big = json.loads(capsys.readouterr().out)
    shape = TrainConfig(**PRESETS["cpu"])
    model = DuoGPT(model_shape(shape, 1024))
    assert [skip, small, big] == [int(model.flops(choice)) for choice in (SKIP, SMALL, BIG)]


def findings_numbers():
    lines = results("cpu_findings.json")
    depth = {k: part[0] for k, part in next(line for line in lines if line["id"] == "F6")["detail"].items()}
    n = Counter(line["verdict"] for line in lines)
    assert sum(n.values()) == len(lines)
    failing = [line["id"] for line in lines if line["verdict"] == "fails"]
    assert failing == ["F6", "F12"]
    few = [line["sequences"] for line in lines]
    assert max(few) == 128
    return [f"Of {len(lines)} verdicts {n['holds']} hold, {n['fails']} fail and {n['undecided']} are undecided",
            f"late at k = 4 (depth {depth['centre_of_mass_k4']:.2f} of 1: met), balanced at k = 6 "
            f"({depth['centre_of_mass_k6']:.2f}: not) and early at k = 8 ({depth['centre_of_mass_k8']:.2f}: not)",
            f"a laptop's {min(few)} to 128 sequences"]


def notebook_numbers():
    return [f"in about {round(results('cpu_course.json')['notebook_seconds'] / 60)} minutes on a quiet CPU"]


def test_every_number_is_measured():
    """Each sentence with a number stands in the page as made from the files; no other number stands there."""
    rest = re.sub(r"```.*?```|`[^`]*`", "", COURSE, flags=re.S)
    rest = " ".join(rest.split())
    for numbers in (code_numbers, stage1_numbers, oracle_numbers, router_numbers, zoo_numbers, findings_numbers,
                    notebook_numbers):
        for part in numbers():
            assert part in rest, part
            rest = rest.replace(part, "")
    assert re.findall(r"\d+\.\d+|\d+%|\d+,\d{3}", re.sub(r"\*\*Predict\.\*\*.*?\*\*", "", rest)) == []
