"""LoRA fine-tune with AdamW and a Fréchet pull to a teammate: pull.py FOLDER [STOP]; run again."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from manifold_merge import FrechetMean, param_groups

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
from minilm import accuracy, load_encoder, load_tasks

STEPS, PULL = 30, 0.1
file = Path(sys.argv[1]) / "checkpoint.pt"
stop = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
torch.manual_seed(0)
encoder, tokenizer = load_encoder()
layers = ["query", "key", "value", "dense"]
model = get_peft_model(encoder, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
task = load_tasks("validation")[1]
teammate = load_file(task.adapter / "adapter_model.safetensors")  # trained on other texts
adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
pull = FrechetMean(param_groups(model), anchors=[teammate], lr=PULL)
anneal = torch.optim.lr_scheduler.LinearLR(pull, 1.0, 0.0, total_iters=STEPS)
parts = {"model": model, "adam": adam, "pull": pull, "anneal": anneal}
saved = torch.load(file) if file.exists() else {"step": 0}
for name in parts if file.exists() else ():
    parts[name].load_state_dict(saved[name])
for step in range(saved["step"], stop):
    rows = torch.randperm(len(task.texts), generator=torch.Generator().manual_seed(step))[:16]
    batch = tokenizer([task.texts[i] for i in rows], padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    scores = pooled @ task.weight.T + task.bias
    torch.nn.functional.cross_entropy(scores, task.targets[rows]).backward()
    adam.step(), adam.zero_grad(), pull.step(), anneal.step()
torch.save({"step": stop} | {name: part.state_dict() for name, part in parts.items()}, file)
print(f"step {stop}: test accuracy {accuracy(model, tokenizer, load_tasks('test')[1]):.3f}")
