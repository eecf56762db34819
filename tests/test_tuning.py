"""Launch choices: the first rule that fits, a user's file first, and results that do not depend on them."""

import json

import pytest
import torch
from test_dash import DEVICE, planted

from dashbench.kernels import tuning
from dashbench.kernels.backward import BackwardLaunch
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.decode import DecodeLaunch
from dashbench.kernels.tuning import Setting, choose, length_range, read_rules, setting_of

H200 = Setting("sm_90", 128, 64, 16, "bfloat16", 65536)


def write(path, *rules):
    path.write_text(json.dumps(rules))


def test_the_committed_table_fits_the_launches_it_is_for():
    for rule in tuning.TABLE:
        assert set(rule) <= {"stage", "launch", *Setting.__dataclass_fields__}
        known = {"decode": DecodeLaunch, "backward": BackwardLaunch}.get(rule["stage"])
        names = {"BLOCK", "LISTING", "num_warps", "num_stages", "maxnreg"}
        assert set(rule["launch"]) <= (set(known.__dataclass_fields__) if known else names)
    assert choose("route", H200)["num_warps"] == 8 and choose("decode", H200)["overlap"]
    assert choose("route", Setting("sm_80", 128, 64, 16, "bfloat16", 65536)) == {}
    assert choose("route", Setting("sm_90", 128, 64, 4, "bfloat16", 65536)) == {}


def test_a_users_file_comes_first_and_its_last_rule_before_the_others(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    committed = choose("route", H200)  # the file is missing: as if it were not named
    assert committed["num_warps"] == 8
    write(
        path,
        {"stage": "route", "launch": {"num_warps": 2}},
        {"stage": "route", "arch": "sm_90", "tokens": [1, 65536], "launch": {"num_warps": 16}},
    )
    assert choose("route", H200) == {"num_warps": 16}
    longer = Setting("sm_90", 128, 64, 16, "bfloat16", 65537)
    assert choose("route", longer) == {"num_warps": 2}
    write(path, {"stage": "route", "launch": {"num_warps": 1}, "group": 16, "dtype": "float16"})
    assert choose("route", H200) == committed
    chosen = choose("route", H200)
    chosen["num_warps"] = 32
    assert choose("route", H200) == committed, "a caller's change must not reach the table"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "mine.json: "),
        ("{}", "a rule needs a stage"),
        ('[{"stage": "rout", "launch": {}}]', "a rule needs a stage"),
        ('[{"stage": "route", "launch": {}, "n": 1}]', "unknown key 'n'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rules(path)


def test_lengths_are_keyed_by_powers_of_two():
    assert [length_range(n) for n in (1, 2, 3, 4, 1000, 1024, 1025)] == [
        (1, 1), (2, 2), (3, 4), (3, 4), (513, 1024), (513, 1024), (1025, 2048)
    ]  # fmt: skip
    assert all(low <= n <= high for n in range(1, 70) for low, high in [length_range(n)])


def test_a_rule_reaches_the_kernels_and_changes_no_result(tmp_path, monkeypatch):
    """Other blocks and tiles of this very shape; the interpreter knows no warps."""
    inputs = [x.requires_grad_() for x in planted(70, seed=3)]
    # At α = 1.5 so few chunks stay in registers, where no rule reaches.
    options = {"chunk_size": 16, "sigma": 1.0, "alpha": 1.25}

    def run():
        out = dash_attention(*inputs, **options)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    before = run()
    path = tmp_path / "mine.json"
    setting = setting_of(inputs[0], 2, 16)
    keyed = {"group": setting.group, "dtype": setting.dtype, "head_dim": 64, "chunk_size": 16}
    write(
        path,
        {"stage": "route_all", **keyed, "launch": {"BLOCK": 32}},
        {"stage": "backward", **keyed, "launch": {"tile": 8, "splits": 2}},
    )
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    for ours, plain in zip(run(), before, strict=True):
        close = 1e-4 if DEVICE == "cpu" else 2e-2
        assert float(((ours - plain).norm() / plain.norm()).detach()) < close
    write(path, {"stage": "backward", **keyed, "launch": {"tile": 5}})
    with pytest.raises(ValueError, match="a tile of 5 queries"):
        run()
    write(path, {"stage": "route_all", **keyed, "launch": {"BLOCK": 48}})
    with pytest.raises(Exception, match="power of 2"):
        run()


@pytest.mark.gpu
def test_a_search_writes_rules_that_are_then_chosen(tmp_path, monkeypatch):
    q, k, v, s = planted(2048, 1, 2, 16, 128, 64)
    path = tmp_path / "mine.json"
    rules = tuning.tune(q, k, v, s, 64, path)
    assert [rule["stage"] for rule in rules] == ["route", "route_all", "attend"]
    for rule in rules:
        times = [t for t in rule["measured"] if t is not None]
        best = tuning.CANDIDATES[rule["stage"]][rule["measured"].index(min(times))]
        assert rule["launch"] == best and min(times) > 0
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert choose("attend", setting_of(q, 2, 64)) == rules[2]["launch"]
    assert choose("attend", setting_of(q[:, :, :100], 2, 64)) == {}
