"""The first thing a user runs, at full length: a base that gets the task wrong, a fine-tuned one that gets it right, in two minutes."""

import json
import time

import pytest

from falcon_finetune.tiny_falcon import cache_folder


@pytest.mark.slow
def test_quickstart_teaches_the_task_and_reuses_what_is_there(shop):
    run_dir = shop.folder / "quickstart"
    # Two threads: what a user's machine of two cores gives it.
    # The user's own cache, because the tiny model takes most of a minute to make, and other tests may have made it.
    environment = {"FALCON_FINETUNE_CACHE": str(cache_folder()), "OMP_NUM_THREADS": "2"}
    command = ("-m", "scripts.quickstart", "-o", run_dir)
    began = time.monotonic()
    first = shop.python(*command, environment=environment).finish()
    between = time.monotonic()
    assert first.code == 0, first.stderr[-3000:]
    assert "Traceback" not in first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    print(f"quickstart: {between - began:.0f} s, {result}")
    assert result.keys() == {"exact_match_before", "exact_match_after", "quantized_layers", "run_dir", "seconds"}
    assert result["exact_match_before"] < 0.1
    assert result["exact_match_after"] >= 0.9
    assert result["quantized_layers"] == 16
    assert result["run_dir"] == str(run_dir)
    assert str(run_dir) in first.stdout and "next" in first.stdout and "before:" in first.stdout

    changed = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    again = shop.python(*command, environment=environment).finish()
    assert again.code == 0, again.stderr[-3000:]
    repeated = json.loads(again.stdout.splitlines()[-1])
    print(f"again: {time.monotonic() - between:.0f} s")
    assert "making " not in again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in run_dir.iterdir()} == changed
    assert repeated | {"seconds": 0} == result | {"seconds": 0}
    assert "already finished" in again.stderr and repeated["seconds"] < result["seconds"]
