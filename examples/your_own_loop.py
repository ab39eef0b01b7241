"""An adapter is an nn.Module that owns its parameters: any training loop will do."""

import torch

import veneer

base = veneer.load_base("smollm2-135m-instruct")
adapter = base.attach(veneer.LoRA(rank=4, targets=["q", "v"]), name="mine")
batch = base.tokenizer("Veneer is thin, and the base is frozen.", return_tensors="pt")

optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
adapter.train()
for step in range(5):
    loss = adapter(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, round(loss.item(), 3))
adapter.eval()
