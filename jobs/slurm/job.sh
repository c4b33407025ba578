# How a job runs, for the scripts beside this file: starts what it is for under srun, and decides what its end means.
#
# A job that is told to make room (by --signal when its time is nearly up, by a preemption, by `scancel --signal=USR1`)
# passes that on, lets everything be saved, and queues itself again. One whose ranks or nodes die starts again with the
# nodes that are left. One that fails twice in the same way at the same step gives up.

set -euo pipefail
# Where sbatch was called: the project's root.
cd "${SLURM_SUBMIT_DIR:?this is a job script; submit it with sbatch, or with python jobs/submit.py}"
# What a site's file need not say. It and `enter` may run what touches variables that are not set, as conda does.
enter() { :; }
IN=() SRUN=()
set +u
source "${SITE:-jobs/slurm/site.sh}"
enter
set -u
here=${SLURMD_NODENAME:-$(hostname -s)} # the node of this script

# An array's number is one of its jobs' own too: that one has no other name that means it alone.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

leaving=
# Told to make room. SLURM signals this shell alone where --signal=B: says so; the step's processes are told from here,
# again and again, for those that are just starting do not hear it.
leave() {
    [ -z "$leaving" ] || return 0
    leaving=--leaving
    while kill -0 $$ 2>/dev/null && scancel --signal=USR1 "$job"; do sleep 5; done &
    telling=$!
}
telling=
trap leave USR1 TERM

say() { echo "job $SLURM_JOB_ID: $*" >&2; }

# Waits for a process, through signals; gives its status.
finish() {
    local status
    while :; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

ranks_per_node() { echo "${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE}}"; }

nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# value_of FLAG ARGUMENTS...: what the last of `FLAG VALUE` and `FLAG=VALUE` gives, as commands read it; fails without.
value_of() {
    local flag=$1 word before= value=
    shift
    for word in "$@"; do
        case $word in "$flag="*) value=${word#*=} ;; esac
        [ "$before" != "$flag" ] || value=$word
        before=$word
    done
    [ -n "$value" ] && printf '%s\n' "$value"
}

# A port that nothing on this node has: this job's own, or one far from those of the jobs submitted around it, which may
# listen a moment later.
port() {
    local i port
    for ((i = 0; i < 1000; i++)); do
        port=$((20000 + (SLURM_JOB_ID + 611 * i) % 10000))
        grep -qs "^ *[0-9]*: [0-9A-F]*:$(printf %04X "$port") " /proc/net/tcp /proc/net/tcp6 || break
    done
    echo "$port"
}

# The nodes that answer, a line each; a dead one does not within the time.
nodes_alive() {
    local node no_gpus=${SLURM_GPUS_ON_NODE:+--gres=none} # which SLURM 22.05 refuses where it knows of no GPUs
    for node in $(nodes); do
        { timeout 30 srun --overlap --no-kill --nodes=1 --ntasks=1 --nodelist="$node" $no_gpus true >/dev/null &&
            echo "$node" || say "$node does not answer"; } &
    done
    wait
}

# Ends here where SLURM itself ends this job (scancel, scontrol requeue): then nothing is left to decide.
end_if_ended() {
    local state
    [ -z "$telling" ] || kill "$telling" 2>/dev/null || true # the job's next start is not meant
    state=$(squeue --noheader --jobs "$job" --format %T) || return 0
    [ "$state" != RUNNING ] || return 0
    say "ends, as SLURM was asked to"
    exit 0
}

# Queues this job again, which ends it.
requeue() {
    end_if_ended
    if scontrol requeue "$job"; then
        say "queued again"
        sleep 60 # until SLURM ends it
    else
        say "cannot be queued again here; submit it again to continue"
        exit 75
    fi
    exit 0
}

# Ranks that train hear signals themselves. Their launchers must not: SLURM ends a step whose first process has ended.
deaf=(bash -c 'trap "" USR1 TERM; exec "$@"' launcher)
# Nor may an elastic agent; but where SLURM ends the step itself, it must end with its ranks, which it would start again.
# It hears of that once, as SIGHUP, which it passes on to them: another would end it while they still save.
passing=(bash -c "$(declare -f finish)"'
    trap "" USR1 TERM; "$@" & agent=$!; trap "trap : TERM; kill -HUP $agent" TERM; finish $agent' launcher)

# step COMMAND...: a step of one process on this node.
step() {
    srun "${SRUN[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$here" ${SLURM_GPUS_ON_NODE:+--gres=none} \
        ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@"
}
# ask COMMAND...: what a short command prints, with the Python that ranks get: a site's may be where srun leads alone.
ask() { if [ ${#SRUN[@]} -eq 0 ]; then "${IN[@]}" "$@"; else step "${deaf[@]}" "${IN[@]}" "$@"; fi; }
# once COMMAND...: one process that begins anew where it was stopped, until it is done.
once() {
    local status=0
    [ -z "$leaving" ] || requeue
    step "${IN[@]}" "$@" &
    finish $! || status=$?
    [ "$status" -ne 0 ] || return 0
    [ -z "$leaving" ] || requeue
    exit "$status"
}

# on_nodes LEAST MOST COMMAND...: a rank a GPU on LEAST to MOST nodes, under torchrun's elastic agents. An agent starts
# its ranks again where some die, and goes on with fewer nodes, or with ones to spare, where a node does. Flags of
# torchrun and what stands before it are in `agent` and `before`. An agent that hears nothing of the others for
# read_timeout ends its ranks, which know better: where the network is back in time they go on (moe_dit/runtime/silence.py).
on_nodes() {
    local least=$1 most=$2 head silence=${MOE_DIT_SILENCE_SECONDS:-180}
    shift 2
    head=$(grep -Fx "$here" <<<"$alive" || head -n 1 <<<"$alive") # this one, where ports are known
    # srun has not inherited --cpus-per-task from sbatch since SLURM 22.05.
    srun "${SRUN[@]}" --no-kill --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=1 \
        --nodes="$(wc -l <<<"$alive")" --nodelist="$(paste -sd, <<<"$alive")" \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
        "${before[@]}" "${IN[@]}" torchrun --nnodes="$least:$most" --nproc-per-node="$(ranks_per_node)" \
        --max-restarts=3 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$ATTEMPT" \
        --rdzv-endpoint="$(address "$head"):$(port)" \
        --rdzv-conf="last_call_timeout=10,join_timeout=${JOIN_SECONDS:-180},read_timeout=$((${silence%.*} + 60))" \
        "${agent[@]}" "$@"
}

# on_one_node COMMAND...: a rank a GPU under DeepSpeed's own launcher.
on_one_node() {
    local ranks=() # without flags it takes the GPUs that SLURM gave this job
    [ -n "${SLURM_GPUS_ON_NODE:-}" ] || ranks=(--num_gpus "$RANKS_PER_NODE")
    srun "${SRUN[@]}" --nodes=1 --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
        "${deaf[@]}" "${IN[@]}" deepspeed "${ranks[@]}" --master_port "$(port)" "$@"
}

# How other nodes reach a node.
address() { scontrol show node "$1" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'; }

# train ARGUMENTS...: jobs/train.py with these, until its steps are done.
train() {
    local status next start
    local before=("${passing[@]}") agent=(--signals-to-handle=SIGHUP,SIGINT --shutdown-timeout=300)
    export MOE_DIT_JOB="${SLURM_CLUSTER_NAME:-}/$SLURM_JOB_ID" # by which its ranks name what they write
    alive=$(nodes)
    for ((ATTEMPT = 1; ; ATTEMPT++)); do
        # Least and most nodes, and the run's folder, a line each.
        start=$(ask python -m moe_dit.cluster.job begin --nodes "$(wc -l <<<"$alive")" \
            --wanted $((SLURM_JOB_NUM_NODES - ${SPARE_NODES:-0})) --ranks-per-node "$(ranks_per_node)" \
            --attempt "$ATTEMPT" -- "$@") ||
            { status=$?; [ "$status" -eq 2 ] || { [ "$ATTEMPT" -eq 1 ] && [ -z "$leaving" ]; } || requeue; exit 2; }
        [ -z "$leaving" ] || requeue
        mapfile -t start <<<"$start"
        if [ "$SLURM_JOB_NUM_NODES" -eq 1 ]; then
            on_one_node jobs/train.py "$@" &
        else
            on_nodes "${start[0]}" "${start[1]}" jobs/train.py "$@" &
        fi
        status=0
        finish $! || status=$?
        [ -z "$leaving" ] || end_if_ended
        next=$(ask python -m moe_dit.cluster.job end --run "${start[2]}" --status "$status" \
            --attempt "$ATTEMPT" $leaving)
        case $next in
        done) exit 0 ;;
        requeue) requeue ;;
        again)
            alive=$(nodes_alive)
            [ -n "$alive" ] || requeue
            ;;
        *) exit 1 ;;
        esac
    done
}

# everywhere COMMAND...: a command that goes on where it was stopped, on all nodes, until it is done.
everywhere() {
    local status count
    local before=() agent=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
    alive=$(nodes)
    for ((ATTEMPT = 1; ; ATTEMPT++)); do
        count=$(wc -l <<<"$alive")
        [ -z "$leaving" ] || requeue
        on_nodes "$count" "$count" "$@" &
        status=0
        finish $! || status=$?
        [ "$status" -ne 0 ] || return 0
        [ -z "$leaving" ] || requeue
        if [ "$ATTEMPT" -gt 1 ]; then
            say "failed twice, see above"
            exit "$status"
        fi
        alive=$(nodes_alive)
        [ -n "$alive" ] || requeue
    done
}
