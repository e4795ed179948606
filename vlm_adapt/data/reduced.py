"""JPEGs decoded at a half, a quarter or an eighth of their size, for pictures much smaller than the file.

Knows JPEG files; everything else is decoded whole and thinned out here. Knows nothing about what the pixels
are for. The decoder leaves out the finest detail of each block of 8 x 8, which is an antialiased reduction.
"""

from __future__ import annotations

import numpy as np

from vlm_adapt.data.images import MAX_PIXELS, _check_size, _orientation, decode
from vlm_adapt.data.problems import BadSample


def reducible(data: bytes) -> bool:
    """Whether `decode_reduced` can reduce an image: a JPEG that lies upright, in RGB or grey.

    In a turned one the last block would come first, and pixels of a file whose sides the factor does not
    divide would no longer lie under their mask.
    """
    if not data.startswith(b"\xff\xd8") or _orientation(data) > 1:
        return False
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK")
    except ValueError:
        return False


def decode_reduced(data: bytes, factor: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image at a fraction of its sides.

    Args:
        data: the file; `reducible` unless the factor is 1.
        factor: 1, 2, 4 or 8; sides are rounded up.

    Returns:
        pixels_HWC, uint8, in memory that this thread's next call may overwrite.

    Raises:
        BadSample: as `decode`.
    """
    if factor == 1:
        return decode(data, max_pixels, passing=True)
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, max_pixels)
    try:
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor), min_factor=factor
        )
    except ValueError as error:
        raise BadSample("damaged JPEG image", str(error)) from error
