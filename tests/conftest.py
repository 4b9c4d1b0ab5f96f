"""Fixtures that several test files share."""

import json

import datasets
import huggingface_hub.constants
import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of `datasets` (its folder), and no network to wait for."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


@pytest.fixture
def write_jsonl():
    """Writes rows to a file and returns its name."""

    def write(path, rows: list) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
