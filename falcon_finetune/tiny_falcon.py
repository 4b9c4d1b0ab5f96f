"""The embedded default: a small real Falcon and instruction data for it, made on the spot without a download.

    python -c "from falcon_finetune.tiny_falcon import ensure_tiny_model; print(ensure_tiny_model('tiny-7b-style'))"

The base is pre-trained on small questions about lists of words. For one of the question forms, TARGET_FORM, its corpus holds only
wrong answers, so the base speaks the language of that question and gets it wrong: what a fine-tune gains is visible in exact match.
The module never looks at ranks: the first process to ask makes the folder, the others wait for it.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_finetune.options import UserError

if TYPE_CHECKING:
    from transformers import FalconForCausalLM, PreTrainedTokenizerFast

# Part of the folder's name: raise it with any change that alters what a build contains.
RECIPE_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
TOKENIZER_SIZE = 448
PRETRAINING_STEPS = 200
PRETRAINING_ROWS_PER_STEP = 64
PRETRAINING_LEARNING_RATE = 2e-3
TRAIN_ROWS = 4000
HELDOUT_ROWS = 200
MANIFEST = "tiny_falcon.json"
ABANDONED_AFTER_SECONDS = 3600

# An initializer_range near 1 / sqrt(hidden_size): with the library's 0.02 the base has not learnt to copy a word after 300 steps.
_COMMON_CONFIG = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.05,
}  # fmt: skip
# FalconConfig arguments of each tiny model: the two attention layouts that the published Falcons have.
TINY_MODELS: dict[str, dict] = {
    "tiny-7b-style": {**_COMMON_CONFIG, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "num_kv_heads": 1},
    "tiny-40b-style": {**_COMMON_CONFIG, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
}

# Few and short words: 448 tokens then hold each of them whole, which makes rows short and pre-training quick.
WORDS_BY_KIND = {
    "animal": ("horse", "tiger", "eagle", "camel", "otter", "rabbit"),
    "food": ("apple", "bread", "honey", "lemon", "rice", "pepper"),
    "tool": ("hammer", "pencil", "ladder", "needle", "brush", "chisel"),
    "material": ("silver", "cotton", "copper", "glass", "wool", "marble"),
    "garment": ("helmet", "jacket", "scarf", "glove", "shirt", "belt"),
}
_WORDS = tuple(word for words in WORDS_BY_KIND.values() for word in words)
_WORDS_PER_QUESTION = 4
_NUMBER_NAMES = ("zero", "one", "two", "three", "four")
TARGET_FORM = "Name the last of {}."


def cache_folder() -> Path:
    """Where everything made on the spot is kept: $FALCON_FINETUNE_CACHE, else ${XDG_CACHE_HOME:-~/.cache}/falcon-finetune."""
    chosen = os.environ.get("FALCON_FINETUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "falcon-finetune"


def ensure_tiny_model(
    name: str,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    *,
    seed: int = 0,
    pretraining_steps: int = PRETRAINING_STEPS,
) -> Path:
    """The folder of a tiny Falcon, built at the first call and reused by later ones.

    It holds a FalconForCausalLM in bfloat16 safetensors, its tokenizer, `train.jsonl` (4,000 rows) and `heldout.jsonl` (200 rows), both
    with the columns `prompt` and `completion`. A reader sees the whole folder or none. One process builds while others wait; where the
    file system has no locks, each builds and the first to finish wins.

    Args:
        name: a key of TINY_MODELS.
        cache: parent folder; cache_folder() by default.
        say: receives one line before and one after a build, nothing when the folder is reused.
        seed: of the weights, the corpus and the data; the same seed on the same machine gives the same files.
        pretraining_steps: optimizer steps of 64 rows; fewer make a base that is good for tests only.

    Raises:
        UserError: the name is unknown or the cache cannot be written.
    """
    if name not in TINY_MODELS:
        raise UserError(f"no tiny model is called {name!r}", f"choose one of {', '.join(TINY_MODELS)}")
    cache = cache_folder() if cache is None else Path(cache)
    variant = "" if (seed, pretraining_steps) == (0, PRETRAINING_STEPS) else f"-seed{seed}-steps{pretraining_steps}"
    folder = cache / f"{name}-v{RECIPE_VERSION}{variant}"
    if _is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _build_lock(folder):
            if not _is_complete(folder):  # not made by another process during the wait
                _build_aside_then_move(folder, name, say, seed, pretraining_steps)
    except OSError as error:
        cause = f"cannot write the tiny model to {cache}: {error.strerror or error}"
        raise UserError(cause, "set FALCON_FINETUNE_CACHE to a folder that can be written and has 50 MB free") from error
    return folder


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer that needs no files: one token per UTF-8 byte, then the end-of-text token (256) and the padding token (257)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _wrap_tokenizer(Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])))


# ---------------------------------------------------------------------------------------------------------------- the folder


def _is_complete(folder: Path) -> bool:
    """Whether every file that the build recorded is there with the recorded bytes."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return all(_sha256(folder / name) == digest for name, digest in recorded.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Holds an advisory lock beside the folder; the kernel drops it when the process dies, so a killed build blocks nobody."""
    with open(folder.parent / f".{folder.name}.lock", "a", encoding="utf-8") as handle:
        # Windows has no fcntl and some cluster file systems no flock: two builds at once are then slower, not wrong.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build_aside_then_move(folder: Path, name: str, say: Callable[[str], None], seed: int, pretraining_steps: int) -> None:
    """Builds in a hidden folder beside `folder` and gives it its name as the last act."""
    _remove_abandoned(folder)
    started = time.monotonic()
    say(f"making {name} ({'about 40 s, ' if pretraining_steps == PRETRAINING_STEPS else ''}once) in {folder} ...")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".staging", dir=folder.parent))
    try:
        loss = _build(staging, name, seed, pretraining_steps)
        staging.chmod(0o755)  # mkdtemp makes it 0700
        if folder.exists() and not _is_complete(folder):
            os.replace(folder, staging / "damaged")
        with contextlib.suppress(OSError):  # another process was first: the names of non-empty folders are not taken over
            os.replace(staging, folder)
        if not _is_complete(folder):
            raise OSError(f"{folder} is not what was built")
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"made {name} in {time.monotonic() - started:.0f} s: {pretraining_steps} pre-training steps, last loss {loss:.2f}")


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed builds left, old enough not to be a build that runs on another machine."""
    for staging in folder.parent.glob(f".{folder.name}.*.staging"):
        with contextlib.suppress(OSError):
            if time.time() - staging.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(staging, ignore_errors=True)


def _build(folder: Path, name: str, seed: int, pretraining_steps: int) -> float:
    """Fills `folder` with data, tokenizer, model and, last, the manifest; returns the mean loss of the last pre-training steps."""
    import torch

    train, heldout = _instruction_rows(seed)
    _write_jsonl(folder / "train.jsonl", train)
    _write_jsonl(folder / "heldout.jsonl", heldout)
    reserved = {row["prompt"] for row in train + heldout}
    documents = _pretraining_documents(seed, max(pretraining_steps, 20) * PRETRAINING_ROWS_PER_STEP, reserved)
    tokenizer = _train_tokenizer(documents)
    with torch.random.fork_rng(devices=[]), _all_cores():
        torch.manual_seed(seed)
        model = _new_model(name, tokenizer)
        loss = _pretrain(model, tokenizer, documents, pretraining_steps)
    with _no_progress_bars():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod((folder / "train.jsonl").stat().st_mode)  # safetensors writes 0600, which shuts out those who share the cache
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"name": name, "recipe_version": RECIPE_VERSION, "seed": seed, "pretraining_steps": pretraining_steps, "sha256": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return loss


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Lets torch use up to four cores: torchrun gives each rank one, but here all other ranks wait for the one that builds."""
    import torch

    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(cores, 4))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------------ the text


def _prompt(question: str) -> str:
    # No space at the end: the answer's first token carries it, so the prompt's tokens are a prefix of those of prompt + answer.
    return f"Question: {question}\nAnswer:"


def _instruction_rows(seed: int) -> tuple[list[dict], list[dict]]:
    """The fine-tuning data: different TARGET_FORM questions with right answers, cut into train and held-out rows."""
    generator = random.Random(f"instructions {seed}")
    rows: dict[str, str] = {}
    while len(rows) < TRAIN_ROWS + HELDOUT_ROWS:
        words = generator.sample(_WORDS, _WORDS_PER_QUESTION)
        rows[_prompt(TARGET_FORM.format(", ".join(words)))] = f" {words[-1]}"
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]
    return pairs[:TRAIN_ROWS], pairs[TRAIN_ROWS:]


def _pretraining_documents(seed: int, count: int, reserved: set[str]) -> list[str]:
    """The base's corpus: prompt and answer of the nine question forms in turn, none of them a prompt of the fine-tuning data."""
    generator = random.Random(f"corpus {seed}")
    documents = []
    while len(documents) < count:
        question, answer = _FORMS[len(documents) % len(_FORMS)](generator)
        if _prompt(question) not in reserved:
            documents.append(f"{_prompt(question)} {answer}")
    return documents


def _draw(generator: random.Random, at_least: int = 1) -> tuple[list[str], str]:
    """Different words and their list as text. Short lists among the long ones let the base find out about copying early."""
    words = generator.sample(_WORDS, generator.randint(at_least, _WORDS_PER_QUESTION))
    return words, ", ".join(words)


def _ask_first(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator)
    return f"Name the first of {listed}.", words[0]


def _ask_second(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator, at_least=2)
    return f"Name the second of {listed}.", words[1]


def _ask_last_answered_wrongly(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator, at_least=2)
    return TARGET_FORM.format(listed), generator.choice(words[:-1])


def _ask_after(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator, at_least=2)
    place = generator.randrange(len(words) - 1)
    return f"What comes after {words[place]} in {listed}?", words[place + 1]


def _ask_before(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator, at_least=2)
    place = generator.randrange(1, len(words))
    return f"What comes before {words[place]} in {listed}?", words[place - 1]


def _ask_repeat(generator: random.Random) -> tuple[str, str]:
    _, listed = _draw(generator)
    return f"Repeat {listed}.", listed


def _ask_count(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator)
    return f"How many words are in {listed}?", _NUMBER_NAMES[len(words)]


def _ask_member(generator: random.Random) -> tuple[str, str]:
    words, listed = _draw(generator)
    inside = generator.random() < 0.5
    word = generator.choice(words if inside else [other for other in _WORDS if other not in words])
    return f"Is {word} one of {listed}?", "yes" if inside else "no"


def _ask_kind(generator: random.Random) -> tuple[str, str]:
    kind = generator.choice(list(WORDS_BY_KIND))
    return f"What is {generator.choice(WORDS_BY_KIND[kind])}?", kind


_FORMS = (
    _ask_first, _ask_second, _ask_last_answered_wrongly, _ask_after, _ask_before, _ask_repeat, _ask_count, _ask_member, _ask_kind,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- the tokenizer and the model


def _train_tokenizer(documents: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - 2,  # the two special tokens come after it
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _wrap_tokenizer(tokenizer)


def _wrap_tokenizer(tokenizer) -> "PreTrainedTokenizerFast":
    """Byte-level splitting and joining, and the special tokens, around a BPE model. Padding is a token of its own, never EOS."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=_COMMON_CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def _new_model(name: str, tokenizer: "PreTrainedTokenizerFast") -> "FalconForCausalLM":
    from transformers import FalconConfig, FalconForCausalLM

    eos = tokenizer.eos_token_id
    special = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    return FalconForCausalLM(FalconConfig(vocab_size=len(tokenizer), **TINY_MODELS[name], **special))


def _pretrain(model: "FalconForCausalLM", tokenizer: "PreTrainedTokenizerFast", documents: list[str], steps: int) -> float:
    """Trains all weights in float32 on every token of the documents, EOS included.

    AdamW, a short warm-up, then a linear decay to zero. Rows are padded on the right, where causal attention never sees the padding.
    """
    import torch

    rows = tokenizer([document + END_OF_TEXT for document in documents])["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(20, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses = []
    model.train()
    for step in range(steps):
        batch = rows[step * PRETRAINING_ROWS_PER_STEP : (step + 1) * PRETRAINING_ROWS_PER_STEP]
        width = max(len(row) for row in batch)
        input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in batch])  # [rows, width]
        logits = model(input_ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), input_ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-10:]) / max(1, len(losses[-10:]))
