#!/usr/bin/env bash
# The ranks of one machine, or the same line on each of several:
#
#     launch/torchrun.sh --size medium
#     NODES=2 ENDPOINT=first-host:29500 launch/torchrun.sh --size medium
#
# NODES=1:2 goes on with one machine where the other is lost; see README.md.
set -euo pipefail

# A machine that joins later waits for ever for the store that is shared otherwise (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

here=$(dirname "${BASH_SOURCE[0]}")
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${RANKS:-auto}" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${ENDPOINT:-localhost:0}" \
    --rdzv-id "${RUN:-shardopt}" \
    --rdzv-conf "${CONF:-last_call_timeout=30}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} \
    "$here/train.py" --resume auto "$@"
