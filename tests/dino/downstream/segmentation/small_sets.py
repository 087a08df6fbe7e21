"""Small folders of pictures and masks, and a network that knows how to see them."""

import numpy as np
from PIL import Image

SIZE = (64, 48)  # width, height
PALETTE = [channel for number in range(256) for channel in (number * 7 % 256, number * 29 % 256, number)]


def write_mask(path, ids, mode="P"):
    """Ids (rows, cols), as a palette, grey, or 16-bit mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids, np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette(PALETTE)
    image.save(path)


def write_picture(path, size=SIZE, seed=0, **saving):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **saving)


def halves(left, right):
    """A mask of SIZE whose left and right halves are of two ids."""
    ids = np.full(SIZE[::-1], left)
    ids[:, SIZE[0] // 2 :] = right
    return ids


def write_set(root, *, parts=("train", "val"), masks="masks", count=4, ids=(0, 1, 2), mode="P"):
    """Pictures whose brightness tells the classes: class k is as bright as 60 k + 30."""
    for part in parts:
        for number in range(count):
            left, right = ids[number % len(ids)], ids[(number + 1) % len(ids)]
            mask = halves(left, right)
            brightness = np.select([mask == each for each in ids], [60 * k + 30 for k in range(len(ids))])
            noise = np.random.default_rng(number).integers(-20, 20, (*mask.shape, 3))
            path = root / "images" / part / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((brightness[..., None] + noise).clip(0, 255).astype(np.uint8)).save(path)
            write_mask(root / masks / part / f"{number}.png", mask, mode)
    return root
