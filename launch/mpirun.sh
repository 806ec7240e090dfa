#!/usr/bin/env bash
# Ranks by MPI, with mpi4py: MPI tells them of one another, and they talk over NCCL or gloo.
#
#     RANKS=2 launch/mpirun.sh --size medium
#
# -m mpi4py: an exception on one rank ends all of them.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
exec mpirun -n "${RANKS:-2}" "${PYTHON:-python}" -m mpi4py "$here/train.py" --resume auto "$@"
