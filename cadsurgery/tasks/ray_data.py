"""Predict pictures by Ray on one machine or many: a class for `map_batches` of Ray Data, and `cadsurgery run --ray`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from cadsurgery.data.images import encode_png
from cadsurgery.support.errors import CadError, InvalidInput, check_name, first_line, import_optional
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.journal import Item
from cadsurgery.tasks.predictor import PredictionSettings
from cadsurgery.tasks.report import FilesReport
from cadsurgery.tasks.workers import Block, Submit, do_block

__all__ = ["Predict", "connect"]
_LISTED = 1000  # failures that a report has


class Predict:
    """Predict the pictures in a column of a dataset: a class for `ray.data.Dataset.map_batches`.

    Each actor opens the converted file once and uses one thread; on a GPU give `num_gpus=1` and `device="cuda"`.

    The column `bytes` holds picture files, as `ray.data.read_binary_files` reads them, or the column `image` arrays
    (H, W, 3) uint8, as `ray.data.read_images` does. It is replaced by `prediction`, a PNG file of the classes or an
    array (H, W); `active_fraction`, missing for networks of other methods; and `error`. A picture that failed has an
    error and no prediction. Other columns stay::

        pictures = ray.data.read_parquet("pictures").map_batches(
            cadsurgery.ray.Predict,
            fn_constructor_args=("net.safetensors",),
            batch_size=32,
            compute=ray.data.ActorPoolStrategy(size=4),
        )
    """

    def __init__(self, file: str, *, prediction: str = "png", **options: Any) -> None:
        """Open a converted file.

        Args:
            file: the converted file, or its address on the Hub; each machine must be able to read it.
            prediction: "png", or "array" of class numbers.
            options: `mask`, `size`, `device`, `view`, `batch`, `trust` and others of `cadsurgery run`.

        Raises:
            InvalidInput: there is no such form of a prediction.
            CadError: the file cannot be opened.
        """
        check_name("form of predictions", prediction, ("png", "array"))
        self._form = encode_png if prediction == "png" else np.asarray
        conversion = {"normalisation": options.pop("normalisation", None)}
        settings = PredictionSettings(file, RunOptions(**{"conversion": conversion, **options}))
        self._predictor = settings.with_one_thread()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a batch, with predictions in place of the pictures.

        Raises:
            InvalidInput: the batch has no column of pictures.
        """
        column = "bytes" if "bytes" in batch else "image"
        if column not in batch:
            raise InvalidInput(
                f"there is no column bytes or image among {', '.join(batch)}.",
                next="rename that of the pictures: rename_columns.",
            )
        items = [Item(0, "the picture", "", _content(value)) for value in batch[column]]
        rows = [
            row for _, row in self._predictor.rows(items, lambda drawn, _: {"prediction": self._form(drawn)})
        ]
        return {
            **{name: values for name, values in batch.items() if name != column},
            "prediction": [row.get("prediction") for row in rows],
            "active_fraction": [row.get("active_fraction", math.nan) for row in rows],
            "error": [str(CadError.from_dict(row)) if "error" in row else None for row in rows],
        }


def _content(value: Any) -> bytes:
    """Return a picture as a file; an array of another kind becomes none that can be read."""
    if isinstance(value, bytes):
        return value
    buffer, values = io.BytesIO(), np.asarray(value)
    if values.dtype == np.uint8 and values.shape[2:] == (3,):
        Image.fromarray(values).save(buffer, "PPM")
    return buffer.getvalue()


@contextmanager
def tasks(address: str, settings: PredictionSettings, work: bytes, count: int) -> Iterator[Submit]:
    """Start processes of Ray, each of which opens the file once; what a lost machine had in work is done by others.

    Each machine must be able to read the converted file and the pictures and to write the predictions at their paths.
    """
    ray = connect(address)
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    task = ray.remote(**_resources(settings), max_calls=0)(do_block)
    sent = ray.put(work)

    def call(block: Block) -> bytes:
        try:
            return bytes(ray.get(task.remote(sent, block)))
        except lost as error:
            raise BrokenExecutor(first_line(error)) from error

    with ThreadPoolExecutor(count) as threads:
        yield lambda block: threads.submit(call, block)


def predict_tables(
    sources: Sequence[str], output: str, settings: PredictionSettings, address: str, workers: int | None
) -> FilesReport:
    """Predict the pictures in Parquet files as `Predict` does, and write its columns as Parquet into a folder.

    Raises:
        InvalidInput: the folder exists.
        NotInstalled: Ray is not installed.
    """
    ray = connect(address)
    most = workers or count_processes(address, settings)
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most)
    predicted = ray.data.read_parquet([*sources]).map_batches(
        Predict,
        fn_constructor_args=(settings.file,),
        fn_constructor_kwargs=vars(settings.options),
        batch_size=64,
        compute=actors,
        **_resources(settings),
    )
    try:
        predicted.write_parquet(output, mode=ray.data.SaveMode.ERROR)
    except ValueError as error:
        raise InvalidInput(f"{output} is there already.", next="choose another --output.") from error
    errors = [row["error"] for row in ray.data.read_parquet(output).select_columns(["error"]).iter_rows()]
    failed = [error for error in errors if error is not None]
    counts = len(errors) - len(failed), len(failed)
    listed = [{"image": output, "error": "CadError", "what": error} for error in failed[:_LISTED]]
    return FilesReport((), f"{counts[0]} done, {counts[1]} failed: {output}", tuple(listed), counts=counts)


def _resources(settings: PredictionSettings) -> dict[str, int]:
    return {"num_gpus": 1} if settings.options.device.startswith("cuda") else {"num_cpus": 1}


def count_processes(address: str, settings: PredictionSettings) -> int:
    """Return the number of cores of a cluster, or that of its GPUs."""
    kind = "GPU" if settings.options.device.startswith("cuda") else "CPU"
    return max(1, int(connect(address).cluster_resources().get(kind, 1)))


def connect(address: str) -> Any:
    """Return the module `ray`, connected to a cluster: `local`, `auto`, or an address.

    Raises:
        CadError: Ray is not installed, or there is no such cluster.
    """
    what, remedy = "--ray needs Ray Data, which is not installed.", "pip install 'cadsurgery[scale]'"
    ray, _ = (import_optional(module, what, remedy) for module in ("ray", "ray.data"))
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"there is no cluster of Ray at {address}.",
                why=first_line(error),
                next="start one: ray start --head; or use this machine: --ray local.",
            ) from error
    return ray
