# shellcheck shell=bash
# Sets what XLA and NCCL read from the environment, for a kind of hardware; source it:
#
#     source launch/xla_flags.sh gpu      # or tpu; cpu and nothing at all change nothing
#
# What is set already is kept. No flags for XLA: on H200s (jax 0.11.2) none gained anything. XL-XXL
# over four GPUs, fsdp, 64 images each, takes 1161 ms a step by default and 1159 with
# --xla_gpu_enable_latency_hiding_scheduler=true and collectives combined up to 128 MiB; B-L over
# two, data, 480 and 497. On other machines, B-L, 487 by default: 486 with all-reduces of up to 256
# MiB, 490 with those of up to 1 MiB, 486 with collectives in CUDA graphs, 486 in a process per GPU.
# Between hosts nothing was measured: --xla_gpu_all_reduce_combine_threshold_bytes, and the two like
# it for all-gathers and reduce-scatters, are the first to try there.

case "${1:-}" in
gpu)
  # jax takes three quarters of a GPU's memory by itself, and a step is cut to what it is given. With
  # this, B-L takes 128 images at once on an H200 instead of 64: 3% more of them a second.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
  # NVLink multicast off: a crash while it is in use can leave all GPUs of a host out of service.
  export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
  ;;
tpu)
  # The TPU compiler overlaps collectives by itself. Large pages for what the host sends to the
  # chips; the setting lasts until the host restarts, and needs root.
  if [[ -w /sys/kernel/mm/transparent_hugepage/enabled ]]; then
    echo always >/sys/kernel/mm/transparent_hugepage/enabled
  fi
  ;;
cpu | "") ;;
*)
  echo "error: xla_flags.sh knows gpu, tpu and cpu, not '$1'" >&2
  return 1
  ;;
esac
