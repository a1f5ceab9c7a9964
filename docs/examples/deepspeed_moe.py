"""Handwritten digits: deepspeed --num_gpus 2 --no_local_rank docs/examples/FILE.py"""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split_params
from sklearn.datasets import load_digits
from torch import nn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)
        ffn = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
        self.moe = MoE(64, ffn, num_experts=4, ep_size=2, k=2, drop_tokens=False)

    def forward(self, x):
        x = self.first(x)
        y, self.aux_loss, _ = self.moe(x)
        return self.last(x + y)


config = {
    "train_micro_batch_size_per_gpu": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}
deepspeed.init_distributed()
torch.manual_seed(0)
model = Classifier()
groups = split_params({"params": list(model.parameters()), "name": "all"})
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=groups)

images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
images, labels = images.float().to(engine.device) / 16, labels.to(engine.device)
order = torch.Generator().manual_seed(dist.get_rank())
for _ in range(120):
    batch = torch.randint(1500, (64,), generator=order)
    loss = nn.functional.cross_entropy(engine(images[batch]), labels[batch])
    engine.backward(loss + 0.01 * model.aux_loss)
    engine.step()

engine.eval()
with torch.no_grad():
    accuracy = float((engine(images[1500:]).argmax(-1) == labels[1500:]).float().mean())
if dist.get_rank() == 0:
    print(f"held-out accuracy {accuracy:.1%}")
