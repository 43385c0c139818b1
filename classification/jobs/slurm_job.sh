# What train_mimic.sbatch and eval_mimic.sbatch share; sourced by them inside a job, not run by itself.
# It reads the job's arguments ("$@") and mimic_settings.sh, and leaves MIMIC_PYTHON, `job` (its name to Slurm), settings_config, the arrays
# `first` and `last` (what main.py gets before and after the job's arguments), and the functions `launch` and `end_turn`.

fail() { printf '%s\n' "error: $*" >&2; exit 2; }

# Inside a job $0 is Slurm's copy of the script: the folder it was submitted from is the way back.
cd "${SLURM_SUBMIT_DIR:?these scripts run inside a Slurm job: sbatch train_mimic.sbatch}" || exit 2
[ -f main.py ] || fail "$PWD has no main.py: change to the folder classification/ and sbatch from there"
[ -f mimic_settings.sh ] || fail "$PWD/mimic_settings.sh is missing: run bash setup_mimic_env.sh first"
. ./mimic_settings.sh
[ -x "${MIMIC_PYTHON:-}" ] || fail "the Python of mimic_settings.sh, '${MIMIC_PYTHON:-}', does not exist any more: run bash setup_mimic_env.sh again"

value_of() { # --option "$@": the value of an option among arguments
  local option=$1 value=''
  shift
  while [ $# -gt 0 ]; do
    case $1 in "$option") value=${2:-} ;; "$option="*) value=${1#*=} ;; esac
    shift
  done
  printf '%s' "$value"
}
data_path=$(value_of --data-path "$@")
if [ -n "$data_path" ]; then
  [ -d "$data_path" ] || fail "--data-path $data_path is not a folder"
else
  data_path=${MIMIC_DATA_PATH:-}
  [ -d "$data_path" ] || fail "the data folder of mimic_settings.sh, '$data_path', does not exist: run bash setup_mimic_env.sh --data-path FOLDER"
fi

# All that activating the environment would do. The torch wheels bring their own CUDA libraries, so no module is needed.
export PATH=$(dirname "$MIMIC_PYTHON"):$PATH
# Where a site's sbatch exports nothing to jobs, srun would pass on nothing either, not even PATH.
export SLURM_EXPORT_ENV=ALL
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the cores belong to the loading processes
export PYTHONUNBUFFERED=1
export PYTHONNOUSERSITE=1  # an old package in ~/.local would come before the environment's
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # where a process ends, the others' C++ traces would bury why

# To Slurm's commands, the number of an array's last task means the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
echo "job $job (start $((${SLURM_RESTART_COUNT:-0} + 1))) on $SLURM_JOB_NODELIST, $(date '+%F %T')"
[ -z "${MIMIC_EMAIL:-}" ] || scontrol update "JobId=$job" "MailUser=$MIMIC_EMAIL" || true  # mail is a courtesy

on_each_node() { srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" "$@"; }
local_data=''
unstage() { [ -z "$local_data" ] || on_each_node rm -rf "$local_data" || true; local_data=''; }
# MIMIC_STAGE=1 sbatch ...: the data (the small copy, for example) is copied to each node's own disk first.
if [ "${MIMIC_STAGE:-0}" = 1 ]; then
  local_data=${TMPDIR:-/tmp}/mimic_$SLURM_JOB_ID
  data_path=$(cd "$data_path" && pwd)
  trap unstage EXIT
  echo "copying $data_path to $local_data on each node"
  on_each_node bash jobs/stage.sh "$data_path" "$local_data" ||
    fail "$data_path could not be copied to $local_data (see above), and the part of it is removed; submit without MIMIC_STAGE=1, or make a smaller copy"
  data_path=$local_data/$(basename "$(dirname "$data_path")")/$(basename "$data_path")
fi
settings_config=${MIMIC_CONFIG:-configs/internimage_b_mimic_cxr_224.yaml}
first=(--cfg "$settings_config")
last=(--data-path "$data_path")
# sbatch --array=0-2 ...: each task is a run of its own, of the seed that is its number.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  tag=$(value_of --tag "$@")
  last+=(--tag "${tag:+${tag}_}seed$SLURM_ARRAY_TASK_ID" --opts SEED "$SLURM_ARRAY_TASK_ID")
fi

# main.py on every GPU of the job: one srun task a node, whose jobs/launch.py starts a process for each GPU.
# It replaces its shell, so that a signal to the background process $! reaches srun: call it with & or in ( ).
launch() {
  # Ignored until the training processes set their handlers: during the imports USR1 would end them.
  exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'trap "" USR1; exec "$0" -m jobs.launch main.py "$@"' "$MIMIC_PYTHON" "${first[@]}" "$@" "${last[@]}"
}

end_turn() {
  unstage
  echo "job $job ended its turn after $SECONDS s, $(date '+%F %T')"
  sacct -n -j "$job" --format=JobID%20,Elapsed,TotalCPU,MaxRSS,State 2>/dev/null || true  # not every site keeps accounts
}
