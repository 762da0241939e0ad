#!/usr/bin/env bash
# One run on all hosts of a TPU slice, or of N with --config.mesh.dcn=N, made with `gcloud`:
#
#     launch/tpu_pod.sh NAME ZONE --config=configs/xlxxl.py --workdir=/mnt/runs/xlxxl
#
# Each host has this repository and its requirements in ~/gigatok_jax (FOLDER for elsewhere). The
# same command resumes. Hosts that lose each other or hang start again by themselves, RESTARTS times
# at most. A slice that was preempted has to be made again first. Ctrl-C ends only the connection;
# to end the run, with its state saved:
#
#     launch/tpu_pod.sh NAME ZONE --stop
set -euo pipefail

if (($# < 3)); then
  echo "error: expected NAME ZONE and the arguments of main.py" >&2
  exit 1
fi
name=$1 zone=$2
shift 2

if [[ $1 == --stop ]]; then
  # shellcheck disable=SC2016 # for the hosts
  command='kill -TERM "$(cat ~/.gigatok_jax.pid)"'
else
  printf -v arguments ' %q' "$@"
  # The process of each host is known by its file; its status says whether another try may help.
  command="
    cd ${FOLDER:-gigatok_jax} && source launch/xla_flags.sh tpu || exit 1
    for try in \$(seq 0 ${RESTARTS:-50}); do
      ${PYTHON:-python3} main.py$arguments &
      echo \$! >~/.gigatok_jax.pid
      status=0; wait \$! || status=\$?
      case \$status in 75 | 134 | 137) echo \"status \$status: starts again\" ;; *) break ;; esac
    done
    exit \$status"
fi
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
