#!/bin/bash
# A TPU slice of several hosts, such as v5e-64 (16 of them):   TPU=NAME ZONE=europe-west4-b bash docs/launch/tpu_pod.sh
# Every host runs the same command; the processes find each other by the metadata of their machines.
set -euo pipefail

: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"
: "${MOUNT:=/mnt/runs}"                       # a Filestore or bucket mount that all hosts have
: "${FOLDER:=llavamed-jax}"                   # of this project, in the home of each host, with its .venv (make setup ACCEL=tpu)
: "${RECIPE:=configs/finetune.py:v15,7b}"

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    cd $FOLDER && export JAX_COMPILATION_CACHE_DIR=$MOUNT/programs &&
    .venv/bin/python train.py --config $RECIPE --workdir $MOUNT/finetune \
        --config.init=$MOUNT/pretrain --config.data.train=$MOUNT/data/instruct.json --config.data.images=$MOUNT/data/images \
        --config.mesh.data=1 --config.mesh.fsdp=-1"
# Status 75: a host was told to stop, all saved at one step, and the same command goes on from there.
