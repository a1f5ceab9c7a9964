"""Handwritten digits: deepspeed --num_gpus 2 --no_local_rank docs/examples/FILE.py"""

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import dynmoe_ds as dm


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)
        self.moe = dm.MoELayer(hidden_size=64, ffn_hidden_size=96, num_experts=4, num_slots=8, ep_size=2, expert="gelu")

    def forward(self, x):
        x = self.first(x)
        y = self.moe(x)
        return self.last(x + y)


config = {
    "train_micro_batch_size_per_gpu": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}
deepspeed.init_distributed()
torch.manual_seed(0)
model = Classifier()
engine = dm.initialize(model, config, dm.AdaptationConfig(20, 10, rule="split_strained"))

images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
images, labels = images.float().to(engine.device) / 16, labels.to(engine.device)
order = torch.Generator().manual_seed(dist.get_rank())
for _ in range(120):
    batch = torch.randint(1500, (64,), generator=order)
    loss = nn.functional.cross_entropy(engine(images[batch]), labels[batch])
    engine.backward(loss)
    engine.step()

engine.eval()
with torch.no_grad():
    accuracy = float((engine(images[1500:]).argmax(-1) == labels[1500:]).float().mean())
if dist.get_rank() == 0:
    print(f"held-out accuracy {accuracy:.1%}")
