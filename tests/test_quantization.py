"""The load that is checked: what is stored, how exactly, what is refused, and how little host memory it takes."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm
from transformers import FalconForCausalLM

from falcon_finetune.family import BaseModel
from falcon_finetune.options import UserError
from falcon_finetune.packed_falcon import ForwardPlan, PackedFalcon, pack_rows
from falcon_finetune.quantization import decoder_linears, dequantize, frozen_tensors, load_base, pick_compute_dtype, take_census
from tests.falcons import ARCHITECTURES, CPU, MODES, adapt, adapter_gradients, load_random, random_rows, stored_weight, tiny_config

ROOT = Path(__file__).resolve().parent.parent
ENTRY = {"safetensors": "model", "bin": "pytorch_model"}


def state_of(config) -> dict[str, torch.Tensor]:
    """The tensors of a bf16 checkpoint, biases and norms random, the tied head left out as the library leaves it."""
    torch.manual_seed(0)
    model = FalconForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1, 0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_shards(folder: Path, state: dict[str, torch.Tensor], form: str, shards: int) -> None:
    """A checkpoint of one file, or of several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, placement = list(state), {}
    for number in range(shards):
        part = {name: state[name] for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]}
        file = f"{ENTRY[form]}.{form}" if shards == 1 else f"{ENTRY[form]}-{number + 1:05d}-of-{shards:05d}.{form}"
        save_file(part, folder / file) if form == "safetensors" else torch.save(part, folder / file)
        placement |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{ENTRY[form]}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placement}))


def stored_base(folder: Path, config) -> BaseModel:
    return BaseModel("stored", folder, config, None, None)


# ------------------------------------------------------------------------------------------------------------- what the load did


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decoder_linear_is_stored_as_asked(architecture, mode):
    config = tiny_config(architecture)
    model, census = load_random(config, mode)
    assert (census.target_layers, census.quantized_layers) == (8, 8)
    assert census.line().startswith(f"8 of 8 decoder linears in {dict(zip(MODES, ('nf4', 'int8', 'bf16')))[mode]}, ")
    linears = dict(decoder_linears(model))
    weights = sum(module.in_features * module.out_features for module in linears.values())
    stored = sum(tensor.numel() * tensor.element_size() for module in linears.values() for tensor in frozen_tensors(module))
    bytes_a_weight = {"4bit": 0.5 + 1 / 64, "8bit": 1.0, "16bit": 2.0}[mode]  # NF4: one 8-bit scale for 64 weights
    assert stored == pytest.approx(bytes_a_weight * weights, rel=0.05)
    assert census.decoder_gib * 2**30 == pytest.approx(stored, rel=0.05)  # the code book of the scales is not counted, biases are
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert census.total_gib * 2**30 == pytest.approx(held, rel=0.05)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ("7b", "11b", "rw"))
def test_norms_are_float32_and_the_rest_is_bf16(architecture, mode):
    model, _ = load_random(tiny_config(architecture), mode)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) >= 3
    assert {p.dtype for module in norms for p in module.parameters()} == {torch.float32}
    assert model.transformer.word_embeddings.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.transformer.word_embeddings.weight) == (architecture != "11b")
    assert {module.bias.dtype for _, module in decoder_linears(model) if module.bias is not None} <= {torch.bfloat16}


def test_random_weights_come_from_their_seed():
    config = tiny_config("40b")
    one, same, other = (load_base(BaseModel("tiny", None, config, None, seed), "16bit", CPU)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["transformer.h.0.mlp.dense_h_to_4h.weight"], other["transformer.h.0.mlp.dense_h_to_4h.weight"])
    assert one["transformer.h.0.mlp.dense_h_to_4h.weight"].float().std().item() == pytest.approx(config.initializer_range, rel=0.05)


# ---------------------------------------------------------------------------------------------------- a load that did not quantise


@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_a_falcon_that_was_not_quantised_is_refused(mode):
    model = FalconForCausalLM(tiny_config("7b")).to(torch.bfloat16)
    assert {type(module).__name__ for _, module in decoder_linears(model)} == {"FalconLinear"}
    with pytest.raises(RuntimeError, match=f"asked for {mode} but only 0 of 8 "):
        take_census(model, mode)
    with pytest.raises(RuntimeError, match="only 0 of 8 "):
        take_census(model.float(), "16bit")


@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_a_load_that_leaves_the_layers_in_place_is_refused(mode, monkeypatch):
    swap = PackedFalcon.set_submodule
    base = BaseModel("tiny", None, tiny_config("7b"), None, 3)
    monkeypatch.setattr(PackedFalcon, "set_submodule", lambda self, name, module: swap(self, name, module) if ".0." in name else None)
    with pytest.raises(RuntimeError, match="only 4 of 8 "):
        load_base(base, mode, CPU, PackedFalcon)
    monkeypatch.setattr(PackedFalcon, "set_submodule", lambda self, name, module: None)
    with pytest.raises(RuntimeError, match="only 0 of 8 "):
        load_base(base, mode, CPU, PackedFalcon)


@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_the_class_of_a_layer_is_not_enough(mode):
    model = FalconForCausalLM(tiny_config("7b")).to(torch.bfloat16)
    for name, module in list(decoder_linears(model)):
        if mode == "4bit":
            twin = bnb.nn.Linear4bit(module.in_features, module.out_features, False, quant_type="nf4")
        else:
            twin = bnb.nn.Linear8bitLt(module.in_features, module.out_features, False, has_fp16_weights=False)
        model.set_submodule(name, twin)
    with pytest.raises(RuntimeError, match="only 0 of 8 "):
        take_census(model, mode)


def test_a_layer_that_is_missing_from_the_count_is_refused():
    model, _ = load_random(tiny_config("7b"), "4bit")
    model.transformer.h[1].mlp.dense_4h_to_h = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="only 7 of 8 .* \\(7 found\\)"):
        take_census(model, "4bit")


# --------------------------------------------------------------------------------------------------------------- how exact it is


def test_code_book_is_the_normal_quantiles_of_qlora():
    """16 levels: 8 below zero and 8 at or above it, quantiles of N(0, 1) evenly spaced in probability up to 0.9677083, the largest at 1."""
    below = -norm.ppf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    above = norm.ppf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    levels = torch.tensor(sorted([*below, 0.0, *above]))
    levels /= levels.max()
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(table.double(), levels, rtol=0, atol=1e-6)
    codes = torch.tensor([[16 * high + low for high, low in zip(range(0, 16, 2), range(1, 16, 2))] * 4], dtype=torch.uint8).T.contiguous()
    decoded = torch.ops.bitsandbytes.dequantize_4bit(codes, torch.ones(1), 64, "nf4", (1, 64), torch.float32)
    torch.testing.assert_close(decoded.view(4, 16).double(), levels.repeat(4, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ("7b", "40b"))
def test_stored_weights_are_close_to_the_checkpoints(architecture, tmp_path):
    config = tiny_config(architecture)
    state = state_of(config)
    write_shards(tmp_path, state, "safetensors", 1)
    for mode in MODES:
        model, _ = load_base(stored_base(tmp_path, config), mode, CPU)
        for name, module in decoder_linears(model):
            weight = state[name + ".weight"].float()
            stored = dequantize(frozen_tensors(module), weight.shape, torch.float32)
            torch.testing.assert_close(stored, stored_weight(module), rtol=1e-6, atol=1e-9)
            error = (stored - weight).abs()
            if mode == "4bit":
                largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
                widest_gap = 1 - 0.6961928  # between the two lowest levels; a scale rounded to 8 bits adds a little
                assert (error.view(-1, 64) <= (widest_gap / 2 + 0.02) * largest).all()
                assert 0.08 < (error.norm() / weight.norm()).item() < 0.10  # what NF4 in blocks of 64 costs on normal weights
            elif mode == "8bit":
                largest = weight.abs().amax(1, keepdim=True)
                assert (error <= largest * (1 / 254 + 1e-3)).all()  # half a step, and the step through float16
            else:
                assert torch.equal(stored, weight)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or "embeddings" in name:
                assert torch.equal(parameter.float(), state[name].float()), name


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_in_16_bits_is_the_rounded_float32_weight(mode):
    model, _ = load_random(tiny_config("7b"), mode)
    for _, module in decoder_linears(model):
        shape = (module.out_features, module.in_features)
        wide = dequantize(frozen_tensors(module), shape, torch.float32)
        narrow = dequantize(frozen_tensors(module), shape, torch.bfloat16)
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - wide).abs().max() <= (wide.abs() * 2**-8).max()
        assert ((narrow.float() - wide).norm() / wide.norm()).item() < 0.002  # one rounding; two would be 0.0023


# ------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("architecture", ("7b", "11b", "rw"))
@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_shards_of_either_form_load_like_one_file(architecture, mode, tmp_path):
    config = tiny_config(architecture)
    state = state_of(config)
    write_shards(tmp_path / "one", state, "safetensors", 1)
    write_shards(tmp_path / "many", state, "safetensors", 3)
    old = state | {f"transformer.h.{i}.self_attention.rotary_emb.inv_freq": torch.ones(32) for i in range(2)}
    old.setdefault("lm_head.weight", state["transformer.word_embeddings.weight"])  # 2023: buffers and the tied head were stored too
    write_shards(tmp_path / "old", old, "bin", 2)
    one, many, old = (load_base(stored_base(tmp_path / name, config), mode, CPU)[0].state_dict() for name in ("one", "many", "old"))
    assert one.keys() == many.keys() == old.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name]), name
        assert torch.equal(tensor, old[name]), name


def test_a_loaded_base_outlives_its_files(tmp_path):
    config = tiny_config("7b")
    write_shards(tmp_path, state_of(config), "bin", 2)
    model, _ = load_base(stored_base(tmp_path, config), "16bit", CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for file in tmp_path.glob("*.bin"):
        with open(file, "r+b") as handle:  # a mapped tensor would see this
            handle.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", ("safetensors", "bin"))
def test_missing_and_misshapen_tensors_are_told(form, tmp_path):
    config = tiny_config("7b")
    state = state_of(config)
    lost = "transformer.h.1.self_attention.dense.weight"
    write_shards(tmp_path / "missing", {name: tensor for name, tensor in state.items() if name != lost}, form, 2)
    with pytest.raises(UserError) as error:
        load_base(stored_base(tmp_path / "missing", config), "4bit", CPU)
    assert error.value.cause == f"stored: 1 tensors are not in the checkpoint, {lost} first"
    write_shards(tmp_path / "misshapen", state | {lost: torch.zeros(256, 128, dtype=torch.bfloat16)}, form, 2)
    with pytest.raises(UserError) as error:
        load_base(stored_base(tmp_path / "misshapen", config), "4bit", CPU)
    assert error.value.cause == f"stored: tensor {lost} has shape (256, 128), the config asks for (256, 256)"


class RunsCode:
    """Pickles into a call that makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", (True, False), ids=("zip", "before-torch-1.6"))
def test_code_in_a_bin_file_is_refused_and_not_run(zipped, tmp_path):
    config, marker = tiny_config("7b"), tmp_path / "code-was-run"
    torch.save(state_of(config) | {"extra": RunsCode(marker)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_base(stored_base(tmp_path, config), "4bit", CPU)
    assert not marker.exists()
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists()  # it would have run


def test_bin_files_of_before_torch_1_6_load(tmp_path):
    config = tiny_config("7b")
    state = state_of(config)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model, _ = load_base(stored_base(tmp_path, config), "16bit", CPU)
    assert torch.equal(model.state_dict()["transformer.h.1.mlp.dense_h_to_4h.weight"], state["transformer.h.1.mlp.dense_h_to_4h.weight"])


MEASURE_LOAD = """
import gc, sys, threading, time
from pathlib import Path
import torch
from transformers import FalconConfig
from falcon_finetune.family import BaseModel
from falcon_finetune.quantization import load_base

def anonymous_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def load(folder, config):
    return load_base(BaseModel("x", folder, config, None, None if folder else 0), "4bit", torch.device("cpu"))

load(None, FalconConfig(vocab_size=320, hidden_size=256, num_hidden_layers=1, num_attention_heads=4))  # the threads and pools that stay
for folder in sys.argv[1:]:
    peak, done = 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous_mib())
            time.sleep(0.001)
    gc.collect()
    before = anonymous_mib()
    thread = threading.Thread(target=watch)
    thread.start()
    model, census = load(Path(folder), FalconConfig(vocab_size=320, hidden_size=512, num_hidden_layers=36, num_attention_heads=8))
    done = True
    thread.join()
    print(peak - before, census.total_gib * 1024)
    del model
"""


def test_host_memory_stays_under_the_base_and_one_shard(tmp_path):
    config = tiny_config("7b", hidden_size=512, num_hidden_layers=36, num_attention_heads=8)
    state = state_of(config)
    shards = 4
    for form in ENTRY:
        write_shards(tmp_path / form, state, form, shards)
    shard_mib = max(file.stat().st_size for file in tmp_path.glob("*/*-of-*")) / 2**20
    total_mib = sum(file.stat().st_size for file in tmp_path.glob("bin/*-of-*")) / 2**20
    assert 40 < shard_mib < 70 and total_mib > 3.5 * shard_mib
    # The threshold hands freed tensors back to the system at once: what is counted is what is held, not what the allocator keeps for later.
    done = subprocess.run([sys.executable, "-c", MEASURE_LOAD, *(str(tmp_path / form) for form in ENTRY)], cwd=ROOT, check=True, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
    for line in done.stdout.splitlines():
        growth, base = map(float, line.split())
        print(f"shards of {shard_mib:.0f} MiB, {total_mib:.0f} in all: anonymous memory grew by {growth:.0f} MiB at its peak, the base is {base:.0f}")
        assert growth <= base + shard_mib
    assert len(done.stdout.splitlines()) == len(ENTRY)


# -------------------------------------------------------------------------------------------------------------------- the stack


@pytest.mark.parametrize("packed", (True, False), ids=("packed", "plain"))
def test_scoring_before_training_changes_no_gradient(packed):
    """bitsandbytes repacks 4-bit weights for CPUs with AVX512-BF16 in a pass without gradients, and training after it would be wrong."""
    rows = random_rows((12, 20))
    found = []
    for scores_first in (False, True):
        base, _ = load_random(tiny_config("7b"), "4bit")
        if scores_first:
            base.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                base(input_ids=torch.tensor([rows[0]["input_ids"]]))
            with torch.no_grad():
                base.transformer.h[0].mlp.dense_h_to_4h(torch.ones(3, 256, dtype=torch.bfloat16))
        model = adapt(base, plan=ForwardPlan(torch.bfloat16))
        if packed:
            model(packed=pack_rows(rows)).backward()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits
            logits.float().logsumexp(-1).sum().backward()
        found.append(adapter_gradients(model))
    assert all(gradient is not None for gradient in found[1].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_compute_dtype_is_chosen_and_said():
    assert pick_compute_dtype("fp32", CPU) == (torch.float32, "float32 compute, as asked")
    assert pick_compute_dtype("bf16", CPU) == (torch.bfloat16, "bf16 compute, as asked")
    dtype, why = pick_compute_dtype("auto", CPU)
    flags = Path("/proc/cpuinfo").read_text()
    assert (dtype == torch.bfloat16) == ("avx512_bf16" in flags or "amx_bf16" in flags)
    assert why.startswith("bf16" if dtype == torch.bfloat16 else "float32")


@pytest.mark.parametrize("stored", ("both", "head alone"))
def test_a_tied_checkpoint_may_store_its_matrix_under_the_heads_name(stored, tmp_path):
    config, embedding = tiny_config("7b"), "transformer.word_embeddings.weight"
    state = state_of(config)
    state["lm_head.weight"] = state[embedding].clone()
    if stored == "head alone":
        del state[embedding]
    write_shards(tmp_path, state, "safetensors", 2)
    model, _ = load_base(stored_base(tmp_path, config), "4bit", CPU)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    config = tiny_config("7b")
    state = state_of(config)
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"] + 1
    write_shards(tmp_path, state, "safetensors", 1)
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        load_base(stored_base(tmp_path, config), "4bit", CPU)


def test_without_a_c_compiler_there_are_no_kernels(tmp_path):
    """Triton builds its launchers with gcc or clang: without one the plain twins must serve, not a crash at the first launch."""
    code = "from falcon_finetune import quantization as q; print(q.c_compiler(), q.kernels)"
    environment = {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.stdout.split() == ["None", "None"], shown.stderr


def test_the_warning_of_a_lost_gradient_is_shown_and_noise_is_not():
    code = ("import warnings; from falcon_finetune.console import quiet_the_stack; quiet_the_stack(); warnings.warn('noise'); "
            "warnings.warn('bitsandbytes::gemv_4bit: an autograd kernel was not registered to the Autograd key(s)')")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "an autograd kernel was not registered" in shown.stderr and "noise" not in shown.stderr.replace("warn('noise')", "")
