"""results/losses.py and results/joint_study.py, run for real at the debug size: what they say is what the runs say, and
their small files are enough when the checkpoints are gone."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import user_error
from test_reference import quiet
from test_train import write_texts

import data
import router
import train
from claims import interval
from common import load_run, save_checkpoint
from model import BIG
from results import joint_study, losses


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds at k = 1 -> the out_dir, and a function that runs the study's command again"""
    here = tmp_path_factory.mktemp("joint")
    write_texts(here / "texts", n=60)
    tiny = {"corpus": str(here / "texts"), "data_dir": str(here / "data"), "vocab_size": 300, "n_layer": 3, "n_head": 2,
            "n_embd": 16, "block_size": 8, "batch_size": 4, "max_steps": 6, "warmup_steps": 1, "eval_sequences": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "debug", tiny)
        patch.setitem(router.JOINT_PRESETS, "debug", tiny | {"hidden": 4, "calibration_tokens": 64})
        patch.setattr(joint_study, "SEEDS", (1, 2))

        def again(*flags):
            return quiet(joint_study.main, "debug", "1", f"--out_dir={here / 'out'}", "--device=cpu", *flags)
        assert again("--seed=2")[0] == 0 and not (here / "out" / "debug_joint_k1.json").exists()
        assert again()[0] == 0
        yield here / "out", again


@torch.no_grad()
def test_losses_are_what_the_runs_say(study):
    out, _ = study
    found = json.loads((out / "debug_full_s1" / "losses.json").read_text())
    model, shape, rest = load_run(out / "debug_full_s1", "cpu")
    corpus = data.load(Path(rest["corpus"]))
    x, y = (torch.cat(part) for part in zip(*(data.eval_windows(corpus, domain, 8, shape.block_size)
                                              for domain in corpus.domains)))
    expected = model(x, BIG, y, reduction="none")[1].double().mean(-1)
    assert list(found["losses"]) == ["big"] and found["losses"]["big"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found["flops"]["big"] == model.flops(BIG) and len(found["domain"]) == len(x)
    of_router = json.loads((out / "debug_joint_k1_s1" / "losses.json").read_text())
    rows = json.loads((out / "debug_joint_k1_s1" / "routers.json").read_text())
    row = next(row for row in rows if row["domain"] in ("all", "text"))
    assert np.mean(of_router["losses"]["k1"]) == pytest.approx(row["loss"], rel=1e-6)
    assert of_router["big_per_token"]["k1"] == pytest.approx(row["achieved"], rel=1e-5)
    assert of_router["windows"] == found["windows"]


def test_the_study_is_what_its_files_say(study):
    out, _ = study
    report = json.loads((out / "debug_joint_k1.json").read_text())
    gaps = []
    for seed in report["seeds"]:
        folders = {"joint": f"joint_k1_s{seed['seed']}", "full": f"full_s{seed['seed']}",
                   "equal": f"width{seed['big_width_equal']}_s{seed['seed']}"}
        files = {name: json.loads((out / f"debug_{folder}" / "losses.json").read_text())
                 for name, folder in folders.items()}
        values = {name: np.array(next(iter(file["losses"].values()))) for name, file in files.items()}
        assert seed["loss"]["all"]["joint"][0] == pytest.approx(values["joint"].mean())
        unit = 6 * 16 * 3  # FLOPs of one unit of width: the dense model costs what the routed one does, to half of that
        assert abs(seed["flops"]["equal"] - seed["flops"]["joint"]) <= unit / 2
        joint, full = seed["flops"]["joint"], seed["flops"]["full"]
        near = joint_study.equal_run(out, "debug", seed["seed"], joint - 0.004 * joint, full)
        assert near == out / f"debug_{folders['equal']}"  # costs 0.4% more, so it serves
        for other in (joint - 0.02 * joint, joint + 2 * unit):
            assert joint_study.equal_run(out, "debug", seed["seed"], other, full) != near
        gaps.append(values["joint"] - values["equal"])
    assert report["mean_over_seeds"]["all"]["joint - equal"] == pytest.approx(interval(np.mean(gaps, 0)))
    assert report["standard_deviation_over_seeds"]["joint - equal"] == pytest.approx(
        np.std([gap.mean() for gap in gaps], ddof=1))


def test_the_small_files_are_enough(study, monkeypatch):
    """Where a checkpoint was lost, and only losses.json brought home, nothing is trained again."""
    out, again = study
    before = (out / "debug_joint_k1.json").read_text()
    for path in out.glob("*/ckpt.pt"):
        path.unlink()
    shutil.rmtree(out / "debug_joint_k1_s1" / "routers")
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trains again"))
    assert again()[0] == 0 and (out / "debug_joint_k1.json").read_text() == before


def test_runs_of_other_text_are_not_compared(study):
    out, again = study
    path = out / "debug_full_s1" / "losses.json"
    kept = path.read_text()
    path.write_text(kept.replace(json.loads(kept)["windows"], "0" * 16))
    user_error(again, "different text", "one corpus")
    path.write_text(kept)


def test_runs_that_cannot_be_measured(tmp_path):
    user_error(lambda: losses.main([str(tmp_path / "none")]), "none", "no checkpoint")
    save_checkpoint(tmp_path / "ckpt.pt", {"step": 5, "train_config": {"max_steps": 6}})
    user_error(lambda: losses.main([str(tmp_path)]), "not finished", "step 5 of 6", "--resume")
    assert not (tmp_path / "losses.json").exists()


def test_any_budget(study, monkeypatch):
    """One base for each k, from its losses.json; a k that is none is refused in one line."""
    out, _ = study
    full = json.loads((out / "debug_full_s1" / "losses.json").read_text())
    many = out / "debug_any_s1"
    many.mkdir()
    values = {f"k{k}": [value - k / 100 for value in full["losses"]["big"]] for k in (10, 2)}
    (many / "losses.json").write_text(json.dumps(full | {
        "losses": values, "flops": {"k10": 2, "k2": 1}, "big_per_token": {"k10": 9.9, "k2": 2.1}}))
    assert quiet(joint_study.main, "debug", "any", f"--out_dir={out}", "--device=cpu")[0] == 0
    rows = json.loads((out / "debug_joint_any.json").read_text())["any"]
    assert [(row["k"], row["flops"], row["big_per_token"]) for row in rows] == [(2, 1, 2.1), (10, 2, 9.9)]
    for row in rows:
        assert row["loss"]["all"]["any - full"] == pytest.approx([-row["k"] / 100] * 3)
    user_error(lambda: joint_study.main(["debug", "four"]), "four", "whole number")
    user_error(lambda: joint_study.main(["debug", "any", "--seed=2"]), "--seed=2", "leave it out")
    user_error(lambda: joint_study.main(["debug", "--seed=7"]), "--seed=7", "1, 2")


def test_collecting_never_trains(study, monkeypatch):
    """What reference.py --only=collect calls: the file from what is there, else one line about the first run that is
    not."""
    out, _ = study
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trains"))
    before = (out / "debug_joint_k1.json").read_text()
    joint_study.collect(1, "debug", out)
    assert (out / "debug_joint_k1.json").read_text() == before
    kept = (out / "debug_full_s2").rename(out / "away")
    user_error(lambda: joint_study.collect(1, "debug", out), "debug_full_s2/losses.json", "missing")
    kept.rename(out / "debug_full_s2")
