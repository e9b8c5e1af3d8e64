"""How large pictures may be."""

from __future__ import annotations

from pathlib import Path

from cadsurgery.support.errors import FileError

SIDE = 2**14
MOST_PIXELS = SIDE**2  # of pictures that are read, generated or resized: 1 GiB for each band as float32


def check_pixels(path: Path | str, height: int, width: int) -> None:
    """Refuse a picture's file that holds more than `MOST_PIXELS`.

    Raises:
        FileError: see above.
    """
    if height * width > MOST_PIXELS:
        raise FileError(
            f"{path} has {width} x {height} pixels.",
            why=f"at most {MOST_PIXELS} are read, e.g. {SIDE}x{SIDE}: that takes 1 GiB for each band.",
            next="cut it into tiles, or make it smaller.",
        )
