"""mosaicml's streaming data set, in its own environment, as a side of bench_stream."""

import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

from pipelines.bench import clock, private_stdout, serve

ANSWERS = private_stdout()

# Its package imports torchvision for image data sets, which are not used here; a build of it that
# does not fit torch would keep all of it from being imported.
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
    stub = types.ModuleType(name)
    stub.__spec__, stub.__version__ = ModuleSpec(name, None), "0"
    stub.VisionDataset, stub.to_tensor = type("VisionDataset", (), {}), MagicMock()
    sys.modules[name] = stub

import numpy as np  # noqa: E402
import torch  # noqa: E402
from streaming import MDSWriter, StreamingDataset  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

warnings.filterwarnings("ignore")
BATCHES = {}


def write(rows, out, context):
    """One sample a row, float16, no compression, crc-free: its fastest form."""
    x = np.load(rows, mmap_mode="r")
    with MDSWriter(out=out, columns={"x": f"ndarray:float16:{x.shape[1]}"}) as writer:
        for row in x:
            writer.write({"x": row})
    return {"rows": len(x)}


def read(out, rows, batch, threads):
    """Batches of shuffled rows, from where the last turn stopped."""
    torch.set_num_threads(threads)
    if out not in BATCHES:
        BATCHES[out] = endless(out, batch)
    done = 0
    with clock() as times:
        while done < rows:
            done += len(next(BATCHES[out])["x"])
    return times | {"tokens": done}


def endless(out, batch):
    """Epoch after epoch. Its workers would be stopped with this process only in part: none."""
    data = StreamingDataset(local=out, shuffle=True, batch_size=batch)
    while True:
        yield from DataLoader(data, batch_size=batch, num_workers=0)


if __name__ == "__main__":
    serve(ANSWERS, write=write, read=read)
