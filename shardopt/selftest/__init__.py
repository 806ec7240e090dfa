"""Does it work here? The checks that a user runs on his own ranks, backend and devices.

::

    torchrun --nproc-per-node 8 -m shardopt.selftest
    mpirun -n 8 python -m mpi4py -m shardopt.selftest --mpi
    python -m shardopt.selftest
"""
