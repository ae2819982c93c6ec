"""A torch.nn MLP made conditional: convert, distil, look."""

import copy

import torch
from torch import nn

import gatelet

torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256), nn.LayerNorm(256), nn.Linear(256, 10))
x, w = torch.randn(8192, 256), torch.randn(256, 10)
y = (x @ w).argmax(1)
optimizer = torch.optim.Adam(dense.parameters(), 1e-3)
for step in range(300):  # your model is trained already
    batch = torch.randint(len(x), (256,))
    loss = nn.functional.cross_entropy(dense(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model = copy.deepcopy(dense)
print(gatelet.convert(model, target_rate=0.1, bottleneck=32))
print(gatelet.distil(model, dense, list(x.split(256)), steps=200, weights=True))
print(model.eval())

test = torch.randn(4096, 256)
truth = (test @ w).argmax(1)
with torch.no_grad():
    for name, each in (("dense", dense), ("conditional", model)):
        print(f"{name}: accuracy {(each(test).argmax(1) == truth).float().mean():.1%}")
print(gatelet.report(model, test[:64]))
