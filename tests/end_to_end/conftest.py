"""What the end-to-end tests share: small Falcons on disk, data, and the shipped command in processes of its own.

Everything lives in the session's temporary folder, the caches of the libraries too, so a test finds nothing that an earlier session left.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_SECONDS = 240
STYLES = {
    "7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
}
WORDS = "horse tiger eagle camel otter apple bread honey lemon rice".split()


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    run_dir: Path

    @property
    def record(self) -> dict:
        return json.loads((self.run_dir / "run.json").read_text())

    @property
    def adapter(self) -> dict:
        """Tensors of the saved adapter by name."""
        from safetensors.torch import load_file

        return load_file(self.run_dir / "adapter_model.safetensors")


class Started:
    """A command that runs, in a process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], run_dir: Path):
        self.run_dir = run_dir
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, start_new_session=True)

    def finish(self) -> Finished:
        """Waits for the end; a command that hangs is killed with all its ranks and fails the test."""
        try:
            stdout, stderr = self.process.communicate(timeout=TIME_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            stdout, stderr = self.process.communicate()
            pytest.fail(f"no end after {TIME_LIMIT_SECONDS} s: {stderr[-3000:]}")
        return Finished(self.process.returncode, stdout, stderr, self.run_dir)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)


class Shop:
    """Starts the shipped commands as a user would, on the CPU, offline, one thread a rank."""

    def __init__(self, folder: Path):
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items()
                     if not name.startswith(("WANDB_", "TORCHELASTIC_", "HF_", "XDG_")) and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NETRC")}
        self.environment = inherited | {
            "HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(folder / "matplotlib"),
        }
        (folder / "home").mkdir()

    def python(self, *arguments: str | Path, environment: dict[str, str] | None = None, run_dir: Path | None = None) -> Started:
        command = [sys.executable, *map(str, arguments)]
        return Started(command, self.environment | (environment or {}), run_dir or self.folder)

    def finetune(self, *flags: str | Path, to: str, ranks: int = 1, environment: dict[str, str] | None = None) -> Started:
        """`python finetune.py FLAGS -o FOLDER/to`, under torchrun if there are several ranks."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        run_dir = self.folder / to
        return self.python(*launcher, "finetune.py", *flags, "-o", run_dir, environment=environment, run_dir=run_dir)

    def train(self, *flags: str | Path, to: str, ranks: int = 1, environment: dict[str, str] | None = None) -> Finished:
        """A run that must succeed."""
        finished = self.finetune(*flags, to=to, ranks=ranks, environment=environment).finish()
        assert finished.code == 0, finished.stderr[-4000:]
        assert "Traceback" not in finished.stderr
        return finished


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("end_to_end"))


@pytest.fixture(scope="session")
def falcon(shop) -> Callable[[str], Path]:
    """Folder of a Falcon with random weights and one token a byte, in either of the two published layouts."""

    def folder(style: str) -> Path:
        where = shop.folder / f"falcon-{style}-style"
        if not where.exists():
            _write_falcon(where, STYLES[style])
        return where

    return folder


def _write_falcon(folder: Path, layout: dict) -> None:
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    from falcon_finetune.tiny_falcon import byte_tokenizer

    config = FalconConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
                          bos_token_id=256, eos_token_id=256, pad_token_id=257, initializer_range=0.1, **layout)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def questions(shop) -> Path:
    """18 rows whose answers have one to four words: six steps of four rows go over the end of an epoch, and no two ranks learn as many tokens."""
    draw = random.Random(5)
    rows = []
    for _ in range(18):
        words = draw.sample(WORDS, draw.randint(2, 6))
        rows.append({"prompt": f"Repeat the end of {' '.join(words)}:", "completion": " " + " ".join(words[-draw.randint(1, 4) :])})
    path = shop.folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def trained(shop, falcon, questions) -> Finished:
    """One run that several tests look at: the plain bf16 base computed in float32, long enough to learn where answers end."""
    return shop.train("-m", falcon("7b"), "-d", questions, "-q", "16bit", "--compute_dtype", "fp32", "-s", "60", "-b", "4", "--lora_r", "8",
                      "--learning_rate", "0.01", "--lora_dropout", "0.05", "--eval_fraction", "0.2", "--eval_steps", "20", "--report_to", "tensorboard", to="trained")


@pytest.fixture(scope="session")
def side_by_side() -> Callable[..., list]:
    """Calls functions at the same time: launches of one rank each leave a second core idle."""

    def call(*functions: Callable) -> list:
        with ThreadPoolExecutor(len(functions)) as pool:
            return [future.result() for future in [pool.submit(function) for function in functions]]

    return call
