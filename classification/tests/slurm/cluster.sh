#!/usr/bin/env bash
# A real Slurm of four nodes on the loopback device, for tests: cluster.sh up|down FOLDER. Needs root.
# The nodes n1 to n4 are slurmds on this machine with four pretended A100s each (/dev/null behind them). n3 (partition
# frail) is there to be killed and n4 (lent, owners) to be taken away, so that no job on n1 and n2 notices.
set -euo pipefail
lab=$2 self=$(hostname -s)
export SLURM_CONF=$lab/etc/slurm.conf

down() {
  local pid
  [ ! -s "$lab/slurmctld.pid" ] || scancel --user=root 2>/dev/null || true
  for name in slurmd.n{1..4} slurmctld munged; do
    pid=$(cat "$lab/$name.pid" 2>/dev/null || cat "$lab/munge/$name.pid" 2>/dev/null || true)
    # The pid file may outlive its process: only a process of that name is ours.
    if [ -n "$pid" ] && grep -aq "${name%%.*}" "/proc/$pid/cmdline" 2>/dev/null; then kill "$pid"; fi
  done
  sed -i '/# mimic_test_cluster$/d' /etc/hosts
}

up() {
  mkdir -p "$lab"/{etc,state,spool.n{1..4},dev,munge,run}
  chmod 755 "$lab"
  for i in 0 1 2 3; do [ -c "$lab/dev/nvidia$i" ] || mknod -m 666 "$lab/dev/nvidia$i" c 1 3; done
  printf '127.0.0.1 n1 n2 n3 n4 # mimic_test_cluster\n' >>/etc/hosts
  dd if=/dev/urandom of="$lab/munge/key" bs=128 count=1 status=none
  chown -R munge:munge "$lab/munge" && chmod 755 "$lab/munge" && chmod 600 "$lab/munge/key"
  setpriv --reuid munge --regid munge --clear-groups munged --key-file="$lab/munge/key" --socket="$lab/munge/socket" \
    --pid-file="$lab/munge/munged.pid" --log-file="$lab/munge/log" --seed-file="$lab/munge/seed"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$self(127.0.0.1)
SlurmUser=root
SlurmctldPort=16917
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool.%n
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd.%n.pid
SlurmctldLogFile=$lab/slurmctld.log
SlurmdLogFile=$lab/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=3,sched_interval=3,batch_sched_delay=0
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
CommunicationParameters=NoAddrCache,NoInAddrAny,NoCtldInAddrAny
NodeName=n[1-4] NodeHostname=$self NodeAddr=127.0.0.1 Port=[17101-17104] CPUs=48 RealMemory=500000 Gres=gpu:a100:4 Feature=big State=UNKNOWN
Licenses=mimic:4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=public Nodes=n1,n2 Default=YES MaxTime=7-0 PriorityTier=1 GraceTime=30 State=UP
PartitionName=htc Nodes=n1,n2 MaxTime=4:00:00 PriorityTier=1 PreemptMode=OFF State=UP
PartitionName=frail Nodes=n3 PriorityTier=1 State=UP
PartitionName=lent Nodes=n4 PriorityTier=1 GraceTime=30 State=UP
PartitionName=owners Nodes=n4 PriorityTier=10 PreemptMode=OFF State=UP
CONF
  printf 'NodeName=n[1-4] Name=gpu Type=a100 File=%s/dev/nvidia[0-3]\n' "$lab" >"$lab/etc/gres.conf"
  slurmctld
  for node in n1 n2 n3 n4; do slurmd -N $node; done
  for _ in $(seq 100); do
    [ "$(sinfo -N -h -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 4 ] && return
    sleep 0.2
  done
  echo "the nodes did not come up; see $lab/*.log" >&2
  return 1
}

"$1"
