"""Predict pictures by Ray Data on one machine or many: a class for `map_batches`, and `cadsurgery run --ray`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from cadsurgery.data.images import encode_png, read_image, to_tensor
from cadsurgery.support.errors import InvalidInput, check_name, import_optional
from cadsurgery.support.pipeline import ahead
from cadsurgery.tasks.predictor import Item, Picture, Row, Settings
from cadsurgery.tasks.report import FilesReport

__all__ = ["Predict"]
_BATCHES = 32  # in a block: Ray takes tens of milliseconds for each, and actors wait for the last one
_LISTED = 1000  # failures that a report has
_Batch = Mapping[str, Any]  # columns by name


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

    def __init__(self, file: str, *, column: str = "", prediction: str = "png", **options: Any) -> None:
        """Open a converted file.

        Args:
            file: the converted file, or its address on the Hub; each machine must be able to read it.
            column: column of the pictures; default: `bytes` or else `image`.
            prediction: "png", or "array" of class numbers.
            options: `mask`, `size`, `device`, `view`, `batch`, `trust` and others of `cadsurgery run`, see `Settings`.

        Raises:
            InvalidInput: there is no such form of a prediction.
            CadError: the file cannot be opened.
        """
        check_name("form of predictions", prediction, ("png", "array"))
        self._column, self._form = column, prediction
        self._predictor = Settings(file, **options).with_one_thread()

    def __call__(self, batch: _Batch) -> dict[str, Any]:
        """Return the columns of a batch, with predictions in place of the pictures.

        Raises:
            InvalidInput: the batch has no column of pictures.
        """
        column = self._column or ("bytes" if "bytes" in batch else "image")
        if column not in batch:
            raise InvalidInput(
                f"there is no column {column} among {', '.join(batch)}.",
                next="name that of the pictures: column=...",
            )
        pictures = list(self._predictor.predict(ahead(enumerate(batch[column]), self._read)))
        return {
            **{name: values for name, values in batch.items() if name != column},
            "prediction": [self._form_of(picture) for picture in pictures],
            "active_fraction": [picture.details.get("active_fraction", math.nan) for picture in pictures],
            "error": [picture.error and str(picture.error) for picture in pictures],
        }

    def _read(self, numbered: tuple[int, Any]) -> Picture:
        picture, size = Picture(Item(numbered[0], "the picture")), self._predictor.settings.size
        with picture.noting():
            if isinstance(numbered[1], bytes):
                picture.pixels = read_image(picture.item.source, size, content=numbered[1])
            else:
                picture.pixels = to_tensor(_as_image(numbered[1]), size)
        return picture

    def _form_of(self, picture: Picture) -> Any:
        if picture.error is not None or picture.pixels is None:
            return None
        if self._form == "array":
            return picture.classes.to("cpu", torch.int32).numpy()
        return encode_png(self._predictor.draw(picture.pixels, picture.classes, picture.channels))


def _as_image(value: Any) -> Image.Image:
    values: Any = np.asarray(value)
    if values.dtype != np.uint8 or values.shape[2:] != (3,):
        raise InvalidInput(
            f"a picture is an array {values.shape} of {values.dtype}.",
            next="give bytes of a file, or (H, W, 3) uint8.",
        )
    return Image.fromarray(values)


class _Work:
    """An actor of `predict_over_ray`: takes the columns of items, and gives their rows as JSON."""

    def __init__(self, settings: Settings) -> None:
        self._predictor = settings.with_one_thread()

    def __call__(self, batch: _Batch) -> dict[str, list[str]]:
        items = map(Item, *(batch[name].tolist() for name in Item._fields))
        return {"answer": [json.dumps(answer) for answer in self._predictor.rows(items)]}


def predict_over_ray(
    items: Iterator[Item], settings: Settings, address: str, workers: int | None
) -> Iterator[tuple[int, Row]]:
    """Yield position and row of each picture as it is finished; actors of Ray write the predictions.

    Each machine must be able to read the converted file and the pictures and to write the predictions at their paths.
    What a machine had not finished when it was lost is done by others.

    Args:
        items: the pictures.
        settings: what predictions are made by.
        address: `local`, `auto`, or that of a cluster.
        workers: number of actors; None for one each core, or each GPU.

    Raises:
        CadError: Ray is not installed.
    """
    ray = _connect(address)
    import pyarrow

    blocks = [
        pyarrow.table([*map(list, zip(*block, strict=True))], Item._fields)
        for block in settings.in_blocks(items, _BATCHES)
    ]
    if blocks:
        actors = _actors(ray, settings, workers)
        rows = ray.data.from_arrow(blocks).map_batches(
            _Work, fn_constructor_args=(settings,), batch_size=None, **actors
        )
        for row in rows.iter_rows():
            yield json.loads(row["answer"])


def predict_tables(
    sources: Sequence[str], output: str, settings: Settings, address: str, workers: int | None
) -> FilesReport:
    """Predict the pictures in Parquet files as `Predict` does, and write its columns as Parquet into a folder.

    Raises:
        InvalidInput: the folder exists.
        CadError: Ray is not installed.
    """
    ray = _connect(address)
    predicted = ray.data.read_parquet([*sources]).map_batches(
        Predict, fn_constructor_kwargs=vars(settings), batch_size=64, **_actors(ray, settings, workers)
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


def _actors(ray: Any, settings: Settings, workers: int | None) -> dict[str, Any]:
    """Return what a dataset is told about its actors: as many as there are cores, or GPUs."""
    kind = "GPU" if settings.device.startswith("cuda") else "CPU"
    most = workers or max(1, int(ray.cluster_resources().get(kind, 1)))
    return {
        "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        f"num_{kind.lower()}s": 1,
    }


def _connect(address: str) -> Any:
    what, remedy = "--ray needs Ray Data, which is not installed.", "pip install 'cadsurgery[scale]'"
    ray, _ = (import_optional(module, what, remedy) for module in ("ray", "ray.data"))
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"there is no cluster of Ray at {address}.",
                why=str(error).splitlines()[0],
                next="start one: ray start --head; or use this machine: --ray local.",
            ) from error
    return ray
