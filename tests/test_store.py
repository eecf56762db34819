"""The store loses nothing that was finished, whatever happens to the process, the file or the disk."""

import errno
import gzip
import json
import lzma
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dashbench.rows import Check, Row
from dashbench.store import Store, StoreError, newest, read_rows, store_files


def row(number, status="ok", environment_key="e", **more):
    found = {"latency_ms": 1.0, "checked": Check(passed=True, rows=1), "samples": [1.0] * 100}
    if status != "ok":
        found = {"reason": "because"}
    asked = {
        "method": "m",
        "phase": "prefill",
        "context": 128,
        "batch": 1,
        "dtype": "float32",
        "routing": "topics",
    }
    shape = {"name": "s", "query_heads": 1, "kv_heads": 1, "head_dim": 64}
    where = {"suite": "s@0", "timestamp": "t", "environment_key": environment_key}
    key = f"{number:016x}"
    timed = {"cache": "warm", "launch": "eager"}
    return Row(key=key, status=status, shape=shape, **asked, **timed, **where, **found, **more)


def keys(path):
    return [r["key"] for r in read_rows(path)]


def test_rows_come_back_and_the_newest_counts(tmp_path):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.append(row(1, "error"))
        store.append(row(2))
        store.append(row(1))
        assert store.find(f"{1:016x}", "e")["status"] == "ok"
    assert len(read_rows(path)) == 3 and [r["status"] for r in newest(read_rows(path))] == ["ok", "ok"]


def test_environments_are_kept_apart(tmp_path):
    with Store(tmp_path / "s.jsonl") as store:
        store.append(row(1, environment_key="a"))
        assert store.find(f"{1:016x}", "b") is None
        store.append(row(1, environment_key="b"))
        assert len(store.rows()) == 2


def test_a_torn_last_line_is_cut_off_with_a_notice(tmp_path):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.append(row(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:57])
    assert keys(path) == [f"{1:016x}"], "reading alone leaves a torn line out"
    with Store(path) as store:
        assert "torn" in store.notices[0] and "57 bytes" in store.notices[0]
        store.append(row(2))
    assert keys(path) == [f"{1:016x}", f"{2:016x}"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 10_000))
def test_resuming_after_any_truncation_equals_never_having_stopped(tmp_path, numbers, cut):
    path = tmp_path / "h.jsonl"
    path.unlink(missing_ok=True)
    with Store(path) as store:
        for n in numbers:
            store.append(row(n))
    path.write_bytes(path.read_bytes()[:cut])
    with Store(path) as store:
        for n in dict.fromkeys(numbers):
            if store.find(f"{n:016x}", "e") is None:
                store.append(row(n))
    assert {r["key"] for r in read_rows(path)} == {f"{n:016x}" for n in numbers}


def test_a_second_writer_is_refused(tmp_path):
    with Store(tmp_path / "s.jsonl"), pytest.raises(StoreError, match="another run is writing"):
        Store(tmp_path / "s.jsonl")
    Store(tmp_path / "s.jsonl").close()


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path, monkeypatch, moment):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.append(row(1))
        if moment == "fsync":

            def refuse(_):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "fsync", refuse)
        else:
            real = store._file

            class Full:
                """Takes a few bytes, as a disk that fills up does, then refuses."""

                def __init__(self):
                    self.taken = 0

                def write(self, data):
                    if self.taken:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    self.taken = real.write(data[:20])
                    return self.taken

                def __getattr__(self, name):
                    return getattr(real, name)

            store._file = Full()
        with pytest.raises(StoreError, match="the disk is full; every row finished before is safe"):
            store.append(row(2))
        assert store.find(f"{2:016x}", "e") is None
    assert keys(path) == [f"{1:016x}"] and path.read_bytes().endswith(b"\n")


def test_ten_thousand_rows_open_in_two_seconds(tmp_path):
    path = tmp_path / "s.jsonl"
    line = row(0).model_dump_json()
    with open(path, "w") as file:
        for n in range(10_000):
            file.write(line.replace("0" * 16, f"{n:016x}") + "\n")
    begin = time.perf_counter()
    with Store(path) as store:
        assert len(store.rows()) == 10_000
    assert time.perf_counter() - begin < 2


def test_what_is_no_store_is_said_so(tmp_path):
    (tmp_path / "a.jsonl").write_text("hello\n")
    with pytest.raises(StoreError, match=r"a\.jsonl, line 1: not a row of dashbench"):
        read_rows(tmp_path / "a.jsonl")
    newer = json.loads(row(1).model_dump_json()) | {"row_version": 99}
    (tmp_path / "b.jsonl").write_text(json.dumps(newer) + "\n")
    with pytest.raises(StoreError, match="row version 99 is newer"):
        read_rows(tmp_path / "b.jsonl")
    with pytest.raises(StoreError, match="no rows here"):
        store_files(tmp_path / "nowhere")
    assert store_files(tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


PACKING = pytest.mark.parametrize("ending, pack", [("gz", gzip.compress), ("xz", lzma.compress)])


@PACKING
def test_packed_rows_are_read_too(tmp_path, ending, pack):
    with Store(tmp_path / "s.jsonl") as store:
        for number in range(3):
            store.append(row(number))
    big = tmp_path / f"big.jsonl.{ending}"
    big.write_bytes(pack((tmp_path / "s.jsonl").read_bytes()))
    assert store_files(tmp_path) == [big, tmp_path / "s.jsonl"]
    assert read_rows(big) == read_rows(tmp_path / "s.jsonl")
    whole = big.read_bytes()
    damaged = whole[:200] + bytes(50) + whole[250:]
    for content in (whole[:-20], damaged):
        big.write_bytes(content)
        with pytest.raises(StoreError, match=rf"cannot read .*big\.jsonl\.{ending}"):
            read_rows(big)


@PACKING
def test_a_run_goes_on_with_a_packed_store(tmp_path, ending, pack):
    path, packed = tmp_path / "s.jsonl", tmp_path / f"s.jsonl.{ending}"
    with Store(path) as store:
        store.append(row(1))
    packed.write_bytes(pack(path.read_bytes()))
    path.unlink()
    with Store(path) as store:
        assert "unpacked" in store.notices[0]
        assert store.find(row(1).key, row(1).environment_key)
        store.append(row(2))
    assert len(read_rows(path)) == 2 and not packed.exists()
    path.unlink()
    packed.write_bytes(b"not packed at all")
    with pytest.raises(StoreError, match="cannot unpack"):
        Store(path)
    assert packed.exists() and not path.exists()
