"""Which Falcon this is: its sizes, the layers LoRA adapts, its configuration, and where its files are.

    python -c "from falcon_finetune.family import find_model; print(find_model('tiiuae/falcon-40b', random_weights=True).identity)"

`find_model` reads a configuration of a few hundred bytes and nothing more, so that a wrong name is known before anything is downloaded.
Code that comes with a checkpoint is never run: its configuration is read here, not by the library's auto classes.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_finetune.console import say
from falcon_finetune.hub import HubRepo, fetch, fetch_entry, is_hub_id, last_line, listed, names_in, names_on_hub, nearby
from falcon_finetune.options import UserError

if TYPE_CHECKING:
    from transformers import FalconConfig, PreTrainedTokenizerBase

# The four linears of a decoder layer, in the order in which data passes through them.
LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

_COMMON = {"vocab_size": 65024, "bos_token_id": 11, "eos_token_id": 11, "bias": False, "alibi": False}
_NEW_ARCHITECTURE = {"new_decoder_architecture": True, "num_kv_heads": 8}
# FalconConfig arguments, as in config.json of tiiuae/falcon-7b, -11B, -40b and -180B (for 11B see also its report, arXiv:2407.14885).
# The test counts the parameters that each makes against the published totals.
SIZES: dict[str, dict] = {
    "falcon-7b": {
        **_COMMON, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "max_position_embeddings": 2048,
        "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True,
    },
    "falcon-11b": {
        **_COMMON, **_NEW_ARCHITECTURE, "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
        "ffn_hidden_size": 16384, "max_position_embeddings": 8192, "num_ln_in_parallel_attn": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0}, "tie_word_embeddings": False,
    },
    "falcon-40b": {
        **_COMMON, **_NEW_ARCHITECTURE, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
        "max_position_embeddings": 2048, "num_ln_in_parallel_attn": 2,
    },
    "falcon-180b": {
        **_COMMON, **_NEW_ARCHITECTURE, "hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232,
        "max_position_embeddings": 2048, "num_ln_in_parallel_attn": 2,
    },
}  # fmt: skip

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
# What stands beside tokenizer.json; fetched before it, so that a folder with tokenizer.json has all of them.
_TOKENIZER_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# In order of preference: safetensors cannot hold code and is read without a copy.
_WEIGHT_ENTRIES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PADDING_TOKENS = ("<|pad|>", "<pad>", "[PAD]")
# The name of the tokenizer that stands in when there are weights to invent and no tokenizer to read (`tokenizer.name_or_path`).
BYTE_TOKENIZER = "byte-level"

# Model types of 2023, when Falcon came with its own code; the 40B's configuration had grouped K/V heads, the 7B's one K/V head.
_TYPES_OF_2023 = {
    "RefinedWebModel": {"multi_query": True, "parallel_attn": True},
    "RefinedWeb": {"new_decoder_architecture": True},
}
_NAMES_OF_2023 = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads", "n_embed": "hidden_size"}
_NOT_ARCHITECTURE = ("auto_map", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
                     "apply_residual_connection_post_layernorm")  # fmt: skip
_SIZE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class BaseModel:
    """One base model, found but not loaded.

    Attributes:
        name: as typed.
        folder: local folder, or snapshot folder of the hub's cache, with config.json; None for random weights of a known size.
        config: its architecture.
        revision: commit of the hub; None for what is not from the hub.
        random_seed: of the weights, where they are to be invented; None for real weights.
    """

    name: str
    folder: Path | None
    config: "FalconConfig"
    revision: str | None
    random_seed: int | None

    @property
    def identity(self) -> str:
        """What the adapter names as its base: hub id, absolute folder, or `random:SEED:...`, which nothing can load."""
        if self.folder is None:
            where = size_of(self.name) or self.name
        elif self.revision is not None:
            where = self.name
        else:
            where = str(self.folder)
        return where if self.random_seed is None else f"random:{self.random_seed}:{where}"

    @property
    def hub_repo(self) -> HubRepo:
        """Where more of its files come from, for what is from the hub."""
        return _hub_repo(self.name, self.revision)


def size_of(name: str) -> str | None:
    """The key of SIZES that a model's name tells, as in `tiiuae/falcon-40b-instruct`; None when it tells none."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    match = re.search(r"(?<![a-z0-9])falcon2?[-_]?(\d+b)(?![a-z0-9])", last)
    size = f"falcon-{match[1]}" if match else None
    return size if size in SIZES else None


def find_model(name: str, *, random_weights: bool = False, seed: int = 0, revision: str | None = None) -> BaseModel:
    """Finds a model without loading or downloading weights.

    A name is, in this order: a tiny model (made at its first use), a local folder, a size (with `random_weights`; no hub is asked), a hub
    id, of which config.json alone is fetched.

    Args:
        random_weights: take the architecture only; `seed` makes the weights.
        revision: commit, branch or tag, for hub ids.

    Raises:
        UserError: no such model, a hub that cannot be used (within 10 s, and with nothing written), or not a Falcon.
    """
    random_seed = seed if random_weights else None
    local = Path(os.path.abspath(Path(name).expanduser()))
    known_size = size_of(name) if random_weights else None
    commit = None
    if _is_tiny(name):
        from falcon_finetune.tiny_falcon import ensure_tiny_model

        _refuse_revision(revision, f"{name} is made on this machine")
        folder = ensure_tiny_model(name, say=say)
    elif local.is_dir():
        _refuse_revision(revision, f"{name} is a local folder")
        folder = local
    elif known_size is not None and not local.exists():
        _refuse_revision(revision, "random weights come from no hub")
        from transformers import FalconConfig

        return BaseModel(name, None, FalconConfig(**SIZES[known_size]), None, random_seed)
    elif name in SIZES:
        raise UserError(f"{name} is a size, not a checkpoint", "add --random_weights, or name a checkpoint such as -m tiiuae/falcon-7b")
    else:
        _require_hub_id(name, local)
        folder, commit = fetch_entry(_hub_repo(name, revision))
    return BaseModel(name, folder, read_config(folder), commit, random_seed)


def _is_tiny(name: str) -> bool:
    from falcon_finetune.tiny_falcon import TINY_MODELS

    return name in TINY_MODELS


def _hub_repo(name: str, revision: str | None) -> HubRepo:
    return HubRepo(name, "model", revision, CONFIG_FILE)


def _require_hub_id(name: str, local: Path) -> None:
    if local.exists():
        raise UserError(f"model {name!r} is a file, not a folder", f"give the folder of the checkpoint: {local.parent}")
    if not is_hub_id(name):
        raise UserError(f"model {name!r} is no folder here and no hub id (user/model)", f"check the path{nearby(name, only_folders=True)}")


def _refuse_revision(revision: str | None, reason: str) -> None:
    if revision is not None:
        raise UserError(f"--revision {revision} has no meaning here: {reason}", "drop --revision")


# ------------------------------------------------------------------------------------------------------------ the configuration


def read_config(folder: Path) -> "FalconConfig":
    """Reads config.json of a Falcon, today's form or that of 2023, without running or asking to run code that comes with it.

    Raises:
        UserError: no config.json, broken JSON (with line and column), not a Falcon, or one that is quantised already.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}; found: {listed(names_in(folder))}", "give the folder of a whole Falcon checkpoint")
    values = _read_json(path)
    kind = values.get("model_type")
    if kind != "falcon" and kind not in _TYPES_OF_2023:
        raise UserError(f"{path} says model_type {kind!r}, which is not a Falcon", f"supported: falcon, {', '.join(_TYPES_OF_2023)}")
    if values.get("quantization_config") is not None:
        method = (values["quantization_config"] or {}).get("quant_method", "unknown")
        raise UserError(f"{path} describes weights that are quantised already (quant_method {method!r})",
                        "use the 16-bit checkpoint it was made from: -q quantises it during the load")  # fmt: skip
    return _build_config(_todays_names(values, path), path)


def _todays_names(values: dict, path: Path) -> dict:
    """Renames what the configurations of 2023 called otherwise and drops what is not architecture."""
    if values.get("apply_residual_connection_post_layernorm"):
        raise UserError(f"{path} sets apply_residual_connection_post_layernorm, which no Falcon of the library has", "use another checkpoint")
    kept = {key: value for key, value in values.items() if key not in _NOT_ARCHITECTURE and key not in _NAMES_OF_2023}
    renamed = _TYPES_OF_2023.get(values["model_type"], {}) | kept
    for old, new in _NAMES_OF_2023.items():
        if values.get(old) is None:
            continue
        if values.get(new) not in (None, values[old]):
            raise UserError(f"{path} contradicts itself: {old} is {values[old]}, {new} is {values[new]}", "correct one of the two")
        renamed[new] = values[old]
    return renamed


def _build_config(arguments: dict, path: Path) -> "FalconConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import FalconConfig

    missing = [key for key in _SIZE_KEYS if arguments.get(key) is None]
    source = "take config.json from the checkpoint's source again"
    if missing:  # the library would take the 7B's
        raise UserError(f"{path} does not say {', '.join(missing)}", source)
    try:
        config = FalconConfig(**arguments, architectures=["FalconForCausalLM"])
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no valid Falcon configuration: {last_line(error)}", "correct that value") from error
    heads, shared = config.num_attention_heads, config.num_kv_heads
    if min(heads, shared) < 1 or config.hidden_size % heads or (config.new_decoder_architecture and heads % shared):
        raise UserError(f"{path} has sizes that do not fit: hidden {config.hidden_size}, {heads} heads, {shared} K/V heads", source)
    return config


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: invalid JSON ({error.msg})", "correct it or download the file again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}", "download the file again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "check the file and its permissions") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not an object", "download the file again")
    return values


# ------------------------------------------------------------------------------------------------------------------ the weights


def weight_files(base: BaseModel) -> list[Path]:
    """The shards of the weights on this machine, in the order of their index, downloaded first where they are missing.

    Safetensors are preferred to pickled .bin files, and each is as long as its header says.

    Raises:
        UserError: no weights, a missing or truncated shard, a hub that cannot be used.
    """
    if base.folder is None or base.random_seed is not None:
        raise ValueError(f"{base.identity} has no stored weights")
    if base.revision is not None:
        _download_weights(base)
    return _local_weights(base.folder)


def _download_weights(base: BaseModel) -> None:
    """Fetches the preferred form of the weights into the cache, unless one form is there as a whole."""
    with contextlib.suppress(UserError):
        _local_weights(base.folder)
        return
    names = names_on_hub(base.hub_repo)
    entry = next((name for name in _WEIGHT_ENTRIES if name in names), None)
    if entry is None:
        raise _no_weights(f"{base.name} on the hub", names)
    fetch(base.hub_repo, [entry])
    if entry.endswith(".index.json"):
        shards = _shards_in(base.folder / entry)
        absent = [shard for shard in shards if shard not in names]
        if absent:
            raise UserError(f"{base.name} on the hub lacks {listed(absent)}, which its {entry} names", "use another --revision or checkpoint")
        fetch(base.hub_repo, shards)


def _local_weights(folder: Path) -> list[Path]:
    entry = next((name for name in _WEIGHT_ENTRIES if (folder / name).is_file()), None)
    if entry is None:
        raise _no_weights(str(folder), names_in(folder))
    if entry.endswith(".index.json"):
        paths = [folder / shard for shard in _shards_in(folder / entry)]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of {len(paths)} shards named by {entry}: {listed(absent)}", "download them")
    else:
        paths = [folder / entry]
    for path in paths:
        _require_whole(path)
    return paths


def _no_weights(where: str, names: Iterable[str]) -> UserError:
    return UserError(f"{where} has no weights; found: {listed(names)}", f"it needs {', '.join(_WEIGHT_ENTRIES[:-1])} or {_WEIGHT_ENTRIES[-1]}")


def _shards_in(index: Path) -> list[str]:
    """The files named by an index, each once, in order."""
    placement = _read_json(index).get("weight_map")
    if not isinstance(placement, dict) or not placement:
        raise UserError(f"{index} has no weight_map", "download the file again")
    shards = list(dict.fromkeys(placement.values()))
    strange = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if strange:  # a name with a folder in it could point anywhere
        raise UserError(f"{index} names {strange[0]!r}, which is no file name", "use a checkpoint whose shards lie beside their index")
    return shards


def _require_whole(path: Path) -> None:
    """Compares the size of a safetensors file with what its header says; of other forms, only a Git LFS pointer is told."""
    size = path.stat().st_size
    again = f"delete {path} and download it again"
    with open(path, "rb") as handle:
        start = handle.read(8)
        if start == b"version ":
            raise UserError(f"{path} is a Git LFS pointer of {size:,} bytes, not the weights", "run 'git lfs pull' in that folder")
        if path.suffix != ".safetensors":
            if size == 0:
                raise UserError(f"{path} is empty", again)
            return
        # 8 bytes with the header's length, the header in JSON, the tensors: the last tensor's end is the end of the file
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > size - 8:
            raise UserError(f"{path} is {size:,} bytes and ends within its header", again)
        try:
            header = json.loads(handle.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path} has no readable safetensors header", again) from None
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        raise UserError(f"{path} is {size:,} bytes, its header says {expected:,}", again)


# ---------------------------------------------------------------------------------------------------------------- the tokenizer


def load_tokenizer(base: BaseModel) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to a base, with an EOS token.

    A padding token is set only where the vocabulary has one besides EOS, else it is None: training never pads. For random weights without
    a tokenizer of their own it is the embedded byte-level one, named BYTE_TOKENIZER, and no hub is asked; the caller says so and records it.

    Raises:
        UserError: no tokenizer, one that cannot be read, without EOS, or with more tokens than the model has embeddings.
    """
    if base.revision is not None and not (base.folder / TOKENIZER_FILE).is_file():
        names = names_on_hub(base.hub_repo)
        companions = [name for name in _TOKENIZER_COMPANIONS if name in names]
        for group in (companions, [TOKENIZER_FILE]):
            if group and set(group) <= set(names):
                fetch(base.hub_repo, group)
    if base.folder is not None and (base.folder / TOKENIZER_FILE).is_file():
        tokenizer = _read_tokenizer(base.folder)
    elif base.random_seed is not None and base.revision is None:
        from falcon_finetune.tiny_falcon import byte_tokenizer

        tokenizer = byte_tokenizer()
        tokenizer.name_or_path = BYTE_TOKENIZER
    else:
        raise UserError(f"{base.name} has no {TOKENIZER_FILE}; found: {listed(names_in(base.folder))}",
                        "copy the tokenizer files of the Falcon it was made from into the folder")  # fmt: skip
    _set_special_tokens(tokenizer, base)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= base.config.vocab_size:
        raise UserError(f"the tokenizer of {base.name} has token {largest}, the model has embeddings for {base.config.vocab_size} tokens",
                        "use the tokenizer files that came with these weights")  # fmt: skip
    return tokenizer


def _read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer: it would look at auto_map, here and in config.json.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exception for a broken tokenizer.json
        raise UserError(f"cannot read the tokenizer in {folder}: {last_line(error)}", "download its tokenizer files again") from error


def _set_special_tokens(tokenizer: "PreTrainedTokenizerBase", base: BaseModel) -> None:
    if tokenizer.eos_token_id is None:
        eos = base.config.eos_token_id[0] if isinstance(base.config.eos_token_id, list) else base.config.eos_token_id
        token = tokenizer.convert_ids_to_tokens(eos) if eos is not None and eos < len(tokenizer) else None
        if token is None:
            raise UserError(f"the tokenizer of {base.name} has no end-of-sequence token", 'set "eos_token" in its tokenizer_config.json')
        tokenizer.eos_token = token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in _PADDING_TOKENS if token in vocabulary and token != tokenizer.eos_token), None)
