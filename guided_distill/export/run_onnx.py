"""Samples an exported student with onnxruntime alone, without its maker: python run_onnx.py [NAME [W]]."""

import json
import pathlib
import sys

import numpy as np
import onnxruntime

HERE = pathlib.Path(__file__).parent
FUNCTIONS = json.loads((HERE / "onnx" / "onnx.json").read_text())["functions"]


def load(name):
    """The function of that name: it takes the inputs of onnx.json by their names, and returns {name: output}."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of constants that the converter has left over
    file, outputs = HERE / "onnx" / FUNCTIONS[name]["file"], list(FUNCTIONS[name]["outputs"])
    session = onnxruntime.InferenceSession(file, options, providers=onnxruntime.get_available_providers())
    return lambda **inputs: dict(zip(outputs, session.run(outputs, inputs), strict=True))


if __name__ == "__main__":
    name = sys.argv[1] if sys.argv[1:] else next(iter(FUNCTIONS))
    about, w = FUNCTIONS[name], float(sys.argv[2]) if sys.argv[2:] else 1.0
    noise = np.random.default_rng(0).standard_normal((16, *about["sample_shape"]), np.float32)
    label = np.arange(16, dtype=np.int32) % about["num_classes"]
    x = load(name)(noise=about["noise_std"] * noise, label=label, w=np.full(16, w, np.float32))["x"]
    np.savez("samples.npz", x=x, label=label)
