"""Keep your own training loop, and take the loss, which runs the attack, from fastdynat.

Run: python examples/03_drop_in_losses.py
"""

import torch
from torch import nn

import fastdynat
from fastdynat import trades_loss  # was: from trades import trades_loss
from fastdynat.data import load_test, open_train

EPS = 0.1

torch.manual_seed(0)
data = open_train("digits", None, val_size=0, seed=0, limit=640).train_images()
images, labels = data.images / 255, data.labels

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
    nn.Linear(32 * 7 * 7, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for epoch in range(4):
    total = 0.0
    for batch in torch.randperm(len(images)).split(64):
        # Runs the attack and returns both terms of TRADES; mode and statistics are as in the release.
        loss = trades_loss(
            model, images[batch], labels[batch], optimizer,
            step_size=EPS / 4, epsilon=EPS, perturb_steps=3, beta=6.0,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(batch)
    print(f"epoch {epoch + 1}: loss {total / len(images):.3f}")

test = load_test("digits", None)[1]
print(fastdynat.evaluate(model, (test.images, test.labels), "clean,pgd20", eps=EPS, num_images=100))
