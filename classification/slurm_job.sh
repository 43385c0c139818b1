# What train_mimic.sbatch and eval_mimic.sbatch share; sourced by them inside a job, not run by itself.
# Leaves MIMIC_PYTHON, the array `data` (arguments of main.py) and the functions `launch` and `end_turn`.

fail() { printf '%s\n' "error: $*" >&2; exit 2; }

# Inside a job $0 is Slurm's copy of the script: the folder it was submitted from is the way back.
cd "${SLURM_SUBMIT_DIR:?these scripts run inside a Slurm job: sbatch train_mimic.sbatch}" || exit 2
[ -f main.py ] || fail "$PWD holds no main.py: change to the folder classification/ and sbatch from there"
[ -f mimic_settings.sh ] || fail "$PWD/mimic_settings.sh is missing: run bash setup_mimic_env.sh first"
. ./mimic_settings.sh
[ -x "${MIMIC_PYTHON:-}" ] || fail "the Python of mimic_settings.sh, '${MIMIC_PYTHON:-}', is gone: run bash setup_mimic_env.sh again"
[ -d "${MIMIC_DATA_PATH:-}" ] || fail "the data folder of mimic_settings.sh, '${MIMIC_DATA_PATH:-}', is not there: run bash setup_mimic_env.sh --data-path FOLDER"

# All that activating the environment would do. The torch wheels bring their own CUDA libraries, so no module is needed.
export PATH=$(dirname "$MIMIC_PYTHON"):$PATH
# Where a site's sbatch exports nothing to jobs, srun would pass on nothing either, not even PATH.
export SLURM_EXPORT_ENV=ALL
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the cores belong to the loading processes
export PYTHONUNBUFFERED=1

echo "job $SLURM_JOB_ID (start $((${SLURM_RESTART_COUNT:-0} + 1))) on $SLURM_JOB_NODELIST, $(date '+%F %T')"
[ -z "${MIMIC_EMAIL:-}" ] || scontrol update "JobId=$SLURM_JOB_ID" "MailUser=$MIMIC_EMAIL" || true  # mail is a courtesy

# MIMIC_STAGE=1 sbatch ...: the data (the small cache, say) is copied to each node's own disk first.
if [ "${MIMIC_STAGE:-0}" = 1 ]; then
  local_data=${TMPDIR:-/tmp}/mimic_$SLURM_JOB_ID
  echo "copying $MIMIC_DATA_PATH to $local_data on each node"
  srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" bash -c 'mkdir -p "$1" && cp -ru "$0/." "$1/"' "$MIMIC_DATA_PATH" "$local_data" ||
    fail "the data does not fit on the node's disk ($local_data); submit without MIMIC_STAGE=1, or make a smaller cache"
  MIMIC_DATA_PATH=$local_data
fi
data=(--cfg "${MIMIC_CONFIG:-configs/internimage_b_mimic_cxr_224.yaml}" --data-path "$MIMIC_DATA_PATH")

# main.py on every GPU of the job: one srun task a node, whose torchrun starts a process for each GPU.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# It replaces its shell, so that a signal to the background process $! reaches srun: call it with & or in ( ).
launch() {
  # The port follows the job: a fixed one collides with other jobs on the node.
  # torchrun dies of USR1 unless it ignores it; the training processes set their own handler.
  exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'trap "" USR1; exec "$0" -m torch.distributed.run --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" "$@"' "$MIMIC_PYTHON" \
    --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint "$head_node:$((20000 + SLURM_JOB_ID % 20000))" main.py "$@"
}

end_turn() {
  [ "${MIMIC_STAGE:-0}" != 1 ] || srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" rm -rf "$local_data" || true
  echo "job $SLURM_JOB_ID ended its turn after $SECONDS s, $(date '+%F %T')"
  sacct -n -j "$SLURM_JOB_ID" --format=JobID%20,Elapsed,TotalCPU,MaxRSS,State 2>/dev/null || true  # not every site keeps accounts
}
