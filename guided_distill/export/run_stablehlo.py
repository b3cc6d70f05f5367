"""Samples an exported student with jax alone, without the package that made it: python run_stablehlo.py [NAME [W]]."""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np

HERE = pathlib.Path(__file__).parent
FUNCTIONS = json.loads((HERE / "stablehlo" / "stablehlo.json").read_text())["functions"]


def load(name):
    """The function of that name: it takes the inputs that stablehlo.json lists, by their names."""
    content = (HERE / "stablehlo" / FUNCTIONS[name]["file"]).read_bytes()
    return jax.jit(jax.export.deserialize(bytearray(content)).call)


if __name__ == "__main__":
    name = sys.argv[1] if sys.argv[1:] else next(iter(FUNCTIONS))
    about, w = FUNCTIONS[name], float(sys.argv[2]) if sys.argv[2:] else 1.0
    keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(0), k))(np.arange(16))  # one for each image
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), about["sample_shape"]))
    label = np.arange(16, dtype=np.int32) % about["num_classes"]
    inputs = {"noise": about["noise_std"] * draw(keys), "label": label, "w": np.full(16, w, np.float32)}
    if "keys" in about["inputs"]:
        inputs["keys"] = jax.random.key_data(keys)
    np.savez("samples.npz", x=load(name)(**inputs), label=label)
