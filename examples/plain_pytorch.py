"""BalanceMix in a loop of your own: `hf_balancemix.core` needs torch only; no Trainer, no data set format.

Toy data: 12 x 12 images in which each class is a bright spot at its own place, 40 % of the positive labels wrong.
"""

import torch

from hf_balancemix.core import BalanceMix, BalanceMixSettings, PairSampler, minority_mixup, mixing_coefficient

N, K, EPOCHS, BATCH = 2000, 9, 12, 50


def make_data(n, noise, seed):
    g = torch.Generator().manual_seed(seed)
    clean = (torch.rand(n, K, generator=g) < torch.linspace(0.5, 0.05, K)).float()
    spots = clean.view(n, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    wrong = (torch.rand(n, K, generator=g) < noise) & (clean == 1)
    given = (clean.bool() & ~wrong).float()
    given[wrong.nonzero()[:, 0], torch.randint(K, (int(wrong.sum()),), generator=g)] = 1
    return 2 * spots + torch.randn(n, 1, 12, 12, generator=g), given, clean


def augmented(x):  # your augmentation
    return x + 0.3 * torch.randn_like(x)


torch.manual_seed(0)
images, given, clean = make_data(N, 0.4, seed=0)
test_images, test_labels, _ = make_data(N, 0.0, seed=1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 128), torch.nn.ReLU(), torch.nn.Linear(128, K))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
# With a pretrained backbone: judge="cross_fit" (the default), and state.judge(features) before the first epoch.
state = BalanceMix(given, BalanceMixSettings(judge="network", label_warmup_epochs=3, relabel_threshold=0.9))
sampler = PairSampler(N, seed=0, weights=lambda: state.weights)

for epoch in range(EPOCHS):
    if epoch > 0:  # the end of the epoch before: mixtures and sampling weights from a pass over all
        with torch.no_grad():
            for index in torch.arange(N).split(500):
                state.observe(index, model(images[index]))
        state.end_epoch(epoch)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    for start in range(0, N, BATCH):
        batch = keys[start : start + BATCH]
        r, m = (torch.tensor([key[i] for key in batch]) for i in (1, 2))
        lam = torch.tensor([mixing_coefficient(4.0, 0, epoch, key.random) for key in batch])
        mixed, targets = minority_mixup(augmented(images[r]), augmented(images[m]), given[r], given[m], lam)
        weight = None
        if state.settings.manages_labels(epoch):
            targets, weight = state.mix_labels(state.refine(r, given[r]), state.refine(m, given[m]), lam)
        optimizer.zero_grad()
        state.loss(model(mixed), targets, weight).backward()
        optimizer.step()
    right = ((model(test_images) > 0) == test_labels.bool()).float().mean()
    print(f"epoch {epoch}: {100 * right:.1f} % of test labels right")
