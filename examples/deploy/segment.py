"""An image in, its classes out, with numpy and ONNX Runtime alone: python segment.py net.onnx photo.jpg classes.png"""

import json
import sys

import numpy
import onnxruntime
from PIL import Image, ImageOps

file, photo, result = sys.argv[1:]
session = onnxruntime.InferenceSession(file)
expected = json.loads(session.get_modelmeta().custom_metadata_map["cadsurgery.images"])

image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
height, width = session.get_inputs()[0].shape[2:]
if isinstance(height, int):  # a file for one size; one for any has names here
    image = image.resize((width, height))
pixels = (numpy.asarray(image) / 255 - expected["mean"]) / expected["std"]
batch = pixels.astype(numpy.float32).transpose(2, 0, 1)[None]  # (1, 3, H, W)

scores, *_, levels = session.run(None, {"image": batch})  # (1, classes, H, W) and the level map (1, h, w)
Image.fromarray(scores[0].argmax(0).astype(numpy.uint8)).save(result)
print(f"{result}: {(levels == 0).mean():.0%} of the image at high resolution")
