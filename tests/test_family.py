"""Which Falcon a name means: sizes, both forms of the configuration, weights, tokenizer, and each way in which a hub fails."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.stub_hub import NO_PROXY_ENVIRONMENT, StubHub, StubRepo
from tests.user_errors import error_of
from transformers import FalconConfig, FalconForCausalLM

from falcon_finetune.family import BYTE_TOKENIZER, LORA_TARGETS, SIZES, BaseModel, find_model, load_tokenizer, read_config, size_of, weight_files
from falcon_finetune.tiny_falcon import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 11, "eos_token_id": 11}
ARCHITECTURES = {
    "RefinedWebModel": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "RefinedWeb": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
ARCHITECTURE_FIELDS = (
    *TINY, "new_decoder_architecture", "parallel_attn", "bias", "alibi", "ffn_hidden_size", "layer_norm_epsilon", "tie_word_embeddings",
)  # fmt: skip
ANSWER_SECONDS = 10  # within which every failure of a hub must be told


# -------------------------------------------------------------------------------------------------------------- checkpoints to read


def _config_of_2023(kind: str, **changes) -> dict:
    """The keys that the configurations of 2023 had, for a tiny model."""
    values = {
        "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["RWForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
        "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 32, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": kind, "n_head": 4, "n_layer": 2, "torch_dtype": "bfloat16",
        "transformers_version": "4.27.4", "use_cache": True, "vocab_size": 300,
    }  # fmt: skip
    values |= {"n_head_kv": 2} if kind == "RefinedWeb" else {"multi_query": True, "parallel_attn": True}
    return values | changes


def _write_config(folder: Path, values: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def _write_checkpoint_of_2023(folder: Path, kind: str) -> None:
    """Old configuration, code that must never run, two .bin shards with an index, and a tokenizer that asks for code."""
    torch.manual_seed(0)
    state = FalconForCausalLM(FalconConfig(**TINY, **ARCHITECTURES[kind])).to(torch.bfloat16).state_dict()
    _write_config(folder, _config_of_2023(kind))
    for name in ("configuration_RW.py", "modelling_RW.py", "tokenization_RW.py"):
        (folder / name).write_text("from pathlib import Path\nPath(__file__).with_name('code-was-run').touch()\n")
    names = list(state)
    placement = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, folder / shard)
        placement |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placement}))
    byte_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "RWTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_RW.RWTokenizer", "tokenization_RW.RWTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Folders RefinedWebModel and RefinedWeb in the form of 2023, and `current` with safetensors."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in ARCHITECTURES:
        _write_checkpoint_of_2023(root / kind, kind)
    FalconForCausalLM(FalconConfig(**TINY)).save_pretrained(root / "current", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(root / "current")
    return root


def _local(folder: Path, seed: int | None = None) -> BaseModel:
    return find_model(str(folder), random_weights=seed is not None, seed=seed or 0)


# ------------------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("falcon-7b", "falcon-7b"),
        ("tiiuae/falcon-40b", "falcon-40b"),
        ("ybelkada/falcon-7b-sharded-bf16", "falcon-7b"),
        ("tiiuae/falcon-7b-instruct", "falcon-7b"),
        ("tiiuae/falcon-11B", "falcon-11b"),
        ("tiiuae/falcon-180B-chat", "falcon-180b"),
        ("models/falcon-40b/", "falcon-40b"),
        ("tiiuae/Falcon3-7B-Base", None),  # a Llama
        ("tiiuae/falcon-mamba-7b", None),
        ("tiiuae/falcon-rw-7b", None),  # ALiBi
        ("falcon-40b/run-7", None),
        ("falcon-70b", None),
        ("notfalcon-7b", None),
    ],
)
def test_a_size_is_known_by_name(name, size):
    assert size_of(name) == size


# As stored on the hub, where the head is a tensor of its own; the 11B's total is published with three digits.
@pytest.mark.parametrize(
    ("size", "stored", "tolerance"),
    [("falcon-7b", 7_217_189_760, 0), ("falcon-11b", 11.1e9, 0.05e9), ("falcon-40b", 41_835_970_560, 0), ("falcon-180b", 179_522_565_120, 0)],
)
def test_sizes_make_the_published_number_of_parameters(size, stored, tolerance):
    base = find_model(size, random_weights=True, seed=3)
    with torch.device("meta"):
        model = FalconForCausalLM(base.config)
    tied_head = base.config.vocab_size * base.config.hidden_size if base.config.tie_word_embeddings else 0
    assert abs(sum(parameter.numel() for parameter in model.parameters()) + tied_head - stored) <= tolerance
    linears = {name.split(".")[-1] for name, module in model.transformer.h.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears == set(LORA_TARGETS)


def test_falcon_11b_keeps_its_rope_base():
    assert FalconConfig(**SIZES["falcon-11b"]).rope_parameters["rope_theta"] == 500042.0


def test_random_weights_need_no_hub_and_name_their_seed():
    base = find_model("tiiuae/falcon-40b-instruct", random_weights=True, seed=7)
    assert (base.identity, base.folder, base.revision, base.random_seed) == ("random:7:falcon-40b", None, None, 7)
    tokenizer = load_tokenizer(base)
    assert tokenizer.name_or_path == BYTE_TOKENIZER
    assert tokenizer.eos_token_id is not None
    with pytest.raises(ValueError, match="no stored weights"):
        weight_files(base)


def test_random_weights_take_the_architecture_of_a_local_folder(checkpoints, tmp_path):
    base = _local(checkpoints / "RefinedWeb", seed=1)
    assert base.identity == f"random:1:{checkpoints / 'RefinedWeb'}"
    assert base.config.num_kv_heads == 2
    assert load_tokenizer(base).name_or_path != BYTE_TOKENIZER
    bare = _local(_write_config(tmp_path / "falcon-7b", _config_of_2023("RefinedWeb")), seed=1)
    assert bare.identity.endswith(str(tmp_path / "falcon-7b"))  # the folder, though its name tells a size
    assert load_tokenizer(bare).name_or_path == BYTE_TOKENIZER


def test_a_local_folder_is_named_by_its_absolute_path(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    assert find_model("./current/").identity == str(checkpoints / "current")


def test_tiny_models_are_named_by_their_name(tmp_path, monkeypatch):
    import falcon_finetune.tiny_falcon as tiny_falcon

    folder = tiny_falcon.ensure_tiny_model("tiny-40b-style", tmp_path, lambda _: None, pretraining_steps=1)
    folder.rename(tmp_path / folder.name.split("-seed")[0])  # a base that one step made, where the whole one is looked for
    monkeypatch.setenv("FALCON_FINETUNE_CACHE", str(tmp_path))
    base = find_model("tiny-40b-style")
    assert (base.identity, base.revision) == (str(base.folder), None)
    assert base.config.new_decoder_architecture
    tokenizer = load_tokenizer(base)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert [path.name for path in weight_files(base)] == ["model.safetensors"]
    assert find_model("tiny-40b-style", random_weights=True, seed=2).identity == f"random:2:{base.folder}"


def test_a_wrong_path_names_folders_near_it(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    assert "./current" in error_of(find_model, "./curent").cure
    assert str(checkpoints / "RefinedWeb") in error_of(find_model, str(checkpoints / "RefinedWebb")).cure
    for name in ("./curent", "a/b/c", "~/no-such-falcon", "has space", "/no/such/folder"):
        assert "no folder here and no hub id" in error_of(find_model, name).cause
    (checkpoints / "current" / "notes").write_text("")
    assert "is a file" in error_of(find_model, "./current/notes").cause
    (checkpoints / "current" / "notes").unlink()


def test_a_size_is_no_checkpoint():
    assert "--random_weights" in error_of(find_model, "falcon-40b").cure


def test_a_revision_is_for_hub_ids(checkpoints):
    assert "--revision" in error_of(find_model, str(checkpoints / "current"), revision="main").cause
    assert "--revision" in error_of(find_model, "falcon-7b", random_weights=True, revision="main").cause


# ------------------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_form_of_2023_is_the_librarys_falcon(checkpoints, kind):
    config = read_config(checkpoints / kind)
    expected = FalconConfig(**TINY, **ARCHITECTURES[kind])
    assert {name: getattr(config, name) for name in ARCHITECTURE_FIELDS} == {name: getattr(expected, name) for name in ARCHITECTURE_FIELDS}
    assert config.architectures == ["FalconForCausalLM"]
    assert not hasattr(config, "auto_map")
    state = {}
    for shard in weight_files(_local(checkpoints / kind)):
        state |= torch.load(shard, weights_only=True)
    model = FalconForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(state)
    ids = torch.arange(6)[None]
    torch.manual_seed(0)
    twin = FalconForCausalLM(expected).to(torch.bfloat16)
    assert torch.equal(model.eval()(ids).logits, twin.eval()(ids).logits)
    assert not (checkpoints / kind / "code-was-run").exists()


def test_fields_of_2023_are_kept(tmp_path):
    rarer = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
    config = read_config(_write_config(tmp_path, _config_of_2023("RefinedWebModel", **rarer)))
    assert (config.alibi, config.bias, config.multi_query, config.parallel_attn) == (True, True, False, False)
    old = _config_of_2023("RefinedWeb")
    old["n_embed"] = old.pop("hidden_size")
    assert read_config(_write_config(tmp_path, old)).hidden_size == 32


def test_todays_form_is_read_back(checkpoints):
    config = read_config(checkpoints / "current")
    expected = FalconConfig(**TINY)
    assert {name: getattr(config, name) for name in ARCHITECTURE_FIELDS} == {name: getattr(expected, name) for name in ARCHITECTURE_FIELDS}


def test_every_size_survives_its_config_file(tmp_path):
    for size, arguments in SIZES.items():
        config = FalconConfig(**arguments)
        config.save_pretrained(tmp_path / size)
        again = read_config(tmp_path / size)
        assert {name: getattr(again, name) for name in arguments} == {name: getattr(config, name) for name in arguments}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "falcon_h1"}, "'falcon_h1'"),
        ({"model_type": None}, "None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"n_layer": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "contradicts"),
        ({"n_layer": "two"}, "num_hidden_layers"),
        ({"n_head": 5}, "do not fit"),
        ({"n_head_kv": 3}, "do not fit"),
        ({"n_head_kv": 0}, "do not fit"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_what_is_no_trainable_falcon_is_said(tmp_path, changes, said):
    error = error_of(read_config, _write_config(tmp_path, _config_of_2023("RefinedWeb", **changes)))
    assert said in error.cause
    assert str(tmp_path / "config.json") in error.cause


def test_a_broken_config_is_said_with_its_place(tmp_path):
    assert "found: nothing" in error_of(read_config, tmp_path).cause
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "found: tokenizer.json" in error_of(read_config, tmp_path).cause
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "falcon",\n  "vocab_size": 1,,\n}')
    assert error_of(read_config, tmp_path).cause.startswith(f"{path}:3:")
    path.write_text("[1]")
    assert "JSON list" in error_of(read_config, tmp_path).cause
    path.write_bytes(b'{"model_type": "\xe9"}')
    assert "byte 16" in error_of(read_config, tmp_path).cause


# ------------------------------------------------------------------------------------------------------------------------ weights


def test_shards_are_listed_in_the_order_of_their_index(checkpoints):
    old = weight_files(_local(checkpoints / "RefinedWeb"))
    assert [path.name for path in old] == ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    new = weight_files(_local(checkpoints / "current"))
    assert len(new) > 1 and all(path.suffix == ".safetensors" and path.is_file() for path in new)


def test_safetensors_are_preferred(tmp_path):
    _write_config(tmp_path, _config_of_2023("RefinedWeb"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert [path.name for path in weight_files(_local(tmp_path))] == ["pytorch_model.bin"]
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert [path.name for path in weight_files(_local(tmp_path))] == ["model.safetensors"]


def test_missing_weights_are_said(tmp_path):
    base = _local(_write_config(tmp_path, _config_of_2023("RefinedWeb")))
    assert "found: config.json" in error_of(weight_files, base).cause
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    error = error_of(weight_files, base)
    assert "1 of 2 shards" in error.cause and "model-00002-of-00002.safetensors" in error.cause
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "no file name" in error_of(weight_files, base).cause
    index.write_text("{}")
    assert "weight_map" in error_of(weight_files, base).cause


def test_a_truncated_shard_is_said_with_its_bytes(tmp_path):
    base = _local(_write_config(tmp_path, _config_of_2023("RefinedWeb")))
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.ones(1000)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    assert weight_files(base) == [path]
    for kept in (len(whole) - 1, len(whole) - 4000):
        path.write_bytes(whole[:kept])
        cause = error_of(weight_files, base).cause
        assert f"{kept:,} bytes" in cause and f"{len(whole):,}" in cause
    for kept in (0, 4, 8, 20):
        path.write_bytes(whole[:kept])
        assert "within its header" in error_of(weight_files, base).cause
    path.write_bytes(whole + b"x")
    assert f"{len(whole) + 1:,} bytes" in error_of(weight_files, base).cause
    path.write_bytes((5).to_bytes(8, "little") + b"nojsn")
    assert "no readable safetensors header" in error_of(weight_files, base).cause
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9000\n")
    assert "Git LFS pointer" in error_of(weight_files, base).cause


# ---------------------------------------------------------------------------------------------------------------------- tokenizer


def test_a_tokenizer_has_eos_and_padding_only_where_the_vocabulary_has_it(checkpoints, tmp_path):
    folder = _write_config(tmp_path, _config_of_2023("RefinedWeb"))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(_local(folder))
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.pad_token == "<|pad|>"  # it is in the vocabulary, and is not EOS
    assert loaded("a<|endoftext|>")["input_ids"][-1] == loaded.eos_token_id
    # auto_map is not looked at
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_RW.RWTokenizer", None]}
    settings["pad_token"] = settings["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(_local(folder))
    assert loaded.eos_token == loaded.convert_ids_to_tokens(11)  # EOS of config.json


def test_a_tokenizer_without_padding_is_left_without(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(_write_config(tmp_path, _config_of_2023("RefinedWeb")))
    assert load_tokenizer(_local(tmp_path)).pad_token is None


def test_a_tokenizer_that_does_not_fit_is_said(checkpoints, tmp_path):
    base = _local(_write_config(tmp_path, _config_of_2023("RefinedWeb", vocab_size=200)))
    assert "found: config.json" in error_of(load_tokenizer, base).cause
    byte_tokenizer().save_pretrained(tmp_path)
    assert "200 tokens" in error_of(load_tokenizer, base).cause
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot read the tokenizer" in error_of(load_tokenizer, base).cause


# ---------------------------------------------------------------------------------------------------------------------------- hub

_CHILD = """
import json, sys, time
from falcon_finetune.family import find_model, load_tokenizer, weight_files
from falcon_finetune.options import UserError
answers = []
for keywords in json.loads(sys.argv[1]):
    started = time.monotonic()
    load = keywords.pop("load", False)
    try:
        base = find_model(**keywords)
        answer = {"identity": base.identity, "revision": base.revision, "layers": base.config.num_hidden_layers}
        if load:
            answer["weights"] = [path.name for path in weight_files(base)]
            answer["eos"] = load_tokenizer(base).eos_token_id
            answer["files"] = sorted(path.name for path in base.folder.iterdir())
    except UserError as error:
        answer = {"cause": error.cause, "cure": error.cure}
    answers.append(answer | {"seconds": time.monotonic() - started})
print(json.dumps(answers))
"""


def _ask(cases: list[dict], endpoint: str, home: Path, **environment: str) -> tuple[list[dict], str]:
    """Answers of a process of its own, which has no stdin at all: whoever prompts fails. Second: its stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and not name.lower().endswith("_proxy")}
    variables = inherited | NO_PROXY_ENVIRONMENT | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(cases)], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: os.close(0),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    for answer in answers:
        assert answer["seconds"] < ANSWER_SECONDS, answer
    return answers, result.stderr


def _files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def hub(checkpoints):
    models = {
        "user/falcon-2023": StubRepo.of_folder(checkpoints / "RefinedWebModel"),
        "user/falcon-2023-grouped": StubRepo.of_folder(checkpoints / "RefinedWeb"),
        "user/falcon-current": StubRepo.of_folder(checkpoints / "current"),
        "user/gated": StubRepo.of_folder(checkpoints / "current", gated=True),
        "user/llama": StubRepo({"config.json": b'{"model_type": "llama"}'}),
        "user/no-config": StubRepo({"README.md": b"hello"}),
        "user/no-weights": StubRepo({"config.json": (checkpoints / "current" / "config.json").read_bytes()}),
        "user/refused": StubRepo(plain_status=403),
        "user/plain-404": StubRepo(plain_status=404),
        "user/broken": StubRepo(plain_status=503),
        "user/slow": StubRepo(delay_seconds=30),
    }
    # Both forms of weights, as many hub models have: the safe one is fetched, the other is left.
    models["user/falcon-current"].files["pytorch_model.bin"] = b"not fetched"
    with StubHub(models) as server:
        yield server


@pytest.fixture(scope="module")
def filled(hub, tmp_path_factory) -> tuple[Path, list[dict], str]:
    """A cache that holds three models after one process fetched them, its answers and its stderr."""
    home = tmp_path_factory.mktemp("hub")
    cases = [{"name": name, "load": True} for name in ("user/falcon-2023", "user/falcon-2023-grouped", "user/falcon-current")]
    answers, stderr = _ask(cases, hub.endpoint, home)
    return home, answers, stderr


def test_models_come_from_the_hub_without_their_code(hub, filled):
    _, answers, stderr = filled
    commit = hub.models["user/falcon-2023"].commit
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for answer, name in zip(answers[:2], ("user/falcon-2023", "user/falcon-2023-grouped"), strict=True):
        assert (answer["identity"], answer["revision"], answer["layers"], answer["weights"], answer["eos"]) == (name, commit, 2, shards, 256), answer
        assert not [file for file in answer["files"] if file.endswith(".py")]
    assert all(name.endswith(".safetensors") for name in answers[2]["weights"])
    assert "pytorch_model.bin" not in answers[2]["files"]
    assert "trust_remote_code" not in stderr and "RWTokenizer" not in stderr


def test_only_the_config_is_fetched_to_find_a_model(hub, tmp_path):
    before = len(hub.requests)
    answers, stderr = _ask([{"name": "user/falcon-current"}, {"name": "user/falcon-current", "revision": "main"}], hub.endpoint, tmp_path)
    asked = [request for request in hub.requests[before:] if "user/falcon-current" in request]
    assert {request.split("/resolve/")[-1] for request in asked} == {"main/config.json"}
    assert [answer["layers"] for answer in answers] == [2, 2]
    assert stderr == ""


def test_each_refusal_of_the_hub_has_its_own_message_and_writes_nothing(hub, tmp_path):
    names = ("user/gated", "user/falcon-curent", "user/refused", "user/plain-404", "user/broken", "user/no-config")
    cases = [{"name": name} for name in names] + [{"name": "user/falcon-current", "revision": "v9"}]
    answers, stderr = _ask(cases, hub.endpoint, tmp_path)
    gated, mistyped, refused, plain, broken, no_config, no_revision = answers
    assert "gated" in gated["cause"] and "token found: none" in gated["cause"]
    assert f"{hub.endpoint}/user/gated" in gated["cure"] and "hf auth login" in gated["cure"]
    assert "no model 'user/falcon-curent'" in mistyped["cause"] and "spelling" in mistyped["cure"]
    assert "HTTP 403" in refused["cause"]
    assert "no model 'user/plain-404'" in plain["cause"]
    assert "cannot be reached" in broken["cause"] and "HTTP 503" in broken["cause"]
    assert "no config.json" in no_config["cause"]
    assert "no revision 'v9'" in no_revision["cause"]
    assert _files_under(tmp_path) == []
    assert stderr == ""


def test_a_token_is_used_and_told(hub, tmp_path):
    (answer,), _ = _ask([{"name": "user/gated"}], hub.endpoint, tmp_path, HF_TOKEN="hf_of_somebody_else")
    assert "token found: HF_TOKEN" in answer["cause"]
    assert "hf_of_somebody_else" not in answer["cause"] + answer["cure"]
    (answer,), _ = _ask([{"name": "user/gated", "load": True}], hub.endpoint, tmp_path, HF_TOKEN="allowed")
    assert answer["identity"] == "user/gated"


def test_a_cache_that_cannot_be_used_is_said(hub, tmp_path):
    (tmp_path / "file").write_text("")
    (answer,), _ = _ask([{"name": "user/falcon-current"}], hub.endpoint, tmp_path, HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    assert "cannot use the hub's cache" in answer["cause"] and "HF_HOME" in answer["cure"]


def test_what_a_hub_model_lacks_is_said(hub, tmp_path):
    answers, _ = _ask([{"name": "user/llama"}, {"name": "user/no-weights", "load": True}], hub.endpoint, tmp_path)
    assert "'llama'" in answers[0]["cause"]
    assert "no weights" in answers[1]["cause"] and "config.json" in answers[1]["cause"]


def test_offline_the_cache_is_enough_and_its_absence_is_said(hub, filled, tmp_path):
    home = filled[0]
    before = len(hub.requests)
    cases = [{"name": "user/falcon-2023", "load": True}, {"name": "user/falcon-40b"}]
    answers, _ = _ask(cases, hub.endpoint, home, HF_HUB_OFFLINE="1")
    assert answers[0]["eos"] == 256 and len(answers[0]["weights"]) == 2
    assert "HF_HUB_OFFLINE=1" in answers[1]["cause"] and "hf download user/falcon-40b" in answers[1]["cure"]
    assert hub.requests[before:] == []


def test_an_unreachable_hub_is_said_unless_the_cache_has_the_model(filled, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"  # nobody listens there any more
    answers, stderr = _ask([{"name": "user/falcon-2023", "load": True}, {"name": "user/other"}], endpoint, filled[0])
    assert len(answers[0]["weights"]) == 2
    assert "using the cached revision" in stderr  # what is not asked is said
    assert f"the hub at {endpoint} cannot be reached" in answers[1]["cause"]
    assert "HF_ENDPOINT" in answers[1]["cure"]


def test_a_hub_that_never_answers_is_said_in_time(hub, tmp_path):
    started = time.monotonic()
    (answer,), _ = _ask([{"name": "user/slow"}], hub.endpoint, tmp_path)
    assert "cannot be reached" in answer["cause"]
    assert _files_under(tmp_path) == []
    assert time.monotonic() - started < 2 * ANSWER_SECONDS
