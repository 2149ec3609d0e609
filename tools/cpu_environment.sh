# Sourced by dist_train.sh and dist_test.sh, with the number of processes: settings that
# CPUs profit from. Nothing is set where there is a GPU, nor what is set already.
#
# glibc would return large buffers to the system after every step and fault them in anew
# at the next; here it keeps them, at the price of resident memory. Threads that spin
# while they wait would stall the other processes. And torchrun gives each process one
# thread, where these share the cores evenly.
if ! { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
    threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
    export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
fi
