#!/usr/bin/env bash
# Runs one `univg` command on every host of a Cloud TPU VM, from a machine with gcloud:
#   launch/tpu_vm.sh NAME ZONE train --config=experiments/stage1_t2i.py:size=xl,res=256 --workdir=gs://BUCKET/stage1
# Every host must have this repository in ~/univg_jax, installed in its .venv (BUILD.md says how).
set -euo pipefail
if (($# < 3)); then
  echo "usage: $0 NAME ZONE COMMAND [FLAG...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd univg_jax && .venv/bin/univg$(printf ' %q' "$@") --distributed"
