"""Peers that benchmarks.data compares the loader with: bare Pillow, and a PyTorch DataLoader over WebDataset tars.

Standalone, so that an environment without this package can run it:

    python experiments/benchmarks/data_peer.py limit|webdataset DIRECTORY SIZE BATCH BATCHES WARM_UP PROCESSES AHEAD

DIRECTORY holds pairs-*.tar with ID.src.jpg, ID.tgt.jpg and ID.txt. Both resize an image to cover SIZE x SIZE pixels
(Lanczos) and crop the center; each process prefetches up to AHEAD batches. Prints JSON: seconds, and processor seconds
of all processes, of BATCHES batches after WARM_UP.
"""

import glob
import io
import json
import os
import sys
import tarfile
import time

import numpy as np
from PIL import Image


def cpu_seconds() -> float:
    """Returns the processor seconds of this process and its descendants, those that were waited for included."""
    ticks = os.sysconf("SC_CLK_TCK")
    parents, spent = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:  # it has ended
                continue
            parents[int(name)] = int(fields[1])
            spent[int(name)] = sum(int(field) for field in fields[11:15]) / ticks  # own and of children waited for
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(spent[member] for member in family if member in spent)


def image(data: bytes, size: int) -> Image.Image:
    """Returns the image of a file, resized to cover a square and its center cut out, as the release's loader does."""
    opened = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = opened.size
    wide, high = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = (wide - size) // 2, (high - size) // 2
    return opened.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))


def limit(
    tars: list[str], size: int, batch: int, batches: int, warm_up: int, processes: int, _: int
) -> tuple[float, float]:
    """Measures decoding and resizing of images in memory, in forked processes that discard them."""
    files = []
    for path in tars:
        with tarfile.open(path) as tar:
            images = (tar.extractfile(member) for member in tar if member.name.endswith(".jpg"))
            files += [file.read() for file in images if file]

    def work(images: int) -> None:
        children = []
        for number in range(processes):
            child = os.fork()
            if not child:
                for index in range(number, images, processes):
                    image(files[index % len(files)], size)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)

    work(2 * batch * warm_up)
    wall, cpu = time.perf_counter(), cpu_seconds()
    work(2 * batch * batches)
    return time.perf_counter() - wall, cpu_seconds() - cpu


def webdataset(
    tars: list[str], size: int, batch: int, batches: int, warm_up: int, processes: int, ahead: int
) -> tuple[float, float]:
    """Measures a DataLoader whose workers make shuffled batches of uint8 tensors and texts."""
    import torch
    import webdataset as wds

    def read(sample: dict) -> tuple:
        pixels = [torch.from_numpy(np.array(image(sample[side], size))) for side in ("src.jpg", "tgt.jpg")]
        return (*pixels, sample["txt"].decode())

    def stack(samples: list) -> tuple:
        source, target, text = zip(*samples, strict=True)
        return torch.stack(source), torch.stack(target), list(text)

    data = (
        wds.WebDataset(tars, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(200)
        .map(read)
        .batched(batch, collation_fn=stack)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=processes, prefetch_factor=ahead)
    iterator = iter(loader)
    for _ in range(warm_up):
        next(iterator)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        source, target, _ = next(iterator)
        assert source.shape == target.shape == (batch, size, size, 3)
    return time.perf_counter() - wall, cpu_seconds() - cpu


if __name__ == "__main__":
    role = limit if sys.argv[1] == "limit" else webdataset
    numbers = [int(text) for text in sys.argv[3:]]
    seconds, cpu = role(sorted(glob.glob(f"{sys.argv[2]}/pairs-*.tar")), *numbers)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}))
