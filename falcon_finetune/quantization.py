"""4-, 8- and 16-bit loading that is checked: layers are quantised one by one as they stream in, then counted.

transformers >= 5.5 swaps a layer for its bitsandbytes twin only if `type(layer) is nn.Linear`; Falcon's layers are of a subclass, so its
own "4-bit" load of a Falcon quantises nothing and says nothing. Here each decoder linear is replaced by name, and the census counts what
the replacement really did. Remove the loader when `from_pretrained(quantization_config=...)` passes `take_census` on a Falcon.
"""

import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear, FalconRotaryEmbedding
from transformers.quantizers import AutoHfQuantizer

from falcon_finetune.console import say
from falcon_finetune.family import LORA_TARGETS, BaseModel, weight_files
from falcon_finetune.options import UserError



def c_compiler() -> str | None:
    """The C compiler that Triton and torch.compile build their launchers with."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


try:
    from falcon_finetune import kernels
except ImportError:  # CPU builds of torch come without Triton
    kernels = None
if c_compiler() is None:
    kernels = None  # Triton would fail at its first launch; the plain twins serve, and finetune.py says what that costs

LLM_INT8_THRESHOLD = 6.0  # features of the input from here on are multiplied in 16 bits (Dettmers et al. 2022, and bitsandbytes' default)
STORED_AS = {"4bit": "nf4", "8bit": "int8", "16bit": "bf16"}


@dataclass(frozen=True)
class Census:
    """What the load really did: decoder linears counted by how their weights are stored."""

    mode: str
    target_layers: int
    quantized_layers: int
    decoder_gib: float
    total_gib: float

    def line(self) -> str:
        return (f"{self.quantized_layers} of {self.target_layers} decoder linears in {STORED_AS[self.mode]}, {_size(self.decoder_gib)}; "
                f"whole base {_size(self.total_gib)}")

    def to_dict(self) -> dict:
        return asdict(self)


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def pick_compute_dtype(choice: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The arithmetic of the run and the reason to print and record: bf16 where the device has it, float32 on other CPUs.

    Raises:
        UserError: a CUDA card without bf16 (before Ampere), unless fp32 was asked for.
    """
    if choice == "fp32":
        return torch.float32, "float32 compute, as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise UserError(f"{name} has no bf16 arithmetic (it came with Ampere, compute capability 8.0)",
                            "use an A10, A100, L4 or newer card, or --compute_dtype fp32 (several times slower)")
        return torch.bfloat16, "bf16 compute"
    if choice == "bf16":
        return torch.bfloat16, "bf16 compute, as asked"
    if _cpu_has_bf16():
        return torch.bfloat16, "bf16 compute (this CPU has bf16 instructions)"
    return torch.float32, "float32 compute (this CPU has no bf16 instructions; emulating them is about 60 times slower)"


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_base(base: BaseModel, mode: str, device: torch.device, model_class: type[FalconForCausalLM] = FalconForCausalLM,
              *, llm_int8: bool = False) -> tuple[FalconForCausalLM, Census]:
    """Loads the frozen base onto one device, each decoder linear quantised as it arrives.

    Args:
        base: where the weights are, or the seed that makes them (`find_model`).
        mode: "4bit" (NF4, double quantisation), "8bit" (int8, one scale a row) or "16bit" (bf16).
        device: where every weight ends up; host memory never holds more than one shard of the checkpoint.
        llm_int8: 8bit layers multiply by LLM.int8 (int8 inputs, outliers apart) instead of int8 weights x 16-bit compute.

    Returns:
        The model in eval mode without gradients (norms in float32, embeddings and head in bf16), and its census.

    Raises:
        UserError: tensors missing from the checkpoint or of another shape.
        RuntimeError: a decoder linear that is not stored as asked.
    """
    model = _skeleton(base.config, mode, model_class, LLM_INT8_THRESHOLD if llm_int8 else 0.0)
    tensors = _random_tensors(model, base.random_seed, device) if base.random_seed is not None else _stored_tensors(weight_files(base))
    expected = {name: parameter.shape for name, parameter in model.named_parameters() if not (base.config.tie_word_embeddings and name == "lm_head.weight")}
    tied = base.config.tie_word_embeddings
    heads = {}  # a tied checkpoint stores the shared matrix under either name, or under both
    modules = dict(model.named_modules())
    while True:
        item = next(tensors, None)
        if item is None:
            break
        name, tensor = item
        if tied and name == "lm_head.weight":
            heads[name] = tensor.to(torch.bfloat16, copy=True)
            continue
        if name not in expected:
            continue  # old checkpoints carry rotary buffers
        shape = expected.pop(name)
        if tensor.shape != shape:
            raise UserError(f"{base.name}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for {tuple(shape)}",
                            "config.json and the weights do not belong together: download both again")
        owner, _, leaf = name.rpartition(".")
        _place(modules[owner], leaf, tensor, device)
        del item, tensor  # the next shard must not meet this one in memory
    if heads:
        _place_tied_head(base, model, heads.pop("lm_head.weight"), expected, device)
    if expected:
        raise UserError(f"{base.name}: {len(expected)} tensors are not in the checkpoint, {next(iter(expected))} first", "download it again")
    if tied:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    model.transformer.rotary_emb = FalconRotaryEmbedding(base.config).to(device)
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    _tell_the_stack(model, mode, device)
    return model, take_census(model, mode)


def _place_tied_head(base: BaseModel, model: FalconForCausalLM, head: torch.Tensor, expected: dict, device: torch.device) -> None:
    """The head that a checkpoint stores although its config ties it to the embedding: the same matrix, or the only copy of it."""
    name = "transformer.word_embeddings.weight"
    if expected.get(name) == head.shape:
        expected.pop(name)
        _place(model.transformer.word_embeddings, "weight", head, device)
    elif name in expected or not torch.equal(model.transformer.word_embeddings.weight, head.to(device)):
        raise UserError(f"{base.name}: lm_head.weight differs from the embedding, but config.json ties them", 'set "tie_word_embeddings": false in config.json')


def _skeleton(config, mode: str, model_class: type[FalconForCausalLM], threshold: float) -> FalconForCausalLM:
    """The model without memory (meta device), its decoder linears already of the class that stores them."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = model_class(config).to(torch.bfloat16)
        for name, module in list(decoder_linears(model)):
            inputs, outputs, bias = module.in_features, module.out_features, module.bias is not None
            if mode == "4bit":
                twin = bnb.nn.Linear4bit(inputs, outputs, bias, compress_statistics=True, quant_type="nf4")
                # With this on, one pass in eval mode on a CPU with AVX512-BF16 repacks the weights in place, and later training loses the
                # gradient through them without an error (bitsandbytes 0.50; remove when its gemv_4bit has a backward).
                twin.support_avx512bf16_for_cpu = False
            elif mode == "8bit":
                twin = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, threshold=threshold)
            else:
                twin = nn.Linear(inputs, outputs, bias, dtype=torch.bfloat16)
            model.set_submodule(name, twin)
    return model


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers inside the decoder blocks: what is quantised, and what LoRA adapts."""
    for name, module in model.named_modules():
        if ".h." in name and isinstance(module, (FalconLinear, nn.Linear)) and name.rpartition(".")[2] in LORA_TARGETS:
            yield name, module


def _place(module: nn.Module, leaf: str, tensor: torch.Tensor, device: torch.device) -> None:
    tensor = tensor.to(device=device, dtype=torch.bfloat16)
    if leaf == "weight" and isinstance(module, bnb.nn.Linear4bit):
        module.weight = bnb.nn.Params4bit(tensor, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module).to(device)
    elif leaf == "weight" and isinstance(module, bnb.nn.Linear8bitLt):
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(tensor.to(torch.float16))
        module.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        wide = torch.float32 if isinstance(module, nn.LayerNorm) else torch.bfloat16
        # A tensor of a mapped file is copied: the parameter must outlive the file.
        setattr(module, leaf, nn.Parameter(tensor.to(wide, copy=True), requires_grad=False))


def _stored_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a checkpoint one by one, from mapped files: anonymous host memory stays under one shard."""
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt", device="cpu") as shard:
                for name in shard.keys():
                    yield name, shard.get_tensor(name)
            continue
        shard = _load_pickled(file)
        while shard:
            name = next(iter(shard))
            yield name, shard.pop(name)


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """A .bin shard, mapped where its format allows it; nothing but tensors is ever unpickled."""
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format of before torch 1.6 cannot be mapped
    except pickle.UnpicklingError:
        raise UserError(f"{file.name} holds more than tensors (code would run on loading it)", "use a checkpoint in safetensors") from None


def _random_tensors(model: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of full size drawn on the device itself: N(0, initializer_range), norms at one, biases at zero."""
    generator = torch.Generator(device=device).manual_seed(seed)
    deviation = model.config.initializer_range
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() < 2:
            is_norm_weight = name.endswith("weight")
            yield name, torch.full(parameter.shape, float(is_norm_weight), device=device, dtype=torch.bfloat16)
        else:
            yield name, torch.empty(parameter.shape, device=device, dtype=torch.bfloat16).normal_(0, deviation, generator=generator)


def _tell_the_stack(model: FalconForCausalLM, mode: str, device: torch.device) -> None:
    """Sets what PEFT, accelerate and the Trainer read off a model to know that it is quantised and where it sits."""
    model.hf_device_map = {"": device.index if device.type == "cuda" else "cpu"}
    if mode == "16bit":
        return
    config = BitsAndBytesConfig(load_in_4bit=mode == "4bit", load_in_8bit=mode == "8bit", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    setattr(model, f"is_loaded_in_{mode}", True)
    model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.quantization_method = config.quant_method


def take_census(model: nn.Module, mode: str) -> Census:
    """Counts the decoder linears whose weights are really stored as `mode` says: by their bytes, not by the class's name.

    Raises:
        RuntimeError: fewer than all of them are; a run on such a base would cost several times the memory it was planned for.
    """
    target = stored = 0
    decoder_bytes = 0
    for _, module in decoder_linears(model):
        target += 1
        stored += _is_stored_as(module, mode)
        decoder_bytes += _stored_bytes(module)
    total = decoder_bytes + sum(p.numel() * p.element_size() for p in {id(p): p for p in _other_parameters(model)}.values())
    census = Census(mode, target, stored, decoder_bytes / 2**30, total / 2**30)
    wanted = len(LORA_TARGETS) * model.config.num_hidden_layers
    if target != wanted or stored != target:
        raise RuntimeError(f"asked for {mode} but only {stored} of {wanted} decoder linears are stored as {STORED_AS[mode]} "
                           f"({target} found): this base must not be trained as if it were quantised")
    return census


def _is_stored_as(module: nn.Module, mode: str) -> bool:
    weight = module.weight
    if mode == "4bit":
        state = getattr(weight, "quant_state", None)
        return (weight.dtype == torch.uint8 and state is not None and state.quant_type == "nf4" and state.nested
                and weight.numel() * 2 == module.in_features * module.out_features)
    if mode == "8bit":
        return weight.dtype == torch.int8 and _row_scales(module) is not None and weight.shape == (module.out_features, module.in_features)
    return weight.dtype == torch.bfloat16


def _row_scales(module: bnb.nn.Linear8bitLt) -> torch.Tensor | None:
    """bitsandbytes keeps the scales on the weight until the layer's own first forward moves them to its state."""
    return module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB


def _stored_bytes(module: nn.Module) -> int:
    tensors = [module.weight.data] + ([module.bias] if module.bias is not None else [])
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.state2.absmax]
    elif isinstance(module, bnb.nn.Linear8bitLt):
        tensors.append(_row_scales(module))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _other_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    inside = {id(p) for _, module in decoder_linears(model) for p in module.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            yield parameter


def frozen_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The stored weight of a decoder linear as plain tensors, for `dequantize`.

    4bit: codes [n/2, 1], absmax codes, their scales, their code book [256], their offset, the NF4 levels [16]. 8bit: codes [out, in], scales [out]. 16bit: [out, in].
    """
    if isinstance(module, bnb.nn.Linear4bit):
        state = module.weight.quant_state
        return [module.weight.data, state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code]
    if isinstance(module, bnb.nn.Linear8bitLt):
        return [module.weight.data, _row_scales(module)]
    return [module.weight.data]


def dequantize(tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that `frozen_tensors` stores, in the compute dtype: one kernel on a GPU, bitsandbytes' own elsewhere."""
    fast = kernels is not None and tensors[0].is_cuda
    if len(tensors) == 6:
        if fast:
            return kernels.dequantize_nf4(*tensors, shape, dtype)
        codes, absmax_codes, absmax_scales, code_book, offset, _ = tensors
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax_codes, absmax_scales, code_book, 256, torch.float32) + offset
        return torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, 64, "nf4", shape, dtype)
    if len(tensors) == 2:
        codes, scales = tensors
        if fast:
            return kernels.dequantize_int8(codes, scales, dtype)
        return codes.to(dtype).mul_((scales * (1 / 127)).unsqueeze(1))  # float32 scales: rounded once, after the product
    return tensors[0].to(dtype)


def int8_threshold(module: nn.Module) -> float:
    """Of LLM.int8 in a decoder linear; 0 where it does not compute so."""
    return float(module.state.threshold) if isinstance(module, bnb.nn.Linear8bitLt) else 0.0


def int8_product(x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None, threshold: float) -> torch.Tensor:
    """x W' + bias as LLM.int8 computes it: each row of x in int8 with its own scale, features that reach `threshold` anywhere in x in 16 bits.

    x [T, in] in any float dtype, in which the result [T, out] comes; tensors: `frozen_tensors` of an 8bit layer.
    """
    codes, scales = tensors
    x_codes, x_scales, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant(x.to(torch.float16, copy=True), threshold)
    product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x.contiguous(), x_codes, codes, x_scales, scales, outliers, None)
    return product if bias is None else product.add_(bias)


def check_backend(mode: str, device: torch.device) -> None:
    """Quantises a small matrix on the device and reads it back, before anything large is loaded.

    Raises:
        UserError: bitsandbytes has no working backend here.
    """
    if mode == "16bit":
        return
    layer = nn.Linear(128, 64, bias=False)
    weight = layer.weight.detach().clone()
    twin = bnb.nn.Linear4bit(128, 64, False, quant_type="nf4") if mode == "4bit" else bnb.nn.Linear8bitLt(128, 64, False, has_fp16_weights=False)
    try:
        _place(twin, "weight", weight, device)
        error = (dequantize(frozen_tensors(twin), (64, 128), torch.float32).cpu() - weight).norm() / weight.norm()
    except Exception as cause:
        line = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
        raise UserError(f"bitsandbytes {bnb.__version__} cannot quantise on {device.type} here: {line[:200]}",
                        "reinstall it for this machine (bash scripts/setup.sh), or use -q 16bit") from None
    if not error < 0.2:
        raise UserError(f"bitsandbytes {bnb.__version__} gives wrong weights on {device.type} here (relative error {error:.2g})", "reinstall it, or use -q 16bit")


def visible_device(local_index: int) -> torch.device:
    """The device of this rank: its own GPU, or the CPU.

    Raises:
        UserError: more ranks than GPUs, an AMD or Apple device, a CPU build of torch or a driver too old on a machine that has a card.
    """
    if torch.version.hip is not None:
        raise UserError(f"torch {torch.__version__} is built for AMD (ROCm), which this suite is not tested on", "use an NVIDIA card, or a CPU build of torch for a small run")
    if not torch.cuda.is_available():
        _refuse_idle_card()
        if torch.backends.mps.is_available():
            say("the Apple GPU is not used (bitsandbytes has no kernels for it): running on the CPU")
        return torch.device("cpu")
    ranks = max(local_index + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if ranks > torch.cuda.device_count():  # known on every rank, so that the first one says it
        raise UserError(f"{ranks} processes but {torch.cuda.device_count()} GPUs visible (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
                        f"start torchrun with --nproc_per_node {torch.cuda.device_count()}")
    torch.cuda.set_device(local_index)
    return torch.device("cuda", local_index)


def _refuse_idle_card() -> None:
    """A CPU run on a machine with an NVIDIA card is hours lost; CUDA_VISIBLE_DEVICES="" says that it is meant."""
    if Path("/dev/kfd").exists() and torch.version.cuda is not None:
        raise UserError("this machine has an AMD card, which this suite is not made for", "use an NVIDIA card, or a CPU build of torch for a small run")
    if not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if torch.version.cuda is None:
        raise UserError(f"this machine has an NVIDIA card but torch {torch.__version__} is a CPU build",
                        "pip install torch from the CUDA index (see README), or set CUDA_VISIBLE_DEVICES= to run on the CPU")
    raise UserError(f"this machine has an NVIDIA card but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: the driver is too old or not loaded",
                    "update the driver (nvidia-smi shows the CUDA it supports), or set CUDA_VISIBLE_DEVICES= to run on the CPU")
