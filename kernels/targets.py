"""The GPUs that kernels are compiled for, present or not, and the speeds that floors are made of.

The values are the device specifications that XLA keeps for its own cost model, and, for the H200,
two measurements: 790 TFLOP/s in bfloat16 matrix products and 4.3 TB/s in copies.
"""

from typing import NamedTuple


class Target(NamedTuple):
    """One GPU model.

    kind: JAX's `device_kind`.
    capability: (major, minor) of its compute capability.
    cores: streaming multiprocessors.
    fpus: float32 units of each.
    shared_per_core, shared_per_block: bytes of shared memory; a block's with opt-in.
    bandwidth: bytes/s by specification.
    l2: bytes of level-2 cache.
    clock_ghz: boost clock.
    memory: bytes of device memory.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    shared_per_core: int
    shared_per_block: int
    bandwidth: int
    l2: int
    clock_ghz: float
    memory: int

    def config_text(self) -> str:
        """XLA's GpuTargetConfigProto in text form: all its compiler needs of a GPU."""
        major, minor = self.capability
        feature = "NONE" if major < 9 else "ACCELERATED_FEATURES"
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  shared_memory_per_core: {self.shared_per_core}
  shared_memory_per_block_optin: {self.shared_per_block}
  shared_memory_per_block: 49152
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.kind}"
"""


TARGETS = {
    "h200": Target(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 233472, 232448, 4_800_000_000_000, 52428800,
        1.98, 151397597184,
    ),
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 3_352_320_000_000, 52428800,
        1.98, 84942979072,
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 2_039_040_000_000, 41943040,
        1.41, 85100068864,
    ),
    "b200": Target(
        "NVIDIA B200", (10, 0), 148, 128, 233472, 232448, 7_672_320_000_000, 132644864,
        1.965, 191514411008,
    ),
}  # fmt: skip

# What one H200 reaches: measured matrix products in bfloat16 and copies; FP8 is assumed from what
# published FP8 kernels reach on the same chip.
H200_BF16_FLOPS = 790e12
H200_FP8_FLOPS = 1400e12
H200_BYTES_PER_S = 4.3e12


def floor_seconds(flops: float, bytes_moved: float, *, fp8: bool = False) -> float:
    """The least time one H200 needs: the larger of arithmetic and memory traffic."""
    peak = H200_FP8_FLOPS if fp8 else H200_BF16_FLOPS
    return max(flops / peak, bytes_moved / H200_BYTES_PER_S)
