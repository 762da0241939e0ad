# shellcheck shell=bash
# Sets the flags of XLA and NCCL for a kind of hardware; source it:
#
#     source launch/xla_flags.sh gpu      # or tpu; cpu and nothing at all change nothing
#
# What is set already is kept, behind ours, where the last one counts. XLA refuses a flag that it
# does not know, so tests/test_launch.py starts jax with all of these. Effect of those for GPUs:
# B-L over two H200s, data, took 480 ms a step without them and 497 with all (about 4 ms of it from
# another way to measure). On other machines 487 without; 486 with all-reduces of up to 256 MiB, 490
# with those of up to 1 MiB; 486 with collectives in CUDA graphs, or in a process per GPU. So the
# defaults serve data; XL-XXL over four, fsdp, was measured with these flags only (README).

case "${1:-}" in
gpu)
  flags=(
    # Collectives run beside the computation that does not need them yet. Matters from two GPUs on;
    # costs some memory.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # Gradients travel in pieces of up to 128 MiB: few enough to fill a link, many enough to start
    # before the backward pass ends. The default is 30 MiB and less.
    --xla_gpu_all_reduce_combine_threshold_bytes=134217728
    --xla_gpu_all_gather_combine_threshold_bytes=134217728
    --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  )
  export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
  # jax takes three quarters of a GPU's memory by itself; a step is cut to what it is given.
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
