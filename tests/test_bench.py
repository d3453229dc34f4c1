import json
import time

import pytest
import torch

import bench
from common import UserError
from model import BIG, SMALL, DuoConfig, DuoGPT


def test_measure_takes_turns_and_medians(monkeypatch):
    order = []

    def variant(name, milliseconds):
        def function():
            order.append(name)
            time.sleep(milliseconds / 1e3)
        return function

    ms = bench.measure({"fast": variant("fast", 20), "slow": variant("slow", 60)}, torch.device("cpu"))
    assert 2 < ms["slow"] / ms["fast"] < 4 and 20 <= ms["fast"] < 40
    rounds = order[8:]  # after three warm-up calls and one to size a round, of each
    assert sum(a != b for a, b in zip(rounds, rounds[1:], strict=False)) == 2 * bench.ROUNDS - 1


def test_tables_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    bench.main(["--preset=debug", "--device=cpu", f"--save={tmp_path / 'b.json'}"])
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["torch"] == torch.__version__ and report["matmul_tflops"] > 0 and "train" not in report
    assert [(r["p_big"], r["pass"]) for r in report["execution"]][:2] == [(0.1, "forward"), (0.1, "forward + backward")]
    for row in report["execution"]:
        assert row["time_saved"] == pytest.approx(1 - 1 / row["speedup"])
    model = DuoGPT(DuoConfig(2, 2, 128, 32, 4096))
    by_route = {r["route"]: r for r in report["inference"] if r["width"] == 128}
    assert by_route["all-small"]["flops"] == pytest.approx(model.flops(SMALL) / model.flops(BIG))
    assert by_route["all-big"]["time"] == 1 and by_route["all-big"]["flops_saved"] == 0
    saved = [r["flops_saved"] for r in report["execution"]]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0  # less BIG, more saved
    # Dense execution computes both FFNs for all tokens: at p(big) = 0.5 sparse saves one small and one big FFN in two.
    half = next(r["flops_saved"] for r in report["execution"] if r["p_big"] == 0.5)
    one_small = 2 * 6 * 128 * 32
    expected = (model.flops(BIG) - model.flops(SMALL)) / 2 + one_small
    assert half == pytest.approx(expected / (model.flops(BIG) + one_small))
    assert [r["what"] for r in report["router"]] == ["prefill 2 x 16", "decode, batch 2"]
    for row in report["router"]:
        assert row["time_saved"] == pytest.approx(1 - row["us/token, routed"] / row["us/token, all-big"])
        assert row["time_saved / flops_saved"] == pytest.approx(row["time_saved"] / row["flops_saved"])
    printed = capsys.readouterr().out
    assert "flops_saved" in printed and "time_saved" in printed


def test_flops_saved_by_a_router(monkeypatch):
    """Counted by hand: each BIG in place of a SMALL costs 6 d (w_big - w_small); the router's own work is added."""
    monkeypatch.setattr(bench, "measure", lambda variants, device: dict.fromkeys(variants, 1.0))
    config = bench.BenchConfig(preset="debug")
    model, router, text = bench.routed_model(config, torch.device("cpu"))
    for row in bench.bench_router(config, torch.device("cpu")):
        T = 16 if "prefill" in row["what"] else 12
        big = model.flops(BIG, T)
        spent = model.flops(SMALL, T) + row["big"] * 6 * 64 * (256 - 16) + router.flops()
        assert row["flops_saved"] == pytest.approx(1 - spent / big)
        assert 0 < row["big"] < 2


def test_rows_need_not_have_the_same_columns(capsys):
    """On a GPU all-big is timed compiled as well, but for prefill only."""
    bench.show("router", [{"what": "prefill", "us": 1.0, "us, compiled": 0.5}, {"what": "decode", "us": 2.0}])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[3:]] == [["prefill", "1", "0.5"],
                                                                                  ["decode", "2"]]


def test_counts_of_a_route():
    route = torch.tensor([[[0, 2], [1, 2], [2, 2]]])
    assert bench.counts_of(route) == [(1, 1, 1), (0, 0, 3)]


@pytest.mark.parametrize("flag, words", [
    ("--router=no.pt", "no checkpoint here"),
    ("--part=speed", "--part=speed: choose from train, execution"),
    ("--against=nowhere", "--against=nowhere: no model.py there"),
    pytest.param("--part=train", "--part=train and --against: need a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    pytest.param("--profile", "--profile: needs a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_bad_input(flag, words):
    with pytest.raises(UserError, match=words):
        bench.main(["--preset=debug", "--part=router", "--out_dir=nowhere", flag])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_training_step_on_cuda():
    step = bench.duo_step(DuoConfig(2, 2, 64, 32, 128), 4, torch.device("cuda"), 1, 0.5)
    for _ in range(4):  # compile, capture, replay
        step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_captured_call_does_the_same_work():
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    replay = bench.captured(lambda: total.add_(x), torch.device("cuda"))
    total.zero_()
    x.fill_(2)
    replay()
    assert total.tolist() == [2, 2, 2]
