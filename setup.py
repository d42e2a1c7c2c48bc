"""pip install -e .            the core
pip install -e '.[test]'       with what the tests need; further extras below."""

from setuptools import find_packages, setup

setup(
    name="clara-rag",
    version="0.1.0",
    description="CLaRa: retrieval-augmented generation in which a language model reads compressed documents",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    package_data={
        "evaluation": ["*.csv", "*.css", "*.js"],
        "openrlhf": ["serving/page/*"],
        "openrlhf.pipeline": ["*.css"],
    },
    packages=find_packages(include=["openrlhf", "openrlhf.*", "evaluation", "evaluation.*"]),
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0",
        "deepspeed>=0.18",
        "peft>=0.18",
        "accelerate>=1.10",
        "datasets>=4.0",
        "safetensors>=0.4",
        "numpy",
        "tqdm",
        "wandb",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "ray": ["ray[data]"],
        "eval": ["bm25s", "matplotlib", "scikit-learn", "sentence-transformers>=5.2", "llmlingua>=0.2.2", "spacy"],
        # Beside torchvision, and with the network, the package docling itself also gives its layout models.
        "pipeline": [
            "docling-slim[convert-core,format-pdf,format-office,format-web,feat-chunking,feat-ocr-rapidocr-onnx]>=2.143",
            "openai>=3.0",
            "bm25s",
            "filelock",
            "gguf>=0.17",
        ],
        "search": ["bm25s", "faiss-cpu"],
        "serve": ["fastapi>=0.110", "uvicorn>=0.29", "python-multipart>=0.0.9", "bm25s", "httpx"],
        "langchain": ["langchain-core>=0.3", "bm25s"],
        "llamaindex": ["llama-index-core>=0.12", "bm25s"],
        "test": [
            *("pytest", "pytest-timeout", "ruff", "mypy", "tensorboard"),
            *("matplotlib", "bm25s", "scikit-learn", "faiss-cpu"),
            *("langchain-core>=0.3", "llama-index-core>=0.12", "fastapi>=0.110", "uvicorn>=0.29", "httpx"),
            *("python-multipart>=0.0.9", "openai>=3.0"),
        ],
    },
)
