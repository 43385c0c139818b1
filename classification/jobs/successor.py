"""Submits the job that continues another one, which stopped and may not be requeued; train_mimic.sbatch runs this.

    python jobs/successor.py JOB train_mimic.sbatch ARGUMENTS...

It asks for what JOB was given, starts after it, and takes over the jobs that wait for it. Its number is printed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

# Fields of `scontrol show job` and the options of sbatch that set them. Not shown, so not kept: --signal, which is in
# the script's header; begin and dependency have passed.
OPTIONS = {
    "Account": "account", "QOS": "qos", "WCKey": "wckey", "Partition": "partition", "Reservation": "reservation",
    "Licenses": "licenses", "Features": "constraint", "ReqNodeList": "nodelist", "ExcNodeList": "exclude",
    "NumNodes": "nodes", "NumTasks": "ntasks", "NtasksPerN:B:S:C": "ntasks-per-node", "NtasksPerTRES": "ntasks-per-gpu",
    "CPUs/Task": "cpus-per-task", "CpusPerTres": "cpus-per-gpu", "MinCPUsNode": "mincpus",
    "MinMemoryNode": "mem", "MinMemoryCPU": "mem-per-cpu", "MemPerTres": "mem-per-gpu", "MinTmpDiskNode": "tmp",
    "TresPerJob": "gpus", "TresPerNode": "gres", "TresPerSocket": "gpus-per-socket", "TresPerTask": "gpus-per-task",
    "TresBind": "gpu-bind", "TresFreq": "gpu-freq", "GresEnforceBind": "gres-flags", "Network": "network",
    "ReqB:S:C:T": "extra-node-info", "CoreSpec": "core-spec", "Contiguous": "contiguous", "Switches": "switches",
    "SpreadJob": "spread-job", "OverSubscribe": "exclusive", "Requeue": "no-requeue", "Nice": "nice",
    "TimeLimit": "time", "TimeMin": "time-min", "Deadline": "deadline",
    "JobName": "job-name", "Comment": "comment", "MailUser": "mail-user", "MailType": "mail-type",
    "WorkDir": "chdir", "StdOut": "output", "StdErr": "error",
}  # fmt: skip


def options(shown, number):
    """Options of sbatch, a list, that ask for what the job was given.

    shown: what `scontrol show job` prints of it; number: its SLURM_JOB_ID, the %j of its log's name.
    """
    fields = dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)", shown))
    # These end their line, and may hold spaces.
    fields |= dict(re.findall(r"(?:^|\s)(JobName|Comment|WorkDir|StdOut|StdErr)=(.*?) *$", shown, re.MULTILINE))
    fields = {k: v for k, v in fields.items() if v not in ("", "(null)", "N/A", "NONE", "*")}
    totals = {"CpusPerTres": "CPUs/Task", "MemPerTres": "MinMemoryNode", "NtasksPerTRES": "NumTasks"}
    for field in totals.keys() & fields:
        fields.pop(totals[field], None)
    fields.setdefault("MailType", "NONE")  # the script's header asks for mail
    if fields.get("StdErr") == fields.get("StdOut"):
        fields.pop("StdErr", None)
    values = {option: _value(field, fields.get(field, ""), number) for field, option in OPTIONS.items()}
    return [f"--{option}={value}" if value else f"--{option}" for option, value in values.items() if value is not None]


def _value(field, text, number):
    """The value of the option of a field; "" for one without, None to leave it out."""
    if not text:
        return None
    if field == "TresPerNode":
        return re.sub(r"gres[:/]", "", text)
    if "Tres" in field:  # gres:gpu:a100:2 or gres/gpu:a100:2, for a processor or a GPU also with "="
        gpus = re.search(r"gpu(?:[:=]([^,]*))?", text)
        return (gpus[1] or "1") if gpus else None
    match field:
        case "OverSubscribe":
            return {"NO": "", "USER": "user", "MCS": "mcs"}.get(text)
        case "Requeue":
            return "" if text == "0" else None
        case "GresEnforceBind":
            return "enforce-binding"
        case "SpreadJob" | "Contiguous":
            return None if text == "0" else ""
        case "NtasksPerN:B:S:C":
            return text.split(":")[0].replace("0", "") or None
        case "ReqB:S:C:T":
            threads = text.split(":")[1:]
            return None if threads == ["0", "*", "*"] else ":".join("*" if n == "0" else n for n in threads)
        case "StdOut" | "StdErr":
            path = Path(text)
            return str(path.with_name(re.sub(rf"(?<!\d){number}(?!\d)", "%j", path.name)))
        case "WCKey":
            return None if text.startswith("*") else text
        case "Nice" | "MinTmpDiskNode":
            return None if text == "0" else text
    return text


def main(job, script, *arguments):
    """Submits the successor of `job` and prints its number."""
    asked = options(_output("scontrol", "show", "job", job), os.environ["SLURM_JOB_ID"])
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        asked.append(f"--array={task}")
    submitted = _output("sbatch", "--parsable", f"--dependency=afterany:{job}", *asked, script, *arguments)
    successor = submitted.strip().split(";")[0] + (f"_{task}" if task else "")  # behind ; is the cluster, of several
    print(successor)
    for line in _output("squeue", "-h", "--me", "-t", "PD", "-o", "%i %E").splitlines():
        follower, waits_for = line.split(" ", 1)
        waits_for = re.sub(r"\(\w+\)", "", waits_for)  # afterok:7(unfulfilled),afterok:8(unfulfilled)
        moved = re.sub(rf"(?<=:){job}(?![\d_])", successor, waits_for)
        if moved != waits_for and follower != successor:
            subprocess.run(["scontrol", "update", f"JobId={follower}", f"Dependency={moved}"])


def _output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)  # beside the command's own message
        sys.exit(2)
