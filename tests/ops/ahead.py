"""Ahead-of-time compilation of a training step for absent hardware: `python ahead.py tpu|gpu MIXER`."""

import json
import os
import sys

TARGET = sys.argv[1]
if TARGET == "tpu":
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from configs import base  # noqa: E402
from efficientllm import sharding  # noqa: E402
from efficientllm.architecture import from_config  # noqa: E402
from efficientllm.runtime import kernel_choice  # noqa: E402
from efficientllm.train import step  # noqa: E402

# An H100, as the compiler wants it told (NVIDIA H100 datasheet and CUDA programming guide, compute capability 9.0).
H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
 platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H100" """


def devices():
    """Eight devices of the target."""
    if TARGET == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    options = {"topology_name": "one host", "topology": "1x1x8", "target_config": H100}
    return topologies.get_topology_desc(platform="cuda", **options).devices


def main():
    config = base.get_config()
    config.model.size = "tiny(num_layers=2, dim=256, num_heads=4, num_kv_heads=2, head_dim=64)"
    config.model.precision, config.model.mixer = "bfloat16", sys.argv[2]
    lm = from_config.from_config(config.model, 1024)
    mesh = sharding.make_mesh("data=2, fsdp=2, tensor=2", list(devices()))
    with jax.set_mesh(mesh), kernel_choice.compiling_for(TARGET), kernel_choice.recording_kernels() as used:
        abstract = jax.eval_shape(step.init_state(lm, config.train, 0, 256))
        where = sharding.shardings(abstract, mesh)
        train = step.jit_train_step(lm, config.train, mesh, where)
        dtypes = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct((8, 256), dtype) for name, dtype in dtypes.items()}
        unboxed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nn.unbox(abstract))
        text = train.lower(unboxed, batch).compile().as_text()
    calls = [name for name in ("tpu_custom_call", "__cudnn$fmha") if name in text]
    print(json.dumps({"used": {key: sorted(value) for key, value in used.items()}, "calls": calls}))


if __name__ == "__main__":
    main()
