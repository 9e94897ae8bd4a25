"""Makes trainer_values.pth: what a trainer's checkpoint holds beside its tensors, as torch.save writes it.

Run once, with `pip install torch==2.13.0 omegaconf==2.3.1 numpy`; the tests need none of them.
"""

import argparse
import collections
import datetime
import enum
import pathlib
import types

import numpy as np
import omegaconf
import torch

DIRECTORY = pathlib.Path(__file__).parent


class Mode(enum.Enum):
    """A value of a class that the reader's machine does not have."""

    TRAIN = 1


def main() -> None:
    """Writes the file."""
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    marked = weight.clone() + 20
    marked.tag = "a tensor with an attribute"
    state = collections.OrderedDict(
        plain=weight,
        transposed=weight.t(),
        parameter=torch.nn.Parameter(weight + 10),
        marked=marked,
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
    value = {
        "args": collections.OrderedDict(pn="0.06M", model="2bc8", lr=1e-4, workers=2, fp16=True, none=None),
        "namespace": argparse.Namespace(
            lr=1e-4, device=torch.device("cpu"), nested=argparse.Namespace(dtype=torch.bfloat16)
        ),
        "omegaconf": omegaconf.OmegaConf.create({"a": {"b": [1, 2, "${a.c}"], "c": 3}}),
        "time": datetime.datetime(2026, 1, 2, 3, 4),
        "scalar": np.float64(0.5),
        "integer": np.int64(7),
        "array": np.arange(3),
        "size": torch.Size([2, 3]),
        "dtype": torch.float8_e4m3fn,
        "path": pathlib.PurePosixPath("a/b"),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": b"\x00\xff",
        "complex": 1 + 2j,
        "slice": slice(1, 2),
        "enum": {Mode.TRAIN: 1},
        "simple": types.SimpleNamespace(x=1),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2]),
        "milestones": [(1, 0.5), (2, 0.25)],
        "trainer": collections.defaultdict(dict, gpt_wo_ddp=state, gpt_opt=optimizer.state_dict()),
        "random": [torch.get_rng_state()[:8].clone()],
    }
    torch.save(value, DIRECTORY / "trainer_values.pth")


if __name__ == "__main__":
    main()
