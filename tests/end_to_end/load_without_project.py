"""A stranger's script: loads run directories with PEFT alone, none of this project's code, and prints what it found as JSON.

    python load_without_project.py REQUEST.json

The request: `run_dir`, `rows` (input_ids and labels of each), `refused` (a run directory whose base must not be found), `out` (a file for
the logits of the rows). The answer: mean loss over the learnt tokens, the modules that PEFT adapted, and how the refused one failed.
"""

import json
import sys

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoTokenizer


def main() -> None:
    with open(sys.argv[1]) as handle:
        request = json.load(handle)
    model = AutoPeftModelForCausalLM.from_pretrained(request["run_dir"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(request["run_dir"])
    total, learnt, logits = 0.0, 0, {}
    with torch.no_grad():
        for index, row in enumerate(request["rows"]):
            logits[str(index)] = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits[str(index)][:-1], labels, reduction="sum").item()
            learnt += int((labels != -100).sum())
    save_file(logits, request["out"])
    try:
        AutoPeftModelForCausalLM.from_pretrained(request["refused"])
        refusal = None
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    strangers = sorted(name for name in sys.modules if name.startswith("falcon_finetune"))
    print(json.dumps({"loss": total / learnt, "adapted": sum("lora_A" in name for name, _ in model.named_parameters()), "eos": tokenizer.eos_token_id,
                      "refusal": refusal, "project_modules": strangers}))


main()
