"""Packaging; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read rather than imported: building the package must not need what it depends on.
VERSIONS = dict(
    re.findall(r'^(\w+) = "(.+)"$', (ROOT / "fairseq_sparsemixer/version.py").read_text(), re.M)
)

setup(
    name="fairseq-sparsemixer",
    version=VERSIONS["__version__"],
    description="SparseMixer mixture-of-experts translation models for fairseq",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_sparsemixer", "fairseq_sparsemixer.*"]),
    package_data={
        "fairseq_sparsemixer.report": ["*.css", "*.j2"],
        "fairseq_sparsemixer.serving": ["page.*"],
    },
    python_requires=f">={VERSIONS['MINIMUM_PYTHON']},<{VERSIONS['TOO_NEW_PYTHON']}",
    install_requires=[
        # fairseq's own releases fail at import on Python 3.11 (mutable dataclass defaults). On
        # Python 3.10 and before, its last one (0.12.2) builds no encoder layer whose feed-forward
        # network is not two matrices, and needs hydra 1.0.
        f"ve-fairseq=={VERSIONS['FAIRSEQ']}",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        "sacrebleu>=2.3",
        "sentencepiece>=0.1.99",
        "scikit-learn>=1.0",
        # Tried on a CPU: see docs/reliability.md, and what scripts/constraints.txt names (every
        # test); on a GPU: 2.11.0 with Triton 3.6.0.
        f"torch>={VERSIONS['MINIMUM_TORCH']}",
        "tqdm",
    ],
    extras_require={
        "dev": [
            "hydra-submitit-launcher",
            "hypothesis",
            "jinja2",
            "matplotlib",
            "mypy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pypdf",
            "pytest>=7",
            "pytest-xdist",
            "ruff",
            "sacremoses>=0.2",
            "selenium>=4.6",  # drives the browser that looks at reports
            "subword-nmt",
            "tensorboardX",
            "transformers>=5",  # export, and an independent SparseMixer-v2 to test against
            # Its interpreter runs the kernels on a CPU.
            "triton>=3.2; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
        "export": ["transformers>=5"],
        "onnx": ["onnx", "onnxruntime", "onnxscript", "transformers>=5"],
        "report": ["jinja2", "matplotlib", "tensorboardX"],
        "sharded": ["fairscale>=0.4.13"],  # --ddp-backend fully_sharded
        "slurm": ["hydra-submitit-launcher"],
        # PyTorch's CUDA builds for Linux bring the version that they were built for.
        "triton": ["triton>=3.2; sys_platform == 'linux'"],
        "wmt": ["sacremoses>=0.2", "subword-nmt"],  # the pipeline `moses`
    },
    entry_points={"console_scripts": ["fairseq-sparsemixer=fairseq_sparsemixer.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
