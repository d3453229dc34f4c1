"""The report's five sentences: their numbers are the run's, their words follow them."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import user_error

import analyze
import story

ROW = {"domain": "all", "k": 2, "gain": [0.5, 0.4, 0.6], "foresight": [0.1, 0.08, 0.12], "hindsight": [0.4, 0.3, 0.5]}


def study(equal, full):
    return {"k": 4, "seeds": [1, 2], "preset": "gpu", "device": "a GPU", "sequences": 8,
            "mean_over_seeds": {"all": {"joint - equal": equal, "joint - full": full}}}


@pytest.fixture
def made():
    """Four layers, one router at k = 2 that gains 0.02 on each of 8 sequences."""
    fixed = np.linspace(3, 2, 5) + np.zeros((8, 5))
    routes = np.zeros((8, 4, 4), np.uint8) + np.array([2, 2, 1, 1], np.uint8)
    router = {"routes": routes, "losses": fixed[:, 2:3] - 0.02 + np.zeros((8, 4)), "domain": np.zeros(8, int),
              "notes": json.dumps({"name": "mlp", "budget": 2.0, "choices": "sb", "seed": 1, "skip_budget": None})}
    return {"controls": [ROW], "base": {"fixed": (fixed, np.arange(8))}, "contexts": {"fixed": "sequential"},
            "routers": {"mlp_k2_s1": router}, "commands": {"oracle": "python oracle.py", "router": "python router.py"},
            "controls_context": "sequential", "times_on": {"device": "a CPU"},
            "times": {"fixed 2": [0.8, 0.7, 0.9], "mlp 2": [1.25, 1.2, 1.3]}, "folder": "out",
            "windows": {"domain": np.zeros(8, int), "domains": ["code"]},
            "model": SimpleNamespace(config=SimpleNamespace(n_layer=4, n_embd=8), flops=lambda choice: torch.tensor(
                {1: 1.0, 2: 3.0}[choice]))}


def test_five_sentences(made):
    gain, split, router, joint, time = story.tell(made, [], study([-0.02, -0.03, -0.01], [0.05, 0.04, 0.06]))
    assert "gains 0.500 (0.400 to 0.600) nats over the best fixed pattern at k = 2" in gain
    assert "At least 0.100" in split and "at most 0.400 (0.300 to 0.500) nats is hindsight" in split
    assert "The router, mlp at k = 2, is 0.020 (0.020 to 0.020) nats below the best fixed pattern" in router
    assert "20% of what could be foreseen" in router
    assert "0.020 (0.010 to 0.030) nats below the dense model of equal FLOPs" in joint
    assert "gpu preset, a GPU, 8 sequences, mean of 2 seeds" in joint
    assert "0.050 (0.040 to 0.060) nats above the full dense model" in joint
    assert time.startswith("Under the mlp router at k = 2 a forward takes 25% more time than all-big (1.20 to 1.30 of "
                           "its time) for 33% fewer FLOPs")
    assert "under one pattern at k = 2 a forward takes 20% less time" in time and "(width 8, a CPU" in time
    made["times"]["mlp 2"] = [0.97, 0.9, 1.1]
    assert "takes about as long as all-big (0.90 to 1.10" in story.time_saved(made)


def test_words_follow_the_numbers(made):
    made["routers"]["mlp_k2_s1"]["losses"] += 0.05
    assert "is 0.030 (0.030 to 0.030) nats above the best fixed pattern" in (told := story.router(made))
    assert "foreseen" not in told
    made["controls"] = [ROW | {"foresight": [-0.04, -0.08, 0.01]}]
    assert story.oracle(made, [])[1].startswith("None of that could be foreseen for sure")
    worse = {"id": "F3", "effect": -0.3, "ci": [-0.4, -0.2]}
    assert "nats above all-big" in story.oracle(made | {"controls": []}, [worse])[0]
    joint = story.joint(made, study([0.001, -0.01, 0.01], [1, 1, 1]))
    assert "level with the dense model of equal FLOPs (+0.001 nats" in joint


def test_what_was_not_measured_is_said(made):
    bare = copy.copy(made) | {"controls": [], "base": {}, "contexts": {}, "times": {}}
    told = story.tell(bare, [{"id": "F3", "effect": 0.3, "ci": [0.2, 0.4]}], {})
    assert len(told) == 5 and "0.300 (0.200 to 0.400) nats below all-big" in told[0]
    for sentence, command in zip(told[1:], ("--reference", "router.py", "joint_study.py", "analyze.py"), strict=True):
        assert command in sentence and not any(character.isdigit() for character in sentence)


def test_joint_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(study([0, 0, 0], [0, 0, 0])))
    assert analyze.read_joint(path)["k"] == 4 and analyze.read_joint("") == {}
    half = json.dumps({"mean_over_seeds": {"all": {"joint - full": [0, 0, 0]}}})
    for text in ("{", "[]", half, '{"mean_over_seeds": {"all": "joint - full"}}'):
        path.write_text(text)
        user_error(lambda: analyze.read_joint(path), str(path), "joint_study.py")
